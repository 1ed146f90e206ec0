"""The exact cache of block-causal models: a block never sees those behind it.

So the keys and values of a finished block are what they will always be. The
steps of a block run the network on that block alone; when it is full, one more
pass over it adds its keys and values to those of the blocks before it.

The sampler's blocks may be parts of the network's: the steps of a part run the
network's block, whose later parts are masked yet, and keys and values are added
where that is full.

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
    block_length: T of the sampler, a divisor of the network's
      (`types.Network.attention_block`).
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
    size = network.attention_block
    # Of a prompt shorter than a block what follows it is run too: blocks to
    # come, which are run anew before anything sees them.
    finished_B = jnp.maximum(
      prompt_length_B + _begin(block_start_B, size) - size, 0
    )
    finished_BxT = row.windows(tokens_BxL[:, None], finished_B[:, None], size)[
      :, 0
    ]

    def extended() -> types.Tree:
      return network.extend(before, length_B, finished_BxT, finished_B)

    if self.block_length == size:
      return extended()
    begins_B = block_start_B == _begin(block_start_B, size)
    return jax.lax.cond(begins_B.any(), extended, lambda: before)

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
    size = network.attention_block
    begin_BxS = _begin(block_start_BxS, size)
    return network.window_logits(
      memory,
      prompt_length_B + partial_BxSxC.shape[2],
      row.windows(partial_BxSxC, begin_BxS, size),
      prompt_length_B[:, None] + begin_BxS,
      prompt_length_B[:, None, None] + offset_BxSxW,
    )


def _begin(block_start: jax.Array, size: int) -> jax.Array:
  """Where the network's block of a sampler's block begins."""
  # A completion begins where one of its blocks does.
  return block_start - block_start % size
