"""What a shared run holds and what it does not, and the weights shelf of this checkout."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from localmotion import files
from localmotion.cli import main
from localmotion.errors import CheckpointError, ConfigError, LocalmotionError
from localmotion.runs import checkpoint, push, sharing, source
from localmotion.runs.load import load_run
from localmotion.runs.push import command_line, without_places, write_shared
from localmotion.runs.sharing import local_run
from shared_runs import acting_run, pretrained_run, same_outputs

ROOT = Path(__file__).parent.parent
SHELF = sorted(path.parent for path in (ROOT / "weights").glob("*/shared.json"))
MOST = 40_000_000  # bytes of the whole shelf


def refused(match: str, call: Any, kind: type[LocalmotionError] = CheckpointError) -> None:
    with pytest.raises(kind, match=match) as found:
        call()
    assert len(str(found.value).splitlines()) == 1


def front(text: str) -> dict[str, Any]:
    """The front matter of a card."""
    assert text.startswith("---\n")
    found = yaml.safe_load(text.split("---\n")[1])
    assert isinstance(found, dict)
    return found


def texts(folder: Path) -> str:
    """All text of a shared run."""
    return "".join(path.read_text() for path in folder.rglob("*") if path.suffix in (".json", ".md", ".svg"))


# -- push to a folder ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pretrained", "acting"])
def test_a_pushed_folder_is_a_run_with_the_same_outputs(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = pretrained_run(tmp_path / "run") if kind == "pretrained" else acting_run(tmp_path / "run")
    main(["push", str(run), str(tmp_path / "out")])
    assert "nothing was uploaded" in " ".join(capsys.readouterr().out.split())
    (settings, one, compute), (again, two, same) = load_run(run), load_run(tmp_path / "out")
    same_outputs(one, two)
    assert (again.recipe, again.model, again.env, compute.bf16) == (settings.recipe, settings.model, settings.env, same.bf16)


def test_only_what_loading_needs_is_written(tmp_path: Path) -> None:
    run = acting_run(tmp_path / "run")
    (run / "replay").mkdir()
    (run / "replay" / "episode.safetensors").write_bytes(b"x")
    write_shared(run, tmp_path / "out", name="hf:me/x")
    names = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    weights = {f"checkpoints/0000000001/{name}" for name in ("weights.safetensors", "state.json", "COMPLETE")}
    assert names == weights | {"README.md", "config.json", "environment.json", "shared.json"}
    state = json.loads((tmp_path / "out/checkpoints/0000000001/state.json").read_text())
    assert state == {"format": checkpoint.FORMAT, "stage": "train", "update": 1, "action_dim": 3, "agent_step": 9, "env_step": 18}
    assert not list(tmp_path.glob(".*"))


def test_the_card_says_what_the_run_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["localmotion", "train", "--method", "dreamer_v2", "--run", "/home/me/secret/run"])
    run = acting_run(tmp_path / "run")
    write_shared(run, tmp_path / "out", name="hf:me/walker", license="cc-by-4.0", curve=b"<svg/>")
    text = (tmp_path / "out" / "README.md").read_text()
    head = front(text)
    assert (head["library_name"], head["license"]) == ("localmotion", "cc-by-4.0")
    assert {"localmotion", "dreamer_v2", "toy:dot"} <= set(head["tags"])
    (result,) = head["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == "12.00 +/- 1.00"  # the last evaluation
    for part in (
        "localmotion evaluate hf:me/walker",
        "train --method dreamer_v2 --run run",
        "| return_mean | 12 |",
        "(curve.svg)",
    ):
        assert part in text
    assert source.commit() in text
    write_shared(run, tmp_path / "bare", name="x")
    assert "license" not in front((tmp_path / "bare" / "README.md").read_text())
    assert "curve.svg" not in (tmp_path / "bare" / "README.md").read_text()


def test_nothing_of_the_machine_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths in settings, in options within them, in the command, and the machine's name."""
    place = str(tmp_path / "run")
    told = ["localmotion", "pretrain", "--data=/home/me/my films/store", "--run", place, "--set", 'x={"a": "~/b c/d"}', "../up/e"]
    monkeypatch.setattr("sys.argv", told)
    run = pretrained_run(tmp_path / "run", checkpoint="/home/me/my runs/first", label="of /home/me/x")
    write_shared(run, tmp_path / "out", name="hf:me/x")
    text = texts(tmp_path / "out")
    for secret in (str(tmp_path), "home", "my films", "my runs", "~", "up/", socket.gethostname(), "platform"):
        assert secret not in text, secret
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["data"], config["checkpoint"], config["label"]) == ("store", "first", "of x")
    assert "pretrain --data=store --run run --set" in text


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("/home/me/store", "store"),
        ("~/store/", "store"),
        ("../x/store", "store"),
        (r"C:\Users\me\store", "store"),
        ("see /a/b.pth, and ~me/c", "see b.pth, and c"),
        ("hf:owner/name@main", "hf:owner/name@main"),
        ("IDEA-Research/grounding-dino-base", "IDEA-Research/grounding-dino-base"),
        ("dmc:walker_walk", "dmc:walker_walk"),
        ("person. hand. robot arm.", "person. hand. robot arm."),
        ("0.5", "0.5"),
    ],
)
def test_places_are_taken_out_of_texts(text: str, left: str) -> None:
    assert without_places({"a": [text]}) == {"a": [left]}


def test_commands_keep_what_is_no_place() -> None:
    text = 'localmotion finetune --checkpoint hf:me/x --data=/a/b --set \'env_options={"look": "textured"}\' --run runs/x'
    assert command_line(text) == text.replace("/a/b", "b")
    assert command_line("x 'open /a/b") == "x 'open b"
    assert (
        command_line("pretrain --set 'data=\"/a/b c/d\"' seed=0") == "pretrain --set 'data=\"d\"' seed=0"
    )  # as a study writes it


def test_what_cannot_be_pushed_is_one_clear_line(tmp_path: Path) -> None:
    run = pretrained_run(tmp_path / "run")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    refused("exists already", lambda: push.push(run, str(tmp_path / "full")))
    refused("--public is for a repository", lambda: push.push(run, str(tmp_path / "out"), public=True), ConfigError)
    shutil.rmtree(run / "checkpoints")
    refused("no complete checkpoint", lambda: push.push(run, str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_a_run_that_does_not_load_is_not_pushed(tmp_path: Path) -> None:
    run = pretrained_run(tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["model"]["world"]["deter"] *= 2
    (run / "config.json").write_text(json.dumps(config))
    refused("does not load without the files of this machine", lambda: push.push(run, str(tmp_path / "out")))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_dry_run_writes_the_folder_and_stops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = pretrained_run(tmp_path / "run")
    main(["push", str(run), "hf:me/drp", "--dry-run"])
    assert "for hf:me/drp; nothing was uploaded" in " ".join(capsys.readouterr().out.split())
    load_run(run / "shared")
    assert (run / "shared" / "curve.svg").is_file()


# -- the shelf ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty checkout."""
    monkeypatch.setattr(sharing, "checkout", lambda: tmp_path / "checkout")
    (tmp_path / "checkout").mkdir()
    return tmp_path / "checkout" / "weights"


def test_the_shelf_is_small() -> None:
    assert sum(path.stat().st_size for path in (ROOT / "weights").rglob("*") if path.is_file()) <= MOST


@pytest.mark.parametrize("entry", SHELF, ids=lambda path: path.name)
def test_an_entry_of_the_shelf_loads_and_has_a_card(entry: Path) -> None:
    folder = local_run(f"shelf:{entry.name}")
    assert folder == entry
    run, _, _ = load_run(folder)
    assert front((entry / "README.md").read_text())["library_name"] == "localmotion"
    assert f"shelf:{entry.name}" in (entry / "README.md").read_text()
    assert f"## {entry.name}\n" in (ROOT / "weights" / "README.md").read_text()  # how it was made
    for file in ("config.json", "environment.json"):
        values = json.loads((entry / file).read_text())
        assert without_places(values) == values
    assert "/" not in run.data + run.checkpoint.removeprefix("hf:")


def test_an_entry_is_pushed_listed_and_used(shelf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["shelf"])
    assert "empty" in capsys.readouterr().out
    refused("unknown entry of the shelf 'mine'", lambda: local_run("shelf:mine"))
    main(["push", str(pretrained_run(tmp_path / "run")), "shelf:mine"])
    main(["shelf"])
    said = capsys.readouterr().out
    assert all(part in said for part in ("mine", "drp", "debug", "store", "psnr/motion 22"))
    assert local_run("shelf:mine") == shelf / "mine"
    refused("unknown entry of the shelf 'mime'; did you mean mine", lambda: local_run("shelf:mime"))


def test_a_damaged_entry_is_refused(shelf: Path, tmp_path: Path) -> None:
    """As a checkout leaves it whose large files were not fetched."""
    push.push(pretrained_run(tmp_path / "run"), "shelf:mine")
    (shelf / "mine/checkpoints/0000000001/weights.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    refused("weights.safetensors has 43 bytes, .* were pushed", lambda: local_run("shelf:mine"))


@pytest.mark.parametrize("file", ["../../secret", "/etc/passwd", "checkpoints/../config.json", "README.md"])
def test_a_manifest_names_files_of_the_run_only(file: str, shelf: Path, tmp_path: Path) -> None:
    push.push(pretrained_run(tmp_path / "run"), "shelf:mine")
    manifest = json.loads((shelf / "mine/shared.json").read_text())
    manifest["files"][file] = {"bytes": 0, "sha256": ""}
    (shelf / "mine/shared.json").write_text(json.dumps(manifest))
    refused("is no file of a shared run", lambda: local_run("shelf:mine"))


def test_without_a_checkout_the_shelf_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sharing, "checkout", lambda: None)
    refused("not on the Hub yet.*clone.*pip install -e", lambda: local_run("shelf:drp-tiny-planar"))
    refused("this is none", lambda: push.push(tmp_path, "shelf:mine"), ConfigError)
    assert sharing.entries() == []


@pytest.mark.parametrize("name", ["shelf:", "shelf:../x", "shelf:a/b", "shelf:.x", "shelf:a b"])
def test_a_name_of_the_shelf_stays_in_it(name: str) -> None:
    refused("is written shelf:NAME", lambda: local_run(name), ConfigError)


# -- links of the Hub's cache -------------------------------------------------------------------------------------------


def test_links_into_the_cache_are_read_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub's cache has links to files that commits share. They are accepted for that folder and that place only."""
    monkeypatch.setattr(files, "_stores", {})
    run, blobs = write_linked(tmp_path, "a"), tmp_path / "a" / "blobs"
    refused("is a link to a place outside", lambda: load_run(run))
    files.accept_links(run, blobs)
    load_run(run)
    refused("is a link to a place outside", lambda: load_run(write_linked(tmp_path, "b")))
    (tmp_path / "secret").touch()
    (run / "state.json").symlink_to(tmp_path / "secret")
    refused("state.json: is a link to a place outside", lambda: load_run(run))


def write_linked(folder: Path, name: str) -> Path:
    """A shared run whose files are links, as in the Hub's cache."""
    run = folder / name / "snapshots" / "commit"
    write_shared(pretrained_run(folder / f"run-{name}"), run, name=name)
    (folder / name / "blobs").mkdir()
    for number, path in enumerate([path for path in run.rglob("*") if path.is_file()]):
        path.rename(folder / name / "blobs" / str(number))
        path.symlink_to(folder / name / "blobs" / str(number))
    return run


# -- the source ---------------------------------------------------------------------------------------------------------


def test_the_commit_is_that_of_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source.commit.cache_clear()
    monkeypatch.setattr(source, "checkout", lambda: tmp_path)  # no repository
    assert source.commit() == ""
    monkeypatch.setattr(source, "checkout", lambda: None)
    found = SimpleNamespace(read_text=lambda name: '{"vcs_info": {"commit_id": "abc"}}' if name == "direct_url.json" else None)
    monkeypatch.setattr(source.metadata, "distribution", lambda name: found)
    source.commit.cache_clear()
    assert source.commit() == "abc"
    source.commit.cache_clear()
