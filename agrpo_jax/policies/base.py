"""What a policy is: the logits of a denoising step, given the row's state.

The *present state* of a row is its completion as it stands, [MASK] where
nothing is unmasked yet. The *start state* is what it was when the memory that a
step reads was opened: where its active block began, or some steps later
(`refresh`). The record of a rollout, `unmask_step`, tells both, so nothing more
has to be recorded to score a step, and a sampler that keeps keys and values of
the start state is just another network (a Markov chain in the two states).

The sampler draws through a policy, and an objective that replays recorded steps
scores through the same two functions. That the policy ratio is 1 on the first
update tests all of it.
"""

from typing import Protocol

import jax
import jax.numpy as jnp

from agrpo_jax import types


class Policy(Protocol):
  """A policy: a frozen dataclass of its settings, and two functions.

  Rows are mapped by hand, not by `vmap`: a network wants whole batches.

  Attributes:
    refresh: denoising steps of a block that share one memory; 0: all of them.
    spans: whether a memory serves the steps of all blocks of a completion: made
      of the whole of it, or block by block, of the one before.
    passes: passes over the whole row that it takes to open a memory, or a step
      where nothing is shared.
  """

  @property
  def refresh(self) -> int: ...
  @property
  def spans(self) -> bool: ...
  @property
  def passes(self) -> int: ...

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
    """Computes what steps of a block share.

    Args:
      network: bound to its parameters; gradients flow through the result.
      before: the memory of the block before this one, where the policy `spans`
        and there was one.
      prompt_BxP: int32, padded on the right.
      prompt_length_B: int32.
      start_BxC: int32, the start state of each row.
      block_start_B: int32, completion position at which the block begins.
      keeps: whether more than one call of `logits` reads the memory. Else a
        policy may leave work to `logits` that is done better there, layer by
        layer.

    Returns:
      The memory that `logits` reads: a tree of arrays; an empty one, such as
      `()`, where nothing is shared.
    """

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
    """Computes the logits of S present states of each row.

    They are states of one block, unless the policy `spans`.

    Args:
      network: as given to `open`.
      memory: what `open` returned for their start state.
      prompt_BxP: int32, padded on the right.
      prompt_length_B: int32.
      partial_BxSxC: int32, the present states.
      block_start_BxS: int32, completion position at which their block begins.
      offset_BxSxW: int32, completion positions at which logits are wanted. Of
        a policy that runs the block alone, some before it may be asked for too:
        any finite logits will do there, since nobody reads them.
      is_start: bool, whether the first of the states is the start state, which
        a policy has run where it opened the memory; Python's where it was not
        kept.

    Returns:
      float32 [B, S, W, V].
    """


def start_step(
  policy: Policy, denoise_step: jax.Array, steps_per_block: int
) -> jax.Array:
  """Returns the denoising step, int32, whose state is a step's start state.

  Args:
    policy: whose memory the step reads.
    denoise_step: int32.
    steps_per_block: indices of steps that a block has.
  """
  if policy.spans:  # of all steps: what stands in later blocks is not seen
    return jnp.full_like(denoise_step, jnp.iinfo(jnp.int32).max)
  block_step = denoise_step % steps_per_block
  if policy.refresh:
    return denoise_step - block_step % policy.refresh
  return denoise_step - block_step
