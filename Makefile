# One virtual environment does everything; torch comes first so that nothing else pulls in a CUDA build of it.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := outputs/demo_$(shell date +%Y-%m-%d_%H-%M-%S)
export PYTHONUNBUFFERED = 1

.PHONY: help demo theory overopt real test test-slow test-gpu test-versions check fix bench
help: ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

$(VENV)/.ready: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,eval,lora,4bit,tensorboard,launchers]'
	touch $@

# Two sweeps side by side, one thread each: the model is too small for more. eta 0 is DPO, bit for bit. A signal ends both.
# The trap of `end` is `:`, not '': bash prints a warning of its own where a second signal waits when it is made to be ignored.
demo: $(VENV)/.ready ## train SFT, DPO and RPO on the embedded task; print the table, draw the picture
	@OMP_NUM_THREADS=1 $(BIN)/python train.py recipe=demo max_steps=1 eval_every=0 data.gold.samples=8 run_dir=$(DEMO)/first_use
	@end() { trap : INT TERM HUP; kill $$a $$b 2>/dev/null; until wait; do :; done; exit $$1; }; \
	trap 'end 129' HUP; trap 'end 130' INT; trap 'end 143' TERM; \
	OMP_NUM_THREADS=1 $(BIN)/python train.py -m recipe=demo loss.eta=0,0.05 seed=0,1,2 run_dir=$(DEMO)/a 2> >(trap '' INT TERM HUP; tail -3 >&2) & a=$$!; \
	OMP_NUM_THREADS=1 $(BIN)/python train.py -m recipe=demo loss.eta=0.005,0.25 seed=0,1,2 run_dir=$(DEMO)/b & b=$$!; \
	wait $$a && wait $$b || end $$?
	@$(BIN)/python -m rpo.synthetic.demo $(DEMO)/a $(DEMO)/b

theory: $(VENV)/.ready ## check the theorem, number by number; draw the toy of overoptimisation
	@$(BIN)/python -m rpo.theory

overopt: $(VENV)/.ready ## the study of overoptimisation: 160 runs over 5 seeds, 90 minutes; begun again it goes on
	@$(BIN)/python -m rpo.overopt.experiment outputs/overopt

# Called again, each sweep goes on where it was stopped.
MODEL ?= HuggingFaceTB/SmolLM2-135M-Instruct
DATA ?= $(if $(RPO_TEST_DATA),$(RPO_TEST_DATA)/rasbt_polite_1100/pairs.jsonl.gz)
SEEDS ?= 0
REAL ?= outputs/real
REAL_RUN = $(BIN)/python train.py -m recipe=real model.path=$(MODEL) data.train=$(REAL)/data/train.jsonl data.eval=$(REAL)/data/eval.jsonl seed=$(SEEDS)
real: $(VENV)/.ready ## DPO and RPO of a real chat model: MODEL=, DATA= its pairs, SEEDS=0,1,2
	@test -n "$(DATA)" || { echo "error: DATA is not given: expected a file of preference pairs (docs/DATA.md has the forms); make real DATA=FILE" >&2; exit 2; }
	@$(BIN)/python -m rpo.data.split $(DATA) $(REAL)/data eval=80 train=224
	@$(REAL_RUN) loss=dpo loss.beta=0.1,0.5 run_dir=$(REAL)/dpo
	@$(REAL_RUN) loss=rpo_sum,rpo_avg loss.beta=0.1 loss.eta=0.25 run_dir=$(REAL)/rpo
	@$(BIN)/python eval.py task=report runs=[$(REAL)/dpo,$(REAL)/rpo] run_dir=$(REAL)/report

# Two processes of one thread each: most tests are too small for more. A file stays in one, for its fixtures.
test: $(VENV)/.ready ## the test suite
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(VENV)/.ready ## the tests that start many processes or take long
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n 2 --dist loadfile

test-gpu: $(VENV)/.ready ## the tests that need a CUDA device; all others run on CPUs
	$(BIN)/python -m pytest -m gpu

# Both ends of what is supported, as TORCH/TRANSFORMERS, each in an environment of its own: 6 GB, for these torches bring CUDA along.
VERSIONS ?= 2.11.0/5.17.0 2.14.1/5.24.0
CORE = tests/test_losses.py tests/test_stats.py tests/model tests/data/test_batch.py tests/training tests/runs/test_checkpoint.py \
	tests/distributed/test_fsdp.py tests/scripts/test_train.py
test-versions: ## the core's tests with the oldest and the newest torch and transformers (docs/VERSIONS.md)
	@for both in $(VERSIONS); do \
	venv=$(VENV)-$${both/\//-}; echo "torch/transformers $$both in $$venv"; \
	test -e $$venv/.ready || { $(PYTHON) -m venv $$venv && \
	$$venv/bin/python -m pip install -q torch==$${both%/*} transformers==$${both#*/} -e '.[dev]' && touch $$venv/.ready; } || exit; \
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $$venv/bin/python -m pytest -m 'not slow' -n 2 --dist loadfile $(CORE) || exit; done

check: $(VENV)/.ready ## lint and format, reporting only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

fix: $(VENV)/.ready ## lint and format, mending
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.ready ## time the step and a sweep against TRL, the log-probs against other heads, a checkpoint; 25 minutes
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[bench]'
	$(BIN)/python bench/step.py --lengths hh --compare trl
	$(BIN)/python bench/step.py --sweep 12 --compare trl
	$(BIN)/python bench/logprobs.py
	$(BIN)/python bench/checkpoint.py
