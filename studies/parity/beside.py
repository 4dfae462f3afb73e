"""What the comparisons with PyTorch releases share. Nothing of a release is here."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import subprocess
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
import ipv_parity as rules  # noqa: E402

LIMITS = {"losses": 1e-6, "gradients": 1e-6, "weights": 1e-6, "actions": 1e-6}


class Anything(types.ModuleType):
    """Stands in for a package that the compared updates do not use."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name)

    def __getitem__(self, item: Any) -> Any:
        return self

    def __call__(self, *args: Any, **settings: Any) -> Any:
        return args[0] if args else self


def stand_ins(patch: pytest.MonkeyPatch, *names: str) -> None:
    """`Anything` for those of the packages ``names`` that are not installed."""
    for name in names:
        try:
            found = find_spec(name)
        except (ModuleNotFoundError, ValueError):  # the parent package is missing or is a stand-in itself
            found = None
        if found is None:
            patch.setitem(sys.modules, name, Anything(name))


def difference(one: Tensor, other: Tensor) -> float:
    """Largest difference, relative to the largest number of the second."""
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-12))


def measure(worst: dict[str, float], mine: Any, losses: Mapping[str, float], gradients: Mapping[str, Tensor]) -> None:
    """Raise the largest differences "losses" and "gradients" by an update: ours, the release's losses and gradients in our names.

    Raises AssertionError if other parameters have gradients.
    """
    for name, value in losses.items():
        worst["losses"] = max(worst["losses"], abs(mine.losses[name] - value) / abs(value))
    learned = {name for name, gradient in mine.gradients.items() if name in gradients or gradient.any()}
    assert learned == set(gradients), learned ^ set(gradients)
    for name, gradient in gradients.items():
        worst["gradients"] = max(worst["gradients"], difference(mine.gradients[name], gradient))


def rounded(value: Any) -> Any:
    """Ten digits of every number."""
    if isinstance(value, dict):
        return {key: rounded(x) for key, x in value.items()}
    if isinstance(value, list):
        return [rounded(x) for x in value]
    return float(f"{value:.10g}") if isinstance(value, float) else value


@contextlib.contextmanager
def ruled(fix_noise: Callable[[pytest.MonkeyPatch], None]) -> Iterator[pytest.MonkeyPatch]:
    """float64 and the noise of the rules."""
    dtype = torch.get_default_dtype()
    with pytest.MonkeyPatch.context() as patch:
        rules.float64(patch)
        fix_noise(patch)
        try:
            yield patch
        finally:
            torch.set_default_dtype(dtype)


def main(
    name: str,
    cases: Mapping[str, Any],
    fix_noise: Callable[[pytest.MonkeyPatch], None],
    load: Callable[[Path, pytest.MonkeyPatch], Any],
    compare: Callable[[Any, Path, str, pytest.MonkeyPatch], tuple[dict[str, float], dict[str, Any]]],
    text: str | None,
) -> int:
    """Command line of a comparison with the repository ``name``. Returns 1 if a difference is beyond `LIMITS`.

    ``cases``: what to write down of each case's settings. ``load`` gets the release's folder. ``compare`` gets what that
    gave, the folder and the case; it returns the largest differences by kind and the release's numbers.
    """
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help=f"checkout of {name}")
    parser.add_argument("--commit", help="what to write as its commit; default: ask git")
    parser.add_argument("--out", type=Path, help="write the release's numbers here, as JSON")
    given = parser.parse_args()
    path, found, good = given.path.resolve(), {}, True
    asked = ["git", "-C", str(path), "rev-parse", "HEAD"]
    commit = given.commit or subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    with ruled(fix_noise) as outer:
        package = load(path, outer)
        for case in cases:
            with (
                contextlib.redirect_stdout(io.StringIO()),
                pytest.MonkeyPatch.context() as patch,
            ):  # releases print what they build
                worst, found[case] = compare(package, path, case, patch)
            good &= all(value <= LIMITS[kind] for kind, value in worst.items())
            print(f"{case}: " + ", ".join(f"{kind} {value:.1e}" for kind, value in worst.items()), flush=True)
    made = {"reference": f"{name} {commit}", "torch": torch.__version__, "precision": "float64", "settings": dict(cases)}
    if given.out:
        given.out.write_text(json.dumps(rounded({"made": made, "cases": found}), indent=1) + "\n")
    return 0 if good else 1
