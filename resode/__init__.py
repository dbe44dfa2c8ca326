"""Residual networks as dynamical systems."""
