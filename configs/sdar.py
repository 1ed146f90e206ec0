r"""AGRPO with SDAR, a block-causal model, as it is decoded when it is deployed.

    agrpo train --config=sdar --config.workdir=runs/sdar

Blocks of four tokens, all of them at once that pass 0.9, the exact cache of
block-causal models: keys and values of finished blocks are computed once, and
an update visits every step that ran. Variants, which may be combined
(`sdar.py:math,4b`):

  * `math`: MATH in place of GSM8K, with longer completions;
  * `4b`, `1.7b`: smaller models than 8B; `trado`: TraDo-8B, made of it by
    reinforcement learning.

Adapters on a frozen bfloat16 base that lies whole on every device, for 8 GPUs
of 80 GB or 16 TPU v6e. What they take is in docs/hardware.md: planned, not
measured, and what they gain is not known.
"""

from agrpo_jax import config as config_lib

_MODELS = {
  "8b": "JetLM/SDAR-8B-Chat",
  "4b": "JetLM/SDAR-4B-Chat",
  "1.7b": "JetLM/SDAR-1.7B-Chat",
  "trado": "Gen-Verse/TraDo-8B-Instruct",
}
_VARIANTS = ("math", *_MODELS)


def get_config(variants: str = "") -> config_lib.ConfigDict:
  asked = {*variants.split(",")} - {""}
  models = asked & {*_MODELS}
  if not asked <= {*_VARIANTS} or len(models) > 1:
    raise ValueError(
      f"sdar.py:{variants} is not of {', '.join(_VARIANTS)}, with one model"
    )
  c = config_lib.rl()
  c.workdir = config_lib.run_folder("sdar", variants)
  c.model.path = _MODELS[models.pop() if models else "8b"]
  c.model.remat = "full"
  c.mesh.data, c.mesh.fsdp = -1, 1
  c.lora.rank = 64
  c.lora.alpha = 64.0
  config_lib.use_task(c, "gsm8k")
  c.data.bucket = 128

  c.rollout.num_prompts = 16
  c.rollout.group_size = 8
  c.rollout.batch_size = c.evaluate.batch_size = 128
  for draw in (c.rollout, c.evaluate):
    draw.completion_length = 256
    draw.block_length = 4
    draw.num_denoise_steps = 256
    draw.unmask_rule = "dynamic"
    draw.threshold = 0.9
    draw.eos_per_block = "any"
  c.evaluate.confidence = "model"
  config_lib.use_cache(c, "block")
  c.objective.step_rule = "all"
  c.objective.microbatch = 16  # completions, with all of their steps

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
