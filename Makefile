# Every target starts from a clean clone: it makes .venv first if there is none.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
BASE := $(VENV)/.simmim
STAMP := $(VENV)/.installed
WORKERS ?= auto
PYTEST = $(BIN)/python -m pytest --dist loadscope --numprocesses $(WORKERS)

.PHONY: help install demo notebooks test test-fast test-all test-xla test-lowest lint types format wheel clean

help: ## List every target
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## Make .venv with simmim and what developing it needs

$(BASE): pyproject.toml constraints.txt
	@echo "Installing into $(VENV), once: minutes, and gigabytes (PyTorch)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt --editable . && touch $(BASE)

$(STAMP): $(BASE)
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]" && touch $(STAMP)

demo: $(BASE) ## Pretrain on handwritten digits (5 minutes on two CPU cores) and show what it learned
	@$(BIN)/simmim pretrain fit && echo "Now your own images: . $(BIN)/activate; simmim"

notebooks: $(BASE) ## Open the notebooks in JupyterLab, which it installs
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[notebooks]"
	$(BIN)/jupyter lab notebooks

test: $(STAMP) ## Run the tests, every behaviour at least once
	$(PYTEST) -m "not exhaustive"

test-fast: $(STAMP) ## Run those that take seconds
	$(PYTEST) -m "not slow and not exhaustive"

test-all: $(STAMP) ## Run what `make test` leaves out: every family, kill, layout and notebook
	$(PYTEST) -m exhaustive

test-xla: ## Run the step on XLA's CPU device, in .venv-xla with the torch it was built for
	$(PYTHON) -m venv .venv-xla
	.venv-xla/bin/python -m pip install --quiet "torch==2.9.*" "torchvision==0.24.*" "torch_xla==2.9.*" --editable ".[dev]"
	.venv-xla/bin/python -m pytest tests/xla --numprocesses 0

test-lowest: ## Run the quick tests in .venv-lowest with the lowest versions that pyproject.toml allows
	$(PYTHON) -m venv .venv-lowest && .venv-lowest/bin/python -m pip install --quiet uv
	.venv-lowest/bin/uv pip install --quiet --python .venv-lowest/bin/python --resolution lowest-direct --editable ".[dev]"
	.venv-lowest/bin/python -m pytest --numprocesses $(WORKERS) -m "not slow and not exhaustive"

lint: $(STAMP) ## Check style (ruff)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(STAMP) ## Check types (mypy --strict)
	$(BIN)/mypy

format: $(STAMP) ## Mend style where ruff can
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

wheel: $(STAMP) ## Build the wheel into dist/
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean: ## Remove the environment and caches; runs and data stay
	rm -rf $(VENV) .venv-xla .venv-lowest dist .pytest_cache .mypy_cache .ruff_cache
