"""Files are data: what others may have made of a run, a store, weights or a study is refused in one line, and nothing of it runs.

SECURITY.md names these tests, and one of them checks that. The files are made here by the product itself, then changed.
"""

from __future__ import annotations

import ast
import copy
import io
import json
import os
import pickle
import random
import re
import shutil
import struct
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from localmotion import files, methods
from localmotion.cli import main
from localmotion.config import RunConfig, to_dict
from localmotion.envs import make_env
from localmotion.errors import CheckpointError, ConfigError, LocalmotionError, StoreError
from localmotion.evaluation.predict import predict
from localmotion.files import MAX_DEPTH, check_tree, parse_json
from localmotion.perception._neural import read_state_dict
from localmotion.perception.trust import TRUSTED
from localmotion.recipe import Recipe
from localmotion.report import arrays, media
from localmotion.report.build import report
from localmotion.runs import checkpoint
from localmotion.runs.load import load_run
from localmotion.runs.rundir import RunDir
from localmotion.runs.settings import compose, from_dict, recipe_of, with_recipe
from localmotion.training.study import load_study, state
from localmotion.training.transfer import load_pretrained
from localmotion.video.sample import WindowSampler
from localmotion.video.store import Clip, ClipStore, ClipStoreWriter

ROOT = Path(__file__).parent.parent
RECIPE = Recipe(percept_size=64, tracks=4, redraw_rounds=0)
FOREIGN = {"cotracker3": {"source": "local", "repository": "/somewhere/evil"}}


class Trap:
    """Creates a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path("pickle_was_run").touch, ())


# -- honest files, made once ---------------------------------------------------------------------------------------------


def saved_run(path: Path, stage: str, method: str = "drp") -> Path:
    """A debug run with one checkpoint, as the training loops leave it."""
    run = compose(method, stage, preset="debug", env="" if stage == "pretrain" else "toy:dot", settings=("precision=fp32",))  # type: ignore[arg-type]
    run = replace(run, pretrain=replace(run.pretrain, length=8), recipe=None if stage == "pretrain" else RECIPE)
    model = methods.get(method)(run.model, image_size=64, action_dim=None if stage == "pretrain" else 2)
    out = RunDir(path, run)
    out.environment({"recipe": RECIPE.to_json()})
    out.status("finished", update=1)
    for i in range(3):
        out.log("eval", env_step=i, return_mean=1.0, episodes=2)
        out.log(
            "heldout" if stage == "pretrain" else "train", update=i, env_step=i, **{"loss/masked": 0.5, "seconds/update": 0.1}
        )
    kept: dict[str, Any] = {"stage": stage, "metrics_offset": out.metrics_offset()}
    if stage != "pretrain":
        generator = np.random.default_rng(0).bit_generator.state
        kept |= {"action_dim": 2, "agent_step": 9, "episode": 1, "next_eval": 20, "best": [0.0, 1.0], "playing": None}
        kept["replay"] = {"episodes": [], "serial": 0, "dropped": 0, "rng": generator}
    checkpoint.save(path / "checkpoints", 1, tensors={"weights": model.state_dict(), "optimizer": {}}, state=kept)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pre, online: run directories; store: a clip store of four clips of 12 frames in two shards."""
    folder = tmp_path_factory.mktemp("made")
    saved_run(folder / "pre", "pretrain")
    saved_run(folder / "online", "train", "dreamer_v2")
    writer = ClipStoreWriter.open(folder / "store", 64, RECIPE.to_json(), RECIPE.hash(), 4, 2)
    rng = np.random.default_rng(0)
    for shard in range(2):
        clips = []
        for number in range(2):
            flow = rng.normal(size=(12, 64, 64, 2)).astype(np.float16)
            flow[-1] = 0
            tracks = rng.uniform(0, 63, (12, 4, 2)).astype(np.float32)
            arrays = {"flow": flow, "tracks": tracks, "visible": np.ones((12, 4), bool), "track_id": np.zeros((12, 4), np.int32)}
            pictures = rng.integers(0, 256, (12, 64, 64, 3), dtype=np.uint8)
            clips.append(Clip(f"v/{shard}{number}.mp4", pictures, **arrays, source={"path": "x"}, info={"cuts": []}))
        writer.write_shard(shard, clips, [{"id": f"bad{shard}.mp4", "reason": "truncated"}])
    return folder


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A fresh copy of one of them."""

    def copy_of(name: str) -> Path:
        return shutil.copytree(made / name, tmp_path / name, symlinks=True)

    return copy_of


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def refused(error: type[LocalmotionError], match: str, call: Callable[[], Any]) -> str:
    """The one line with which ``call`` is refused."""
    with pytest.raises(error, match=match) as found:
        call()
    assert len(str(found.value).splitlines()) == 1
    assert len(str(found.value)) < 1000
    return str(found.value)


def test_the_honest_files_are_read(made: Path) -> None:
    run, method, _ = load_run(made / "pre", device="cpu")
    assert (run.method, method.training) == ("drp", False)
    assert load_run(made / "online", device="cpu")[0].env == "toy:dot"
    store = ClipStore(made / "store")
    store.verify()
    assert (len(store), [entry["id"] for entry in store.rejected]) == (4, ["bad0.mp4", "bad1.mp4"])


# -- nothing in the source can run a file ------------------------------------------------------------------------------


def called(node: ast.Call) -> str:
    """Dotted name of what is called."""
    parts: list[str] = []
    at: ast.expr = node.func
    while isinstance(at, ast.Attribute):
        parts.append(at.attr)
        at = at.value
    return ".".join([at.id if isinstance(at, ast.Name) else "?", *reversed(parts)])


def calls(path: Path) -> Iterator[tuple[str, str, ast.Call]]:
    """(innermost function, dotted name, call) of every call in a file."""

    def walk(node: ast.AST, inside: str) -> Iterator[tuple[str, str, ast.Call]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Call):
                yield inside, called(child), child
            yield from walk(child, child.name if isinstance(child, ast.FunctionDef) else inside)

    yield from walk(ast.parse(path.read_text()), "")


BANNED = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "runpy.run_path", "runpy.run_module", "joblib.load"}
UNPICKLERS = ("pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib", "jsonpickle")
MAY_IMPORT_BY_NAME = {
    ("methods/__init__.py", "get"),
    ("foreign.py", "import_named"),
    ("perception/_neural.py", "optional_import"),
    ("benchmarks/__main__.py", "main"),
}


def verdict(file: str, function: str, name: str, node: ast.Call) -> str:
    """What is wrong with a call, "" if nothing is."""
    words = {keyword.arg: getattr(keyword.value, "value", "?") for keyword in node.keywords}
    last = name.rsplit(".", 1)[-1]
    if name in BANNED or (last in ("load", "loads") and name.split(".")[0] in UNPICKLERS):
        return "runs what it is given"
    if name == "torch.load" and (
        (file, function) != ("perception/_neural.py", "read_state_dict") or words.get("weights_only") is not True
    ):
        return "torch.load outside the one function, or without weights_only=True"
    if last in ("load_state_dict_from_url", "get_state_dict") and words.get("weights_only") is not True:
        return "fetches weights without weights_only=True"
    if name in ("np.load", "numpy.load") and words.get("allow_pickle") is not False:
        return "np.load without allow_pickle=False"
    if name.startswith("yaml.") and last.startswith(("load", "full_load", "unsafe_load")):
        return "yaml without safe_load"
    if last == "import_module" and (file, function) not in MAY_IMPORT_BY_NAME and not isinstance(node.args[0], ast.Constant):
        return "imports by a computed name"
    if last == "optional_import" and not isinstance(node.args[0], ast.Constant):
        return "imports by a computed name"
    if name == "torch.hub.load" and file != "perception/cotracker.py":
        return "runs a repository"
    if words.get("shell", False) is not False or words.get("trust_remote_code", False) is not False:
        return "runs a shell or foreign code"
    return ""


def test_no_source_file_can_run_what_a_file_says() -> None:
    found, seen = [], set()
    package = ROOT / "src" / "localmotion"
    others = [path for name in ("benchmarks", "examples", "soak", "studies") for path in (ROOT / name).rglob("*.py")]
    for path in [*package.rglob("*.py"), *others]:
        file = path.relative_to(package).as_posix() if path.is_relative_to(package) else path.relative_to(ROOT).as_posix()
        for function, name, node in calls(path):
            seen.add(name)
            if wrong := verdict(file, function, name, node):
                found.append(f"{file}:{node.lineno}: {name}: {wrong}")
    assert not found
    assert {"torch.load", "np.load", "yaml.safe_load", "torch.hub.load"} <= seen  # the walk does see calls


@pytest.mark.parametrize(
    "code",
    [
        "torch.load(p, weights_only=True)",
        "pickle.loads(b)",
        "np.load(p)",
        "np.load(p, allow_pickle=flag)",
        "yaml.load(t, Loader=yaml.Loader)",
        "importlib.import_module(config.name)",
        "subprocess.run(text, shell=True)",
        "subprocess.run(text, shell=flag)",
        "AutoModel.from_pretrained(n, trust_remote_code=True)",
        "torch.hub.load(config.repository, 'x')",
        "eval(text)",
        "os.system(text)",
    ],
)
def test_that_check_sees_what_it_is_for(code: str) -> None:
    node = ast.parse(code, mode="eval").body
    assert isinstance(node, ast.Call)
    assert verdict("some/file.py", "f", called(node), node)


NETWORK = {"urllib", "requests", "http", "httpx", "aiohttp", "ftplib", "smtplib", "socketserver", "websockets", "paramiko"}
TRACKERS = {"wandb", "trackio", "tensorboard", "huggingface_hub", "sentry_sdk", "posthog"}
MAY_IMPORT = {
    "runs/hub.py": {"huggingface_hub"},
    "report/trackers.py": {"tensorboard", "wandb", "trackio"},
    "report/watch.py": {"http"},
}
"""Services that a file may import, inside a function that a command of the user leads to. None is imported with a module."""
FETCHING = {"torch.hub.load", "torch.hub.load_state_dict_from_url", "urlopen", "urlretrieve"}


def services(tree: ast.AST, inside: bool = False) -> Iterator[tuple[str, bool]]:
    """Packages that a file imports, and whether it does so in a function (not when it is imported itself)."""
    for node in ast.iter_child_nodes(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if isinstance(node, ast.Call) and called(node).rsplit(".", 1)[-1] in ("import_module", "optional_import"):
            names += [str(argument.value) for argument in node.args[:1] if isinstance(argument, ast.Constant)]
        yield from ((name.split(".")[0], inside) for name in names)
        yield from services(node, inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def unasked(file: str, tree: ast.AST) -> list[str]:
    """Imports of a file that could connect to something the user did not ask for."""
    allowed = MAY_IMPORT.get(file, set())
    found = [(name, inside) for name, inside in services(tree) if name in NETWORK | TRACKERS]
    return [name for name, inside in found if not inside or name not in allowed]


@pytest.mark.parametrize(
    ("code", "file"),
    [
        ("import huggingface_hub", "runs/hub.py"),
        ("if True:\n    from huggingface_hub import HfApi", "runs/hub.py"),
        ("class A:\n    import huggingface_hub.errors", "runs/hub.py"),
        ("def f():\n    import huggingface_hub", "runs/load.py"),
        ("def f():\n    importlib.import_module('wandb')", "runs/hub.py"),
        ("def f():\n    import httpx", "runs/hub.py"),
        ("import wandb", "report/trackers.py"),
        ("def f():\n    import wandb", "training/tracking.py"),
        ("import http.server", "report/watch.py"),
        ("def f():\n    import urllib.request", "report/watch.py"),
    ],
)
def test_that_check_sees_imports(code: str, file: str) -> None:
    assert unasked(file, ast.parse(code))
    assert not unasked("runs/hub.py", ast.parse("def f():\n    import huggingface_hub.errors"))


def test_the_network_is_left_alone() -> None:
    """No module speaks to it by itself; what fetches lies in the neural backends, made by name only, and in runs/hub.py."""
    package = ROOT / "src" / "localmotion"
    for path in package.rglob("*.py"):
        file = path.relative_to(package).as_posix()
        assert not unasked(file, ast.parse(path.read_text())), file
        for _, name, node in calls(path):
            where = f"{file}:{node.lineno}: {name}"
            assert name not in FETCHING or file == "perception/cotracker.py", where
            assert not name.endswith((".from_pretrained", ".get_state_dict")) or file.startswith("perception/"), where
            assert not name.startswith("socket.") or name == "socket.gethostname", where


# -- weights ------------------------------------------------------------------------------------------------------------


def test_a_malicious_pickle_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"a": torch.ones(2)}, "extra": Trap()}, "mixed.pt")
    torch.save(Trap(), "trap.pth")
    Path("plain.pt").write_bytes(pickle.dumps(Trap()))
    for name in ("mixed.pt", "trap.pth", "plain.pt"):
        refused(
            LocalmotionError,
            rf"reading weights {name} failed.*holds more than tensors",
            lambda name=name: read_state_dict("x", Path(name)),
        )
    assert not Path("pickle_was_run").exists()
    torch.save({"a": torch.ones(2)}, "good.pt")
    assert read_state_dict("x", Path("good.pt"))["a"].tolist() == [1, 1]
    torch.save({"a": torch.ones(2), "b": "text"}, "text.pt")
    refused(LocalmotionError, "holds a str under 'b'", lambda: read_state_dict("x", Path("text.pt")))


def test_weights_that_unfold_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1_000_000)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as old, zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for part in old.namelist():
            new.writestr(part, old.read(part))
    assert (tmp_path / "b.pt").stat().st_size < 50_000
    refused(LocalmotionError, "compressed", lambda: read_state_dict("x", tmp_path / "b.pt"))


def headed(length: int, head: bytes, data: bytes = b"") -> bytes:
    """A safetensors file that claims a head of ``length`` bytes."""
    return struct.pack("<Q", length) + head + data


@pytest.mark.parametrize(
    "content",
    [
        headed(2**63, b"{}"),
        headed(200_000_000, b"{"),
        headed(2, b"[]"),
        headed(
            87, json.dumps({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}).encode().ljust(87), b"\0" * 4
        ),
        headed(69, json.dumps({"a": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]}}).encode().ljust(69)),
        headed(5000, b'{"a":' * 1000),
        b"",
    ],
    ids=["2^63", "200 MB", "list", "overflow", "4 GB", "nested", "empty"],
)
def test_oversized_and_broken_headers_are_refused(content: bytes, copied: Callable[[str], Path]) -> None:
    run = copied("pre")
    path = checkpoint.newest(run) / "weights.safetensors"
    path.write_bytes(content)
    began = time.process_time()
    refused(
        CheckpointError, r"weights\.safetensors: cannot be read .*remove this checkpoint", lambda: load_run(run, device="cpu")
    )
    alone = path.with_name("other.safetensors")
    alone.write_bytes(content)
    refused(LocalmotionError, "reading weights", lambda: read_state_dict("x", alone))
    assert time.process_time() - began < 5


def rewrite(run: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    from safetensors.torch import save_file

    weights = dict(checkpoint.read(checkpoint.newest(run), "weights"))
    edit(weights)
    save_file(weights, checkpoint.newest(run) / "weights.safetensors")


def test_weights_of_other_shapes_types_or_names_are_refused(copied: Callable[[str], Path]) -> None:
    run = copied("pre")
    name, value = next((k, v) for k, v in checkpoint.read(checkpoint.newest(run), "weights").items() if v.dim() > 1)
    edits: list[tuple[str, Callable[[dict[str, torch.Tensor]], Any]]] = [
        ("has other shapes: .* there, .* here", lambda w: w.update({name: torch.zeros(3)})),
        ("has other types: .*float64 there", lambda w: w.update({name: value.double()})),
        ("has unknown ../../x", lambda w: w.update({"../../x": value})),
        ("lacks", lambda w: w.pop(name)),
    ]
    for match, edit in edits:
        shutil.copytree(run, run.with_name("one"))
        rewrite(run.with_name("one"), edit)
        refused(CheckpointError, match, lambda: load_run(run.with_name("one"), device="cpu"))
        shutil.rmtree(run.with_name("one"))


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("dae", "decoder_blocks"), 2**31),
        (("world", "deter"), 10**9),
        (("world", "depth"), 10**8),
        (("world", "stoch"), -5),
        (("dae", "blocks"), 10**9),
    ],
    ids=str,
)
def test_a_model_that_its_weights_do_not_make_is_refused_before_it_is_built(
    keys: tuple[str, ...], value: int, copied: Callable[[str], Path]
) -> None:
    run = copied("pre")
    config = json.loads((run / "config.json").read_text())
    inner = config["model"]
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    (run / "config.json").write_text(json.dumps(config))
    began = time.process_time()
    refused(LocalmotionError, "config|weights|shapes|built", lambda: load_run(run, device="cpu"))
    assert time.process_time() - began < 10


# -- configuration is no code ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["os.system", "localmotion.methods.drp.DRP", "../drp", "drp\n", ["drp"], {"_target_": "os.system"}, None]
)
def test_methods_are_registry_names(name: Any) -> None:
    values = to_dict(compose("drp", "pretrain", preset="debug"))
    refused(ConfigError, "unknown method", lambda: from_dict({**values, "method": name}))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"_target_": "os.system"}, "unknown setting '_target_'"),
        ({"model": {"_target_": "os.system"}}, "unknown setting 'model._target_'"),
        ({"model": 3}, "model"),
        ({"stage": "run:me"}, "has no stage"),
        ({"optim": None}, "optim"),
        ({"online": {"lr": float("nan")}}, "online.lr=nan: expected float"),
        ({"online": {"lr": "1e999"}}, "expected float"),
        ({"pretrain": {"log_every": 0}}, r"log_every=0 must be at least 1$"),
        ({"seed": -1}, "seed=-1 must be at least 0$"),
        ({"seed": 10**400}, "expected int"),
        ({"pretrain": {"heldout_fraction": 1.0}}, "heldout_fraction"),
        ({"label": 5}, "expected str"),
        ({"x" * 100_000: 1}, "unknown setting"),
        ({"device": "x" * 10**6, "label": ["y" * 10**6]}, "label="),
    ],
)
def test_settings_are_plain_values_in_range(change: dict[str, Any], match: str) -> None:
    refused(ConfigError, match, lambda: from_dict({**to_dict(compose("drp", "pretrain", preset="debug")), **change}))


def test_environments_and_backends_are_registry_names(copied: Callable[[str], Path]) -> None:
    for key in ("flow", "segment", "track"):
        refused(
            ConfigError,
            f"unknown {key} backend 'os.system'",
            lambda key=key: recipe_of({**RECIPE.to_json(), key: "os.system"}, "x"),
        )
    for name in ("os:system", "os.system", "toy:../dot"):
        refused(ConfigError, "environment", lambda name=name: make_env(name))
    run = copied("online")
    for options, said in (
        ({"seed": 1}, "option seed=1 of toy:dot: it is set by --seed"),
        ({"name": "dmc:walker_walk"}, "option name="),
        ({"videos": "/etc"}, "no options but time_limit"),
        ({"time_limit": "x" * 10**6}, "option time_limit=.* whole number"),
        ({"x" * 10**6: 1}, "option x"),
    ):
        change(run / "config.json", env_options=options)
        refused(ConfigError, said, lambda: load_run(run, device="cpu"))


@pytest.mark.parametrize(
    "options",
    [FOREIGN, {"cotracker3": {"repository": "evil/repo:main"}}, {"cotracker3": {"source": "local"}}, {"dis": "x"}],
    ids=str,
)
def test_a_recipe_out_of_a_file_runs_no_foreign_code(
    options: dict[str, Any], copied: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = {**RECIPE.to_json(), "track": "cotracker3", "backend_options": options}
    monkeypatch.delenv(TRUSTED, raising=False)
    online, pre = copied("online"), copied("pre")
    change(online / "config.json", recipe=recipe)
    refused(ConfigError, r"config\.json: (its recipe runs the code|backend_options)", lambda: load_run(online, device="cpu"))
    change(pre / "environment.json", recipe=recipe)
    refused(ConfigError, r"environment\.json: (its recipe runs the code|backend_options)", lambda: load_run(pre, device="cpu"))
    # Fine-tuning from such a run, and by such settings: before the first frame
    run = compose("drp", "finetune", preset="debug", env="toy:dot", flags={"checkpoint": str(pre)})
    refused(ConfigError, r"environment\.json: (its recipe|backend_options)", lambda: with_recipe(run, tmp_path / "new"))
    flags = {"checkpoint": str(pre), "recipe": recipe}
    refused(
        ConfigError,
        "runs the code|backend_options",
        lambda: compose("drp", "finetune", preset="debug", env="toy:dot", flags=flags),
    )


def test_what_the_user_trusts_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = {**RECIPE.to_json(), "track": "cotracker3", "backend_options": FOREIGN}
    monkeypatch.setenv(TRUSTED, "/somewhere/else, /somewhere/evil")
    assert recipe_of(recipe, "here").backend_options == FOREIGN
    monkeypatch.setenv(TRUSTED, "/somewhere")
    refused(ConfigError, "exactly this", lambda: recipe_of(recipe, "here"))
    monkeypatch.delenv(TRUSTED)
    assert recipe_of({**recipe, "backend_options": {"cotracker3": {"window": 4}}}, "here").track == "cotracker3"


@pytest.mark.parametrize(
    "change",
    [
        {"size": "64"},
        {"tracks": 4.0},
        {"percept_size": 64 * 10**6},
        {"redraw_rounds": 10**9},
        {"seed": True},
        {"zz": 1},
        {"min_motion": float("nan")},
    ],
)
def test_recipes_are_checked(change: dict[str, Any]) -> None:
    refused(ConfigError, "^here: ", lambda: recipe_of({**RECIPE.to_json(), **change}, "here"))


# -- JSON, YAML and tables ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[" * 100_000, "nested deeper"),
        ('{"a":' * 40 + "1" + "}" * 40, "nested deeper"),
        ('{"a": ' + "9" * 5000 + "}", "limit"),
        ("[1, 2]", "holds a list"),
        ("", "Expecting value"),
        ("\ud800", "Expecting value"),
    ],
    ids=["deep", "forty levels", "digits", "list", "empty", "surrogate"],
)
def test_json_of_a_run_is_bounded(text: str, match: str, copied: Callable[[str], Path]) -> None:
    for name in ("config.json", "environment.json", "checkpoints/0000000001/state.json"):
        run = copied("online")
        (run / name).write_bytes(text.encode("utf-8", "surrogatepass"))
        line = refused(LocalmotionError, match, lambda run=run: load_run(run, device="cpu"))
        assert Path(name).name in line
        assert "<html" in report([run], run / "r.html").read_text()
        shutil.rmtree(run)


def test_files_that_are_too_large_or_no_files_are_not_read(copied: Callable[[str], Path]) -> None:
    run = copied("online")
    for name in ("config.json", "command.txt", "metrics.jsonl"):
        with (run / name).open("r+b") as file:
            file.truncate(3 * 2**30)  # sparse: takes no room
    refused(CheckpointError, r"config\.json: .* more than the 16 MB", lambda: load_run(run, device="cpu"))
    page = report([run], run / "r.html").read_text()
    assert "metrics.jsonl has 3072 MB, more than a report reads" in page
    assert "command.txt cannot be read (has 3072.0 MB" in page
    (run / "config.json").unlink()
    os.mkfifo(run / "config.json")  # opening it as a file is would wait for ever
    refused(CheckpointError, "not a regular file", lambda: load_run(run, device="cpu"))
    assert "not a regular file" in report([run], run / "r.html").read_text()
    assert state(run) == "finished"
    (run / "status.json").write_text("[" * 9999)
    assert state(run) == ""


def test_long_and_odd_lines_of_metrics_are_left_out(copied: Callable[[str], Path]) -> None:
    run = copied("online")
    long = json.dumps({"kind": "eval", "env_step": 1, "return_mean": 1.0, "x": "y" * 3_000_000})
    rows = [
        long,
        "[" * 5000,
        '{"kind": "eval", "env_step": 3, "return_mean": NaN}',
        '{"kind": "eval", "env_step": 1e400, "return_mean": 1}',
    ]
    rows += [
        json.dumps({"kind": "eval", "env_step": 10**400, "return_mean": 2}),
        '{"kind": "eval", "env_step": 9, "return_mean": 7.5}',
    ]
    (run / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    from localmotion.runs.read import read_run

    found = read_run(run)
    assert found.bad_lines == 2
    steps, values = found.series("eval", "return_mean")
    assert (steps[-1], values[-1]) == (9, 7.5)
    report([run], run / "r.html")


STUDY = "tasks: [toy:dot]\npreset: debug\nvariants:\n  A: {method: drp}\n"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a: !!python/object/apply:os.system ['touch pickle_was_run']", "could not determine a constructor"),
        ("a: !!python/name:os.system", "could not determine a constructor"),
        (
            "a: &a [x,x,x,x,x,x,x,x,x]\n"
            + "".join(f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
            "holds more than",
        ),
        ("a: &a [*a]", "nested deeper"),
        ("[" * 3000, "cannot be read"),
        ("a: 2026-13-45", "cannot be read"),
        ("- 1", "is a mapping"),
        (STUDY + "settings: {label: 2026-01-01}", "put quotes"),
        (STUDY + "seeds: [x]", "whole numbers"),
        (STUDY + "seeds: [-1]", "whole numbers"),
        (STUDY.replace("drp", "os.system"), "unknown method"),
        (STUDY.replace("{method: drp}", "{method: drp, sweep: [1]}"), "sweep is a mapping"),
        (STUDY.replace("{method: drp}", "{method: drp, sweep: {seed: 2026-01-01}}"), "put quotes"),
        (STUDY + "seeds: [" + "1," * 10_001 + "]", "more than 10,000 runs"),
        (STUDY.replace("method: drp", "method: drp, preset: [1]"), "unknown preset"),
        (STUDY + "settings: {batch_size: [1]}", "A"),
        ("x" * (2**20 + 1), "more than the 1 MB"),
    ],
    ids=range(17),
)
def test_a_study_is_data(text: str, match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.yaml").write_text(text)
    refused(ConfigError, match, lambda: load_study(tmp_path / "s.yaml"))
    assert not Path("pickle_was_run").exists()


def test_names_of_a_study_stay_in_its_folder(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(STUDY.replace("A:", '"../../etc/x; rm -rf ~":'))
    (job,) = load_study(tmp_path / "s.yaml")
    assert "/" not in job.name
    assert not job.name.startswith(".")


def test_trees_are_measured() -> None:
    check_tree({"a": [1, {"b": 2}]}, depth=3)
    with pytest.raises(ValueError, match="deeper"):
        check_tree({"a": [1, {"b": 2}]}, depth=2)
    with pytest.raises(ValueError, match="more than 3"):
        check_tree([1, 2, 3, 4], values=3)
    nested = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert parse_json(nested)
    with pytest.raises(ValueError, match="deeper"):
        parse_json(f"[[{nested}]]")


# -- arrays, pictures, pages ----------------------------------------------------------------------------------------------


def npy(shape: tuple[int, ...], descr: str = "|u1") -> bytes:
    """A head of an array that is not there."""
    out = io.BytesIO()
    np.lib.format.write_array_header_2_0(out, {"descr": descr, "fortran_order": False, "shape": shape})
    return out.getvalue() + b"\0" * 8


@pytest.mark.parametrize("shape", [(2**40,), (2**20, 2**20, 2**20), (-5,)])
def test_an_array_that_claims_more_than_it_holds_is_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "flow_x.npz", "w") as archive:
        archive.writestr("magnitudes.npy", npy(shape))
    refused(media.MediaError, "flow_x.npz: (holds|cannot)", lambda: media.flow_magnitudes(tmp_path / "flow_x.npz"))


def test_a_zip_bomb_is_refused_by_what_it_says(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "masked_x.npz", "w", zipfile.ZIP_DEFLATED) as archive, archive.open("truth.npy", "w") as part:
        part.write(npy((arrays.MAX_ARRAYS,)))
        for _ in range(257):
            part.write(bytes(1 << 20))
    assert (tmp_path / "masked_x.npz").stat().st_size < 1 << 20
    refused(media.MediaError, "more than a report reads", lambda: media.masked_patches(tmp_path / "masked_x.npz", "run"))


def test_names_from_files_do_not_run_on_the_page(copied: Callable[[str], Path]) -> None:
    evil = "<script>alert(1)</script>"
    run = copied("online").rename(copied("pre").parent / "<img src=x onerror=alert(2)>")
    change(run / "config.json", label=evil, env=f"toy:{evil}", method=evil)
    change(run / "environment.json", **{evil: {evil: evil}})
    change(run / "status.json", state=evil)
    (run / "command.txt").write_text(f"localmotion {evil}")
    page = report([run], run / "r.html").read_text()
    assert "<script" not in page
    assert "<img src=x" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "default-src 'none'" in page


# -- paths stay inside --------------------------------------------------------------------------------------------------


def test_a_run_shows_and_writes_no_file_outside_of_it(copied: Callable[[str], Path], tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("private key")
    config = from_dict(json.loads((copied("pre") / "config.json").read_text()))
    for name in ("command.txt", "media/atomic_x.png", "metrics.jsonl", "config.json.tmp", "random.json"):
        run = shutil.copytree(tmp_path / "pre", tmp_path / "one")
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to("../secret" if "/" not in name else secret)
        for call in (
            lambda run: report([run], tmp_path / "r.html"),
            lambda run: RunDir(run, config),
            lambda run: load_run(run, device="cpu"),
        ):
            refused(CheckpointError, "is a link to a place outside", lambda run=run, call=call: call(run))
        shutil.rmtree(run)
    assert secret.read_text() == "private key"
    run = tmp_path / "pre"
    (run / "checkpoints" / "again").symlink_to("0000000001")  # a link inside is let be, and so is the run's own name
    (tmp_path / "linked").symlink_to(run)
    load_run(tmp_path / "linked", device="cpu")
    RunDir(tmp_path / "linked", config)


@pytest.mark.parametrize("name", ["shards", "shards/00001", "shards/00000/frames.u8", "shards/00000/shard.json"])
def test_a_store_reads_no_file_outside_of_it(name: str, copied: Callable[[str], Path], tmp_path: Path) -> None:
    store = copied("store")
    (store / name).rename(tmp_path / "away")
    (store / name).symlink_to(tmp_path / "away")
    refused(StoreError, "is a link to a place outside", lambda: ClipStore(store))


@pytest.mark.parametrize("name", ["shards", "shards/00001", "shards/00000/frames.u8", "shards/00000/shard.json"])
def test_links_of_a_store_are_followed_when_asked_for(name: str, copied: Callable[[str], Path], tmp_path: Path) -> None:
    store = copied("store")
    want = ClipStore(store).clip(3).frames.copy()
    (store / name).rename(tmp_path / "away")
    (store / name).symlink_to(tmp_path / "away")
    command = ["inspect", str(store), "--out", str(tmp_path / "p.png")]
    with pytest.raises(SystemExit):
        main(command)
    main([*command, "--follow-links"])
    ClipStore(store).verify()
    np.testing.assert_array_equal(ClipStore(store).clip(3).frames, want)
    writer = ClipStoreWriter.open(store, 64, RECIPE.to_json(), RECIPE.hash(), 4, 2)
    assert len(writer.done_ids()) == 6
    with pytest.raises(SystemExit):  # for one command, not for the process
        main(command)
    refused(StoreError, "is a link to a place outside.*--follow-links", lambda: ClipStore(store))


@pytest.mark.parametrize("name", ["checkpoints", "media", "metrics.jsonl"])
def test_links_of_a_run_are_followed_when_asked_for(
    name: str, copied: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copied("pre")
    config = from_dict(json.loads((run / "config.json").read_text()))
    (run / name).rename(tmp_path / "away")
    (run / name).symlink_to(tmp_path / "away")
    refused(CheckpointError, "is a link to a place outside.*--follow-links", lambda: RunDir(run, config))
    monkeypatch.setattr(files, "_trusted", False)
    files.trust_links()
    assert RunDir(run, config).metrics_path.exists()
    assert load_run(run, device="cpu")[0].method == "drp"
    report([run], tmp_path / "r.html")


def edit_shard(store: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    path = store / "shards" / "00000" / "shard.json"
    shard = json.loads(path.read_text())
    edit(shard)
    path.write_text(json.dumps(shard))


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda s: s["clips"][0].update(id="../../x"), "plain relative name"),
        (lambda s: s["clips"][0].update(id="/etc/passwd"), "plain relative name"),
        (lambda s: s["clips"][0].update(frames=10**12), "offsets|bytes"),
        (lambda s: s["clips"][0].update(frames=-1), "offsets"),
        (lambda s: s["clips"][0].update(frames=True), "offsets"),
        (lambda s: s["clips"][1].update(offset=0), "offsets"),
        (lambda s: s["clips"][0].update(label={"a": 1}), "label"),
        (lambda s: s["clips"][0].update(id=["x"]), "damaged"),
        (lambda s: s.update(files={}), "damaged"),
        (lambda s: s.pop("clips"), "damaged"),
        (lambda s: s.update(clips={"a": 1}), "damaged"),
    ],
)
def test_a_damaged_index_is_refused(edit: Callable[[dict[str, Any]], Any], match: str, copied: Callable[[str], Path]) -> None:
    store = copied("store")
    edit_shard(store, edit)
    refused(StoreError, f"shard 00000 is damaged.*{match}|{match}.*delete that shard", lambda: ClipStore(store))


def test_verify_opens_only_files_of_the_shard(copied: Callable[[str], Path], tmp_path: Path) -> None:
    store = copied("store")
    os.mkfifo(tmp_path / "pipe")  # would be waited for
    edit_shard(store, lambda s: s["files"].update({"../../../pipe": {"bytes": 0, "sha256": ""}}))
    ClipStore(store).verify()
    edit_shard(store, lambda s: s["files"]["frames.u8"].pop("sha256"))
    refused(StoreError, "frames.u8 has changed", ClipStore(store).verify)


@pytest.mark.parametrize(
    "change_to",
    [
        {"size": 10**10},
        {"size": 2**62, "tracks": 1},
        {"tracks": 0},
        {"size": 64.0},
        {"recipe": []},
        {"version": "x" * 10**6},
        {"arrays": None},
        {"format": None},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_damaged_header_is_refused(change_to: dict[str, Any], copied: Callable[[str], Path]) -> None:
    store = copied("store")
    change(store / "store.json", **change_to)
    refused(StoreError, r"store\.json", lambda: ClipStore(store))


# -- anything at all ------------------------------------------------------------------------------------------------------

NASTY: list[Any] = [
    None, True, 0, -1, 1, 2**31, 2**63, -(10**18), 10**400, 1e308, float("nan"), float("inf"), "", "x", "../../etc/passwd", "/etc/passwd",
    "\x1b[31m\n<script>", "a" * 5000, [], {}, [1], {"a": 1}, [[[[]]]], "drp", "toy:dot", 0.5, 3, "64", "1e999", "none",
]  # fmt: skip


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    for key, item in inner:
        yield (*at, key)
        yield from places(item, (*at, key))


def mutated(value: Any, rng: random.Random) -> Any:
    """A JSON value with a few of its parts replaced, removed or added."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 2])):
        *path, key = rng.choice(list(places(value)) or [("",)])
        inner = value
        for step in path:
            inner = inner[step]
        how = rng.random()
        if how < 0.2 and key != "":
            del inner[key]
        elif how < 0.3 and isinstance(inner, dict):
            inner[rng.choice(["zzz", "../x", "__class__", "_target_"])] = copy.deepcopy(rng.choice(NASTY))
        else:
            inner[key] = copy.deepcopy(rng.choice(NASTY))
    return value


def damage(path: Path, rng: random.Random) -> None:
    """Change a file: JSON by its values, most of the time, anything else (and JSON too) by its bytes."""
    if path.suffix in (".json", ".jsonl") and rng.random() < 0.8:
        lines = [path.read_text()] if path.suffix == ".json" else path.read_text().splitlines()
        path.write_text("\n".join(json.dumps(mutated(json.loads(line), rng)) for line in lines))
        return
    content = bytearray(path.read_bytes())
    if rng.random() < 0.3:
        content = content[: rng.randrange(len(content) + 1)]
    for _ in range(rng.choice([1, 3, 20])):
        if content:
            content[rng.randrange(min(len(content), rng.choice([20, 400, 10**9])))] = rng.randrange(256)
    path.write_bytes(bytes(content))


def read_run(run: Path, config: RunConfig) -> Iterator[Callable[[], Any]]:
    yield lambda: load_run(run, device="cpu")
    yield lambda: RunDir(run, config)
    yield lambda: state(run)


def read_store(store: Path, run: Path) -> Iterator[Callable[[], Any]]:
    yield lambda: ClipStore(store).verify()
    yield lambda: ClipStore(store).rejected
    yield lambda: WindowSampler(ClipStore(store), 8, 2, 0, split="all", prefetch=False).batch(0)
    yield lambda: ClipStoreWriter.open(store, 64, RECIPE.to_json(), RECIPE.hash(), 4, 2).done_ids()


def attempt(calls: Iterator[Callable[[], Any]], what: str) -> int:
    """How many calls are refused. Anything but a LocalmotionError of one line fails the test."""
    count = 0
    for call in calls:
        try:
            call()
        except LocalmotionError as error:
            count += 1
            if len(str(error).splitlines()) != 1:
                raise AssertionError(f"{what}: {error}") from error
        except Exception as error:
            raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    return count


@pytest.mark.parametrize("name", ["pre", "online", "store"])
def test_damaged_files_are_refused_or_read_but_never_a_traceback(name: str, made: Path, tmp_path: Path) -> None:
    """Seeded mutations; thousands more were tried with other seeds while this was written."""
    rng = random.Random(name)
    count, tried = 0, 60 if name == "store" else 40
    config = (
        compose("drp", "pretrain", preset="debug")
        if name == "store"
        else from_dict(json.loads((made / name / "config.json").read_text()))
    )
    for number in range(tried):
        path = shutil.copytree(made / name, tmp_path / str(number))
        files = sorted(file for file in path.rglob("*") if file.is_file())
        chosen = rng.choice([file for file in files if file.suffix == ".json"] if rng.random() < 0.7 else files)
        damage(chosen, rng)
        calls = read_store(path, made / "pre") if name == "store" else read_run(path, config)
        count += attempt(calls, f"{name} {number} {chosen.relative_to(path)}") > 0
        shutil.rmtree(path)
    assert count > tried / 8  # what is refused is refused by these readers


def test_damaged_runs_are_reported(made: Path, tmp_path: Path) -> None:
    rng = random.Random(1)
    for number in range(10):
        run = shutil.copytree(made / "online", tmp_path / str(number))
        for name in ("config.json", "metrics.jsonl", "status.json", "environment.json"):
            damage(run / name, rng)
        attempt(iter([lambda run=run: report([run, made / "pre"], tmp_path / "r.html")]), f"report {number}")


def test_prediction_and_transfer_meet_damage_too(made: Path, tmp_path: Path) -> None:
    rng = random.Random(2)
    for number in range(4):
        run = shutil.copytree(made / "pre", tmp_path / str(number))
        damage(run / rng.choice(["config.json", "environment.json", "checkpoints/0000000001/weights.safetensors"]), rng)
        tuned = compose("drp", "finetune", preset="debug", env="toy:dot", flags={"checkpoint": str(run)})
        model = methods.get("drp")(tuned.model, image_size=64, action_dim=2)
        predicting = lambda run=run: predict([run], made / "store", clips=1, windows=1, split="all", device="cpu")  # noqa: E731
        attempt(iter([predicting, lambda model=model, tuned=tuned: load_pretrained(model, tuned)]), f"predict {number}")


def test_the_security_page_names_tests_that_exist() -> None:
    page = (ROOT / "SECURITY.md").read_text()
    named = set(re.findall(r"`(test_[a-z_0-9]+)`", page))
    here = {node.name for node in ast.parse(Path(__file__).read_text()).body if isinstance(node, ast.FunctionDef)}
    assert len(named) > 15
    assert named <= here
    assert all((ROOT / name).is_file() for name in re.findall(r"`(tests/[a-z_]+\.py)`", page))
    assert TRUSTED in page
