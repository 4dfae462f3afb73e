"""localmotion: unlabeled video in, a world model that knows motion out, and an agent that learns from few interactions."""

__version__ = "0.1.0"
