"""One transformer in Flax, whose attention is not causal.

Rows are laid out [prompt | completion | padding] with a length each; every
position attends to the first `length` positions, or, where attention is
block-causal, to those up to the end of its block; so padding and batch mates
change nothing. `hidden` and `unembed` are apart, and both work only at given
positions: logits of a whole sequence are never formed, and the last layer
computes queries and MLP only where a result is asked for.

A pass of *windows* computes several states of a row that differ within a window
of positions; keys and values of the other positions are those of one state
that they share. They are given (`keys_values` made them), or the row goes
through the layers beside its windows and no layer's keys and values outlive it.

The parameters are laid out as the table in `parameters` says.
"""

import math
from collections.abc import Callable
from typing import Any

import chex
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import ad_checkpoint

from agrpo_jax import types
from agrpo_jax.models import base
from agrpo_jax.models import ops
from agrpo_jax.models import parameters
from agrpo_jax.models import quantized
from agrpo_jax.parallel import mesh as mesh_lib
from agrpo_jax.parallel import split

abstract_params = parameters.abstract_params
init = parameters.init
logical_axes = parameters.logical_axes

# Below this many queries the scores of the last layer are small, and the tiles
# of a kernel that keeps them on the chip would be mostly empty.
_FEWEST_KERNEL_QUERIES = 64

# What remat "dots" keeps: the name of every projection's output.
_PROJECTION = "projection"


def take_positions(x_BxLxD: jax.Array, positions_BxS: jax.Array) -> jax.Array:
  """x at the positions of each row: [B, S, D]."""
  return jax.vmap(lambda x, at: x.at[at].get(mode="clip"))(
    x_BxLxD, positions_BxS
  )


class Projection(nn.Module):
  """x W + b, plus lora_scale (x A) B where an adapter is given.

  W may be a `quantized.Kernel`.
  `specs` are the arrays of this projection. The adapter lives in the variable
  collection "lora": a [in, R] and b [R, out]. Where `rows` are split over the
  mesh, weights split over its axis fsdp are gathered here.
  """

  specs: dict[str, parameters.Spec]
  dtype: str
  lora_scale: float = 1.0
  rows: mesh_lib.NamedSharding | None = None

  @nn.compact
  def __call__(self, x: jax.Array, out_dtype: Any = None) -> jax.Array:
    dtype = jnp.dtype(self.dtype)
    x = x.astype(dtype)
    kernel: Any = self.param("kernel", self.specs["kernel"].initial)
    fan_in, fan_out = self.specs["kernel"].axes
    out_dtype = out_dtype or dtype
    # What is added to is rounded after the sum.
    is_sum = self.has_variable("lora", "a") or "bias" in self.specs
    is_int8 = isinstance(kernel, quantized.Kernel)
    y = (ops.matmul_int8 if is_int8 else ops.matmul)(
      x,
      kernel,
      self._shardings(fan_in, fan_out),
      jnp.float32 if is_sum else out_dtype,
    )
    if self.has_variable("lora", "a"):
      a: jax.Array = self.get_variable("lora", "a")
      b: jax.Array = self.get_variable("lora", "b")
      # Rounded, since they pass through memory: half the traffic.
      inner = ops.matmul(x, a, self._shardings(fan_in, "rank"), dtype)
      outer = ops.matmul(inner, b, self._shardings("rank", fan_out), dtype)
      # Held back, or the compiler finishes y first and adds up in the smaller
      # product: the float32 sums of y would pass through memory.
      y += self.lora_scale * jax.lax.optimization_barrier(outer)
    if "bias" in self.specs:
      bias = self.param("bias", self.specs["bias"].initial)
      y += ops.last_axis(bias, y.ndim)
    y = y.astype(out_dtype)
    return ad_checkpoint.checkpoint_name(y, _PROJECTION)

  def _shardings(self, *axes: str) -> mesh_lib.Shardings | None:
    return mesh_lib.weight_shardings(self.rows, axes) if self.rows else None


class RMSNorm(nn.Module):
  """x / sqrt(mean(x^2) + eps), in float32, times a learned scale."""

  specs: dict[str, parameters.Spec]
  eps: float

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.param("scale", self.specs["scale"].initial)
    return ops.rms_norm(x, scale, self.eps)


class Pass(flax.struct.PyTreeNode):
  """What is the same for all layers of one pass over N tokens per row.

  Attributes:
    seen_BxN: int32, how many positions of its row each token attends to;
      [B, 1]: each token of a row.
    cos: float32 [1 or B, N, 1, Dh / 2], rotary embedding of the N tokens.
    sin: likewise.
    start_BxS: int32, where each state's window begins; [B, 1]: all windows of a
      row; None if there is none.
    num_row_tokens: how many of the N tokens are whole rows; they come first,
      the windows follow.
    num_states: S, windows per row.
    num_wanted_rows: how many positions of rows are wanted of the last layer,
      beside those of windows; they come first.
    keeps: whether each layer returns the keys and values that it computed, of
      rows or of windows.
  """

  seen_BxN: jax.Array
  cos: jax.Array
  sin: jax.Array
  start_BxS: jax.Array | None = None
  num_row_tokens: int = flax.struct.field(pytree_node=False, default=0)
  num_states: int = flax.struct.field(pytree_node=False, default=0)
  num_wanted_rows: int = flax.struct.field(pytree_node=False, default=0)
  keeps: bool = flax.struct.field(pytree_node=False, default=False)


class Layer(nn.Module):
  """One transformer layer: attention and a gated MLP, each on a residual.

  Returns x and, if the pass keeps them, the keys and values of the rows, each
  [B, H, L, Dh]. With `wanted_BxW` x is [B, W, D]: keys and values come from
  all tokens, the rest of the work is done only there.

  `shared` are keys and values that windows attend to, as another pass kept
  them; None if the rows are part of this pass.
  """

  shape: base.Shape
  lora_scale: float = 1.0
  rows: mesh_lib.NamedSharding | None = None

  @nn.compact
  def __call__(
    self,
    x_BxNxD: jax.Array,
    shared: tuple[jax.Array, jax.Array] | None,
    of: Pass,
    wanted_BxW: jax.Array | None = None,
  ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
    shape = self.shape
    table = parameters.layer_specs(shape)

    def project(name: str, x: jax.Array) -> jax.Array:
      return Projection(
        table[name],
        shape.dtype,
        self.lora_scale,
        self.rows,
        name=name,
      )(x)

    def norm(name: str, x: jax.Array) -> jax.Array:
      return RMSNorm(table[name], shape.norm_eps, name=name)(x)

    def heads(name: str, x: jax.Array) -> jax.Array:
      y = project(name, x)
      return y.reshape(*y.shape[:2], -1, shape.head_dim)

    def rotated(name: str, x: jax.Array, cos: jax.Array, sin: jax.Array) -> Any:
      y = heads(name, x)
      return ops.rotate(
        norm(f"{name}_norm", y) if shape.qk_norm else y, cos, sin
      )

    with jax.named_scope("attention"):
      normed = norm("attn_norm", x_BxNxD)
      cos, sin = of.cos, of.sin
      k = rotated("k", normed, cos, sin)
      v = heads("v", normed)
      if wanted_BxW is not None:
        x_BxNxD = take_positions(x_BxNxD, wanted_BxW)
        normed = take_positions(normed, wanted_BxW)
        # Rows share the tables, but each wants positions of its own.
        cos, sin = (
          take_positions(
            jnp.broadcast_to(one, (wanted_BxW.shape[0], *one.shape[1:])),
            wanted_BxW,
          )
          for one in (cos, sin)
        )
        if of.seen_BxN.shape[1] > 1:
          seen_BxW = jnp.take_along_axis(of.seen_BxN, wanted_BxW, axis=1)
          of = of.replace(seen_BxN=seen_BxW)
      q = rotated("q", normed, cos, sin)
      mixed = self._attend(q, k, v, shared, of, wanted_BxW is None)
      mixed = mixed.reshape(*mixed.shape[:2], -1)
      x_BxNxD = x_BxNxD + project("attn_out", mixed)
    with jax.named_scope("mlp"):
      normed = norm("mlp_norm", x_BxNxD)
      gated = ops.gated_silu(project("gate", normed), project("up", normed))
      x_BxNxD = x_BxNxD + project("down", gated)
    kept = None
    if of.keeps:
      # Rotated, and laid out as attention reads them: once, not in every step.
      kept = ops.heads_first(k), ops.heads_first(v)
    return _split_rows(x_BxNxD, self.rows), kept

  def _attend(
    self,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    shared: tuple[jax.Array, jax.Array] | None,
    of: Pass,
    is_whole: bool,
  ) -> jax.Array:
    """Attention of the queries of rows, of windows, or of both in turn.

    is_whole: whether all N tokens have a query, and not some wanted ones.
    """
    size = of.num_row_tokens
    row_k, row_v = k[:, :size], v[:, :size]
    if of.start_BxS is None:
      return self._attend_rows(q, row_k, row_v, of.seen_BxN, is_whole)
    if shared is None:
      shared = ops.heads_first(row_k), ops.heads_first(row_v)
    row_queries = size if is_whole else of.num_wanted_rows

    def by_state(x: jax.Array) -> jax.Array:
      return x.reshape(x.shape[0], of.num_states, -1, *x.shape[2:])

    row_seen = seen_BxS = of.seen_BxN
    if seen_BxS.shape[1] > 1:
      # The tokens of a window see alike.
      row_seen = seen_BxS[:, :row_queries]
      seen_BxS = by_state(seen_BxS[:, row_queries:])[:, :, 0]
    mixed = ops.attend_windows(
      by_state(q[:, row_queries:]),
      by_state(k[:, size:]),
      by_state(v[:, size:]),
      *shared,
      of.start_BxS,
      seen_BxS,
      _attention(
        self.shape,
        q.shape[1] - row_queries,
        self.rows,
        seen_BxS.shape[1] == 1,
      ),
      self.rows,
    )
    mixed = mixed.reshape(q.shape[0], -1, *q.shape[2:])
    if row_queries:
      of_rows = self._attend_rows(
        q[:, :row_queries], row_k, row_v, row_seen, is_whole
      )
      mixed = jnp.concatenate([of_rows, mixed], axis=1)
    return mixed

  def _attend_rows(
    self,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    seen: jax.Array,
    is_whole: bool,
  ) -> jax.Array:
    mask_LxL = None
    if is_whole:
      mask_LxL = _block_mask(self.shape, k.shape[1])
    is_known = seen.shape[1] == 1 or mask_LxL is not None
    how = _attention(self.shape, q.shape[1], self.rows, is_known)
    return ops.attend(q, k, v, seen, how, self.rows, mask_LxL)


def _block_mask(shape: base.Shape, length: int) -> np.ndarray | None:
  """bool [L, L], what the tokens of every row see; None if rows differ."""
  if not shape.attention_block or shape.blocks_from == "end":
    return None
  block_L = np.arange(length) // shape.attention_block
  return block_L[:, None] >= block_L[None, :]


def _split_rows(x: jax.Array, rows: mesh_lib.NamedSharding | None) -> jax.Array:
  # Where parameters are split over the devices that also split the rows, the
  # compiler would else gather the activations, and every device would compute
  # every row.
  return x if rows is None else jax.lax.with_sharding_constraint(x, rows)


def _attention(
  shape: base.Shape,
  num_queries: int,
  rows: mesh_lib.NamedSharding | None,
  is_known: bool = True,
) -> str:
  """Which implementation; whether a kernel can be told what a query sees."""
  if shape.attention == "splash" and not is_known:
    return "xla"
  if shape.attention != "auto":
    return shape.attention
  if shape.dtype != "bfloat16" or num_queries < _FEWEST_KERNEL_QUERIES:
    return "xla"
  # A plan compiles for devices that are not those of the backend.
  platform = mesh_lib.platform(rows.mesh) if rows else jax.default_backend()
  found = ops.splash_problem(shape.num_kv_heads, shape.head_dim, rows)
  if platform == "tpu" and (found or not is_known):
    return "xla"
  return {"gpu": "cudnn", "tpu": "splash"}.get(platform, "xla")


def _remat(remat: str, in_scan: bool) -> Callable[[Any], Any]:
  """Wraps a layer so that its backward pass keeps only what `remat` says."""
  if remat == "none":
    return lambda layer: layer
  policy = None
  if remat == "dots":
    policy = jax.checkpoint_policies.save_only_these_names(_PROJECTION)
  # Inside a scan nothing can be merged across iterations anyway.
  return lambda layer: nn.remat(layer, prevent_cse=not in_scan, policy=policy)


class Transformer(nn.Module):
  """The network. Parameters are laid out as `parameters.specs` says.

  Attributes:
    shape: shapes and compute switches.
    lora_scale: factor of the adapter, if the collection "lora" is given.
    rows: how the rows of a batch are split over devices (`mesh.rows`); needed
      where parameters are split too.
  """

  shape: base.Shape
  lora_scale: float = 1.0
  rows: mesh_lib.NamedSharding | None = None

  def setup(self) -> None:
    shape, table = self.shape, parameters.specs(self.shape)
    self.embed = Embed(table["embed"], self.rows)
    if shape.num_layers > 1:
      # The last layer is outside the scan, which has one body for all: only it
      # works at some positions alone.
      self.layers = nn.scan(
        _remat(shape.remat, in_scan=True)(Layer),
        variable_axes={"params": 0, "lora": 0},
        split_rngs={"params": True},
        # Each layer reads shared keys and values of its own, in the same pass.
        in_axes=(0, nn.broadcast),
        length=shape.num_layers - 1,
        unroll=min(shape.unroll, shape.num_layers - 1),
      )(shape, self.lora_scale, self.rows)
    self.last_layer = _remat(shape.remat, in_scan=False)(Layer)(
      shape, self.lora_scale, self.rows
    )
    self.final_norm = RMSNorm(table["final_norm"], shape.norm_eps)
    if not shape.tied_head:
      self.head = Projection(
        table["head"], shape.dtype, self.lora_scale, self.rows
      )

  def hidden(
    self,
    tokens_BxL: jax.Array,
    length_B: jax.Array,
    positions_BxS: jax.Array,
  ) -> jax.Array:
    """The normalised output that predicts the positions, [B, S, D].

    It is the last layer's at the positions themselves, or one before where the
    network's logits are shifted; position 0 has none before it, and keeps its
    own.

    Args:
      tokens_BxL: int, rows [prompt | completion | padding].
      length_B: int32, tokens of each row before its padding.
      positions_BxS: int32, the positions to predict; may repeat.
    """
    chex.assert_rank([tokens_BxL, length_B, positions_BxS], [2, 1, 2])
    of = self._row_pass(tokens_BxL, length_B)
    return self._run(tokens_BxL, None, of, self._output(positions_BxS))[0]

  def keys_values(
    self,
    tokens_BxL: jax.Array,
    length_B: jax.Array,
    window_BxQ: jax.Array | None = None,
  ) -> types.Tree:
    """Returns what `window_hidden` reads: keys and values of every layer.

    Args:
      tokens_BxL: as in `hidden`.
      length_B: as in `hidden`.
      window_BxQ: int32, positions whose outputs are returned too; what lies
        behind the row gives any. For attention to whole rows only.

    Returns:
      (of all layers but the last, of the last, outputs), each of the two keys
      and values [layers, B, H, L, Dh] or [B, H, L, Dh]. Outputs are normalised,
      [B, 1, Q, D], those of `window_BxQ`; where logits are shifted and
      attention is block-causal what predicts the first position of each block,
      as `hidden` has it, [B, 1, blocks, D]; else None.
    """
    of = self._row_pass(tokens_BxL, length_B).replace(keeps=True)
    # The last layer's other output is thrown away, and so not computed.
    wanted_BxN = jnp.zeros_like(length_B)[:, None]
    if _is_led(self.shape):
      begin_N = jnp.arange(0, tokens_BxL.shape[1], self.shape.attention_block)
      wanted_BxN += self._output(begin_N)[None]
    elif window_BxQ is not None:
      wanted_BxN = window_BxQ
    has_outputs = _is_led(self.shape) or window_BxQ is not None
    hidden_BxNxD, kept = self._run(tokens_BxL, None, of, wanted_BxN)
    return *kept, hidden_BxNxD[:, None] if has_outputs else None

  def kept_hidden(
    self, shared: types.Tree, start_BxS: jax.Array, positions_BxSxW: jax.Array
  ) -> jax.Array:
    """As `window_hidden`, of the state that was kept, [B, S, W, D].

    Args:
      shared: what `keys_values` returned, with the outputs of a window.
      start_BxS: int32, where that begins.
      positions_BxSxW: int32, as in `window_hidden`.
    """
    offset_BxSxW = self._output(positions_BxSxW) - start_BxS[:, :, None]
    return jax.vmap(take_positions, (None, 1), 1)(
      shared[2][:, 0], jnp.maximum(offset_BxSxW, 0)
    )

  def extend(
    self,
    shared: types.Tree,
    length_B: jax.Array,
    tokens_BxQ: jax.Array,
    start_B: jax.Array,
  ) -> types.Tree:
    """Returns `shared` with the keys and values of a window computed anew.

    Args:
      shared: what `keys_values` or `extend` returned.
      length_B: as in `hidden`.
      tokens_BxQ: int, what stands in each row's window, which ends in the row.
      start_B: int32, the first position of each row's window.
    """
    of, tokens_BxN = self._window_pass(
      shared,
      length_B,
      tokens_BxQ[:, None],
      start_B[:, None],
      self._first(length_B[:, None]),
    )
    # What predicts the block behind; as in `keys_values`, where it is wanted.
    wanted_Bx1 = jnp.full_like(start_B, tokens_BxQ.shape[1] - 1)[:, None]
    hidden_Bx1xD, new = self._run(
      tokens_BxN, shared, of.replace(keeps=True), wanted_Bx1
    )

    def write(old_BxHxLxDh: jax.Array, new_BxHxQxDh: jax.Array) -> jax.Array:
      return jax.vmap(
        lambda old, new, at: jax.lax.dynamic_update_slice_in_dim(
          old, new, at, axis=1
        )
      )(old_BxHxLxDh, new_BxHxQxDh, start_B)

    first = shared[2]
    if _is_led(self.shape):
      behind_B = start_B // self.shape.attention_block + 1
      first = jax.vmap(
        lambda old_1xNxD, new_1xD, at: old_1xNxD.at[:, at].set(
          new_1xD, mode="drop"
        )
      )(first, hidden_Bx1xD, behind_B)
    return (
      jax.tree.map(jax.vmap(write), shared[0], new[0]),
      jax.tree.map(write, shared[1], new[1]),
      first,
    )

  def window_hidden(
    self,
    shared: types.Tree,
    length_B: jax.Array,
    tokens_BxSxQ: jax.Array,
    start_BxS: jax.Array,
    positions_BxSxW: jax.Array,
  ) -> jax.Array:
    """As `hidden`, of S states of each row, each with a window of Q of its own.

    Args:
      shared: what `keys_values` returned for the state whose keys and values
        stand outside the windows; or that state's tokens, int [B, L], which
        then go through the layers beside the windows. Of these S may be one
        more than there are windows: it comes first, and is that state itself.
      length_B: as in `hidden`.
      tokens_BxSxQ: int, the windows; what is at or behind `length` is padding.
      start_BxS: int32, the position at which each window begins; [B, 1]: all
        windows of a row. Where attention is block-causal a window is a block,
        of which the last one of a row may be cut by its length.
      positions_BxSxW: int32, positions of the rows to predict. What predicts
        them comes out within the windows, but for the first of a block where
        logits are shifted and attention is block-causal.

    Returns:
      [B, S, W, D].
    """
    num_states, num_positions = tokens_BxSxQ.shape[1], positions_BxSxW.shape[2]
    has_rows = isinstance(shared, jax.Array)
    # Of the row itself, and of the windows.
    row_BxRxW, positions_BxSxW = jnp.split(
      positions_BxSxW, [positions_BxSxW.shape[1] - num_states], axis=1
    )
    of, tokens_BxN = self._window_pass(
      shared,
      length_B,
      tokens_BxSxQ,
      start_BxS,
      # Not of the length: a row's last block may end before it is full.
      self._first(start_BxS[:, :1]),
    )
    # Where the positions are among the N tokens: the row, if it is part of the
    # pass, then its windows side by side.
    size = tokens_BxSxQ.shape[2]
    offset_BxSxW = self._output(positions_BxSxW) - start_BxS[:, :, None]
    wanted_BxSxW = jnp.maximum(offset_BxSxW, 0)
    wanted_BxSxW += size * jnp.arange(num_states)[None, :, None]
    wanted_BxSxW += of.num_row_tokens
    wanted_BxN = wanted_BxSxW.reshape(-1, num_states * num_positions)
    is_led = _is_led(self.shape)
    begin_BxS = jnp.broadcast_to(start_BxS, tokens_BxSxQ.shape[:2])
    wanted_rows_BxN = self._output(row_BxRxW).reshape(len(row_BxRxW), -1)
    if is_led and has_rows:
      wanted_rows_BxN = jnp.concatenate(
        [wanted_rows_BxN, self._output(begin_BxS)], axis=1
      )
    hidden, _ = self._run(
      tokens_BxN,
      None if has_rows else shared,
      of.replace(num_wanted_rows=wanted_rows_BxN.shape[1]),
      jnp.concatenate([wanted_rows_BxN, wanted_BxN], axis=1),
    )
    of_row, first_BxSxD, hidden = jnp.split(
      hidden, [row_BxRxW[0].size, wanted_rows_BxN.shape[1]], axis=1
    )
    of_row, hidden = (
      x.reshape(len(x), -1, num_positions, x.shape[-1])
      for x in (of_row, hidden)
    )
    if is_led:
      if not has_rows:
        block_BxS = begin_BxS // self.shape.attention_block
        first_BxSxD = take_positions(shared[2][:, 0], block_BxS)
      # What predicts a block's first position is the output before the block.
      hidden = jnp.where(
        offset_BxSxW[..., None] < 0, first_BxSxD[:, :, None], hidden
      )
    return jnp.concatenate([of_row, hidden], axis=1)

  def _output(self, position: jax.Array) -> jax.Array:
    """Returns at which positions those come out that predict some."""
    if not self.shape.shift:
      return position
    return jnp.maximum(position - self.shape.shift, 0)

  def _window_pass(
    self,
    shared: types.Tree,
    length_B: jax.Array,
    tokens_BxSxQ: jax.Array,
    start_BxS: jax.Array,
    first_Bx1: jax.Array,
  ) -> tuple[Pass, jax.Array]:
    """The pass, and its N tokens: the row, if it is part of it, and windows."""
    num_rows, num_states, size = tokens_BxSxQ.shape
    tokens = tokens_BxSxQ.reshape(num_rows, -1)
    has_rows = isinstance(shared, jax.Array)
    # The last layer's keys tell, since a network of one layer has no others.
    length = shared.shape[1] if has_rows else shared[1][0].shape[2]
    # A window that reaches beyond the row ends in padding, for which any
    # rotation will do.
    position_BxSxQ = jnp.minimum(
      start_BxS[..., None] + jnp.arange(size)[None, None], length - 1
    )
    position_BxN = jnp.broadcast_to(position_BxSxQ, tokens_BxSxQ.shape).reshape(
      num_rows, -1
    )
    if has_rows:
      tokens = jnp.concatenate([shared, tokens], axis=1)
      row_BxL = jnp.broadcast_to(jnp.arange(length)[None], shared.shape)
      position_BxN = jnp.concatenate([row_BxL, position_BxN], axis=1)
    cos, sin = (
      # Shared keys were rotated by positions in the row; windows must be too.
      one[position_BxN][:, :, None]
      for one in ops.rope_tables(
        self.shape.head_dim, self.shape.rope_theta, length
      )
    )
    of = Pass(
      self._seen(position_BxN, length_B, first_Bx1),
      cos,
      sin,
      start_BxS,
      num_row_tokens=length if has_rows else 0,
      num_states=num_states,
    )
    return of, tokens

  def _row_pass(self, tokens_BxL: jax.Array, length_B: jax.Array) -> Pass:
    cos, sin = (
      one[None, :, None]
      for one in ops.rope_tables(
        self.shape.head_dim, self.shape.rope_theta, tokens_BxL.shape[1]
      )
    )
    position_BxL = jnp.broadcast_to(
      jnp.arange(tokens_BxL.shape[1])[None], tokens_BxL.shape
    )
    return Pass(
      self._seen(position_BxL, length_B, self._first(length_B[:, None])),
      cos,
      sin,
      num_row_tokens=tokens_BxL.shape[1],
    )

  def _first(self, border_Bx1: jax.Array) -> jax.Array:
    """Where the first whole block of each row begins, given any of its borders.

    Blocks that are counted from the end leave the incomplete one in front.
    """
    if self.shape.blocks_from == "end" and self.shape.attention_block:
      return border_Bx1 % self.shape.attention_block
    return jnp.zeros_like(border_Bx1)

  def _seen(
    self, position_BxN: jax.Array, length_B: jax.Array, first_Bx1: jax.Array
  ) -> jax.Array:
    """int32 [B, N or 1], how many positions of its row each token sees."""
    size = self.shape.attention_block
    if not size:
      return length_B[:, None]
    end_BxN = ((position_BxN - first_Bx1) // size + 1) * size + first_Bx1
    return jnp.minimum(end_BxN, length_B[:, None])

  def _run(
    self,
    tokens_BxN: jax.Array,
    shared: types.Tree | None,
    of: Pass,
    wanted_BxW: jax.Array,
  ) -> tuple[jax.Array, types.Tree]:
    """Returns the normalised output at W of the N tokens, and what is kept."""
    with jax.named_scope("embed"):
      x_BxNxD = self.embed(tokens_BxN).astype(self.shape.dtype)
      x_BxNxD = _split_rows(x_BxNxD, self.rows)
    shared_layers, shared_last, _ = shared or (None, None, None)
    kept_layers = None
    if self.shape.num_layers > 1:
      with jax.named_scope("layers"):
        x_BxNxD, kept_layers = self.layers(x_BxNxD, shared_layers, of)
    with jax.named_scope("last_layer"):
      x_BxWxD, kept_last = self.last_layer(x_BxNxD, shared_last, of, wanted_BxW)
    return self.final_norm(x_BxWxD), (kept_layers, kept_last)

  def unembed(self, hidden_BxSxD: jax.Array) -> jax.Array:
    """Logits [B, S, embedding_size], float32."""
    with jax.named_scope("unembed"):
      if self.shape.tied_head:
        logits = ops.matmul(hidden_BxSxD, self.embed.table.T)
      else:
        logits = self.head(hidden_BxSxD, jnp.float32)
      if self.shape.scale_logits:
        logits /= math.sqrt(self.shape.width)
      return logits

  def __call__(
    self,
    tokens_BxL: jax.Array,
    length_B: jax.Array,
    positions_BxS: jax.Array,
  ) -> jax.Array:
    return self.unembed(self.hidden(tokens_BxL, length_B, positions_BxS))


class Embed(nn.Module):
  """The table of token embeddings."""

  specs: dict[str, parameters.Spec]
  rows: mesh_lib.NamedSharding | None = None

  def setup(self) -> None:
    self.table = self.param("table", self.specs["table"].initial)

  def __call__(self, tokens: jax.Array) -> jax.Array:
    # Padding may hold anything; "fill" would turn a wild id into NaN, which
    # no attention mask can undo.
    tokens = jnp.clip(tokens, 0, self.specs["table"].shape[0] - 1)
    if self.rows is None:
      return self.table[tokens]
    return split.lookup(self.rows, self.table, tokens)


def bind(
  shape: base.Shape,
  params: Any,
  lora: Any = None,
  lora_scale: float = 1.0,
  rows: mesh_lib.NamedSharding | None = None,
  top_k: types.TopK = jax.lax.top_k,
) -> types.Network:
  """The network bound to its parameters.

  Its logits have `vocab_size` columns, float32.

  Args:
    shape: shapes and compute switches.
    params: its parameters.
    lora: an adapter, or None.
    lora_scale: of the adapter.
    rows: how a batch is split over devices, see `Transformer`.
    top_k: see `types.Network`.
  """
  network = Transformer(shape, lora_scale, rows)
  variables = {"params": params}
  if lora is not None:
    variables["lora"] = lora

  def run(method: Callable[..., jax.Array], *args: Any) -> Any:
    return network.apply(variables, *args, method=method)

  def logits(
    tokens_BxL: jax.Array, length_B: jax.Array, positions_BxS: jax.Array
  ) -> jax.Array:
    logits_BxSxE = run(
      Transformer.__call__, tokens_BxL, length_B, positions_BxS
    )
    # The columns beyond are no tokens: they must not enter a softmax.
    return logits_BxSxE[..., : shape.vocab_size]

  def keys_values(
    tokens_BxL: jax.Array,
    length_B: jax.Array,
    window_BxQ: jax.Array | None = None,
  ) -> types.Tree:
    return run(Transformer.keys_values, tokens_BxL, length_B, window_BxQ)

  def window_logits(
    shared: types.Tree,
    length_B: jax.Array,
    tokens_BxSxQ: jax.Array,
    start_BxS: jax.Array,
    positions_BxSxW: jax.Array,
    is_kept: jax.Array | bool = False,
  ) -> jax.Array:
    def of_windows() -> jax.Array:
      windows = length_B, tokens_BxSxQ, start_BxS, positions_BxSxW
      return run(Transformer.window_hidden, shared, *windows)

    def of_row() -> jax.Array:
      wanted = start_BxS, positions_BxSxW
      return run(Transformer.kept_hidden, shared, *wanted)

    if is_kept is False:
      hidden_BxSxWxD = of_windows()
    else:
      # The name tells a plan that the branches are not as frequent.
      with jax.named_scope(types.KEPT_OR_WINDOWS):
        hidden_BxSxWxD = jax.lax.cond(is_kept, of_row, of_windows)
    logits_BxSxWxE = run(Transformer.unembed, hidden_BxSxWxD)
    return logits_BxSxWxE[..., : shape.vocab_size]

  def extend(
    shared: types.Tree,
    length_B: jax.Array,
    tokens_BxQ: jax.Array,
    start_B: jax.Array,
  ) -> types.Tree:
    return run(Transformer.extend, shared, length_B, tokens_BxQ, start_B)

  if not has_windows(shape):
    return types.Network(logits, top_k)
  return types.Network(
    logits,
    top_k,
    keys_values,
    window_logits,
    extend,
    shape.attention_block,
    shape.shift,
  )


def has_windows(shape: base.Shape) -> bool:
  """Returns whether a network can be run on windows of a row.

  Where logits are shifted and attention is block-causal, those of a block's
  first position come from the block before, where all rows' begin alike.
  """
  return not _is_led(shape) or shape.blocks_from == "start"


def _is_led(shape: base.Shape) -> bool:
  """Returns whether a block's first position is predicted by the block before.

  Of whole rows a window begins one position earlier instead
  (`types.Network.shift`).
  """
  return bool(shape.shift and shape.attention_block)


def forward_flops(
  shape: base.Shape,
  length: int,
  num_positions: int,
  num_tokens: int | None = None,
) -> float:
  """Returns the FLOPs of the matrix products of one row's forward pass.

  Args:
    shape: of the network.
    length: L, padding included; what a query attends to.
    num_positions: positions unembedded; 0 where keys and values are all that
      is wanted.
    num_tokens: tokens that go through the layers; None for all L.
  """
  num_tokens = length if num_tokens is None else num_tokens
  width, kv = shape.width, shape.num_kv_heads * shape.head_dim
  heads = shape.num_heads * shape.head_dim
  keys_values = 2 * width * kv
  per_query = 2 * width * heads + 3 * width * shape.mlp_width
  # Where attention is block-causal, half of the row on average.
  seen = (
    (length + shape.attention_block) / 2 if shape.attention_block else length
  )
  attention = 2 * seen * heads
  rest = shape.num_layers - 1
  full = num_tokens * (keys_values + per_query + attention) * rest
  last = num_tokens * keys_values + num_positions * (per_query + attention)
  head = num_positions * width * shape.embedding_size
  # A multiplication and an addition each.
  return 2.0 * (full + last + head)
