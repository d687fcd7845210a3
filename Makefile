# make train   install, then train and evaluate on the embedded dataset
# make test    install, then run the tests
# make setup   install alone
#
# PYTHON=python3.12 chooses the interpreter, VENV=DIR the environment, ARGS="…" passes arguments on.

SHELL := /bin/bash
VENV ?= .venv
BIN := $(VENV)/bin
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c '$(NEW_ENOUGH)' >/dev/null 2>&1 && { echo $$p; break; }; done)
# The CUDA extra where an NVIDIA GPU answers.
EXTRAS := dev$(shell nvidia-smi -L 2>/dev/null | grep -q GPU && echo ,cuda)

.PHONY: setup train test lint clean

setup: $(VENV)/.installed-$(EXTRAS)

train: setup
	$(BIN)/python -m experiments.imagenet_mg $(ARGS)

test: setup
	$(BIN)/python -m pytest $(ARGS)

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) .cache

$(VENV)/.installed-$(EXTRAS): pyproject.toml
	@test -n "$(PYTHON)" || { echo "mgjax needs Python 3.11 or newer; name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$(EXTRAS)]'
	@touch $@
