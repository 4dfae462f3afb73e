"""Synthetic run directories for the report's tests: what a pre-training run and online runs leave behind, in small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def base(path: Path, config: dict[str, Any], state: str = "finished") -> Path:
    (path / "media").mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    (path / "command.txt").write_text(f"localmotion {config['stage']} --method {config['method']} --run {path.name}\n")
    environment = {"versions": {"torch": "2.13.0", "mujoco": "3.3.0"}, "compute": "cpu, 2 threads, bf16 autocast (AMX)"}
    (path / "environment.json").write_text(json.dumps(environment))
    (path / "status.json").write_text(json.dumps({"state": state}))
    return path


def moving_clip(frames: int = 25, size: int = 32, drift: float = 0.0, blur: float = 0.0) -> NDArray[np.uint8]:
    """(T, S, S, 3): a soft ball on a coloured ground; ``drift`` and ``blur`` make it a bad prediction."""
    y, x = np.mgrid[:size, :size] / size
    t = np.arange(frames)[:, None, None]
    ball = np.exp(-((x - 0.2 - (0.026 + drift) * t) ** 2 + (y - 0.5 - 0.22 * np.sin(t / 5)) ** 2) / (0.015 + blur * t))
    ground = np.stack([0.25 + 0.3 * x, 0.35 + 0.3 * y, 0.45 - 0.2 * x], axis=-1)
    picture = ground + ball[..., None] * np.array([0.6, -0.1, 0.25])
    return np.clip(picture * 255, 0, 255).astype(np.uint8)


def write_mp4(path: Path, frames: NDArray[np.uint8]) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def pretrain_run(path: Path, updates: int = 2000, seed: int = 0, media: bool = True) -> Path:
    rng = np.random.default_rng(seed)
    config = {
        "method": "drp",
        "stage": "pretrain",
        "preset": "small",
        "seed": seed,
        "env": "",
        "checkpoint": "",
        "data": "store",
        "model": {"deter": 256, "dae": {"mask_ratio": 0.5, "heads": [4, 8]}},
        "pretrain": {"updates": updates},
    }
    base(path, config)
    lines: list[dict[str, Any]] = []
    for update in range(100, updates + 1, 100):
        decay = np.exp(-update / updates * 4)
        lines.append(
            {
                "kind": "pretrain",
                "update": update,
                "wall": update * 0.41,
                "loss/masked": 0.3 + decay + rng.normal(0, 0.02),
                "loss/image": 300 + 2500 * decay,
                "loss/kl": 4 + 8 * decay + rng.normal(0, 0.1),
                "grad_norm": 3 + rng.random(),
                "seconds/update": 0.36,
                "seconds/data": 0.04,
                "flow/p50": 0.11,
                "flow/p99": 1.6,
            }
        )
        if update % 500 == 0:
            lines.append(
                {
                    "kind": "heldout",
                    "update": update,
                    "masked/model": 0.2 + 0.3 * decay,
                    "masked/zero": 1.0,
                    "masked/frame_mean": 0.61,
                    "masked/nearest_time": 0.48,
                    "masked/ratio_best": (0.2 + 0.3 * decay) / 0.48,
                    "psnr/motion": 27.1 - 8 * decay,
                    "psnr/zero_motion": 24.0 - 6 * decay,
                    "psnr/last_frame": 22.2,
                    "ssim/motion": 0.91,
                    "ssim/zero_motion": 0.84,
                    "ssim/last_frame": 0.8,
                    "psnr/motion_horizon": (31 - 4 * np.log1p(np.arange(20)) / 1.5).tolist(),
                    "psnr/zero_motion_horizon": (30 - 4 * np.log1p(np.arange(20))).tolist(),
                    "psnr/last_frame_horizon": (29 - 4.4 * np.log1p(np.arange(20))).tolist(),
                }
            )
    write_lines(path / "metrics.jsonl", lines)
    if not media:
        return path
    truth = np.stack([moving_clip(), moving_clip()[::-1]])
    np.savez(
        path / "media/openloop_heldout.npz",
        truth=truth,
        context=5,
        prediction=np.stack([moving_clip(drift=0.001, blur=0.001), moving_clip(blur=0.002)[::-1]]),
        prediction_zero_motion=np.stack([moving_clip(drift=-0.015, blur=0.003), moving_clip(drift=-0.01)[::-1]]),
    )
    side = np.mgrid[:8, :8].transpose(1, 2, 0)[None] / 8 - 0.5
    angle, turn = rng.uniform(0, 6, (12, 1, 1)), rng.normal(0, 2, (12, 1, 1))
    patches = np.stack([np.cos(angle) + side[..., 0] * turn, np.sin(angle) - side[..., 1] * turn], axis=-1)
    patches = (patches * rng.uniform(0.05, 2, (12, 1, 1, 1))).astype(np.float32)
    masked = patches * (np.arange(12) % 2)[:, None, None, None]
    rebuilt = (patches * 0.85 + rng.normal(0, 0.06, patches.shape)).astype(np.float32)
    np.savez(path / "media/masked_heldout.npz", truth=patches, masked=masked.astype(np.float32), reconstruction=rebuilt)
    centres = np.array([[0, 0], [7, 1], [2, 7], [9, 9]])
    xy = (np.repeat(centres, 40, axis=0) + rng.normal(0, 1.1, (160, 2))).astype(np.float32)
    label = np.repeat(np.array(["pushing", "lifting", "turning", "walking"]), 40)
    np.savez(path / "media/embedding_clips.npz", xy=xy, labels=label, title=np.array("Clips by label"))
    np.savez(
        path / "media/embedding_direction.npz",
        xy=xy,
        label=label,
        title=np.array("Clips by direction of motion"),
        angle=np.arctan2(xy[:, 1] - 4, xy[:, 0] - 4),
    )
    np.savez(path / "media/flow_clips.npz", magnitudes=rng.lognormal(-1.4, 1.2, 20000), name=np.array("pre-training clips"))
    from matplotlib.image import imsave

    imsave(path / "media/atomic_clip_0007.png", np.concatenate(list(moving_clip(6)), axis=1).repeat(4, 0).repeat(4, 1))
    return path


def online_run(
    path: Path,
    *,
    method: str = "drp",
    env: str = "dmc:walker_walk",
    seed: int = 0,
    checkpoint: str = "",
    level: float = 500.0,
    env_steps: int = 50_000,
    success: bool = False,
    media: bool = True,
    **more: Any,
) -> Path:
    rng = np.random.default_rng(seed + int(level))
    stage = "finetune" if checkpoint else "train"
    config = {"method": method, "stage": stage, "preset": "small", "seed": seed, "env": env, "checkpoint": checkpoint}
    base(path, {**config, "model": {"deter": 256}, "online": {"env_steps": env_steps}, **more})
    lines: list[dict[str, Any]] = []

    def score(step: float) -> float:
        return float(np.clip(40 + level * (1 - np.exp(-step / 18000)) + rng.normal(0, 25), 0, 1000))

    every = env_steps // 20
    for step in range(0, env_steps + 1, every):
        counters = {"update": step // 10, "agent_step": step // 2, "env_step": step, "wall": 1 + step * 0.09}
        if step:
            for k in range(4):
                at = {"env_step": step - every + (k + 1) * every // 4}
                lines.append(
                    {
                        "kind": "episode",
                        **counters,
                        **at,
                        "return": score(step) * 0.8,
                        "length": 500,
                        "random": step == every,
                    }
                )
            lines.append(
                {
                    "kind": "train",
                    **counters,
                    "loss/image": 200 + 1500 * np.exp(-step / 9000),
                    "loss/kl": 3 + rng.normal(0, 0.1),
                    "loss/actor": -step / 9000 + rng.normal(0, 0.2),
                    "loss/critic": 1 + rng.random(),
                    "loss/reward": 0.9 * np.exp(-step / 20000),
                    "actor_entropy": 4 - step / 20000,
                    "seconds/update": 0.30 * every / 10,
                    "seconds/env": 0.05 * every / 10,
                    "seconds/perception": (0.08 if method == "drp" else 0.0) * every / 10,
                    "seconds/act": 0.04 * every / 10,
                    "seconds/replay": 0.01 * every / 10,
                    "seconds/eval": 0.03 * every / 10,
                    "seconds/all": 0.53 * every / 10,
                    "flow/p50": 0.35,
                    "flow/p99": 4.2,
                }
            )
        returns = [score(step) for _ in range(10)]
        line = {
            "kind": "eval",
            **counters,
            "returns": returns,
            "return_mean": float(np.mean(returns)),
            "episodes": 10,
            "seed": seed,
        }
        if success:
            line["success_rate"] = min(1.0, float(np.mean(returns)) / 800)
        lines.append(line)
    write_lines(path / "metrics.jsonl", lines)
    (path / "random.json").write_text(json.dumps({"return_mean": 38.0, "success_rate": 0.02, "episodes": 10}))
    if media:
        write_mp4(path / "media/eval_000000000.mp4", moving_clip(20, 64))
        write_mp4(path / f"media/eval_{env_steps:09d}.mp4", moving_clip(20, 64, drift=0.01))
        magnitudes = rng.lognormal(-0.6, 0.9, 20000)
        np.savez(path / "media/flow_stream.npz", magnitudes=magnitudes, name=np.array(f"downstream, {env}"))
    return path
