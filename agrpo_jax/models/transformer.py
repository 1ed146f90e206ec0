"""One transformer in Flax, whose attention sees the whole sequence.

Rows are laid out [prompt | completion | padding] with a length each; every
position attends to the first `length` positions, so padding and batch mates
change nothing. `hidden` and `unembed` are apart, and both work only at given
positions: logits of a whole sequence are never formed, and the last layer
computes queries and MLP only where a result is asked for.

The parameters are laid out as the table in `parameters` says.
"""

import math
from collections.abc import Callable
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import ad_checkpoint

from agrpo_jax import types
from agrpo_jax.models import base
from agrpo_jax.models import ops
from agrpo_jax.models import parameters
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
    kernel = self.param("kernel", self.specs["kernel"].initial)
    fan_in, fan_out = self.specs["kernel"].axes
    out_dtype = out_dtype or dtype
    # What is added to is rounded after the sum.
    is_sum = self.has_variable("lora", "a") or "bias" in self.specs
    y = ops.matmul(
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


class Layer(nn.Module):
  """One transformer layer: attention and a gated MLP, each on a residual.

  Returns (x, None), as `nn.scan` wants. With `positions_BxS` the result is
  [B, S, D]: keys and values come from all positions, the rest of the work is
  done only there.
  """

  shape: base.Shape
  lora_scale: float = 1.0
  rows: mesh_lib.NamedSharding | None = None

  @nn.compact
  def __call__(
    self,
    x_BxLxD: jax.Array,
    length_B: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    positions_BxS: jax.Array | None = None,
  ) -> tuple[jax.Array, None]:
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

    def heads(x: jax.Array) -> jax.Array:
      return x.reshape(*x.shape[:2], -1, shape.head_dim)

    with jax.named_scope("attention"):
      normed = norm("attn_norm", x_BxLxD)
      cos, sin = (one[None, :, None, :] for one in rope)
      k = ops.rotate(heads(project("k", normed)), cos, sin)
      v = heads(project("v", normed))
      if positions_BxS is not None:
        x_BxLxD = take_positions(x_BxLxD, positions_BxS)
        normed = take_positions(normed, positions_BxS)
        cos, sin = (one[positions_BxS][:, :, None, :] for one in rope)
      q = ops.rotate(heads(project("q", normed)), cos, sin)
      how = _attention(shape, q.shape[1], self.rows)
      mixed = ops.attend(q, k, v, length_B, how, self.rows)
      mixed = mixed.reshape(*mixed.shape[:2], -1)
      x_BxLxD = x_BxLxD + project("attn_out", mixed)
    with jax.named_scope("mlp"):
      normed = norm("mlp_norm", x_BxLxD)
      gated = ops.gated_silu(project("gate", normed), project("up", normed))
      x_BxLxD = x_BxLxD + project("down", gated)
    return _split_rows(x_BxLxD, self.rows), None


def _split_rows(x: jax.Array, rows: mesh_lib.NamedSharding | None) -> jax.Array:
  # Where parameters are split over the devices that also split the rows, the
  # compiler would else gather the activations, and every device would compute
  # every row.
  return x if rows is None else jax.lax.with_sharding_constraint(x, rows)


def _attention(
  shape: base.Shape, num_queries: int, rows: mesh_lib.NamedSharding | None
) -> str:
  if shape.attention != "auto":
    return shape.attention
  if shape.dtype != "bfloat16" or num_queries < _FEWEST_KERNEL_QUERIES:
    return "xla"
  platform = mesh_lib.platform(rows.mesh) if rows else jax.default_backend()
  found = ops.splash_problem(shape.num_kv_heads, shape.head_dim, rows)
  if platform == "tpu" and found:
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
      self.layers = nn.scan(
        _remat(shape.remat, in_scan=True)(Layer),
        variable_axes={"params": 0, "lora": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=shape.num_layers - 1,
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
    if self.shape.shift:
      positions_BxS = jnp.maximum(positions_BxS - self.shape.shift, 0)
    with jax.named_scope("embed"):
      x_BxLxD = self.embed(tokens_BxL).astype(self.shape.dtype)
      x_BxLxD = _split_rows(x_BxLxD, self.rows)
    rope = ops.rope_tables(
      self.shape.head_dim, self.shape.rope_theta, tokens_BxL.shape[1]
    )
    if self.shape.num_layers > 1:
      with jax.named_scope("layers"):
        x_BxLxD, _ = self.layers(x_BxLxD, length_B, rope)
    with jax.named_scope("last_layer"):
      x_BxSxD, _ = self.last_layer(x_BxLxD, length_B, rope, positions_BxS)
    return self.final_norm(x_BxSxD)

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


def logits_fn(
  shape: base.Shape,
  params: Any,
  lora: Any = None,
  lora_scale: float = 1.0,
  rows: mesh_lib.NamedSharding | None = None,
) -> types.LogitsFn:
  """The network bound to its parameters: (tokens, length, positions) -> logits.

  The logits have `vocab_size` columns, float32. `rows` is how a batch is split
  over devices, see `Transformer`.
  """
  network = Transformer(shape, lora_scale, rows)
  variables = {"params": params}
  if lora is not None:
    variables["lora"] = lora

  def logits(
    tokens_BxL: jax.Array, length_B: jax.Array, positions_BxS: jax.Array
  ) -> jax.Array:
    logits_BxSxE: Any = network.apply(
      variables, tokens_BxL, length_B, positions_BxS
    )
    return logits_BxSxE[..., : shape.vocab_size]

  return logits


def forward_flops(shape: base.Shape, length: int, num_positions: int) -> float:
  """FLOPs of the matrix products of one row's forward pass.

  length: L, padding included; num_positions: S, positions unembedded.
  """
  width, kv = shape.width, shape.num_kv_heads * shape.head_dim
  heads = shape.num_heads * shape.head_dim
  keys_values = 2 * width * kv
  per_query = 2 * width * heads + 3 * width * shape.mlp_width
  attention = 2 * length * heads
  rest = shape.num_layers - 1
  full = length * (keys_values + per_query + attention) * rest
  last = length * keys_values + num_positions * (per_query + attention)
  head = num_positions * width * shape.embedding_size
  return 2.0 * (full + last + head)
