"""The exact cache of block-causal models: a block never sees those behind it.

So the keys and values of a finished block are what they will always be. The
steps of a block run the network on that block alone; when it is full, one more
pass over it adds its keys and values to those of the blocks before it.

A whole completion has one memory: that of its finished blocks serves the steps
of every block, and a replay runs the completion once beside all the blocks that
it visits (the two copies of arXiv:2503.09573, section 4).
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from agrpo_jax import types
from agrpo_jax.policies import row


def partial_logits(
  network: types.Network,
  block_length: int,
  prompt_BxP: jax.Array,
  prompt_length_B: jax.Array,
  completion_BxC: jax.Array,
  partial_BxC: jax.Array,
) -> jax.Array:
  """Logits of partial completions whose blocks see whole ones before them.

  Args:
    network: whose attention is block-causal.
    block_length: T, a divisor of C.
    prompt_BxP: int32, padded on the right.
    prompt_length_B: int32.
    completion_BxC: int32, what the blocks behind a block see of it.
    partial_BxC: int32, what it sees of itself.

  Returns:
    float32 [B, C, V].
  """
  num_rows, num_tokens = completion_BxC.shape
  start_S = jnp.arange(0, num_tokens, block_length, dtype=jnp.int32)
  start_BxS = jnp.broadcast_to(start_S[None], (num_rows, len(start_S)))
  offset_BxSxT = start_BxS[..., None] + jnp.arange(block_length)[None, None]
  policy = BlockCausal(block_length)
  prompt = prompt_BxP, prompt_length_B
  memory = policy.open(
    network, None, *prompt, completion_BxC, start_BxS[:, 0], keeps=False
  )
  partial_BxSxC = jnp.broadcast_to(
    partial_BxC[:, None], (*start_BxS.shape, num_tokens)
  )
  logits = policy.logits(
    network, memory, *prompt, partial_BxSxC, start_BxS, offset_BxSxT
  )
  return logits.reshape(num_rows, num_tokens, -1)


@dataclasses.dataclass(frozen=True)
class BlockCausal:
  """A `base.Policy` for networks whose attention is block-causal.

  Attributes:
    block_length: T, of the sampler and of the network's attention.
  """

  block_length: int

  refresh: ClassVar[int] = 0
  spans: ClassVar[bool] = True

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
    """Runs the row, or only the block that has been finished since `before`."""
    tokens_BxL = jax.vmap(row.join)(prompt_BxP, prompt_length_B, start_BxC)
    if not keeps:
      return tokens_BxL
    length_B = prompt_length_B + start_BxC.shape[1]
    if before is None:
      return network.keys_values(tokens_BxL, length_B)
    # Of a prompt shorter than a block what follows it is run too: blocks to
    # come, which are run anew before anything sees them.
    finished_B = jnp.maximum(
      prompt_length_B + block_start_B - self.block_length, 0
    )
    finished_BxT = row.windows(
      tokens_BxL[:, None], finished_B[:, None], self.block_length
    )[:, 0]
    return network.extend(before, length_B, finished_BxT, finished_B)

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
    """Runs B * S blocks; see `base.Policy.logits`."""
    del prompt_BxP  # the memory tells of it
    return network.window_logits(
      memory,
      prompt_length_B + partial_BxSxC.shape[2],
      row.windows(partial_BxSxC, block_start_BxS, self.block_length),
      prompt_length_B[:, None] + block_start_BxS,
      prompt_length_B[:, None, None] + offset_BxSxW,
    )
