"""Whole solves in one call of generated code."""
