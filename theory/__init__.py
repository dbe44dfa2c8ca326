"""The claims that resode stands on, one runnable page each; `python -m theory` runs them all."""
