"""Implicit Runge-Kutta steps: Newton's method, and the implicit function theorem."""
