"""Sweeps: one run for every point of a grid, on this machine or on a Ray cluster."""

from resode.training.sweep.sweeping import Sweep, SweptRun, sweep

__all__ = ["Sweep", "SweptRun", "sweep"]
