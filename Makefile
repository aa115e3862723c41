# Two commands: `make quickstart` and `make test`. Each makes .venv itself; both are safe to run twice.
# Beside them: `make conformance` (transformers' own model tests, which it downloads), `make versions` (the suite on the
# oldest and the newest torch and transformers that are supported), `make test-extras` (what needs packages that
# are large or built from source: quantisation, FP8's launch file, ZeRO-3, trackers), `make lint`, `make format`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := ==2.13.0
# More for pip, as make versions uses it.
PINS :=
# The lowest version that setup.cfg allows.
floor = $(shell sed -n 's/^ *$(1)>=//p' setup.cfg)

.PHONY: quickstart test test-extras conformance versions lint format install clean

quickstart: install
	$(BIN)/accelerate launch --quiet --config_file configuration/accelerate/single.yaml \
		-m train.pretrain --config configuration/recipes/quickstart.yaml

test: install
	$(BIN)/python -m pytest -n 2

test-extras: install
	$(BIN)/pip install --editable ".[test,quantisation,zero,trackers]"
	$(BIN)/python -m pytest tests/test_quantisation.py tests/distributed/test_quantisation.py \
		tests/train/test_fp8.py tests/distributed/test_zero3.py tests/train/test_trackers.py

conformance: install
	$(BIN)/python -m tests.conformance.report -n 2

versions:
	$(MAKE) test VENV=.venv-oldest TORCH="==$(call floor,torch)" PINS="transformers==$(call floor,transformers)"
	rm -rf .venv-newest
	$(MAKE) test VENV=.venv-newest TORCH=

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(VENV)/installed

# Without an NVIDIA GPU the CPU build of torch: from pip's own sources if they have it, else through uv, which knows
# where PyTorch keeps its builds. With a GPU, or where there is no such build, the one pip finds.
$(VENV)/installed: setup.cfg Makefile
	$(PYTHON) -m venv $(VENV)
	@if $(BIN)/python -c "import torch" 2>/dev/null; then \
		echo "torch is installed"; \
	elif nvidia-smi >/dev/null 2>&1; then \
		$(BIN)/pip install "torch$(TORCH)"; \
	else \
		$(BIN)/pip install "torch$(TORCH)+cpu" || { \
			$(BIN)/pip install uv && \
			$(BIN)/uv pip install --python $(BIN)/python --torch-backend cpu "torch$(TORCH)"; } || \
			$(BIN)/pip install "torch$(TORCH)"; \
	fi
	$(BIN)/pip install $(PINS) --editable ".[test]"
	@touch $@

clean:
	rm -rf .venv .venv-oldest .venv-newest runs build dist *.egg-info
