"""AGRPO on Countdown with two numbers, a tiny LLaDA in four blocks of four.

    agrpo sft --config=sft_reasoning:pairs
    agrpo sft --config=sft_reasoning:adding
    agrpo train --config=countdown_tiny

Two CPU cores, nothing to download, minutes. A completion works the value out
and then answers: "45-13=32", and on the next line "45-13". The base model has
learned to, and then the habit of adding, whatever the target.
"""

from agrpo_jax import config as config_lib


def get_config() -> config_lib.ConfigDict:
  c = config_lib.rl()
  c.workdir = "runs/countdown_tiny"
  c.model.path = "./runs/tiny_countdown"
  c.model.dtype = "float32"
  config_lib.use_task(c, "countdown", protocol="worked", num_numbers=2)
  c.data.max_prompt_length = 64
  c.data.bucket = 16  # one length for all: the step compiles once

  c.rollout.num_prompts = 8
  c.rollout.group_size = 16
  c.rollout.batch_size = 128
  c.rollout.completion_length = 16
  c.rollout.block_length = 4
  c.rollout.num_denoise_steps = 8

  c.objective.step_rule = "all"
  c.objective.microbatch = 128

  c.optimizer.learning_rate = 3e-4
  c.optimizer.warmup_steps = 3
  c.train.num_steps = 60
  c.train.checkpoint_every = 20

  c.evaluate.every = 20
  c.evaluate.num_examples = 256
  c.evaluate.batch_size = 128
  c.evaluate.completion_length = 16
  c.evaluate.block_length = 4
  c.evaluate.num_denoise_steps = 16
  c.evaluate.unmask_rule = "confidence"
  return c
