"""Properties of this installation: versions, device, precision, tested GL backend, installed extras."""

from __future__ import annotations

import importlib.util
import os

import torch

from localmotion import machine, methods
from localmotion.compute import bf16_speedup, devices
from localmotion.errors import LocalmotionError
from localmotion.perception import backends
from localmotion.runs.rundir import versions

EXTRAS = {
    "dmc: DeepMind Control": ("dm_control", "pip install 'localmotion[dmc]'"),
    "metaworld: Meta-World": ("metaworld", "pip install 'localmotion[metaworld]'"),
    "report: t-SNE of motion codes": ("sklearn", "pip install 'localmotion[report]'"),
    "onnx: export to ONNX": ("onnxruntime", "pip install 'localmotion[onnx]'"),
    "hub: sharing weights": ("huggingface_hub", "pip install 'localmotion[hub]'"),
    "lerobot: LeRobot data sets": ("pyarrow", "pip install 'localmotion[lerobot]'"),
    "remote: stores in object storage": ("fsspec", "pip install 'localmotion[remote]'"),
    "cluster: jobs of Slurm": ("submitit", "pip install 'localmotion[cluster]'"),
    "ray: tasks of a Ray cluster": ("ray", "pip install 'localmotion[ray]'"),
    **{
        f"{name}: experiment tracker": (name, f"pip install 'localmotion[{name}]'")
        for name in ("tensorboard", "wandb", "trackio")
    },
    "perception: SEA-RAFT": ("ptlflow", "see docs/perception.md"),
    "perception: Grounding DINO + SAM": ("transformers", "pip install 'localmotion[perception]'"),
}


def report_lines() -> list[str]:
    """Lines of `localmotion info`."""
    lines = [f"{name:24s} {version}" for name, version in versions().items()]
    if torch.cuda.is_available():
        lines.append(
            f"{'device':24s} {torch.cuda.get_device_name()}, {torch.cuda.get_device_properties(0).total_memory / 1e9:.0f} GB"
        )
    lines.append(f"{'devices':24s} {', '.join(devices())}")
    fast, slow = bf16_speedup()
    verdict = "bf16" if fast > 1.3 * slow else "fp32"
    free, whole = machine.measure_free_cores(), os.cpu_count() or 1
    of = f" of {whole}" if whole != machine.cores() else ""
    lines.append(
        f"{'cpu':24s} {machine.cores()}{of} cores, {free:.1f} free now; torch's default is {torch.get_num_threads()} thread(s)"
    )
    lines.append(f"{'waiting threads':24s} {machine.waiting()}")
    lines.append(f"{'precision (measured)':24s} {verdict}: bf16 {fast / 1e9:.0f}, fp32 {slow / 1e9:.0f} GFLOP/s a thread")
    try:
        from localmotion.envs.gl import choose_gl, load_triton

        gl = choose_gl()
        kind = "software" if gl.software else "hardware"
        lines.append(f"{'GL (rendered and seen)':24s} {gl.backend}: {gl.renderer} ({kind})")
        lines.append(f"{'triton (before GL)':24s} {load_triton()}")
    except LocalmotionError as error:
        lines.append(f"{'GL':24s} {error}")
    lines += [f"{'pictures of dmcr':24s} {_pictures()}", f"{'videos of distracting':24s} {_backgrounds()}"]
    lines.append(f"{'methods':24s} {', '.join(methods.names())}")
    for kind in ("flow", "segment", "track"):
        lines.append(f"{kind + ' backends':24s} {', '.join(backends(kind))}")
    for name, (module, fix) in EXTRAS.items():
        found = importlib.util.find_spec(module) is not None
        lines.append(f"{name:34s} {'found' if found else 'not installed: ' + fix}")
    return lines


def _pictures() -> str:
    from localmotion.envs.textures import VARIABLE, find_textures

    folder = os.environ.get(VARIABLE)
    if not folder:
        return f"procedural; originals: set {VARIABLE} to dmc_remastered/assets of github.com/QData/dmc_remastered"
    try:
        found = find_textures(folder)
    except LocalmotionError as error:
        return str(error)
    return f"{folder}: {found.count('skies')} skies, {found.count('floors')} floors"


def _backgrounds() -> str:
    from localmotion.envs.backgrounds import VARIABLE

    folder = os.environ.get(VARIABLE)
    return folder or f"procedural; any folder of videos: set {VARIABLE}, e.g. to DAVIS 2017 with its clips in train/ and val/"
