"""The arithmetic of a transformer layer, and how its gradients are computed.

Gradients are spelled out where automatic ones cost much: they would multiply
in float32 what came in bfloat16, store attention weights [B, H, L, L], or, on
CPUs, transpose whole activations.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from agrpo_jax.models import splash
from agrpo_jax.parallel import mesh as mesh_lib

# Stands for -inf in scores: a row without any key must not become NaN.
_NEVER = -1e30


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def matmul(
  x: jax.Array,
  kernel: jax.Array,
  shardings: mesh_lib.Shardings | None = None,
  out_dtype: Any = jnp.float32,
) -> jax.Array:
  """x [..., in] @ kernel [in, out], in x's dtype, accumulated to float32.

  The gradient of `kernel` has the dtype of `kernel`, and is accumulated in
  float32 too.

  out_dtype: of the product. Where it would be rounded next, asking for the
    rounded one keeps the float32 sums on the chip; devices that share a sum
    round their parts of it.

  shardings: where the kernel is kept, which is where its gradient goes, and
    where it is while it is multiplied. Left to itself the compiler may pass
    shards around and add up products of each, which reads and writes the
    float32 sums once per device, and it may do so before the kernel is rounded
    to x's dtype; and it may sum whole gradients on every device, as libtpu did.
  """
  return jax.lax.dot_general(
    x,
    _put(kernel.astype(x.dtype), shardings and shardings.used),
    (((x.ndim - 1,), (0,)), ((), ())),
    preferred_element_type=out_dtype,
  )


def _put(array, sharding):
  if sharding is None:
    return array
  return jax.lax.with_sharding_constraint(array, sharding)


def _matmul_fwd(x, kernel, shardings, out_dtype):
  return matmul(x, kernel, shardings, out_dtype), (x, kernel)


def _matmul_bwd(shardings, out_dtype, saved, gradient):
  del out_dtype
  x, kernel = saved
  rows = tuple(range(x.ndim - 1))
  gradient = gradient.astype(x.dtype)
  gradient_x = jax.lax.dot_general(
    gradient,
    _put(kernel.astype(x.dtype), shardings and shardings.used),
    (((x.ndim - 1,), (1,)), ((), ())),
    preferred_element_type=x.dtype,
  )
  # The rows of x are contracted as they lie in memory; automatic
  # differentiation asks for the product in the other order, transposed.
  gradient_kernel = jax.lax.dot_general(
    x,
    gradient,
    ((rows, rows), ((), ())),
    preferred_element_type=jnp.float32,
  )
  gradient_kernel = _put(gradient_kernel, shardings and shardings.kept)
  return gradient_x, gradient_kernel.astype(kernel.dtype)


matmul.defvjp(_matmul_fwd, _matmul_bwd)


@functools.partial(jax.checkpoint, prevent_cse=False)
def gated_silu(gate: jax.Array, up: jax.Array) -> jax.Array:
  """silu(gate) * up; keeps only its arguments for the backward pass."""
  # Held back, so that `up` is written as rounded, see `rotate`.
  return jax.nn.silu(gate) * jax.lax.optimization_barrier(up)


@functools.partial(jax.checkpoint, prevent_cse=False)
def rms_norm(x: jax.Array, scale: jax.Array, eps: jax.Array) -> jax.Array:
  """scale * x / sqrt(mean(x^2) + eps) over the last axis, in float32."""
  x32 = x.astype(jnp.float32)
  square = jnp.mean(x32 * x32, axis=-1, keepdims=True)
  y = x32 * jax.lax.rsqrt(square + eps) * last_axis(scale, x.ndim)
  return y.astype(x.dtype)


def last_axis(vector: jax.Array, rank: int) -> jax.Array:
  """A float32 vector along the last axis of an array of `rank` dimensions."""
  return vector.astype(jnp.float32).reshape((1,) * (rank - 1) + (-1,))


def rope_tables(
  head_dim: int, theta: float, length: int
) -> tuple[jax.Array, jax.Array]:
  """cos and sin of position times frequency, float32 [length, head_dim / 2].

  Computed on the host in float64: bfloat16 cannot even count to 257, and
  float32 angles of several thousand radians have lost four digits.
  """
  frequency = theta ** -(np.arange(0, head_dim, 2) / head_dim)
  angle = np.arange(length)[:, None] * frequency
  return (
    jnp.asarray(np.cos(angle), jnp.float32),
    jnp.asarray(np.sin(angle), jnp.float32),
  )


def rotate(x_BxLxHxDh: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotary position embedding (arXiv:2104.09864), in float32.

  Pairs are (i, i + Dh / 2), as in Llama.

  cos, sin: float32, [1 or B, L, 1, Dh / 2].
  """
  # Held back, or the compiler leaves out that x was rounded, and passes it
  # through memory in float32.
  halves = jnp.split(jax.lax.optimization_barrier(x_BxLxHxDh), 2, axis=-1)
  first, second = (half.astype(jnp.float32) for half in halves)
  rotated = jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )
  return rotated.astype(x_BxLxHxDh.dtype)


def attend(
  q_BxSxHxDh: jax.Array,
  k_BxLxHxDh: jax.Array,
  v_BxLxHxDh: jax.Array,
  length_B: jax.Array,
  implementation: str = "xla",
  rows: mesh_lib.NamedSharding | None = None,
) -> jax.Array:
  """softmax(q k / sqrt(Dh)) v over the first `length` keys of each row.

  k and v may have fewer heads than q; then consecutive heads of q share one.

  Args:
    implementation: "xla", "cudnn" (GPU only, not float32), or "splash" (TPU
      only).
    rows: how the rows are split over devices, None for one device.
  """
  if implementation == "splash":
    kernel = splash.attend if rows is None else _split_kernel(rows)
    return kernel(q_BxSxHxDh, k_BxLxHxDh, v_BxLxHxDh, length_B)
  if implementation == "cudnn":
    return jax.nn.dot_product_attention(
      q_BxSxHxDh,
      k_BxLxHxDh,
      v_BxLxHxDh,
      key_value_seq_lengths=length_B,
      implementation="cudnn",
    )
  num_rows, queries, heads, size = q_BxSxHxDh.shape
  keys, groups = k_BxLxHxDh.shape[1:3]
  # Queries that share keys become further queries of one head.
  q = q_BxSxHxDh.reshape(num_rows, queries, groups, heads // groups, size)
  q = q.transpose(0, 2, 3, 1, 4).reshape(num_rows, groups, -1, size)
  k = k_BxLxHxDh.transpose(0, 2, 1, 3)
  v = v_BxLxHxDh.transpose(0, 2, 1, 3)
  is_key_BxL = jnp.arange(keys)[None] < length_B[:, None]
  bias = jnp.where(is_key_BxL, 0.0, _NEVER)
  mixed = _attend(q, k, v, bias[:, None, None, :])
  mixed = mixed.reshape(num_rows, groups, heads // groups, queries, size)
  return mixed.transpose(0, 3, 1, 2, 4).reshape(num_rows, queries, heads, size)


def splash_problem(
  num_kv_heads: int, head_dim: int, rows: mesh_lib.NamedSharding | None
) -> str:
  """Returns why splash attention cannot compute these heads; "" if it can."""
  if head_dim > splash.LARGEST_HEAD:
    return f"head_dim={head_dim} is above {splash.LARGEST_HEAD}"
  axis = mesh_lib.RULES["kv_heads"]
  parts = rows.mesh.shape[axis] if rows else 1
  if num_kv_heads % parts == 0:
    return ""
  return f"mesh.{axis}={parts} splits one of its {num_kv_heads} KV heads"


def _split_kernel(rows):
  """Splash attention of which every device computes its rows and heads.

  The compiler cannot split a kernel itself.
  """
  P = jax.sharding.PartitionSpec
  queries, keys = (
    P(mesh_lib.ROW_AXES, None, mesh_lib.RULES[axis])
    for axis in ("heads", "kv_heads")
  )
  return jax.shard_map(
    splash.attend,
    mesh=rows.mesh,
    in_specs=(queries, keys, keys, P(mesh_lib.ROW_AXES)),
    out_specs=queries,
    check_vma=False,  # a kernel says nothing of what varies over the mesh
  )


@jax.custom_vjp
def _attend(q, k, v, bias):
  """q [B, H, S, Dh], k and v [B, H, L, Dh], bias [B, 1, 1, L]."""
  return _attend_fwd(q, k, v, bias)[0]


def _attend_fwd(q, k, v, bias):
  scores = _scores(q, k, bias)
  top = scores.max(axis=-1, keepdims=True)
  weight = jnp.exp(scores - top)
  total = weight.sum(axis=-1, keepdims=True)
  mixed = _batched(weight.astype(v.dtype), v, 3, 2) / total
  mixed = mixed.astype(q.dtype)
  return mixed, (q, k, v, bias, mixed, top + jnp.log(total))


def _attend_bwd(saved, gradient):
  # The weights are computed again from their log-sum-exp, as in
  # FlashAttention-2 (arXiv:2307.08691), instead of being kept.
  q, k, v, bias, mixed, log_total = saved
  weight = jnp.exp(_scores(q, k, bias) - log_total)
  gradient_v = _batched(weight.astype(v.dtype), gradient, 2, 2, v.dtype)
  gradient_weight = _batched(gradient, v, 3, 3)
  shared = jnp.sum(gradient.astype(jnp.float32) * mixed, axis=-1, keepdims=True)
  gradient_scores = weight * (gradient_weight - shared) * q.shape[-1] ** -0.5
  gradient_scores = gradient_scores.astype(q.dtype)
  gradient_q = _batched(gradient_scores, k, 3, 2, q.dtype)
  gradient_k = _batched(gradient_scores, q, 2, 2, k.dtype)
  return gradient_q, gradient_k, gradient_v, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _scores(q, k, bias):
  return _batched(q, k, 3, 3) * q.shape[-1] ** -0.5 + bias


def _batched(left, right, contract_left, contract_right, dtype=jnp.float32):
  """A product per row and head, accumulated to float32, then rounded."""
  return jax.lax.dot_general(
    left,
    right,
    (((contract_left,), (contract_right,)), ((0, 1), (0, 1))),
    preferred_element_type=dtype,
  )
