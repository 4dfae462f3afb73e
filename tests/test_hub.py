"""Sharing through the Hugging Face Hub, against a stand-in of its server on this machine (hub_stand_in)."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hub_stand_in import TOKEN, Repository, StandIn, stand_in
from lerobot_files import CAMERAS, DATA, LENGTHS
from localmotion.cli import main
from localmotion.errors import CheckpointError, ConfigError, LocalmotionError, MissingExtraError
from localmotion.runs import hub, sharing
from localmotion.runs.datasets import local_videos
from localmotion.runs.load import load_run
from localmotion.runs.push import push, write_shared
from localmotion.runs.sharing import local_run, resolve
from localmotion.training import study
from localmotion.video.decode import iter_frames
from localmotion.video.lerobot import read_data_set
from shared_runs import acting_run, pretrained_run, same_outputs

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub calls httpx so
installed = pytest.mark.skipif(
    importlib.util.find_spec("huggingface_hub") is None, reason="huggingface_hub is not installed: pip install 'localmotion[hub]'"
)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """The stand-in, with an empty cache and the token of the owner of all repositories."""
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars

    with stand_in() as state:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(constants, "ENDPOINT", state.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", state.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        disable_progress_bars()
        yield state


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What push writes of a pre-training run."""
    folder = tmp_path_factory.mktemp("shared")
    write_shared(pretrained_run(folder / "run"), folder / "out", name="hf:me/drp")
    return folder / "out"


def served(state: StandIn, folder: Path, repo: str = "me/drp", **files: bytes) -> str:
    """Puts a folder into a repository. Returns the commit."""
    content = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return state.repositories.setdefault(repo, Repository()).commit({**content, **files})


def refused(match: str, call: Any, kind: type[LocalmotionError] = CheckpointError) -> None:
    with pytest.raises(kind, match=match) as found:
        call()
    assert len(str(found.value).splitlines()) == 1


@installed
@pytest.mark.skipif(
    importlib.util.find_spec("pyarrow") is None, reason="pyarrow is not installed: pip install 'localmotion[lerobot]'"
)
@pytest.mark.parametrize("version", ["v21", "v30"])
def test_of_a_data_set_only_one_camera_is_fetched(
    server: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str], version: str
) -> None:
    commit = served(server, DATA / version, "me/robot", **{"README.md": b"", "meta/notes.txt": b"", "videos/film.mp4": b""})
    asked = Path("lerobot:me/robot")
    refused("the cameras .*; choose one with --camera KEY", lambda: local_videos(asked), ConfigError)
    assert not any("/videos/" in line or "/data/" in line for line in server.asked)
    videos = local_videos(asked, CAMERAS[1])
    fetched = {line.partition(f"{commit}/")[2] for line in server.asked if "/resolve/" in line}
    assert {name.split("/")[0] for name in fetched} == {"meta", "data", "videos"}
    assert all(CAMERAS[1] in name for name in fetched if name.startswith("videos/"))
    assert f"lerobot:me/robot: commit {commit}" in capsys.readouterr().out
    data = read_data_set(videos, CAMERAS[1])
    assert data.about(1)["data_set"] == f"me/robot@{commit}"
    assert [sum(1 for _ in iter_frames(ref, 16)) for ref in data.refs] == list(LENGTHS)
    assert local_videos(Path(f"lerobot:{DATA}")) == Path(f"lerobot:{DATA}")  # a folder is used as it is
    refused("lerobot:me/none: no such repository", lambda: local_videos(Path("lerobot:me/none")))
    refused("lerobot:me/robot: has no branch, tag or commit 'v9'", lambda: local_videos(Path("lerobot:me/robot@v9")))
    refused("written lerobot:owner/name", lambda: local_videos(Path("lerobot:robot")), ConfigError)


@installed
def test_a_run_goes_to_the_hub_and_comes_back_the_same(
    server: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = acting_run(tmp_path / "run")
    main(["push", str(run), "hf:me/walker", "--license", "mit"])
    said = " ".join(capsys.readouterr().out.split())
    (repository,) = server.repositories.values()
    commit = repository.refs["main"]
    assert repository.private
    assert "MB to hf:me/walker, a private repository that is made now" in said
    assert f"uploaded hf:me/walker@{commit}" in said
    folder, name = resolve("hf:me/walker")
    assert name == f"hf:me/walker@{commit}"
    assert f"hf:me/walker: commit {commit}" in " ".join(capsys.readouterr().out.split())
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    weights, state = "checkpoints/0000000001/weights.safetensors", "checkpoints/0000000001/state.json"
    assert names == {
        "README.md",
        "config.json",
        "environment.json",
        "shared.json",
        weights,
        state,
        "checkpoints/0000000001/COMPLETE",
    }
    same_outputs(load_run(run)[1], load_run(folder)[1])


@installed
def test_a_new_push_replaces_the_weights_before(server: StandIn, tmp_path: Path) -> None:
    """Else a later push of fewer updates would leave the old checkpoint as the newest."""
    push(pretrained_run(tmp_path / "long", update=9), "hf:me/drp")
    push(pretrained_run(tmp_path / "short", update=3, seed=1), "hf:me/drp")
    files = server.repositories["me/drp"].commits[server.repositories["me/drp"].refs["main"]]
    assert {name.split("/")[1] for name in files if name.startswith("checkpoints/")} == {"0000000003"}
    same_outputs(load_run(tmp_path / "short")[1], load_run(local_run("hf:me/drp"))[1])


@installed
def test_weights_become_public_only_when_asked(server: StandIn, tmp_path: Path) -> None:
    run = pretrained_run(tmp_path / "run")
    push(run, "hf:me/open", public=True)
    assert not server.repositories["me/open"].private
    refused("is a public repository; give --public", lambda: push(run, "hf:me/open"), ConfigError)
    push(run, "hf:me/closed")
    refused("is a private repository; leave out --public", lambda: push(run, "hf:me/closed", public=True), ConfigError)


@installed
def test_a_push_needs_a_token(server: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_another")
    refused("log in", lambda: push(pretrained_run(tmp_path / "run"), "hf:me/drp"))
    assert not server.repositories


@installed
def test_only_our_files_are_fetched(server: StandIn, shared: Path) -> None:
    served(server, shared, **{"model.bin": b"pickle", "checkpoints/0000000001/optimizer.safetensors": b"x", "run.py": b"evil"})
    folder = local_run("hf:me/drp")
    assert not list(folder.rglob("*.bin")) + list(folder.rglob("*.py")) + list(folder.rglob("optimizer*"))
    assert not any(name.endswith((".bin", ".py")) for name in server.asked)


@installed
def test_a_revision_names_other_weights(server: StandIn, shared: Path, tmp_path: Path) -> None:
    first = served(server, shared)
    server.repositories["me/drp"].refs["v1"] = first
    write_shared(pretrained_run(tmp_path / "run", seed=1), tmp_path / "out", name="x")
    second = served(server, tmp_path / "out")
    assert resolve("hf:me/drp@v1")[1] == resolve(f"hf:me/drp@{first}")[1] == f"hf:me/drp@{first}"
    assert resolve("hf:me/drp")[1] == f"hf:me/drp@{second}"
    one, two = load_run(local_run("hf:me/drp@v1"))[1], load_run(local_run("hf:me/drp"))[1]
    assert not all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    refused("has no branch, tag or commit 'v2'", lambda: resolve("hf:me/drp@v2"))


@installed
def test_repositories_without_a_run(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    refused("no such repository, or it is private; check the name, or log in", lambda: resolve("hf:me/nothing"))
    server.repositories["me/other"] = Repository()
    server.repositories["me/other"].commit({"config.json": b"{}", "model.safetensors": b""})
    refused(r"holds no run that localmotion push wrote", lambda: resolve("hf:me/other"))
    server.repositories["me/hidden"] = Repository(private=True)
    server.repositories["me/hidden"].commit({})
    monkeypatch.setenv("HF_TOKEN", "hf_of_another")
    refused("or it is private; check the name, or log in", lambda: resolve("hf:me/hidden"))


@installed
def test_a_truncated_download_is_noticed_and_fetched_again(server: StandIn, shared: Path) -> None:
    served(server, shared)
    server.cut = "weights.safetensors"
    refused("fetch failed .*size", lambda: resolve("hf:me/drp"))
    server.cut = ""
    load_run(local_run("hf:me/drp"))


@installed
@pytest.mark.parametrize(
    ("damage", "match"), [(lambda data: data[:-4], "bytes, .* were pushed"), (lambda data: data[:-4] + b"abcd", "SHA-256")]
)
def test_weights_that_were_not_pushed_are_refused(damage: Any, match: str, server: StandIn, shared: Path) -> None:
    """The server itself has them, so the download is whole."""
    name = "checkpoints/0000000001/weights.safetensors"
    served(server, shared, **{name: damage((shared / name).read_bytes())})
    refused(match, lambda: resolve("hf:me/drp"))


@installed
def test_a_commit_in_the_cache_needs_no_network(server: StandIn, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    commit = served(server, shared)
    refused("hf:me/drp: the Hub cannot be reached|HF_HUB_OFFLINE is set", lambda: _offline(monkeypatch, "hf:me/drp"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    folder, name = resolve("hf:me/drp")
    server.asked.clear()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert resolve(name) == (folder, name)
    assert resolve("hf:me/drp") == (folder, f"hf:me/drp@{commit}")  # the newest one that is known here
    assert not server.asked
    refused("the Hub cannot be reached .*; connect and try again", lambda: resolve("hf:me/another"))


def _offline(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    resolve(name)


TINY = [
    "--preset",
    "debug",
    "--env",
    "toy:dot",
    "--env-steps",
    "120",
    "--prefill",
    "60",
    "--eval-every",
    "1000",
    "--warmup-updates",
    "1",
]
TINY += [
    "--set",
    "threads=1",
    "--set",
    "precision=fp32",
    "--set",
    "online.eval_episodes=1",
    "--set",
    "online.updates=2",
    "--set",
    'env_options={"time_limit": 20}',
]


@installed
def test_a_run_starts_from_the_hub_and_goes_on_from_the_same_commit(
    server: StandIn, shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = served(server, shared)
    command = ["finetune", "--method", "drp", "--checkpoint", "hf:me/drp", "--run", str(tmp_path / "fine"), *TINY]
    main(command)
    assert f"from hf:me/drp@{first} (drp)" in " ".join(capsys.readouterr().out.split())
    config = json.loads((tmp_path / "fine" / "config.json").read_text())
    assert config["checkpoint"] == f"hf:me/drp@{first}"
    assert config["recipe"] == json.loads((shared / "config.json").read_text())["recipe"]
    served(server, shared, **{"README.md": b"a newer commit"})
    server.asked.clear()
    main([*command, "--set", "env_steps=140"])
    assert json.loads((tmp_path / "fine" / "config.json").read_text())["checkpoint"] == f"hf:me/drp@{first}"
    assert not server.asked
    main(["evaluate", str(tmp_path / "fine"), "--episodes", "1", "--device", "cpu"])  # reading the run asks nobody
    assert not server.asked


@installed
def test_a_study_starts_all_its_runs_from_one_commit(server: StandIn, shared: Path, tmp_path: Path) -> None:
    first = served(server, shared)
    text = "preset: debug\ntasks: [toy:dot]\nseeds: [0]\nvariants: {A: {method: drp, checkpoint: 'hf:me/drp'}}\n"
    (tmp_path / "study.yaml").write_text(text)
    jobs = study.load_study(tmp_path / "study.yaml")
    assert study._starts(tmp_path, jobs) == {"hf:me/drp": f"hf:me/drp@{first}"}
    served(server, shared, **{"README.md": b"newer"})
    assert study._starts(tmp_path, jobs) == {"hf:me/drp": f"hf:me/drp@{first}"}


@installed
def test_the_shelf_of_the_hub(server: StandIn, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = {f"drp-x/{path.relative_to(shared).as_posix()}": path.read_bytes() for path in shared.rglob("*") if path.is_file()}
    server.repositories["us/weights"] = Repository()
    commit = server.repositories["us/weights"].commit({**content, "other/config.json": b"{}"})
    monkeypatch.setattr(sharing, "SHELF_REPOSITORY", "us/weights")
    monkeypatch.setattr(sharing, "checkout", lambda: None)
    folder, name = resolve("shelf:drp-x")
    assert name == f"shelf:drp-x@{commit}"
    assert resolve(name) == (folder, name)
    assert not any("other/config.json" in asked for asked in server.asked)
    load_run(folder)


@installed
def test_the_command_line_reads_the_hub_that_the_environment_names(shared: Path, tmp_path: Path) -> None:
    """In a process of its own, because huggingface_hub reads HF_ENDPOINT when it is imported."""
    import subprocess

    with stand_in() as state:
        served(state, shared)
        names = {"HF_ENDPOINT": state.url, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "home")}
        code = "from localmotion.runs.sharing import local_run; print(local_run('hf:me/drp'))"
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | names, check=True)
        assert Path(found.stdout.strip().splitlines()[-1], "config.json").is_file()
        assert state.asked


# -- without huggingface_hub --------------------------------------------------------------------------------------------


def test_the_extra_is_named_when_it_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (lambda: resolve("hf:me/drp"), lambda: push(pretrained_run(tmp_path / "run"), "hf:me/drp")):
        refused(r"hf:me/drp: needs huggingface_hub.*pip install 'localmotion\[hub\]'", call, MissingExtraError)


@pytest.mark.parametrize(
    "name",
    [
        "hf:",
        "hf:drp",
        "hf:a/b/c",
        "hf:../x",
        "hf:a/..",
        "hf:a/b@../../x",
        "hf:a/b@-x",
        "hf:a/b@x y",
        "hf:a/b@",
        "hf:a/b--c",
        "hf:/a/b",
    ],
)
def test_names_that_no_repository_has_are_refused_before_anything_is_asked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    if name == "hf:a/b@":
        pytest.skip("an empty revision is the default branch")
    refused("is written hf:owner/name|is no branch, tag or commit", lambda: resolve(name), ConfigError)


def test_nothing_is_asked_of_the_network_without_hf(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run, its push to a folder, reading it and the shelf: no socket is opened and huggingface_hub is not imported."""

    def opened(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", opened)
    monkeypatch.setattr(socket, "getaddrinfo", opened)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    run = pretrained_run(tmp_path / "pre", checkpoint="hf:somebody/else")  # a file of somebody else names a repository
    main(["push", str(run), str(tmp_path / "out")])
    shutil.rmtree(run)
    main(["finetune", "--method", "drp", "--checkpoint", str(tmp_path / "out"), "--run", str(tmp_path / "fine"), *TINY])
    main(["evaluate", str(tmp_path / "fine"), "--episodes", "1", "--device", "cpu"])
    main(["shelf"])
    load_run(tmp_path / "out")
    assert hub.COMMIT.fullmatch("0" * 40)
