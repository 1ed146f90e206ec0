"""SFT of a tiny LLaDA on Countdown and word problems: the bundled base model.

Three runs on a laptop's CPU; `make tiny-reasoning` writes the demonstrations
and runs them in order:

    python -m agrpo_jax.sft --config=configs/sft_reasoning.py:countdown
    python -m agrpo_jax.sft --config=configs/sft_reasoning.py:both
    python -m agrpo_jax.sft --config=configs/sft_reasoning.py:words

The first learns, from random parameters and on short rows, to copy numbers and
to write equations; the second goes on from it with word problems besides, the
third mostly with these. It ends while the model still calculates badly, so that
reinforcement learning has something to do.
"""

from agrpo_jax import config as config_lib


def get_config(arg: str = "countdown") -> config_lib.ConfigDict:
  if arg not in ("countdown", "both", "words"):
    raise ValueError(f"sft_reasoning.py:{arg} is not countdown, both or words")
  c = config_lib.sft()
  c.workdir = f"runs/sft_reasoning_{arg}"
  c.data.path = f"runs/data/{arg}.jsonl"
  c.data.max_prompt_length = 104
  c.data.bucket = 8
  c.model.dtype = "float32"
  c.optimizer.warmup_steps = 50
  c.train.checkpoint_every = 250
  c.train.keep = 1
  c.sft.completion_length = 64
  c.sft.batch_size = c.sft.microbatch = 32
  if arg == "countdown":
    c.model.network = dict(num_layers=4, width=64, num_heads=4, mlp_width=192)
    c.optimizer.learning_rate = 3e-3
    c.sft.completion_length = 32
    c.sft.batch_size = c.sft.microbatch = 64
    c.train.num_steps = 800
    c.sft.output = "runs/tiny_reasoning_countdown"
  elif arg == "both":
    c.model.path = "runs/tiny_reasoning_countdown"
    c.optimizer.learning_rate = 2e-3
    c.train.num_steps = 1000
    c.sft.output = "runs/tiny_reasoning_both"
  else:
    c.model.path = "runs/tiny_reasoning_both"
    c.optimizer.learning_rate = 3e-3
    c.train.num_steps = 650
    c.sft.output = "runs/tiny_reasoning"
  return c
