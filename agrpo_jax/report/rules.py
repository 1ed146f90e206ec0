"""What a person should know of a run, in words, with what to do about it.

`RULES` has all of them: each looks at a log and says what it found, or None.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from agrpo_jax.report import logs


@dataclasses.dataclass(frozen=True)
class Rule:
  """One kind of warning.

  Attributes:
    name: for tests and links.
    level: "stop": the run learns nothing, or something else than it should;
      "look": it may be worth a look.
    find: a log -> what is so, with numbers, or None.
    remedy: what to change.
  """

  name: str
  level: str
  find: Callable[[logs.Log], str | None]
  remedy: str


@dataclasses.dataclass(frozen=True)
class Found:
  """A rule that found something.

  Attributes:
    name: of the rule.
    level: of the rule.
    words: what is so.
    remedy: what to change.
  """

  name: str
  level: str
  words: str
  remedy: str


def find(log: logs.Log) -> list[Found]:
  """Returns all that the rules find, the worst first."""
  found = [
    Found(rule.name, rule.level, words, rule.remedy)
    for rule in RULES
    if (words := rule.find(log))
  ]
  return sorted(found, key=lambda one: one.level != "stop")


def _mean(values: list[float]) -> float:
  """Returns the mean of what is finite, NaN of nothing."""
  finite = [value for value in values if math.isfinite(value)]
  return sum(finite) / len(finite) if finite else math.nan


def _recent(log: logs.Log, name: str, num: int) -> float:
  """Returns the mean over the last `num` train steps; NaN if there are less."""
  values = log.values(name, num)
  return _mean(values) if len(values) == num else math.nan


def _run_length(values: list[float], is_so: Callable[[float], bool]) -> int:
  """Returns how many of the last values in a row are so."""
  num = 0
  for value in reversed(values):
    if not is_so(value):
      break
    num += 1
  return num


def _not_finite(log: logs.Log) -> str | None:
  if not log.records:
    return None
  record = log.records[-1]
  wrong = [name for name, value in record.items() if not math.isfinite(value)]
  if not wrong:
    return None
  return f"{', '.join(wrong)} of train step {log.num_done} is not finite."


def _no_spread(log: logs.Log) -> str | None:
  num = _run_length(log.values("frac_reward_zero_std"), lambda x: x >= 1)
  if num < 30:
    return None
  return (
    f"No group has had spread for {num} train steps: all completions of a "
    "prompt earn the same, and nothing is learned."
  )


def _little_spread(log: logs.Log) -> str | None:
  share = _recent(log, "frac_reward_zero_std", 30)
  if not share >= 0.8 or _no_spread(log):
    return None
  return (
    f"{100 * share:.0f} % of the groups of the last 30 train steps had no "
    "spread: most of what is drawn teaches nothing."
  )


def _ratios_off(log: logs.Log) -> str | None:
  most = 0.05 if log.setting("model.dtype") == "bfloat16" else 1e-3
  values = [x for x in log.values("policy_ratio/max_deviation") if x > most]
  if not values:
    return None
  return (
    f"Policy ratios are off 1 on the first update after a rollout, by up to "
    f"{max(values):.2g} (in {len(values)} of {len(log.records)} train steps): "
    "numerics. Rollouts and updates compute different probabilities."
  )


def _no_update(log: logs.Log) -> str | None:
  num = _run_length(log.values("grad_norm"), lambda x: x == 0)
  if num < 10:
    return None
  return f"The gradient has been zero for {num} train steps."


def _large_gradient(log: logs.Log) -> str | None:
  most = log.setting("optimizer.clip_norm", 0)
  norm = _recent(log, "grad_norm", 20)
  if not most or not norm > 20 * most:
    return None
  return (
    f"The gradient's norm is {norm:.3g} on average over the last 20 train "
    f"steps, {norm / most:.0f} times what it is clipped to."
  )


def _cut(log: logs.Log) -> str | None:
  share = _recent(log, "completions/clipped_ratio", 10)
  right = _recent(log, "accuracy", 10)
  # Where more are right than end by themselves, the limit is not what fails
  # them: a task may ask for just so many tokens.
  if not share >= 0.9 or right > 1 - share + 0.05:
    return None
  length = log.setting("rollout.completion_length")
  return (
    f"Nearly all completions ({100 * share:.0f} %) are cut at the limit of "
    f"{length} tokens."
  )


def _entropy_gone(log: logs.Log) -> str | None:
  values = [x for x in log.values("entropy") if math.isfinite(x)]
  if len(values) < 30:
    return None
  first, last = _mean(values[:10]), _mean(values[-10:])
  is_idle = _recent(log, "frac_reward_zero_std", 10) >= 0.5
  if not is_idle or last > 0.1 * first:
    return None
  return (
    f"The entropy fell from {first:.3g} to {last:.3g} nats, and half of the "
    "groups have no spread: little is left to explore."
  )


def _kl(log: logs.Log) -> str | None:
  value = _recent(log, "kl", 10)
  if not value > 0.5:
    return None
  return (
    "The KL divergence from the reference, as the objective estimates it, is "
    f"{value:.2g}: the policy is far from where it began."
  )


def _clipped(log: logs.Log) -> str | None:
  share = _recent(log, "clip_ratio/region_mean", 20)
  if not share > 0.3:
    return None
  return (
    f"{100 * share:.0f} % of the factors are clipped: the policy moves too far "
    "on one batch."
  )


def _below_best(log: logs.Log, *, is_trained: bool) -> str | None:
  """Says so where the best is of the trained policy, or of that before."""
  points = _accuracies(log)
  if len(points) < 2:
    return None
  step, best, error = max(points, key=lambda point: point[1])
  last_step, last, last_error = points[-1]
  is_below = best - last > 2 * math.hypot(error, last_error)
  if not is_below or is_trained != (step > 0):
    return None
  when = f"after train step {step}" if is_trained else "before training"
  return (
    f"Held-out accuracy is {100 * last:.1f} % after train step {last_step}, "
    f"below its best of {100 * best:.1f} % {when}, by more than two standard "
    "errors."
  )


def _reward_only(log: logs.Log) -> str | None:
  points = _accuracies(log)
  rewards = [x for x in log.values("reward") if math.isfinite(x)]
  if len(points) < 3 or len(rewards) < 20:
    return None
  first, last = _mean(rewards[:10]), _mean(rewards[-10:])
  (_, begin, error), (_, end, last_error) = points[0], points[-1]
  if last <= first or begin - end <= 2 * math.hypot(error, last_error):
    return None
  return (
    f"The reward rose from {first:.3g} to {last:.3g} while held-out accuracy "
    f"fell from {100 * begin:.1f} % to {100 * end:.1f} %."
  )


def _accuracies(log: logs.Log) -> list[tuple[int, float, float]]:
  """Returns (train steps done, held-out accuracy, standard error)."""
  return [
    (step, found["accuracy"], found.get("accuracy_standard_error", 0.0))
    for step, found in log.evaluations()
    if math.isfinite(found.get("accuracy", math.nan))
  ]


_FAILED, _TIMED_OUT = "grading/num_failed", "grading/num_timed_out"


def _share_ungraded(log: logs.Log, *names: str) -> tuple[float, int]:
  """Returns their share of completions, 0 if not known; of how many steps."""
  recent = log.records[-50:]
  per_step = log.setting("rollout.num_prompts", 0) * log.setting(
    "rollout.group_size", 0
  )
  num = sum(record.get(name, 0) for record in recent for name in names)
  total = per_step * len(recent)
  return num / total if total else 0.0, len(recent)


def _none_graded(log: logs.Log) -> str | None:
  share, num_steps = _share_ungraded(log, _FAILED, _TIMED_OUT)
  if not share >= 1:
    return None
  return (
    f"No completion of the last {num_steps} train steps could be graded: all "
    "count as 0, and nothing is learned."
  )


def _ungraded(log: logs.Log, name: str, what: str) -> str | None:
  share, num_steps = _share_ungraded(log, name)
  if not share > 0.01 or _none_graded(log):
    return None
  return (
    f"{what} for {100 * share:.1f} % of the completions of the last "
    f"{num_steps} train steps; what was not decided counts as 0."
  )


def _slow(
  log: logs.Log, phase: str, most: float, what: str, num: int = 20
) -> str | None:
  recent = log.records[1:][-num:]
  total = sum(map(logs.step_seconds, recent))
  own = sum(record.get(f"seconds/{phase}", 0.0) for record in recent)
  if len(recent) < num or not own > most * total:
    return None
  return f"{what} takes {100 * own / total:.0f} % of the time."


def _waiting(log: logs.Log) -> str | None:
  share = _recent(log, "slot_occupancy", 10)
  if not share < 0.5:
    return None
  return (
    f"Completions use {100 * share:.0f} % of the denoising steps that run: "
    "most rows have ended and wait for the slowest."
  )


RULES = (
  Rule(
    "not_finite",
    "stop",
    _not_finite,
    "Lower optimizer.learning_rate, and start the same command again with "
    "--config.accept_changed_config=true: it goes on from the checkpoint "
    "before.",
  ),
  Rule(
    "no_spread",
    "stop",
    _no_spread,
    "Raise rollout.temperature, or take harder problems where all are solved, "
    "easier ones where none is.",
  ),
  Rule(
    "little_spread",
    "look",
    _little_spread,
    "Raise rollout.temperature or rollout.group_size, or take problems that "
    "are solved about half of the time.",
  ),
  Rule(
    "ratios_off",
    "stop",
    _ratios_off,
    "Set model.dtype=float32 to see whether it goes away; if not, report it.",
  ),
  Rule(
    "no_update",
    "stop",
    _no_update,
    "See whether any group has spread; optimizer.learning_rate does not help.",
  ),
  Rule(
    "large_gradient",
    "look",
    _large_gradient,
    "Raise rollout.num_prompts or objective.num_mc_steps, which lower the "
    "noise, or lower optimizer.learning_rate.",
  ),
  Rule(
    "cut",
    "look",
    _cut,
    "Raise rollout.completion_length, or have prompts ask for short answers.",
  ),
  Rule(
    "entropy_gone",
    "look",
    _entropy_gone,
    "Stop here, raise rollout.temperature, or lower optimizer.learning_rate.",
  ),
  Rule(
    "kl",
    "look",
    _kl,
    "Lower optimizer.learning_rate or raise objective.kl_coef.",
  ),
  Rule(
    "clipped",
    "look",
    _clipped,
    "Lower optimizer.learning_rate or objective.updates_per_batch.",
  ),
  Rule(
    "below_best",
    "look",
    lambda log: _below_best(log, is_trained=True),
    "Take the best checkpoint: --checkpoint=WORKDIR:best.",
  ),
  Rule(
    "below_start",
    "look",
    lambda log: _below_best(log, is_trained=False),
    "Lower optimizer.learning_rate, or take the model as it was: no checkpoint "
    "was more accurate.",
  ),
  Rule(
    "reward_only",
    "stop",
    _reward_only,
    "Read the completions of the highest reward: the reward pays for something "
    "else than right answers.",
  ),
  Rule(
    "none_graded",
    "stop",
    _none_graded,
    "Stop here, read the reasons under Not graded, and mend the reward "
    "function or raise grading.timeout_seconds.",
  ),
  Rule(
    "grading_failed",
    "look",
    lambda log: _ungraded(log, _FAILED, "Grading failed"),
    "Read the reasons under Not graded; a reward function should not raise.",
  ),
  Rule(
    "grading_timed_out",
    "look",
    lambda log: _ungraded(log, _TIMED_OUT, "Grading ran out of time"),
    "Raise grading.timeout_seconds (with accept_changed_config=true, in a run "
    "that goes on), or make the reward function cheaper.",
  ),
  Rule(
    "slow_grading",
    "look",
    lambda log: _slow(log, "grade", 0.3, "Waiting for grades"),
    "Raise grading.num_workers.",
  ),
  Rule(
    "slow_evaluation",
    "look",
    lambda log: _slow(log, "evaluate", 0.5, "Evaluation", num=50),
    "Raise evaluate.every or lower evaluate.num_examples (with "
    "accept_changed_config=true, in a run that goes on).",
  ),
  Rule(
    "waiting",
    "look",
    _waiting,
    "Set rollout.num_slots below rollout.batch_size, so that a completion that "
    "ends makes room for another.",
  ),
)
