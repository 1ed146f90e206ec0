"""Objectives with masks of their own on a block-causal model.

A masked token is predicted from its block as it stands and the whole ones
before it; the tokens of a prompt that share the first block are never masked.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from agrpo_jax import learner as learner_lib
from agrpo_jax import objectives
from agrpo_jax import types
from agrpo_jax.models import transformer
from agrpo_jax.objectives import masks
from agrpo_jax.policies import block_causal
from agrpo_jax.samplers import host
from agrpo_jax.samplers import noise
from agrpo_jax.samplers import rollout as rollout_lib
from agrpo_jax.samplers import sampling as sampling_lib
from fixtures import recordings
from fixtures import states

SDAR = pathlib.Path(__file__).parents[1] / "testdata" / "golden2/ckpt/tiny_sdar"
B, P, C, T = 6, 8, 12, 4
NUM_GIVEN = np.array([0, 1, 3, 2, 0, 3])
ROW_ID = np.stack([np.arange(B) // 3, np.arange(B) % 3], 1).astype(np.uint32)
REWARD = np.array([1.0, 0.0, 0.5, 2.0, 0.25, 0.0])
MASKING = [
  name for name in objectives.NAMES if not objectives.get(name).replays
]


@functools.cache
def toy():
  shape, params, network = recordings.network_at(SDAR)
  return shape, params, network


def sampling_of(**settings):
  shape, _, _ = toy()
  return sampling_lib.Sampling(
    mask_id=shape.mask_id,
    eos_id=shape.eos_id,
    completion_length=C,
    block_length=T,
    num_denoise_steps=C,
    cache="block",
    **settings,
  )


@functools.cache
def drawn():
  """Completions whose first tokens are their prompts' last."""
  s, rng = sampling_of(unmask_rule="confidence"), np.random.default_rng(0)
  ends = [rng.integers(1, 90, num).tolist() for num in NUM_GIVEN]
  prompts = types.Prompts(
    tokens=jnp.asarray(rng.integers(1, 90, (B, P)), jnp.int32),
    length=jnp.asarray([8, 4, 8, 4, 8, 8], jnp.int32),
    key=noise.row_keys(jax.random.key(1), ROW_ID),
    start=jax.tree.map(jnp.asarray, host._begun(ends, s)),
  )
  policy = block_causal.BlockCausal(T)
  sample = functools.partial(
    rollout_lib.sample_rollout, toy()[2], sampling=s, policy=policy
  )
  return jax.jit(lambda prompts: sample(prompts))(prompts)


def learner_of(objective):
  shape, _, _ = toy()
  return learner_lib.Learner(
    bind=lambda params, lora: transformer.bind(shape, params),
    optimizer=optax.sgd(1e-3),
    sampling=sampling_of(unmask_rule="confidence"),
    objective=objective,
    group_size=3,
    microbatch=4,
    policy=block_causal.BlockCausal(T),
  )


def visits_of(objective, rollout):
  reward_NxG = jnp.asarray(REWARD, jnp.float32).reshape(-1, 3)
  return learner_of(objective).visits(
    rollout,
    objective.advantage(reward_NxG).reshape(-1),
    jax.random.key(4),
    jax.random.split(jax.random.key(3), B),
  )[0]


# Under the last the completion ends within a block.
@pytest.mark.parametrize("num_wanted, size", [(2, C), (C, C), (C - 2, C - 2)])
def test_a_block_sees_itself_masked_and_those_before_it_whole(num_wanted, size):
  """Beside whole rows, in which one block is masked at a time."""
  _, _, network = toy()
  rollout, rng = drawn(), np.random.default_rng(1)
  mask_id = sampling_of().mask_id
  completion = rollout.completion[:, :size]
  is_masked = rng.random((B, 2, size)) < 0.5
  partial = np.where(is_masked, mask_id, completion[:, None])
  offset = np.sort(rng.permuted(np.tile(np.arange(size), (B, 2, 1)), axis=2))
  offset = offset[:, :, rng.permutation(size)[:num_wanted]].astype(np.int32)
  policy = block_causal.OfMasks(block_causal.BlockCausal(T))
  prompt = rollout.prompt, rollout.prompt_length
  memory = policy.open(
    network, None, *prompt, completion, prompt[1], keeps=False
  )
  found = jax.jit(policy.logits, static_argnums=0)(
    network, memory, *prompt, partial, np.zeros((B, 2), np.int32), offset, False
  )
  whole = jax.jit(network.logits)
  for row in range(B):
    length = int(rollout.prompt_length[row])
    for state in range(2):
      for place, at in enumerate(offset[row, state]):
        block = at // T * T
        tokens = np.asarray(completion[row]).copy()
        tokens[block:] = partial[row, state, block:]
        line = np.zeros(P + size, np.int32)
        line[: length + size] = [*rollout.prompt[row, :length], *tokens]
        expected = whole(
          line[None], np.array([length + size]), np.array([[length + at]])
        )
        np.testing.assert_allclose(
          found[row, state, place], expected[0, 0], atol=3e-4
        )


@pytest.mark.parametrize("name", MASKING)
def test_the_prompt_is_not_masked_and_does_not_end_a_completion(name):
  objective = objectives.get(name)()
  rollout = drawn()
  visits = visits_of(objective, rollout)
  is_given = np.asarray(rollout.unmask_step) < 0
  np.testing.assert_array_equal(is_given.sum(axis=1), NUM_GIVEN)
  is_masked = np.asarray(visits.is_masked)
  assert is_masked.any()
  assert not (is_masked & is_given[None, :, None, None]).any()
  # A prompt may have an EOS at its end: that of a message.
  eos_id = sampling_of().eos_id
  ended = rollout.replace(
    completion=jnp.where(is_given, eos_id, rollout.completion)
  )
  jax.tree.map(
    np.testing.assert_array_equal, visits_of(objective, ended), visits
  )


# Losses that are a sum over visits and that are not, with masks of the prompt
# and of all, and single positions.
@pytest.mark.parametrize("name", ["wd1", "espo", "just_grpo"])
def test_it_learns_from_a_ratio_of_one(name):
  objective = objectives.get(name)()
  learner = learner_of(objective)
  params = toy()[1]
  state, metrics = jax.jit(learner.train_step)(
    states.initial(learner, params),
    drawn(),
    jnp.asarray(REWARD, jnp.float32),
    jax.random.key(2),
    ROW_ID,
    params if objective.has_reference else None,
  )
  del state
  assert np.isfinite(metrics["loss"])
  assert metrics["grad_norm"] > 0
  assert metrics["policy_ratio/max_deviation"] < 1e-4


def test_trace_rl_reads_what_the_sampler_drew_from():
  """With shrink 1 at temperature 1, every step in the state it acted on."""
  objective = objectives.get("trace_rl")(shrink=1, max_eos=C)
  rollout = drawn()
  learner = learner_of(objective)
  visits = jax.tree.map(lambda x: x[0], visits_of(objective, rollout))
  factors = jax.jit(
    lambda visits: learner.factors(toy()[2], rollout, jnp.ones(B), visits)
  )(visits)
  is_factor = np.asarray(factors.is_factor)
  found = np.full((B, C), np.nan)
  for row, unit, state, place in np.argwhere(is_factor):
    at = int(visits.offset[row, unit, state, place])
    assert np.isnan(found[row, at])
    found[row, at] = factors.logprob[row, unit, state, place]
  is_drawn = np.array(masks.drawn(rollout))
  is_drawn &= np.asarray(rollout.unmask_step) < C
  np.testing.assert_array_equal(~np.isnan(found), is_drawn)
  np.testing.assert_allclose(
    found[is_drawn], np.asarray(rollout.logprob)[is_drawn], atol=1e-4
  )
