"""What a rule is: a check of one method in one stage, with the sentence of docs/add_a_method.md that it enforces."""

from __future__ import annotations

import functools
import sysconfig
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from localmotion.compute import Compute
from localmotion.config import RunConfig
from localmotion.files import one_line
from localmotion.methods.base import Group, Method, Source
from localmotion.runs.settings import compose
from localmotion.testing.batches import ACTIONS, SIZE, BatchMaker, random_batch
from localmotion.training.update import Updater, rates

PACKAGE = Path(__file__).parents[1]
LIBRARIES = {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}
"""Where the code is that no author of a method wrote."""
CPU = Compute(torch.device("cpu"), False, 1, "test")


class BrokenRuleError(AssertionError):
    """A method breaks a rule. The message has the rule, what was found, and the fix."""

    def __init__(self, rule: str, message: str) -> None:
        self.rule = rule
        super().__init__(message)


class Found(AssertionError):  # noqa: N818  # raised by `require`, always turned into a BrokenRuleError
    """What a rule found, and the fix."""

    def __init__(self, found: str, fix: str) -> None:
        self.found, self.fix = found, fix
        super().__init__(found)


def require(condition: bool, found: str, fix: str) -> None:
    """Within a rule: say what was found and how to fix it, unless ``condition`` holds."""
    if not condition:
        raise Found(found, fix)


@dataclass(frozen=True)
class Subject:
    """A method in one of its stages, with the settings that it is checked at."""

    method: type[Method]
    stage: str
    preset: str = "debug"
    settings: tuple[str, ...] = ()
    env: str = "toy:dot"
    batch: BatchMaker = random_batch
    across: Mapping[str, str] = field(default_factory=dict)
    """Losses that may depend on several episodes of a sequence: name -> reason."""

    def __str__(self) -> str:
        return f"{self.method.__name__}, stage {self.stage}"

    @property
    def source(self) -> Source:
        return self.method.stages[self.stage]

    @property
    def acts(self) -> bool:
        """Whether the stage's result acts: then its model knows the number of actions."""
        return self.stage in self.method.acts_after

    @functools.cached_property
    def run(self) -> RunConfig:
        """Settings of the stage."""
        env = "" if self.source is Source.CLIPS else self.env
        return compose(self.method, self.stage, preset=self.preset, env=env, settings=self.settings)

    def at(self, stage: str) -> Subject:
        """The same method in another stage."""
        return Subject(self.method, stage, self.preset, self.settings, self.env, self.batch, self.across)

    def build(self) -> Any:
        """The method, with weights that depend on its settings only."""
        torch.manual_seed(0)
        return self.method(self.run.model, image_size=SIZE, action_dim=ACTIONS if self.acts else None)

    def awake(self) -> Any:
        """The same with noise on every weight: a layer that begins at zero hides all before it."""
        method = self.build()
        with torch.no_grad():
            for parameter in method.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))  # in the same order whatever the layout in memory
        return method

    @property
    def time(self) -> int:
        """Length of the sequences, 8 where the method can take it."""
        low, high = self.method.lengths(self.run.model, self.stage)
        return max(min(8, high or 8), low)

    def data(self, seed: int = 0) -> dict[str, Tensor]:
        """A batch of two sequences. It has the extras that the settings add to those of the class."""
        found = self.batch(self.method, self.stage, batch=2, time=self.time, seed=seed)
        generator = torch.Generator().manual_seed(seed + 2)
        for name, shape in self.added_extras.items():
            found[name] = torch.randn(2, self.time, *shape, generator=generator)
            found[name][:, 0] = 0  # nothing led to the first frame
        return found

    @functools.cached_property
    def added_extras(self) -> dict[str, tuple[int, ...]]:
        """Extras that an instance has beside those of its class, in a stage whose batches have extras."""
        if not self.acts or not self.method.extras or self.source not in (Source.REPLAY, Source.ROLLOUT):
            return {}
        with torch.device("meta"):
            made: Method = self.method(self.run.model, image_size=SIZE, action_dim=ACTIONS)
        return {name: shape for name, shape in made.extras.items() if name not in self.method.extras}

    def groups(self, method: Method, *, pretrained: bool = False) -> list[Group]:
        """Optimisers of the stage."""
        return method.groups(self.stage, rates(self.run, self.source, pretrained))

    def updater(self, method: Method, compute: Compute = CPU, **options: Any) -> Updater:
        """What steps the method."""
        return Updater(method, self.run, compute, **options)


Rule = Callable[[Subject], None]


def rule(check: Rule) -> Rule:
    """Make a rule of a function whose docstring begins with the rule's sentence.

    The rule leaves torch's generator as it was and raises BrokenRuleError, also where the method raises an error of its own.
    """
    sentence = (check.__doc__ or "").strip().splitlines()[0]

    @functools.wraps(check)
    def checked(subject: Subject) -> None:
        try:
            with torch.random.fork_rng(devices=[]):
                check(subject)
        except BrokenRuleError:
            raise
        except Exception as error:
            found, fix = _told(error)
            message = f"{subject}: {found}\n  rule: {sentence} ({check.__name__}, docs/add_a_method.md)\n  fix: {fix}"
            raise BrokenRuleError(check.__name__, message) from (None if isinstance(error, Found) else error)

    return checked


def _told(error: Exception) -> tuple[str, str]:
    """What was found, and the fix."""
    if isinstance(error, Found):
        return error.found, error.fix
    frame = _place(traceback.extract_tb(error.__traceback__))
    kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
    return (
        f"{kind}{one_line(error, 300)}",
        f"look at line {frame.lineno} of {frame.filename}, in {frame.name}, where this was raised",
    )


def _place(frames: Sequence[traceback.FrameSummary]) -> traceback.FrameSummary:
    """The frame to look at: the last one of the method's author, else the last one outside this package, else the last one."""
    outside = [frame for frame in frames if not Path(frame.filename).is_relative_to(PACKAGE)]
    own = [frame for frame in outside if not any(Path(frame.filename).is_relative_to(place) for place in LIBRARIES)]
    return (own or outside or frames)[-1]


@dataclass(frozen=True)
class Check:
    """A rule for a method in a stage. Calling it raises BrokenRuleError where the method breaks the rule."""

    rule: Rule
    subject: Subject

    def __call__(self) -> None:
        self.rule(self.subject)

    def __str__(self) -> str:
        return f"{self.subject.method.name}-{self.subject.stage}-{name_of(self.rule)}"


def name_of(rule: Rule) -> str:
    """Name of a rule."""
    return str(getattr(rule, "__name__", rule))


def sentence_of(rule: Rule) -> str:
    """The rule in one sentence."""
    return (rule.__doc__ or "").strip().splitlines()[0]
