"""Run directories: written, read, checked; checkpoints; settings of a run composed and resolved; a run loaded back."""
