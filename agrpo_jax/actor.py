"""Draws completions and has them graded: of a train step, and of its values."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from agrpo_jax import data
from agrpo_jax import learner as learner_lib
from agrpo_jax import types
from agrpo_jax.grading import pool
from agrpo_jax.grading import shares
from agrpo_jax.models import tokens
from agrpo_jax.objectives import base
from agrpo_jax.parallel import processes
from agrpo_jax.samplers import host
from agrpo_jax.samplers import sampling as sampling_lib


@dataclasses.dataclass(frozen=True)
class Actor:
  """A sampler, and the grader of what it draws.

  Attributes:
    sampler: draws.
    tokenizer: ids -> text.
    grader: of the task.
  """

  sampler: host.Sampler
  tokenizer: tokens.Tokenizer
  grader: pool.Grader

  def sample(
    self, state: types.TrainState, batch: data.Batch, key: jax.Array
  ) -> tuple[types.Rollout, list[shares.Pending]]:
    """Draws a completion per row, and starts grading each chunk as it comes.

    Grading runs on the host while the device draws the next chunk.

    Returns:
      The rollout of all rows, and what is being graded of it, in order.
    """
    chunks, pending = zip(*self._chunks(state, batch, key), strict=True)
    return jax.tree.map(lambda *x: jnp.concatenate(x), *chunks), [*pending]

  def _chunks(
    self,
    state: types.TrainState,
    batch: data.Batch,
    key: jax.Array,
    start: types.Start | None = None,
  ) -> Iterator[tuple[types.Rollout, shares.Pending]]:
    size = self.sampler.batch_size
    chunks = self.sampler.sample(
      state.params, state.lora, batch.tokens, key, batch.id_Bx2, start=start
    )
    for index, chunk in enumerate(chunks):
      rows = batch[index * size : (index + 1) * size]
      drawn_BxC = self.sampler.drawn(chunk)
      yield (
        chunk,
        shares.submit(drawn_BxC, rows, self.tokenizer, self.grader),
      )

  def values(
    self,
    restarts: base.Restarts,
    learner: learner_lib.Learner,
    state: types.TrainState,
    batch: data.Batch,
    sampled: types.Rollout,
    reward_B: np.ndarray,
    key: jax.Array,
  ) -> tuple[np.ndarray, dict[str, float]]:
    """Estimates the values of states within the completions of a batch.

    Each state is drawn on from, with keys that are nobody else's, by the
    sampler that came to it; what comes out is graded like any other completion.

    Args:
      restarts: which states, and how often.
      learner: knows what steps cost.
      state: whose policy drew the completions.
      batch: B prompts.
      sampled: their completions.
      reward_B: of these.
      key: random, of this alone.

    Returns:
      float32 [B, V], mean rewards, the price of the steps taken off; of a state
      behind the completion's end its own. And scalars to log.
    """
    num_rows, sampling = len(batch), learner.sampling
    block_V = np.array(restarts.blocks, np.int32)
    completion_BxC, unmask_step_BxC = map(
      processes.to_host, (sampled.completion, sampled.unmask_step)
    )
    num_done_NxB = _steps_done(unmask_step_BxC, sampling)
    num_given_VxB, num_steps_B = num_done_NxB[block_V - 1], num_done_NxB[-1]
    is_state_VxB = num_given_VxB < num_steps_B  # else behind the end
    paid_B = reward_B - learner.price(num_steps_B)
    value_VxB = np.tile(paid_B, (len(block_V), 1))
    # The same state of all completions stands together: those end together too.
    state_R, row_R, again_R = np.nonzero(
      np.repeat(is_state_VxB[..., None], restarts.num, axis=-1)
    )
    num_own, num_passes, change = 0, 0, 0.0
    if len(row_R):
      # Numbered like the completions of a prompt: each has a key of its own.
      index_B = np.array(batch.index)
      index_R = (
        index_B[row_R] * len(block_V) + state_R
      ) * restarts.num + again_R
      anew = data.Batch(
        prompts=tuple(batch.prompts[row] for row in row_R),
        index=tuple(index_R.tolist()),
      )
      start = types.Start(
        completion=completion_BxC[row_R],
        unmask_step=unmask_step_BxC[row_R],
        block=block_V[state_R],
      )
      pending, counts = [], []
      for chunk, graded in self._chunks(state, anew, key, start):
        pending.append(graded)
        each = chunk.num_executed_steps, chunk.num_whole_passes
        counts.append([processes.to_host(x) for x in each])
      # What filled the last batch up stands at the end.
      own_R, passes_R = np.concatenate(counts, axis=1)[:, : len(row_R)]
      price_R = learner.price(num_given_VxB[state_R, row_R] + own_R)
      paid_R = shares.collect(pending).reward_B - price_R
      value_VxB[is_state_VxB] = paid_R.reshape(-1, restarts.num).mean(axis=1)
      num_own, num_passes = own_R.sum(), passes_R.sum()
      next_VxB = np.concatenate([value_VxB[1:], paid_B[None]])
      change = np.abs(next_VxB - value_VxB)[is_state_VxB].mean()
    scalars = {
      "values/restarts": len(row_R),
      # Per completion that is learned from, as `completions/...`.
      "values/mean_denoise_steps": num_own / num_rows,
      "values/mean_whole_passes": num_passes / num_rows,
      "values/mean_change": change,
    }
    return (
      value_VxB.T.astype(np.float32),
      {name: float(value) for name, value in scalars.items()},
    )


def _steps_done(
  unmask_step_BxC: np.ndarray, sampling: sampling_lib.Sampling
) -> np.ndarray:
  """int [num_blocks, B], denoising steps executed by the end of each block."""
  # A block ends with the step that unmasked the last of it; those before may
  # have unmasked nothing.
  begin_N = np.arange(sampling.num_blocks) * sampling.block_length
  last_BxN = np.maximum.reduceat(unmask_step_BxC, begin_N, axis=1)
  first_N = np.arange(sampling.num_blocks) * sampling.steps_per_block
  is_drawn_BxN = last_BxN < sampling.max_steps
  # Of a block that is all the prompt's the last "step" is -1.
  num_BxN = np.maximum(last_BxN - first_N + 1, 0)
  return np.where(is_drawn_BxN, num_BxN, 0).cumsum(axis=1).T
