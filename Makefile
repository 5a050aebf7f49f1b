# make demo [DATA=path]   set-up + SFT -> reward model -> PPO with KL -> GIPO at tiny size on the CPU, and a report
# make test               set-up + the test suite
# make check              set-up + format, lint, types, documentation, known vulnerabilities
# make docs               set-up + the documentation in site/
PYTHON ?= python3
VENV := .venv
WORKERS ?= auto
STAMP := $(VENV)/.setup-done

.PHONY: setup demo test check docs clean

setup: $(STAMP)

# Torch goes first, pinned: see constraints.txt. pip's own checks run at the end.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; this is $$($(PYTHON) --version). Try: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

demo: $(STAMP)
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" bash launch/demo.sh "$(DATA)"

# A worker for each core: with three on two cores the whole took two minutes longer.
test: $(STAMP)
	$(VENV)/bin/python -m pytest -q -n $(WORKERS) --dist loadscope --no-loadscope-reorder tests

check: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet
	$(VENV)/bin/python -m tools.vulnerabilities

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

clean:
	rm -rf $(VENV) runs site build .pytest_cache .mypy_cache .ruff_cache *.egg-info
