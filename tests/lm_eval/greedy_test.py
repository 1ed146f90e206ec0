"""Greedy matching against tables whose answers are known by hand."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from agrpo_jax import types
from agrpo_jax.lm_eval import adapter
from agrpo_jax.objectives import elbo
from agrpo_jax.policies import block_causal
from agrpo_jax.samplers import host
from agrpo_jax.samplers import rollout as rollout_lib
from agrpo_jax.samplers import sampling as sampling_lib
from fixtures import recordings

GOLDEN2 = pathlib.Path(__file__).parents[1] / "testdata" / "golden2"
# Of which a network of whole rows takes the mask alone.
SAMPLING = sampling_lib.Sampling(
  mask_id=3,
  eos_id=0,
  completion_length=2,
  block_length=1,
  num_denoise_steps=2,
  lead_every=2,
)


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
    NETWORK, pairs([1, 2, 0], [1, 1, 0], [2, 2, 0], [1, 2, 1]), SAMPLING
  )
  np.testing.assert_array_equal(found, [True, False, False, False])


def test_padding_is_no_part_of_a_completion():
  # Of [1], the zeros that follow are padding: nothing wants them to be right.
  found = adapter.match_greedy(
    NETWORK, pairs([1], [2], [1, 2, 0], [1]), SAMPLING
  )
  np.testing.assert_array_equal(found, [True, False, True, True])


def test_what_the_sampler_draws_where_positions_lead():
  """Fast-dLLM v2's, greedy, a token a step: parts of blocks, one leads."""
  shape, _, network = recordings.network_at(
    GOLDEN2 / "ckpt" / "tiny_fast_dllm_v2"
  )
  sampling = sampling_lib.Sampling(
    mask_id=shape.mask_id,
    eos_id=shape.eos_id,
    completion_length=64,
    block_length=8,
    lead_every=32,
    num_denoise_steps=64,
    unmask_rule="confidence",
    temperature=0.0,
    cache="block",
    stop_at_eos=False,
  )
  rng = np.random.default_rng(0)
  prompts = [rng.integers(0, 80, num).tolist() for num in (5, 32, 40, 50)]
  cut, ends = host.row_lib.cut(prompts, 32)
  tokens, length = host.row_lib.pack(cut, 32)
  rollout = jax.jit(
    lambda prompts: rollout_lib.sample_rollout(
      network, prompts, sampling, policy=block_causal.BlockCausal(8)
    )
  )(
    types.Prompts(
      tokens=jnp.asarray(tokens),
      length=jnp.asarray(length),
      key=jax.random.split(jax.random.key(0), len(prompts)),
      start=jax.tree.map(jnp.asarray, host._begun(ends, sampling)),
    )
  )
  drawn = [
    row[len(end) :].tolist()
    for row, end in zip(np.asarray(rollout.completion), ends, strict=True)
  ]
  packed = elbo.pack(prompts, drawn, 32, shape)
  match = jax.jit(adapter.match_greedy, static_argnums=(0, 2))
  assert match(network, packed, sampling).all()
  # Neither without what leads nor with whole blocks it is that completion.
  for change in (dict(lead_every=0), dict(block_length=32)):
    other = dataclasses.replace(sampling, **change)
    assert not match(network, packed, other).all(), change
