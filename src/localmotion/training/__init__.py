"""localmotion."""
