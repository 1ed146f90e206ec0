"""GDPO: an ELBO by quadrature over the mask ratio (arXiv:2510.08554).

    B = sum_q w_q C / n_q sum over n_q masked of log p,    n_q = round(t_q C)

with Gauss's nodes t_q in (0, 1) and their weights: only which positions are
masked is random. Nodes near 0 and 1 are never visited, so the quadrature itself
is biased. No official code is known to us; published as a port of it with n_q
rounded down and 1 / t_q for C / n_q, which weighs short completions wrongly.
"""

import dataclasses
from typing import ClassVar
from typing import Literal

import jax
import jax.numpy as jnp

from agrpo_jax import types
from agrpo_jax.objectives import advantage as advantage_lib
from agrpo_jax.objectives import base
from agrpo_jax.objectives import clip as clip_lib
from agrpo_jax.objectives import masks
from agrpo_jax.samplers import sampling as sampling_lib

# Gauss-Legendre on (0, 1): number of nodes -> (t, w), ...
_NODES = {
  2: ((0.21132486540518713, 0.5), (0.7886751345948129, 0.5)),
  3: (
    (0.1127016653792583, 5 / 18),
    (0.5, 8 / 18),
    (0.8872983346207417, 5 / 18),
  ),
}


@dataclasses.dataclass(frozen=True)
class Gdpo(advantage_lib.Baseline, clip_lib.Clip, masks.Masks):
  """Settings of GDPO; defaults as ported to d1's trainer.

  Attributes:
    num_nodes: of the quadrature, 2 or 3; each costs a pass.
    kl_coef: of k3 of the completion's values, as ported not divided by C.
  """

  updates_per_batch: int = 12
  num_nodes: int = 2

  is_sum_over_visits: ClassVar[bool] = False
  behaviour: ClassVar[Literal["scored"]] = "scored"
  scores_padding: ClassVar[bool] = True

  def problems(self, sampling: sampling_lib.Sampling) -> list[str]:
    """Returns what is wrong with the settings, a sentence each."""
    del sampling
    return (
      base.at_least(1, self, "updates_per_batch")
      + clip_lib.problems(self)
      + advantage_lib.problems(self)
      + base.problems_of(
        self,
        num_nodes=(self.num_nodes in _NODES, "2 or 3"),
        # Of another estimator nothing would come of it.
        kl_estimator=(self.kl_estimator == "k3", "left at k3: see kl_coef"),
      )
    )

  def visits(
    self,
    rollout: types.Rollout,
    advantage_B: jax.Array,
    batch_key: jax.Array,
    key_B: jax.Array,
    sampling: sampling_lib.Sampling,
  ) -> tuple[base.Visits, dict[str, jax.Array]]:
    """A mask per node, [U, B, nodes, 1]."""
    del advantage_B, batch_key, sampling
    num_rows, max_tokens = rollout.completion.shape
    ratio_Q, node_weight_Q = jnp.asarray(_NODES[self.num_nodes]).T

    def one(
      key: jax.Array, row: types.Rollout, update: jax.Array
    ) -> base.Visits:
      is_token_C = masks.drawn(row)
      num_tokens = is_token_C.sum()
      count_Q = jnp.maximum(jnp.round(ratio_Q * num_tokens), 1)
      noise_QxC = jax.random.uniform(
        jax.random.fold_in(key, update), (self.num_nodes, max_tokens)
      )
      is_masked_QxC = jax.vmap(masks.exactly, (0, None, 0))(
        noise_QxC, is_token_C, count_Q
      )
      scale_Q = node_weight_Q * num_tokens / count_Q
      return masks.visits(is_masked_QxC, 1.0 / num_rows, scale_Q)

    return masks.each(one, key_B, rollout, self.updates_per_batch), {}

  def loss(
    self,
    policy: base.Factors,
    behaviour: base.Scores,
    reference: base.Scores,
    advantage_G: jax.Array,
    visits: base.Visits,
    rows: types.Rollout,
  ) -> base.Terms:
    """Returns the clipped surrogate of every completion, with the penalty."""
    return clip_lib.of_values(
      policy,
      behaviour,
      reference,
      advantage_G,
      visits,
      rows,
      self,
      kl=lambda value, reference, _: clip_lib.k3(reference - value),
    )
