# `make help` lists the targets. Each one installs what it needs, once, into $(VENV); nothing else is touched.

# Given on the command line, as in `make PYTHON=python3.12 test`; variables of the environment do not count, since `clean`
# deletes $(VENV) and `demo` reads $(DATA).
PYTHON := python3
VENV := .venv
DATA :=
ARGS :=
# Test processes side by side.
JOBS := 2
# The environment's own PIP_USER would install beside $(VENV).
export PIP_USER := 0

BIN := $(VENV)/bin
CONSTRAINTS := constraints.txt
# torch goes in first and pinned: where pip may choose, it takes another build with gigabytes of CUDA.
TORCH := $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' $(CONSTRAINTS))
PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check -c $(CONSTRAINTS)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.SECONDARY:
.PHONY: help demo evidence test test-settings test-thorough test-slow test-distributed test-frameworks test-bases check format docs docs-serve notebook bench clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{ printf "%-24s %s\n", $$1, $$2 }'

demo: $(VENV)/.extra-demo ## train on real data with and without balancing; DATA=file.npz to use your own copy
	@$(BIN)/python -m benchmarks.demo $(if $(DATA),--data "$(DATA)") $(ARGS)

evidence: $(VENV)/.extra-evidence ## train every method on every set, into docs/evidence.json and .md; resumable; DATA=folder, ARGS="--sets digits"
	@$(BIN)/python -m benchmarks.accuracy --page docs/evidence.md $(if $(DATA),--data "$(DATA)") $(ARGS)

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

check: $(VENV)/.extra-test $(VENV)/.extra-check ## lint, format and type checks
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(VENV)/.extra-check ## apply the formatter and the safe fixes
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

notebook: $(VENV)/.extra-test ## make docs/tutorial.ipynb anew from docs/tutorial.md
	@$(BIN)/python docs/notebook.py

docs: $(VENV)/.extra-docs ## build the documentation into site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html"

docs-serve: $(VENV)/.extra-docs ## show the documentation at http://127.0.0.1:8000 and rebuild it with each change
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve $(ARGS)

bench: $(VENV)/.extra-bench ## measure speed, some minutes; ARGS="step monitor" for parts
	@$(BIN)/python -m benchmarks.speed $(ARGS)

clean: ## remove the environment and everything that was built
	rm -rf $(VENV) build dist out site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find balanceopt benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# Stamps: one for torch, one for each extra of pyproject.toml.
$(VENV)/.torch: $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "Python 3.10 or newer is needed; $(PYTHON) is older. Try: make PYTHON=python3.12" >&2; exit 1; }
	@echo "installing $(TORCH) into $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) $(TORCH)
	@touch $@

# setuptools came with torch, so the build needs no environment of its own.
$(VENV)/.extra-%: $(VENV)/.torch pyproject.toml
	@echo "installing balanceopt[$*] into $(VENV)"
	@$(PIP_INSTALL) --no-build-isolation -e ".[$*]"
	@touch $@
