"""What can be wrong with a config, all of it in one message.

Cheap: nothing is loaded, downloaded or compiled.
"""

import pathlib
from typing import Any

from agrpo_jax import config
from agrpo_jax import errors
from agrpo_jax import objectives
from agrpo_jax import optimizer
from agrpo_jax.samplers import sampling as sampling_lib


def check(c: config.ConfigDict) -> None:
  """Raises UserError naming all `problems` of a config."""
  found = problems(c)
  if found:
    raise errors.UserError(
      "The config has "
      + (f"{len(found)} problems" if len(found) > 1 else "a problem")
      + ":\n"
      + "\n".join(f"  config.{problem}" for problem in found)
    )


def problems(c: config.ConfigDict) -> list[str]:
  """Everything that is wrong with a config; nothing is loaded or compiled."""
  found = list(_common_problems(c))
  if "rollout" in c:
    found += _rl_problems(c)
  if "sft" in c:
    found += _sft_problems(c)
  return found


class _Checks(list):
  """Problems found so far."""

  def want(self, is_fine: bool, key: str, value: Any, legal: str) -> None:
    if not is_fine:
      self.append(f"{key}={value!r} must be {legal}")

  def known(self, key: str, value: Any, choices: tuple[str, ...]) -> None:
    self.want(value in choices, key, value, f"one of {', '.join(choices)}")

  def positive(self, key: str, sub: config.ConfigDict, *names: str) -> None:
    for name in names:
      self.want(sub[name] >= 1, f"{key}.{name}", sub[name], "at least 1")


def _common_problems(c: config.ConfigDict) -> _Checks:
  found = _Checks()
  found.want(bool(c.workdir), "workdir", c.workdir, "the folder of this run")
  found.known("model.dtype", c.model.dtype, config.DTYPES)
  found.known("model.remat", c.model.remat, config.REMAT)
  found.known("model.attention", c.model.attention, config.ATTENTION)
  lora = c.lora
  found.want(lora.rank >= 0, "lora.rank", lora.rank, "0 (off) or more")
  if lora.rank:
    found.want(lora.alpha > 0, "lora.alpha", lora.alpha, "positive")
    found.want(bool(lora.targets), "lora.targets", lora.targets, "not empty")
    for target in lora.targets:
      found.known("lora.targets", target, config.LORA_TARGETS)
  if "sft" not in c or not c.data.path:
    found.want(
      bool(c.task.name or c.task.path),
      "task.name",
      c.task.name,
      "a task's name, or task.path the file of one",
    )
  found.positive("data", c.data, "max_prompt_length", "bucket")
  found.positive("train", c.train, "num_steps", "checkpoint_every", "keep")
  found.want(
    c.train.log_samples >= 0, "train.log_samples", c.train.log_samples, ">= 0"
  )
  for name in ("path", "test_path"):
    found.want(
      not c.data[name] or pathlib.Path(c.data[name]).expanduser().exists(),
      f"data.{name}",
      c.data[name],
      "an existing file or folder",
    )
  return found


def _sampling_problems(key: str, sub: config.ConfigDict) -> list[str]:
  settings = sampling_lib.Sampling(
    mask_id=0, eos_id=0, **config.sampling_settings(sub)
  )
  return [f"{key}.{problem}" for problem in sampling_lib.problems(settings)]


def _rl_problems(c: config.ConfigDict) -> list[str]:
  found = _Checks()
  found.want(bool(c.model.path), "model.path", "", "a checkpoint to train")
  rollout, o = c.rollout, c.objective
  sampling_found = _sampling_problems("rollout", rollout)
  found += sampling_found
  found.want(
    rollout.temperature > 0,
    "rollout.temperature",
    rollout.temperature,
    "positive: without chance there is no policy gradient",
  )
  if not sampling_found:
    num_blocks = rollout.completion_length // rollout.block_length
    steps = rollout.num_denoise_steps // num_blocks
    found.want(
      rollout.block_length % steps == 0,
      "rollout.num_denoise_steps",
      rollout.num_denoise_steps,
      f"such that its {steps} steps a block divide "
      f"block_length={rollout.block_length}: training wants the same number "
      "of tokens at every step",
    )
  found.positive("rollout", rollout, "num_prompts", "batch_size")
  found.want(
    rollout.group_size >= 2,
    "rollout.group_size",
    rollout.group_size,
    "at least 2: a completion is compared with the rest of its group",
  )
  rows = rollout.num_prompts * rollout.group_size
  found.want(
    rollout.batch_size < 1 or rows % rollout.batch_size == 0,
    "rollout.batch_size",
    rollout.batch_size,
    f"a divisor of num_prompts * group_size = {rows}",
  )
  found.positive("objective", o, "microbatch")
  found.known("objective.name", o.name, tuple(objectives.OBJECTIVES))
  if o.name in objectives.OBJECTIVES and not sampling_found:
    settings = config.objective_settings(o)
    sampling = sampling_lib.Sampling(
      mask_id=0, eos_id=0, **config.sampling_settings(rollout)
    )
    found += [f"objective.{p}" for p in settings.problems(sampling)]
  found.want(
    rollout.unmask_rule != "threshold",
    "rollout.unmask_rule",
    rollout.unmask_rule,
    "random, confidence or entropy: threshold is for evaluation",
  )
  if o.updates_per_batch >= 1:
    found += optimizer.problems(config.optimizer_settings(c))
  found += _sampling_problems("evaluate", c.evaluate)
  found.positive("evaluate", c.evaluate, "batch_size")
  every, keep_best = c.evaluate.every, c.train.keep_best
  found.want(every >= 0, "evaluate.every", every, ">= 0")
  found.want(keep_best >= 0, "train.keep_best", keep_best, "0 (off) or more")
  found.positive("grading", c.grading, "num_workers")
  for name in ("timeout_seconds", "memory_gib"):
    value = c.grading[name]
    found.want(value > 0, f"grading.{name}", value, "positive")
  return list(found)


def _sft_problems(c: config.ConfigDict) -> list[str]:
  found = _Checks()
  found.want(
    bool(c.model.path) != bool(len(c.model.network)),
    "model.path",
    c.model.path,
    "set, or model.network for random parameters, and not both",
  )
  found.positive("sft", c.sft, "completion_length", "batch_size", "microbatch")
  found.want(
    c.sft.microbatch < 1 or c.sft.batch_size % c.sft.microbatch == 0,
    "sft.microbatch",
    c.sft.microbatch,
    f"a divisor of batch_size={c.sft.batch_size}",
  )
  found += optimizer.problems(config.optimizer_settings(c))
  return list(found)
