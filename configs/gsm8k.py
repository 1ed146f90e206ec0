r"""AGRPO on GSM8K with LLaDA-8B-Instruct: the settings released with the paper.

    agrpo train --config=gsm8k \
      --config.workdir=runs/gsm8k

Hardware and hours, calculated from FLOPs (docs/hardware.md), not measured:
8 GPUs of 80 GB or a TPU v5e-32; about 40 s of pure arithmetic per train step on
8 H200, 2,335 train steps, so a day at the floor and about two in practice.
Expected: the paper's abstract (version 2) reports 9.9 points more accuracy on
GSM8K than the model it starts from; not reproduced here.

The estimator is the released one (`config.paper`), but one optimizer update is
taken per rollout, as the paper writes. The released launcher takes one per
draw: `--config.objective.updates_per_batch=24`.

The batches and the recomputation set here fit the machines of
docs/hardware.md, 8 GPUs of 80 GB among them; `gsm8k:v5e` (also v6e,
v5p, h100) makes more of those machines, `:rtx4090` fits one card of 24 GB, its
layers in int8; `:exact` takes our exact estimator instead; `:v5e,exact` both.
`:prefix` and `:dual` draw with Fast-dLLM's caches and score through them, every
step of half of the blocks; `:threshold` unmasks by confidence, as many tokens
at once as pass 0.9 (`:dual,threshold` both): our exact estimator in all of
these.
`:debug` shrinks the run to two small train steps that any machine can do, e.g.
with

    --config.model.path=tiny-sudoku --config.data.path=DIR
"""

from agrpo_jax import config as config_lib

# Devices that share the frozen base, completions drawn at once, (completion,
# step) pairs at once, recomputation.
_MACHINES = {
  "v5e": (2, 128, 32, "dots"),  # 32 chips
  "v6e": (1, 64, 32, "dots"),  # 16 chips
  "v5p": (1, 128, 32, "dots"),  # 4 chips
  "h100": (1, 64, 32, "full"),  # 8 GPUs of 80 GB
  "rtx4090": (1, 16, 2, "full"),  # 1 card, or any of 24 GB
}
_CACHES = ("prefix", "dual")
_VARIANTS = (*_MACHINES, *_CACHES, "threshold", "exact", "debug")


def get_config(arg: str = "") -> config_lib.ConfigDict:
  asked = set(arg.split(",")) - {""}
  if asked - set(_VARIANTS):
    raise ValueError(f"gsm8k.py:{arg} is not of {', '.join(_VARIANTS)}")
  c = config_lib.rl()
  c.workdir = config_lib.run_folder("gsm8k", arg)
  c.seed = 333
  c.model.path = "GSAI-ML/LLaDA-8B-Instruct"
  c.lora.rank = 64
  c.lora.alpha = 64.0
  config_lib.use_task(c, "gsm8k", protocol="agrpo")
  c.data.bucket = 128

  c.rollout.num_prompts = 16
  c.rollout.group_size = 8
  c.rollout.batch_size = 64
  c.rollout.completion_length = 384
  c.rollout.block_length = 12
  c.rollout.num_denoise_steps = 128
  c.rollout.unmask_rule = "random"
  c.rollout.temperature = 0.6
  c.rollout.top_p = 0.99
  c.rollout.top_k = 150

  c.objective.num_mc_steps = 24
  c.objective.num_mc_blocks = 16  # of 32, under a cache
  c.objective.microbatch = 32  # a pair for each of 32 devices
  c.model.remat = "full"
  if not asked & {"exact", "threshold", *_CACHES}:
    config_lib.paper(c)
  for cache in asked.intersection(_CACHES):
    config_lib.use_cache(c, cache)
  if "threshold" in asked:
    c.rollout.unmask_rule = "threshold"
    c.rollout.threshold = 0.9
  for machine in asked & _MACHINES.keys():
    tensor, batch_size, microbatch, remat = _MACHINES[machine]
    c.mesh.update(data=-1, fsdp=1, tensor=tensor)
    # Steps on windows read all weights for few tokens: many rows at once.
    c.rollout.batch_size = 128 if asked.intersection(_CACHES) else batch_size
    c.objective.microbatch = microbatch
    c.model.remat = remat
    if "prefix" in asked:
      # Windows that reach to the end are as long as the completion, and a unit
      # has four.
      c.objective.microbatch = 16
      c.model.remat = "full"
  if "rtx4090" in asked:
    c.model.quantize = "int8"  # in bfloat16 the base alone takes 16 GB
    if asked.intersection(_CACHES):
      # Keys and values of a row are 0.5 GB.
      c.rollout.batch_size = 8
      c.objective.microbatch = 1

  c.optimizer.learning_rate = 5e-6
  c.optimizer.warmup_steps = 23  # 1 %
  c.train.num_steps = 2335  # five epochs
  c.train.checkpoint_every = 15

  c.evaluate.every = 100
  c.evaluate.num_examples = 256
  c.evaluate.batch_size = min(64, c.rollout.batch_size)
  c.evaluate.confidence = "model"
  c.grading.num_workers = 8

  if "debug" in asked:
    c.model.dtype = "float32"
    c.lora.rank = 4
    c.data.max_prompt_length = 2048
    c.rollout.update(
      num_prompts=2,
      group_size=2,
      batch_size=4,
      completion_length=24,
      num_denoise_steps=8,
    )
    c.objective.num_mc_steps = 2
    c.objective.num_mc_blocks = 1
    c.objective.microbatch = 4
    c.optimizer.warmup_steps = 0
    c.train.num_steps = 2
    c.evaluate.update(
      every=2,
      num_examples=4,
      batch_size=4,
      completion_length=32,
      num_denoise_steps=8,
    )
    c.grading.num_workers = 1
  return c
