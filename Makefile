# Only calls scripts/setup.py, which makes .venv, installs once and runs the target.
# Windows: py scripts/setup.py quickstart

PYTHON ?= python3
ARGS ?=

.PHONY: install quickstart test test-slow bench docs
install quickstart test test-slow bench docs:
	@command -v "$(PYTHON)" >/dev/null || { echo "setup: no $(PYTHON) here; run: sudo apt install python3 python3-venv (Mac: brew install python@3.12)" >&2; exit 2; }
	@"$(PYTHON)" scripts/setup.py $@ $(ARGS)
