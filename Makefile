# Every target sets up what it needs. `make help` lists them.

VENV ?= .venv
PY := $(VENV)/bin/python

# The first interpreter that starts, not the first that is found: a version manager's shim may refuse to.
PYTHON ?= $(shell for p in python3.11 python3; do if $$p -c '' 2>/dev/null; then echo $$p; exit; fi; done; echo python3)

# The environment's pins: the GPU ones where a GPU answers. Set CONSTRAINTS to choose.
ifeq ($(origin CONSTRAINTS),undefined)
CONSTRAINTS := $(shell if nvidia-smi >/dev/null 2>&1; then echo constraints/gpu.txt; else echo constraints/cpu.txt; fi)
endif
ifeq ($(notdir $(CONSTRAINTS)),gpu.txt)
EXTRAS := [dev,cluster,trackers,gpu]
else
EXTRAS := [dev,cluster,trackers]
endif

PINS := $(CONSTRAINTS)

# What the commands below are about:
EXPERIMENT ?=# the preset that `make bench` runs; left empty, the one that suits this device
GPU_MEM ?= 80GiB# the memory that `make plan` plans for
NAME ?=# the experiment under results/ that `make report` rebuilds and `make notebooks` reads
MINUTES ?=# the time after which `make test-touched` starts no more tests; those left out are named
ARGS ?=# more arguments, for the sweep (bench, claims, smoke, bench-layers), for gallery or for pytest (test, test-slow, …)

# The stamp's name says which pins are installed, and its content where: other pins, a checkout moved or copied
# together with its .venv, and a .venv whose interpreter is gone all count as stale.
STAMP := $(VENV)/.installed-$(basename $(notdir $(CONSTRAINTS)))
BROKEN := $(shell test "`cat '$(STAMP)' 2>/dev/null`" = "$(CURDIR)" && $(PY) -c '' 2>/dev/null || echo FORCE)

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install corpus bench plan bench-layers claims gallery smoke report notebooks test test-slow test-touched test-cuda test-peers compare lint format clean distclean named FORCE

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

$(STAMP): pyproject.toml $(PINS) $(BROKEN)
	@$(PY) -c $(USABLE) 2>/dev/null || { $(make-venv); }
	@rm -f $(VENV)/.installed-*
	@echo "installing $(EXTRAS) with $(PINS) into $(VENV) (some minutes the first time)"
	@$(PY) -m pip install -q $(addprefix -c ,$(PINS)) -e '.$(EXTRAS)'
	@echo "$(CURDIR)" > $@

USABLE := 'import sys, pip; sys.exit(sys.version_info < (3, 11))'

# Clears what is there only where that is an environment.
define make-venv
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		found="`$(PYTHON) -c 'import platform; print(platform.python_version())' 2>/dev/null`"; \
		echo "error: Python 3.11 or newer is needed, but '$(PYTHON)' is $${found:-missing}; install one, or say make PYTHON=/path/to/python" >&2; \
		exit 1; \
	}; \
	clear=; if test -f $(VENV)/pyvenv.cfg; then clear=--clear; fi; \
	$(PYTHON) -m venv $$clear $(VENV) >/dev/null || { \
		echo "error: '$(PYTHON) -m venv' failed; on Debian and Ubuntu it needs the package python3-venv" >&2; \
		exit 1; \
	}
endef

install: $(STAMP) corpus ## make or refresh .venv, and fetch the default corpus once

corpus: $(STAMP)
	@$(PY) -m bench.corpora fetch plays

bench: corpus ## run the preset for this device (or EXPERIMENT=name) and write its report
	@experiment='$(strip $(EXPERIMENT))'; \
	experiment="$${experiment:-`$(PY) -m bench.run.provenance preset`}"; \
	test -n "$$experiment" || { echo "error: no preset suits this device; say make bench EXPERIMENT=name" >&2; exit 1; }; \
	$(call sweep-and-report,$$experiment)

smoke: corpus ## run a small sweep from scratch, end to end, and write its report
	@$(call sweep-and-report,smoke,force=true)

# $(1): the experiment; $(2): overrides. The report is written whatever the sweep's end, and a failed sweep fails.
define sweep-and-report
status=0; \
	$(PY) -m bench experiment=$(1) $(2) $(ARGS) || status=$$?; \
	test $$status -eq 0 || echo "error: the sweep ended with status $$status; the report shows what was recorded" >&2; \
	$(PY) -m bench.report results/$(1) || { report=$$?; test $$status -ne 0 || status=$$report; }; \
	exit $$status
endef

plan: corpus ## what fits: the longest sequences and largest batches in GPU_MEM, e.g. GPU_MEM=24GiB, by prediction
	@$(call sweep-and-report,fits,measure.budget=$(strip $(GPU_MEM)))

bench-layers: $(STAMP) ## compare single layers with dense attention in time and memory, into results/layers
	@$(PY) -m bench.tools.bench_layers $(ARGS)

gallery: $(STAMP) ## draw which tokens a token reads, for every variant, into results/gallery
	@$(PY) -m bench.tools.gallery $(ARGS)

claims: corpus ## hold the field's claims against this machine, into results/claims/claims.md (a quarter of an hour)
	@status=0; \
	$(PY) -m bench experiment=claims $(ARGS) || status=$$?; \
	test $$status -eq 0 || echo "error: the sweep ended with status $$status; claims.md says what was not measured" >&2; \
	$(PY) -m bench.claims results/claims || { claims=$$?; test $$status -ne 0 || status=$$claims; }; \
	$(PY) -m bench.report results/claims || { report=$$?; test $$status -ne 0 || status=$$report; }; \
	exit $$status

report: named $(STAMP) ## rebuild the report of results/NAME, e.g. NAME=cpu
	@$(PY) -m bench.report results/$(strip $(NAME))

named:
	@test -n '$(strip $(NAME))' || { echo "error: say which experiment, e.g. make report NAME=cpu" >&2; exit 1; }

# They read the reference run that is committed, or with NAME that experiment.
notebooks: $(STAMP) ## run the notebooks, on results/NAME or the reference run; with outputs they lie in outputs/notebooks
	@mkdir -p outputs/notebooks
	@$(if $(strip $(NAME)),RESULTS='$(CURDIR)/results/$(strip $(NAME))') $(PY) $(VENV)/bin/jupyter-execute \
		--output='../outputs/notebooks/{notebook_name}' $(wildcard notebooks/*.ipynb)
	@echo "notebooks with outputs: outputs/notebooks"

# A worker a core, of four at most: each loads torch. Tests that share a fixture stay with one worker.
test: corpus ## run the tests, of each kind a few cases; ARGS='-k name' for some of them
	@$(PY) -m pytest -n auto --maxprocesses 4 --dist loadgroup $(ARGS)

test-slow: corpus ## run all other cases, and the tests that take minutes
	@$(PY) -m pytest -m $(SLOW) $(ARGS)

test-touched: corpus ## run the slow tests about what a change touched; with MINUTES=10 start none after so long
	@$(PY) -m pytest -m $(SLOW) --touched $(if $(strip $(MINUTES)),--minutes $(MINUTES)) $(ARGS)

SLOW := 'slow and not cuda and not peers'

test-cuda: corpus ## run the tests that need a CUDA device
	@$(PY) -m pytest -m 'cuda and not peers' $(ARGS)

# In an environment of their own: what is measured never shares one with them.
test-peers: ## compare with other projects' implementations, in .venv-peers
	@$(MAKE) --no-print-directory compare VENV='$(VENV)-peers' EXTRAS='[dev,peers]' PINS='$(CONSTRAINTS) constraints/peers.txt'

# xformers without what it depends on: its wheel asks for one torch of its own, and only its masks are used.
compare: $(STAMP)
	@$(PY) -m pip install -q --no-deps xformers==$(XFORMERS)
	@$(PY) -m pytest -m peers $(ARGS)

XFORMERS := $(shell sed -n 's/^xformers==//p' constraints/gpu.txt)

lint: $(STAMP) ## check style, formatting and types
	@status=0; \
	$(PY) -m ruff check . || status=1; \
	$(PY) -m ruff format --check . || status=1; \
	$(PY) -m mypy || status=1; \
	exit $$status

format: $(STAMP) ## format the code and fix what can be fixed
	@$(PY) -m ruff check --fix-only .
	@$(PY) -m ruff format .

clean: ## remove caches and build outputs
	@rm -rf build dist *.egg-info multirun outputs .pytest_cache .hypothesis .mypy_cache .ruff_cache
	@find bench variants tests -name __pycache__ -type d -prune -exec rm -rf {} +
	@echo "kept results/ and $(VENV)$(if $(filter clean,$(MAKECMDGOALS)), (make distclean removes $(VENV)))"

distclean: clean ## clean, and remove the environments too
	@for venv in $(VENV) $(VENV)-peers; do \
		test ! -f $$venv/pyvenv.cfg || { rm -rf $$venv; echo "removed $$venv"; }; \
	done
