"""Batches of completions: one compilation per prompt width, no lost rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from agrpo_jax import types
from agrpo_jax.parallel import mesh as mesh_lib
from agrpo_jax.samplers import host as sampler_lib
from agrpo_jax.samplers import noise as noise_lib
from agrpo_jax.samplers import rollout as rollout_lib
from agrpo_jax.samplers import sampling as sampling_lib

SAMPLING = sampling_lib.Sampling(
  mask_id=9,
  eos_id=0,
  completion_length=4,
  block_length=4,
  num_denoise_steps=4,
)


def make(batch_size: int):
  """A sampler over a network that looks at the first token; its traces."""
  traces = []

  def bind(params, lora):
    del lora

    def logits(tokens_BxL, length_B, position_BxS):
      del length_B
      traces.append(tokens_BxL.shape)
      first_B = tokens_BxL[:, 0]
      return params[first_B[:, None], position_BxS % 8]

    return types.Network(logits)

  draw = sampler_lib.Draw(
    SAMPLING, guidance=0.0, batch_size=batch_size, num_slots=0
  )
  mesh = mesh_lib.make(devices=jax.devices()[:1])
  sampler = sampler_lib.Sampler(bind, draw, SAMPLING, mesh, 8)
  return sampler, traces


PARAMS = jax.random.normal(jax.random.key(0), (9, 8, 9))
PROMPTS = [[n % 8 + 1] * (n % 5 + 1) for n in range(7)]
ROW_ID = np.stack([np.arange(7), np.zeros(7)], axis=1).astype(np.uint32)


def draw(sampler, prompts=PROMPTS, first=0):
  rollouts = list(
    sampler.sample(PARAMS, None, prompts, jax.random.key(1), ROW_ID, first)
  )
  return np.concatenate([rollout.completion for rollout in rollouts])


def test_one_compilation_per_prompt_width():
  sampler, traces = make(batch_size=2)
  draw(sampler)
  num_traces = len(traces)
  assert {shape[1] for shape in traces} == {8 + 4}
  draw(sampler, [[1], [2, 3], [4] * 8, [5], [6], [7], [8]])  # the same bucket
  assert len(traces) == num_traces
  draw(sampler, [[1] * 9, *PROMPTS[1:]])  # the next one
  assert len(traces) == 2 * num_traces


def test_the_batch_size_is_without_effect():
  expected = draw(make(batch_size=7)[0])
  for batch_size in (1, 2, 3):
    ours = draw(make(batch_size)[0])
    assert len(ours) == -(-7 // batch_size) * batch_size
    np.testing.assert_array_equal(ours[:7], expected)
    # What fills the last batch up repeats the last row.
    for row in ours[7:]:
      np.testing.assert_array_equal(row, expected[6])


def test_rows_can_be_passed_over():
  expected = draw(make(batch_size=7)[0])
  np.testing.assert_array_equal(draw(make(3)[0], first=4), expected[4:7])


def test_a_block_of_whatever_ends_a_completion_is_its_last():
  """Its first block is 5 and 0, its second 5 and 3."""
  sampling = dataclasses.replace(
    SAMPLING, block_length=2, temperature=0.0, num_denoise_steps=4
  )
  wanted = np.array([5, 0, 5, 3])

  def logits(tokens_BxL, length_B, position_BxS):
    at = position_BxS - (length_B[:, None] - 4)
    return jax.nn.one_hot(jnp.asarray(wanted)[at], 9)

  prompts = types.Prompts(
    tokens=jnp.array([[1]]),
    length=jnp.array([1]),
    key=jax.random.split(jax.random.key(0), 1),
  )
  for stop_ids, expected, num_steps in (
    ((), [5, 0, 5, 3], 4),
    ((5,), [5, 0, 0, 0], 2),
    ((5, 7), [5, 0, 0, 0], 2),
  ):
    vocabulary = dataclasses.replace(sampling, stop_ids=stop_ids)
    drawing = sampler_lib.Draw(sampling, 0.0, batch_size=1, num_slots=0)
    rollout = rollout_lib.sample_rollout(
      types.Network(logits), prompts, drawing.sampling_for(vocabulary)
    )
    assert rollout.completion[0].tolist() == expected
    assert rollout.num_executed_steps.tolist() == [num_steps]


def test_row_keys_depend_on_prompt_and_index_alone():
  keys = noise_lib.row_keys(
    jax.random.key(0), jnp.array([[3, 0], [3, 1], [4, 0]], jnp.uint32)
  )
  again = noise_lib.row_keys(
    jax.random.key(0), jnp.array([[4, 0], [3, 0]], jnp.uint32)
  )
  data, other = jax.random.key_data(keys), jax.random.key_data(again)
  np.testing.assert_array_equal(data[0], other[1])
  np.testing.assert_array_equal(data[2], other[0])
  assert len({tuple(row) for row in np.asarray(data).tolist()}) == 3
