# Every target installs its requirements. `make help` lists the targets.

VENV ?= .venv
PY := $(VENV)/bin/python

# The first interpreter that runs, not the first on the path: a version manager's shim may fail to start.
PYTHON ?= $(shell for p in python3.11 python3; do if $$p -c '' 2>/dev/null; then echo $$p; exit; fi; done; echo python3)

# The pinned versions: those for GPUs if nvidia-smi finds a GPU. Set CONSTRAINTS to choose explicitly.
ifeq ($(origin CONSTRAINTS),undefined)
CONSTRAINTS := $(shell if nvidia-smi >/dev/null 2>&1; then echo constraints/gpu.txt; else echo constraints/cpu.txt; fi)
endif
ifeq ($(notdir $(CONSTRAINTS)),gpu.txt)
EXTRAS := [dev,cluster,trackers,baselines,gpu]
else
EXTRAS := [dev,cluster,trackers,baselines]
endif

PINS := $(CONSTRAINTS)

# Parameters of the targets:
EXPERIMENT ?=# the preset that `make bench` runs; by default the preset for this device
GPU_MEM ?= 80GiB# the memory budget of `make plan`
NAME ?=# the experiment in results/ for `make report` and `make notebooks`
MINUTES ?=# the time limit of `make test-touched`, after which no test starts, and of `make gpu-report`
ARGS ?=# additional arguments of the sweep (bench, claims, smoke, bench-layers), of gallery or of pytest (test, test-slow, …)

# The name of the stamp contains the installed pins, and its content is the folder of the checkout. The environment
# is stale if the pins differ, if the checkout was moved or copied with its .venv, or if the interpreter is missing.
STAMP := $(VENV)/.installed-$(basename $(notdir $(CONSTRAINTS)))
BROKEN := $(shell test "`cat '$(STAMP)' 2>/dev/null`" = "$(CURDIR)" && $(PY) -c '' 2>/dev/null || echo FORCE)

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install corpus bench plan bench-layers launches gpu-report claims gallery smoke report notebooks notebooks-docs test test-slow test-touched test-cuda test-peers compare lint format clean distclean named FORCE

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

$(STAMP): pyproject.toml $(PINS) $(BROKEN)
	@$(PY) -c $(USABLE) 2>/dev/null || { $(make-venv); }
	@rm -f $(VENV)/.installed-*
	@echo "installing $(EXTRAS) with $(PINS) into $(VENV) (some minutes the first time)"
	@$(PY) -m pip install -q $(addprefix -c ,$(PINS)) -e '.$(EXTRAS)'
	@echo "$(CURDIR)" > $@

USABLE := 'import sys, pip; sys.exit(sys.version_info < (3, 11))'

# Clears the folder only if it is a virtual environment.
define make-venv
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		found="`$(PYTHON) -c 'import platform; print(platform.python_version())' 2>/dev/null`"; \
		echo "error: Python 3.11 or newer is needed, but '$(PYTHON)' is $${found:-missing}; install it, or run make PYTHON=/path/to/python" >&2; \
		exit 1; \
	}; \
	clear=; if test -f $(VENV)/pyvenv.cfg; then clear=--clear; fi; \
	$(PYTHON) -m venv $$clear $(VENV) >/dev/null || { \
		echo "error: '$(PYTHON) -m venv' failed; on Debian and Ubuntu it needs the package python3-venv" >&2; \
		exit 1; \
	}
endef

install: $(STAMP) corpus ## create or update .venv, and download the default corpus once

corpus: $(STAMP)
	@$(PY) -m bench.corpora fetch plays

bench: corpus ## run the preset for this device (or EXPERIMENT=name) and write its report
	@experiment='$(strip $(EXPERIMENT))'; \
	experiment="$${experiment:-`$(PY) -m bench.run.provenance preset`}"; \
	test -n "$$experiment" || { echo "error: there is no preset for this device; run make bench EXPERIMENT=name" >&2; exit 1; }; \
	data=; $(if $(findstring data=,$(ARGS)),,if test "$$experiment" = gpu || test "$$experiment" = gpu_long; then \
		data="data=`$(PY) -m bench.corpora best`" || exit; fi;) \
	$(call sweep-and-report,$$experiment,$$data)

smoke: corpus ## run a small complete sweep from scratch and write its report
	@$(call sweep-and-report,smoke,force=true)

# $(1): the experiment; $(2): overrides. The report is always written; a failed sweep still fails the target.
define sweep-and-report
status=0; \
	$(PY) -m bench experiment=$(1) $(2) $(ARGS) || status=$$?; \
	test $$status -eq 0 || echo "error: the sweep ended with status $$status; the report shows what was recorded" >&2; \
	$(PY) -m bench.report results/$(1) || { report=$$?; test $$status -ne 0 || status=$$report; }; \
	exit $$status
endef

plan: corpus ## predict the longest sequences and largest batches that fit into GPU_MEM, e.g. GPU_MEM=24GiB
	@$(call sweep-and-report,fits,measure.budget=$(strip $(GPU_MEM)))

bench-layers: $(STAMP) ## compare single layers with dense attention in time and memory; writes results/layers
	@$(PY) -m bench.tools.bench_layers $(ARGS)

gallery: $(STAMP) ## draw which tokens each token reads, for every variant; writes results/gallery
	@$(PY) -m bench.tools.gallery $(ARGS)

launches: $(STAMP) ## plan what each variant launches on an accelerator, and estimate its time; writes docs/launches.md
	@$(PY) -m bench.tools.launches --out docs/launches.md $(ARGS)

# Without network, the preset uses another corpus than plays.
gpu-report: $(STAMP) ## try everything on a GPU within MINUTES (25), and measure what is left; writes results/gpu-report
	@$(PY) -m bench.corpora fetch plays || true
	@$(PY) -m bench.tools.gpu_report --minutes $(or $(strip $(MINUTES)),25) $(ARGS)

# The task of the second preset is no text. The records end in few files, which can be committed with claims.md.
claims: corpus ## check claims of the literature on this machine (half an hour); writes results/claims/claims.md
	@status=0; \
	$(PY) -m bench experiment=claims $(ARGS) || status=$$?; \
	$(PY) -m bench experiment=claims_recall $(filter-out data=% data.%,$(ARGS)) || status=$$?; \
	$(PY) -m bench.records compact results/claims || status=$$?; \
	test $$status -eq 0 || echo "error: the sweep ended with status $$status; claims.md lists what was not measured" >&2; \
	$(PY) -m bench.claims results/claims || { claims=$$?; test $$status -ne 0 || status=$$claims; }; \
	$(PY) -m bench.report results/claims || { report=$$?; test $$status -ne 0 || status=$$report; }; \
	exit $$status

report: named $(STAMP) ## rebuild the report of results/NAME, e.g. NAME=cpu
	@$(PY) -m bench.report results/$(strip $(NAME))

named:
	@test -n '$(strip $(NAME))' || { echo "error: NAME is not set; run for example make report NAME=cpu" >&2; exit 1; }

# The notebooks read the committed reference run, or the experiment NAME.
notebooks: $(STAMP) ## run the notebooks on results/NAME or the reference run; writes outputs/notebooks
	@mkdir -p outputs/notebooks
	@$(if $(strip $(NAME)),RESULTS='$(CURDIR)/results/$(strip $(NAME))') $(PY) $(VENV)/bin/jupyter-execute \
		--output='../outputs/notebooks/{notebook_name}' $(wildcard notebooks/*.ipynb)
	@echo "notebooks with outputs: outputs/notebooks"

notebooks-docs: $(STAMP) ## run the notebooks and write them as pages with pictures; writes docs/notebooks
	@$(PY) -m bench.tools.notebook_pages $(ARGS)

# One worker per core, at most four, because each loads torch. A file's tests run on one worker, so that they share
# its fixtures. In the files' own order: the one with most tests is not the one that takes longest.
test: corpus ## run the short tier of the tests; ARGS='-k name' selects some
	@$(PY) -m pytest $(PARALLEL) $(ARGS)

PARALLEL := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test-slow: corpus ## run all other cases, and the tests that take minutes
	@$(PY) -m pytest -m $(SLOW) $(ARGS)

test-touched: corpus ## run the slow tests about what a change touched; with MINUTES=10 start none after so long
	@$(PY) -m pytest -m $(SLOW) --touched $(if $(strip $(MINUTES)),--minutes $(MINUTES)) $(ARGS)

SLOW := 'slow and not cuda and not peers'

test-cuda: corpus ## run the tests that need a CUDA device
	@$(PY) -m pytest -m 'cuda and not peers' $(ARGS)

# In a separate environment, so that other projects' packages cannot affect measurements.
test-peers: ## compare with other projects' implementations, in .venv-peers
	@$(MAKE) --no-print-directory compare VENV='$(VENV)-peers' EXTRAS='[dev,peers]' PINS='$(CONSTRAINTS) constraints/peers.txt'

# xformers without its dependencies: its wheel requires a specific torch, and only its masks are used. Of espnet two
# files are used, which need torch alone. block-recurrent-transformer-pytorch requires a package that it does not
# import, and that does not install. The kernels of fla-core run in Triton's interpreter; torch for GPUs brings its
# own Triton.
compare: $(STAMP)
	@$(PY) -m pip install -q --no-deps xformers==$(XFORMERS) fla-core==$(FLA_CORE) espnet==$(ESPNET) \
		block-recurrent-transformer-pytorch==$(BLOCK_RECURRENT)
	@$(PY) -c 'import triton' 2> /dev/null || $(PY) -m pip install -q --no-deps triton==3.6.0
	@$(PY) -m pytest -m peers $(ARGS)

XFORMERS := $(shell sed -n 's/^xformers==//p' constraints/gpu.txt)
FLA_CORE := $(shell sed -n 's/^fla-core==//p' constraints/gpu.txt)
ESPNET := $(shell sed -n 's/^espnet==//p' constraints/peers.txt)
BLOCK_RECURRENT := $(shell sed -n 's/^block-recurrent-transformer-pytorch==//p' constraints/peers.txt)

lint: $(STAMP) ## check style, formatting and types
	@status=0; \
	$(PY) -m ruff check . || status=1; \
	$(PY) -m ruff format --check . || status=1; \
	$(PY) -m mypy || status=1; \
	exit $$status

format: $(STAMP) ## format the code and apply automatic fixes
	@$(PY) -m ruff check --fix-only .
	@$(PY) -m ruff format .

clean: ## remove caches and build outputs
	@rm -rf build dist *.egg-info multirun outputs .pytest_cache .hypothesis .mypy_cache .ruff_cache
	@find bench variants tests -name __pycache__ -type d -prune -exec rm -rf {} +
	@echo "kept results/ and $(VENV)$(if $(filter clean,$(MAKECMDGOALS)), (make distclean removes $(VENV)))"

distclean: clean ## clean, and also remove the environments
	@for venv in $(VENV) $(VENV)-peers; do \
		test ! -f $$venv/pyvenv.cfg || { rm -rf $$venv; echo "removed $$venv"; }; \
	done
