"""--config: settings from a file. The command line wins, unknown names are errors, and a file imports nothing."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from localmotion.cli import main
from localmotion.config import RunConfig, to_dict
from localmotion.errors import ConfigError
from localmotion.runs.settings import compose, read_settings
from localmotion.training import finetune


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """The runs that commands would begin."""
    runs: list[RunConfig] = []
    monkeypatch.setattr(finetune, "finetune", lambda run, path: runs.append(run))
    return runs


def written(path: Path, values: Any) -> str:
    path.write_text(json.dumps(values))
    return str(path)


def test_a_runs_own_settings_begin_the_same_run(tmp_path: Path, begun: list[RunConfig]) -> None:
    run = compose("drp", "train", preset="debug", env="toy:dot", settings=("model.beta_z=0.25", "recipe={tracks: 5}", "lr=1e-3"))
    file = written(tmp_path / "config.json", to_dict(run))
    main(["train", "--config", file, "--run", str(tmp_path / "run")])
    main(["train", "--config", file, "--run", str(tmp_path / "run"), "--seed", "3", "--online.lr=0.5", "--env", "toy:block"])
    same, changed = begun
    assert same == run
    assert (changed.seed, changed.online.lr, changed.env) == (3, 0.5, "toy:block")
    assert (changed.model, changed.recipe) == (run.model, run.recipe)


def test_a_few_settings_in_yaml(tmp_path: Path, begun: list[RunConfig]) -> None:
    """They win over those of the preset; the rest is the preset's."""
    (tmp_path / "few.yaml").write_text("env: dmc:walker_walk\nmodel:\n  free_nats: 0.5\nonline: {batch_size: 3}\n")
    main(["train", "--method", "dreamer_v2", "--preset", "tiny", "--config", str(tmp_path / "few.yaml"), "--run", "x"])
    tiny = compose("dreamer_v2", "train", preset="tiny", env="dmc:walker_walk")
    assert begun == [
        compose("dreamer_v2", "train", preset="tiny", env="dmc:walker_walk", settings=("free_nats=0.5", "batch_size=3"))
    ]
    assert begun[0].model.world == tiny.model.world


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sede": 1}, "unknown setting 'sede'; did you mean seed"),
        ({"model": {"beta": 1, "betta": 2}}, "unknown setting 'model.betta'"),
        ({"online": {"lr": "fast"}}, "setting online.lr='fast': expected float"),
        ({"method": "drp"}, "its method is 'drp', the command's is dreamer_v2"),
        ({"stage": "pretrain"}, "its stage is 'pretrain', the command's is train"),
        ({"preset": "tiny"}, "its preset is 'tiny', the command's is debug"),
        ({"env": ["toy:dot"]}, "env=.* must be a name"),
        ({"method": {"a": 1}}, "method=.* must be a name"),
        ([1], "settings are a mapping"),
        ({"env": "evil_module:make"}, "evil_module.*--trust-env|--trust-env.*evil_module"),
    ],
)
def test_a_wrong_file_is_an_error(
    values: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    file = written(tmp_path / "x.json", values)
    with pytest.raises(SystemExit) as ended:
        main(["train", "--method", "dreamer_v2", "--preset", "debug", "--config", file, "--run", str(tmp_path / "run")])
    assert ended.value.code == 2

    assert re.search(message, " ".join(capsys.readouterr().err.split()))
    assert "evil_module" not in sys.modules


def test_a_setting_is_no_shortened_flag(begun: list[RunConfig]) -> None:
    """`--follow` was read as `--follow-links`, which accepts links out of stores and runs."""
    main(["finetune", "--method", "pvdr", "--preset", "debug", "--follow", "gain", "--run", "x"])
    assert begun[0].model.align.follow == "gain"


@pytest.mark.parametrize(
    ("command", "method", "setting", "message"),
    [
        ("pretrain", "pvdr", "--env_steps", "setting online.env_steps does nothing in the stage pretrain of pvdr"),
        ("finetune", "drp", "--rollout.steps", "setting rollout.steps does nothing in the stage finetune of drp"),
        ("decode", "lapo", "--pretrain.updates", "does nothing in the stage decode of lapo; its own setting is online.updates"),
        ("train", "dreamer_v3", "--actor_lr", "setting online.actor_lr does nothing in the stage train of dreamer_v3"),
        (
            "train",
            "dreamer_v2",
            "--freeze_updates",
            "setting online.freeze_updates does nothing in the stage train of dreamer_v2",
        ),
        ("finetune", "lapo", "--train_every", "setting online.train_every does nothing in the stage finetune of lapo"),
        ("clone", "lapo", "--online.updates", "does nothing in the stage clone of lapo; its own setting is pretrain.updates"),
    ],
)
def test_a_flag_of_another_loop_is_an_error(
    command: str, method: str, setting: str, message: str, begun: list[RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--method", method, "--preset", "debug", setting, "5", "--run", "x"])
    assert (ended.value.code, begun) == (2, [])
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_stage_that_learns_from_clips_beside_labels_reads_the_share_that_is_held_out(
    begun: list[RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    one = ["decode", "--method", "bc", "--preset", "debug", "--pretrain.heldout_fraction", "0.2", "--run", "x"]
    main([*one, "--relabel", "true"])
    assert begun[0].pretrain.heldout_fraction == 0.2
    with pytest.raises(SystemExit) as ended:
        main(one)  # labelled episodes are not held out
    assert (ended.value.code, len(begun)) == (2, 1)
    assert "setting pretrain.heldout_fraction does nothing in the stage decode of bc" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--env_options", "{steps"], "error: --env_options '{steps': value cannot be read"),
        (["--env-options={steps"], "error: --env-options={steps: value cannot be read"),
        (["--set", "env_options={steps"], "error: --set 'env_options={steps': value cannot be read"),
        (["--set", "env_options"], "error: --set 'env_options': write it as name=value"),
        (["--config", "FILE"], "FILE: setting online.batch_size='many': expected int"),
        (["--config", "FILE", "--batch_size", "few"], "FILE: setting online.batch_size='many'"),  # the first of two mistakes
        (["--batch_size", "few"], "error: setting online.batch_size='few': expected int"),
        (["--config", "GOOD", "--batch_size", "few"], "error: setting online.batch_size='few': expected int"),
    ],
)
def test_a_value_that_cannot_be_read_names_what_was_typed(
    words: list[str], said: str, begun: list[RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "FILE").write_text("online: {batch_size: many}")
    (tmp_path / "GOOD").write_text("online: {batch_size: 3}")
    words = [str(tmp_path / word) if word in ("FILE", "GOOD") else word for word in words]
    with pytest.raises(SystemExit):
        main(["train", "--method", "dreamer_v2", "--preset", "debug", "--run", "x", *words])
    assert said in " ".join(capsys.readouterr().err.replace("\n", "").split())
    assert begun == []


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.yaml"
    bomb.write_text(
        "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"{b}: &{b} [{', '.join(['*' + a] * 10)}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True))
    )
    (tmp_path / "code.yaml").write_text("a: !!python/object/apply:os.system [ls]")
    for path in (bomb, tmp_path / "code.yaml", tmp_path / "missing.json", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read as settings"):
            read_settings(path)


# -- completion ----------------------------------------------------------------------------------------------------------------


def test_completion_without_its_package_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit):
        main(["completion", "bash"])
    assert "pip install 'localmotion[completion]'" in " ".join(capsys.readouterr().err.split())


@pytest.mark.skipif(importlib.util.find_spec("shtab") is None, reason="the extra completion is not installed")
@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_commands_and_options(shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["completion", shell])
    script = capsys.readouterr().out
    assert "check-env" in script
    assert "--env-options" in script
    if shell == "bash":
        (tmp_path / "completion").write_text(script)
        assert subprocess.run(["bash", "-n", str(tmp_path / "completion")]).returncode == 0
