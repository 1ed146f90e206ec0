"""AGRPO on 4x4 Sudoku with the bundled tiny LLaDA: what `make demo` runs.

    agrpo train --config=sudoku_tiny

Two CPU cores, minutes, nothing to download. The base model learned Sudoku and
then a careless habit on top of it (configs/sft_sudoku.py); training on the
share of blanks filled right brings out what it knows. It does not show
reinforcement learning teaching the task from nothing.

`sudoku_tiny:blocks` draws completions in two blocks, and `:dual`
with Fast-dLLM's dual cache besides, scored through the cache at every step.
`:sdar` and `:a2d` train tiny models of other families, which
`configs/sft_sudoku.py` makes; SDAR's with its exact cache in blocks of four.
"""

from agrpo_jax import config as config_lib

_VARIANTS = ("", "blocks", "dual", "sdar", "a2d")


def get_config(variant: str = "") -> config_lib.ConfigDict:
  if variant not in _VARIANTS:
    raise ValueError(
      f"sudoku_tiny.py:{variant} is not of {', '.join(_VARIANTS[1:])}"
    )
  c = config_lib.rl()
  c.workdir = config_lib.run_folder("sudoku_tiny", variant)
  c.model.path = "tiny-sudoku"
  c.model.dtype = "float32"
  config_lib.use_task(c, "sudoku", protocol="bare", num_examples=20_000)
  c.data.max_prompt_length = 64
  c.data.bucket = 8

  c.rollout.num_prompts = 8
  c.rollout.group_size = 16
  c.rollout.batch_size = 128
  c.rollout.completion_length = 16
  c.rollout.block_length = 16
  c.rollout.num_denoise_steps = 8

  c.objective.num_mc_steps = 2
  c.objective.microbatch = 256

  c.optimizer.learning_rate = 3e-4
  c.optimizer.warmup_steps = 5
  c.train.num_steps = 120
  c.train.checkpoint_every = 40

  c.evaluate.every = 10
  c.evaluate.num_examples = 512
  c.evaluate.batch_size = 128
  c.evaluate.completion_length = 16
  c.evaluate.block_length = 16
  c.evaluate.num_denoise_steps = 16
  c.evaluate.unmask_rule = "confidence"

  if variant in ("blocks", "dual"):
    c.rollout.block_length = c.evaluate.block_length = 8
  if variant == "dual":
    c.rollout.cache = c.evaluate.cache = "dual"
    c.objective.step_rule = "all"
    c.objective.microbatch = 64  # blocks, of four steps each
  if variant in ("sdar", "a2d"):
    c.model.path = f"./runs/tiny_sudoku_{variant}"
  if variant == "sdar":
    # Of 20 tokens up to 3 are the prompt's.
    for draw in (c.rollout, c.evaluate):
      draw.update(completion_length=20, block_length=4, cache="block")
    c.rollout.num_denoise_steps = 10
    c.evaluate.num_denoise_steps = 20
    c.objective.step_rule = "all"
    c.objective.microbatch = 64  # completions, of ten steps each
  return c
