"""Speed, use of the hardware, and cost, from what a run logged."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from agrpo_jax.models import base
from agrpo_jax.models import transformer
from agrpo_jax.plan import chips
from agrpo_jax.report import logs

_EVALUATE = "seconds/evaluate"


@dataclasses.dataclass(frozen=True)
class Cost:
  """What a run has taken.

  Attributes:
    seconds: of the train steps in the log, None where none is timed. Loading,
      and steps that were lost to a kill and done again, are not in it.
    chip_hours: of these; None where no session says how many devices.
    seconds_left: until the last train step at the present pace, None where
      there is none yet, or none any more: the run has stopped.
    chip_hours_left: of these.
  """

  seconds: float | None
  chip_hours: float | None
  seconds_left: float | None
  chip_hours_left: float | None


def cost(log: logs.Log) -> Cost:
  """Returns what a run has taken, and what the rest of it will."""
  by_step = [logs.step_seconds(record) for record in log.records]
  is_timed = any(by_step) or not by_step
  is_known = bool(log.sessions) and is_timed
  chip_seconds = 0.0
  for record, seconds in zip(log.records, by_step, strict=True):
    session = session_of(log, int(record["train_step"]))
    if session is not None:
      chip_seconds += seconds * num_chips(session)
  left = None
  recent = [seconds for seconds in by_step[1:] if seconds][-50:]
  if log.num_steps and recent and not log.is_stopped:
    num_left = max(0, log.num_steps - log.num_done)
    left = num_left * sum(recent) / len(recent)
  return Cost(
    seconds=sum(by_step) if is_timed else None,
    chip_hours=chip_seconds / 3600 if is_known else None,
    seconds_left=left,
    chip_hours_left=(
      left * num_chips(log.sessions[-1]) / 3600
      if is_known and left is not None
      else None
    ),
  )


def session_of(log: logs.Log, train_step: int) -> Mapping[str, Any] | None:
  """Returns the start of the run that did a train step, None if unknown."""
  found = None
  for session in log.sessions:
    if session["first_step"] <= train_step:
      found = session
  return found


def num_chips(session: Mapping[str, Any]) -> float:
  """Returns the chips that are paid for; of an unknown kind, the devices."""
  chip = chips.of_device(session["device_kind"])
  return session["num_devices"] / (chip.per_chip if chip else 1)


def tokens_per_second(log: logs.Log) -> list[tuple[int, float]]:
  """Returns (train steps done, completion tokens per second) of each step.

  All C tokens of a completion count, as on the console; evaluations do not.
  """
  per_step = math.prod(
    log.setting(key, 0)
    for key in (
      "rollout.num_prompts",
      "rollout.group_size",
      "rollout.completion_length",
    )
  )
  found = []
  for record in log.records:
    seconds = logs.step_seconds(record) - record.get(_EVALUATE, 0.0)
    if per_step and seconds > 0:
      found.append((int(record["train_step"]) + 1, per_step / seconds))
  return found


def flops_per_second(log: logs.Log) -> list[tuple[int, float, float | None]]:
  """Returns (train steps done, model FLOP/s, share of the peak) of each step.

  Products of the network that the run needs, without padding and without what
  the backward pass computes again: rollouts by their denoising steps, updates
  by the states that they visit, three forward passes each or, beside a frozen
  base, two. The share (MFU) is of the chips' datasheet peak in bfloat16, and
  None where the device is not in `plan/chips.py`.
  """
  if log.setting("kind") != "rl":
    return []
  found = []
  for record in log.records:
    session = session_of(log, int(record["train_step"]))
    prompt_length = record.get("prompts/mean_length")
    seconds = logs.step_seconds(record) - record.get(_EVALUATE, 0.0)
    if session is None or prompt_length is None or seconds <= 0:
      continue
    shape = _shape(session)
    if shape is None:
      continue
    rate = _step_flops(log, record, shape, prompt_length) / seconds
    chip = chips.of_device(session["device_kind"])
    share = rate / (chip.flops * session["num_devices"]) if chip else None
    found.append((int(record["train_step"]) + 1, rate, share))
  return found


def _shape(session: Mapping[str, Any]) -> base.Shape | None:
  """Returns the network's shape; None if another version wrote others."""
  names = {field.name for field in dataclasses.fields(base.Shape)}
  network = session.get("network") or {}
  try:
    return base.Shape(**{k: v for k, v in network.items() if k in names})
  except TypeError:
    return None


def _step_flops(
  log: logs.Log,
  record: Mapping[str, float],
  shape: base.Shape,
  prompt_length: float,
) -> float:
  completion_length = log.setting("rollout.completion_length")
  length = round(prompt_length) + completion_length
  wanted = max(
    1, completion_length // log.setting("rollout.num_denoise_steps", 1)
  )
  num_rows = log.setting("rollout.num_prompts") * log.setting(
    "rollout.group_size"
  )
  num_steps = record["completions/mean_denoise_steps"] * num_rows
  num_whole = record["completions/mean_whole_passes"] * num_rows
  units, visits = record["draws/units"], record["draws/visits"]
  passes = 2 if log.setting("lora.rank", 0) else 3
  cache = log.setting("rollout.cache", "none")
  row = transformer.forward_flops(shape, length, wanted)
  if cache == "none":
    return row * (num_steps + passes * visits)
  block_length = log.setting("rollout.block_length")
  window = shape.attention_block or block_length
  if cache == "prefix":  # the mean over blocks: each has its own length
    window = (completion_length + block_length) // 2
  state = transformer.forward_flops(shape, length, wanted, window)
  memory = transformer.forward_flops(shape, length, 0)
  return (
    state * num_steps
    + memory * num_whole
    + passes * (state * visits + memory * units)
  )


def missing(log: logs.Log) -> list[str]:
  """Says what the page cannot show, since the run did not record it."""
  found: Sequence[tuple[bool, str]] = (
    (
      not log.sessions,
      "Hardware and versions are not recorded: the run is older than this "
      "page. Chip hours and MFU need them.",
    ),
    (
      cost(log).seconds is None,
      "The seconds of train steps are not recorded; time, chip hours and speed "
      "need them.",
    ),
    (
      log.setting("kind") == "rl"
      and log.num_done > 0
      and not any("unmasking" in one for one in log.completions),
      "No completion has its denoising steps recorded, so none can be played.",
    ),
    (
      bool(log.evaluations()) and not log.before,
      "There is no held-out evaluation from before the first train step.",
    ),
    (
      log.num_unreadable > 0,
      f"{log.num_unreadable} lines of the log are unreadable and left out.",
    ),
  )
  return [words for is_so, words in found if is_so]
