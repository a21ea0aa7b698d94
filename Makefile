# One virtual environment does everything; torch comes first so that nothing else pulls in a CUDA build of it.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := outputs/demo_$(shell date +%Y-%m-%d_%H-%M-%S)
export PYTHONUNBUFFERED = 1

.PHONY: help demo theory overopt test test-slow check fix bench
help: ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

$(VENV)/.ready: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,eval]'
	touch $@

# Two sweeps side by side, one thread each: the model is too small for more. eta 0 is DPO, bit for bit. A signal ends both.
demo: $(VENV)/.ready ## train SFT, DPO and RPO on the embedded task; print the table, draw the picture
	@OMP_NUM_THREADS=1 $(BIN)/python train.py recipe=demo max_steps=1 eval_every=0 data.gold.samples=8 run_dir=$(DEMO)/first_use
	@end() { trap '' INT TERM HUP; kill $$a $$b 2>/dev/null; wait; exit $$1; }; \
	trap 'end 129' HUP; trap 'end 130' INT; trap 'end 143' TERM; \
	OMP_NUM_THREADS=1 $(BIN)/python train.py -m recipe=demo loss.eta=0,0.05 seed=0,1,2 run_dir=$(DEMO)/a 2> >(trap '' INT TERM HUP; tail -3 >&2) & a=$$!; \
	OMP_NUM_THREADS=1 $(BIN)/python train.py -m recipe=demo loss.eta=0.005,0.25 seed=0,1,2 run_dir=$(DEMO)/b & b=$$!; \
	wait $$a && wait $$b || end $$?
	@$(BIN)/python -m rpo.synthetic.demo $(DEMO)/a $(DEMO)/b

theory: $(VENV)/.ready ## check the theorem, number by number; draw the toy of overoptimisation
	@$(BIN)/python -m rpo.theory

overopt: $(VENV)/.ready ## the study of overoptimisation: 160 runs over 5 seeds, 90 minutes; begun again it goes on
	@$(BIN)/python -m rpo.overopt.experiment outputs/overopt

# Two processes of one thread each: most tests are too small for more. A file stays in one, for its fixtures.
test: $(VENV)/.ready ## the test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(VENV)/.ready ## the tests that start many processes or take long
	$(BIN)/python -m pytest -m slow

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
