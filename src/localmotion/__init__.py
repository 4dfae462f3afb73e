"""localmotion: unlabeled video in, a world model that knows motion out, and an agent that learns from few interactions."""

from localmotion import machine

__version__ = "0.1.0"

machine.wait_passively()  # here, because every other module may import torch
