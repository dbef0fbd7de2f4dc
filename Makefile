# `make demo`, `make serve` and `make test` need Linux, Python 3.11 or newer and a way to fetch Python packages; no GPU. Each makes
# .venv by itself and uses it again for as long as pyproject.toml, constraints.txt and Python stay the same.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# What the demo draws, and what it becomes.
DEMO_MODEL := examples/demo_model
DEMO_PROMPT := a bear on the left and an owl on the right, in the snow
DEMO_EDIT := a bear wearing a hat on the left and an owl on the right, in the snow
DEMO_SEED := 7
EDIT = $(BIN)/fisedit-compile edit --model $(DEMO_MODEL) --prompt "$(DEMO_PROMPT)" --edit "$(DEMO_EDIT)" \
	--seed $(DEMO_SEED) --guidance 5 --compare-dense

# One empty file for each kind of set-up, named after all that it depends on. The path counts: scripts in .venv and the
# editable install name it, so that a moved checkout is set up again.
STATE := $(shell { cat pyproject.toml constraints.txt; $(PYTHON) -V; pwd; } | cksum | cut -d ' ' -f 1)
READY_TO_RUN := $(VENV)/.ready-to-run-$(STATE)
READY_TO_SERVE := $(VENV)/.ready-to-serve-$(STATE)
READY_TO_TEST := $(VENV)/.ready-to-test-$(STATE)

# What the other ends of the range of versions are tried with: the editor, the command line, and cells of docs/support.md.
ENDS := tests/editing tests/cli tests/test_support.py
OLDEST := $(shell $(PYTHON) -c 'import re, tomllib; \
	needs = tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]; \
	pairs = (re.match(r"(torch|diffusers|transformers)>=([\d.]+)", each) for each in needs); \
	print(*(f"{pair[1]}=={pair[2]}.*" for pair in pairs if pair))')

.PHONY: help demo serve test lint types-and-smoke types smoke interpreter pytest test-oldest test-newest format clean
ifndef TWO_AT_ONCE
.NOTPARALLEL:
endif

help:
	@echo "make demo    edit a picture with the demo model: pictures and report in out/demo"
	@echo "make serve   serve the demo model at http://127.0.0.1:8000, until Ctrl-C"
	@echo "make test    lint, types, a small demo and the tests, on the CPU"
	@echo "make lint | types | smoke | interpreter | pytest    one part of make test"
	@echo "make test-oldest | test-newest    parts of the tests with the oldest and newest versions of what pyproject.toml names"
	@echo "make format  sort imports, mend what ruff can mend, format"
	@echo "make clean   remove what was made, except .venv itself"

demo: $(READY_TO_RUN)
	$(EDIT) --steps 50 --out out/demo

# On a CPU twelve steps take ten seconds, and show what there is to see.
serve: $(READY_TO_SERVE)
	$(BIN)/fisedit-compile serve --model $(DEMO_MODEL) --steps 12 --guidance 5 --store out/service

# pytest stays last: its closing line is then the last one.
test: lint types-and-smoke interpreter pytest

lint: $(READY_TO_TEST)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

# Side by side, which takes as long as the longer one; the output of each is printed in one piece.
types-and-smoke: $(READY_TO_TEST)
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target TWO_AT_ONCE=1 types smoke

types: $(READY_TO_TEST)
	$(BIN)/python -m mypy

# One thread: a second one would wait for the core that mypy has.
smoke: $(READY_TO_TEST)
	OMP_NUM_THREADS=1 $(EDIT) --steps 6 --out out/smoke

# Two workers of one thread each: the inputs are tiny, and a second thread makes such a test slower.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# Triton reads the variable when a kernel is defined: processes of their own. These tests share nothing.
interpreter: $(READY_TO_TEST)
	TRITON_INTERPRET=1 $(PYTEST) --dist worksteal -m interpreter tests/kernels

# A file stays in one worker, because its U-Nets are captured once; tests/conftest.py brings the longest ones first.
pytest: $(READY_TO_TEST)
	$(PYTEST) --dist loadfile --no-loadscope-reorder

# Each in an environment of its own, which is made anew; pip downloads what it needs, several gigabytes with CUDA.
test-oldest:
	$(call try_versions,.venv-oldest,$(OLDEST))

test-newest:
	$(call try_versions,.venv-newest,--upgrade --upgrade-strategy eager)

# $(1): the environment; $(2): what pip is given beside this package.
define try_versions
	$(PYTHON) -m venv --clear $(1)
	$(1)/bin/python -m pip install -qq --editable '.[quality,test]' $(2)
	$(1)/bin/python -m pip list 2>/dev/null | grep -iE '^(torch|diffusers|transformers) '
	OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -n 2 --dist loadfile $(ENDS)
endef

format: $(READY_TO_TEST)
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

clean:
	rm -rf out build dist .venv-oldest .venv-newest .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

# Python compiles what it imports, once, instead of pip every file of every package: half the processor time of set-up.
unexport PYTHONDONTWRITEBYTECODE

comma := ,

# $(1): what pip installs from here, with extras.
define set_up
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer: make PYTHON=...")'
	@echo "Setting up $(VENV) (the first time some 600 MB of packages, a few minutes) ..."
	@rm -f $(VENV)/.ready-to-*
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --no-compile --constraint constraints.txt --editable '$(1)'
endef

$(READY_TO_RUN):
	$(call set_up,.[quality])
	@touch $@

$(READY_TO_SERVE):
	$(call set_up,.[quality$(comma)serve])
	@touch $@ $(READY_TO_RUN)

$(READY_TO_TEST):
	$(call set_up,.[dev])
	@touch $@ $(READY_TO_RUN) $(READY_TO_SERVE)
