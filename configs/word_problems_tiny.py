"""AGRPO on word problems with a bundled tiny LLaDA, in eight blocks of eight.

    agrpo train --config=word_problems_tiny:dual

Two CPU cores, nothing to download, minutes. The base model has learned to solve
the stories, and then to add what they take away (configs/sft_reasoning.py);
benchmarks/results/word_problems_tiny.md says what runs gained.

`:dual` draws with Fast-dLLM's dual cache and scores every step through it.
"""

from agrpo_jax import config as config_lib

_VARIANTS = ("", "dual")


def get_config(variant: str = "") -> config_lib.ConfigDict:
  if variant not in _VARIANTS:
    raise ValueError(f"word_problems_tiny.py:{variant} is not of dual")
  c = config_lib.rl()
  c.workdir = config_lib.run_folder("word_problems_tiny", variant)
  c.model.path = "tiny-reasoning"
  c.model.dtype = "float32"
  config_lib.use_task(c, "word_problems", max_equations=3, max_value=9)
  c.data.max_prompt_length = 104
  c.data.bucket = 88  # one length for all: the step compiles once

  c.rollout.num_prompts = 8
  c.rollout.group_size = 8
  c.rollout.batch_size = 64
  c.rollout.completion_length = 64
  c.rollout.block_length = 8
  c.rollout.num_denoise_steps = 32

  c.objective.num_mc_steps = 4
  c.objective.microbatch = 64

  c.optimizer.learning_rate = 5e-4
  c.optimizer.warmup_steps = 3
  c.train.num_steps = 40
  c.train.checkpoint_every = 20

  c.evaluate.every = 20
  c.evaluate.num_examples = 256
  c.evaluate.batch_size = 128
  c.evaluate.completion_length = 64
  c.evaluate.block_length = 8
  c.evaluate.num_denoise_steps = 64
  c.evaluate.unmask_rule = "confidence"

  if variant == "dual":
    c.rollout.cache = c.evaluate.cache = "dual"
    c.objective.step_rule = "all"
  return c
