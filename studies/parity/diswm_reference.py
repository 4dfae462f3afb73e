"""Our DisWM beside its release (qiwang067/DisWM) by running both: same weights, batches and noise, in float64, three updates.

    python -m studies.parity.diswm_reference PATH/TO/DisWM [--out tests/diswm_reference.json]

Nothing of the release is here; its path is given. Weights, batches and noise follow the rules of `tests/diswm_parity.py`. The world model
and acting are compared; actor and critic learn otherwise than in the release (studies/parity/diswm.md). Printed are the largest relative
differences of each case; beyond `LIMITS` it ends with 1. With ``--out`` it writes the release's numbers, with which
`tests/test_diswm_parity.py` compares ours.
"""

from __future__ import annotations

import math
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from studies.parity import beside
from studies.parity.beside import LIMITS, difference, rules
from torch import Tensor

import diswm_parity as parity  # beside puts tests/ on the path  # isort: skip

COMMANDS: dict[str, dict[str, Any]] = {
    "pre-training": {},
    "pre-training, no free nats": {"kl_free": "0.0"},
    "fine-tuning": {"distillation": True},
    "fine-tuning, no free nats": {"distillation": True, "kl_free": "0.0"},
    "without a teacher": {"kl_free": "0.0"},
}
"""Flags of the release's commands, on top of its block `dmc2gym`, `beta_vae True` and the widths."""
STEP = 2_500
"""The counter that the release's world model keeps: agent steps of the prefill."""


# 1. The release on today's torch ----------------------------------------------------------------------------------------------


def load(path: Path, patch: pytest.MonkeyPatch) -> Any:
    """The release's modules, with its sampling by the rules."""
    packages = [
        "wandb",
        "numpy.testing.print_coercion_tables",
        "numpy.ma.core",
        "PIL",
        "ruamel",
        "ruamel.yaml",
    ]
    packages += ["torch.fx.experimental.migrate_gradual_types.operation", "gym", "gymnasium"]
    beside.stand_ins(patch, *packages)
    if not hasattr(torch.nn.init, "kaiming_normal"):
        patch.setattr(torch.nn.init, "kaiming_normal", torch.nn.init.kaiming_normal_, raising=False)
    for name in ("torch.utils.tensorboard", "wrappers"):  # the first asks for a package that is not needed here
        patch.setitem(sys.modules, name, beside.Anything(name))
    patch.syspath_prepend(str(path))
    import beta_vae
    import dreamer
    import models
    import pretrain_model
    import tools

    normal: Any = torch.distributions.Normal
    patch.setattr(normal, "rsample", lambda own, shape=(): own.loc + own.scale * parity.normal(own.loc.shape))
    patch.setattr(beta_vae, "reparametrize", lambda mean, log: mean + log.div(2).exp() * parity.normal(mean.shape))
    return types.SimpleNamespace(models=models, pretrain_model=pretrain_model, dreamer=dreamer, tools=tools)


def settings(path: Path, case: str) -> Any:
    """The release's settings with the widths of `parity.SIZES`."""
    blocks = yaml.safe_load(
        re.sub(r"(?<![\w.'])\d+e-?\d+\b(?!')", lambda m: f"{float(m[0]):.9f}", (path / "configs.yaml").read_text())
    )
    own = parity.SIZES
    found = {**blocks["defaults"], **blocks["dmc2gym"], "device": "cpu", "beta_vae": True, "num_actions": parity.A}
    found |= {"dyn_deter": own["deter"], "dyn_hidden": own["hidden"], "dyn_stoch": own["stoch"], "units": own["units"]}
    found |= {"z_dim": own["code"], "act": torch.nn.ELU, "size": tuple(found["size"])}
    return types.SimpleNamespace(**(found | COMMANDS[case]))


# 2. Names ---------------------------------------------------------------------------------------------------------------------


def theirs(name: str) -> str:
    """The release's name of one of our parameters or buffers."""
    layer, _, kind = name.rpartition(".")
    for ours, there in {"encoder": "encoder", "teacher": "encoder_distillation"}.items():
        if found := re.fullmatch(rf"{ours}\.net\.(\d+)", layer):
            inner = "dis_encoder.0" if int(found[1]) == 11 else f"encoder.{found[1]}"
            return f"{there}.{inner}.{kind}"
    if found := re.fullmatch(r"decoder\.net\.(\d+)", layer):
        number = int(found[1])
        inner = {0: "feat_to_decoder.0", 2: "decoder.0"}.get(number, f"decoder.{number - 2}")
        return f"heads.image.{inner}.{kind}"
    for ours, there in {
        "dynamics.img_in": "dynamics._inp_layers.0",
        "dynamics.gru": "dynamics._cell._layer",
        "dynamics.gru_norm": "dynamics._cell._norm",
        "dynamics.prior_in": "dynamics._img_out_layers.0",
        "dynamics.prior_out": "dynamics._ims_stat_layer",
        "dynamics.post_in": "dynamics._obs_out_layers.0",
        "dynamics.post_out": "dynamics._obs_stat_layer",
    }.items():
        if layer == ours:
            return f"{there}.{kind}"
    name = name.replace("reward.net.", "heads.reward._mean_layers.")
    last = 2 * 4
    name = re.sub(rf"behaviour\.actor\.net\.{last}\.", "actor._dist_layer.", name)
    name = re.sub(r"behaviour\.actor\.net\.", "actor._pre_layers.", name)
    return re.sub(r"behaviour\.(slow_)?critic\.net\.", lambda m: f"{'_slow_' if m[1] else ''}value._mean_layers.", name)


def in_our_names(model: Any, find: Callable[[str], Tensor | None]) -> dict[str, Tensor]:
    """What ``find`` gives for the release's names of our parameters, by our names. Left out where it gives nothing."""
    found = {name: find(theirs(name)) for name, _ in model.named_parameters()}
    return {name: value for name, value in found.items() if value is not None}


# 3. Both ----------------------------------------------------------------------------------------------------------------------


def filled(module: Any, model: Any) -> Any:
    """A module of the release with our weights."""
    state, known = module.state_dict(), set()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if (there := theirs(name)) in state:
                assert state[there].shape == tensor.shape, (name, there)
                state[there].copy_(tensor)
                known.add(there)
    left = {name for name in state.keys() - known if not name.startswith("_world_model.")}
    assert not left, left
    return module


def teachers_gradient(world: Any) -> dict[str, float]:
    """Norms of the gradients of the first update, when the teacher learns as released."""
    with pytest.MonkeyPatch.context() as patch:
        gradients = recorded(world, patch)
        world._train(batches(0))
    parts = {"teacher": [x for name, x in gradients.items() if name.startswith("encoder_distillation.")]}
    parts["all"] = list(gradients.values())
    return {
        f"gradient norm, {name}": float(torch.stack([x.square().sum() for x in part]).sum().sqrt())
        for name, part in parts.items()
    }


def recorded(world: Any, patch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """A dictionary that gets the gradients of each update before clipping."""
    gradients: dict[str, Tensor] = {}
    clip, named = torch.nn.utils.clip_grad_norm_, dict(world.named_parameters())

    def clipped(parameters: Any, most: float) -> Tensor:
        gradients.update({name: p.grad.clone() for name, p in named.items() if p.grad is not None and name not in gradients})
        return clip(parameters, most)

    patch.setattr(torch.nn.utils, "clip_grad_norm_", clipped)
    return gradients


def losses_of(metrics: dict[str, Any], video: bool) -> dict[str, float]:
    """Losses of the newest update by our names, without the constants of Gaussians' logarithms and of the code's KL."""
    code = float(metrics["beta_vae_kl_loss"])
    beta, constant = 0.015, 0.5 * math.log(2 * math.pi)
    found = {"image": float(metrics["image_loss"]) - constant * 3 * 64 * 64 - (0 if video else beta * code)}
    found["code_kl"] = code - 0.5e-6 * parity.SIZES["code"]
    if not video:
        found["reward"] = float(metrics["reward_loss"]) / 2 - constant
    if "distillation_kl_loss" in metrics:
        found["distillation"] = parity.ETA * float(metrics["distillation_kl_loss"])
    return found


def act(modules: Any, world: Any, behaviour: Any, config: Any) -> Tensor:
    """Actions (3, B, A) for the first frames of the batch."""
    agent = object.__new__(modules.dreamer.Dreamer)
    torch.nn.Module.__init__(agent)
    agent._config, agent._wm, agent._task_behavior = config, world, behaviour
    batch, state, actions = rules.make_batch(), None, []
    for t in range(3):
        obs = {"image": batch["image"][:, t].double().numpy(), "reward": np.zeros(parity.B)}
        with torch.no_grad():
            found, state = agent._policy(obs, state, training=False)
        actions.append(found["action"])
    return torch.stack(actions)


def compare(modules: Any, path: Path, case: str, patch: pytest.MonkeyPatch) -> tuple[dict[str, float], dict[str, Any]]:
    """(largest differences by kind, the release's numbers)."""
    video, config = parity.CASES[case][0] == "pretrain", settings(path, case)
    kind = modules.pretrain_model.WorldModel if video else modules.models.WorldModel
    start = parity.build(case)[1]
    world = filled(kind(STEP, config), start)
    released: dict[str, Any] = {}
    if config.distillation:
        released["as released"] = teachers_gradient(filled(kind(STEP, config), start))
        enter = modules.tools.RequiresGrad.__enter__

        def frozen(self: Any) -> None:
            enter(self)
            world.encoder_distillation.requires_grad_(False)

        patch.setattr(modules.tools.RequiresGrad, "__enter__", frozen)
    gradients = recorded(world, patch)
    worst, numbers, model = dict.fromkeys(LIMITS, 0.0), [], None
    for update, mine in enumerate(parity.updates(case)):
        gradients.clear()
        _, context, metrics = world._train(batches(update))
        there, model = losses_of(metrics, video), mine.model
        kl = context["kl"].mean()  # before free nats
        there["kl"] = float(kl.clamp(min=float(config.kl_free)))
        got = in_our_names(model, gradients.get)
        beside.measure(worst, mine, there, got)
        state = world.state_dict()
        for name, tensor in model.state_dict().items():
            if theirs(name) in state:
                worst["weights"] = max(worst["weights"], difference(tensor, state[theirs(name)]))
        numbers.append({"losses": there, "gradient norms": rules.norms(got, parity.PARTS)})
    result: dict[str, Any] = {"updates": numbers} | released
    parameters = dict(world.named_parameters())
    before, end = dict(start.named_parameters()), in_our_names(model, parameters.get)
    result["changes of weights"] = rules.norms(
        {name: x.detach() - before[name].detach() for name, x in end.items()}, parity.PARTS
    )
    if not video:
        behaviour = modules.models.ImagBehavior(config, world)
        filled(behaviour, start)
        actions = act(modules, world, behaviour, config)
        worst["actions"] = float((parity.act(case, model) - actions).abs().max())
        result["actions"] = actions.tolist()
    return worst, result


def batches(update: int) -> dict[str, Any]:
    """A batch as the release's loader gives it."""
    batch = parity.make_batch(update)
    return {key: batch[key].double().numpy() for key in ("image", "action", "reward")}


if __name__ == "__main__":
    sys.exit(beside.main("qiwang067/DisWM", COMMANDS, parity.fix_noise, load, compare, __doc__))
