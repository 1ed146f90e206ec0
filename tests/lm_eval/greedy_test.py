"""Greedy matching against tables whose answers are known by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from agrpo_jax import types
from agrpo_jax.lm_eval import adapter
from agrpo_jax.objectives import elbo

MASK = 3


def pairs(*completions: list[int]) -> elbo.Pairs:
  """Completions after prompts of different lengths; padded with token 0."""
  width = max(map(len, completions))
  return elbo.Pairs(
    prompt=jnp.zeros((len(completions), 2), jnp.int32),
    prompt_length=jnp.arange(len(completions)) % 3,
    completion=jnp.array(
      [one + [0] * (width - len(one)) for one in completions]
    ),
    length=jnp.array([len(one) for one in completions]),
    num_given=jnp.zeros(len(completions), jnp.int32),
  )


def after_the_first(tokens_BxL, length_B, positions_BxS):
  """The first position wants token 1. The second wants 2 after a 1 and 1
  otherwise, less surely. What follows wants 0."""
  del length_B
  first_B = positions_BxS[:, 0]
  has_one_B = tokens_BxL[jnp.arange(tokens_BxL.shape[0]), first_B] == 1
  wanted_BxS = jnp.zeros(positions_BxS.shape, int).at[:, 0].set(1)
  wanted_BxS = wanted_BxS.at[:, 1].set(jnp.where(has_one_B, 2, 1))
  sure_S = jnp.array([3.0, 2.0, 1.0])[: positions_BxS.shape[1]]
  return jax.nn.one_hot(wanted_BxS, 4) * sure_S[None, :, None]


NETWORK = types.Network(after_the_first)


def test_most_confident_first():
  found = adapter.match_greedy(
    NETWORK, pairs([1, 2, 0], [1, 1, 0], [2, 2, 0], [1, 2, 1]), MASK
  )
  np.testing.assert_array_equal(found, [True, False, False, False])


def test_padding_is_no_part_of_a_completion():
  # Of [1], the zeros that follow are padding: nothing wants them to be right.
  found = adapter.match_greedy(NETWORK, pairs([1], [2], [1, 2, 0], [1]), MASK)
  np.testing.assert_array_equal(found, [True, False, True, True])
