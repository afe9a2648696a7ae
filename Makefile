# Two commands on a fresh machine: `make demo` and `make test`. Both set everything up in .venv first.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The suite's processes share the machine: one BLAS thread each unless the caller says otherwise.
export OMP_NUM_THREADS ?= 1
# A bench's process keeps what it frees, as every process of ours that computes with a model does (`keep_freed_memory`).
KEPT := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1

.PHONY: setup demo test e2e gpu lint types contracts security check bench bench-gpu chaos study slow-link fuzz proto clean help

help:            ## this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:[^#]*##/\t/' | expand -t 14

setup: $(STAMP)  ## create .venv and install the project with all extras

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(f"error: Foedus needs Python 3.11 or newer, this is {sys.version.split()[0]}; set PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# torch alone and by version: so pip takes a CPU build where one is offered.
	$(BIN)/pip install --quiet 'torch==2.13.0'
	$(BIN)/pip install --quiet -c constraints.txt -e '.[client,coordinator,simulation,dev]'
	touch $(STAMP)

demo: setup      ## run the main job: three organisations train one adapter privately on invented text
	$(BIN)/foedus demo $(DEMO_FLAGS)

test: setup      ## unit and end-to-end tests on a CPU, then the list of what was skipped and why
	$(BIN)/pytest -n 2 --dist loadgroup --durations=20

e2e: setup       ## only the tests that start real processes
	$(BIN)/pytest -m e2e

gpu:             ## every kernel in float32 and bfloat16 on a CUDA device, with the torch and Triton that PYTHON has
	PYTHONPATH=kernels:protocols:model:tests $(PYTHON) -m pytest tests/kernels/device tests/model/test_streaming_gpu.py --confcutdir=tests/kernels/device -m gpu -q $(GPU_FLAGS)

lint: setup      ## ruff, formatting included
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup     ## mypy --strict
	$(BIN)/mypy

contracts: setup ## direction of imports
	$(BIN)/lint-imports

security: setup  ## bandit
	$(BIN)/bandit --quiet --recursive --severity-level medium -c pyproject.toml protocols kernels model client coordinator deploy

check: lint types contracts security  ## everything static

bench: setup     ## rounds, private step, attention, experts, a 20b layer, generation, beside their peers (BENCH_FLAGS, STEP_FLAGS, ...)
	$(BIN)/python tests/bench/rounds.py $(BENCH_FLAGS)
	$(KEPT) $(BIN)/python tests/bench/step.py $(STEP_FLAGS)
	$(KEPT) PYTHONPATH=tests $(BIN)/python tests/bench/attention.py $(ATTENTION_FLAGS)
	$(KEPT) PYTHONPATH=tests $(BIN)/python tests/bench/experts.py $(EXPERTS_FLAGS)
	$(KEPT) $(BIN)/python tests/bench/layer20b.py $(LAYER_FLAGS)
	$(KEPT) $(BIN)/python tests/bench/generation.py $(GENERATION_FLAGS)

bench-gpu:       ## kernels and whole steps on a CUDA device at the true shapes, with the torch, transformers, scipy and tokenizers that PYTHON has (GPU_BENCH_FLAGS)
	PYTHONPATH=kernels:model:protocols:client $(PYTHON) tests/bench/gpu.py $(GPU_BENCH_FLAGS)

chaos: setup     ## KILLS=200 random kills, freezes, cuts and torn writes (SEED=... repeats one), and what was lost
	PYTHONPATH=tests $(BIN)/python -m chaos --kills $(or $(KILLS),200) $(if $(SEED),--seed $(SEED))

study: setup     ## real text, three seeds, with and without privacy (DATA=folder with medical/ and legal/)
	$(BIN)/python tests/bench/study.py --data $(or $(DATA),../shared/data) $(STUDY_FLAGS)

slow-link: setup ## transfers and a run over 20 Mbit/s, 200 ms, 1 % loss (as root: lines of packets); idle lines, frozen peers
	PYTHONPATH=tests $(BIN)/python tests/net/slow_link.py $(SLOW_LINK_FLAGS)
	$(BIN)/pytest -m slow tests/net tests/protocols

fuzz: setup      ## every parser of bytes from outside, SECONDS=600 each (SEED=number, JOBS=2 at once)
	PYTHONPATH=tests $(BIN)/python tests/fuzz/run.py --seconds $(or $(SECONDS),600) --jobs $(or $(JOBS),2) $(if $(SEED),--seed $(SEED)) $(FUZZ_FLAGS)

proto: setup     ## regenerate the gRPC code
	cd protocols && ../$(BIN)/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. foedus_protocols/v1/*.proto

clean:           ## remove what make created, keep the environment
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache build dist
