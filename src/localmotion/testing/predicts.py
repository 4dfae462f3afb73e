"""Rules of looking: open-loop prediction and the code of motion."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from localmotion.evaluation import heldout
from localmotion.methods.base import Method
from localmotion.testing.batches import MOTION_KEYS, SIZE
from localmotion.testing.rules import Rule, Subject, require, rule

CONTEXT = 3
"""Frames that a prediction observes."""


def predicts(subject: Subject) -> bool:
    """Whether the class has an `open_loop` of its own, and the stage's result uses it."""
    return heldout.predicts(subject.method, subject.stage)


def _clips(subject: Subject) -> dict[str, Tensor]:
    """A batch of two sequences of a clip store, which has the masks that the method wants, whatever the stage learned from."""
    batch = subject.data()
    if "mask" in subject.method.wants and "mask" not in batch:
        generator = torch.Generator().manual_seed(1)
        batch["mask"] = torch.rand(batch["image"].shape[:-1], generator=generator) < 0.3
    return batch


def _predicted(method: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    with torch.no_grad():
        found: dict[str, Tensor] = method.open_loop(batch, CONTEXT)
    return found


def _other(batch: dict[str, Tensor], keys: frozenset[str] | set[str], where: slice) -> dict[str, Tensor]:
    """The batch with other values of some keys at some positions."""
    out = {key: value.clone() for key, value in batch.items()}
    for key in keys & set(batch):
        value = out[key][:, where]
        out[key][:, where] = ~value if value.dtype is torch.bool else 255 - value if value.dtype is torch.uint8 else 3 * value + 1
    return out


@rule
def predictions_have_their_shape(subject: Subject) -> None:
    """`open_loop` returns finite pictures (B,T,3,S,S) by name, and they depend on the observed frames."""
    method, batch = subject.build().eval(), _clips(subject)
    found, past = _predicted(method, batch), _predicted(method, {**batch, "image": _whitened(batch["image"])})
    require(bool(found), "open_loop returns no row", "return at least one row of pictures")
    wanted = (2, subject.time, 3, SIZE, SIZE)
    for row, pictures in found.items():
        require(tuple(pictures.shape) == wanted, f"row {row!r} has the shape {tuple(pictures.shape)}", f"make it {wanted}")
        require(bool(torch.isfinite(pictures).all()), f"row {row!r} is not finite", "look at the decoder")
        same = torch.equal(pictures[:, CONTEXT:], past[row][:, CONTEXT:])
        require(not same, f"row {row!r} does not depend on the observed frames", "start the prediction from their state")


def _whitened(image: Tensor) -> Tensor:
    out = image.clone()
    out[:, :CONTEXT] = 255
    return out


@rule
def predictions_see_no_future(subject: Subject) -> None:
    """A prediction uses no picture or reward after its context. Only a row `motion` may use later motion, a row `action` actions.

    The rows `latent_action` and `swapped_action` may use what later pictures say of the action: they show what a latent action holds.
    """
    method, batch = subject.build().eval(), _clips(subject)
    after = slice(CONTEXT, None)
    plain = _predicted(method, batch)
    for what, keys, rows_with in (
        ("picture or reward", {"image", "reward"}, ("latent_action", "swapped_action")),
        ("motion", set(MOTION_KEYS), ("motion",)),
        ("action", {"action"}, ("action",)),
    ):
        if not keys & set(batch):
            continue
        other = _predicted(method, _other(batch, keys, after))
        for row, pictures in plain.items():
            if row not in rows_with:
                # A sum over other values in another order may round otherwise; what is seen changes more.
                same = torch.allclose(other[row], pictures, atol=1e-6, rtol=1e-5)
                named = what in ("motion", "action")
                fix = f"cut the batch at `context`, or call the row {what!r}" if named else "cut the batch at `context`"
                require(same, f"row {row!r} changes with another {what} after its {CONTEXT} frames of context", fix)


PREDICTS: tuple[Rule, ...] = (predictions_have_their_shape, predictions_see_no_future)


def has_code(subject: Subject) -> bool:
    """Whether the class has a `motion_code` of its own."""
    return subject.method.motion_code is not Method.motion_code


@rule
def motion_code_is_one_vector_a_frame(subject: Subject) -> None:
    """`motion_code` is None or finite vectors (B,T,d)."""
    with torch.no_grad():
        code = subject.build().eval().motion_code(_clips(subject))
    fits = code is None or (code.dim() == 3 and code.shape[:2] == (2, subject.time) and bool(torch.isfinite(code).all()))
    require(fits, f"motion_code is {'' if code is None else tuple(code.shape)}", "return (B, T, d) or None")


CODES: tuple[Rule, ...] = (motion_code_is_one_vector_a_frame,)
