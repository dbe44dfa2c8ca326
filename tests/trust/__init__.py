"""The campaign that tries to break the library: `make trust`, or one part of it, `python -m tests.trust PART`."""
