"""Data sets, recipes and runs: training residual networks and keeping what came out."""
