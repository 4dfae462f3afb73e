"""Errors that a user can fix. Each message is one line with the object, the cause and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class LocalmotionError(Exception):
    """Base of all errors. The command line prints them as one line and exits with code 2."""


class ConfigError(LocalmotionError):
    """A setting, preset, method, backend or environment name that does not exist or has an invalid value."""


class VideoError(LocalmotionError):
    """A video (file or frame folder) that cannot be used. Carries the path and a short reason code."""

    def __init__(self, path: str | Path, reason: str, detail: str) -> None:
        self.path, self.reason, self.detail = str(path), reason, detail
        super().__init__(f"{self.path}: {detail}")


class StoreError(LocalmotionError):
    """A clip store that is missing, incomplete, of another recipe, or damaged."""


class CheckpointError(LocalmotionError):
    """A run or checkpoint that is missing, incomplete, or of another method or shape."""


class EnvError(LocalmotionError):
    """An environment that cannot be made, rendered or stepped."""


class SimulationError(EnvError):
    """The simulator or its renderer failed while it ran, or its reward is not a number. The run may continue with a new environment."""


class MissingExtraError(LocalmotionError):
    """An optional package is not installed; the message gives the command that installs it."""


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The end of an error that suggests the nearest of the names that would do, "" if none is near."""
    near = difflib.get_close_matches(name, sorted(set(known)), n=3, cutoff=cutoff)
    return f"; did you mean {', '.join(near)}?" if near else ""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ConfigError:
    """The error for an unknown name; the message suggests the nearest known ones."""
    known = sorted(set(known))
    hint = did_you_mean(name, known, 0.4) or f"; known: {', '.join(known[:40])}"
    return ConfigError(f"unknown {kind} {name!r}{hint}")


class Typed(str):
    """A ``name=value`` of the command line. ``flag``: the words that were typed, for messages."""

    flag: str

    def __new__(cls, text: str, flag: str) -> Typed:
        """A text with its words."""
        found = super().__new__(cls, text)
        found.flag = flag
        return found


def typed(text: str) -> str:
    """How a message names a ``name=value`` text: as it was typed, if it was."""
    return f"{text.flag if isinstance(text, Typed) else f'setting {text!r}':.200}"
