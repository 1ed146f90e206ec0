"""What is paid for rollouts and gradients, in passes.

A pass is one row's forward and backward pass. A forward one alone is a third of
it, since backward passes cost two forward ones; what a policy with a cache
computes is priced by its share of a row's FLOPs.
"""

import dataclasses
from collections.abc import Mapping

from agrpo_jax import objectives as objectives_lib
from agrpo_jax.models import base as models
from agrpo_jax.models import transformer
from agrpo_jax.samplers import sampling as sampling_lib

_READ, _LEARN = 1 / 3, 1.0


@dataclasses.dataclass(frozen=True)
class Prices:
  """Forward FLOPs, in those of a whole row.

  Attributes:
    memory: of what the states of a unit share.
    state: of a state.
    mask: of a visit with a mask of the objective's own.
  """

  memory: float
  state: float
  mask: float = 1.0


WHOLE_ROWS = Prices(memory=0.0, state=1.0)


def of_policy(
  sampling: sampling_lib.Sampling, shape: models.Shape, prompt_length: int
) -> Prices:
  """Returns the prices of the policy that draws the rollouts.

  The pass that adds a finished block to an exact cache is not counted.

  Args:
    sampling: how they are drawn.
    shape: of the network.
    prompt_length: tokens, padding included.
  """
  if sampling.cache == "none":
    return WHOLE_ROWS
  length = prompt_length + sampling.completion_length
  # Of the prefix cache's windows, which shrink, the longest is taken.
  window = (
    sampling.completion_length
    if sampling.cache == "prefix"
    # A part of a network's block is run with the whole of it.
    else shape.attention_block or sampling.block_length
  )
  wanted = sampling.tokens_per_step
  row = transformer.forward_flops(shape, length, wanted)
  memory = transformer.forward_flops(shape, length, 0) / row
  mask = 1.0
  if sampling.cache == "block":  # the completion, and all of its blocks beside
    num = sampling.completion_length
    mask = memory + transformer.forward_flops(shape, length, num, num) / row
  return Prices(
    memory=memory,
    state=transformer.forward_flops(shape, length, wanted, window) / row,
    mask=mask,
  )


def of_rollout(
  policy: Prices, num_steps: float, num_whole_passes: float
) -> float:
  """Returns the passes of completions with so many denoising steps in all.

  Args:
    policy: prices of the policy that draws.
    num_steps: denoising steps executed.
    num_whole_passes: `types.Rollout.num_whole_passes`; with a cache the
      memories that were opened.
  """
  return _READ * (policy.memory * num_whole_passes + policy.state * num_steps)


def of_updates(
  objective: objectives_lib.Objective,
  policy: Prices,
  num_learned: float,
  num_units: float,
  num_visits: float,
) -> float:
  """Returns the passes of optimizer updates.

  Args:
    objective: whose visits they are.
    policy: prices of the policy that draws.
    num_learned: units run with a gradient.
    num_units: units that were asked for.
    num_visits: visits of these; see `learner.Learner.asked`.
  """
  if not num_units:
    return 0.0
  visits_per_unit = num_visits / num_units
  unit = policy.mask * visits_per_unit
  if objective.replays:
    unit = policy.memory + policy.state * visits_per_unit
  # A loss that is no sum is read before it is differentiated.
  num_reads = int(not objective.is_sum_over_visits)
  num_reads += int(objective.has_reference)
  num_reads += int(
    objective.behaviour == "scored" and objective.updates_per_batch > 1
  )
  return unit * (_LEARN * num_learned + _READ * num_reads * num_units)


def of_train_step(
  objective: objectives_lib.Objective,
  policy: Prices,
  num_rows: int,
  record: Mapping[str, float],
) -> float:
  """Returns the passes per completion of a train step, rollout included.

  Args:
    objective: of the run.
    policy: prices of the policy that draws.
    num_rows: completions of a train step, B.
    record: the train step's line of `metrics.jsonl`.
  """
  updates = of_updates(
    objective,
    policy,
    record["draws/pairs"],
    record["draws/units"],
    record["draws/visits"],
  )
  # Completions, and those that are drawn for the values of states.
  rollouts = sum(
    of_rollout(
      policy,
      record.get(f"{kind}/mean_denoise_steps", 0.0),
      record.get(f"{kind}/mean_whole_passes", 0.0),
    )
    for kind in ("completions", "values")
  )
  return rollouts + updates / num_rows
