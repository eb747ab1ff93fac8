# make demo: install and run the main job. make test, make check: for developers. Needs python >= 3.11, git and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-faults check install bench clean flwr-run

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[demo,ray,audit,dev]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps byzfl==0.0.11  # for tests; its dependencies bring torchvision
	touch $@

demo: install
	$(BIN)/cotune simulate

# bytecode is kept: without it, every process compiles cotune and its tests again
test: install
	env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test-faults: install
	FAULTS_PAGE=docs/results/faults.md $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m "crash or long"
	$(BIN)/python -m pytest -m hypothesis --hypothesis-profile=thorough

# ONLY="ledger fusion": these alone. SMOKE=1: in the smallest form, figures are not kept. PROFILE=folder: where the time goes.
bench: install
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps pfl==0.6.0 prv-accountant==0.2.0  # a peer, wants an older dp-accounting
	$(BIN)/python benchmarks/performance/run.py $(ONLY) $(if $(SMOKE),--smoke) $(if $(PROFILE),--profile $(PROFILE))

check: install
	PATH="$(abspath $(BIN)):$$PATH" scripts/check

flwr-run: install
	PATH="$(abspath $(BIN)):$$PATH" scripts/flwr-run

clean:
	rm -rf $(VENV) build dist *.egg-info
