# make demo   specialise the zoo supernet for this CPU, in an environment without torch
# make test   lint, types and all tests, in a development environment
# make oracle what needs litert-torch (1.2 GB), in an environment of its own
# make check  lint and types only
# make clean  remove what was built; `make distclean` removes .venv as well

PYTHON ?= python3

DEMO := .venv-demo
DEV := .venv
ORACLE := .venv-oracle
# Inside the environment, so that removing it removes the stamp.
DEMO_STAMP := $(DEMO)/ofa-deploy.stamp
DEV_STAMP := $(DEV)/ofa-deploy.stamp
ORACLE_STAMP := $(ORACLE)/ofa-deploy.stamp

# All but those of litert-torch, which are `make oracle`'s.
TESTS := $(addprefix tests/,unit property packaging training contract integration)

PIP_INSTALL := -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test oracle check lint types pytest clean distclean
.DEFAULT_GOAL := demo

define require_python
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	echo "ofa-deploy needs Python 3.10 or newer, and '$(PYTHON)' is missing or older." >&2; \
	echo "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	echo "'$(PYTHON)' cannot create virtual environments (module venv or ensurepip is missing)." >&2; \
	echo "On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
endef

demo: $(DEMO_STAMP)
	@rm -rf build/demo-bundle
	@mkdir -p build
	$(DEMO)/bin/ofa-deploy demo --out build/demo-bundle

# Built anew each time: it must hold the declared dependencies and nothing else.
# --no-compile: compiling every module of every package takes longer than the demo's own
# imports, which compile (and keep) only the modules that it uses.
$(DEMO_STAMP): pyproject.toml constraints.txt
	$(require_python)
	@echo "Creating $(DEMO): the library with OpenVINO, without torch ..."
	@$(PYTHON) -m venv --clear $(DEMO)
	@$(DEMO)/bin/python $(PIP_INSTALL) --no-compile -e '.[openvino]'
	@touch $@

test: check pytest

check: lint types

lint: $(DEV_STAMP)
	$(DEV)/bin/ruff check .
	$(DEV)/bin/ruff format --check .
	$(DEV)/bin/lint-imports

types: $(DEV_STAMP)
	$(DEV)/bin/mypy

pytest: $(DEV_STAMP)
	# On all cores, a thread each: more would wait for each other.
	OMP_NUM_THREADS=1 $(DEV)/bin/python -m pytest -n auto --dist loadfile --durations=15 -m "not quiet" $(TESTS)
	# What compares times has the machine for itself.
	$(DEV)/bin/python -m pytest --durations=15 -m quiet $(TESTS)

# Updated in place, as torch is large: `make distclean` first for a new one.
$(DEV_STAMP): pyproject.toml constraints.txt
	$(require_python)
	@echo "Installing the library, torch and the tools into $(DEV) (minutes the first time) ..."
	@test -x $(DEV)/bin/python || $(PYTHON) -m venv $(DEV)
	@$(DEV)/bin/python $(PIP_INSTALL) -e '.[openvino,litert,plots,shrink,dev]'
	@touch $@

oracle: $(ORACLE_STAMP)
	# The converter's frameworks warn of each other, which is nothing of ours.
	$(ORACLE)/bin/python -m pytest -p no:anyio -W default tests/oracle

$(ORACLE_STAMP): pyproject.toml constraints-oracle.txt
	$(require_python)
	@echo "Installing the library and litert-torch into $(ORACLE) (minutes) ..."
	@test -x $(ORACLE)/bin/python || $(PYTHON) -m venv $(ORACLE)
	@$(ORACLE)/bin/python -m pip install --quiet --disable-pip-version-check \
		-c constraints-oracle.txt -e '.[litert-convert,shrink,dev]'
	@touch $@

clean:
	rm -rf build dist $(DEMO) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis

distclean: clean
	rm -rf $(DEV) $(ORACLE)
