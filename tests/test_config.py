"""Settings: strict, composable, and the paper preset equal to the paper's Table 5."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localmotion import methods
from localmotion.config import PRESETS, all_docs, assign, leaves, nested, to_dict, update
from localmotion.errors import ConfigError
from localmotion.limits import limits
from localmotion.methods.base import Source
from localmotion.recipe import Recipe
from localmotion.runs.settings import compose, from_dict, with_recipe
from localmotion.training.checks import check_begins, check_decay, check_length
from localmotion.training.finetune import finetune
from method_batches import AGENTS

# Table 5 of arXiv 2607.00808, row by row: (where it lives here, value).
TABLE_5_PRETRAIN = {
    "pretrain.length": 25,
    "model.beta_z": 1.0,
    "pretrain.lr": 3e-4,
    "pretrain.batch_size": 16,
    "pretrain.updates": 600_000,
    "model.dae.keypoints": 16,
    "model.dae.patch": 16,
    "model.dae.mask_ratio": 0.5,
    "model.dae.blocks": 6,
}
TABLE_5_FINETUNE = {
    "online.length": 50,
    "online.replay_capacity": 1_000_000,
    "online.train_every": 5,
    "model.beta_s": 1.0,
    "model.beta_r": 1.0,
    "model.behaviour.horizon": 15,
    "model.behaviour.discount": 0.99,
    "model.behaviour.lambda_": 0.95,
    "model.behaviour.entropy": 1e-4,
    "online.lr": 3e-4,
    "online.actor_lr": 8e-5,
    "online.critic_lr": 8e-5,
    "online.eval_episodes": 10,
    "model.dae.keypoints": 16,
    "model.dae.patch": 16,
    "model.dae.mask_ratio": 0.5,
    "model.dae.blocks": 6,
}
PER_SUITE = {
    "metaworld:reach": {
        "online.prefill": 5000,
        "online.batch_size": 50,
        "model.intrinsic_weight": 1.0,
        "online.env_steps": 255_000,
        "model.free_nats": 0.0,
    },
    "dmc:walker_run": {
        "online.prefill": 1000,
        "online.batch_size": 16,
        "model.intrinsic_weight": 0.1,
        "online.env_steps": 1_020_000,
        "model.free_nats": 1.0,
    },
}


def test_paper_preset_is_table_5() -> None:
    values = dict(leaves(compose("drp", "pretrain", preset="paper")))
    assert {key: values[key] for key in TABLE_5_PRETRAIN} == TABLE_5_PRETRAIN


@pytest.mark.parametrize("env", PER_SUITE)
def test_paper_preset_is_table_5_per_suite(env: str) -> None:
    values = dict(leaves(compose("drp", "finetune", preset="paper", env=env)))
    expected = TABLE_5_FINETUNE | PER_SUITE[env]
    assert {key: values[key] for key in expected} == expected


@pytest.mark.parametrize("name", AGENTS)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_composes_and_survives_json(name: str, preset: str) -> None:
    config = compose(name, "train", preset=preset, env="dmc:walker_walk")
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize("name", AGENTS)
def test_every_setting_is_documented(name: str) -> None:
    config = compose(name, "train", preset="paper")
    docs = all_docs(config)
    bare = [key for key, _ in leaves(config) if not docs.get(key) and key != "model"]
    assert not bare


@pytest.mark.parametrize("name", ["batch_size", "length", "lr", "log_every", "eval_every", "save_every"])
def test_a_short_name_that_both_stages_have_means_the_runs_own(name: str) -> None:
    value = 7 if name != "lr" else 0.5
    for stage, part in (("pretrain", "pretrain"), ("train", "online"), ("finetune", "online")):
        before = compose("drp", stage, preset="small")
        changed = [key for key, now in leaves(assign(before, f"{name}={value}")) if now != dict(leaves(before))[key]]
        assert changed == [f"{part}.{name}"]
    with pytest.raises(ConfigError, match=r"pretrain\.(lr|lr_decay)|online\.lr"):
        assign(compose("drp", "pretrain"), "pretrain.lrr=1")


def test_short_names_and_types() -> None:
    config = compose("drp", "pretrain", preset="paper", settings=["keypoints=8", "pretrain.lr=1e-3", "joint_gradient=false"])
    assert (config.model.dae.keypoints, config.pretrain.lr, config.model.joint_gradient) == (8, 1e-3, False)
    assert assign(config, "dae.keypoints=4").model.dae.keypoints == 4
    with pytest.raises(ConfigError, match=r"unknown setting 'e\.keypoints'"):
        assign(config, "e.keypoints=4")  # parts of a name, not letters


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("keypiont=8", "keypoints"),
        ("depths=1", "depth"),
        ("keypoints=many", "expected int"),
        ("keypoints=2.5", "expected int"),
        ("adapter=conv", "attention"),
        ("keypoints", "name=value"),
        ("joint_gradient=3", "expected bool"),
    ],
)
def test_bad_settings_say_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        assign(compose("drp", "pretrain"), text)


def test_unknown_names_are_errors_with_neighbours() -> None:
    with pytest.raises(ConfigError, match="drp"):
        compose("dpr", "pretrain")
    with pytest.raises(ConfigError, match="small"):
        compose("drp", "pretrain", preset="smal")
    with pytest.raises(ConfigError, match="nonsense"):
        from_dict({**to_dict(compose("drp", "pretrain")), "nonsense": 1})
    with pytest.raises(ConfigError, match="unknown method"):
        from_dict({**to_dict(compose("drp", "pretrain")), "method": "os.system"})


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("stage=tokenize", "all other settings are those of stage pretrain; run the command localmotion tokenize"),
        ("method=drp", "those of method pvdr; write --method drp"),
        ("preset=debug", "those of preset tiny; write --preset debug"),
    ],
)
def test_a_setting_names_no_other_stage_method_or_preset(text: str, wanted: str) -> None:
    """`pretrain --stage tokenize` ran with the other stage's batches, whose frames take seven times as long."""
    assert compose("pvdr", "pretrain", preset="tiny", settings=("stage=pretrain", "preset=tiny")).stage == "pretrain"
    with pytest.raises(ConfigError, match=wanted):
        compose("pvdr", "pretrain", preset="tiny", settings=(text,))


@given(st.integers(1, 32), st.floats(0.1, 0.9))
def test_update_changes_exactly_what_is_named(keypoints: int, ratio: float) -> None:
    before = compose("drp", "pretrain", preset="paper")
    after = update(before, {"model": {"dae": {"keypoints": keypoints, "mask_ratio": ratio}}})
    changed = {key for (key, a), (_, b) in zip(leaves(before), leaves(after), strict=True) if a != b}
    assert changed <= {"model.dae.keypoints", "model.dae.mask_ratio"}
    assert after.model.dae.keypoints == keypoints


def test_a_run_of_an_older_version_goes_on_and_one_of_other_settings_does_not(tmp_path: Path) -> None:
    """A setting that the saved configuration does not know counts as its default; dict-valued settings are compared whole."""
    from localmotion.runs.rundir import RunDir

    run = compose("drp", "train", preset="debug", env="toy:dot")
    RunDir(tmp_path / "run", run).status("interrupted", agent_step=1)
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    del saved["env_options"], saved["model"]["world"]["context_copy"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(saved))
    with pytest.raises(ConfigError, match=r"model.world.context_copy \(False there, True now\)"):  # the preset's, not the default
        RunDir(tmp_path / "run", run)
    run = compose("drp", "train", preset="debug", env="toy:dot", settings=("context_copy=false",))
    RunDir(tmp_path / "run", run)
    with pytest.raises(ConfigError, match=r"env_options \(\{\} there, \{'a': 1\} now\)"):
        RunDir(tmp_path / "run", dataclasses.replace(run, env_options={"a": 1}))
    saved["wrong"] = 1
    (tmp_path / "run" / "config.json").write_text(json.dumps(saved))
    with pytest.raises(ConfigError, match="holds a run of other settings"):
        RunDir(tmp_path / "run", run)


@pytest.mark.parametrize(
    ("file", "text", "begun"),
    [
        ("status.json", '{"state": "failed", "agent_step": 0, "env_step": 0}', False),
        ("status.json", '{"state": "running", "update": 0}', False),  # killed: nobody else has the lock
        ("status.json", '{"state": "failed", "agent_step": 2, "env_step": 4}', True),
        ("status.json", '{"state": "interrupted", "update": 1}', True),
        ("status.json", '{"state": "running", "upd', True),
        ("metrics.jsonl", '{"kind": "fault", "update": 0, "agent_step": 0}\n', False),
        ("metrics.jsonl", '{"kind": "heldout", "update": 0}\n{"kind": "pretrain", "update": 9}\n', True),
        ("metrics.jsonl", '{"kind": "episode", "update": 0, "agent_step": 30}\n', True),
        ("metrics.jsonl", '{"kind": "epi', True),
        ("checkpoints/0000000000/COMPLETE", "", True),
        ("checkpoints/0000000000/state.json", "", False),
    ],
)
def test_a_run_that_did_nothing_takes_other_settings(
    file: str, text: str, begun: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What may have done something keeps its settings."""
    from localmotion.runs.rundir import RunDir

    run, other = (compose("drp", "train", preset="debug", env=env) for env in ("toy:dot", "toy:block"))
    path = tmp_path / "run"
    RunDir(path, run)
    (path / file).parent.mkdir(parents=True, exist_ok=True)
    (path / file).write_text(text)
    if begun:
        with pytest.raises(ConfigError, match=r"holds a run of other settings: env \('toy:dot' there, 'toy:block' now\)"):
            RunDir(path, other)
    else:
        RunDir(path, other)
        assert "nothing was played or learned there" in " ".join(capsys.readouterr().out.split())
    assert json.loads((path / "config.json").read_text())["env"] == ("toy:dot" if begun else "toy:block")


def test_nothing_of_a_run_that_did_nothing_binds_the_next_command(tmp_path: Path) -> None:
    """Neither its recipe, nor the decisions at its start."""
    from localmotion.runs.rundir import RunDir, earlier, read_environment

    run = compose("drp", "train", preset="debug", env="toy:dot")
    out = RunDir(tmp_path, dataclasses.replace(run, recipe=Recipe(size=32, percept_size=32)))
    out.environment({"device": "cpu", "precision": "bf16"})
    for state, binds in (({"update": 0}, False), ({"update": 1}, True)):
        out.status("failed", **state)
        assert bool(with_recipe(dataclasses.replace(run, recipe=None), earlier(tmp_path)).recipe) == binds
        assert ("precision" in read_environment(earlier(tmp_path))) == binds


@pytest.mark.parametrize("preset", ["paper", "small", "tiny", "debug"])
@pytest.mark.parametrize("name", methods.names())
def test_every_stage_may_begin_with_every_preset(name: str, preset: str) -> None:
    """The checks that commands make before the work refuse no preset."""
    cls = methods.get(name)
    for stage in cls.stages:
        flags = {"data": "store" if cls.stages[stage] in (Source.CLIPS, Source.LOGGED) else "", "checkpoint": "run"}
        run = compose(name, stage, preset=preset, env="toy:block", flags=flags)
        check_begins(cls, run)
        check_length(cls, run)
        if cls.stages[stage] is not Source.CLIPS:
            check_decay(cls, run)


def test_a_rate_that_cannot_fall_is_refused(tmp_path: Path) -> None:
    run = compose("dreamer_v2", "train", preset="debug", env="toy:block", settings=("online.lr_decay=0.5",))
    with pytest.raises(ConfigError, match=r"lr_decay=0.5: train of dreamer_v2 keeps its learning rate"):
        finetune(run, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("env", ["dmc:walker_run", "dmcr:walker_run", "planar:walker_run", "metaworld:reach", "toy:block"])
def test_drp_reads_z_as_ipvs_release_does_in_the_suites_of_control(env: str) -> None:
    """The posterior of s sees the embedding, and the KL of z has no weight in fine-tuning. Elsewhere Eqs. 3 and 8 hold."""
    model = compose("drp", "finetune", preset="paper", env=env).model
    control = env.partition(":")[0] not in ("metaworld", "toy")
    assert (model.embed_input, model.beta_z_finetune, model.beta_z) == (control, 0.0 if control else None, 1.0)
    eq_3 = compose("drp", "finetune", preset="paper", env=env, settings=("embed_input=false", "beta_z_finetune=null")).model
    assert (eq_3.embed_input, eq_3.beta_z_finetune) == (False, None)


@pytest.mark.parametrize("method", ["drp", "ipv"])
def test_one_environment_may_have_settings_of_its_own(method: str) -> None:
    """IPV erases parts of the context on Meta-World, but for drawer-open; both spellings of a task are the same."""
    erased = {
        env: compose(method, "train", env=env).model.context_erasing for env in ("metaworld:reach", "metaworld:drawer-open")
    }
    assert erased == {"metaworld:reach": True, "metaworld:drawer-open": False}
    assert not compose(method, "train", env="metaworld:drawer-open-v3").model.context_erasing


UNLIMITED = {"log_std", "mask_grow"}
"""A logarithm, and a number that may be negative. MaskLAM compares it with the picture."""


@pytest.mark.parametrize("name", methods.names())
def test_every_number_of_a_method_has_limits_and_is_refused_beyond_them(name: str) -> None:
    cls = methods.get(name)
    stage, known = next(iter(cls.stages)), dict(limits(cls.Config(), "model."))
    numbers = {
        key: value
        for key, value in ((f"model.{key}", value) for key, value in leaves(cls.Config()))
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    assert {key.rsplit(".", 1)[-1] for key in set(numbers) - set(known)} <= UNLIMITED
    assert set(known) == {key for key in numbers if key.rsplit(".", 1)[-1] not in UNLIMITED}
    for key, (low, high) in known.items():
        for value in (low - 1, *([] if high > 1 else [high + 1])):
            wrong = int(value) if isinstance(numbers[key], int) else float(value)
            with pytest.raises(ConfigError, match=rf"setting {key}=\S+ must be"):
                compose(name, stage, settings=(f"{key}={wrong}",))
            with pytest.raises(ConfigError, match=rf"setting {key.removeprefix('model.')}=\S+ must be"):  # in Python, too
                cls(update(cls.Config(), nested(key.removeprefix("model."), wrong)), image_size=32, action_dim=2)


@pytest.mark.parametrize(
    ("method", "text", "wanted"),
    [
        ("masklam", "offset=0", "at least 1"),
        ("masklam", "floor=2", "in 0..1"),
        ("drp", "flow_scale=0", "above 0"),
        ("lapo", "model.ppo.entropy=-1", "at least 0"),
        ("lapo", "head_share=0", "above 0 and at most 1"),
    ],
)
def test_limits_are_said_in_words(method: str, text: str, wanted: str) -> None:
    with pytest.raises(ConfigError, match=f"must be {wanted}$"):
        compose(method, "pretrain", settings=(text,))


def test_a_mask_grows_less_than_half_a_picture() -> None:
    with pytest.raises(ConfigError, match="mask_grow=-16"):
        methods.get("masklam")(methods.get("masklam").Config(mask_grow=-16), image_size=32, action_dim=None)
