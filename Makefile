# make demo: a chat answer from a bounded cache.  make test: the test suite.  `make help` lists the rest.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
PYTEST_ARGS ?= -q

.DEFAULT_GOAL := help
.PHONY: help demo test test-newest test-oldest architectures gpu-test check clean

help:  ## list the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.trimkv-base  ## install, fetch the default model and answer a question with 256 KV slots
	$(BIN)/trimkv generate --model smollm2 --prompt-file examples/demo_prompt.txt --budget 256 --max-new-tokens 96 2>&1

test: $(VENV)/.trimkv-test  ## install the test extra and run the test suite on the CPU
	$(BIN)/python -m pytest $(PYTEST_ARGS) --numprocesses auto --maxprocesses 8 --dist worksteal

test-newest: $(VENV)-newest/.installed  ## the demo and a smoke suite with the newest releases that pyproject.toml allows
	$(call smoke,$(VENV)-newest/bin)

test-oldest: $(VENV)-oldest/.installed  ## the same with the oldest ones
	$(call smoke,$(VENV)-oldest/bin)

define smoke
	$(1)/trimkv generate --prompt-file examples/demo_prompt.txt --budget 256 --max-new-tokens 32 2>&1
	$(1)/python -m pytest -m "smoke and not gpu" $(PYTEST_ARGS) --numprocesses auto --maxprocesses 8 --dist worksteal
endef

architectures: $(VENV)/.trimkv-test $(VENV)-newest/.installed  ## check every architecture, and write docs/architectures.md
	$(BIN)/python tests/architectures.py --save $(VENV)/architectures.json
	$(VENV)-newest/bin/python tests/architectures.py --save $(VENV)-newest/architectures.json
	$(BIN)/python tests/architectures.py --page $(VENV)/architectures.json $(VENV)-newest/architectures.json > docs/architectures.md

gpu-test:  ## run the tests marked gpu with $(PYTHON) as it is: nothing is installed
	PYTHONPATH=src $(PYTHON) -m pytest -m gpu $(PYTEST_ARGS)

check: $(VENV)/.trimkv-test  ## ruff: lint and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:  ## remove environments and what was built; the default model stays, and it says where
	@folder=; if [ -x $(BIN)/python ]; then \
	  folder=$$($(BIN)/python -c 'from trimkv import embedded; print(embedded.folder())' 2>/dev/null) || folder=; fi; \
	rm -rf $(VENV) .venv-* build dist src/*.egg-info .pytest_cache .ruff_cache .hypothesis .coverage; \
	find src tests recipes benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null; \
	echo "Removed $(VENV) and what was built."; \
	if [ -z "$$folder" ]; then \
	  echo "The default model, if it was fetched, stays in the user's cache folder (TRIMKV_HOME, or ~/.cache/trimkv on Linux)."; \
	elif [ -d "$$folder" ]; then \
	  echo "The default model stays ($$(du -sh "$$folder" | cut -f1)): to remove it, rm -r '$$folder'"; \
	fi

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "trimkv needs Python 3.11 or newer as '$(PYTHON)'; name another with: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "cannot create $(VENV): install Python's venv module (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }

# The newest releases change from day to day, so that environment is brought up to date at every call.
.PHONY: $(VENV)-newest/.installed
$(VENV)-newest/.installed $(VENV)-oldest/.installed: $(VENV)-%/.installed: pyproject.toml constraints-%.txt
	@echo "Installing trimkv with the $* releases into $(VENV)-$* (PyTorch is large: a few minutes the first time)" >&2
	@test -x $(VENV)-$*/bin/pip || $(PYTHON) -m venv $(VENV)-$*
	@$(VENV)-$*/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-$*.txt --upgrade --upgrade-strategy eager -e '.[test]'
	@$(VENV)-$*/bin/python -m pip list --disable-pip-version-check 2>/dev/null | grep -iE '^(torch|transformers|tokenizers|huggingface.hub|numpy) '
	@touch $@

# Stamps: nothing is reinstalled until the requirements change.
$(VENV)/.trimkv-base: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "Installing trimkv into $(VENV) (PyTorch is large: a few minutes the first time)" >&2
	@$(PIP) -e .
	@touch $@

$(VENV)/.trimkv-test: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "Installing trimkv and its test tools into $(VENV) (PyTorch is large: a few minutes the first time)" >&2
	@$(PIP) -e '.[test]'
	@touch $(VENV)/.trimkv-base $@
