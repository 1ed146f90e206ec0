r"""AGRPO on GSM8K with Tiny-A2D, a chat model of 0.6 billion parameters.

    agrpo train --config=a2d \
      --config.workdir=runs/a2d

Qwen3-0.6B made bidirectional. Adapters on a frozen bfloat16 base, for one GPU
of 24 GB; `:t4` is for one that has 16 GB and no bfloat16. What they take is in
docs/hardware.md: planned, not measured, and what they gain is not known.

`:bd3lm` trains the variant whose attention is block-causal, with its exact
cache; `:math` trains on MATH in place of GSM8K. They may be combined
(`a2d.py:math,t4`).
"""

from agrpo_jax import config as config_lib

_VARIANTS = ("t4", "bd3lm", "math")


def get_config(variants: str = "") -> config_lib.ConfigDict:
  asked = {*variants.split(",")} - {""}
  if not asked <= {*_VARIANTS}:
    raise ValueError(f"a2d.py:{variants} is not of {', '.join(_VARIANTS)}")
  c = config_lib.rl()
  c.workdir = config_lib.run_folder("a2d", variants)
  c.model.path = "dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1"
  c.model.remat = "full"
  c.lora.rank = 32
  c.lora.alpha = 32.0
  # All but the head, which is the table of embeddings.
  c.lora.targets = ("q", "k", "v", "attn_out", "gate", "up", "down")
  config_lib.use_task(c, "math" if "math" in asked else "gsm8k")
  c.data.bucket = 128

  c.rollout.num_prompts = 8
  c.rollout.group_size = 8
  c.rollout.batch_size = 64
  c.rollout.completion_length = 256
  c.rollout.block_length = 32
  c.rollout.num_denoise_steps = 128
  c.rollout.unmask_rule = "confidence"
  c.rollout.temperature = 0.8
  config_lib.use_cache(c, "dual")
  c.objective.num_mc_blocks = 4  # of eight
  c.objective.microbatch = 4  # blocks, of 16 steps each

  c.optimizer.learning_rate = 3e-5
  c.optimizer.warmup_steps = 10
  c.train.num_steps = 400
  c.train.checkpoint_every = 20
  c.evaluate.every = 50
  c.evaluate.num_examples = 256
  c.evaluate.batch_size = 64
  c.evaluate.confidence = "model"

  if "bd3lm" in asked:
    c.model.path = "dllm-hub/Qwen3-0.6B-diffusion-bd3lm-v0.1"
    c.model.attention_block = 32
    config_lib.use_cache(c, "block")
    c.rollout.batch_size = c.evaluate.batch_size = 32
    c.objective.microbatch = 1  # completions, with 64 steps in four blocks
  if "t4" in asked:
    c.model.dtype = "float32"
    c.rollout.num_prompts = 4
    c.rollout.batch_size = c.evaluate.batch_size = 32
    c.objective.microbatch = 1
  return c
