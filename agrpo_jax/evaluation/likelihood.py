"""The any-order bound of given completions, batch by batch."""

from collections.abc import Iterator
from collections.abc import Sequence
from typing import Protocol

import jax
import numpy as np

from agrpo_jax import errors
from agrpo_jax import types
from agrpo_jax.models import base
from agrpo_jax.models import tokens
from agrpo_jax.objectives import elbo
from agrpo_jax.parallel import mesh as mesh_lib
from agrpo_jax.parallel import processes


class Model(Protocol):
  """The part of `port.model.Model` that is used here."""

  @property
  def mesh(self) -> mesh_lib.Mesh: ...
  @property
  def shape(self) -> base.Shape: ...
  @property
  def params(self) -> types.Tree: ...
  @property
  def lora(self) -> types.Tree | None: ...
  @property
  def tokenizer(self) -> tokens.Tokenizer: ...

  def bind(
    self, params: types.Tree, lora: types.Tree | None
  ) -> types.Network: ...


class Scorer:
  """Estimates, batch by batch, for the completions it is made with."""

  def __init__(
    self,
    model: Model,
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
      model: with its parameters.
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
    self._model, self._ids, self._seed = model, list(ids), seed
    # All at once: batches of one width need one compilation.
    self._pairs = pairs = elbo.pack(prompts, completions, bucket, model.shape)
    mesh_lib.check_rows(model.mesh, "config.evaluate.batch_size", batch_size)
    lengths = np.asarray(pairs.prompt_length) + np.asarray(pairs.length)
    longest = int(lengths.max(initial=0))
    if not all(completions):
      raise errors.UserError("A completion without tokens has no likelihood.")
    if longest > model.shape.max_length:
      raise errors.UserError(
        f"A prompt with its completion has {longest} tokens, more than the "
        f"model's {model.shape.max_length}."
      )
    self._rows = mesh_lib.rows(model.mesh)
    self._program = jax.jit(self._estimates, out_shardings=self._rows)

  def _estimates(self, params, lora, pairs, key, row_id_Bx2):
    is_masked_BxC = jax.vmap(
      lambda row_id_2, is_asked_C: elbo.draw_mask(
        key,
        row_id_2,
        is_asked_C,
        num_draws=self._num_draws,
        attention_block=pairs.attention_block,
      )
    )(row_id_Bx2, pairs.is_asked)
    network = self._model.bind(params, lora)
    return elbo.estimate(
      network, pairs, is_masked_BxC, self._model.tokenizer.mask_id
    )

  def estimates(self, first: int = 0) -> Iterator[np.ndarray]:
    """Yields float64 [M] for each completion from number `first` on."""
    num_rows = len(self._ids) * self._num_draws
    # A batch may end amid the draws of a completion; these wait for the rest.
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
          self._model.params,
          self._model.lora,
          pairs,
          jax.random.key(self._seed),
          row_id_Bx2,
        )
      )
      # The last batch is filled up with repetitions.
      values = np.concatenate([values, found_B[: num_rows - start]])
      while values.size >= self._num_draws:
        yield values[: self._num_draws]
        values = values[self._num_draws :]
