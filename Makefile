# Every target does its own set-up. PYTHON=/path/to/python3.12 names the interpreter; ARGS is passed on.
python := .venv/bin/python
# One process a core; the tests of a file share what they set up.
pytest := $(python) -m pytest -n logical --dist loadfile
# Few and long: whoever is idle takes the next one, of whatever file.
stealing := $(python) -m pytest -n logical --dist worksteal
# LLVM does as little as it can: programs are compiled in two thirds of the time. What the slow tests run is compiled as for users.
quick := XLA_FLAGS="--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true $$XLA_FLAGS"

.PHONY: help setup demo test test-slow test-gpu test-tpu test-xla lint docs clean

help:
	@echo 'make demo        train a small language model as written and through kpt; report in kpt-report/demo.html'
	@echo 'make test        the default test suite'
	@echo 'make test-slow   the tests that take minutes'
	@echo 'make test-gpu    the tests that need an NVIDIA GPU'
	@echo 'make test-tpu    the tests that compile for TPUs, with none here'
	@echo 'make test-xla    the tests of PyTorch on XLA devices, on a CPU'
	@echo 'make lint        style and types'
	@echo 'make docs        the documentation site, into site/'
	@echo 'make clean       remove the environments'

setup:
	@PYTHON='$(PYTHON)' bash .ci/setup

demo: setup
	$(python) -m kpt.cli demo $(ARGS)

test: setup
	$(quick) $(pytest) $(ARGS)

test-slow: setup
	$(stealing) -m slow $(ARGS)

test-gpu: setup
	$(python) -m pytest -m 'gpu and not sanitizer' $(ARGS)
	$(python) -m pytest -m sanitizer

# libtpu has a place of its own: where jax finds it, it looks for a TPU at every start.
libtpu := .venv-libtpu
test-tpu: setup
	@test -d $(libtpu)/libtpu || $(python) -m pip install -qq --disable-pip-version-check -c constraints.txt --no-deps --target $(libtpu) libtpu
	PYTHONPATH=$(CURDIR)/$(libtpu) JAX_PLATFORMS=cpu $(stealing) -m tpu tests/jax tests/test_docs.py $(ARGS)

test-xla: setup
	PJRT_DEVICE=CPU JAX_PLATFORMS=cpu $(pytest) -m xla tests/torch $(ARGS)

lint: setup
	.venv/bin/ruff check .
	.venv/bin/mypy

docs: setup
	JAX_PLATFORMS=cpu $(python) -m sphinx -q -E -W --keep-going docs site $(ARGS)

clean:
	rm -rf .venv .venv-* site
