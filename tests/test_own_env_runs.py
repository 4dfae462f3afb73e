"""Runs in environments of one's own: choices and numbers as actions, recording, resuming, processes, collections, learning."""

from __future__ import annotations

import itertools
import json
import math
import re
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from localmotion import foreign, methods
from localmotion.acting.episodes import EvaluationError, Rollout, episode_seed
from localmotion.cli import main
from localmotion.envs import make_env
from localmotion.envs.vector import VectorEnv, env_seed
from localmotion.errors import ConfigError, EnvError, SimulationError
from localmotion.evaluation import evaluate as evaluation
from localmotion.evaluation.evaluate import evaluate_run
from localmotion.methods.dreamer_v3 import DreamerV3
from localmotion.models.policies import OneHotPolicy
from localmotion.models.values import TwoHot
from localmotion.recording.collect import collect
from localmotion.replay import Replay
from localmotion.runs import checkpoint
from localmotion.runs.load import load_run
from localmotion.runs.settings import compose
from localmotion.training import trials
from localmotion.training.finetune import finetune
from localmotion.training.interrupt import Interrupted, StopRequest
from localmotion.training.online import OnlineLoop
from localmotion.training.update import Updater
from test_resume import Stops

CHOICES, DRAWN, LAMPS, SHAKY = "own_envs:choices", "own_envs:drawn", "examples.lamps:Lamps", "own_envs:shaky"
FLAGS: dict[str, Any] = {
    "precision": "fp32",
    "device": "cpu",
    "threads": 1,
    "recipe": {"size": 32, "percept_size": 32, "tracks": 4},
}
FEW = ("env_steps=60", "prefill=20", "warmup_updates=2", "online.eval_every=100000", "online.save_every=25")


@pytest.fixture(autouse=True)
def trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign, "_trusted", [CHOICES, DRAWN, LAMPS])


@pytest.fixture
def no_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs end without their ten episodes of evaluation, which take longer than the learning here."""
    monkeypatch.setattr(trials, "evaluate", lambda *_, **__: Rollout([0.0], [1]))


def run_of(method: str, env: str, *more: str, **flags: Any) -> Any:
    return compose(method, "train", preset="debug", env=env, flags={**FLAGS, **flags}, settings=(*FEW, *more))


def replayed(run: Path, key: str) -> Tensor:
    """All records of a run's replay."""
    from safetensors.torch import load_file

    return torch.cat([load_file(path)[key] for path in sorted((run / "replay").glob("*.safetensors"))])


# 1. Choices in DreamerV3 ------------------------------------------------------------------------------------------------------


def test_the_policy_of_choices_written_out() -> None:
    """1 % of the uniform distribution is mixed in, as in the release; log-probability, entropy and mode are those of the mixture."""
    logits = [2.0, -1.0, 0.5]
    total = sum(map(math.exp, logits))
    probs = [0.99 * math.exp(x) / total + 0.01 / 3 for x in logits]
    policy = OneHotPolicy(torch.tensor(logits), 0.01)
    for index, prob in enumerate(probs):
        assert policy.log_prob(torch.eye(3)[index]).item() == pytest.approx(math.log(prob), rel=1e-5)
    assert policy.entropy().item() == pytest.approx(-sum(p * math.log(p) for p in probs), rel=1e-5)
    assert policy.mode.tolist() == [1, 0, 0]
    drawn = OneHotPolicy(torch.tensor([logits] * 4000), 0.01).sample(torch.Generator().manual_seed(0))
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert drawn.mean(0).tolist() == pytest.approx(probs, abs=0.03)


def test_an_update_on_recorded_choices(no_evaluation: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the agent chose is in the replay, one-hot; the loss of the policy is -w (log pi(a) A + eta H) of it."""
    seen: list[Any] = []
    take = OnlineLoop._update

    def update(loop: OnlineLoop) -> None:
        seen.append((loop.method, loop.replay, loop.observer.env))
        take(loop)

    monkeypatch.setattr(OnlineLoop, "_update", update)
    run = finetune(run_of("dreamer_v3", CHOICES), tmp_path / "run")
    method, replay, env = seen[-1]
    assert isinstance(method, DreamerV3)
    assert isinstance(replay, Replay)
    assert json.loads((run / "config.json").read_text())["model"]["discrete"] is True
    action, first = replayed(run, "action"), replayed(run, "reward") == 0
    assert action.shape[1] == 3
    assert set(action.sum(-1).tolist()) == {0.0, 1.0}
    assert not action[action.sum(-1) == 0].any()
    assert first[action.sum(-1) == 0].all()  # no action led to the record of a reset
    assert (action.sum(0) > 2).all()  # random and sampled choices of every kind
    taken = [int(x) for x in env.inner.taken]
    assert action[action.sum(-1) == 1].argmax(-1).tolist() == taken[: int(action.sum())]
    torch.manual_seed(0)
    path = method.imagine(method.dynamics.initial(2))
    assert set(path.action.unique().tolist()) == {0.0, 1.0}
    losses, metrics, returns = method._actor_critic(path)
    with torch.no_grad():
        log_probs = torch.log(0.99 * torch.softmax(method.actor(path.feat[:-1]), -1) + 0.01 / 3)  # (H, N, A)
        value = TwoHot(method.critic(path.feat), method.bins).pred()
        cont = torch.sigmoid(method.cont(path.feat).squeeze(-1))
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        advantage = (returns - value[:-1]) / metrics["return_range/scale"]
        score = (log_probs * path.action).sum(-1) * advantage + method.config.entropy * entropy
        torch.testing.assert_close(losses["policy"], -(cont.cumprod(0)[:-1] * score).mean(), atol=1e-5, rtol=1e-4)
    assert metrics["actor/entropy"] == pytest.approx(entropy.mean().item(), rel=1e-4)
    gradient = torch.autograd.grad(losses["policy"], next(method.actor.parameters()))[0]
    assert gradient.abs().sum() > 0


# 2. Runs --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "observed"), [(CHOICES, "both"), (DRAWN, "pixels")])
def test_a_run_in_pieces_is_the_whole_run(
    name: str, observed: str, no_evaluation: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle of episodes: the environment gets its seed and actions again."""
    run = run_of("dreamer_v3", name, "model.imag_length=2", observed=observed, env_options={"limit": 11})
    whole = finetune(run, tmp_path / "whole")
    left = iter([7, 30, 13])
    count = [next(left)]

    def check(request: StopRequest) -> None:
        count[0] -= 1
        if not count[0]:
            count[0] = next(left, 10**6)
            raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr(StopRequest, "check", check)
    for _ in range(3):
        with pytest.raises(Interrupted):
            finetune(run, tmp_path / "pieces")
    finetune(run, tmp_path / "pieces")
    one, other = (checkpoint.read(checkpoint.newest(path), "weights") for path in (whole, tmp_path / "pieces"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    for key in ("action", "image", "reward", "is_terminal", "position" if name == CHOICES else "state"):
        assert torch.equal(replayed(whole, key), replayed(tmp_path / "pieces", key)), key
    assert replayed(whole, "action").shape[1] == (3 if name == CHOICES else 2)


def test_the_commands_from_a_working_folder(
    tmp_path: Path, no_evaluation: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The name on the command line is enough to train and to resume. Other commands that read the run need it too."""
    monkeypatch.setattr(foreign, "_trusted", [])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_lamps.py").write_text(
        "import examples.lamps\ndef make(presses=4):\n    return examples.lamps.Lamps(presses)\n"
    )
    head = ["train", "--method", "dreamer_v3", "--preset", "debug", "--env", "my_lamps:make", "--run", "r"]
    head += [part for text in (*FEW, "device=cpu", "threads=1", "precision=fp32", "recipe={size: 32, percept_size: 32}")
             for part in ("--set", text)]  # fmt: skip
    main(head)
    said = " ".join(capsys.readouterr().out.split())
    assert "the replay also records left; dreamer_v3 does not use them: set --observed both to learn from them" in said
    main(head)  # resumes: nothing is left to do
    monkeypatch.setattr(foreign, "_trusted", [])
    with pytest.raises(SystemExit):
        main(["evaluate", "r", "--episodes", "1"])
    assert "my_lamps:make" in " ".join(capsys.readouterr().err.split())
    main(["evaluate", "r", "--episodes", "2", "--trust-env", "my_lamps:make", "--device", "cpu"])
    result = json.loads(capsys.readouterr().out.strip())
    assert result["length_mean"] == 4.0
    assert "success_rate" in result
    random = evaluate_run(Path("r"), episodes=4, policy="random", device="cpu")
    assert 0 < random["return_mean"] < 4


def test_methods_that_act_with_numbers_refuse_choices(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"its actions are choices \(Discrete\), and dreamer_v2 acts with .* choices: dreamer_v3$"
    ):
        finetune(run_of("dreamer_v2", CHOICES), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"model\.discrete=true: the actions of own_envs:drawn are numbers"):
        finetune(run_of("dreamer_v3", DRAWN, "model.discrete=true"), tmp_path / "run")
    foreign.trust_env("own_envs:pictures")
    with pytest.raises(ConfigError, match="has no numbers"):
        finetune(run_of("dreamer_v3", "own_envs:pictures", observed="both"), tmp_path / "run")


def test_a_method_of_pictures_learns_in_an_environment_of_numbers(no_evaluation: None, tmp_path: Path) -> None:
    run = finetune(run_of("dreamer_v2", DRAWN, env_options={"limit": 8}), tmp_path / "run")
    assert replayed(run, "state").shape[1:] == (1,)
    assert load_run(run, device="cpu")[1].action_dim == 2


def test_in_processes_the_episodes_are_the_same() -> None:
    """The modules that the user trusts are trusted in the workers; the numbers come along."""
    env = VectorEnv(CHOICES, 2, seed=3, workers=1, size=16)
    try:
        assert env.description["discrete"] is True
        single = [make_env(CHOICES, seed=env_seed(3, i), size=16) for i in range(2)]
        observed, _ = env.reset(seed=[4, 5])
        expected = [one.reset(seed=seed)[0] for one, seed in zip(single, (4, 5), strict=True)]
        for step in range(6):
            for key in ("image", "position", "kind"):
                np.testing.assert_array_equal(observed[key], np.stack([seen[key] for seen in expected]))
            actions = np.eye(3, dtype=np.float32)[[step % 2, 0]]
            observed, reward, terminated, truncated, _ = env.step(actions)
            alone = [one.step(action) for one, action in zip(single, actions, strict=True) if one._elapsed is not None]
            if len(alone) < 2:
                break
            expected = [part[0] for part in alone]
            np.testing.assert_array_equal(reward, [part[1] for part in alone])
            assert terminated.tolist() == [part[2] for part in alone]
            assert truncated.tolist() == [part[3] for part in alone]
    finally:
        env.close()


def seeds_of(fails: bool) -> list[int]:
    """Seeds of `reset` with which an episode of SHAKY fails, or does not."""
    inner = {seed: int(np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed))).integers(2**31)) for seed in range(40)}
    return [seed for seed, given in inner.items() if (given % 2 == 0) == fails]


GOOD, BAD = seeds_of(False), seeds_of(True)


@pytest.mark.parametrize(("at", "cause"), [("step", "step.. failed: .*through the wall"), ("reward", "reward nan is not finite")])
def test_in_processes_an_environment_that_fails_costs_its_own_episode(at: str, cause: str) -> None:
    foreign.trust_env(SHAKY)
    env = VectorEnv(SHAKY, 2, workers=1, size=16, at=at)
    action = np.ones((2, 2), np.float32)

    def played(*seeds: int) -> Any:
        env.reset(seed=list(seeds))
        while env.running.any():
            last = env.step(action)
        return last

    try:
        env.reset(seed=[GOOD[0], BAD[0]])
        for _ in range(2):
            before, reward, *_, info = env.step(action)
            assert not info["crashed"].any()
            assert not info["faults"]
        observed, reward, terminated, truncated, info = env.step(action)
        assert info["crashed"].tolist() == truncated.tolist() == [False, True]
        assert not terminated.any()
        assert reward[1] == 0 != reward[0]
        assert info["env_steps"].tolist() == [1, 0]
        np.testing.assert_array_equal(observed["image"][1], before["image"][1])
        assert re.search(f"^{SHAKY}: {cause}", info["faults"][1])
        for seed in (GOOD[1], BAD[1], GOOD[2]):
            *_, info = played(GOOD[0], seed)
            assert info["crashed"].tolist() == [False, seed in BAD]
        *_, info = played(BAD[2], BAD[3])
        assert info["crashed"].all()
    finally:
        env.close()


def test_in_processes_an_environment_that_fails_in_its_reset_waits_for_the_next() -> None:
    foreign.trust_env(SHAKY)
    env = VectorEnv(SHAKY, 2, workers=2, size=16, at="reset")
    try:
        first, info = env.reset(seed=[GOOD[0], GOOD[1]])
        again, info = env.reset(seed=[GOOD[2], BAD[0]])
        assert info["crashed"].tolist() == [False, True]
        assert "no floor" in info["faults"][1]
        np.testing.assert_array_equal(again["image"][1], first["image"][1])
        _, reward, _, truncated, info = env.step(np.ones((2, 2), np.float32))
        assert reward[0] != 0 == reward[1]
        assert truncated.tolist() == [False, True]
        assert not info["faults"]
        found, info = env.reset(seed=[None, GOOD[3]], options={"reset_mask": [False, True]})
        assert not info["crashed"].any()
        np.testing.assert_array_equal(found["image"][1], make_env(SHAKY, size=16).reset(seed=GOOD[3])[0]["image"])
    finally:
        env.close()


@pytest.fixture
def on_policy(monkeypatch: pytest.MonkeyPatch, no_evaluation: None) -> list[dict[str, Tensor]]:
    """`act_extras` is a method; the batches that it learns from."""
    monkeypatch.setattr(methods, "_METHODS", dict(methods._METHODS))
    methods.register("act_extras", "examples.act_extras", "ActExtras")
    foreign.trust_env(SHAKY)
    batches: list[dict[str, Tensor]] = []
    learn = Updater.learn

    def looked(self: Updater, batch: dict[str, Tensor]) -> Any:
        batches.append({key: value.clone() for key, value in batch.items()})
        return learn(self, batch)

    monkeypatch.setattr(Updater, "learn", looked)
    return batches


def rollouts(at: str, every: int, count: int = 3, *more: str) -> Any:
    few = (f"environments={count}", "rollout.workers=1", "rollout.steps=8", "epochs=1", "minibatches=1", "log_every=1")
    given = {**FLAGS, "env_options": {"at": at, "every": every}}
    return compose("act_extras", "train", preset="debug", env=SHAKY, flags=given, settings=(*few, *(more or ("env_steps=96",))))


@pytest.mark.parametrize("at", ["step", "reset"])
def test_a_rollout_goes_on_after_a_failure_and_three_in_a_row_end_the_run(
    at: str, on_policy: list[dict[str, Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = finetune(rollouts(at, 5, 3, "env_steps=192"), tmp_path / "run")
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    faults, ended = ([row for row in rows if row["kind"] == kind] for kind in ("fault", "episode"))
    assert {row["environment"] for row in faults} <= {0, 1, 2}
    assert max(Counter(row["environment"] for row in faults).values()) >= 3  # with whole episodes between them
    assert {row["length"] for row in ended} == {6}  # the others are no whole episodes
    said = " ".join(capsys.readouterr().out.split())
    assert f"{faults[0]['error']}; the episode of environment {faults[0]['environment']} ends, and a fresh one begins" in said
    assert json.loads((path / "status.json").read_text())["state"] == "finished"
    whole = {key: torch.cat([on_policy[0][key], *(batch[key][:, 1:] for batch in on_policy[1:])], 1) for key in on_policy[0]}
    for index in range(3):
        begins = [*torch.nonzero(whole["is_first"][index]).flatten().tolist(), None]
        for start, end in itertools.pairwise(begins):
            lived = whole["reward"][index, start:end]
            assert lived[0] == 0
            assert (lived[1:] != 0).all()  # no step without a reward where an environment failed
            assert len(lived) in ((3, 7) if at == "step" else (7,)) or end is None
            assert not whole["action"][index, start].any()
    with pytest.raises(EnvError, match=r"environment [0-2]: .*3 failures without a complete episode between them"):
        finetune(rollouts(at, 1), tmp_path / "always")
    last = json.loads((tmp_path / "always" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["kind"] == "fault"


def test_what_is_saved_when_an_environment_keeps_failing_is_the_beginning_of_the_rollout(
    on_policy: list[dict[str, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run that goes on after it has the same episodes as one that never failed, up to the noise of its actions."""
    ask, calls = VectorEnv.step_wait, [0]

    def failing(env: VectorEnv) -> Any:
        calls[0] += 1
        if calls[0] == 14:
            raise EnvError("the licence ended")
        return ask(env)

    monkeypatch.setattr(VectorEnv, "step_wait", failing)
    run = rollouts("step", 10**9)
    with pytest.raises(EnvError, match="licence"):
        finetune(run, tmp_path / "run")
    state = checkpoint.read_state(checkpoint.newest(tmp_path / "run"))
    assert state["agent_step"] == 24
    first, count = on_policy[-1], len(on_policy)
    finetune(run, tmp_path / "run")
    again = on_policy[count]
    for key in ("image", "is_first", "action", "reward"):
        assert torch.equal(again[key][:, 0], first[key][:, -1]), key
    begins = torch.nonzero(torch.cat([first["is_first"], again["is_first"][:, 1:]], 1)[0]).flatten().tolist()
    assert begins == [0, 7, 14]


def test_an_environment_that_fails_while_a_run_is_restored_begins_a_new_episode(
    on_policy: list[dict[str, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stops = Stops(monkeypatch, 2)
    with pytest.raises(Interrupted):
        finetune(rollouts("step", 10**9, 1, "env_steps=40"), tmp_path / "run")
    del stops
    monkeypatch.setattr(StopRequest, "check", lambda _: None)
    ask, count = VectorEnv.step_wait, len(on_policy)

    def failing(env: VectorEnv) -> Any:
        found = ask(env)
        if count == len(on_policy) and not failed:
            failed.append(True)
            env._reasons, env._running[:], env._crashed[:] = {0: "shaken"}, False, True
            return *found[:-1], {**found[-1], "faults": {0: "shaken"}, "crashed": np.ones(1, bool)}
        return found

    failed: list[bool] = []
    monkeypatch.setattr(VectorEnv, "step_wait", failing)
    path = finetune(rollouts("step", 10**9, 1, "env_steps=40"), tmp_path / "run")
    assert failed
    assert '"error": "shaken"' in (path / "metrics.jsonl").read_text()
    assert on_policy[count]["is_first"][0].tolist() == [False, True, *[False] * 6, True]
    assert json.loads((path / "status.json").read_text())["state"] == "finished"


@pytest.mark.parametrize("policy", ["random", "smooth"])
def test_choices_are_collected(policy: str, tmp_path: Path) -> None:
    found = collect(CHOICES, tmp_path / "videos", policy=policy, episodes=3, size=32)
    (first, *_) = sorted((tmp_path / "videos" / "actions").glob("*.npy"))
    action = np.load(first)
    assert not action[0].any()
    assert (action[1:].sum(1) == 1).all()
    assert all("success" in episode for episode in found.episodes)
    with pytest.raises(ConfigError, match="the actions of own_envs:choices are choices, to which no noise can be added"):
        collect(CHOICES, tmp_path / "noisy", policy=policy, noise=0.1)


@pytest.mark.parametrize("at", ["step", "reset"])
def test_an_episode_that_fails_is_collected_with_another_seed(
    at: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign.trust_env(SHAKY)
    whole = collect(SHAKY, tmp_path / "videos", episodes=6, size=16, seed=1, at=at, every=3)
    assert {episode["frames"] for episode in whole.episodes} == {7}
    own = [episode_seed(1, "collect", number) for number in range(6)]
    again = [episode["id"] for episode, seed in zip(whole.episodes, own, strict=True) if episode["seed"] != seed]
    said = " ".join(capsys.readouterr().out.split())
    assert 0 < len(again) < 6
    for name in again:
        assert f"{name} is played again, with another seed in a fresh environment" in said
    parts = collect(SHAKY, tmp_path / "parts", episodes=3, size=16, seed=1, at=at, every=3)
    parts = collect(SHAKY, tmp_path / "parts", episodes=6, size=16, seed=1, at=at, every=3)
    assert parts.episodes == whole.episodes
    with pytest.raises(EnvError, match="3 failures of video own_envs_shaky-smooth-1-000000; the 0 before it are kept"):
        collect(SHAKY, tmp_path / "never", episodes=2, size=16, seed=1, at=at, every=1)


def test_evaluate_goes_on_after_a_failure_and_reports_what_was_complete(
    no_evaluation: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign.trust_env(SHAKY)
    path = str(finetune(run_of("dreamer_v2", SHAKY, env_options={"every": 10**9}), tmp_path / "run"))
    capsys.readouterr()

    def told(every: int, code: int = 0) -> tuple[list[str], str]:
        command = [
            "evaluate",
            path,
            "--episodes",
            "7",
            "--device",
            "cpu",
            "--env-options",
            f'{{"every": {every}}}',
            "--trust-env",
            SHAKY,
        ]
        if code:
            with pytest.raises(SystemExit, match=str(code)):
                main(command)
        else:
            main(command)
        found = capsys.readouterr()
        return found.out.splitlines(), found.err

    (line,), _ = told(10**9)
    whole = json.loads(line)
    (*lines, line), _ = told(4)
    found = json.loads(line)
    assert whole["faults"] == 0 < found["faults"] == len(lines) < 7
    assert (found["episodes"], found["length_mean"]) == (7, 6)
    again = {int(re.search(r"wall .* in episode (\d) of 7 \(seed \d+\); it is", text)[1]) - 1 for text in lines}  # type: ignore[index]
    same = [one == other for one, other in zip(found["returns"], whole["returns"], strict=True)]
    assert same == [index not in again for index in range(7)]
    lines, error = told(1, 2)
    assert not lines
    assert re.search(
        r"through the wall .* episode 1 of 7 .*: 5 failures .*; 0 of 7 episodes are complete; fix the environment", error
    )

    def ends(*_: Any, **__: Any) -> Rollout:
        raise EvaluationError("no floor", Rollout([3.0, 5.0], [6, 6], faults=[(2, SimulationError("no floor"))] * 3))

    monkeypatch.setattr(evaluation, "evaluate", ends)
    (line,), error = told(1, 2)
    found = json.loads(line)
    assert (found["returns"], found["episodes"], found["faults"], found["env"]) == ([3, 5], 2, 3, SHAKY)
    assert "no floor" in error


def test_an_environment_that_ends_the_program_ends_an_episode(tmp_path: Path) -> None:
    """It is a fault like any other: logged, and an error of the run after three."""
    foreign.trust_env("own_envs:quits")
    with pytest.raises(EnvError, match=r"own_envs:quits: step\(\) failed: it called sys\.exit\(3\) .*3 failures"):
        finetune(run_of("dreamer_v2", "own_envs:quits"), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"


@pytest.mark.parametrize("changed", [{"keep": 4}, {"keep": 1}, {"reward": None}, {"observation": {"speed": np.zeros(3)}}])
def test_what_breaks_the_api_is_an_error_before_the_run(changed: dict[str, Any], tmp_path: Path) -> None:
    foreign.trust_env("own_envs:wrong")
    with pytest.raises(
        EnvError, match=r"own_envs:wrong: (step\(\) returned 4|reset\(\) returned a dict|reward is None|.* has shape)"
    ):
        finetune(run_of("dreamer_v3", "own_envs:wrong", env_options=changed), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_after_a_run_that_played_nothing_the_corrected_command_goes_on(
    no_evaluation: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign.trust_env("own_envs:quits")
    path = tmp_path / "run"
    with pytest.raises(EnvError, match="3 failures"):
        finetune(run_of("dreamer_v2", "own_envs:quits"), path)
    finetune(run_of("dreamer_v2", DRAWN, env_options={"limit": 8}), path)
    assert f"{path.name}: nothing was played or learned there" in "".join(capsys.readouterr().out.split("\n"))
    assert json.loads((path / "status.json").read_text())["state"] == "finished"
    assert '"fault"' not in (path / "metrics.jsonl").read_text()
    with pytest.raises(ConfigError, match="holds a run of other settings: env "):
        finetune(run_of("dreamer_v2", "own_envs:quits"), path)


def test_later_it_ends_the_run_at_once_and_a_chance_is_tried_again(tmp_path: Path) -> None:
    foreign.trust_env("own_envs:wrong")
    for number, (changed, error, faults) in enumerate((
        ({"reward": None}, r"reward is None; a number is needed$", False),
        ({"observation": {"speed": np.array([0, np.nan])}}, r"'speed' is not finite \(nan\) at env step 3 of its .*3 failures", True),
    )):  # fmt: skip
        path = tmp_path / str(number)
        with pytest.raises(EnvError, match=error):
            finetune(run_of("dreamer_v3", "own_envs:wrong", env_options={**changed, "after": 3}), path)
        logged = path / "metrics.jsonl"
        assert (logged.exists() and '"fault"' in logged.read_text()) == faults
        assert json.loads((path / "status.json").read_text())["agent_step"] > 0


def test_an_expert_needs_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["expert", CHOICES, "--out", str(tmp_path / "x")])
    assert "experts act with numbers and see a state vector, but its actions are choices" in " ".join(
        capsys.readouterr().err.split()
    )


def test_the_page_shows_the_example() -> None:
    root = Path(__file__).parent.parent
    assert f"```python\n{(root / 'examples' / 'lamps.py').read_text()}```" in (root / "docs" / "own_environments.md").read_text()


# 3. Learning ------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_dreamer_v3_learns_choices_from_pictures(tmp_path: Path) -> None:
    """The lit lamp's button, ten times an episode: random presses have 5 of 10. Most seeds are there after 500 updates."""
    settings = ("prefill=300", "warmup_updates=100", "batch_size=8", "online.length=8", "online.lr=2e-3", "train_every=3",
                "imag_length=4", "model.horizon=4", "model.entropy=0.1", "online.eval_every=100000")  # fmt: skip
    reached = []
    for budget in (1_500, 2_500):
        run = compose("dreamer_v3", "train", preset="debug", env=LAMPS, flags=FLAGS, settings=(*settings, f"env_steps={budget}"))
        out = finetune(run, tmp_path / "run")
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        reached.append([line for line in lines if line["kind"] == "eval"][-1]["return_mean"])
        if reached[-1] > 8.5:
            break
    assert reached[-1] > 8.5, reached
    random = [line["return"] for line in lines if line["kind"] == "episode" and line["random"]]
    assert 3.5 < np.mean(random) < 6.5
