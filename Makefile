# Every target installs Twig into .venv first, once. Extra words: make test ARGS="-k trie".
# Windows, or no make: `py scripts/setup.py`, then the commands below with .venv\Scripts in place of .venv/bin.

PYTHON ?= python3
ARGS ?=
FRESH ?=
BIN := .venv/bin
# A worker for each core, which takes tests from the others when it has none left.
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal
# Written when an install is complete, so a broken-off one is repeated. A folder that has moved is another one.
INSTALLED := .venv/installed-$(firstword $(shell pwd | cksum))
DOCS_INSTALLED := $(INSTALLED)-docs
LLAMA_INSTALLED := $(INSTALLED)-llama

.PHONY: install quickstart test test-slow test-gpu lint bench docs

install: $(INSTALLED)
	@echo "Twig is installed in .venv; next: make quickstart"

# An unfinished run is resumed, a finished one is shown; FRESH=1 starts over.
quickstart: $(INSTALLED)
	@if [ "$(FRESH)" = 1 ] && [ -f runs/quickstart/config.yaml ]; then rm -r runs/quickstart; fi
	@$(BIN)/python -m twig train quickstart --output runs/quickstart \
		$$([ -f runs/quickstart/config.yaml ] && echo --resume) $(ARGS)

test: $(INSTALLED)
	$(PYTEST) $(ARGS)

test-slow: $(LLAMA_INSTALLED)
	$(PYTEST) -m slow $(ARGS)

test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest -m gpu $(ARGS)

lint: $(INSTALLED)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m basedpyright --level error
	$(BIN)/lint-imports --no-cache

bench: $(INSTALLED)
	$(BIN)/python benchmarks/run.py $(ARGS)

docs: $(DOCS_INSTALLED)
	$(BIN)/python -m mkdocs build --strict $(ARGS)

$(INSTALLED): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null || { \
		echo "setup: no $(PYTHON); run: sudo apt install python3 python3-venv (Mac: brew install python@3.12)" >&2; exit 2; }
	@"$(PYTHON)" scripts/setup.py
	@touch $@

# Without its parts for images, which take a third of the time. Not for this processor in particular, as version 0.3.36
# crashes if compiled for one with AMX, and not from pip's cache, which would give what was compiled for another. The
# tests that need it say so if it is not there.
$(LLAMA_INSTALLED): $(INSTALLED)
	@PIP_NO_CACHE_DIR=1 CMAKE_ARGS="-DLLAVA_BUILD=OFF -DGGML_NATIVE=OFF $(CMAKE_ARGS)" \
		$(BIN)/python scripts/setup.py llama && touch $@ || \
		echo "test-slow: no llama-cpp-python, so GGUF files are not tested with llama.cpp" >&2

$(DOCS_INSTALLED): $(INSTALLED)
	@$(BIN)/python scripts/setup.py docs
	@touch $@
