# Everything happens in .venv; nothing is installed globally. `make demo` and `make test` need only Python 3.11 and make.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help install demo test check format bench soak fuzz sbom audit-dependencies clean

help:  ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

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
	for bench in memory step_time merge idle install link recovery round server_memory; do $(BIN)/python -m tests.bench.$$bench || exit 1; done

soak: $(STAMP)  ## Kill server and clients at random for MINUTES=3, then audit what they made
	$(BIN)/python -m tests.soak --minutes $(or $(MINUTES),3)

fuzz: $(STAMP)  ## Attack parsers and server, SECONDS=60 each; what breaks one is kept in tests/fuzz/corpus
	for target in tensors delta wire graphs headers; do \
		$(BIN)/python -m tests.fuzz $$target -max_total_time=$(or $(SECONDS),60) || exit 1; done
	FEDRA_FUZZ_EXAMPLES=$(or $(EXAMPLES),200) $(BIN)/python -m pytest --timeout 0 tests/contract/test_schemathesis.py tests/property/test_api_states.py

sbom: $(STAMP)  ## List everything installed, with licences, as CycloneDX in dist/fedra.cdx.json
	mkdir -p dist
	$(BIN)/cyclonedx-py environment $(BIN)/python --pyproject pyproject.toml --output-reproducible --output-file dist/fedra.cdx.json

audit-dependencies: $(STAMP)  ## Ask PyPI whether a locked version has a known vulnerability
	@$(BIN)/python -c "from urllib.request import urlopen; urlopen('https://pypi.org/pypi/pip/25.0/json', timeout=20)" 2>/dev/null || \
		{ echo "PyPI's service for single releases, https://pypi.org/pypi/NAME/VERSION/json, does not answer here: nothing was audited."; exit 1; }
	sed 's/+cpu$$//' constraints.txt > $(VENV)/audited.txt
	$(BIN)/pip-audit --strict --no-deps --disable-pip --requirement $(VENV)/audited.txt

clean:  ## Remove everything that make made
	rm -rf $(VENV) .cache demo-output .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
