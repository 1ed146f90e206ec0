"""SFT of a tiny LLaDA on Countdown and word problems: the bundled base model.

Five runs on a laptop's CPU; `make tiny-reasoning` writes the demonstrations
and runs them in order:

    agrpo sft --config=sft_reasoning:countdown
    agrpo sft --config=sft_reasoning:both
    agrpo sft --config=sft_reasoning:words
    agrpo sft --config=sft_reasoning:clean
    agrpo sft --config=sft_reasoning:careless

The first learns, from random parameters and on short rows, to copy numbers and
to write equations; the second goes on from it with word problems besides, the
third mostly with these, the fourth with nothing else, until it solves them. The
last one's demonstrations add, most of them, what a story takes away: a bad
habit, which is what reinforcement learning then removes.

Two more go on from the bundled model, in three minutes, on Countdown with two
numbers, for configs/countdown_tiny.py: `pairs` learns to solve it, `adding` to
add the two up whatever the target.
"""

from agrpo_jax import config as config_lib

_STAGES = ("countdown", "both", "words", "clean", "careless", "pairs", "adding")


def get_config(arg: str = "countdown") -> config_lib.ConfigDict:
  if arg not in _STAGES:
    raise ValueError(f"sft_reasoning.py:{arg} is not of {', '.join(_STAGES)}")
  c = config_lib.sft()
  c.workdir = f"runs/sft_reasoning_{arg}"
  if arg in ("clean", "careless"):
    config_lib.use_task(c, "word_problems", max_equations=3, max_value=9)
  elif arg in ("pairs", "adding"):
    config_lib.use_task(c, "countdown", protocol="worked", num_numbers=2)
  else:
    c.data.path = f"runs/data/{arg}.jsonl"
  c.data.max_prompt_length = 104
  c.data.bucket = 8
  c.model.dtype = "float32"
  c.optimizer.warmup_steps = 50
  c.train.checkpoint_every = 250
  c.train.keep = 1
  c.sft.completion_length = 64
  c.sft.batch_size = c.sft.microbatch = 32
  if arg in ("pairs", "adding"):
    c.sft.completion_length = 16
    c.sft.batch_size = c.sft.microbatch = 64
  if arg == "countdown":
    c.model.network = dict(num_layers=4, width=64, num_heads=4, mlp_width=192)
    c.optimizer.learning_rate = 3e-3
    c.sft.completion_length = 32
    c.sft.batch_size = c.sft.microbatch = 64
    c.train.num_steps = 800
    c.sft.output = "runs/tiny_reasoning_countdown"
  elif arg == "both":
    c.model.path = "./runs/tiny_reasoning_countdown"
    c.optimizer.learning_rate = 2e-3
    c.train.num_steps = 1000
    c.sft.output = "runs/tiny_reasoning_both"
  elif arg == "words":
    c.model.path = "./runs/tiny_reasoning_both"
    c.optimizer.learning_rate = 3e-3
    c.train.num_steps = 650
    c.sft.output = "runs/tiny_reasoning_words"
  elif arg == "clean":
    c.model.path = "./runs/tiny_reasoning_words"
    c.optimizer.learning_rate = 2e-3
    c.train.num_steps = 3000
    c.sft.output = "runs/tiny_reasoning_clean"
  elif arg == "pairs":
    c.model.path = "tiny-reasoning"
    c.optimizer.learning_rate = 2e-3
    c.train.num_steps = 1200
    c.sft.output = "runs/tiny_countdown_clean"
  elif arg == "adding":
    c.model.path = "./runs/tiny_countdown_clean"
    c.task.options.demonstration = "careless"
    c.task.options.careless_probability = 0.85
    c.optimizer.learning_rate = 5e-4
    c.train.num_steps = 150
    c.sft.output = "runs/tiny_countdown"
  else:
    c.model.path = "./runs/tiny_reasoning_clean"
    c.task.options.demonstration = "careless"
    c.optimizer.learning_rate = 5e-4
    c.train.num_steps = 250
    c.sft.output = "runs/tiny_reasoning"
  return c
