"""A row of the network's input: [prompt | completion | padding].

There is never padding between prompt and completion: it would stretch the
rotary distances between them.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from agrpo_jax import types


def join(
  prompt_P: jax.Array, prompt_length: jax.Array, partial_C: jax.Array
) -> jax.Array:
  """Puts a partial completion behind the real tokens of its prompt.

  Args:
    prompt_P: int32, padded on the right.
    prompt_length: int32.
    partial_C: int32, [MASK] where nothing is unmasked.

  Returns:
    int32 [P + C]; the last P - prompt_length positions are padding.
  """
  row_L = jnp.pad(prompt_P, (0, partial_C.shape[0]))
  return jax.lax.dynamic_update_slice_in_dim(row_L, partial_C, prompt_length, 0)


def windows(
  partial_BxSxC: jax.Array, start_BxS: jax.Array, size: int
) -> jax.Array:
  """Returns int32 [B, S, size], what stands from `start` on, each within C."""

  def window(partial_C: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(partial_C, start, size)

  return jax.vmap(jax.vmap(window))(partial_BxSxC, start_BxS)


def logits_at(
  network: types.Network,
  prompt_BxP: jax.Array,
  prompt_length_B: jax.Array,
  partial_BxC: jax.Array,
  offset_BxW: jax.Array,
  length_B: jax.Array | None = None,
) -> jax.Array:
  """Runs the network over whole rows.

  Args:
    network: bound to its parameters.
    prompt_BxP: int32, padded on the right.
    prompt_length_B: int32.
    partial_BxC: int32, partial completions.
    offset_BxW: int32, completion positions at which logits are wanted.
    length_B: int32, tokens of each completion; None for all C.

  Returns:
    float32 [B, W, V].
  """
  if length_B is None:
    length_B = jnp.full_like(prompt_length_B, partial_BxC.shape[1])
  return network.logits(
    jax.vmap(join)(prompt_BxP, prompt_length_B, partial_BxC),
    prompt_length_B + length_B,
    prompt_length_B[:, None] + offset_BxW,
  )


def cut(
  rows: Sequence[Sequence[int]], multiple: int
) -> tuple[list[Sequence[int]], list[Sequence[int]]]:
  """Returns the whole multiples of tokens of each row, and what they leave."""
  whole = [len(row) - len(row) % multiple for row in rows]
  pairs = list(zip(rows, whole, strict=True))
  return [row[:at] for row, at in pairs], [row[at:] for row, at in pairs]


def pack(
  rows: Sequence[Sequence[int]], multiple: int, pad_id: int = 0
) -> tuple[np.ndarray, np.ndarray]:
  """Puts rows of token ids into one array.

  Returns:
    tokens_BxP int32, right-padded with `pad_id`, P the longest row rounded up
    to a multiple of `multiple` (and at least that); and length_B int32, the
    length of each row.
  """
  if multiple < 1:
    raise ValueError(f"{multiple=} must be at least 1.")
  length_B = np.array([len(row) for row in rows], dtype=np.int32)
  longest = max(1, int(length_B.max(initial=0)))
  width = -(-longest // multiple) * multiple
  tokens_BxP = np.full((len(rows), width), pad_id, dtype=np.int32)
  for index, row in enumerate(rows):
    tokens_BxP[index, : len(row)] = row
  return tokens_BxP, length_B
