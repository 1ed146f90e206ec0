"""Fast-dLLM's caches (arXiv:2505.22618): keys and values of the start state.

Where a block begins, one pass over the whole row gives keys and values at all
positions. The steps of the block run the network on a window of it only: the
window's own keys and values are computed anew, those of the other positions are
the start state's. So the logits are a function of the present state and the
start state, and their gradient flows through the start state's keys and values
too.

The first step's present state is the start state: where it is known to be that
(in rollouts, and in units of several states) its logits come out of the whole
pass, and no window is run for it.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from agrpo_jax import types
from agrpo_jax.policies import row

# Windows that reach to the end of a completion get shorter block by block;
# compiled code has this many lengths at most.
_MAX_LENGTHS = 4


@dataclasses.dataclass(frozen=True)
class Cached:
  """A `base.Policy` whose steps run the network on a window of the row.

  Attributes:
    block_length: T.
    reaches_end: whether the window is the block and all that follows it
      (`prefix`: what is kept is what stands before the block), or the block
      alone (`dual`).
    refresh: see `base.Policy`.
  """

  block_length: int
  reaches_end: bool
  refresh: int = 0

  spans: ClassVar[bool] = False
  passes: ClassVar[int] = 1

  def open(
    self,
    network: types.Network,
    before: types.Tree | None,
    prompt_BxP: jax.Array,
    prompt_length_B: jax.Array,
    start_BxC: jax.Array,
    block_start_B: jax.Array,
    keeps: bool,
  ) -> types.Tree:
    """Runs the start state, or leaves it to `logits` to run it alongside."""
    del before
    tokens_BxL = jax.vmap(row.join)(prompt_BxP, prompt_length_B, start_BxC)
    if not keeps:
      return tokens_BxL
    length_B = prompt_length_B + start_BxC.shape[1]
    begin_B = _begin(network, prompt_length_B, block_start_B)
    offset_Q = jnp.arange(self.block_length + network.shift)
    return network.keys_values(
      tokens_BxL, length_B, begin_B[:, None] + offset_Q[None]
    )

  def logits(
    self,
    network: types.Network,
    memory: types.Tree,
    prompt_BxP: jax.Array,
    prompt_length_B: jax.Array,
    partial_BxSxC: jax.Array,
    block_start_BxS: jax.Array,
    offset_BxSxW: jax.Array,
    is_start: jax.Array | bool,
  ) -> jax.Array:
    """Runs B * S windows, none of the start; see `base.Policy.logits`."""
    num_states, num_tokens = partial_BxSxC.shape[1:]
    length_B = prompt_length_B + num_tokens
    position_BxSxW = prompt_length_B[:, None, None] + offset_BxSxW
    if isinstance(memory, jax.Array) and is_start:
      # It runs beside the windows of the others.
      if num_states == 1:
        return network.logits(memory, length_B, position_BxSxW[:, 0])[:, None]
      partial_BxSxC = partial_BxSxC[:, 1:]
    # All states of a row are of one block.
    start_B = _begin(network, prompt_length_B, block_start_BxS[:, 0])
    start_BxS = jnp.broadcast_to(start_B[:, None], partial_BxSxC.shape[:2])
    tokens_BxSxL = jax.vmap(jax.vmap(row.join, (None, None, 0)))(
      prompt_BxP, prompt_length_B, partial_BxSxC
    )

    def run(size: int) -> jax.Array:
      size += network.shift
      # A window that reaches beyond the completion ends in padding.
      padded_BxSxL = jnp.pad(tokens_BxSxL, ((0, 0), (0, 0), (0, size)))
      return network.window_logits(
        memory,
        length_B,
        row.windows(padded_BxSxL, start_BxS, size),
        start_B[:, None],
        position_BxSxW,
        # Windows of several states are run together, or none of them.
        is_start if num_states == 1 else False,
      )

    if not self.reaches_end:
      return run(self.block_length)
    sizes = _lengths(num_tokens, self.block_length)
    # The earliest block of the batch needs the longest window.
    needed = num_tokens - block_start_BxS[:, 0].min()
    branch = jnp.searchsorted(jnp.asarray(sizes), needed)
    return jax.lax.switch(branch, [lambda s=s: run(s) for s in sizes])


def _begin(
  network: types.Network, prompt_length: jax.Array, block_start: jax.Array
) -> jax.Array:
  """Where the window of a block begins in its row."""
  # Where logits are shifted, those of a window's first position are what comes
  # out one before it.
  return jnp.maximum(prompt_length + block_start - network.shift, 0)


def _lengths(num_tokens: int, block_length: int) -> list[int]:
  """Returns lengths of windows, ascending, whole blocks; the last is all."""
  num_blocks = -(-num_tokens // block_length)
  count = min(num_blocks, _MAX_LENGTHS)
  return [
    -(-num_blocks * (i + 1) // count) * block_length for i in range(count)
  ]
