"""Implicit Runge-Kutta steps: stages found by Newton's method, differentiated by the implicit function theorem."""
