# Two commands matter: `make demo` and `make test`. Both set themselves up, from nothing but Python 3.11+, git, make and ssh.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help

APT_TEST := debootstrap debian-archive-keyring iproute2 mount openssh-client openssh-server util-linux chromium

.PHONY: help
help:  ## Show what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/.base: requirements/controller.txt pyproject.toml
	@./.ci/venv $(PYTHON) $(VENV)
	echo "installing the controller into $(VENV): $$(grep -c == requirements/controller.txt) packages, ansible-core, paramiko, pandas and plotly among them"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/controller.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.base requirements/dev.txt requirements/harness.txt requirements/backend-pytorch.txt requirements/checkpoint.txt
	@echo "installing what the tests need: $$(cat requirements/{dev,harness,backend-pytorch}.txt | grep -o '^[^=]*==' | sort -u | wc -l) packages, PyTorch, TensorFlow and ONNX Runtime among them; gigabytes"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/dev.txt \
		-r requirements/harness.txt -r requirements/backend-pytorch.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/checkpoint.txt
	touch $@

.PHONY: setup
setup: $(VENV)/.base  ## Install the controller into .venv

.PHONY: demo
demo: $(VENV)/.base  ## Benchmark this machine: a quick run, from preflight to submission and report
	@mkdir -p demo
	echo "benchmarking this machine; LoadGen, PyTorch and the demo model go to ~/.mlperf-fleet first"
	test -f demo/fleet.yml || $(BIN)/fleet init --local demo/fleet.yml
	cd demo && ../$(BIN)/fleet bench --quick

.PHONY: test
test: $(VENV)/.dev system-packages lint  ## Set everything up and run every test
	$(BIN)/python -m pytest -n 2 --dist loadscope

.PHONY: test-gpu
test-gpu: $(VENV)/.dev  ## Test what needs an NVIDIA GPU, on a machine that has one; downloads gigabytes
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/backend-tensorrt.txt
	$(BIN)/python -m pytest tests/gpu

.PHONY: test-faults
test-faults: $(VENV)/.dev system-packages  ## Break things in the middle of outings; makes the table of docs/reliability.md
	rm -f build/reliability.json
	$(BIN)/python -m pytest -m lab tests/lab/test_knobs.py tests/lab/test_going_on.py tests/lab/faults \
		tests/cloud/test_end_to_end_faults.py
	$(BIN)/python -m tests.lab.faults.rows

.PHONY: test-scale
test-scale: $(VENV)/.dev system-packages  ## Everything with 48 lab hosts
	$(BIN)/python -m pytest -m scale

.PHONY: test-thorough
test-thorough: $(VENV)/.dev system-packages  ## Every combination of what `make test` tries in part
	$(BIN)/python -m pytest -m thorough

.PHONY: system-packages
system-packages:
	@./.ci/packages $(APT_TEST)

.PHONY: lint
lint: $(VENV)/.dev  ## ruff, mypy, import-linter, ansible-lint, yamllint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=. $(BIN)/lint-imports --no-cache
	PATH="$$PWD/$(BIN):$$PATH" $(BIN)/ansible-lint --offline -q playbooks roles
	$(BIN)/yamllint --strict .

.PHONY: bench
bench: $(VENV)/.dev system-packages  ## Measure what the README claims
	$(BIN)/python benchmarks/overhead.py

.PHONY: lock
lock: $(VENV)/.base  ## Compile requirements/*.txt anew; backend-pytorch.txt by hand, since uv does not look where its torch is
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-header pyproject.toml -o requirements/controller.txt
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-header requirements/harness.in -o requirements/harness.txt
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-header --no-emit-package torch pyproject.toml \
		--extra dev --constraint requirements/controller.txt --constraint requirements/harness.txt -o requirements/dev.txt
	for backend in onnxruntime tensorflow tensorrt; do
		$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-header requirements/backend-$$backend.in \
			--constraint requirements/dev.txt --constraint requirements/harness.txt -o requirements/backend-$$backend.txt
	done

.PHONY: clean
clean:  ## Remove what make made
	rm -rf $(VENV) demo build dist
