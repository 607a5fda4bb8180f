# make run    the quickstart: the whole loop on a small model, on CPU, in minutes (FAST=1: the short form)
# make test   checks and tests
# make check  lint, format, types, the pages, what is installed, known vulnerabilities (where the advisory service can be reached)
# make docs   the pages under docs/ as a site, in build/site; any warning is an error
# make sbom   what is installed, as CycloneDX, in build/sbom.json
# make test-sdk  the official SDKs against a running server; needs node for the TypeScript one
# make gpu-wheels  what a GPU machine without a network lacks, in .whl: there, WHEELS=.whl benchmarks/gpu.sh
# make bench  ours beside its peers, which are installed into environments of their own
# Each sets up what it needs in .venv and starts at once the second time.

SHELL := bash
.DELETE_ON_ERROR:
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	command -v $$p >/dev/null && $$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
PIP := .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
QUICK ?=
# Threads that wait must not spin: on a busy machine that costs a hundredfold.
export OMP_WAIT_POLICY ?= PASSIVE

run: .venv/run.stamp
	.venv/bin/ropewalk quickstart --dir runs/quickstart $(if $(FAST),--fast)

# A process for each core, and one thread in each: tests do not wait for each other's threads.
test: check
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile

check: .venv/dev.stamp
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/properdocs build --strict --quiet
	@$(MAKE) --no-print-directory sbom QUICK=1
	.venv/bin/python tests/audit.py

sbom: .venv/dev.stamp
	@mkdir -p build
	.venv/bin/cyclonedx-py environment --pyproject pyproject.toml --mc-type application --output-reproducible \
		--output-format JSON --output-file build/sbom.json $(if $(QUICK),--no-validate) .venv/bin/python
	@echo "build/sbom.json: what is installed in .venv, as CycloneDX"

docs: .venv/dev.stamp
	.venv/bin/properdocs build --strict
	@echo "open build/site/index.html"

test-sdk: .venv/dev.stamp
	.venv/bin/python tests/sdk/run.py

gpu-wheels: .venv/bin/python
	.venv/bin/python benchmarks/gpu_wheels.py .whl

bench: .venv/dev.stamp
	.venv/bin/python benchmarks/run_all.py $(if $(QUICK),--quick)

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "Ropewalk needs Python 3.11 or newer, with venv (Debian: apt install python3-venv)"; exit 2; }
	$(PYTHON) -m venv .venv

# torch first and by itself: a pinned version is found where a build for this machine lies.
.venv/run.stamp: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) torch
	$(PIP) --editable .
	@touch $@

.venv/dev.stamp: .venv/run.stamp
	$(PIP) --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv .sdk runs build dist

.PHONY: run test docs sbom test-sdk check gpu-wheels bench clean
