# `make demo` and `make test` need Python >= 3.10 and make, nothing else. `make test-all` also needs the Debian packages
# of CONTRIBUTING.md.
PYTHON ?= python3
# PINNED=yes installs exactly the versions that the bundles' metadata.json name, else the newest; each has its own folder
PINNED ?=
VENV ?= .venv$(if $(PINNED),-pins)
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
METADATA := $(wildcard bundles/*/configs/metadata.json)
CONSTRAINED := $(if $(PINNED),-c $(VENV)/constraints.txt)
# whole files of tests are shared among as many processes as there are cores, the longest first
WORKERS ?= auto
PARALLEL := -n $(WORKERS) --maxprocesses 4 --dist loadfile --no-loadscope-reorder
# what goes into a packed bundle, and the zoo's own settings for it
PACKED := transforms networks workflow $(wildcard bundles/*/scripts) $(wildcard tests/zoo)
ZOO := tools/zoo_style.cfg
export PYTHONUNBUFFERED := 1
# one thread a process: tests start several processes, and two cores are soon oversubscribed
test test-all test-label: export OMP_NUM_THREADS ?= 1
# not for `bench`, which is to give what the commands of docs/benchmarks.md give
demo weights test test-all test-label: export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo weights bench test test-pins test-all test-label label-env pack lint format clean

$(VENV)/run.stamp: requirements.txt $(if $(PINNED),tools/pins.py $(METADATA))
	$(PYTHON) -m venv $(VENV)
	$(if $(PINNED),$(PY) tools/pins.py > $(VENV)/constraints.txt)
	$(PIP) -r requirements.txt $(CONSTRAINED)
	@touch $@

$(VENV)/dev.stamp: requirements-dev.txt $(VENV)/run.stamp
	$(PIP) -r requirements-dev.txt $(CONSTRAINED)
	@touch $@

# MONAI Label's own environment: apps/monailabel/requirements.txt says why each version is what it is
LABEL_VENV ?= .venv-label
LABEL_PY := $(LABEL_VENV)/bin/python
LABEL_PIP := $(LABEL_PY) -m pip install --quiet --disable-pip-version-check
APP := apps/monailabel

$(LABEL_VENV)/run.stamp: requirements.txt $(wildcard $(APP)/*.txt) tools/pins.py $(METADATA) $(wildcard $(APP)/stand_ins/*/*.py)
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v != (3, 11) and f"needs Python 3.11, found {v}: PYTHON=python3.11")'
	$(PYTHON) -m venv $(LABEL_VENV)
	$(LABEL_PY) tools/pins.py | cat - $(APP)/constraints.txt > $(LABEL_VENV)/constraints.txt
	grep -v '^monailabel==' $(APP)/requirements.txt > $(LABEL_VENV)/requirements.txt
	$(LABEL_PIP) -r requirements.txt -r $(LABEL_VENV)/requirements.txt -c $(LABEL_VENV)/constraints.txt
	$(LABEL_PIP) --no-deps $$(grep '^monailabel==' $(APP)/requirements.txt)
	cp -R $(APP)/stand_ins/. "$$($(LABEL_PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	$(LABEL_PY) -c 'import monailabel.app'
	@touch $@

$(LABEL_VENV)/dev.stamp: $(APP)/requirements-dev.txt $(LABEL_VENV)/run.stamp
	$(LABEL_PIP) -r $(APP)/requirements-dev.txt
	@touch $@

## the environment for `$(LABEL_VENV)/bin/python -m monailabel.main start_server --app apps/monailabel ...`
label-env: $(LABEL_VENV)/run.stamp

## the whole path on synthetic CT, about seven minutes on two cores after the installation
demo: $(VENV)/run.stamp
	$(PY) -m demo.run --out out/demo

## the weights that the bundles ship, of synthetic patients and tests/data; stopped, it goes on; the cards say how long
weights: $(VENV)/run.stamp
	$(PY) -m demo.weights --work out/weights --models bundles

## lint and the fast tests
test: lint
	$(PY) -m pytest $(PARALLEL) -m "not slow and not debian"

## the same on exactly the versions that the bundles pin; PYTHON_PINS=python3.10 on the model zoo's Python
PYTHON_PINS ?= python3
test-pins:
	$(MAKE) test PINNED=yes PYTHON=$(PYTHON_PINS)

## every test, and the coverage of what both bundles run
test-all: lint
	$(PY) -m coverage erase
	$(PY) -m pytest $(PARALLEL) --durations=30 --cov --cov-report=term:skip-covered
	$(MAKE) test-label

## the tests of the MONAI Label app, in its own environment: real servers, a PACS, a browser
test-label: $(LABEL_VENV)/dev.stamp
	$(LABEL_PY) -m pytest $(PARALLEL) tests/apps --durations=10

## speed beside the original and MONAI's caches, and how cost grows: about 25 minutes on two quiet cores; threads as torch
## takes them, so that OMP_NUM_THREADS had better be unset
bench: $(VENV)/run.stamp
	$(PY) -m benchmarks.speed --out benchmarks/results/speed.json
	$(PY) -m benchmarks.growth --out benchmarks/results/growth.json
	$(PY) -m benchmarks.document

## both bundles as folders and zips that stand alone, in dist/; VOCO_WEIGHTS=FILE and RSNA_WEIGHTS=FILE go into them
pack: $(VENV)/run.stamp
	$(PY) -m tools.pack --out dist $(if $(VOCO_WEIGHTS),--weights "voco2d_pretrain=$(VOCO_WEIGHTS)") \
	    $(if $(RSNA_WEIGHTS),--weights "rsna_cnn_lstm=$(RSNA_WEIGHTS)")

## our rules by ruff; then what the model zoo's CI would say of a packed bundle
lint: $(VENV)/dev.stamp
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/isort --check --settings-file $(ZOO) $(PACKED)
	$(VENV)/bin/black --quiet --check --line-length 120 --skip-magic-trailing-comma $(PACKED)
	$(VENV)/bin/flake8 --config $(ZOO) $(PACKED)

format: $(VENV)/dev.stamp
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf out .venv .venv-pins .venv-label .coverage* .pytest_cache .ruff_cache
