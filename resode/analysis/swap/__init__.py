"""Is the network an ODE? Other solvers and steps, with the same weights."""
