"""LLaDA-8B-Instruct on GSM8K as each objective's own experiments had it.

    agrpo train --config=published:espo

What an objective's authors set for GSM8K, as far as our trainer has it: without
4-bit bases and dropout of adapters; the projections that their names reach in
LLaDA; batches of so many prompts and completions in one optimizer update. Where
a paper ran something else (a block-causal model, pairs from a data set), the
nearest that this sampler draws. `docs/objectives.md` says what was published
for other tasks. None of these runs was repeated here.
"""

from agrpo_jax import config as config_lib
from agrpo_jax import objectives

# The trainers that grew out of d1's: adapters on q, k, v and up (the other
# names that they list do not exist in LLaDA), 16 prompts x 6.
_D1 = {
  "lora.rank": 128,
  "lora.alpha": 64.0,
  "lora.targets": ("q", "k", "v", "up"),
  "optimizer.learning_rate": 3e-6,
  "optimizer.schedule": "constant",
  "optimizer.weight_decay": 0.1,
  "optimizer.clip_norm": 0.2,
  "rollout.num_prompts": 16,
  "rollout.group_size": 6,
  "rollout.batch_size": 96,
  "rollout.unmask_rule": "confidence",
  "rollout.confidence": "model",
  "rollout.temperature": 0.9,
}
# All parameters are trained.
_FULL = {
  "lora.rank": 0,
  "optimizer.schedule": "constant",
  "optimizer.weight_decay": 0.0,
}
_ONE_TOKEN = {"rollout.num_denoise_steps": 256}

PUBLISHED = {
  "agrpo": {
    "optimizer.learning_rate": 5e-6,
    "optimizer.warmup_steps": 20,  # 1 % of the updates
    "rollout.num_prompts": 16,
    "rollout.group_size": 8,
    "rollout.batch_size": 64,
    "rollout.completion_length": 384,
    "rollout.block_length": 12,
    "rollout.temperature": 0.6,
    "rollout.top_k": 150,
    "rollout.top_p": 0.99,
    "lora.rank": 64,
  },
  "bgpo": {
    **_FULL,
    "optimizer.learning_rate": 5e-7,
    "rollout.num_prompts": 16,
    "rollout.group_size": 8,
    "rollout.batch_size": 64,
    "rollout.completion_length": 512,
    "rollout.unmask_rule": "confidence",
    "rollout.num_denoise_steps": 256,
  },
  "cj_grpo": {
    **_D1,
    "rollout.completion_length": 128,
    "rollout.block_length": 64,
    "rollout.num_denoise_steps": 32,
  },
  "coupled_grpo": {
    **_FULL,
    "optimizer.learning_rate": 1e-6,
    "optimizer.schedule": "cosine",
    "optimizer.weight_decay": 0.1,
    "optimizer.clip_norm": 0.2,
    "rollout.num_prompts": 8,
    "rollout.group_size": 10,
    "rollout.batch_size": 80,
    "rollout.unmask_rule": "entropy",
    "rollout.top_p": 0.95,
    **_ONE_TOKEN,
  },
  "diffpo": _D1,
  "diffu_grpo": _D1,
  "dipo": {
    **_FULL,
    "optimizer.learning_rate": 1e-6,
    "rollout.num_prompts": 128,
    "rollout.group_size": 8,
    "rollout.batch_size": 64,
    "rollout.block_length": 4,
    "rollout.unmask_rule": "dynamic",
    "rollout.threshold": 0.9,
    "rollout.top_k": 50,
  },
  "dmpo": {
    **_D1,
    "optimizer.learning_rate": 1e-6,
    "rollout.num_prompts": 4,
    "rollout.group_size": 16,
    "rollout.batch_size": 64,
    "rollout.temperature": 0.2,
    "rollout.cache": "prefix",
  },
  "espo": {
    **_D1,
    "optimizer.warmup_steps": 16,  # 0.1 % of 2000 times 8 updates
    "optimizer.weight_decay": 0.01,
    "rollout.temperature": 1.0,
    **_ONE_TOKEN,
  },
  "gdpo": {**_D1, "optimizer.learning_rate": 3e-7},
  "just_grpo": {
    **_FULL,
    "optimizer.learning_rate": 5e-6,
    "optimizer.b2": 0.999,
    "rollout.num_prompts": 64,
    "rollout.group_size": 16,
    "rollout.batch_size": 64,
    "rollout.block_length": 1,
    **_ONE_TOKEN,
  },
  "random_mask": {
    **_FULL,
    "optimizer.learning_rate": 1e-6,
    "optimizer.b2": 0.999,
    "rollout.num_prompts": 32,
    "rollout.group_size": 8,
    "rollout.batch_size": 64,
    "rollout.completion_length": 512,
    "rollout.num_denoise_steps": 512,
    "rollout.unmask_rule": "confidence",
    "rollout.confidence": "model",
    "rollout.temperature": 0.8,
    "rollout.cache": "prefix",
    "objective.max_eos": 0,
  },
  "spg": _D1,
  "tbrm": _D1,
  "uni_grpo": _D1,
  "vine_ppo": {
    **_FULL,
    "optimizer.learning_rate": 1e-6,
    "rollout.num_prompts": 8,
    "rollout.group_size": 8,
    "rollout.batch_size": 64,
    "rollout.temperature": 0.6,
    "rollout.top_p": 0.9,
    "objective.kl_coef": 1e-4,
  },
  "vrpo": {
    **_FULL,
    "optimizer.learning_rate": 5e-7,
    "optimizer.schedule": "cosine",
    "optimizer.b2": 0.95,
    "optimizer.warmup_steps": 15,
    "optimizer.weight_decay": 0.01,
    "rollout.num_prompts": 16,
    "rollout.group_size": 4,
    "rollout.batch_size": 64,
    "rollout.unmask_rule": "confidence",
  },
  # On half of the devices.
  "wd1": {**_D1, "rollout.num_prompts": 8, "rollout.batch_size": 48},
}
PUBLISHED["trace_rl"] = PUBLISHED["random_mask"]
"""Objective -> what differs from `config.rl()`."""


def get_config(name: str = "agrpo") -> config_lib.ConfigDict:
  if name not in objectives.NAMES:
    raise ValueError(f"published.py:{name} is not of {', '.join(PUBLISHED)}")
  c = config_lib.rl()
  c.workdir = f"runs/{name}"
  c.model.path = "GSAI-ML/LLaDA-8B-Instruct"
  c.model.remat = "full"
  config_lib.use_task(c, "gsm8k", protocol="agrpo")
  c.data.bucket = 128
  if name == "agrpo":
    config_lib.paper(c)
  else:
    config_lib.use_objective(c, name)
  c.update_from_flattened_dict(PUBLISHED[name])
  c.objective.microbatch = 16
  c.train.num_steps = 2000
  c.evaluate.every = 100
  c.evaluate.confidence = "model"
  c.evaluate.batch_size = 64
  return c
