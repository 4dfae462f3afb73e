"""Settings: frozen dataclasses, presets, and strict loading.

The defaults of every dataclass are the paper's (DRP Table 5, and IPV where the paper is silent). A run's settings are
composed in this order, and later ones win: defaults, suite (the paper's settings for a benchmark), preset, flags. The
preset `paper` changes nothing; `small` takes hours on two CPU cores, `tiny` minutes, `debug` seconds. An unknown name
is an error that names the nearest known ones. A configuration contains no code: methods, backends and environments are
registry names, and values are JSON scalars or lists of them.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import math
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from localmotion.errors import ConfigError, typed, unknown_name
from localmotion.limits import Limits, at_least, shares
from localmotion.recipe import Motion, Recipe, read_recipe

Stage = str
"""Name of one of the method's `stages`: pretrain, finetune, train, or one of its own."""
PRESETS = ("paper", "small", "tiny", "debug")


@dataclass(frozen=True)
class PretrainConfig:
    """Pre-training on a clip store (Table 5, upper half)."""

    updates: int = 600_000
    """Training iterations."""
    batch_size: int = 16
    """Video segments in a batch."""
    length: int = 25
    """Video segment length T, frames."""
    lr: float = 3e-4
    """Learning rate of Adam."""
    lr_decay: float = 0.0
    """Share of the updates, at the end, over which the learning rate falls linearly to zero. The paper gives no
    value."""
    heldout_fraction: float = 0.1
    """Share of clips that are never trained on, for the held-out figures. A hash of the clip's id selects them."""
    log_every: int = 100
    """Updates between lines in metrics.jsonl."""
    eval_every: int = 5_000
    """Updates between measurements on the held-out clips (masked reconstruction, open-loop prediction)."""
    eval_batches: int = 8
    """Number of held-out batches in one measurement."""
    save_every: int = 5_000
    """Updates between checkpoints."""


@dataclass(frozen=True)
class OnlineConfig:
    """Learning in an environment: fine-tuning and training from scratch (DRP, Table 5, lower half; IPV's release)."""

    env_steps: int = 255_000
    """Budget in env steps (agent steps x action repeat). Paper: 255K Meta-World, 1.02M DMC Remastered."""
    updates: int = 100_000
    """Updates of a run that learns from logged episodes (``data``). With an environment, `env_steps` sets the length."""
    batch_size: int = 50
    """Sequences in a batch. Paper: 50 Meta-World, 16 DMC."""
    length: int = 50
    """Trajectory segment length T, agent steps."""
    prefill: int = 5_000
    """Random exploration before learning, in env steps. Paper: 5000 Meta-World, 1000 DMC. Learning begins with the next
    episode. If a random episode could last to the end of the run, it ends with the prefill."""
    warmup_updates: int = 100
    """Updates on the prefill data before acting with the policy (IPV's release)."""
    freeze_updates: int = 100
    """The pre-trained encoder and latent dynamics are frozen for this many updates (IPV's release; Meta-World only)."""
    train_every: int = 5
    """Agent steps between updates (paper: training frequency)."""
    replay_capacity: int = 1_000_000
    """Replay buffer capacity, agent steps."""
    replay_storage: Literal["auto", "memory", "disk", "device"] = "auto"
    """Where sequences are sampled from. auto: the GPU if the replay needs at most half of its free memory, else memory
    by the same rule, else its files on disk. All give the same batches."""
    replay_flow: Literal["int8", "float16"] = "int8"
    """Storage of flow. int8: one logarithmic byte per component (error below 0.001 pixel or 3 %). float16:
    unchanged."""
    prioritize_ends: bool = False
    """Sample windows at episode ends more often (IPV's release; Meta-World)."""
    lr: float = 3e-4
    """Learning rate of the world model."""
    lr_decay: float = 0.0
    """Share of the updates, at the end, over which the learning rate falls to zero. Stages on logged episodes only."""
    actor_lr: float = 8e-5
    """Learning rate of the actor."""
    critic_lr: float = 8e-5
    """Learning rate of the critic."""
    pretrained_lr_factor: float = 0.1
    """Factor on the learning rate of the pre-trained motion encoder and latent dynamics ("slowly fine-tuned", 4.4; the
    paper gives no number). It applies only if a checkpoint was loaded."""
    eval_every: int = 10_000
    """Agent steps between evaluations. In a run on logged episodes: updates."""
    eval_episodes: int = 10
    """Episodes in one evaluation."""
    log_every: int = 100
    """Updates between lines in metrics.jsonl."""
    save_every: int = 5_000
    """Agent steps between checkpoints (written at the next end of an episode). In a run on logged episodes: updates."""
    phase_at: float | None = None
    """Share of the run's agent steps after which environments change to their next phase (`diswm:`, the other palette), those of
    evaluations too, at the next episode. None: never. Only where the agent plays: rollouts refuse it, logged episodes ignore
    it."""


@dataclass(frozen=True)
class RolloutConfig:
    """On-policy learning from several environments (stages whose source is `ROLLOUT`). Budget, clocks, learning rates
    and evaluation are those of `OnlineConfig`."""

    environments: int = 8
    """Number of environments in lockstep."""
    workers: int = 0
    """Processes for the environments; 0: one per core. They are spawned, so a script that starts such a run needs
    `if __name__ == "__main__"`."""
    steps: int = 64
    """Agent steps of each environment between updates."""
    epochs: int = 4
    """Number of passes over each rollout."""
    minibatches: int = 4
    """Number of updates in an epoch. Each update uses a part of the environments, so there are at most as many."""

    @property
    def agent_steps(self) -> int:
        """Agent steps of one rollout, of all environments together."""
        return self.environments * self.steps


@dataclass(frozen=True)
class RehearsalConfig:
    """A stage that learns to act goes on learning from clips (`training.rehearsal`). Batches are as in pre-training
    (`pretrain.batch_size`, `pretrain.length`). Not in DRP's paper."""

    data: str = ""
    """Clip store. Empty: no rehearsal."""
    weight: float = 1.0
    """Weight of the losses of pre-training beside those of the stage."""


@dataclass(frozen=True)
class OptimConfig:
    """Adam with IPV's settings (version 0.6), for every optimiser."""

    eps: float = 1e-5
    """Adam's epsilon."""
    clip: float = 100.0
    """Maximum global gradient norm of each optimiser; larger gradients are clipped."""
    weight_decay: float = 1e-6
    """L2 term added to the gradient."""


@dataclass(frozen=True)
class WorldModelConfig:
    """Image encoder, decoder and the recurrent state-space model(s)."""

    encoder: Literal["resnet", "cnn"] = "resnet"
    """Image encoder and decoder: residual (IPV) or plain CNN (DreamerV2)."""
    context: bool = True
    """IPV's context: a separate encoder encodes one random frame of the segment, and the decoder attends to it."""
    stem: Literal["conv", "unshuffle"] = "conv"
    """conv: first convolution at full resolution (paper). unshuffle: blocks of 4x4 pixels become channels (for
    CPUs)."""
    norm: Literal["batch", "none"] = "batch"
    """Normalisation inside the residual layers."""
    depth: int = 48
    """Width of the first stage of encoder and decoder."""
    context_mask: float = 0.75
    """Share of context tokens dropped at random in each cross-attention (IPV's release)."""
    context_dropout: float = 0.1
    """Dropout inside that cross-attention (IPV's release)."""
    context_side: int = 16
    """Finest context map, in cells a side, that the decoder attends to (IPV: 16)."""
    context_copy: bool = False
    """Add the context frame, weighted by a predicted mask, to the decoded picture (not in IPV). Without it, a small
    decoder spends its updates on drawing what does not move."""
    deter: int = 1024
    """Deterministic state width."""
    hidden: int = 1024
    """Width of the RSSM's hidden layers."""
    stoch: int = 32
    """Number of categorical latents."""
    classes: int = 32
    """Classes of each categorical latent."""
    units: int = 400
    """Width of the heads' layers (reward, actor, critic)."""
    layers: int = 4
    """Layers of each head."""
    kl_balance: float = 0.8
    """Share of the KL that trains the prior."""
    image_weight: float = 1.0
    """Weight of the image losses, which are sums over a picture's values. A picture of 32 pixels has a quarter of the
    values of the paper's 64. Weight 4 then keeps the balance with the KL; without this balance the latent stays
    empty."""
    reward_weight: float = 1.0
    """Weight of the reward losses, which are squared errors. If rewards are small (cheetah run: 0.1 per agent step),
    these losses are a thousandth of the others, and the latent ignores rewards."""
    LIMITS: ClassVar[Limits] = {
        **at_least(1, "depth", "context_side", "deter", "hidden", "stoch", "classes", "units"),
        **at_least(0, "layers", "image_weight", "reward_weight"),
        **shares("context_mask", "context_dropout", "kl_balance"),
    }


@dataclass(frozen=True)
class BehaviourConfig:
    """Actor-critic in imagination (DRP Eqs. 10-12; IPV's release)."""

    horizon: int = 15
    """Imagination horizon H."""
    discount: float = 0.99
    """Discount gamma."""
    lambda_: float = 0.95
    """lambda of the lambda-return."""
    entropy: float = 1e-4
    """Entropy regularisation eta."""
    slow_critic_every: int = 100
    """Updates between hard copies into the slow (target) critic."""
    continuation: bool = False
    """A head predicts whether the episode goes on, and no value follows a predicted end (DreamerV2). Off: as in IPV's release, whose
    episodes end by time limits only. On by default in environments of your own."""
    LIMITS: ClassVar[Limits] = {
        **at_least(1, "horizon", "slow_critic_every"),
        **at_least(0, "entropy"),
        **shares("discount", "lambda_"),
    }


@dataclass(frozen=True)
class RunConfig:
    """All settings of one run."""

    method: str
    """Registry name of the method."""
    stage: Stage
    """pretrain, finetune, train, or another stage of the method."""
    model: Any
    """The method's own settings."""
    preset: str = "small"
    """paper (exactly Table 5), small (hours on two CPU cores), tiny (minutes, 32-pixel pictures), debug (seconds)."""
    seed: int = 0
    """Seed of weights, sampling, exploration and environments."""
    label: str = ""
    """Name of the run in reports. Runs with the same label differ only in their seed. Empty: named by method and
    origin."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto measures at start whether bf16 autocast is faster here."""
    threads: int = 0
    """CPU threads of torch. 0: as many as cores are free; a CPU run checks this again while it runs
    (docs/performance.md). Set a number if runs must repeat bit for bit."""
    deterministic: bool = False
    """Use only deterministic GPU kernels. Slower; raises an error if an operation has none. CPU runs are always
    deterministic."""
    cuda_graph: bool = False
    """On a GPU: record the update as a CUDA graph after the first three updates and replay it. This takes one launch
    instead of thousands."""
    compile: bool = False
    """For a GPU: torch.compile for encoders, decoders, attention blocks and heads. Kernels are fewer and larger, and
    round differently. Compilation during the first updates took 30 to 70 s on two CPU cores."""
    env: str = ""
    """Environment name, suite:task, or one of your own (docs/own_environments.md). With logged episodes (``data``) it is used
    for evaluation only."""
    action_repeat: int = 0
    """Env steps per agent step; 0: the suite's default (DMC 2, Meta-World 1)."""
    quality: Literal["auto", "fast", "reference"] = "auto"
    """Rendering quality. auto is `fast` with software GL, else `reference`."""
    supersample: int = 1
    """Render pictures at n times their side and average them. With 2, flow finds slow motion far better (Meta-World),
    at a cost of 2 to 5 ms per frame."""
    observed: Literal["pixels", "vectors", "both"] = "pixels"
    """The agent's observation: pictures, the suite's low-dimensional vector, or both. dreamer_v3 supports vectors."""
    motion: Motion = "recipe"
    """Motion while acting, for methods that perceive it: exact (from the simulator's state) or perceived (from pictures);
    recipe: as the recipe says. The difference between the two is what perception costs."""
    env_options: dict[str, Any] = field(default_factory=dict)
    """Options of the environment: `time_limit` (env steps), `camera` if the suite has cameras, and the suite's own,
    e.g. {difficulty: easy} of distracting. `localmotion.envs.list_options` lists their names."""
    data: str = ""
    """Clip store. In pre-training: the videos. In fine-tuning and training: logged episodes (`collect --store`) to
    learn from, instead of an environment."""
    labels: int = 0
    """Number of labelled transitions of the logged episodes (``data``); 0: all. The run learns from these only. Episodes are
    taken in an order that depends on ``seed``, so a larger number adds to the labels of a smaller one."""
    checkpoint: str = ""
    """Pre-trained run to start from (fine-tuning): a run directory, hf:owner/name[@revision] or shelf:NAME
    (docs/sharing.md)."""
    load: str = ""
    """Parts to load from the checkpoint, e.g. image,latent. Empty: all parts that the method transfers, from a run of
    the same method. With named parts, the other parts start untrained (an ablation), and the checkpoint may be of
    another method with the same sizes."""
    recipe: Recipe | None = None
    """Recipe of the streaming perception. None: the recipe of the checkpoint's clip store, or the default recipe."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    online: OnlineConfig = field(default_factory=OnlineConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    rehearsal: RehearsalConfig = field(default_factory=RehearsalConfig)


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as nested dicts of JSON values."""
    out = dataclasses.asdict(config)
    if isinstance(config, RunConfig):
        out["recipe"] = config.recipe.to_json() if config.recipe else {}
    return out


_hints = functools.cache(get_type_hints)  # of one class it takes a millisecond, and a study composes hundreds of runs


def update(config: Any, values: Mapping[str, Any], where: str = "", ignore_unknown: bool = False) -> Any:
    """A copy of a (nested) frozen dataclass with changed values.

    Raises ConfigError for unknown keys and wrong types.
    """
    hints = _hints(config.__class__)
    changes: dict[str, Any] = {}
    for key, value in values.items():
        if key not in hints:
            if ignore_unknown:
                continue
            raise unknown_name("setting", f"{where}{key}"[:80], [f"{where}{name}" for name in hints])
        current = getattr(config, key)
        if hints[key] == Recipe | None:
            changes[key] = read_recipe(value, current)
        elif dataclasses.is_dataclass(current) and isinstance(value, Mapping):
            changes[key] = update(current, value, f"{where}{key}.", ignore_unknown)
        else:
            changes[key] = _coerce(f"{where}{key}", value, hints[key])
    return dataclasses.replace(config, **changes)


def _coerce(name: str, value: Any, hint: Any) -> Any:
    """Check ``value`` against a type hint. Numbers in text form (from flags) become numbers."""
    if hint is Any:
        return value
    origin = get_origin(hint)
    if origin is Literal:
        if value in get_args(hint):
            return value
        raise ConfigError(f"setting {name}={value!r:.80}: must be one of {', '.join(map(str, get_args(hint)))}")
    if origin in (Union, types.UnionType):
        errors = []
        for option in get_args(hint):
            try:
                return None if option is type(None) and value in (None, "none", "None") else _coerce(name, value, option)
            except ConfigError as error:
                errors.append(str(error))
        raise ConfigError(errors[0])
    base = origin or hint
    if base is bool:
        if isinstance(value, bool):
            return value
        if str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
    elif base is int and not isinstance(value, bool):
        try:
            if float(value) == int(float(value)):
                return int(float(value))
        except (TypeError, ValueError, OverflowError):
            pass
    elif base is float and not isinstance(value, bool):
        try:
            if math.isfinite(float(value)):
                return float(value)
        except (TypeError, ValueError, OverflowError):
            pass
    elif base is str and isinstance(value, str):
        return value
    elif base is dict and isinstance(value, Mapping):
        return dict(value)
    elif base in (list, tuple) and isinstance(value, (list, tuple)):
        return base(value)
    elif isinstance(hint, type) and isinstance(value, hint):
        return value
    wanted = getattr(base, "__name__", str(hint))
    raise ConfigError(f"setting {name}={value!r:.80}: expected {wanted}, got {type(value).__name__}")


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All (dotted name, value) pairs of a nested configuration. A recipe counts as one value."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, Recipe):
            yield from leaves(value, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", value


def full_name(config: Any, name: str, video: bool | None = None) -> str:
    """The dotted name of a setting. Its last parts are enough if they are unique: `codes` or `tokenizer.codes` for `model.tokenizer.codes`.

    A short name that `pretrain` and `online` share, e.g. `batch_size`, means the setting for the run's stage:
    pretrain.batch_size if the stage learns from ``video``, else online.batch_size. Default of ``video``: whether the
    stage is called "pretrain".

    Raises ConfigError for a name that is unknown or ambiguous.
    """
    names = [dotted for dotted, _ in leaves(config)]
    if name in names:
        return name
    found = [dotted for dotted in names if dotted.endswith(f".{name}")]
    if len(found) > 1:
        video = config.stage == "pretrain" if video is None else video
        other = "online." if video else "pretrain."
        found = [dotted for dotted in found if not dotted.startswith(other)]
    if len(found) > 1:
        raise ConfigError(f"setting {name!r} is ambiguous: {', '.join(found)}")
    if not found:
        raise unknown_name("setting", name, names + [dotted.rsplit(".", 1)[-1] for dotted in names])
    return found[0]


def assign(config: Any, text: str, video: bool | None = None) -> Any:
    """Apply one ``name=value``; names are those of `full_name`.

    Raises ConfigError for a name that is unknown or ambiguous, or a value of the wrong type.
    """
    name, sign, raw = text.partition("=")
    if not sign:
        raise ConfigError(f"{typed(text)}: write it as name=value")
    name = full_name(config, name.strip(), video)
    try:
        value = yaml.safe_load(raw)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date such as 2026-13-45
        raise ConfigError(f"{typed(text)}: value cannot be read ({' '.join(str(error).split()):.200})") from error
    try:
        return update(config, nested(name, value))
    except ConfigError as error:
        others = [other for other, _ in leaves(config) if other != name]
        near = difflib.get_close_matches(name, others, n=3, cutoff=0.8)
        if fits := [other for other in near if _takes(config, other, value)]:
            raise ConfigError(f"{error}; did you mean {fits[0]}?") from error
        raise


def nested(name: str, value: Any) -> Any:
    """The mapping of mappings for `update` that has ``value`` at a dotted name."""
    for part in reversed(name.split(".")):
        value = {part: value}
    return value


def _takes(config: Any, name: str, value: Any) -> bool:
    """Whether the setting of this dotted name can have ``value``."""
    try:
        update(config, nested(name, value))
    except ConfigError:
        return False
    return True


def field_docs(cls: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, for --help and the report's table of settings."""
    import ast
    import inspect
    import textwrap

    body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]).body
    docs: dict[str, str] = {}
    for node, after in itertools.pairwise(body):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(after, ast.Expr):
            text = getattr(after.value, "value", None)
            if isinstance(text, str):
                docs[node.target.id] = " ".join(text.split())
    return docs


def all_docs(config: Any, prefix: str = "") -> dict[str, str]:
    """Docstrings of every setting in a nested configuration, by dotted name."""
    docs = {f"{prefix}{key}": text for key, text in field_docs(type(config)).items()}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, Recipe):
            docs.update(all_docs(value, f"{prefix}{item.name}."))
    return docs
