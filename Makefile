# `make demo` and `make test` are all a newcomer needs; `make help` lists the rest.

.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

# The interpreter that runs everything. With another than the default, nothing is installed.
PY = .venv/bin/python
ifeq ($(PY),.venv/bin/python)
READY := .venv/.installed
endif

DEMO_MODEL := runs/demo/model
# The demo's tokenizer spends eight times as many tokens on Bengali as on English: other texts than its own need
# more room, and what still does not fit is counted and listed.
DATA_OPTIONS = --dataset $(DATA) --bad_rows drop

# Read by scripts/setup.sh.
export PYTHON TORCH_INDEX
# Nothing that is started here talks to the Hub.
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help setup demo test test-gpu gpu lint format smoke docs clean

help: ## this list
	@echo "make TARGET [NAME=value ...]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-9s %s\n", $$1, $$2 }' Makefile

.venv/.installed: pyproject.toml constraints.txt
	@scripts/setup.sh

setup: $(READY) ## set up .venv, which the other targets do when needed  [PYTHON=python3.12 TORCH_INDEX=URL]

demo: $(READY) ## align a real model on the CPU, show before and after  [DATA=FILE LIMIT=SOURCES ARGS="--key value"]
	@$(PY) -m mpo.jobs.demo --out $(DEMO_MODEL) >/dev/null
	@$(PY) scripts/train.py recipes/demo.yaml --model_name_or_path $(DEMO_MODEL) \
		$(if $(DATA),$(DATA_OPTIONS)) $(if $(LIMIT),--limit $(LIMIT)) $(ARGS)

test: $(READY) ## run the tests on two processes  [MPO_TEST_DATA=FOLDER ARGS="-k name"]
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist worksteal $(ARGS)

test-gpu: $(READY) ## run the tests that need a CUDA device  [PY=python3 for an environment of your own]
	@$(PY) -m pytest -q -m gpu $(ARGS)

gpu: $(READY) ## measure all that needs a GPU, in nine minutes  [LENGTHS=token_lengths.csv OUT=FOLDER PY=python3 ARGS="--only numerics"]
	@$(PY) -m benchmarks.gpu $(if $(LENGTHS),--lengths $(LENGTHS)) $(if $(OUT),--out $(OUT)) $(ARGS)

lint: $(READY) ## check style and types
	@$(PY) -m ruff check --quiet .
	@$(PY) -m ruff format --check --quiet .
	@$(PY) -m mypy

format: $(READY) ## let ruff rewrite what it can
	@$(PY) -m ruff check --quiet --fix --exit-zero .
	@$(PY) -m ruff format .

smoke: $(READY) ## train a tiny random Llama, Gemma-2 and Qwen2 through accelerate launch  [ARGS="--key value"]
	@OMP_NUM_THREADS=1 ACCELERATE_USE_CPU=true scripts/smoke.sh $(PY) $(ARGS)

docs: $(READY) ## build the documentation site into site/, with all links checked
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet
	@echo "Built site/index.html. With search: $(PY) -m http.server --directory site"

clean: ## remove caches and smoke runs, but neither .venv nor other runs
	@rm -rf runs/smoke site .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	@find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
