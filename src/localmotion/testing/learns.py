"""Rules of learning: losses, gradients, optimisers, updates, and going on from a checkpoint."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from localmotion.compute import Compute
from localmotion.methods.base import VIDEO, Pass, Source, total
from localmotion.runs import checkpoint
from localmotion.testing.batches import ACTIONS
from localmotion.testing.recorded import RecordedGraph
from localmotion.testing.rules import CPU, Rule, Subject, require, rule
from localmotion.training.graphs import Replayed


class Walked(NamedTuple):
    """What one pass gave."""

    number: int
    each: Pass
    losses: dict[str, Tensor]
    metrics: dict[str, Tensor]


def walk(method: Any, stage: str, batch: dict[str, Tensor], seed: int = 0) -> list[Walked]:
    """The losses of all passes in order, without any step between them."""
    torch.manual_seed(seed)
    found, handed = [], None
    for number, each in enumerate(method.passes(stage)):
        losses, metrics, handed = each.losses(batch, handed)
        found.append(Walked(number, each, losses, metrics))
    return found


def losses_of(method: Any, stage: str, batch: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """All losses by name, detached."""
    return {name: value.detach() for step in walk(method, stage, batch, seed) for name, value in step.losses.items()}


@rule
def losses_match_their_scales(subject: Subject) -> None:
    """Each pass returns the losses that its scales name; losses and metrics are finite scalars."""
    for number, each, losses, metrics in walk(subject.build(), subject.stage, subject.data()):
        require(
            set(losses) == set(each.scales),
            f"pass {number} returns the losses {sorted(losses)}, its scales are {sorted(each.scales)}",
            "give each loss one scale of the same name",
        )
        for name, value in {**losses, **metrics}.items():
            require(value.shape == (), f"{name!r} has the shape {tuple(value.shape)}", "average it to a scalar")
            require(
                bool(torch.isfinite(value)), f"{name!r} is {float(value.detach())}", "look for a logarithm or a division by zero"
            )


@rule
def losses_are_pure(subject: Subject) -> None:
    """The same weights, batch and seed give the same losses; computing them changes neither batch nor weights."""
    method, batch = subject.build(), subject.data()
    kept = {key: value.clone() for key, value in batch.items()}
    weights = {name: value.detach().clone() for name, value in method.named_parameters()}
    first, again = losses_of(method, subject.stage, batch, 3), losses_of(subject.build(), subject.stage, subject.data(), 3)
    changed = sorted(name for name in first if not torch.equal(first[name], again[name]))
    require(not changed, f"the losses {changed} differ between two equal runs", "draw random numbers from torch's generator only")
    changed = sorted(key for key in batch if key not in kept or not torch.equal(batch[key], kept[key]))
    require(not changed, f"the losses write into the batch: {changed}", "write into a copy")
    changed = sorted(name for name, value in method.named_parameters() if not torch.equal(value, weights[name]))
    require(not changed, f"the losses change the weights {changed[:3]}", "leave steps to the optimisers, copies to after_update")


@rule
def every_group_learns(subject: Subject) -> None:
    """Each pass names its groups, and each group gets finite gradients that are not all zero from its passes."""
    method = subject.build()
    groups = {group.name: group for group in subject.groups(method)}
    stepped = {name for each in method.passes(subject.stage) for name in each.groups}
    idle = sorted(set(groups) - stepped)
    require(not idle, f"the groups {idle} are in no pass", "name them in a pass, or leave them out")
    for number, each, losses, _ in walk(method, subject.stage, subject.data()):
        loss = total(losses, each.scales)
        require(loss.requires_grad, f"the losses of pass {number} have no gradient", "do not detach them")
        for group in (groups[name] for name in each.groups if name in groups):
            gradients = torch.autograd.grad(loss, group.parameters, retain_graph=True, allow_unused=True)
            here = [gradient for gradient in gradients if gradient is not None]
            reached = any(float(gradient.abs().max()) > 0 for gradient in here if gradient.numel())
            require(reached, f"group {group.name!r} gets no gradient from pass {number}", "name it in a pass whose losses use it")
            finite = all(bool(torch.isfinite(gradient).all()) for gradient in here)
            require(finite, f"group {group.name!r}: a gradient is not finite", "look for a root or a division at zero")


@rule
def each_parameter_has_one_optimiser(subject: Subject) -> None:
    """Each parameter is in one group, or is frozen (`requires_grad_(False)`: a teacher, a slow copy) and in none."""
    for pretrained in (False, True):
        method = subject.build()
        groups = subject.groups(method, pretrained=pretrained)
        names = [group.name for group in groups]
        require(len(set(names)) == len(names), f"two groups share a name: {names}", "give each its own")
        places: dict[int, list[str]] = {}
        for group in groups:
            for parameter in group.parameters:
                places.setdefault(id(parameter), []).append(group.name)
        for name, parameter in method.named_parameters():
            held = places.get(id(parameter), [])
            require(len(held) < 2, f"{name} is in the groups {held}", "leave it in one")
            if held:
                require(parameter.requires_grad, f"{name} is frozen and in group {held[0]!r}", "leave it out of the group")
            else:
                require(not parameter.requires_grad, f"{name} is in no group", "add it to a group, or freeze it")
        counts = method.parameter_counts()
        require(
            sum(counts.values()) == sum(p.numel() for p in method.parameters()),
            f"parameter_counts {counts} does not add up to all parameters",
            "keep every parameter in a child module",
        )


def has_episodes(subject: Subject) -> bool:
    """Whether an episode may end within a sequence. Clips are sequences of one shot each."""
    return subject.source is not Source.CLIPS


def _updates(subject: Subject, method: Any) -> int:
    """As many updates as it takes for every pass to run twice."""
    return 1 + max(each.every for each in method.passes(subject.stage))


def _change(subject: Subject, compute: Compute) -> None:
    method = subject.build()
    updater = subject.updater(method, compute)
    before = {group.name: [p.detach().clone() for p in group.parameters] for group in updater.groups}
    for seed in range(_updates(subject, method)):
        metrics = updater.learn(subject.data(seed))
        bad = sorted(name for name, value in metrics.items() if not bool(torch.isfinite(value).all()))
        require(not bad, f"{bad} are not finite in update {seed}", "compute logarithms, norms and sums in float32")
    for group in updater.groups:
        pairs = zip(group.parameters, before[group.name], strict=True)
        moved = any(not torch.equal(now, then) for now, then in pairs)
        require(moved, f"no parameter of group {group.name!r} changed", "look at its learning rate and its pass")
    bad = sorted(name for name, p in method.named_parameters() if not bool(torch.isfinite(p).all()))
    require(not bad, f"the weights {bad[:3]} are not finite", "look at the gradients of their losses")
    left = sorted(name for name, p in method.named_parameters() if p.grad is not None)
    require(not left, f"{left[:3]} keep a gradient after the update", "call no backward: the updater does")


@rule
def updates_change_every_group(subject: Subject) -> None:
    """An update changes each group; losses, metrics and weights stay finite, and no gradient is left."""
    _change(subject, CPU)


@rule
def updates_work_in_bf16(subject: Subject) -> None:
    """The same holds under bfloat16 autocast."""
    _change(subject, Compute(torch.device("cpu"), True, 1, "test"))


def frozen_modules(method: nn.Module) -> dict[str, nn.Module]:
    """The largest modules whose parameters are all frozen, by name."""
    found: dict[str, nn.Module] = {}
    for name, module in method.named_modules():
        parameters = list(module.parameters())
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if parameters and not inside and not any(p.requires_grad for p in parameters):
            found[name] = module
    return found


@rule
def frozen_parts_stay(subject: Subject) -> None:
    """A frozen module, its buffers included, changes in `after_update` only."""
    method = subject.build()
    updater = subject.updater(method)  # it asks for the groups, which may freeze what the stage does not train
    frozen = frozen_modules(method)
    if not frozen:
        return
    method.train()
    before = {name: {k: v.clone() for k, v in module.state_dict().items()} for name, module in frozen.items()}
    updater._run(tuple(range(len(updater.passes))), subject.data())  # the update without after_update
    for name, module in frozen.items():
        changed = sorted(key for key, value in module.state_dict().items() if not torch.equal(value, before[name][key]))
        require(
            not changed,
            f"the update changes {changed[:3]} of the frozen {name!r}",
            "keep a frozen module in evaluation mode: override train(); compute it under torch.no_grad()",
        )


@rule
def updates_can_be_replayed(subject: Subject) -> None:
    """An update reads nothing back from the device and keeps its state in tensors: a CUDA graph can replay it, bit by bit."""
    found, graph = [], Replayed(RecordedGraph(), warmup=1)
    for replayed in (False, True):
        method = subject.build()
        updater = subject.updater(method, deferred=True, graph=graph if replayed else None)
        torch.manual_seed(0)
        for seed in range(1 + 2 * max(each.every for each in updater.passes)):
            updater.learn(subject.data(seed))
        found.append(method.state_dict())
    require(graph.replays > 0, "no update was replayed", "let `every` of the passes be small with these settings")
    changed = sorted(key for key, value in found[0].items() if not torch.equal(value, found[1][key]))
    require(
        not changed,
        f"the replayed update leaves other values in {changed[:3]}",
        "keep what changes between updates in buffers, written in place; move counters to after_update",
    )


@rule
def episodes_stay_apart(subject: Subject) -> None:
    """Within a sequence nothing after an `is_first` depends on anything before it.

    Losses are means over positions. Where an episode's terms depend on that episode alone, the loss of two episodes is a sum of two
    functions, and f(a, b) + f(c, d) = f(a, d) + f(c, b). A method's `across` names the losses that may break this, with the reason.
    """
    half = subject.time // 2
    method = subject.awake().eval()  # statistics of a batch would mix episodes
    kept = {key: value.clone() for key, value in method.state_dict().items()}
    one, two = subject.data(0), subject.data(1)
    for data in (one, two):
        data["is_first"][:, half] = True
        for key in ("action", "flow", "visible", *subject.method.extras):
            if key in data:
                data[key][:, half] = 0
    for key, value in two.items():
        if not value.is_floating_point() and value.dtype is not torch.uint8:
            two[key] = one[key].clone()  # what is there is the same in both, and what it is differs
    found: dict[str, dict[str, float]] = {}
    for name, first, second in (("aa", one, one), ("bb", two, two), ("ab", one, two), ("ba", two, one)):
        method.load_state_dict(kept)
        batch = {key: torch.cat([first[key][:, :half], second[key][:, half:]], 1) for key in one if key not in VIDEO}
        batch |= {key: one[key] for key in one if key in VIDEO}  # windows of one clip each
        with torch.no_grad():
            found[name] = {key: float(value) for key, value in losses_of(method, subject.stage, batch).items()}
    mixed = []
    for key in found["aa"]:
        values = {name: losses[key] for name, losses in found.items()}
        beyond = abs(values["aa"] + values["bb"] - values["ab"] - values["ba"]) > 1e-6 * sum(map(abs, values.values()))
        mixed += [key] if beyond and key not in subject.across else []
    fix = "start states, averages and returns anew where is_first is true"
    require(not mixed, f"the losses {mixed} of an episode depend on the episode before it in the sequence", fix)
    for other in ("ab", "ba"):  # else the check sees nothing
        require(found["aa"] != found[other], "no loss depends on the batch", "let the losses use what the batch has")


@rule
def saved_state_resumes(subject: Subject) -> None:
    """Weights, buffers, optimiser and random state go through a checkpoint; the next update is the same, bit by bit."""
    method = subject.build()
    updater, count = subject.updater(method), _updates(subject, method)
    for seed in range(count):
        updater.learn(subject.data(seed))
    tensors = {"weights": method.state_dict(), "optimizer": updater.state()}
    with tempfile.TemporaryDirectory() as folder:
        state = {"stage": subject.stage, "action_dim": ACTIONS}
        saved = checkpoint.save(Path(folder), count, tensors=tensors, state=state)
        updater.learn(subject.data(count))
        second = subject.build()
        torch.nn.init.normal_(next(second.parameters()))
        checkpoint.load_weights(second, checkpoint.read(saved, "weights"), str(saved))
        resumed = subject.updater(second)
        resumed.load_state(checkpoint.read(saved, "optimizer"))
        resumed.update = count
        checkpoint.set_rng_state(checkpoint.read(saved, "rng"))
    resumed.learn(subject.data(count))
    expected = method.state_dict()
    changed = sorted(key for key, value in second.state_dict().items() if not torch.equal(value, expected[key]))
    require(not changed, f"after a resume {changed[:3]} differ", "keep all that outlives an update in buffers or parameters")


LEARNS: tuple[Rule, ...] = (
    losses_match_their_scales,
    losses_are_pure,
    each_parameter_has_one_optimiser,
    every_group_learns,
    updates_change_every_group,
    updates_work_in_bf16,
    frozen_parts_stay,
    updates_can_be_replayed,
    saved_state_resumes,
)
EPISODES: tuple[Rule, ...] = (episodes_stay_apart,)
