"""Load weights from a pre-trained run: all parts that the method transfers, or those that the setting `load` names.

With `load` you can repeat the paper's comparisons:

    DRP without pre-trained dynamics (Table 1)      finetune --method drp --checkpoint DRP_RUN --load motion,image
    IPV without pre-trained dynamics (Table 1)      finetune --method ipv --checkpoint IPV_RUN --load image
    IPV_pre_DRP_ft (Fig. 7)                         finetune --method drp --checkpoint IPV_RUN --load image,latent
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from localmotion import methods
from localmotion.config import RunConfig
from localmotion.errors import CheckpointError, ConfigError, unknown_name
from localmotion.files import one_line
from localmotion.methods.base import Method
from localmotion.models.rssm import RSSM
from localmotion.recipe import Recipe
from localmotion.runs import checkpoint
from localmotion.runs.settings import read_config
from localmotion.runs.sharing import local_run
from localmotion.training.checks import check_start


@dataclass
class Transfer:
    """What was loaded and what was not."""

    source: str
    method: str
    parts: tuple[str, ...]
    loaded: list[str]
    notes: list[str] = field(default_factory=list)

    def line(self) -> str:
        """One line for the console."""
        what = f"{len(self.loaded)} tensors of {', '.join(self.parts)}" if self.parts else "nothing"
        head = f"loaded {what} from {self.source} ({self.method})"
        return "; ".join([head, *self.notes])


def load_pretrained(method: Method, run: RunConfig) -> Transfer:
    """Load weights of ``run.checkpoint`` by name.

    Raises CheckpointError for a run that is not a pre-training run, for missing parts, for other shapes, and for a run
    of another method if ``run.load`` names no parts. Raises ConfigError for parts that the method does not transfer,
    and for a recipe that runs foreign code. A part that the settings of ``run`` leave out of the method is noted, not loaded.
    """
    source = local_run(run.checkpoint)
    theirs = read_config(source)
    parts = _parts(method, run)
    foreign = theirs.method != run.method
    check_start(type(method), run, run.checkpoint, methods.get(theirs.method), theirs.stage)
    if not run.load and theirs.stage not in method.acts_after:
        parts = _without_actor(method, run, parts)
    path = checkpoint.newest(source)
    weights = checkpoint.read(path, "weights")
    here, there = {key.partition(".")[0] for key in method.state_dict()}, {key.partition(".")[0] for key in weights}
    notes = []
    if absent := [part for part in parts if method.transfers[part] not in here]:  # its settings left it out: no teacher
        if run.load:
            raise ConfigError(f"--load {run.load}: with these settings {run.method} has no {method.transfers[absent[0]]} to load")
        notes += [f"not used: {', '.join(absent)}"]
        parts = tuple(part for part in parts if part not in absent)
    if lacking := [part for part in parts if part not in there]:
        known = ", ".join(part for part in method.transfers if part in there)
        raise CheckpointError(f"{source}: has no {', '.join(lacking)} to load; --load can name {known or 'nothing'}")
    places = {part: method.transfers[part] for part in parts}  # name in the checkpoint -> name here
    chosen = {}
    for key, value in weights.items():
        part, _, rest = key.partition(".")
        if part in places:
            chosen[f"{places[part]}.{rest}"] = value
    own = {key for key in method.state_dict() if key.partition(".")[0] in places.values()}
    if foreign:
        for columns in _without_actions(method, chosen):
            notes.append(f"{columns} without its columns for actions")
        for text, names in (("the checkpoint lacks", own - set(chosen)), ("not used:", set(chosen) - own)):
            notes += [f"{text} {_few(names)}"] if names else []
        chosen = {key: value for key, value in chosen.items() if key in own}
    elif missing := sorted(own - set(chosen)):
        _check_sizes(method, run, theirs)
        raise CheckpointError(f"{path}: the checkpoint lacks {_few(missing)}; are method, preset and settings the same?")
    try:
        loaded = checkpoint.load_weights(method, chosen, str(path), partial=True)
    except CheckpointError:
        _check_sizes(method, run, theirs)
        raise
    if fresh := [place for part, place in method.transfers.items() if part not in parts and place in here]:
        notes.append(f"not pre-trained: {', '.join(fresh)}")
    return Transfer(run.checkpoint, theirs.method, parts, loaded, notes)


def _check_sizes(method: Method, run: RunConfig, theirs: RunConfig) -> None:
    """Raise CheckpointError if the two runs have pictures of other sides. For weights that did not fit."""
    side = (theirs.recipe or Recipe()).size
    if side != method.image_size:
        raise CheckpointError(
            f"{run.checkpoint}: was trained on pictures of {side} pixels, and this run's have {method.image_size}; give a store"
            f" made with --size {side}, or a checkpoint of pictures of {method.image_size} pixels"
        )


def _parts(method: Method, run: RunConfig) -> tuple[str, ...]:
    """Names of the child modules to load. Raises ConfigError for a part that the method does not transfer."""
    if not run.load:
        return tuple(method.transfers)
    parts = tuple(part.strip() for part in run.load.split(","))
    for part in parts:
        if part not in method.transfers:
            raise unknown_name(f"part of {run.method} to load", part, method.transfers)
    if len(set(parts)) < len(parts):
        raise ConfigError(f"--load {run.load}: names a part twice")
    return parts


def _without_actor(method: Method, run: RunConfig, parts: tuple[str, ...]) -> tuple[str, ...]:
    """Those of ``parts`` that a model which does not act has."""
    with torch.device("meta"):
        model = type(method)(run.model, image_size=method.image_size, action_dim=None)
    there = {name for name, _ in model.named_children()}
    return tuple(part for part in parts if part in there)


def _without_actions(method: Method, chosen: dict[str, Tensor]) -> list[str]:
    """Load only the latent's columns of each recurrent model's first layer, and keep this method's columns for actions.

    Methods use different actions (none, motion, the environment's), so weights for one kind are useless for another.
    The columns for the latent come first in every method. Returns the keys that were changed in ``chosen``.
    """
    found = []
    for name, module in method.named_modules():
        key = f"{name}.img_in.weight"
        if not isinstance(module, RSSM) or key not in chosen:
            continue
        mine, theirs = module.img_in.weight.detach(), chosen[key]
        if theirs.dim() == 2 and len(theirs) == len(mine) and theirs.shape[1] >= module.flat:
            chosen[key] = mine.clone()
            chosen[key][:, : module.flat] = theirs[:, : module.flat]
            found.append(key)
    return found


def _few(names: Iterable[str]) -> str:
    """The first three of some names."""
    names = sorted(names)
    return ", ".join(one_line(name, 120) for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
