# `make demo` trains on handwritten digits; `make test` runs linter, type checker and tests. Both set up .venv first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: demo test lint types soak wheel clean

demo: .venv/ready
	$(BIN)/python examples/digits.py

test: lint types
	$(BIN)/python -m pytest

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready
	$(BIN)/mypy

# Kills training 50 times, resumes it, and compares; a few minutes.
soak: .venv/ready
	$(BIN)/python -c 'from tests.soak import main; raise SystemExit(main())'

wheel: .venv/ready
	$(BIN)/python -m build --wheel

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist out *.egg-info
