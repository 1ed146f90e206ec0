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
from typing import Any
from typing import ClassVar

import jax
import jax.numpy as jnp

from agrpo_jax import types
from agrpo_jax.policies import row


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
    """Runs the row, or only the block that has been finished since `before`."""
    size, num_tokens = network.attention_block, start_BxC.shape[1]
    tokens_BxL = jax.vmap(row.join)(prompt_BxP, prompt_length_B, start_BxC)
    # A window is a whole block, even if the row is none.
    missing = max(size - tokens_BxL.shape[1], 0)
    tokens_BxL = jnp.pad(tokens_BxL, ((0, 0), (0, missing)))
    if not keeps:
      return tokens_BxL
    # A last block that is not whole has nothing behind it that would see it.
    length_B = prompt_length_B + num_tokens - num_tokens % size
    if before is None:
      return network.keys_values(tokens_BxL, length_B)
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
    is_start: jax.Array | bool,
  ) -> jax.Array:
    """Runs B * S blocks; see `base.Policy.logits`."""
    del prompt_BxP  # the memory tells of it
    # It shows finished blocks, where the states have theirs masked.
    del is_start
    size, num_tokens = network.attention_block, partial_BxSxC.shape[2]
    begin_BxS = _begin(block_start_BxS, size)
    # A last block that is not whole ends in padding.
    padded = jnp.pad(partial_BxSxC, ((0, 0), (0, 0), (0, -num_tokens % size)))
    return network.window_logits(
      memory,
      prompt_length_B + num_tokens,
      row.windows(padded, begin_BxS, size),
      prompt_length_B[:, None] + begin_BxS,
      prompt_length_B[:, None, None] + offset_BxSxW,
    )


@dataclasses.dataclass(frozen=True)
class OfMasks:
  """A `base.Policy` of states that are partial in any of their blocks.

  A block sees itself as it stands, and the whole ones before it: what a masked
  token is predicted from in training (arXiv:2503.09573).

  Attributes:
    policy: that gives a block's logits.
  """

  policy: BlockCausal

  refresh: ClassVar[int] = 0
  spans: ClassVar[bool] = True
  passes: ClassVar[int] = 1

  def open(self, *args: Any, **settings: Any) -> types.Tree:
    """Opens the memory of `policy`, which is of the whole completion."""
    return self.policy.open(*args, **settings)

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
    """Runs the blocks of the positions asked for, or all if these are fewer."""
    del block_start_BxS
    size = network.attention_block
    num_rows, num_states, num_tokens = partial_BxSxC.shape
    num_wanted, num_blocks = offset_BxSxW.shape[2], -(-num_tokens // size)
    is_each = num_wanted < num_blocks
    if is_each:
      wanted = offset_BxSxW[..., None]
      start_BxSxN = offset_BxSxW - offset_BxSxW % size
    else:
      start_N = jnp.arange(0, num_tokens, size, dtype=jnp.int32)
      start_BxSxN = jnp.broadcast_to(
        start_N[None, None], (num_rows, num_states, num_blocks)
      )
      wanted = start_BxSxN[..., None] + jnp.arange(size)[None, None, None]

    def of_blocks(x: jax.Array) -> jax.Array:
      return x.reshape(num_rows, -1, *x.shape[3:])

    logits = self.policy.logits(
      network,
      memory,
      prompt_BxP,
      prompt_length_B,
      jnp.repeat(partial_BxSxC, start_BxSxN.shape[2], axis=1),
      of_blocks(start_BxSxN),
      of_blocks(wanted),
      is_start,
    )
    logits = logits.reshape(num_rows, num_states, -1, logits.shape[-1])
    if is_each:
      return logits
    return jnp.take_along_axis(logits, offset_BxSxW[..., None], axis=2)


def partial_logits(
  network: types.Network,
  prompt_BxP: jax.Array,
  prompt_length_B: jax.Array,
  completion_BxC: jax.Array,
  partial_BxC: jax.Array,
) -> jax.Array:
  """Logits of partial completions whose blocks see whole ones before them.

  Args:
    network: whose attention is block-causal.
    prompt_BxP: int32, padded on the right.
    prompt_length_B: int32.
    completion_BxC: int32, what the blocks behind a block see of it.
    partial_BxC: int32, what it sees of itself.

  Returns:
    float32 [B, C, V].
  """
  policy = OfMasks(BlockCausal(network.attention_block))
  prompt, no_start_B = (prompt_BxP, prompt_length_B), prompt_length_B
  memory = policy.open(
    network, None, *prompt, completion_BxC, no_start_B, keeps=False
  )
  offset_C = jnp.arange(completion_BxC.shape[1], dtype=jnp.int32)
  offset_BxC = jnp.broadcast_to(offset_C, completion_BxC.shape)
  return policy.logits(
    network,
    memory,
    *prompt,
    partial_BxC[:, None],
    no_start_B[:, None],
    offset_BxC[:, None],
    is_start=False,
  )[:, 0]


def _begin(block_start: jax.Array, size: int) -> jax.Array:
  """Where the network's block of a sampler's block begins."""
  # A completion begins where one of its blocks does.
  return block_start - block_start % size
