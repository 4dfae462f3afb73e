"""Drive the robot with a trained policy: python drive.py RUN [EPISODES]. The loop of docs/robot_logs.md."""

import sys
from pathlib import Path

from robot import STEPS, Robot

import localmotion
from localmotion.video.lerobot import commands

run = Path(sys.argv[1])
robot, policy = Robot(), localmotion.load_policy(run)
returns = []
for episode in range(int(sys.argv[2]) if len(sys.argv) > 2 else 10):
    picture, total, step = robot.start(seed=1_000_000 + episode), 0.0, 0
    policy.reset(seed=episode)
    while step < STEPS:
        for command in commands(run, policy.act(picture)):  # in mm/s; several if every nth frame was extracted
            picture, reward = robot.send(command)
            total, step = total + reward, step + 1
    returns.append(total)
print(f"{run}: {len(returns)} episodes, return {sum(returns) / len(returns):.1f} ({min(returns):.1f} to {max(returns):.1f})")
