"""Rollouts from the host's side: prompts in, batches of completions out."""

from collections.abc import Iterator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from agrpo_jax import data
from agrpo_jax import learner as learner_lib
from agrpo_jax import mesh as mesh_lib
from agrpo_jax import rollout as rollout_lib
from agrpo_jax import types
from agrpo_jax import unmask


def row_keys(
  key: jax.Array, prompt_id_B: np.ndarray, index_B: np.ndarray
) -> jax.Array:
  """Keys [B], each folded from the prompt's id and the completion's index."""
  fold = jax.vmap(jax.random.fold_in, (None, 0))
  return jax.vmap(jax.random.fold_in)(
    fold(key, jnp.asarray(prompt_id_B, jnp.uint32)),
    jnp.asarray(index_B, jnp.uint32),
  )


class Sampler:
  """Draws completions in batches of one size, compiled per prompt width."""

  def __init__(
    self,
    policy: learner_lib.PolicyFn,
    sampling: unmask.Sampling,
    mesh: mesh_lib.Mesh,
    batch_size: int,
    bucket: int,
  ):
    """Fixes the settings; nothing is compiled yet.

    Args:
      policy: binds the network to parameters and adapter.
      sampling: how completions are drawn.
      mesh: rows are split over it.
      batch_size: completions drawn at once.
      bucket: prompts are padded to a multiple of this many tokens.
    """

    def sample(
      params: types.Tree, lora: types.Tree | None, prompts: types.Prompts
    ) -> types.Rollout:
      return rollout_lib.sample_rollout(policy(params, lora), prompts, sampling)

    self.batch_size = batch_size
    self._bucket = bucket
    self._rows = mesh_lib.rows(mesh)
    self.program = jax.jit(sample, out_shardings=self._rows)

  def sample(
    self,
    params: types.Tree,
    lora: types.Tree | None,
    prompts: Sequence[Sequence[int]],
    key_B: jax.Array,
  ) -> Iterator[types.Rollout]:
    """Yields rollouts of `batch_size` rows, in the order of the prompts.

    The next batch is dispatched before one is yielded, so that the device
    works while the host decodes and grades. The last batch is filled up with
    repetitions of the last prompt: the caller takes what it asked for.
    """
    tokens_BxP, length_B = data.pack(prompts, self._bucket)
    ahead = None
    for start in range(0, len(prompts), self.batch_size):
      row = np.arange(start, start + self.batch_size)
      row = np.minimum(row, len(prompts) - 1)
      batch = types.Prompts(
        tokens=jnp.asarray(tokens_BxP[row]),
        length=jnp.asarray(length_B[row]),
        key=key_B[row],
      )
      rollout = self.program(params, lora, jax.device_put(batch, self._rows))
      if ahead is not None:
        yield ahead
      ahead = rollout
    if ahead is not None:
      yield ahead
