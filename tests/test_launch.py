"""Launching: what a command line says, the order of commands, and how processes begin and end."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from localmotion.errors import ConfigError, MissingExtraError
from localmotion.launch import ENGINES, Command, Launch, Outcome, carry_out, launch_options
from localmotion.launch.work import LOST, Processes


def command(name: str, after: str = "", *arguments: str, folder: Path = Path("/"), share: tuple[str, ...] = ()) -> Command:
    return Command(name, arguments, str(folder / f"{name}.log"), str(folder), after, share)


class Recorder:
    """An engine that records what it is given. Each call of `ended` ends the oldest group."""

    poll = 0.0

    def __init__(self, codes: dict[str, int] | None = None, adopts: Sequence[str] = ()) -> None:
        self.codes, self.adopts = codes or {}, set(adopts)
        self.given: list[list[str]] = []
        self.open: list[list[str]] = [[name] for name in adopts]
        self.most = self.closed = 0

    def adopt(self, commands: Sequence[Command]) -> set[str]:
        return self.adopts

    def start(self, groups: Sequence[Sequence[Command]]) -> None:
        self.given += [[one.name for one in group] for group in groups]
        self.open += self.given[-len(groups) :]
        self.most = max(self.most, sum(map(len, self.open)))

    def ended(self) -> list[tuple[str, Outcome]]:
        return [(name, Outcome(self.codes.get(name, 0), f"words of {name}")) for name in (self.open.pop(0) if self.open else [])]

    def close(self) -> None:
        self.closed += 1


class Stops(contextlib.nullcontext[None]):
    """In place of `StopRequest`: a request that comes at once, or none."""

    def __init__(self, request: BaseException | None = None) -> None:
        super().__init__()
        self.request = request

    def check(self) -> None:
        if self.request:
            raise self.request


CHAIN = [command("a"), command("b", "a"), command("c", "b"), command("d"), command("e"), command("f", "z")]


def test_a_command_waits_for_the_one_before_it(capsys: pytest.CaptureFixture[str]) -> None:
    engine = Recorder()
    assert carry_out(engine, CHAIN, done=["z"], stop=Stops()) == {}
    assert engine.given == [["a"], ["d"], ["e"], ["f"], ["b"], ["c"]]
    assert engine.closed == 1
    assert capsys.readouterr().out.splitlines()[-1] == "ended   c, 0.0 min; 7 of 7"


def test_a_failure_costs_only_what_comes_after_it() -> None:
    engine = Recorder({"a": 2})
    failed = carry_out(engine, CHAIN, done=["z"], stop=Stops(), finished=lambda name: name != "e")
    assert failed == {
        "a": "words of a (exit code 2; full output in /a.log)",
        "b": "needs a, which failed",
        "c": "needs b, which failed",
        "e": "words of e (exit code 0; full output in /e.log)",
    }
    assert [name for group in engine.given for name in group] == ["a", "d", "e", "f"]


def test_jobs_is_how_many_run_and_pack_how_many_share_a_job() -> None:
    many = [command(str(number)) for number in range(5)]
    engine = Recorder()
    carry_out(engine, many, jobs=3, pack=2, stop=Stops())
    assert (engine.given, engine.most) == ([["0", "1"], ["2"], ["3", "4"]], 3)
    engine = Recorder()
    carry_out(engine, many, jobs=2, stop=Stops())
    assert (engine.given, engine.most) == ([["0"], ["1"], ["2"], ["3"], ["4"]], 2)
    engine = Recorder()
    carry_out(engine, many, pack=2, stop=Stops())
    assert engine.given == [["0", "1"], ["2", "3"], ["4"]]


def test_what_an_earlier_call_gave_is_waited_for() -> None:
    engine = Recorder(adopts=["a"])
    assert carry_out(engine, CHAIN[:3], stop=Stops()) == {}
    assert engine.given == [["b"], ["c"]]


def test_a_stop_closes_the_engine() -> None:
    engine = Recorder()
    with pytest.raises(KeyboardInterrupt):
        carry_out(engine, CHAIN[:1], stop=Stops(KeyboardInterrupt()))
    assert (engine.given, engine.closed) == ([], 1)


def test_processes_end_with_their_last_words(tmp_path: Path) -> None:
    processes = Processes()
    processes.start(command("good", "", "--version", folder=tmp_path))
    processes.start(command("bad", "", "scan", "nowhere", folder=tmp_path, share=("--workers", "{}")), 3)
    gone = command("gone", folder=tmp_path)._replace(folder=str(tmp_path / "gone"))
    processes.start(gone)
    found: dict[str, Outcome] = {}
    while len(found) < 3:
        found |= {one.name: outcome for one, outcome in processes.ended()}
    assert found["good"].code == 0
    assert found["good"].words.startswith("localmotion ")
    assert found["bad"].code == 2
    assert found["bad"].words.startswith("nowhere")
    assert found["gone"].code == LOST
    assert f"cannot be started in {tmp_path / 'gone'}" in found["gone"].words


@pytest.mark.parametrize(("cores", "given"), [(None, []), (3, ["--workers", "3"]), (0, ["--workers", "1"])])
def test_what_shares_a_machine_gets_its_share(
    cores: int | None, given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[list[str]] = []
    monkeypatch.setattr("subprocess.Popen", lambda line, **more: lines.append(line))
    Processes().start(command("one", "", "scan", folder=tmp_path, share=("--workers", "{}")), cores)
    assert lines[0][1:] == ["-m", "localmotion", "scan", *given]


def test_options_are_json_or_text() -> None:
    texts = ["gpus_per_node=1", "slurm_partition=gpu", 'resources={"A100": 1}', "slurm_comment=a=b"]
    assert launch_options(texts) == {
        "gpus_per_node": 1,
        "slurm_partition": "gpu",
        "resources": {"A100": 1},
        "slurm_comment": "a=b",
    }
    for text in ("partition", "=gpu"):
        with pytest.raises(ConfigError, match="write it as NAME=VALUE"):
            launch_options([text])


@pytest.mark.parametrize(
    ("launch", "said"),
    [
        (Launch("submitted"), "unknown engine 'submitted'; did you mean submitit"),
        (Launch(options={"a": 1}), "--launch local: has no jobs to pack and no options"),
        (Launch(pack=2), "--launch local: has no jobs to pack"),
        (Launch(pack=0), "--pack 1 or more"),
        (Launch(jobs=-1), "--jobs takes 0 or more"),
    ],
)
def test_mistakes_are_told(launch: Launch, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        launch.check()


@pytest.mark.parametrize("name", [name for name, extra in ENGINES.items() if extra])
def test_an_engine_without_its_package_names_the_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=rf"--launch {name}: needs {name}.*pip install 'localmotion\[{ENGINES[name]}\]'"):
        Launch(name).check()
