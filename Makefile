# Two commands from a fresh clone: `make quickstart` trains, `make test` proves. Both need only Python >= 3.11 with its
# headers and a C++ compiler, and name what is missing. Everything lands in .venv; nothing else is touched.

BIN := .venv/bin
INSTALLED := .venv/.installed
PEERS := .venv/.peers

# DeepSpeed compiles a small extension at its first start. Kept per environment: two checkouts that share torch's default
# folder would rebuild it over each other.
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/.venv/torch_extensions

.DEFAULT_GOAL := help
.PHONY: help install quickstart smoke test test-deep test-slow test-aot test-multinode bench bench-gpu bench-gpu-longest bench-alst bench-bounded bench-generation compare-bounded lint clean

help:  ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

install: $(INSTALLED)  ## make .venv and install longctx with everything the other targets need

$(INSTALLED): tools/bootstrap.py tools/bootstrap.sh pyproject.toml constraints.txt
	@sh tools/bootstrap.sh .venv

quickstart: $(INSTALLED)  ## train a small Llama on this machine's own text, sequences sharded over a ring of ranks
	$(BIN)/longctx train configs/quickstart.yaml

smoke: $(INSTALLED)  ## the same in under a minute
	$(BIN)/longctx train configs/smoke.yaml

test: $(INSTALLED)  ## lint, types, layering and every kind of test, about twenty minutes
	$(BIN)/python -m pytest

test-deep: $(INSTALLED)  ## the rest of the suite: larger grids, whole runs, more ranks; under 40 minutes
	$(BIN)/python -m pytest -m deep

test-slow: $(INSTALLED)  ## the full grids
	LONGCTX_TEST_RANDOM=1 $(BIN)/python -m pytest -m slow

test-aot: $(INSTALLED)  ## every kernel configuration compiled ahead of time
	$(BIN)/python -m pytest -m aot

test-multinode: $(INSTALLED)  ## the launcher on hosts of its own: ssh, MPI, SLURM (root; installs them and says so)
	sh tools/multinode.sh .venv

bench: $(INSTALLED) $(PEERS)  ## ring attention and a training step beside other libraries, in one run
	$(BIN)/python -m benchmarks.run

bench-gpu:  ## the attention kernels beside torch's on one GPU, under 8 minutes; installs nothing
	$(or $(wildcard $(BIN)/python),python3) -m benchmarks.gpu.run

bench-gpu-longest: $(INSTALLED)  ## what a token costs in memory at Llama-3-8B's widths on one GPU, rung by rung, beside ALST
	$(BIN)/python -m benchmarks.gpu.longest

bench-alst: $(INSTALLED)  ## training steps beside DeepSpeed's ALST: time, exact bytes, the longest sequence under a cap
	$(BIN)/python -m benchmarks.alst

bench-bounded: $(INSTALLED)  ## time, memory and state of bounded memories against length, beside torch's softmax
	$(BIN)/python -m benchmarks.bounded.speed

bench-generation: $(INSTALLED)  ## generate() by what is cached: samples a second at equal batch and at the largest that fits
	$(BIN)/python -m benchmarks.generation

compare-bounded: $(INSTALLED)  ## one small model trained with every kind of layer, hours; goes on where it stopped
	$(BIN)/python -m benchmarks.bounded.compare

# A peer that cannot be installed is reported as 'not measured'; it does not stop the bench.
$(PEERS): $(INSTALLED)
	-$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[peers]'
	@touch $@

lint: $(INSTALLED)  ## ruff (rules and format) and mypy alone
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## remove what builds and tests leave behind (.venv and runs/ stay)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
