# Two commands on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: quickstart test test-all lint bench-cpu bench-gpu plans clean

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

quickstart: $(INSTALLED)
	$(BIN)/lightning-hift fit --config configs/quickstart.yaml

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
	rm -rf $(VENV) build dist *.egg-info lightning_logs checkpoints .mypy_cache .ruff_cache .pytest_cache .hypothesis
