"""What an objective is: how graded completions become a loss.

A completion is scored by *visits*. A visit is one partial completion, rebuilt
or made up, that the network is run on, and the positions that are read there.
What is read becomes *factors*, log-probabilities; the loss is a function of the
factors of a group's completions. An objective never sees a network: the learner
runs it (`learner.py`), and asks the objective what to visit, what to read, and
what it costs.
"""

from typing import Literal
from typing import Protocol
from typing import runtime_checkable

import jax

from agrpo_jax import types
from agrpo_jax.objectives import base
from agrpo_jax.samplers import sampling as sampling_lib


class Objective(Protocol):
  """An objective: a frozen dataclass of its settings, and these functions.

  Attributes:
    updates_per_batch: optimizer updates per rollout, U.
    replays: whether its visits are states that the sampler was in, so that
      they are scored through the sampler's policy; else through the plain one.
    is_sum_over_visits: whether a completion's loss is a sum over its visits.
      Then one pass gives loss and gradient, else two are needed.
    behaviour: where the behaviour policy's factors come from: `recorded` with
      the rollout, `scored` before the first update, or `none` are needed.
    has_reference: whether the reference policy is scored too.
    skips_zero_advantage: whether a completion whose advantage is 0 adds nothing
      to the gradient, and need not be visited.
  """

  @property
  def updates_per_batch(self) -> int: ...
  @property
  def replays(self) -> bool: ...
  @property
  def is_sum_over_visits(self) -> bool: ...
  @property
  def behaviour(self) -> Literal["recorded", "scored", "none"]: ...
  @property
  def has_reference(self) -> bool: ...
  @property
  def skips_zero_advantage(self) -> bool: ...

  def problems(self, sampling: sampling_lib.Sampling) -> list[str]:
    """Returns what is wrong with the settings, a sentence each.

    Args:
      sampling: how rollouts are to be drawn; what is wrong with that alone is
        told by others.
    """

  def advantage(self, reward_NxG: jax.Array) -> jax.Array:
    """Returns float32 [N, G], advantages; a row has one prompt's completions.

    The whole batch is given for denominators that run over it.
    """

  def visits(
    self,
    rollout: types.Rollout,
    advantage_B: jax.Array,
    batch_key: jax.Array,
    key_B: jax.Array,
    sampling: sampling_lib.Sampling,
  ) -> tuple[base.Visits, dict[str, jax.Array]]:
    """Says what to visit in all optimizer updates.

    Args:
      rollout: B completions.
      advantage_B: float32, theirs; what is drawn may depend on them. Of a
        `Valued` objective [B, num_blocks].
      batch_key: a random key of the batch.
      key_B: a random key per completion; what is drawn for one should come
        from its own, so that it depends on no batch mate.
      sampling: how the rollout was drawn.

    Returns:
      Visits with leading axes [U, B, Q, S], and scalars to log.
    """

  def score(
    self,
    logits_WxV: jax.Array,
    row: types.Rollout,
    visit: base.Visits,
    sampling: sampling_lib.Sampling,
    top_k: types.TopK,
  ) -> base.Factors:
    """Reads one visit of one completion.

    Args:
      logits_WxV: float32, at `visit.offset`.
      row: one row of a rollout.
      visit: one visit, without leading axes.
      sampling: how the rollout was drawn.
      top_k: see `types.Network`.

    Returns:
      F factors.
    """

  def recorded(self, row: types.Rollout, visit: base.Visits) -> jax.Array:
    """Returns float32 [F], the behaviour policy's factors, where recorded."""

  def loss(
    self,
    policy: base.Factors,
    behaviour: base.Scores,
    reference: base.Scores,
    advantage_G: jax.Array,
    visits: base.Visits,
    rows: types.Rollout,
  ) -> base.Terms:
    """Computes the loss of one group.

    Of a sum over visits it may be given any rows and visits, as a group: the
    parts are added up.

    Args:
      policy: factors [G, Q, S, F] under the policy.
      behaviour: float32 [G, Q, S, F] under the behaviour policy; None where
        the objective asks for none.
      reference: float32 [G, Q, S, F] under the reference policy, or None.
      advantage_G: float32 [G].
      visits: [G, Q, S, ...].
      rows: the G completions.

    Returns:
      Sums. The losses of all groups are added; a mean over them is the
      objective's own business, by way of the weights.
    """


@runtime_checkable
class Valued(Protocol):
  """What an objective has besides whose advantages differ block by block.

  They come from values of states within a completion, from where completions
  are drawn anew (`actor.Actor.values`). The loss must be a sum over visits:
  each is then given the advantage of its block.
  """

  def restarts(self, sampling: sampling_lib.Sampling) -> base.Restarts:
    """Returns which states get a value, V of them."""

  def block_advantage(
    self,
    reward_NxG: jax.Array,
    value_NxGxV: jax.Array,
    sampling: sampling_lib.Sampling,
  ) -> jax.Array:
    """Returns float32 [N, G, num_blocks], advantages of the steps of a block.

    Args:
      reward_NxG: float32, as for `Objective.advantage`.
      value_NxGxV: float32, mean rewards of the completions drawn anew from each
        state; of states behind the completion's end its own reward.
      sampling: how the rollout was drawn.
    """
