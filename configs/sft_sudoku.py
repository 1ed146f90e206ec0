"""SFT of a tiny LLaDA on 4x4 Sudoku: makes the bundled base model.

Two runs, both on a laptop's CPU (`make tiny-sudoku` runs them in order):

    python -m agrpo_jax.sft --config=configs/sft_sudoku.py
    python -m agrpo_jax.sft --config=configs/sft_sudoku.py:careless

The first learns Sudoku from clean solutions, from random parameters. The second
goes on from it on careless demonstrations, most of which fill each row in
increasing order whatever the columns and boxes hold: it buries what the first
learned under a bad habit, which is what reinforcement learning then removes.
"""

from agrpo_jax import config as config_lib


def get_config(arg: str = "clean") -> config_lib.ConfigDict:
  c = config_lib.sft()
  config_lib.use_task(c, "sudoku", protocol="bare")
  c.data.max_prompt_length = 64
  c.data.bucket = 8
  c.model.dtype = "float32"
  c.sft.completion_length = 16
  c.sft.batch_size = 128
  c.sft.microbatch = 128
  c.optimizer.warmup_steps = 20
  c.train.checkpoint_every = 100
  c.train.keep = 1
  if arg == "clean":
    c.workdir = "runs/sft_sudoku_clean"
    c.model.network = dict(num_layers=4, width=64, num_heads=4, mlp_width=192)
    c.optimizer.learning_rate = 2e-3
    c.train.num_steps = 1500
    c.sft.output = "runs/tiny_sudoku_clean"
  elif arg == "careless":
    c.workdir = "runs/sft_sudoku_careless"
    c.model.path = "runs/tiny_sudoku_clean"
    c.task.options.demonstration = "careless"
    c.optimizer.learning_rate = 5e-4
    c.train.num_steps = 250
    c.sft.output = "runs/tiny_sudoku"
  else:
    raise ValueError(f"sft_sudoku.py:{arg} is not clean or careless")
  return c
