# Every target that needs packages makes its own virtual environment, once: a stamp file in it is
# newer than the files that say what to install.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# A name on PATH may be a shim for a version that is not there, so each candidate is started.
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3,\
  $(shell $(p) -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(p))))

# For the newest versions: also the one of a Python that pyenv holds and has not put on PATH.
NEWEST_PYTHON ?= $(firstword $(foreach p,python3.13 python3.12 python3 $(wildcard $(foreach v,3.1[3-9].* 3.12.*,$(HOME)/.pyenv/versions/$(v)/bin/python)),\
  $(shell $(p) -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo $(p))))

BACKEND ?= jax
WORKERS ?= 2
PYTEST_ARGS ?=

comma := ,
framework_jax := jax
framework_tensorflow := tensorflow-cpu
framework_torch := torch
framework := $(framework_$(BACKEND))

inputs := pyproject.toml setup.cfg constraints-test.txt
pip_install := -m pip install --quiet --constraint constraints-test.txt
demo_venv := .venv-demo-$(BACKEND)
demo_python := $(demo_venv)/bin/python
test_python := .venv/bin/python
matrix := floor-jax floor-tensorflow newest-jax
matrix_tests := $(addprefix tests/test_,testing_conformance.py backend_private.py models_agree.py \
  models_keras.py models_layers.py models_norm.py models_tensorflow.py)
trainer_runs := $(addprefix tests/test_cli.py::,test_train_leaves_a_run_folder \
  test_float64_from_the_command_line)
pytest = $(test_python) -m pytest --numprocesses $(WORKERS) --dist worksteal

.PHONY: help demo test test-slow test-matrix matrix $(matrix:%=test-%) lint types docs docs-serve bench dist clean

help:
	@echo "make demo [BACKEND=jax|torch|tensorflow]   meta-learn on real digits, in its own environment"
	@echo "make test        lint, types and the default tests, on all three frameworks"
	@echo "make test-slow   the tests marked slow"
	@echo "make test-matrix  a part of the tests on the lower bounds in pyproject.toml, and on the newest"
	@echo "                 JAX and Python; make test-floor-jax and so on for one of them"
	@echo "make lint        ruff, lint and format"
	@echo "make types       mypy, strict"
	@echo "make docs        the documentation site, into site/"
	@echo "make docs-serve  the same at http://127.0.0.1:8000, rebuilt as its pages change"
	@echo "make bench       the benchmarks"
	@echo "make dist        wheel and sdist into dist/"
	@echo "make clean       remove environments, builds and caches"

demo: $(demo_venv)/.installed
	$(demo_venv)/bin/metaframe train --dataset digits --backend $(BACKEND) \
	  --out runs/demo-$(BACKEND) --overwrite

$(demo_venv)/.installed: $(inputs)
	$(if $(framework),,$(error BACKEND=$(BACKEND) is unknown. Expected jax, torch or tensorflow))
	$(if $(PYTHON),,$(error no Python >= 3.11 found. Say where it is: make demo PYTHON=/path/to/python))
	$(PYTHON) -m venv $(demo_venv)
	$(demo_python) $(pip_install) $(framework)
	$(demo_python) $(pip_install) --editable ".[demo]"
	touch $@

test: lint types
	$(pytest) $(PYTEST_ARGS)

test-slow: .venv/.installed
	$(pytest) -m slow $(PYTEST_ARGS)

test-matrix: $(matrix:%=test-%)

# What constraints-NAME.txt lists, and nothing else. METAFRAME_REQUIRED_BACKENDS names the others too
# where CI runs this.
$(matrix:%=test-%): test-%: .venv-%/.installed
	export METAFRAME_REQUIRED_BACKENDS=$(lastword $(subst -, ,$*)); \
	run=".venv-$*/bin/python -m pytest -p no:cacheprovider"; \
	$$run $(matrix_tests); \
	$$run $(trainer_runs) -m "" -k $(lastword $(subst -, ,$*))

# The environments alone, so that they can be made one after the other: pip builds in this directory.
matrix: $(matrix:%=.venv-%/.installed)

$(matrix:%=.venv-%/.installed): python = $(if $(findstring newest,$@),$(NEWEST_PYTHON),$(PYTHON))
$(matrix:%=.venv-%/.installed): .venv-%/.installed: constraints-%.txt pyproject.toml setup.cfg
	$(if $(python),,$(error no Python for $* found. Say where it is: make test-$* $(if \
	  $(findstring newest,$*),NEWEST_PYTHON,PYTHON)=/path/to/python))
	$(python) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --requirement constraints-$*.txt \
	  --editable ".[demo,tensorboard$(if $(findstring jax,$*),$(comma)jax)]"
	touch $@

lint: .venv/.installed
	$(test_python) -m ruff check .
	$(test_python) -m ruff format --check .

types: .venv/.installed
	$(test_python) -m mypy

# The theme advertises its successor at every start unless told not to.
docs docs-serve: export NO_MKDOCS_2_WARNING := 1

docs: .venv/.installed
	$(test_python) -m mkdocs build --strict

docs-serve: .venv/.installed
	$(test_python) -m mkdocs serve

bench: .venv/.installed
	$(test_python) -m benchmarks

dist: .venv/.installed
	$(test_python) -m build --outdir dist

# torch comes first and alone: resolved together with the rest, pip may look at several versions of
# it, which are gigabytes each.
.venv/.installed: $(inputs)
	$(if $(PYTHON),,$(error no Python >= 3.11 found. Say where it is: make test PYTHON=/path/to/python))
	$(PYTHON) -m venv .venv
	$(test_python) $(pip_install) $(framework_torch)
	$(test_python) $(pip_install) $(framework_jax) $(framework_tensorflow) --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv .venv-* build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -rf metaframe.egg-info backends/metaframe.egg-info
	find metaframe backends tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
