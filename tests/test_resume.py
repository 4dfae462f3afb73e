"""A run that was stopped is the run that was not: weights bit by bit, metrics line by line, wherever it was stopped."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from localmotion import methods
from localmotion.acting.episodes import Rollout
from localmotion.acting.policy import MethodPolicy
from localmotion.acting.trees import leaves_of, with_leaves
from localmotion.cli import main
from localmotion.compute import choose
from localmotion.config import RunConfig
from localmotion.errors import CheckpointError, ConfigError
from localmotion.runs import checkpoint
from localmotion.runs.load import load_run
from localmotion.runs.rundir import check_stores
from localmotion.runs.settings import compose
from localmotion.training import trials
from localmotion.training.endings import recorded
from localmotion.training.finetune import finetune
from localmotion.training.interrupt import Interrupted, StopRequest
from localmotion.training.pretrain import pretrain
from localmotion.training.update import Updater
from localmotion.video.store import ClipStore, ClipStoreWriter
from method_batches import AGENTS, CPU, make, make_batch
from waiting import holds, wait_until

PRETRAINING = [name for name in AGENTS if "pretrain" in methods.get(name).stages]


def weights(run: Path) -> dict[str, Tensor]:
    return checkpoint.read(checkpoint.newest(run), "weights")


def lines(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what is measured in seconds."""
    rows = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    timed = ("wall", "updates_per_second")
    return [{k: v for k, v in row.items() if k not in timed and not k.startswith("seconds/")} for row in rows]


def assert_same(one: Path, other: Path) -> None:
    expected = weights(one)
    for name, value in weights(other).items():
        assert torch.equal(value, expected[name]), name
    assert lines(other) == lines(one)


class Stops:
    """In place of a signal: every so many looks at the stop request, there is one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *every: int, kind: Callable[[], BaseException] | None = None) -> None:
        self.every, self.turn, self.left = every, 0, every[0]
        self.kind = kind or (lambda: Interrupted(signal.SIGTERM))
        monkeypatch.setattr(StopRequest, "check", lambda request: self.look())

    def look(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.turn += 1
            self.left = self.every[self.turn % len(self.every)]
            raise self.kind()


class Killed(BaseException):
    """Leaves as kill -9 does: nothing is saved on the way out."""


def in_pieces(train: Any, run: RunConfig, path: Path) -> int:
    """Run to the end whatever stops it, and once more as after a kill before it could say "finished"; how often it was stopped."""
    stopped = 0
    while True:
        try:
            train(run, path)
        except Killed:
            stopped += 1
        except Interrupted:
            stopped += 1
            assert json.loads((path / "status.json").read_text())["state"] == "interrupted"
        else:
            before = lines(path)
            train(run, path)
            assert lines(path) == before
            return stopped


FLAGS = {"precision": "fp32", "device": "cpu", "threads": 1, "recipe": {"percept_size": 64}}
# Episodes of 20 agent steps: several of them, and the ends of all clocks, within a hundred steps.
SHORT = {**FLAGS, "recipe": {"percept_size": 64, "tracks": 8}, "env_options": {"time_limit": 20}}


@pytest.fixture
def no_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs end without their ten episodes of evaluation, which take longer than the learning here."""
    monkeypatch.setattr(trials, "evaluate", lambda *_, **__: Rollout([0.0], [1]))


@pytest.mark.parametrize("name", AGENTS)
def test_an_online_run_in_pieces_is_the_whole_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped within prefill, warm-up, episodes and evaluations, at places that have nothing to do with its clocks."""
    few = ("env_steps=70", "prefill=25", "warmup_updates=4", "online.eval_every=25", "online.save_every=25")
    run = compose(name, "train", preset="debug", env="toy:dot", flags=SHORT, settings=few)
    whole = finetune(run, tmp_path / "whole")
    # An evaluation is made anew after a stop, so a piece must be longer than one: 20 looks, the last of the run 40.
    Stops(monkeypatch, 9, 47, 53)
    assert in_pieces(finetune, run, tmp_path / "pieces") >= 4
    assert_same(whole, tmp_path / "pieces")
    kept = [checkpoint.read_state(checkpoint.best(path)) for path in (whole, tmp_path / "pieces")]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("name", AGENTS)
def test_a_killed_online_run_goes_on_from_its_checkpoint(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was done after the newest checkpoint is done again, the same: steps, episodes in the replay, lines of metrics."""
    few = (
        "env_steps=70",
        "prefill=25",
        "warmup_updates=4",
        "online.eval_every=100000",
        "online.save_every=12",
        "eval_episodes=1",
    )
    run = compose(name, "train", preset="debug", env="toy:dot", flags=SHORT, settings=few)
    whole = finetune(run, tmp_path / "whole")
    Stops(monkeypatch, 61, 65, 69, 100_000, kind=Killed)
    assert in_pieces(finetune, run, tmp_path / "pieces") >= 2
    assert_same(whole, tmp_path / "pieces")


def test_a_run_killed_before_it_could_say_finished_is_not_evaluated_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ("env_steps=90", "prefill=40", "warmup_updates=1", "online.eval_every=100000", "eval_episodes=1")
    run = compose("dreamer_v2", "train", preset="debug", env="toy:dot", flags=FLAGS, settings=few)
    whole = finetune(run, tmp_path / "whole")
    before = lines(whole)
    finetune(run, whole)
    assert lines(whole) == before
    longer = replace(run, online=replace(run.online, env_steps=130))
    finetune(longer, whole)
    assert [row["agent_step"] for row in lines(whole) if row["kind"] == "eval" and row["final"]] == [90, 130]


@pytest.mark.parametrize("name", PRETRAINING)
def test_a_killed_pretraining_goes_on_from_its_checkpoint(
    name: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ("heldout_fraction=0.4", "pretrain.updates=12", "pretrain.save_every=3", "pretrain.log_every=2")
    run = compose(name, "pretrain", preset="debug", flags={**FLAGS, "recipe": {}, "data": str(store)}, settings=few)
    whole = pretrain(run, tmp_path / "whole")
    Stops(monkeypatch, 2, 6, 8, 100, kind=Killed)
    assert in_pieces(pretrain, run, tmp_path / "pieces") == 3
    assert_same(whole, tmp_path / "pieces")


def test_a_replay_kept_elsewhere_learns_the_same(no_evaluation: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localmotion.training.online.device_memory", lambda device: 10**9)  # as if the CPU were a GPU
    few = (
        "env_steps=95",
        "prefill=25",
        "warmup_updates=4",
        "online.eval_every=10000",
        "online.save_every=25",
        "replay_capacity=60",
        "replay_storage=memory",
    )
    run = compose("drp", "train", preset="debug", env="toy:dot", flags=SHORT, settings=few)
    whole = finetune(run, tmp_path / "whole")
    for storage in ("disk", "device"):
        elsewhere = replace(run, online=replace(run.online, replay_storage=storage))
        Stops(monkeypatch, 37)
        assert in_pieces(finetune, elsewhere, tmp_path / storage) >= 2
        assert_same(whole, tmp_path / storage)
        kept = [sorted(path.name for path in (tmp_path / name / "replay").iterdir()) for name in ("whole", storage)]
        assert kept[0][-1] == kept[1][-1]


@pytest.mark.parametrize("env", ["dmcr:walker_run", "metaworld:reach"])
def test_an_episode_of_a_simulator_is_played_again_exactly(
    env: str, no_evaluation: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Physics, looks drawn at the reset, streaming perception and the policy's attention over time come back from seed and actions."""
    few = ("action_repeat=10", "env_steps=300", "prefill=100", "warmup_updates=1", "online.eval_every=100000")
    run = compose("drp", "train", preset="debug", env=env, flags={**SHORT, "env_options": {"time_limit": 200}}, settings=few)
    whole = finetune(run, tmp_path / "whole")
    Stops(monkeypatch, 16, 1000)  # the policy has acted for six of the twenty agent steps of the first episode
    assert in_pieces(finetune, run, tmp_path / "pieces") == 1
    assert_same(whole, tmp_path / "pieces")


@pytest.mark.parametrize("name", PRETRAINING)
def test_pretraining_in_pieces_is_the_whole_run(name: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = ("heldout_fraction=0.4", "pretrain.updates=17", "lr_decay=0.5")
    run = compose(name, "pretrain", preset="debug", flags={**FLAGS, "recipe": {}, "data": str(store)}, settings=few)
    whole = pretrain(run, tmp_path / "whole")
    Stops(monkeypatch, 1, 4, 7)
    assert in_pieces(pretrain, run, tmp_path / "pieces") >= 3
    assert_same(whole, tmp_path / "pieces")


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Python's own handling of SIGINT, which a shell's background job has not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


COMMAND = [
    *("train", "--method", "dreamer_v2", "--preset", "debug", "--env", "toy:dot"),
    *("--threads", "1", "--precision", "fp32", "--env_steps", "100000", "--online.save_every", "100"),
]


def assert_saved(run: Path, said: str) -> None:
    assert "the same command goes on" in said
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "interrupted"
    state = checkpoint.read_state(checkpoint.newest(run))
    assert state["agent_step"] == status["agent_step"]
    assert state["playing"]["learning"]


def test_a_signal_to_the_process_saves_and_is_its_exit_code(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "localmotion", *COMMAND, "--run", str(tmp_path / "run")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )
    try:
        wait_until(lambda: holds(tmp_path / "run" / "metrics.jsonl", '"train"'), process)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate()
    finally:
        process.kill()
    assert process.returncode == 130
    assert_saved(tmp_path / "run", said)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138), (signal.SIGUSR2, 140), (signal.SIGINT, 130)]
)
def test_a_signal_saves_and_says_so_in_the_exit_code(
    number: int, code: int, ctrl_c: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same in this process, which raises the signal as soon as it has learned."""
    looks, look = [], StopRequest.check

    def raised(request: StopRequest) -> None:
        looks.append(holds(tmp_path / "run" / "metrics.jsonl", '"train"'))
        if looks[-2:] == [False, True]:
            signal.raise_signal(number)
        look(request)

    monkeypatch.setattr(StopRequest, "check", raised)
    with pytest.raises(SystemExit) as left:
        main([*COMMAND, "--run", str(tmp_path / "run")])
    assert left.value.code == code
    assert_saved(tmp_path / "run", capsys.readouterr().err)


def test_an_ignored_signal_stays_ignored(ctrl_c: None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        stop.check()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_second_ctrl_c_stops_at_once(ctrl_c: None) -> None:
    with StopRequest() as stop:
        stop.check()
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Interrupted) as caught:
            stop.check()
        assert caught.value.code == 143
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("fails", [False, True])
def test_a_signal_during_the_last_save_does_not_cut_it_short(fails: bool, ctrl_c: None) -> None:
    """Slurm sends a warning, and later the end. A disk that is full leaves no run that seems to go on."""
    states: list[tuple[str, dict[str, Any]]] = []
    out: Any = SimpleNamespace(ended=lambda state, **more: states.append((state, more)))
    method: Any = None
    saved: list[int] = []

    def save() -> bool:
        signal.raise_signal(signal.SIGTERM)
        if fails:
            raise CheckpointError("the disk is full")
        saved.append(1)
        return True

    def run() -> None:
        with recorded(out, method, lambda: {"update": 3}, save) as stop:
            signal.raise_signal(signal.SIGUSR1)
            stop.check()

    with pytest.raises(CheckpointError if fails else Interrupted):
        run()
    assert saved == ([] if fails else [1])
    assert states == [("interrupted", {"update": 3} | ({"error": "the disk is full"} if fails else {}))]


def test_signals_are_given_back_and_threads_leave_them_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before
    found: list[Any] = []

    def elsewhere() -> None:
        with StopRequest() as stop:
            stop.check()
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [before]


def test_the_best_weights_are_those_of_the_best_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three evaluations the second is the best: its weights are kept, and evaluation can ask for them."""
    scores = iter([1.0, 3.0, 2.0])
    seen: list[dict[str, Tensor]] = []

    class Spy(MethodPolicy):
        def __init__(self, method: Any, compute: Any, *, explore: bool, window: int) -> None:
            super().__init__(method, compute, explore=explore, window=window)
            if not explore:
                seen.append({k: v.clone() for k, v in method.state_dict().items()})

    def scripted(policy_for: Any, make: Any, **settings: Any) -> Rollout:
        policy_for()
        return Rollout([next(scores)], [1])

    monkeypatch.setattr(trials, "MethodPolicy", Spy)
    monkeypatch.setattr(trials, "evaluate", scripted)
    few = ("env_steps=200", "prefill=60", "online.eval_every=50")
    run = compose("dreamer_v2", "train", preset="debug", env="toy:dot", flags=FLAGS, settings=few)
    with pytest.raises(CheckpointError, match="no best checkpoint yet"):
        load_run(finetune_nothing(run, tmp_path / "empty"), which="best")
    out = finetune(run, tmp_path / "run")
    assert len(seen) == 3
    kept = checkpoint.read(checkpoint.best(out), "weights")
    assert all(torch.equal(kept[name], value) for name, value in seen[1].items())
    assert not all(torch.equal(kept[name], value) for name, value in seen[2].items())
    _, method, _ = load_run(out, which="best")
    assert all(torch.equal(value, kept[name]) for name, value in method.state_dict().items())


def finetune_nothing(run: RunConfig, path: Path) -> Path:
    """A run directory that has only begun."""
    from localmotion.runs.rundir import RunDir

    RunDir(path, run)
    return path


Trees = st.recursive(
    st.one_of(st.none(), st.integers(0, 3).map(lambda n: torch.arange(n))), lambda inner: st.lists(inner, max_size=3).map(tuple)
)


@given(Trees)
def test_trees_come_back_from_their_leaves(tree: Any) -> None:
    leaves = leaves_of(tree)
    again = with_leaves(tree, [leaf + 1 for leaf in leaves])
    assert [leaf.tolist() for leaf in leaves_of(again)] == [(leaf + 1).tolist() for leaf in leaves]
    with pytest.raises(ValueError, match="more"):
        with_leaves(tree, [*leaves, torch.zeros(1)])
    if leaves:
        with pytest.raises(ValueError, match="fewer"):
            with_leaves(tree, leaves[:-1])


# --- decisions and determinism ------------------------------------------------------------------------------------------


def test_a_run_goes_on_in_the_precision_it_began_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured once: another day's measurement must not make it another run."""
    few = ("env_steps=100", "prefill=40", "warmup_updates=2", "online.eval_every=100000", "online.save_every=30")
    flags = {**FLAGS, "precision": "auto"}
    run = compose("dreamer_v2", "train", preset="debug", env="toy:dot", flags=flags, settings=few)
    monkeypatch.setattr("localmotion.compute.bf16_speedup", lambda: (2e12, 1e12))
    Stops(monkeypatch, 80, 100_000)
    with pytest.raises(Interrupted):
        finetune(run, tmp_path / "run")
    monkeypatch.setattr("localmotion.compute.bf16_speedup", lambda: (1e12, 2e12))
    assert load_run(tmp_path / "run", device="cpu", threads=1)[2].bf16
    finetune(run, tmp_path / "run")
    kept = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert kept["precision"] == "bf16"
    assert "as when the run began" in kept["compute"]


@pytest.mark.parametrize("name", AGENTS)
def test_a_deterministic_run_has_kernels_for_everything(name: str) -> None:
    run, method = make(name, "train", "deterministic=true")
    try:
        choose(replace(run, device="cpu", threads=1, precision="fp32"))
        assert torch.are_deterministic_algorithms_enabled()
        metrics = Updater(method, run, CPU).learn(make_batch())
        assert all(torch.isfinite(value).all() for value in metrics.values())
    finally:
        torch.use_deterministic_algorithms(False)


# --- the clips of a run -------------------------------------------------------------------------------------------------


def copied(store: Path, out: Path, clips: Iterable[int], prefix: str = "") -> Path:
    """A store with some clips of another."""
    old = ClipStore(store)
    writer = ClipStoreWriter.open(out, old.size, old.recipe, old.recipe_hash, old.tracks)
    writer.write_shard(0, [replace(clip, id=prefix + clip.id) for clip in map(old.clip, clips)])
    return out


def test_a_run_goes_on_with_the_same_clips_only(store: Path, tmp_path: Path) -> None:
    def run(data: Path, updates: int, **flags: str) -> RunConfig:
        settings = (f"pretrain.updates={updates}", "pretrain.save_every=2", "pretrain.log_every=1")
        return compose("apv", "pretrain", preset="debug", flags={"data": str(data), "threads": 1, **flags}, settings=settings)

    first = pretrain(run(store, 2), tmp_path / "run")
    fewer = copied(store, tmp_path / "fewer", range(len(ClipStore(store)) - 1))
    before = lines(first)
    with pytest.raises(
        ConfigError, match=r"fewer: holds other clips than those that the run .*run learned from \(\d+ clips with"
    ):
        pretrain(run(fewer, 4), first)
    assert lines(first) == before  # nothing that was done is lost
    moved = Path(shutil.copytree(store, tmp_path / "moved"))
    assert_same(pretrain(run(store, 4), tmp_path / "whole"), pretrain(run(moved, 4), first))


def test_clips_that_were_still_being_extracted_are_said_not_refused(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoints" / "0000000001").mkdir(parents=True)
    (tmp_path / "checkpoints" / "0000000001" / "COMPLETE").write_text("")
    clips = ClipStore(store)
    known = {**clips.contents(), "clips": 3, "hash": "other"}
    (tmp_path / "environment.json").write_text(json.dumps({"stores": {"data": known | {"missing": 1}}}))
    check_stores(tmp_path, {"data": clips})
    assert "batches are others than those of a run that was not stopped" in capsys.readouterr().out
    (tmp_path / "environment.json").write_text(json.dumps({"stores": {"data": known}}))
    with pytest.raises(ConfigError, match="and then it had 3 clips"):
        check_stores(tmp_path, {"data": clips})
    (tmp_path / "environment.json").write_text("{}")  # of an earlier version
    check_stores(tmp_path, {"data": clips})


def test_the_contents_of_a_store_are_its_clips(store: Path, tmp_path: Path) -> None:
    old = ClipStore(store)
    assert ClipStore(copied(store, tmp_path / "same", range(len(old)))).contents() == old.contents()
    assert ClipStore(copied(store, tmp_path / "fewer", range(1, len(old)))).contents() != old.contents()
    renamed = ClipStore(copied(store, tmp_path / "renamed", range(len(old)), prefix="x")).contents()
    assert {**renamed, "hash": ""} == {**old.contents(), "hash": ""}
    assert renamed["hash"] != old.contents()["hash"]
