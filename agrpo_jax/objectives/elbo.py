"""The any-order lower bound (ELBO) of a completion's log-likelihood.

Of a completion with C tokens, draw a count n from 1..C and n positions without
replacement, mask them, and take

    C / n * sum over masked i of log p(token i | what is not masked).

Its expectation is the mean, over all orders, of the log-probability of the
tokens one after the other in that order: a lower bound of the log-likelihood
(arXiv:2502.09992, get_log_likelihood.py). Exact counts have less variance than
masking each token by chance, and the counts of a completion's M draws are
stratified: k + floor(j C / M) for j < M with one random k, modulo C.
"""

from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from agrpo_jax import build
from agrpo_jax import data
from agrpo_jax import errors
from agrpo_jax import types
from agrpo_jax.parallel import mesh as mesh_lib
from agrpo_jax.parallel import processes
from agrpo_jax.policies import row
from agrpo_jax.samplers import rules


@flax.struct.dataclass
class Pairs:
  """B prompts with their completions, both padded on the right.

  Attributes:
    prompt: int32 [B, P].
    prompt_length: int32 [B].
    completion: int32 [B, C].
    length: int32 [B], tokens of each completion, at least 1.
  """

  prompt: jax.Array
  prompt_length: jax.Array
  completion: jax.Array
  length: jax.Array


def estimate(
  network: types.Network,
  pairs: Pairs,
  is_masked_BxC: jax.Array,
  mask_id: int,
) -> jax.Array:
  """float32 [B]: C / n times the log-probability of the n masked tokens.

  is_masked_BxC: at least one position in each row, within its length.
  """
  offset_C = jnp.arange(pairs.completion.shape[1])
  logits_BxCxV = row.logits_at(
    network,
    pairs.prompt,
    pairs.prompt_length,
    jnp.where(is_masked_BxC, mask_id, pairs.completion),
    jnp.broadcast_to(offset_C, pairs.completion.shape),
    pairs.length,
  )
  logprob_BxC = jnp.take_along_axis(
    jax.nn.log_softmax(logits_BxCxV), pairs.completion[..., None], axis=-1
  )[..., 0]
  total_B = jnp.where(is_masked_BxC, logprob_BxC, 0.0).sum(axis=1)
  return pairs.length / is_masked_BxC.sum(axis=1) * total_B


def count(
  shift: jax.Array, length: jax.Array, draw: jax.Array, num_draws: int
) -> jax.Array:
  """How many tokens the draw masks, 1..length; each as likely if `shift` is.

  shift: int32, uniform over 0..length - 1, the same for all draws of a
    completion. (Rounding where LLaDA's code has a floor would favour counts of
    one parity.)
  """
  return 1 + (shift + draw * length // num_draws) % length


def draw_mask(
  key: jax.Array,
  row_id_2: jax.Array,
  length: jax.Array,
  *,
  width: int,
  num_draws: int,
) -> jax.Array:
  """bool [width]: which positions of a completion one draw masks.

  row_id_2: uint32 [2], the completion's id and the number of the draw.
  """
  draw = row_id_2[1].astype(jnp.int32)
  id_key = jax.random.fold_in(key, row_id_2[0])
  shift_key = jax.random.fold_in(id_key, num_draws)
  shift = jax.random.randint(shift_key, (), 0, length)
  num_masked = count(shift, length, draw, num_draws)
  draw_key = jax.random.fold_in(id_key, draw)
  is_token_C = jnp.arange(width) < length
  noise_C = jax.random.uniform(draw_key, (width,))
  return is_token_C & (rules.ranks(noise_C, is_token_C) < num_masked)


class Scorer:
  """Estimates, batch by batch, for the completions it is made with."""

  def __init__(
    self,
    policy: build.Policy,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    ids: Sequence[int],
    *,
    num_draws: int,
    batch_size: int,
    bucket: int,
    seed: int,
  ):
    """Fixes what is scored.

    Args:
      policy: the model.
      prompts: token ids.
      completions: token ids, each at least one.
      ids: of the completions; their random keys come from it.
      num_draws: M per completion.
      batch_size: rows (a completion with one of its masks) at once.
      bucket: both sides are padded to a multiple of this many tokens.
      seed: of the masks.

    Raises:
      UserError: an empty completion, or one that is too long with its prompt.
    """
    self._num_draws, self._batch_size = num_draws, batch_size
    self._policy, self._ids, self._seed = policy, list(ids), seed
    prompt_BxP, prompt_length_B = data.pack(prompts, bucket)
    completion_BxC, length_B = data.pack(completions, bucket)
    build.check_rows(policy.mesh, "evaluate.batch_size", batch_size)
    longest = int((prompt_length_B + length_B).max(initial=0))
    if length_B.min(initial=1) < 1:
      raise errors.UserError("A completion without tokens has no likelihood.")
    if longest > policy.network.max_length:
      raise errors.UserError(
        f"A prompt with its completion has {longest} tokens, more than the "
        f"model's {policy.network.max_length}."
      )
    host: dict[str, Any] = dict(
      prompt=prompt_BxP,
      prompt_length=prompt_length_B,
      completion=completion_BxC,
      length=length_B,
    )
    self._pairs = Pairs(**host)
    self._rows = mesh_lib.rows(policy.mesh)
    self._program = jax.jit(self._estimates, out_shardings=self._rows)

  def _estimates(self, params, lora, pairs, key, row_id_Bx2):
    is_masked_BxC = jax.vmap(
      lambda row_id_2, length: draw_mask(
        key,
        row_id_2,
        length,
        width=pairs.completion.shape[1],
        num_draws=self._num_draws,
      )
    )(row_id_Bx2, pairs.length)
    network = self._policy.bind(params, lora)
    return estimate(
      network, pairs, is_masked_BxC, self._policy.tokenizer.mask_id
    )

  def estimates(self, first: int = 0) -> Iterator[np.ndarray]:
    """Yields float64 [M] for each completion from number `first` on."""
    num_rows = len(self._ids) * self._num_draws
    values = np.zeros(0)
    for start in range(first * self._num_draws, num_rows, self._batch_size):
      index = np.arange(start, start + self._batch_size)
      index = np.minimum(index, num_rows - 1)
      one, draw = np.divmod(index, self._num_draws)
      row_id_Bx2 = np.stack([np.array(self._ids)[one], draw], 1)
      pairs, row_id_Bx2 = jax.device_put(
        (
          jax.tree.map(lambda x, one=one: x[one], self._pairs),
          row_id_Bx2.astype(np.uint32),
        ),
        self._rows,
      )
      found_B = processes.to_host(
        self._program(
          self._policy.params,
          self._policy.lora,
          pairs,
          jax.random.key(self._seed),
          row_id_Bx2,
        )
      )
      values = np.concatenate([values, found_B[: num_rows - start]])
      while values.size >= self._num_draws:
        yield values[: self._num_draws]
        values = values[self._num_draws :]
