# `make help` lists the targets. Each one installs what it needs, once, into $(VENV); nothing else is touched.

# Given on the command line, as in `make PYTHON=python3.12 test`; variables of the environment do not count, since `clean`
# deletes $(VENV) and `demo` reads $(DATA).
PYTHON := python3
VENV := .venv
DATA :=
ARGS :=
TAG :=
# Test processes side by side.
JOBS := 2
# The environment's own PIP_USER would install beside $(VENV).
export PIP_USER := 0

BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
CONSTRAINTS := constraints.txt
# torch goes in first and pinned: where pip may choose, it takes another build with gigabytes of CUDA.
TORCH = $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' $(CONSTRAINTS))
# Before pip: metadata without INSTALLER, which pip writes last, is of a package whose installation was interrupted.
REPAIR := find $(VENV) -name '*.dist-info' ! -exec test -e {}/INSTALLER \; -prune -exec rm -rf {} +
PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check -c $(CONSTRAINTS)
INSTALL_FAILED = { echo "$(1) could not be installed into $(VENV): pip says why above; without a network it finds no versions" >&2; exit 1; }

.DEFAULT_GOAL := help
.NOTPARALLEL:
.SECONDARY:
.PHONY: help demo evidence test test-settings test-thorough test-slow test-distributed test-frameworks test-bases check format docs docs-serve docs-version notebook bench clean

help: ## show this list
	@sed -n 's/^\([a-z%-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{ printf "%-24s %s\n", $$1, $$2 }'

demo: $(VENV)/.extra-demo ## train on real data with and without balancing; DATA=file.npz to use your own copy
	@$(BIN)/python -m benchmarks.demo $(if $(DATA),--data "$(DATA)") $(ARGS)

evidence: $(VENV)/.extra-evidence ## train every method on every set, into docs/evidence.json and .md; resumable; DATA=folder, ARGS="--sets digits"
	@$(BIN)/python -m benchmarks.accuracy --page docs/evidence.md --also README.md $(if $(DATA),--data "$(DATA)") $(ARGS)

test: $(VENV)/.extra-test ## run the tests, without the slow ones; ARGS="-k ogm" goes to pytest
	@$(BIN)/python -m pytest -n $(JOBS) $(ARGS)

# Each run of test-settings: the processor's kernels, threads, and the seed of the tests' order and of hypothesis.
SETTINGS := default:1:1 avx2:2:2 default:4:3

test-settings: $(VENV)/.extra-test ## run the tests as on other processors, with more threads, in random order; a quarter of an hour
	@for setting in $(SETTINGS); do \
	  kernels=$${setting%%:*}; seed=$${setting##*:}; threads=$${setting#*:}; threads=$${threads%:*}; \
	  echo "ATEN_CPU_CAPABILITY=$$kernels OMP_NUM_THREADS=$$threads, seed $$seed"; \
	  ATEN_CPU_CAPABILITY=$$kernels OMP_NUM_THREADS=$$threads HYPOTHESIS_PROFILE=seeded $(BIN)/python -m pytest -n $(JOBS) \
	    --random-order --random-order-seed=$$seed --hypothesis-seed=$$seed $(ARGS) || exit 1; \
	done

test-thorough: $(VENV)/.extra-test ## run the property tests with twenty times the examples, new ones each time
	@HYPOTHESIS_PROFILE=thorough $(BIN)/python -m pytest -n $(JOBS) $(ARGS)

test-slow: $(VENV)/.extra-test ## run the slow tests
	@$(BIN)/python -m pytest -m slow $(ARGS)

test-distributed: $(VENV)/.extra-test ## run the tests that start several processes
	@$(BIN)/python -m pytest -m distributed $(ARGS)

test-frameworks: $(VENV)/.extra-test $(VENV)/.extra-accelerate $(VENV)/.extra-lightning $(VENV)/.extra-transformers $(VENV)/.extra-tensorboard ## run the tests with Lightning, Transformers and Accelerate
	@$(BIN)/python -m pytest -n $(JOBS) -m frameworks $(ARGS)

test-bases: $(VENV)/.extra-test $(VENV)/.extra-bases ## run the tests with the optimizers of pytorch_optimizer
	@$(BIN)/python -m pytest -n $(JOBS) -m bases $(ARGS)

# Lower bounds of pyproject.toml as constraints, for an environment of their own; numpy 1.25 needs Python 3.10 or 3.11.
LOWER := .venv-lower
$(LOWER)/constraints.txt: pyproject.toml
	@mkdir -p $(LOWER)
	@sed 's/#.*//' pyproject.toml | grep -o '"[A-Za-z][A-Za-z0-9_-]*\(\[python\]\)\{0,1\}>=[0-9.]*' | \
	  sed 's/"//; s/\[python\]//; s/>=/==/' | sort -u >$@
	@echo "pyparsing<3.3 # newer ones warn of their old names, which matplotlib 3.7 calls" >>$@

%-lower: $(LOWER)/constraints.txt ## test-lower, test-frameworks-lower: the same with the oldest versions; PYTHON=python3.10
	@$(MAKE) --no-print-directory $* VENV=$(LOWER) CONSTRAINTS=$<

# The newest torch that the index has, pre-releases too, with all else pinned.
NEWEST := .venv-newest
$(NEWEST)/constraints.txt: $(CONSTRAINTS)
	@mkdir -p $(NEWEST)
	@grep -v '^torch==' $< >$@

test-newest: $(NEWEST)/constraints.txt ## run the tests with the newest torch
	@$(MAKE) --no-print-directory test VENV=$(NEWEST) CONSTRAINTS=$< TORCH="--pre torch"

test-dist: $(VENV)/.extra-test $(VENV)/.extra-dist ## build the package, look at what is in it, install it beside torch alone
	@$(BIN)/python -m pytest -m slow tests/unit/test_distribution.py $(ARGS)

check: $(VENV)/.extra-test $(VENV)/.extra-check ## lint, format and type checks
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check .
	@$(BIN)/python -m mypy

format: $(VENV)/.extra-check ## apply the formatter and the safe fixes
	@$(BIN)/python -m ruff check --fix .
	@$(BIN)/python -m ruff format .

notebook: $(VENV)/.extra-test ## make docs/tutorial.ipynb anew from docs/tutorial.md
	@$(BIN)/python docs/notebook.py

docs: $(VENV)/.extra-docs ## build the documentation into site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "site/index.html"

docs-serve: $(VENV)/.extra-docs ## show the documentation at http://127.0.0.1:8000 and rebuild it with each change
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve $(ARGS)

docs-version: $(VENV)/.extra-docs ## commit the documentation as a version to the branch gh-pages; VERSION=0.1, ARGS="--push"
	@NO_MKDOCS_2_WARNING=1 DOCS_VERSIONS=mike PATH="$(CURDIR)/$(BIN):$$PATH" mike deploy --update-aliases $(ARGS) "$(VERSION)" latest

dist: $(VENV)/.extra-dist ## build the sdist, and the wheel from the sdist, into dist/
	@rm -rf dist
	@$(BIN)/python -m build --no-isolation . >/dev/null
	@$(BIN)/python -m twine check --strict dist/*

notes: ## print the changelog's section of a release; TAG=v0.1.0
	@"$(PYTHON)" .github/release_notes.py "$(TAG)"

bench: $(VENV)/.extra-bench ## measure speed, some minutes; ARGS="step monitor" for parts
	@$(BIN)/python -m benchmarks.speed $(ARGS)

clean: ## remove the environment and everything that was built
	rm -rf $(VENV) $(LOWER) $(NEWEST) build dist out site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find balanceopt benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# Stamps: one for torch, one for each extra of pyproject.toml.
$(VENV)/.torch: $(CONSTRAINTS)
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "there is no $(PYTHON): install Python 3.10 or newer, or say where it is: make PYTHON=/path/to/python" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "Python 3.10 or newer is needed; $(PYTHON) is older. Try: make PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) has no venv or ensurepip. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@mkdir -p $(VENV) && test -w . && test -w $(VENV) || { \
	  echo "$(CURDIR) and $(VENV) have to be writable: copy the tree to a place of your own" >&2; exit 1; }
	@echo "installing $(TORCH) into $(VENV)"
	@$(REPAIR)
	@"$(PYTHON)" -m venv $(VENV)
	@$(PIP_INSTALL) $(TORCH) setuptools || $(call INSTALL_FAILED,$(TORCH))
	@touch $@

# setuptools is there already, so the build needs no environment of its own.
$(VENV)/.extra-%: $(VENV)/.torch pyproject.toml
	@echo "installing balanceopt[$*] into $(VENV)"
	@$(REPAIR)
	@$(PIP_INSTALL) --no-build-isolation -e ".[$*]" || $(call INSTALL_FAILED,balanceopt[$*])
	@touch $@
