"""Fast-dLLM's caches (arXiv:2505.22618): keys and values of the start state.

Where a block begins, one pass over the whole row gives keys and values at all
positions. The steps of the block run the network on a window of it only: the
window's own keys and values are computed anew, those of the other positions are
the start state's. So the logits are a function of the present state and the
start state, and their gradient flows through the start state's keys and values
too.

The first step needs no case of its own: its present state is the start state,
and its window gives what the whole pass would.
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
    del before, block_start_B
    tokens_BxL = jax.vmap(row.join)(prompt_BxP, prompt_length_B, start_BxC)
    if not keeps:
      return tokens_BxL
    length_B = prompt_length_B + start_BxC.shape[1]
    return network.keys_values(tokens_BxL, length_B)

  def logits(
    self,
    network: types.Network,
    memory: types.Tree,
    prompt_BxP: jax.Array,
    prompt_length_B: jax.Array,
    partial_BxSxC: jax.Array,
    block_start_BxS: jax.Array,
    offset_BxSxW: jax.Array,
  ) -> jax.Array:
    """Runs B * S windows; see `base.Policy.logits`."""
    num_tokens = partial_BxSxC.shape[2]
    # Where logits are shifted, those of a window's first position are what
    # comes out one before it.
    start_BxS = prompt_length_B[:, None] + block_start_BxS - network.shift
    start_BxS = jnp.maximum(start_BxS, 0)
    tokens_BxSxL = jax.vmap(jax.vmap(row.join, (None, None, 0)))(
      prompt_BxP, prompt_length_B, partial_BxSxC
    )

    def run(size: int) -> jax.Array:
      size += network.shift
      # A window that reaches beyond the completion ends in padding.
      padded_BxSxL = jnp.pad(tokens_BxSxL, ((0, 0), (0, 0), (0, size)))
      return network.window_logits(
        memory,
        prompt_length_B + num_tokens,
        row.windows(padded_BxSxL, start_BxS, size),
        # All states of a row are of one block.
        start_BxS[:, :1],
        prompt_length_B[:, None, None] + offset_BxSxW,
      )

    if not self.reaches_end:
      return run(self.block_length)
    sizes = _lengths(num_tokens, self.block_length)
    # The earliest block of the batch needs the longest window.
    needed = num_tokens - block_start_BxS[:, 0].min()
    branch = jnp.searchsorted(jnp.asarray(sizes), needed)
    return jax.lax.switch(branch, [lambda s=s: run(s) for s in sizes])


def _lengths(num_tokens: int, block_length: int) -> list[int]:
  """Returns lengths of windows, ascending, whole blocks; the last is all."""
  num_blocks = -(-num_tokens // block_length)
  count = min(num_blocks, _MAX_LENGTHS)
  return [
    -(-num_blocks * (i + 1) // count) * block_length for i in range(count)
  ]
