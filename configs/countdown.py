r"""AGRPO on Countdown (3 numbers) with LLaDA-8B-Instruct.

    agrpo train --config=countdown \
      --config.workdir=runs/countdown

Problems are generated, those of the test split never occur in training. The
released code ships no settings for this task: these are its GSM8K ones with the
shorter completions that the task needs. Hardware as for configs/gsm8k.py, about
0.6 of its time per train step (calculated). Not run at this size here.
"""

from agrpo_jax import config as config_lib


def get_config() -> config_lib.ConfigDict:
  c = config_lib.rl()
  config_lib.paper(c)
  c.workdir = "runs/countdown"
  c.model.path = "GSAI-ML/LLaDA-8B-Instruct"
  c.lora.rank = 64
  config_lib.use_task(c, "countdown", protocol="agrpo")
  c.data.bucket = 128
  c.rollout.batch_size = 64
  c.rollout.completion_length = 252
  c.rollout.block_length = 12
  c.rollout.num_denoise_steps = 84
  c.rollout.temperature = 0.6
  c.rollout.top_p = 0.99
  c.rollout.top_k = 150
  c.objective.microbatch = 16
  c.optimizer.learning_rate = 5e-6
  c.optimizer.warmup_steps = 10
  c.train.num_steps = 1000
  c.evaluate.every = 100
  c.evaluate.confidence = "model"
  return c
