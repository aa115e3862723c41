# Two commands: `make quickstart` and `make test`. Each makes .venv itself; both are safe to run twice.
# Beside them: `make conformance` (transformers' own model tests, which it downloads), `make lint`, `make format`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := 2.13.0

.PHONY: quickstart test conformance lint format install clean

quickstart: install
	$(BIN)/accelerate launch --config_file configuration/accelerate/single.yaml \
		-m train.pretrain --config configuration/recipes/quickstart.yaml

test: install
	$(BIN)/python -m pytest -n 2

conformance: install
	$(BIN)/python -m tests.conformance.report -n 2

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(VENV)/installed

# Without an NVIDIA GPU the CPU build of torch: from pip's own sources if they have it, else through uv, which knows
# where PyTorch keeps its builds. With a GPU, the build pip finds.
$(VENV)/installed: setup.cfg Makefile
	$(PYTHON) -m venv $(VENV)
	@if $(BIN)/python -c "import torch" 2>/dev/null; then \
		echo "torch is installed"; \
	elif nvidia-smi >/dev/null 2>&1; then \
		$(BIN)/pip install "torch==$(TORCH)"; \
	else \
		$(BIN)/pip install "torch==$(TORCH)+cpu" || { \
			$(BIN)/pip install uv && \
			$(BIN)/uv pip install --python $(BIN)/python --torch-backend cpu "torch==$(TORCH)"; }; \
	fi
	$(BIN)/pip install --editable ".[test]"
	@touch $@

clean:
	rm -rf $(VENV) runs build dist *.egg-info
