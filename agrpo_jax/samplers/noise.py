"""Where a rollout's randomness comes from: keys per row, noise per step."""

from collections.abc import Callable
from typing import NamedTuple

import jax


class Noise(NamedTuple):
  """The source of randomness; tests put recorded noise here.

  Attributes:
    order: (key, denoise_step, T) -> float32 [T]; the `random` rule unmasks the
      positions with the largest first.
    gumbel: (key, denoise_step, offset_S, ids_SxK) -> float32 [S, K], standard
      Gumbel noise for candidate tokens at offsets within the block.
    passes: (key, denoise_step, T) -> float32 [T], uniform in [0, 1), and
    fallback: (key, denoise_step, T) -> float32 [T], standard Gumbel: see
      `rules.Chance`.
  """

  order: Callable[..., jax.Array]
  gumbel: Callable[..., jax.Array]
  passes: Callable[..., jax.Array]
  fallback: Callable[..., jax.Array]


def _step_key(key: jax.Array, denoise_step: jax.Array, use: int) -> jax.Array:
  return jax.random.fold_in(jax.random.fold_in(key, denoise_step), use)


def _order(key, denoise_step, block_length):
  return jax.random.uniform(_step_key(key, denoise_step, 0), (block_length,))


def _gumbel(key, denoise_step, offset_S, ids_SxK):
  del offset_S
  return jax.random.gumbel(_step_key(key, denoise_step, 1), ids_SxK.shape)


def _passes(key, denoise_step, block_length):
  return jax.random.uniform(_step_key(key, denoise_step, 2), (block_length,))


def _fallback(key, denoise_step, block_length):
  return jax.random.gumbel(_step_key(key, denoise_step, 3), (block_length,))


def row_keys(key: jax.Array, row_id_Bx2: jax.Array) -> jax.Array:
  """Keys [B], one per row, whatever batch, slot or device it has.

  Args:
    key: of the train step or the evaluation.
    row_id_Bx2: uint32 [B, 2], the prompt's id and the completion's index among
      those of its prompt.
  """
  return jax.vmap(
    lambda row_id: jax.random.fold_in(
      jax.random.fold_in(key, row_id[0]), row_id[1]
    )
  )(row_id_Bx2)


NOISE = Noise(order=_order, gumbel=_gumbel, passes=_passes, fallback=_fallback)
