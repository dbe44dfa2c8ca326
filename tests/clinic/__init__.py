"""Healthy networks, faults of known place and cause, and treatments: what `resode.diagnose` is measured "
"on."""
