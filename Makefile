# Each target is complete in itself: it makes .venv, installs what is missing, and runs.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test bench mutants docs linkcheck trust oldest surface clean
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

# The whole campaign; a second call goes on where the first was stopped. The short part of it is in `make test`.
trust: $(STAMP) .trust/.installed
	PYTHONPATH=.trust/tools OMP_NUM_THREADS=1 $(BIN)/python -m tests.trust

surface: $(STAMP)
	$(BIN)/python -m tests.trust.surface --write

# The oldest versions that pyproject.toml allows; OLDEST="torch=2.13.0+cpu" where an index lacks one.
oldest: $(STAMP)
	$(PYTHON) -m venv .oldest
	$(BIN)/python -m tests.trust.oldest $(OLDEST) > .oldest/constraints.txt
	.oldest/bin/python -m pip install --quiet --constraint .oldest/constraints.txt --editable '.[dev,tensorboard]'
	OMP_NUM_THREADS=1 .oldest/bin/python -m pytest --numprocesses 2

.trust/.installed: tests/trust/tools.txt | $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .trust/tools --requirement $<
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
	rm -rf .venv .bench .mutants .trust .oldest runs .pytest_cache .ruff_cache build dist docs/_build docs/_generated docs/gallery
