"""The documented place of :func:`merge_adapter`."""

from mpo.jobs.merge import merge_adapter

__all__ = ["merge_adapter"]
