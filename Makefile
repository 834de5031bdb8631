PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
TRITON_VENV = .venv-triton
TRITON_BIN = $(TRITON_VENV)/bin
DEMO = out/demo
CONFIGS = teacache off taylorseer adacache custom

PARALLEL = -n 2 --dist loadfile --no-loadscope-reorder -rs

.PHONY: help install demo test test-python test-all lint style cpp triton triton-server test-triton test-gpu bench clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

install: $(BIN)/.installed ## Make .venv with pinned versions

$(BIN)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

demo: install ## Build the demo model, run every policy, write videos and a table to out/demo
	$(BIN)/freewheel build models/shapes_wan --out $(DEMO)/bundle --force $(CONFIGS:%=--config shapes_wan_%)
	$(BIN)/freewheel bench $(DEMO)/bundle --prompt "a yellow star moving right on a navy background" --out $(DEMO)
	@echo "videos, contact_sheet.png and bench.md are in $(DEMO)"

test: style ## Run lint and what a change can break: minutes
	@$(MAKE) -j2 test-python triton-server TIER="$(TIER)"
	@if $(MAKE) build/cpp/build.ninja $(TRITON_BIN)/.installed; then $(MAKE) test-triton TIER="$(TIER)"; \
	else echo "no C++ tools or no wheel of the server here: 'make test-triton' is left out"; fi

test-python: install
	@mkdir -p out
	$(BIN)/python -m pytest --basetemp out/tests $(PARALLEL) $(TIER)

triton-server: # is fetched beside the tests that do without it; those that want it say if it is missing
	-@$(MAKE) $(TRITON_BIN)/.installed

test-all: ## Run lint and all tests, nightly ones too: kills, soaks, full crosses, training, load
	$(MAKE) test TIER="-m ''"

triton: install build/cpp/build.ninja ## Build the Triton backend into build/cpp/backends
	ninja -C build/cpp triton_freewheel freewheel-run c_run

test-triton: triton $(TRITON_BIN)/.installed ## Test the Triton backend against a real server
	$(BIN)/python tests/triton_server/prepare.py out/triton-tests out/tests/freewheel-cache
	FREEWHEEL_PYTHON=$(BIN)/python $(TRITON_BIN)/python -m pytest tests/triton_server --confcutdir tests/triton_server $(TIER)

build/cpp/build.ninja: $(BIN)/.installed
	cmake -S cpp -B build/cpp -G Ninja -DOpenVINO_DIR="$$($(BIN)/python -c 'import freewheel; from openvino.utils import get_cmake_path as p; print(p())')"

$(TRITON_BIN)/.installed: tests/triton_server/requirements.txt
	$(PYTHON) -m venv $(TRITON_VENV)
	$(TRITON_BIN)/pip install -q -r $<
	touch $@

test-gpu: install ## Run what needs an NVIDIA GPU and write docs/gpu-report.md
	$(BIN)/python -m pytest tests/gpu

lint: style ## Check style and types, as CI does
	$(BIN)/python tests/typecheck.py

style: install # the tests check types, beside the others
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

cpp: install build/cpp/build.ninja ## Build libfreewheel and freewheel-run in build/cpp, and run GoogleTest
	ninja -C build/cpp
	ctest --test-dir build/cpp --output-on-failure

bench: install ## Measure steps at real width, and what low precision changes (half an hour)
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/precision.py

clean: ## Remove what the other targets made
	rm -rf $(VENV) $(TRITON_VENV) out build
