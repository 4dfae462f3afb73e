"""Exported programs compute what the method does, without localmotion; what cannot be a program is refused."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deployed_runs import saved
from localmotion import load_policy
from localmotion.acting import export
from localmotion.acting.deployed import loaded
from localmotion.acting.export import export_run
from localmotion.cli import main
from localmotion.errors import ConfigError, LocalmotionError, MissingExtraError

STEPS, SECOND = 20, 11  # agent steps, and the one with which a second episode begins
FRAMES = np.random.default_rng(0).integers(0, 256, (STEPS, 32, 32, 3), dtype=np.uint8)
HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
needs_onnx = pytest.mark.skipif(not HAS_ONNX, reason="the extra onnx is not installed")
OUTSIDE = """
import json, sys
import torch
folder = sys.argv[1]
about = json.load(open(folder + "/export.json"))
carry = {name: torch.zeros(x["shape"], dtype=getattr(torch, x["dtype"]))
         for name, x in about["programs"]["step"]["inputs"].items() if name in about["carry"]}
step = torch.export.load(folder + "/step.pt2").module()
out = step(image=torch.full((1, 32, 32, 3), 7, dtype=torch.uint8), is_first=torch.tensor([True]), **carry)
assert not [name for name in sys.modules if name.startswith("localmotion")]
print(json.dumps(out["action"].tolist()))
"""


def actions_of(call: Callable[..., dict[str, Any]], about: dict[str, Any]) -> np.ndarray:
    """Actions of a program that is called with numpy arrays, as a user would write it from export.json alone."""
    inputs = about["programs"]["step"]["inputs"]
    carry = {name: np.zeros(inputs[name]["shape"], inputs[name]["dtype"]) for name in about["carry"]}
    actions = []
    for t, frame in enumerate(FRAMES):
        out = call(image=frame[None], is_first=np.array([t in (0, SECOND)]), **carry)
        carry = {name: out[later] for name, later in about["carry"].items()}
        actions.append(out["action"][0])
    return np.array(actions)


def wanted(run: Path) -> np.ndarray:
    policy = load_policy(run, device="cpu", deterministic=True)
    actions = []
    for t, frame in enumerate(FRAMES):
        if t in (0, SECOND):
            policy.reset()
        actions.append(policy.act(frame))
    return np.array(actions)


@pytest.mark.parametrize("name", ["dreamer_v2", "dreamer_v3"])
def test_a_torch_program_acts_as_the_policy(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Twenty steps with a new episode within; and in a process that never loads localmotion."""
    run = saved(tmp_path / "run", name)
    ranges = {"action": {"names": None, "min": [-3.0, 0.0], "max": [5.0, 2.0], "commands": 1}}
    if from_logs := name == "dreamer_v2":
        known = json.loads((run / "environment.json").read_text())
        (run / "environment.json").write_text(json.dumps({**known, "lerobot": ranges}))
    main(["export", str(run), "--out", str(tmp_path / "out")])
    assert "range of actions" in capsys.readouterr().out
    about = json.loads((tmp_path / "out" / "export.json").read_text())
    step = torch.export.load(tmp_path / "out" / "step.pt2").module()

    def call(**values: Any) -> dict[str, Any]:
        return {key: x.numpy() for key, x in step(**{key: torch.from_numpy(x) for key, x in values.items()}).items()}

    found = actions_of(call, about)
    assert found == pytest.approx(wanted(run), abs=1e-5)
    assert len(np.unique(found.round(5), axis=0)) == STEPS
    assert (about["format"], about["method"], about["image"]["side"]) == ("torch", name, 32)
    assert about["action"]["environment"] == {"low": [-1.0, -1.0], "high": [1.0, 1.0], "dtype": "float32"}
    assert about.get("lerobot") == (ranges if from_logs else None)
    encoder = torch.export.load(tmp_path / "out" / "encoder.pt2").module()
    shape = about["programs"]["encoder"]["outputs"]["embed"]["shape"]
    assert list(encoder(image=torch.from_numpy(FRAMES[:1]))["embed"].shape) == shape
    if name == "dreamer_v2":
        ran = subprocess.run([sys.executable, "-c", OUTSIDE, str(tmp_path / "out")], capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        zeros = {key: np.zeros(about["programs"]["step"]["inputs"][key]["shape"], np.float32) for key in about["carry"]}
        first = call(image=np.full((1, 32, 32, 3), 7, np.uint8), is_first=np.array([True]), **zeros)
        assert np.array(json.loads(ran.stdout)) == pytest.approx(first["action"], abs=1e-5)


@needs_onnx
@pytest.mark.parametrize("name", ["dreamer_v2", "dreamer_v3"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # onnxscript uses old names of other packages when it is imported
def test_an_onnx_program_acts_as_the_policy(name: str, tmp_path: Path) -> None:
    import onnxruntime

    run = saved(tmp_path / "run", name)
    about = export_run(run, tmp_path / "out", "onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "step.onnx"), providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_outputs()]
    taken = {item.name for item in session.get_inputs()}
    assert names == list(about["programs"]["step"]["outputs"])

    def call(**values: Any) -> dict[str, Any]:
        return dict(zip(names, session.run(None, {key: x for key, x in values.items() if key in taken}), strict=True))

    assert actions_of(call, about) == pytest.approx(wanted(run), abs=1e-4)


def test_onnx_without_its_packages_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingExtraError, match=r"needs onnx; run: pip install 'localmotion\[onnx\]'"):
        export_run(tmp_path, tmp_path / "out", "onnx")
    with pytest.raises(ConfigError, match="unknown format 'onyx'; did you mean onnx"):
        export_run(tmp_path, tmp_path / "out", "onyx")  # type: ignore[arg-type]


def test_a_pretrained_run_gives_its_encoder(tmp_path: Path) -> None:
    run = saved(tmp_path / "run", "drp", "pretrain", env="", actions=None)
    about = export_run(run, tmp_path / "out")
    assert list(about["programs"]) == ["encoder"]
    assert "action" not in about
    assert about["recipe"]["percept_size"] == 64


def test_a_carry_that_grows_is_refused(tmp_path: Path) -> None:
    """DRP attends over a window that grows from step to step."""
    run, method, _ = loaded(saved(tmp_path / "run", "drp"), device="cpu", which="newest")
    with (
        torch.no_grad(),
        pytest.raises(ConfigError, match=r"drp: cannot be exported .*carry_motion_motion_patches .*no fixed shapes"),
    ):
        export._check_carry(export.Step(method, 8), run, export.observation(run, method))


def test_what_no_program_can_express_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No actor and no encoder, random draws, a program that differs from the method."""
    with pytest.raises(ConfigError, match="has no actor after pretrain and no encoder"):
        export_run(saved(tmp_path / "lapo", "lapo", "pretrain", env="", actions=None), tmp_path / "out")
    bc = saved(tmp_path / "bc", "bc", "decode")
    monkeypatch.setattr(export, "_differs", lambda *_: 0.1)
    with pytest.raises(LocalmotionError, match=r"computes something else than bc \(difference 0.1\); it was removed"):
        export_run(bc, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    monkeypatch.setattr(export, "likeliest", contextlib.nullcontext)
    with pytest.raises(ConfigError, match=r"diswm, step: draws random numbers in a step \(aten.rand"):
        export_run(saved(tmp_path / "diswm", "diswm"), tmp_path / "out")


def test_a_program_is_compared_with_the_method() -> None:
    module = torch.nn.Identity()
    module.forward = lambda **values: {"y": values["x"]}  # type: ignore[method-assign]
    zeros = {"x": torch.zeros(1, 3)}
    assert export._differs(lambda values: {"y": values["x"]}, module, zeros, {}) == 0
    assert export._differs(lambda values: {"y": values["x"] + 0.25}, module, zeros, {}) == pytest.approx(0.25)
    answers = iter([torch.nan, *[0.0] * 100])  # once is enough
    assert not export._differs(lambda values: {"y": values["x"] + next(answers)}, module, zeros, {}) <= export.TOLERANCE
