"""When the best token is [MASK] itself: as released, or a token like any other.

The expected completions come from slow loops over lists, written after the
released `generate.py` of LLaDA and of Fast-dLLM.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agrpo_jax import types
from agrpo_jax.samplers import rollout as rollout_lib
from agrpo_jax.samplers import sampling as sampling_lib

V, MASK = 4, 3  # tokens 0 (EOS), 1, 2 and [MASK]
C, T = 4, 2
NUM_ROWS = 300  # each with a table of its own


def tables() -> np.ndarray:
  """float32 [rows, states, C, V]: [MASK] is the best token often."""
  rng = np.random.default_rng(0)
  table = rng.normal(size=(NUM_ROWS, V**C, C, V)) * 1.5
  table[..., MASK] += 0.6
  return table.astype(np.float32)


def state_of(partial) -> int:
  return sum(int(token) * V**place for place, token in enumerate(partial))


def best(table: np.ndarray, partial) -> tuple[np.ndarray, np.ndarray]:
  logits = table[state_of(partial)].astype(np.float64)
  prob = np.exp(logits - logits.max(axis=-1, keepdims=True))
  prob /= prob.sum(axis=-1, keepdims=True)
  return prob.argmax(axis=-1), prob.max(axis=-1)


def llada(table: np.ndarray, counts: list[int]) -> list[int]:
  """LLaDA's loop of one row: the steps are counted, not what they achieve."""
  partial = [MASK] * C
  for block in range(C // T):
    for count in counts:
      token, confidence = best(table, partial)
      masked = [i for i in range((block + 1) * T) if partial[i] == MASK]
      for i in sorted(masked, key=lambda i: -confidence[i])[:count]:
        partial[i] = int(token[i])
  return partial


def fast_dllm(
  table: np.ndarray, threshold: float, length: int
) -> tuple[list[int], int]:
  """Fast-dLLM's loop of one row, given up on after `length` steps of a block.

  The last block may be shorter.
  """
  partial, num_passes = [MASK] * C, 0
  for start in range(0, C, length):
    end = min(start + length, C)
    for _ in range(length):
      token, confidence = best(table, partial)
      num_passes += 1
      masked = [i for i in range(end) if partial[i] == MASK]
      masked.sort(key=lambda i: -confidence[i])
      for i in masked[:1] + [
        i for i in masked[1:] if confidence[i] >= threshold
      ]:
        partial[i] = int(token[i])
      if MASK not in partial[start:end]:
        break
  return partial, num_passes


def sample(table: np.ndarray, **settings) -> types.Rollout:
  def logits(tokens_BxL, length_B, position_BxW):
    del length_B
    index_B = (tokens_BxL[:, 1:] * V ** jnp.arange(C)[None]).sum(axis=1)
    row_B = jnp.arange(NUM_ROWS)[:, None]
    return jnp.asarray(table)[row_B, index_B[:, None], position_BxW - 1]

  prompts = types.Prompts(
    tokens=jnp.ones((NUM_ROWS, 1), jnp.int32),
    length=jnp.ones((NUM_ROWS,), jnp.int32),
    key=jax.random.split(jax.random.key(0), NUM_ROWS),
  )
  sampling = sampling_lib.Sampling(
    mask_id=MASK,
    eos_id=0,
    completion_length=C,
    block_length=settings.pop("block_length", T),
    num_denoise_steps=settings.pop("num_denoise_steps", C),
    temperature=0.0,
    confidence="model",
    stop_at_eos=False,
    **settings,
  )
  return rollout_lib.sample_rollout(types.Network(logits), prompts, sampling)


@pytest.mark.parametrize(
  "num_steps,counts", [(4, [1, 1]), (2, [2]), (6, [1, 1, 0])]
)
def test_llada_as_released(num_steps, counts):
  table = tables()
  rollout = sample(
    table,
    unmask_rule="confidence",
    num_denoise_steps=num_steps,
    redraw_mask=True,
  )
  expected = np.array([llada(row, counts) for row in table])
  np.testing.assert_array_equal(rollout.completion, expected)
  # The case is there: masks that stay, and masks that a later block unmasked.
  assert (expected == MASK).any(axis=1).sum() > 50
  late = (np.asarray(rollout.unmask_step)[:, :T] >= num_steps // 2) & (
    expected[:, :T] != MASK
  )
  assert late.any(axis=1).sum() > 10


@pytest.mark.parametrize(
  "threshold, length", [(0.4, T), (0.6, T), (0.9, T), (0.6, 3)]
)
def test_fast_dllm_as_released_but_bounded(threshold, length):
  table = tables()
  rollout = sample(
    table,
    unmask_rule="threshold",
    threshold=threshold,
    redraw_mask=True,
    block_length=length,
  )
  expected = [fast_dllm(row, threshold, length) for row in table]
  np.testing.assert_array_equal(
    rollout.completion, [ids for ids, _ in expected]
  )
  np.testing.assert_array_equal(
    rollout.num_executed_steps, [n for _, n in expected]
  )


def test_ours_takes_mask_for_a_token():
  """Every position is unmasked once, whatever was drawn."""
  table = tables()
  rollout = sample(table, unmask_rule="confidence")
  assert (np.asarray(rollout.unmask_step) < C).all()
  assert (np.asarray(rollout.completion) == MASK).any()
