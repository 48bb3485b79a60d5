# Two commands matter: `make reproduce` and `make test`. Each sets up .venv by itself.
#   ENV=current       use the python3 on PATH as it is and install nothing (a GPU machine with its own torch and cupy)
#   PYTHON=python3.12 which Python makes .venv
#   ARGS="..."        passed on: make reproduce ARGS="--only 00_start_here -p source=replay"
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules --no-print-directory

PYTHON ?= python3
ENV ?= venv
ARGS ?=

ifeq ($(ENV),current)
  PY := $(PYTHON)
  READY :=
  export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
else
  # A GPU brings torch's CUDA build with its own NVRTC; elsewhere the compiler comes as wheels.
  EXTRA := $(if $(shell command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep GPU),gpu,toolchain)
  PY := .venv/bin/python
  READY := .venv/.ready-$(EXTRA)
endif
LOG := .venv/install.log
PIP := $(PY) -m pip --disable-pip-version-check install -c .ci/lock.txt
# Said every 20 packages, since pip is silent for minutes.
PROGRESS := awk '/^Collecting/ && ++n % 20 == 0 { print "      " n " packages"; fflush() } \
                 /^Installing collected/ && n > 2 { print "      unpacking"; fflush() }'

.PHONY: help
help: ## say what there is
	@echo "usage: make TARGET [ENV=current] [PYTHON=python3.12] [ARGS=...]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s  %s\n", $$1, $$2 }' Makefile

.PHONY: env
env: $(READY) ## set up .venv (the targets below do it by themselves)
	@$(PY) -c 'import sys; print(f"python {sys.version.split()[0]} at {sys.executable}")'

.venv/.ready-%: pyproject.toml .ci/lock.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Python 3.11 or newer is needed, but $(PYTHON) is $$($(PYTHON) -V 2>&1 || true): say make PYTHON=python3.11" >&2; exit 1; }
	@echo "[1/3] .venv with $$($(PYTHON) -V)"
	@$(PYTHON) -m venv .venv
	@echo "[2/3] packages for a machine $(if $(filter gpu,$*),with,without) an NVIDIA GPU (minutes the first time; log in $(LOG))"
	@{ $(PIP) pip setuptools && $(PIP) --no-build-isolation -e '.[$*,dev]'; } 2>&1 | tee $(LOG) | $(PROGRESS) || { \
	  echo "installation failed; the end of $(LOG):" >&2; grep -v '^WARNING' $(LOG) | tail -n 15 >&2; exit 1; }
	@echo "[3/3] ready"
	@touch $@

.PHONY: reproduce
reproduce: $(READY) ## run every notebook (live on a Hopper GPU, else replay), report in build/report/index.html
	@$(PY) -m mla_kernels.study reproduce $(ARGS)

.PHONY: test
test: $(READY) ## lint, compile gate, unit tests, notebooks
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m pytest -q -n auto --maxprocesses 8 --dist loadfile $(ARGS)

.PHONY: lab
lab: $(READY) ## open the notebooks in JupyterLab
	@JUPYTER_CONFIG_PATH=$(CURDIR)/.ci/jupyter $(PY) -m jupyterlab --notebook-dir=$(CURDIR) $(ARGS) notebooks

.PHONY: record
record: $(READY) ## measure again into data/ (Hopper GPU; ARGS=peers for one experiment)
	@$(PY) -m mla_kernels.measure record $(ARGS)

.PHONY: refresh
refresh: $(READY) ## after make record: notebooks and README's table follow the records
	@$(PY) -m mla_kernels.study refresh $(ARGS)
	@$(PY) -m mla_kernels.study findings --update README.md

.PHONY: test-gpu
test-gpu: $(READY) ## verify the kernels against fp64 and record the outcome (Hopper GPU)
	@gpu=$$($(PY) -c 'import torch; print(torch.cuda.get_device_name())' 2>/dev/null) || { \
	  echo "make test-gpu needs a Hopper GPU that torch can use; there is none" >&2; exit 1; }; \
	folder=$$($(PY) -c 'import sys; from mla_kernels.measure.provenance import gpu_folder; print(gpu_folder(sys.argv[1]))' \
	  "$$gpu"); \
	$(PY) -m pytest -q tests/gpu --record "data/$$folder/verification.json" $(ARGS)

.PHONY: peers
peers: $(READY) ## fetch other people's kernels (public wheels, 270 MB) into .peers, for make record
	@$(PY) -m mla_kernels.measure.peers fetch $(ARGS)

.PHONY: clean
clean: ## remove what make made: .venv, .peers, build, caches
	rm -rf .venv .peers build .pytest_cache .ruff_cache .hypothesis mla_kernels.egg-info
	find mla_kernels tests notebooks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
