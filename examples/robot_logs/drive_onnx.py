"""Drive the robot with an exported program, without torch and localmotion: python drive_onnx.py FOLDER [EPISODES]."""

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
from robot import STEPS, Robot

folder = Path(sys.argv[1])
about, session = json.loads((folder / "export.json").read_text()), onnxruntime.InferenceSession(folder / "step.onnx")
inputs, side, ranges = about["programs"]["step"]["inputs"], about["image"]["side"], about["lerobot"]["action"]
taken, low, high = {item.name for item in session.get_inputs()}, *np.array([ranges["min"], ranges["max"]], np.float32)
robot, returns = Robot(), []
for episode in range(int(sys.argv[2]) if len(sys.argv) > 2 else 10):
    picture, total, step = robot.start(seed=1_000_000 + episode), 0.0, 0
    carry = {name: np.zeros(inputs[name]["shape"], inputs[name]["dtype"]) for name in about["carry"]}
    while step < STEPS:
        seen = {"image": cv2.resize(picture, (side, side), interpolation=cv2.INTER_AREA)[None], "is_first": np.array([step == 0])}
        values = session.run(None, {name: value for name, value in {**seen, **carry}.items() if name in taken})
        out = dict(zip((item.name for item in session.get_outputs()), values, strict=True))
        carry = {name: out[later] for name, later in about["carry"].items()}
        for scaled in out["action"].reshape(ranges["commands"], len(low)):  # in [-1, 1] -> mm/s
            picture, reward = robot.send(low + (scaled + 1) / 2 * (high - low))
            total, step = total + reward, step + 1
    returns.append(total)
print(f"{folder}: {len(returns)} episodes, return {sum(returns) / len(returns):.1f} ({min(returns):.1f} to {max(returns):.1f})")
