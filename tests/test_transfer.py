"""Parts of a checkpoint by name: the paper's comparisons without pre-trained dynamics, and DRP fine-tuned from IPV."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from localmotion.cli import main
from localmotion.errors import CheckpointError, ConfigError
from localmotion.runs import checkpoint
from localmotion.runs.rundir import RunDir
from localmotion.training.transfer import load_pretrained
from localmotion.training.update import Updater
from method_batches import CPU, groups_of, make, make_batch


def pretrained(name: str, path: Path, *texts: str) -> tuple[Path, dict[str, torch.Tensor]]:
    """A pre-training run whose weights are one update away from the initial ones."""
    run, model = make(name, "pretrain", *texts)
    out = RunDir(path / name, run)
    updater = Updater(model, run, CPU)
    updater.learn(make_batch())
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    checkpoint.save(
        out.path / "checkpoints", 1, tensors={"weights": weights, "optimizer": updater.state()}, state={"stage": "pretrain"}
    )
    return out.path, weights


def loaded(method: str, source: Path, *texts: str, load: str = "") -> tuple[Any, dict[str, torch.Tensor], str, Any]:
    """The method after loading, what it was before, what was said, its run."""
    texts = (*texts, f"checkpoint={source}", *([f"load={load}"] if load else []))
    run, model = make(method, "finetune", *texts, env="metaworld:reach")
    torch.manual_seed(7)
    for p in model.parameters():
        p.data.normal_()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    return model, before, load_pretrained(model, run).line(), run


@pytest.mark.parametrize("name", ["drp", "ipv", "apv"])
def test_everything_is_loaded_by_default(name: str, tmp_path: Path) -> None:
    source, weights = pretrained(name, tmp_path)
    model, before, said, _ = loaded(name, source)
    after = model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in weights.items())
    assert all(torch.equal(after[k], before[k]) for k in set(after) - set(weights))
    assert said == f"loaded {len(weights)} tensors of {', '.join(model.transfers)} from {source} ({name})"


@pytest.mark.parametrize(("name", "load"), [("drp", "motion,image"), ("ipv", "image"), ("apv", "image")])
def test_without_pretrained_dynamics(name: str, load: str, tmp_path: Path) -> None:
    """Table 1, "w/o dyn.": all but the latent dynamics, which then is neither frozen nor slowed."""
    source, weights = pretrained(name, tmp_path)
    model, before, said, run = loaded(name, source, "freeze_updates=1", "pretrained_lr_factor=0.1", load=load)
    after = model.state_dict()
    for key, value in weights.items():
        assert torch.equal(after[key], before[key] if key.startswith("latent.") else value), key
    assert said.endswith("; not pre-trained: latent")
    groups = {id(p): group for group in groups_of(model, run, True) for p in group.parameters}
    latent = [groups[id(p)] for p in model.latent.parameters()]
    assert {(g.lr, g.freeze_updates) for g in latent} == {(run.online.lr, 0)}
    assert {groups[id(p)].freeze_updates for p in model.image.encoder_parameters()} == {1}
    trained = {id(p) for p in model.parameters()} - {id(p) for p in model.behaviour.slow_critic.parameters()}
    assert set(groups) == trained


def test_diswm_without_distillation_has_no_teacher_to_load(tmp_path: Path) -> None:
    source, weights = pretrained("diswm", tmp_path)
    model, before, said, _ = loaded("diswm", source)
    assert all(torch.equal(model.state_dict()[f"teacher.{k[8:]}"], v) for k, v in weights.items() if k.startswith("encoder."))
    model, before, said, run = loaded("diswm", source, "distillation=0")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert said == f"loaded nothing from {source} (diswm); not used: encoder"
    with pytest.raises(ConfigError, match="--load encoder: with these settings diswm has no teacher to load"):
        load_pretrained(model, replace(run, load="encoder"))


def test_drp_from_an_ipv_checkpoint(tmp_path: Path) -> None:
    """IPV_pre_DRP_ft: image model and latent dynamics of IPV; motion encoder and the columns for motion start new."""
    source, weights = pretrained("ipv", tmp_path)
    model, before, said, run = loaded("drp", source, "freeze_updates=1", load="image,latent")
    after, flat = model.state_dict(), model.latent.flat
    for key, value in weights.items():
        if key != "latent.img_in.weight":
            assert torch.equal(after[key], value), key
    assert torch.equal(after["latent.img_in.weight"][:, :flat], weights["latent.img_in.weight"][:, :flat])
    assert torch.equal(after["latent.img_in.weight"][:, flat:], before["latent.img_in.weight"][:, flat:])
    assert all(torch.equal(after[k], before[k]) for k in after if k not in weights)
    assert "; latent.img_in.weight without its columns for actions; not pre-trained: motion" in said
    held = {id(p) for g in groups_of(model, run, True) if g.freeze_updates for p in g.parameters}
    assert held == {id(p) for p in [*model.latent.parameters(), *model.image.encoder_parameters()]}
    metrics = Updater(model, run, CPU, pretrained=True).learn(make_batch())
    assert "loss/masked" in metrics


def test_parts_that_differ_between_methods_are_told(tmp_path: Path) -> None:
    """APV has no context: its encoder and decoder are taken, what belongs to the context is not."""
    source, weights = pretrained("apv", tmp_path, "context_copy=false")
    model, before, said, _ = loaded("ipv", source, "context_copy=false", load="image")
    after = model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in weights.items() if k.startswith("image."))
    context = [k for k in after if k.startswith("image.") and k not in weights]
    assert context
    assert all("context_encoder" in k or "attention" in k for k in context)
    assert all(torch.equal(after[k], before[k]) for k in context)
    assert "the checkpoint lacks image.context_encoder." in said
    assert "not pre-trained: latent" in said


@pytest.mark.parametrize(
    ("method", "texts", "load", "error", "message"),
    [
        ("drp", (), "", CheckpointError, "method ipv, this run is drp; .* --load"),
        ("drp", (), "motion,image", CheckpointError, "has no motion to load; --load can name image, latent"),
        ("drp", (), "image,latnet", ConfigError, "did you mean latent"),
        ("drp", (), "image,image", ConfigError, "twice"),
        ("drp", ("deter=64",), "image,latent", CheckpointError, "other shapes"),
        ("ipv", ("deter=64",), "", CheckpointError, "other shapes"),
        ("ipv", ("encoder=cnn", "context=false"), "image", CheckpointError, "lacks|unknown"),
        ("apv", (), "latent,reward", ConfigError, "part of apv to load 'reward'"),
    ],
)
def test_what_cannot_be_loaded_is_one_clear_line(
    method: str, texts: tuple[str, ...], load: str, error: type[Exception], message: str, tmp_path: Path
) -> None:
    source, _ = pretrained("ipv", tmp_path)
    with pytest.raises(error, match=message) as found:
        loaded(method, source, *texts, load=load)
    assert len(str(found.value).splitlines()) == 1


def test_context_missing_in_a_checkpoint_is_not_overlooked(tmp_path: Path) -> None:
    """A run of the same method with fewer parts: nothing may stay untrained unsaid."""
    source, _ = pretrained("ipv", tmp_path, "context=false", "context_copy=false")
    with pytest.raises(CheckpointError, match=r"lacks image\.context_encoder"):
        loaded("ipv", source, "context_copy=false")


def test_load_without_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--method", "ipv", "--preset", "debug", "--env", "toy:dot", "--load", "image", "--run", str(tmp_path / "r")]
    with pytest.raises(SystemExit) as stop:
        main(["train", *arguments])
    assert stop.value.code == 2
    assert "load=image needs --checkpoint" in capsys.readouterr().err
