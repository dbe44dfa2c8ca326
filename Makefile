# Each target is complete in itself: it makes .venv, installs what is missing, and runs.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test bench mutants docs linkcheck clean
.DELETE_ON_ERROR:

demo: $(STAMP)
	rm -rf runs/demo
	$(BIN)/resode train --data digits --model odenet20 --solver euler --run-dir runs/demo
	$(BIN)/resode diagnose runs/demo --solvers midpoint,rk4
	$(BIN)/resode swap runs/demo --solvers euler,midpoint,rk4,dopri5
	$(BIN)/resode stability runs/demo --solvers euler,rk4

test: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2

bench: $(STAMP) .bench/.installed
	PYTHONPATH=.bench/peers $(BIN)/python -m tests.benchmarks.speed --growth --diffrax .bench/diffrax/bin/python \
	  --json .bench/speed.json --figure .bench/work_precision.png

mutants: .venv/.mutants
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.trust.mutants all --count 200

.venv/.mutants: constraints.txt $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,mutants]'
	touch $@

docs: .venv/.docs
	$(BIN)/sphinx-build -W --keep-going docs docs/_build/html

linkcheck: .venv/.docs
	$(BIN)/sphinx-build -b linkcheck docs docs/_build/linkcheck

.venv/.docs: docs/constraints.txt $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --constraint $< --editable '.[dev,docs]'
	touch $@

.bench/.installed: tests/benchmarks/peers.txt | $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .bench/peers --requirement tests/benchmarks/peers.txt
	$(PYTHON) -m venv .bench/diffrax
	.bench/diffrax/bin/python -m pip install --quiet diffrax==0.7.2
	touch .bench/.installed

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "resode needs Python 3.11 or newer, this is " + sys.version)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

clean:
	rm -rf .venv .bench .mutants runs .pytest_cache .ruff_cache build dist docs/_build docs/_generated docs/gallery
