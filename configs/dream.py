r"""AGRPO on GSM8K with Dream-7B, in the order of its own sampler.

    agrpo train --config=dream \
      --config.workdir=runs/dream

Least entropy first over the whole completion, with Dream's schedule: the order
does not look at the tokens drawn, so that a step is scored by those that it
unmasked. Adapters on a frozen bfloat16 base that lies whole on every device,
for 8 GPUs of 80 GB or 16 TPU v6e. Variants, which may be combined:

  * `h200`: for one GPU of 141 GB;
  * `math`: MATH in place of GSM8K;
  * `dual`: blocks of 32, with Fast-dLLM's cache.

What they take is in docs/hardware.md: planned, not measured, and what they gain
is not known.
"""

from agrpo_jax import config as config_lib

_VARIANTS = ("h200", "math", "dual")


def get_config(variants: str = "") -> config_lib.ConfigDict:
  asked = {*variants.split(",")} - {""}
  if not asked <= {*_VARIANTS}:
    raise ValueError(f"dream.py:{variants} is not of {', '.join(_VARIANTS)}")
  c = config_lib.rl()
  c.workdir = config_lib.run_folder("dream", variants)
  c.model.path = "Dream-org/Dream-v0-Instruct-7B"
  c.model.remat = "full"
  c.mesh.data, c.mesh.fsdp = -1, 1
  c.lora.rank = 64
  c.lora.alpha = 64.0
  config_lib.use_task(c, "math" if "math" in asked else "gsm8k")
  c.data.bucket = 128

  c.rollout.num_prompts = 16
  c.rollout.group_size = 8
  c.rollout.batch_size = 64
  for drawing in (c.rollout, c.evaluate):
    drawing.completion_length = drawing.block_length = 256
    drawing.num_denoise_steps = 128
    drawing.schedule = "dream"
    drawing.unmask_rule = "entropy"
  c.rollout.temperature = 0.8
  c.objective.num_mc_steps = 16
  c.objective.microbatch = 32  # (completion, step) pairs

  c.optimizer.learning_rate = 5e-6
  c.optimizer.warmup_steps = 10
  c.train.num_steps = 400
  c.train.checkpoint_every = 20
  c.evaluate.every = 50
  c.evaluate.num_examples = 256
  c.evaluate.batch_size = 64
  c.grading.num_workers = 8

  if "dual" in asked:
    config_lib.use_cache(c, "dual")
    # Steps on windows read all weights for few tokens: many rows at once.
    c.rollout.batch_size = 128
    c.rollout.block_length = c.evaluate.block_length = 32
    c.objective.num_mc_blocks = 4  # of eight
    c.objective.microbatch = 16  # blocks, of 16 steps each
  if "h200" in asked:
    c.rollout.num_prompts = 8
    c.rollout.batch_size = c.evaluate.batch_size = 16
    c.objective.microbatch = 1 if "dual" in asked else 8
  return c
