"""The records that cross module borders, and the function types.

Shape letters, here and everywhere: N prompts, G completions per prompt,
B = N * G rows, P prompt length, C completion length, L = P + C row length,
K denoising steps, M drawn steps, U tokens per step, T block length,
S positions or support size, V vocabulary, D width.
"""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import flax.struct
import jax
import numpy as np

Tree = Any  # a pytree of arrays

LogitsFn = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(tokens_BxL, length_B, positions_BxS) -> logits_BxSxV, float32.

A row has `length` tokens; what stands after them is without effect. Logits
exist only at the asked positions.
"""

TopK = Callable[[jax.Array, int], tuple[jax.Array, jax.Array]]
"""(x [V], k) -> the k largest, descending, and int32 [k] where they are in x.

Of equal values the first come first, as `jax.lax.top_k` has it.
"""

KeysValuesFn = Callable[..., Tree]
"""(tokens_BxL, length_B, window_BxQ=None) -> keys and values of all layers.

Of all positions, arrays [..., B, H, L, Dh]. Beside them the outputs of a window
of positions, [B, 1, Q, D], if there is one (where attention is to whole rows);
or where logits are shifted and attention is block-causal what predicts the
first position of each block, which stands before any window that begins there:
[B, 1, blocks, D].
"""

KEPT_OR_WINDOWS = "kept_or_windows"
"""Where a compiled program chooses whether to run windows, or need not."""

WindowLogitsFn = Callable[..., jax.Array]
"""(shared, length_B, tokens_BxSxQ, start_BxS, positions_BxSxW, is_kept=False)
-> logits.

float32 [B, S, W, V]: logits of S states of each row, each with a window of Q
positions from its `start` on ([B, 1]: all of a row from the same). Keys and
values of the positions outside it are `shared`: a `KeysValuesFn` returned them,
or they are those of the tokens [B, L] that stand there, computed layer by layer
beside the windows. The positions are those of the row, as in `LogitsFn`; what
tells of them comes out within the windows (`Network.shift`).

The state that is shared needs no window. Where it runs beside them positions
may be asked for that are its own, before those of the windows: [B, 1 + S, W].
Where it was kept with the outputs of the windows, bool `is_kept` says whether
it is what the windows hold, which then are not run.
"""

ExtendFn = Callable[[Tree, jax.Array, jax.Array, jax.Array], Tree]
"""(shared, length_B, tokens_BxQ, start_B) -> shared, of other tokens there.

Keys and values of a window of Q positions from `start` on are computed anew,
with those of the other positions as they are.
"""


def _no_windows(*args: Any) -> Any:
  raise TypeError(
    "This network has no windows: no policy with a cache fits it."
  )


class Network(NamedTuple):
  """A network bound to its parameters and adapter.

  The sampler and the objectives know no more of a network than this; a test
  puts a table of logits in its place, whose probabilities are known by hand.

  Attributes:
    logits: see `LogitsFn`. They are target-aligned: the logits at a position
      are for the token at that position.
    top_k: how the largest of its logits are found, `parallel.split.top_k_of`
      where the vocabulary is split over devices.
    keys_values: see `KeysValuesFn`; raises TypeError where the network has no
      windows.
    window_logits: see `WindowLogitsFn`; likewise.
    extend: see `ExtendFn`; likewise.
    attention_block: T of block-causal attention, in whose blocks windows are;
      0: attention is to whole rows.
    shift: how many positions before a token its logits come out, 0 or 1. Where
      attention is to whole rows a window that is to tell of a token begins that
      much before it.
  """

  logits: LogitsFn
  top_k: TopK = jax.lax.top_k
  keys_values: KeysValuesFn = _no_windows
  window_logits: WindowLogitsFn = _no_windows
  extend: ExtendFn = _no_windows
  attention_block: int = 0
  shift: int = 0


BindFn = Callable[[Tree, Tree | None], Network]
"""(params, lora) -> the network bound to them."""


class Start(flax.struct.PyTreeNode):
  """Where B completions are taken up: at a block, those before it as given.

  What stands in the block and behind it is without effect, but for the tokens
  of the prompt there (`Rollout`).

  Attributes:
    completion: int32 [B, C].
    unmask_step: int32 [B, C], as in `Rollout`; before the block all unmasked.
    block: int32 [B], the first that is drawn; 0 draws all.
  """

  completion: jax.Array | np.ndarray
  unmask_step: jax.Array | np.ndarray
  block: jax.Array | np.ndarray


class Prompts(flax.struct.PyTreeNode):
  """B prompts, one per completion to draw, each padded on the right.

  Attributes:
    tokens: int32 [B, P].
    length: int32 [B], how many tokens of each row are real.
    key: random keys [B], one per row. All that is drawn for a completion comes
      from its own key, so it depends neither on its batch mates nor on the
      number of devices.
    start: where the completions are taken up; None: they are drawn whole.
  """

  tokens: jax.Array
  length: jax.Array
  key: jax.Array
  start: Start | None = None


class Rollout(flax.struct.PyTreeNode):
  """B completions with all that scoring them again needs.

  A position that no denoising step unmasked (the completion ended before it)
  holds the EOS id, and its `unmask_step` is K, later than every step. Where
  blocks are counted from the prompt's beginning, those last tokens of the
  prompt that share a block with the completion stand at its beginning, and
  their `unmask_step` is -1, before every step (`samplers.host`). Of a
  completion that was taken up (`Start`) nothing else is recorded of the blocks
  that were given.

  Attributes:
    prompt: int32 [B, P], padded on the right.
    prompt_length: int32 [B].
    completion: int32 [B, C].
    unmask_step: int32 [B, C], the denoising step that unmasked the position, K
      where none did, -1 where the prompt stands.
    logprob: float32 [B, C], log-probability of the token when it was drawn,
      under the behaviour policy, after temperature and support; 0 where none.
    entropy: float32 [B, C], in nats, of the distribution the token was drawn
      from; 0 where none.
    support: which tokens top-k and top-p kept when the token was drawn: int32
      ids [B, C, S] padded with -1; or uint8 [B, C, ceil(V / 8)], packed bits,
      when top-p acts without top-k; or None when nothing was cut.
    order_logprob: float32 [B, K], log-probability that, of the masked positions
      of the block, just these were unmasked, given their tokens (0 under rules
      that do not look at the draws).
    num_executed_steps: int32 [B], denoising steps that the row executed. Their
      indices may have gaps: each block has the same number of indices, and
      leaves out those that it did not need.
    num_whole_passes: int32 [B], passes of the network over the whole row: as
      many as steps, or as memories that were opened for its blocks.
    num_slot_steps: int32 [B], denoising steps of the batch during which the row
      held one of its slots: those it executed, and those it waited.
  """

  prompt: jax.Array
  prompt_length: jax.Array
  completion: jax.Array
  unmask_step: jax.Array
  logprob: jax.Array
  entropy: jax.Array
  support: jax.Array | None
  order_logprob: jax.Array
  num_executed_steps: jax.Array
  num_whole_passes: jax.Array
  num_slot_steps: jax.Array


class TrainState(flax.struct.PyTreeNode):
  """All that training changes; a checkpoint leaves out a frozen base.

  Attributes:
    train_step: int32 scalar, train steps done.
    params: the network's parameters; trained when `lora` is None, else frozen.
    lora: the adapters, or None.
    opt_state: the optimizer's state over what is trained.
  """

  train_step: jax.Array
  params: Tree
  lora: Tree | None
  opt_state: Tree

  @property
  def trainable(self) -> Tree:
    return self.params if self.lora is None else self.lora

  def with_trainable(self, tree: Tree) -> "TrainState":
    if self.lora is None:
      return self.replace(params=tree)
    return self.replace(lora=tree)
