r"""AGRPO with Fast-dLLM v2, a block-causal model made of Qwen2.5.

    agrpo train --config=fast_dllm_v2 \
      --config.workdir=runs/fast_dllm_v2

As its own sampler decodes: blocks of 32 tokens in parts of 8, in each all
tokens at once that pass 0.9, and the first token of a block alone, before the
others, from what the block before predicts. With the exact cache of
block-causal models. Variants, which may be combined (`fast_dllm_v2.py:math`):

  * `math`: MATH in place of GSM8K, with longer completions;
  * `1.5b`: the smaller model.

Adapters on a frozen bfloat16 base that lies whole on every device, for 8 GPUs
of 80 GB. What they take is in docs/hardware.md: planned, not measured, and what
they gain is not known.
"""

from agrpo_jax import config as config_lib

_VARIANTS = ("math", "1.5b")


def get_config(variants: str = "") -> config_lib.ConfigDict:
  asked = {*variants.split(",")} - {""}
  if not asked <= {*_VARIANTS}:
    raise ValueError(
      f"fast_dllm_v2.py:{variants} is not of {', '.join(_VARIANTS)}"
    )
  c = config_lib.rl()
  c.workdir = config_lib.run_folder("fast_dllm_v2", variants)
  size = "1.5B" if "1.5b" in asked else "7B"
  c.model.path = f"Efficient-Large-Model/Fast_dLLM_v2_{size}"
  c.model.remat = "full"
  c.mesh.data, c.mesh.fsdp = -1, 1
  c.lora.rank = 64
  c.lora.alpha = 64.0
  if "1.5b" in asked:
    # All but the head, which is the table of embeddings.
    c.lora.targets = ("q", "k", "v", "attn_out", "gate", "up", "down")
  config_lib.use_task(c, "gsm8k")
  c.data.bucket = 128

  c.rollout.num_prompts = 16
  c.rollout.group_size = 8
  c.rollout.batch_size = c.evaluate.batch_size = 128
  for draw in (c.rollout, c.evaluate):
    draw.completion_length = 256
    draw.block_length = 8
    draw.lead_every = 32
    draw.num_denoise_steps = 256
    draw.unmask_rule = "dynamic"
    draw.threshold = 0.9
    draw.eos_per_block = "any"
  config_lib.use_cache(c, "block")
  c.objective.num_mc_blocks = 8  # parts of 8 tokens, of 32
  c.objective.microbatch = 8  # completions, with 64 steps in eight parts

  c.optimizer.learning_rate = 5e-6
  c.optimizer.warmup_steps = 10
  c.train.num_steps = 400
  c.train.checkpoint_every = 20
  c.evaluate.every = 50
  c.evaluate.num_examples = 256
  c.grading.num_workers = 8

  if "math" in asked:
    config_lib.use_task(c, "math")
    c.rollout.completion_length = c.evaluate.completion_length = 512
    c.rollout.num_denoise_steps = c.evaluate.num_denoise_steps = 512
  return c
