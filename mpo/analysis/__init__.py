"""The earlier name of :mod:`mpo.hidden_space`."""
