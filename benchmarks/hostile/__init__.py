"""Hostile inputs by the hundred, drawn from a seed: see :mod:`benchmarks.faults`."""
