"""The Jacobian of a field at states: its products, its dense matrices, its extreme eigenvalues."""
