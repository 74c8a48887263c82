# `make demo` and `make test` need Python >= 3.10 and make, nothing else. `make test-all` also needs the Debian packages
# of CONTRIBUTING.md.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
export PYTHONUNBUFFERED := 1
# one thread a process: tests start several processes, and two cores are soon oversubscribed
test test-all: export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test test-all pack lint format clean

$(VENV)/run.stamp: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.txt
	@touch $@

$(VENV)/dev.stamp: requirements-dev.txt $(VENV)/run.stamp
	$(PIP) -r requirements-dev.txt
	@touch $@

## the whole path on synthetic CT, about five minutes on two cores after the installation
demo: $(VENV)/run.stamp
	$(PY) -m demo.run --out out/demo

## lint and the fast tests
test: lint
	$(PY) -m pytest -m "not slow and not debian"

## every test, and the coverage of what both bundles run
test-all: lint
	$(PY) -m coverage erase
	$(PY) -m pytest --durations=30 --cov --cov-report=term:skip-covered

## both bundles as folders and zips that stand alone, in dist/; VOCO_WEIGHTS=FILE and RSNA_WEIGHTS=FILE go into them
pack: $(VENV)/run.stamp
	$(PY) -m tools.pack --out dist $(if $(VOCO_WEIGHTS),--weights "voco2d_pretrain=$(VOCO_WEIGHTS)") \
	    $(if $(RSNA_WEIGHTS),--weights "rsna_cnn_lstm=$(RSNA_WEIGHTS)")

lint: $(VENV)/dev.stamp
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/dev.stamp
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf out .venv .coverage* .pytest_cache .ruff_cache
