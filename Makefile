# Two commands: `make demo` and `make test`. Each first makes its environment ready, which takes minutes only once.
#
#   make demo ARGS="--optimizer adamw"     options of launch/train.py
#   make test ARGS="-k plan"               options of pytest
#   make demo PYTHON=python3.12            the Python that .venv is made with

# The environment that is active, or else one of our own.
ENVIRONMENT := $(or $(VIRTUAL_ENV),$(CONDA_PREFIX),.venv)
PYTHON ?= python3
ARGS ?=

RUN := "$(ENVIRONMENT)/bin/python" -m

# One thread a process: the processes share the cores already.
export OMP_NUM_THREADS := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-full checked clean

help:
	@echo "make demo        train a small language model with KL-Shampoo, a few minutes; ARGS= goes to launch/train.py"
	@echo "make test        lint, type-check and test; ARGS= goes to pytest"
	@echo "make test-full   the same with all cases of every test, not some of them"
	@echo "make clean       remove what these made here: .venv, runs and caches"

demo:
	@.ci/environment "$(ENVIRONMENT)" "$(PYTHON)" job
	@gpus=$$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU') || gpus=2; \
	if [ "$$gpus" -gt 8 ]; then gpus=8; fi; \
	$(RUN) torch.distributed.run --standalone --nproc-per-node "$$gpus" launch/train.py $(ARGS)

checked:
	@.ci/environment "$(ENVIRONMENT)" "$(PYTHON)" job,dev,plan,lightning,deepspeed,huggingface,docs
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy
	"$(ENVIRONMENT)/bin/lint-imports"

# One worker for what runs on ranks, which are several processes themselves, and one for all else.
PYTEST := $(RUN) pytest --numprocesses 2 --dist loadgroup

test: checked
	$(PYTEST) $(ARGS)

test-full: checked
	$(PYTEST) -m "not slow" $(ARGS)

clean:
	rm -rf .venv runs build dist *.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
