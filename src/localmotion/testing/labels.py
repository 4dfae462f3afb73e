"""Rules of decoding: a stage of `Source.LOGGED` learns from the actions of logged episodes."""

from __future__ import annotations

import torch
from torch import Tensor

from localmotion.methods.base import Source
from localmotion.testing.learns import losses_of
from localmotion.testing.rules import Rule, Subject, require, rule


def decodes(subject: Subject) -> bool:
    """Whether the stage learns from logged episodes."""
    return subject.source is Source.LOGGED


def knows_labels(subject: Subject) -> bool:
    """Whether the stage also tells at which positions the action is known."""
    return decodes(subject) and "labelled" in subject.method.wants


def _losses(subject: Subject, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        return losses_of(subject.awake().eval(), subject.stage, batch)


def _with_other_actions(batch: dict[str, Tensor], where: Tensor) -> dict[str, Tensor]:
    """The batch with negated actions at positions (B, T)."""
    return batch | {"action": torch.where(where[..., None], -batch["action"], batch["action"])}


@rule
def labels_matter(subject: Subject) -> None:
    """The losses of a stage on logged episodes depend on the logged actions."""
    batch = subject.data()
    where = batch.get("labelled", torch.ones_like(batch["is_first"])) & ~batch["is_first"]
    plain, other = _losses(subject, batch), _losses(subject, _with_other_actions(batch, where))
    same = all(torch.equal(value, other[name]) for name, value in plain.items())
    require(not same, "other actions give the same losses", "learn from batch['action'], or call the source CLIPS")


@rule
def unlabelled_actions_are_not_read(subject: Subject) -> None:
    """A method that wants `labelled` reads no action at a position where it is false."""
    batch = subject.data()
    plain, other = _losses(subject, batch), _losses(subject, _with_other_actions(batch, ~batch["labelled"]))
    leaks = sorted(name for name, value in plain.items() if not torch.equal(value, other[name]))
    require(not leaks, f"the losses {leaks} read actions of unlabelled positions", "mask them with batch['labelled']")


DECODES: tuple[Rule, ...] = (labels_matter,)
LABELLED: tuple[Rule, ...] = (unlabelled_actions_are_not_read,)
