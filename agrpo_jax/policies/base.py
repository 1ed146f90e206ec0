"""What a policy is: the logits of a denoising step, given the row's state.

The *present state* of a row is its completion as it stands, [MASK] where
nothing is unmasked yet. The *start state* is what it was when its active block
began: the present state with that block masked again. So it is a function of
the present state and the block, nothing more has to be recorded to score a
step, and a sampler that keeps keys and values of the start state is just
another network (a Markov chain in the present states).

The sampler draws through a policy, and an objective that replays recorded steps
scores through the same two functions. That the policy ratio is 1 on the first
update tests all of it.
"""

from typing import Protocol

import jax

from agrpo_jax import types


class Policy(Protocol):
  """A policy: a frozen dataclass of its settings, and two functions.

  Rows are mapped by hand, not by `vmap`: a network wants whole batches.
  """

  def open(
    self,
    network: types.Network,
    prompt_BxP: jax.Array,
    prompt_length_B: jax.Array,
    start_BxC: jax.Array,
    block_start_B: jax.Array,
  ) -> types.Tree:
    """Computes what all steps of a block share.

    Args:
      network: bound to its parameters; gradients flow through the result.
      prompt_BxP: int32, padded on the right.
      prompt_length_B: int32.
      start_BxC: int32, the start state of each row.
      block_start_B: int32, completion position at which the block begins.

    Returns:
      The memory that `logits` reads: a tree of arrays whose leading axis is B;
      an empty one, such as `()`, where nothing is shared.
    """

  def logits(
    self,
    network: types.Network,
    memory: types.Tree,
    prompt_BxP: jax.Array,
    prompt_length_B: jax.Array,
    partial_BxSxC: jax.Array,
    offset_BxSxW: jax.Array,
  ) -> jax.Array:
    """Computes the logits of S present states of each row's block.

    Args:
      network: as given to `open`.
      memory: what `open` returned for the block's start state.
      prompt_BxP: int32, padded on the right.
      prompt_length_B: int32.
      partial_BxSxC: int32, the present states.
      offset_BxSxW: int32, completion positions at which logits are wanted.

    Returns:
      float32 [B, S, W, V].
    """
