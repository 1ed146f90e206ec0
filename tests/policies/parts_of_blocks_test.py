"""Blocks of a sampler that are parts of the network's, and positions that lead.

Of a block-causal network whose logits are shifted, as those of Fast-dLLM v2.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from agrpo_jax import errors
from agrpo_jax import learner as learner_lib
from agrpo_jax import types
from agrpo_jax.models import transformer
from agrpo_jax.objectives import agrpo
from agrpo_jax.parallel import mesh as mesh_lib
from agrpo_jax.policies import block_causal
from agrpo_jax.policies import plain
from agrpo_jax.port import model as model_lib
from agrpo_jax.samplers import host
from agrpo_jax.samplers import sampling as sampling_lib
from fixtures import recordings
from fixtures import states

B = 12
ROW_ID = np.stack([np.arange(B) // 4, np.arange(B) % 4], 1).astype(np.uint32)


@functools.cache
def toy():
  shape, params = recordings.random_network(attention_block=8, shift=1)
  rng = np.random.default_rng(1)
  return shape, jax.tree.map(
    lambda x: jnp.asarray(rng.normal(0.1, 0.4, x.shape), jnp.float32), params
  )


def sampling_with(**changes):
  shape, _ = toy()
  settings = dict(
    mask_id=shape.mask_id,
    eos_id=shape.eos_id,
    completion_length=16,
    block_length=4,
    lead_every=8,
    num_denoise_steps=16,
    unmask_rule="threshold",
    threshold=0.1,
    cache="block",
  )
  return sampling_lib.Sampling(**(settings | changes))


def sample(num_slots=0, **changes):
  """(settings, rollout, the sampler, what it was called with)."""
  sampling = sampling_with(**changes)
  shape, params = toy()
  model = model_lib.Model(
    mesh=mesh_lib.make(),
    shape=shape,
    params=params,
    lora=None,
    lora_settings=None,
    tokenizer=shape,
    base_model=None,
  )
  draw = host.Draw(sampling, 0.0, batch_size=B, num_slots=num_slots)
  sampler = model.sampler(draw, 1)
  rng = np.random.default_rng(0)
  prompts = [rng.integers(0, 30, 4 + row).tolist() for row in range(B)]
  given = params, None, prompts, jax.random.key(1), ROW_ID
  (rollout,) = sampler.sample(*given)
  return sampling, rollout, sampler, given


@pytest.mark.parametrize("lead_every", [0, 8])
def test_the_cache_is_exact_and_slots_change_nothing(lead_every):
  _, whole, _, given = sample(cache="none", lead_every=lead_every)
  assert len({*np.asarray(whole.num_executed_steps).tolist()}) > 2
  for num_slots in (0, 5) if lead_every else (5,):
    _, found, _, _ = sample(num_slots, lead_every=lead_every)
    for name in ("completion", "unmask_step", "num_executed_steps"):
      np.testing.assert_array_equal(getattr(found, name), getattr(whole, name))
    for name in ("logprob", "order_logprob"):
      np.testing.assert_allclose(
        getattr(found, name), getattr(whole, name), atol=1e-4
      )
    np.testing.assert_array_equal(found.num_whole_passes, 1)
  # The first position of a block is alone in its step, if it has one.
  for row, step in enumerate(np.asarray(whole.unmask_step)):
    num_given = len(given[2][row]) % 8
    np.testing.assert_array_equal(step < 0, np.arange(16) < num_given)
    first, rest = step.reshape(2, 8)[:, 0], step.reshape(2, 8)[:, 1:4]
    is_drawn = (first >= 0) & (first < 16)
    if lead_every:
      assert (rest > first[:, None])[is_drawn].all()
      assert (first % 4 == 0)[is_drawn].all()
  if not lead_every:
    steps = np.asarray(whole.unmask_step).reshape(-1, 8)
    assert (steps[:, 0] >= steps[:, 1:4].min(axis=1)).any()


def test_the_first_policy_ratio_is_one():
  """And the gradient is that of whole passes, step by step."""
  sampling, rollout, _, _ = sample()
  shape, params = toy()
  gradients = []
  for policy in (block_causal.BlockCausal(4), plain.PLAIN):
    learner = learner_lib.Learner(
      bind=lambda params, lora: transformer.bind(shape, params),
      optimizer=optax.sgd(1.0),
      sampling=sampling,
      objective=agrpo.Agrpo(step_rule="all"),
      group_size=4,
      microbatch=4,
      policy=policy,
    )
    moved, metrics = states.first_step(learner, params, rollout, ROW_ID)
    assert metrics["policy_ratio/max_deviation"] < 1e-4
    assert metrics["grad_norm"] > 0
    if policy is not plain.PLAIN:
      assert metrics["draws/units"] <= B  # a completion is one
    gradients.append(moved)
  for one, other in zip(*map(jax.tree.leaves, gradients), strict=True):
    np.testing.assert_allclose(one, other, atol=2e-3 * np.abs(other).max())


def test_a_completion_is_taken_up_amid_a_block_of_the_network():
  settings = dict(unmask_rule="confidence", threshold=None, temperature=0.0)
  _, whole, sampler, given = sample(5, **settings)
  # What is the prompt's of a first block does not end it.
  assert (np.asarray(whole.num_executed_steps) > 8).all()
  for block in (1, 2, 3):
    start = types.Start(
      completion=np.asarray(whole.completion),
      unmask_step=np.asarray(whole.unmask_step),
      block=np.full(B, block, np.int32),
    )
    (again,) = sampler.sample(*given, start=start)
    for name in ("completion", "unmask_step"):
      np.testing.assert_array_equal(getattr(again, name), getattr(whole, name))


def test_partial_completions_have_the_logits_of_whole_passes():
  """A block's first position sees nothing of its own block."""
  shape, params = toy()
  network = transformer.bind(shape, params)
  rng = np.random.default_rng(2)
  prompt = rng.integers(0, 30, (3, 16))
  length = np.array([16, 8, 0])
  completion = rng.integers(0, 30, (3, 24))
  partial = np.where(rng.random((3, 24)) < 0.5, shape.mask_id, completion)
  found = jax.jit(lambda *rows: block_causal.partial_logits(network, *rows))(
    prompt, length, completion, partial
  )
  logits = jax.jit(network.logits)
  for row in range(3):
    for begin in (0, 8, 16):
      tokens = np.concatenate(
        [
          prompt[row, : length[row]],
          completion[row, :begin],
          partial[row, begin:],
        ]
      )[None]
      at = length[row] + begin + np.arange(8)[None]
      expected = logits(tokens, np.array(tokens.shape[1:]), at)[0]
      np.testing.assert_allclose(
        found[row, begin : begin + 8], expected, atol=1e-4
      )


@pytest.mark.parametrize(
  "changes, words",
  [
    (dict(block_length=3), "in blocks of 8; use block_length=8 or a divisor"),
    (
      dict(completion_length=12, num_denoise_steps=12),
      "the last of which must be whole; use completion_length=8 or 16",
    ),
    (dict(lead_every=4), "use lead_every=8 or 0"),
  ],
)
def test_what_does_not_fit_the_model_is_refused(changes, words):
  draw = host.Draw(sampling_with(**changes), 0.0, batch_size=B, num_slots=0)
  with pytest.raises(errors.UserError, match=words):
    model_lib.check_draw(toy()[0], 16, draw)


def test_a_shift_without_windows_has_no_cache():
  shape = dataclasses.replace(toy()[0], blocks_from="end")
  draw = host.Draw(sampling_with(), 0.0, batch_size=B, num_slots=0)
  model_lib.check_draw(toy()[0], 16, draw)
  with pytest.raises(errors.UserError, match="logits are shifted"):
    model_lib.check_draw(shape, 16, draw)


@pytest.mark.parametrize(
  "changes, words",
  [
    (dict(lead_every=6), "lead_every=6 is not a multiple of block_length=4"),
    (dict(lead_every=-4), "lead_every=-4 is not a multiple"),
    (
      dict(unmask_rule="random", threshold=None, num_denoise_steps=12),
      "all must: num_denoise_steps=16",
    ),
    (dict(unmask_rule="origin", threshold=None), "is sure to unmask"),
  ],
)
def test_settings_of_positions_that_lead(changes, words):
  assert sampling_lib.problems(sampling_with()) == []
  (found,) = sampling_lib.problems(sampling_with(**changes))
  assert words in found
