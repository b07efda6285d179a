# Everything a person types. Each target is complete by itself: what it needs is set up first.

SHELL := /bin/sh
PYTHON ?= python3
MINUTES ?= 20
BIN := .venv/bin
READY := .venv/.ready

# the backend of `train`, `infer`, `test` and `bench`; for example: make test DEV=CL
DEV ?= CPU
export DEV
BACKEND := $(shell echo $(DEV) | tr A-Z a-z)

# where the learning tests leave their bars and figures, for tools/figures.py
RUNGS ?= benchmarks/agents-rungs-$(1).xml

# where `bench-sims` leaves its results, and goes on from
SIMS ?= benchmarks/sims-$(BACKEND).json

# whose kernels `bench-live` searches: resnet, gpt-prefill, gpt-decode, mlp-train, mobilenet or vit
PROGRAM ?= gpt-decode

# what `prove` runs; the other files of tests/proofs are what these share
PROOFS := redteam dynamics fuzz killed cold concurrently protocol malformed

.DEFAULT_GOAL := help
.PHONY: help setup train infer test learn bench-agents bench-sims prove lint bench bench-live clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | while IFS='|' read -r name text; do printf '  make %-12s %s\n' "$$name" "$$text"; done

setup: $(READY)  ## virtual environment in .venv, dependencies, clang, and PoCL for the CL tests

train: $(READY)  ## train the policy on the corpus and compare it with random schedules (MINUTES=20)
	$(BIN)/python -m autotune.experiments.train with minutes=$(MINUTES)

infer: $(READY)  ## tune ResNet-18 with the newest policy and run it
	$(BIN)/python examples/resnet.py --infer

test: $(READY)  ## all tests but the long ones
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not learn and not slow and not bench"

learn: $(READY)  ## the tests that train an agent to a bar, each beside a broken one, and the slow ones
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "learn or slow" --junitxml $(call RUNGS,learn)

bench-agents: $(READY)  ## the agents' benchmarks: CartPole, their speed, all of them on recorded kernels (an hour)
	$(BIN)/python -m pytest -n 2 -m "bench" --junitxml $(call RUNGS,bench)
	$(BIN)/python tools/bench_agents.py --json benchmarks/agents-speed.json
	$(BIN)/python -m autotune.experiments.agents

bench-sims: $(READY)  ## every simulator on kernels that it never saw, beside nearest neighbour, roofline and boosting (hours)
	$(BIN)/python tools/bench_sims.py --parts cost --seeds 0 --json $(SIMS)
	$(BIN)/python tools/bench_sims.py --parts all --seeds 0 1 2 3 4 --json $(SIMS)
	$(BIN)/python tools/bench_sims.py --parts curve idle noisy --curve 500 2000 8000 --seeds 0 1 --json $(SIMS)

prove: $(READY)  ## attack the measuring and the records at full size, every proof of tests/proofs (hours)
	@missed=; for name in $(PROOFS); do echo "**** $$name ****"; \
	  $(BIN)/python tests/proofs/$$name.py --json benchmarks/measuring-$$name-$(BACKEND).json || missed="$$missed $$name"; done; \
	  test -z "$$missed" || { echo "missed their bars:$$missed"; exit 1; }

lint: $(READY)  ## style, types, and which package may import which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY)  ## repeat the comparison with BEAM=4, random schedules, evolution and a ranker from recorded trials: no device
	@for run in $(wildcard benchmarks/bench-*-$(BACKEND)*.tar.xz); do $(BIN)/python -m autotune replay $$run || exit 1; done
	$(BIN)/python tools/figures.py --write
	$(BIN)/python tools/bench_plots.py

bench-live: $(READY)  ## measure that comparison on this machine: make bench-live PROGRAM=gpt-decode (hours)
	$(BIN)/python -m autotune.experiments.curves with bench program=$(PROGRAM)

clean:  ## remove the virtual environment and all caches in this directory; runs/ stays
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# **** what every target needs; done again when setup.py changes ****

$(READY): setup.py
	@sh tools/system.sh $(PYTHON)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $(READY)
