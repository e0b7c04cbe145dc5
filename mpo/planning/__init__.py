"""The memory of a training step, counted before there is a machine to run it."""
