# `make demo` and `make test` need nothing but Python 3.11 or 3.12; both create .venv when it is missing.

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || echo python3)
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test lint bench clean

demo: $(VENV)/.installed
	$(RUN) demo.py

test: $(VENV)/.installed-dev
	$(RUN) -m pytest

lint: $(VENV)/.installed-dev
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy

bench: $(VENV)/.installed-dev
	$(RUN) -m benchmarks.attention
	$(RUN) -m benchmarks.silu_attention
	$(RUN) -m benchmarks.add_rms_norm
	$(RUN) -m benchmarks.cross_entropy
	$(RUN) -m benchmarks.catalogue_loss
	$(RUN) -m benchmarks.train_step
	$(RUN) -m benchmarks.rqvae_step
	$(RUN) -m benchmarks.feature_batches
	$(RUN) -m benchmarks.assign_ids
	$(RUN) -m benchmarks.length_scaling
	$(RUN) -m benchmarks.beam_search
	$(RUN) -m benchmarks.beam_recall
	$(RUN) -m benchmarks.trie
	$(RUN) -m benchmarks.server
	$(RUN) -m benchmarks.prepare
	$(RUN) -m benchmarks.tokenizers

clean:
	rm -rf $(VENV) dataset runs

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 12) else "Python 3.11 or 3.12 is needed; set PYTHON=/path/to/it")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt | $(VENV)/bin/python
	$(RUN) -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/.installed-dev: requirements.txt requirements-serve.txt requirements-dev.txt | $(VENV)/bin/python
	$(RUN) -m pip install --quiet -r requirements-dev.txt
	touch $@ $(VENV)/.installed
