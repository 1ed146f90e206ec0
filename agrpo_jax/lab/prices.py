"""What is paid for rollouts and gradients, in passes.

A pass is one row's forward and backward pass. A forward one alone is a third of
it where all parameters are trained, since backward passes cost two forward ones
then, and half of it with adapters; remat "full" adds a forward pass to either.
What a policy with a cache computes is priced by its share of a row's FLOPs.
"""

import dataclasses
from collections.abc import Mapping

from agrpo_jax import objectives as objectives_lib
from agrpo_jax.models import base as models
from agrpo_jax.models import transformer
from agrpo_jax.samplers import sampling as sampling_lib


@dataclasses.dataclass(frozen=True)
class Prices:
  """Forward FLOPs, in those of a whole row, and what these are of a pass.

  Attributes:
    memory: of what the states of a unit share.
    state: of a state.
    mask: of a visit with a mask of the objective's own.
    has_start: whether what they share is of the first state, and tells its
      logits too.
    read: a forward pass, in passes.
  """

  memory: float
  state: float
  mask: float = 1.0
  has_start: bool = False
  read: float = 1 / 3


WHOLE_ROWS = Prices(memory=0.0, state=1.0)


def of_policy(
  sampling: sampling_lib.Sampling,
  shape: models.Shape,
  prompt_length: int,
  *,
  has_adapter: bool,
) -> Prices:
  """Returns the prices of the policy that draws the rollouts.

  The pass that adds a finished block to an exact cache is not counted.

  Args:
    sampling: how they are drawn.
    shape: of the network.
    prompt_length: tokens, padding included.
    has_adapter: whether only adapters are trained.
  """
  # A backward pass has gradients of what a layer is given, and of its kernels.
  read = 1 / (2 + (not has_adapter) + (shape.remat == "full"))
  if sampling.cache == "none":
    return dataclasses.replace(WHOLE_ROWS, read=read)
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
  memory, mask = 1.0, 1.0
  if sampling.cache == "block":  # the completion, and all of its blocks beside
    num = sampling.completion_length
    memory = transformer.forward_flops(shape, length, 0) / row
    mask = memory + transformer.forward_flops(shape, length, num, num) / row
  return Prices(
    memory=memory,
    state=transformer.forward_flops(shape, length, wanted, window) / row,
    mask=mask,
    has_start=sampling.cache != "block",
    read=read,
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
  if policy.has_start:
    num_steps -= num_whole_passes
  whole = policy.memory * num_whole_passes
  return policy.read * (whole + policy.state * num_steps)


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
    # A state alone is any of those that its memory may serve.
    is_start_paid = policy.has_start and visits_per_unit > 1
    num_states = visits_per_unit - is_start_paid
    unit = policy.memory + policy.state * num_states
  # A loss that is no sum is read before it is differentiated.
  num_reads = int(not objective.is_sum_over_visits)
  num_reads += int(objective.has_reference)
  num_reads += int(
    objective.behaviour == "scored" and objective.updates_per_batch > 1
  )
  return unit * (num_learned + policy.read * num_reads * num_units)


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
