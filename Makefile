# Everything runs in .venv/, which `make env` (a part of the others) makes with
# the pinned packages and keeps while pyproject.toml and requirements.txt stay
# the same. Only Python 3.11+ is needed. make PYTHON=... picks the interpreter.
.POSIX:

SEED = 0
PRESET = mid
# Test processes; 2 suits two cores.
JOBS = 2
BIN = .venv/bin
# Without the advertisement of its makers' next product.
SITE = NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

help:
	@echo "make demo    train a tiny model on Sudoku (minutes, CPU); SEED=$(SEED)"
	@echo "make test    lint, types and tests; JOBS=$(JOBS) test processes"
	@echo "make docs    the documentation as a site, in build/site/"
	@echo "make dist    the wheel and the source archive, checked, in dist/"
	@echo "make bench   seconds and FLOP/s of a train step; PRESET=$(PRESET)"
	@echo "make tiny-sudoku  make the demo's base model again"
	@echo "make tiny-reasoning  make that of word problems again"
	@echo "make format  let ruff format the code and fix what it can"
	@echo "make env     only make or update .venv"
	@echo "make clean   remove .venv, dist and caches"

env:
	@PYTHON="$(PYTHON)" sh tools/env.sh

demo: env
	@$(BIN)/python -m agrpo_jax.demo --config=configs/sudoku_tiny.py --config.seed=$(SEED)

test: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(SITE)
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder

docs: env
	@$(SITE)
	@echo "build/site/index.html; with its search: .venv/bin/mkdocs serve"

# With the pinned setuptools of .venv; the wheel is made from the archive.
dist: env
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --constraint requirements.txt build twine
	@rm -rf dist
	@$(BIN)/python -m build --no-isolation >.venv/dist.log 2>&1 || \
	  { tail -n 25 .venv/dist.log >&2; exit 1; }
	@$(BIN)/twine check --strict dist/*

# The bundled base model (CPU, minutes): learn Sudoku, then a bad habit.
tiny-sudoku: env
	@$(BIN)/python -m agrpo_jax.sft --config=configs/sft_sudoku.py:clean
	@$(BIN)/python -m agrpo_jax.sft --config=configs/sft_sudoku.py:careless \
	  --config.sft.output=agrpo_jax/assets/tiny-sudoku

# The other one (CPU, an hour): Countdown in some orders of its problems, then
# word problems besides, mostly these, these alone, and at last a bad habit.
COUNTDOWN = $(BIN)/python -m agrpo_jax.tasks --show=countdown --split=train \
  --protocol=worked
tiny-reasoning: env
	@mkdir -p runs/data
	@for seed in 0 1 2 3; do \
	  $(COUNTDOWN) --option=max_number=12 --option=max_target=40 \
	    --option=num_examples=3000 --option=seed=$$seed \
	    --demonstrations=runs/data/large_$$seed.jsonl || exit 1; \
	done
	@for seed in 0 1 2 3 4 5 6 7; do \
	  $(COUNTDOWN) --option=max_number=9 --option=max_target=30 \
	    --option=num_examples=1200 --option=seed=$$seed \
	    --demonstrations=runs/data/small_$$seed.jsonl || exit 1; \
	done
	@$(BIN)/python -m agrpo_jax.tasks --show=word_problems --split=train \
	  --option=max_equations=3 --option=max_value=9 \
	  --option=num_examples=20000 --demonstrations=runs/data/stories.jsonl
	@cd runs/data && cat large_?.jsonl > countdown.jsonl
	@cd runs/data && cat small_?.jsonl stories.jsonl > both.jsonl
	@cd runs/data && cat small_[01].jsonl stories.jsonl > words.jsonl
	@$(BIN)/python -m agrpo_jax.sft --config=configs/sft_reasoning.py:countdown
	@$(BIN)/python -m agrpo_jax.sft --config=configs/sft_reasoning.py:both
	@$(BIN)/python -m agrpo_jax.sft --config=configs/sft_reasoning.py:words
	@$(BIN)/python -m agrpo_jax.sft --config=configs/sft_reasoning.py:clean
	@$(BIN)/python -m agrpo_jax.sft --config=configs/sft_reasoning.py:careless \
	  --config.sft.output=agrpo_jax/assets/tiny-reasoning

bench: env
	@$(BIN)/python benchmarks/step.py --preset=$(PRESET)

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help env demo test docs dist tiny-sudoku tiny-reasoning bench format clean
