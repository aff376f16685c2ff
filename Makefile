# Everything happens in .venv; nothing is installed globally. `make demo` and `make test` need only Python 3.11 and make.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help install demo test check format bench clean

help:  ## List the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

install: $(STAMP)  ## Make .venv with everything for development

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV); this takes a minute or two, once."
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(STAMP)

demo: $(STAMP)  ## Run the main job: a server, six real clients, real data, a tuned adapter
	$(BIN)/python -m sdk_examples.demo $(if $(ROUNDS),--rounds $(ROUNDS))

test: $(STAMP)  ## Lint, type-check and run every test
	$(MAKE) --no-print-directory check
	$(BIN)/python -m pytest

check: $(STAMP)  ## Lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)  ## Format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)  ## Run all benchmarks, side by side with what they compare to
	for bench in memory step_time idle install; do $(BIN)/python -m tests.bench.$$bench || exit 1; done

clean:  ## Remove everything that make made
	rm -rf $(VENV) .cache demo-output .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
