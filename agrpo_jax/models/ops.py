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

from agrpo_jax.models import quantized
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
    # Rounded first, so that what is gathered over the mesh is the smaller.
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
  # The gradient of a float32 product is float32; left so, it would be
  # multiplied in float32.
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
  # Asked for where the kernel is kept, each device sums its part alone.
  gradient_kernel = _put(gradient_kernel, shardings and shardings.kept)
  return gradient_x, gradient_kernel.astype(kernel.dtype)


matmul.defvjp(_matmul_fwd, _matmul_bwd)


def matmul_int8(
  x: jax.Array,
  kernel: quantized.Kernel,
  shardings: mesh_lib.Shardings | None = None,
  out_dtype: Any = jnp.float32,
) -> jax.Array:
  """As `matmul`, with a kernel that is frozen: it has no gradient."""
  return _matmul_int8(x, kernel, shardings, out_dtype, x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _matmul_int8(x, kernel, shardings, out_dtype, x_dtype):
  sums = jax.lax.dot_general(
    x,
    # Converted behind the gathering over the mesh: half the traffic.
    _put(kernel.values, shardings and shardings.used).astype(x_dtype),
    (((x.ndim - 1,), (0,)), ((), ())),
    preferred_element_type=jnp.float32,
  )
  return (sums * _scale(kernel, shardings, x.ndim)).astype(out_dtype)


def _scale(kernel, shardings, rank):
  used = None
  if shardings is not None:
    spec = jax.sharding.PartitionSpec(shardings.used.spec[-1])
    used = mesh_lib.NamedSharding(shardings.used.mesh, spec)
  return last_axis(_put(kernel.scale, used), rank)


def _matmul_int8_fwd(x, kernel, shardings, out_dtype, x_dtype):
  return _matmul_int8(x, kernel, shardings, out_dtype, x_dtype), kernel


def _matmul_int8_bwd(shardings, out_dtype, x_dtype, kernel, gradient):
  del out_dtype
  scaled = gradient * _scale(kernel, shardings, gradient.ndim)
  gradient_x = jax.lax.dot_general(
    scaled.astype(x_dtype),
    _put(kernel.values, shardings and shardings.used).astype(x_dtype),
    (((gradient.ndim - 1,), (1,)), ((), ())),
    preferred_element_type=x_dtype,
  )
  return gradient_x, None


_matmul_int8.defvjp(_matmul_int8_fwd, _matmul_int8_bwd)


@functools.partial(jax.checkpoint, prevent_cse=False)
def gated_silu(gate: jax.Array, up: jax.Array) -> jax.Array:
  """silu(gate) * up; keeps only its arguments for the backward pass."""
  # Held back, so that `up` is written as rounded, see `rotate`.
  return jax.nn.silu(gate) * jax.lax.optimization_barrier(up)


# Else the float32 x would be kept for the backward pass, beside x.
@functools.partial(jax.checkpoint, prevent_cse=False)
def rms_norm(x: jax.Array, scale: jax.Array, eps: jax.Array) -> jax.Array:
  """scale * x / sqrt(mean(x^2) + eps) over the last axis, in float32."""
  x32 = x.astype(jnp.float32)
  square = jnp.mean(x32 * x32, axis=-1, keepdims=True)
  y = x32 * jax.lax.rsqrt(square + eps) * last_axis(scale, x.ndim)
  return y.astype(x.dtype)


def last_axis(vector: jax.Array, rank: int) -> jax.Array:
  """A float32 vector along the last axis of an array of `rank` dimensions."""
  # Spelled out: tests refuse to promote ranks, which hides wrong shapes.
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
  seen_BxS: jax.Array,
  implementation: str = "xla",
  rows: mesh_lib.NamedSharding | None = None,
  mask_SxL: np.ndarray | None = None,
) -> jax.Array:
  """softmax(q k / sqrt(Dh)) v over the first `seen` keys of each row.

  k and v may have fewer heads than q; then consecutive heads of q share one.

  Args:
    q_BxSxHxDh: queries.
    k_BxLxHxDh: keys.
    v_BxLxHxDh: values.
    seen_BxS: int32, how many keys each query sees; [B, 1]: each of a row's.
    implementation: "xla", "cudnn" (GPU only, not float32), or "splash" (TPU
      only; where the queries of a row differ it needs `mask`).
    rows: how the rows are split over devices, None for one device.
    mask_SxL: bool, where it is known beforehand what `seen` says of rows
      without padding; None where their queries see alike.
  """
  keys, groups = k_BxLxHxDh.shape[1:3]
  is_key_BxSxL = jnp.arange(keys)[None, None] < seen_BxS[..., None]
  if implementation == "splash":
    # No query sees more than another one that sees the whole row.
    return _splash(rows, mask_SxL)(
      q_BxSxHxDh, k_BxLxHxDh, v_BxLxHxDh, is_key_BxSxL.any(axis=1)
    )
  if implementation == "cudnn":
    kernel = functools.partial(
      jax.nn.dot_product_attention,
      q_BxSxHxDh,
      k_BxLxHxDh,
      v_BxLxHxDh,
      implementation="cudnn",
    )
    if seen_BxS.shape[1] == 1:
      return kernel(key_value_seq_lengths=seen_BxS[:, 0])
    # A bias [B, 1, S, L] in memory, which lengths alone do without.
    return kernel(mask=is_key_BxSxL[:, None])
  num_rows, queries, heads, size = q_BxSxHxDh.shape
  # Queries that share keys become further queries of one head.
  q = q_BxSxHxDh.reshape(num_rows, queries, groups, heads // groups, size)
  q = q.transpose(0, 2, 3, 1, 4).reshape(num_rows, groups, -1, size)
  k, v = heads_first(k_BxLxHxDh), heads_first(v_BxLxHxDh)
  if seen_BxS.shape[1] > 1:
    is_key_BxSxL = jnp.tile(is_key_BxSxL, (1, heads // groups, 1))
  mixed = _attend(q, k, v, jnp.where(is_key_BxSxL, 0.0, _NEVER)[:, None])
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


def _splash(rows, mask_SxL=None):
  """Splash attention of which every device computes its rows and heads.

  The compiler cannot split a kernel itself.
  """
  kernel = functools.partial(splash.attend, mask_SxL=mask_SxL)
  if rows is None:
    return kernel
  P = jax.sharding.PartitionSpec
  queries, keys = (
    P(mesh_lib.ROW_AXES, None, mesh_lib.RULES[axis])
    for axis in ("heads", "kv_heads")
  )
  return jax.shard_map(
    kernel,
    mesh=rows.mesh,
    in_specs=(queries, keys, keys, P(mesh_lib.ROW_AXES, None)),
    out_specs=queries,
    check_vma=False,  # a kernel says nothing of what varies over the mesh
  )


def heads_first(x_BxLxHxDh: jax.Array) -> jax.Array:
  """Returns keys or values as attention reads them, [B, H, L, Dh]."""
  return x_BxLxHxDh.transpose(0, 2, 1, 3)


def _heads_last(x_BxHxLxDh):
  """Returns what `heads_first` was given."""
  return x_BxHxLxDh.transpose(0, 2, 1, 3)


def attend_windows(
  q_BxSxWxHxDh: jax.Array,
  k_BxSxQxHxDh: jax.Array,
  v_BxSxQxHxDh: jax.Array,
  shared_k_BxHxLxDh: jax.Array,
  shared_v_BxHxLxDh: jax.Array,
  start_BxS: jax.Array,
  seen_BxS: jax.Array,
  implementation: str = "xla",
  rows: mesh_lib.NamedSharding | None = None,
) -> jax.Array:
  """Attention of windows whose rows' other keys and values are shared.

  Each of S states of a row has a window of Q positions from `start` on. A query
  of a state attends to that state's own keys within the window, and to the
  row's shared ones everywhere else, up to what it sees: one softmax over both.
  A kernel is given the two side by side; XLA's attention copies nothing for it.

  Args:
    q_BxSxWxHxDh: queries of W positions of each state.
    k_BxSxQxHxDh: the windows' own keys; may have fewer heads than q.
    v_BxSxQxHxDh: the windows' own values.
    shared_k_BxHxLxDh: keys of whole rows, see `heads_first`.
    shared_v_BxHxLxDh: their values.
    start_BxS: int32, the first position of each state's window; [B, 1]: that of
      all windows of a row.
    seen_BxS: int32, how many positions of the row each state sees, itself
      among them; likewise.
    implementation: see `attend`; a kernel needs one `start` and `seen` a row.
    rows: see `attend`.

  Returns:
    [B, S, W, H, Dh].
  """
  num_rows, states, queries, heads, size = q_BxSxWxHxDh.shape
  window, groups = k_BxSxQxHxDh.shape[2:4]
  start_BxSx1, seen_BxSx1 = start_BxS[..., None], seen_BxS[..., None]
  position_L = jnp.arange(shared_k_BxHxLxDh.shape[2])[None, None]
  # There the shared keys are those of another state than the windows'.
  is_own_BxSxL = (position_L >= start_BxSx1) & (
    position_L < start_BxSx1 + window
  )
  is_shared_BxSxL = (position_L < seen_BxSx1) & ~is_own_BxSxL
  # A window may reach beyond its row; what stands there is padding.
  is_key_BxSxQ = start_BxSx1 + jnp.arange(window)[None, None] < seen_BxSx1
  if implementation != "xla":
    mixed = _attend_side_by_side(
      q_BxSxWxHxDh.reshape(num_rows, -1, heads, size),
      (_heads_last(shared_k_BxHxLxDh), k_BxSxQxHxDh),
      (_heads_last(shared_v_BxHxLxDh), v_BxSxQxHxDh),
      jnp.concatenate(
        [is_shared_BxSxL[:, 0], jnp.tile(is_key_BxSxQ[:, 0], (1, states))],
        axis=1,
      ),
      implementation,
      rows,
    )
    return mixed.reshape(q_BxSxWxHxDh.shape)
  bias_shared, bias_own = (
    jnp.where(is_key, 0.0, _NEVER) for is_key in (is_shared_BxSxL, is_key_BxSxQ)
  )
  if is_shared_BxSxL.shape[1] > 1:
    # As the queries lie: of shared keys all are those of one head.
    bias_shared = jnp.repeat(bias_shared, queries * heads // groups, axis=1)
    bias_own = jnp.tile(bias_own, (1, groups, 1))
  bias_shared = bias_shared[:, None]
  bias_own = bias_own[:, :, None]
  # A head's queries side by side, those of one state together: against shared
  # keys all of them are queries of one head, against their own those of one
  # state are.
  q = q_BxSxWxHxDh.reshape(
    num_rows, states, queries, groups, heads // groups, size
  ).transpose(0, 3, 1, 4, 2, 5)
  q = q.reshape(num_rows, groups * states, -1, size)

  def per_state(x: jax.Array) -> jax.Array:
    return x.transpose(0, 3, 1, 2, 4).reshape(
      num_rows, groups * states, window, size
    )

  mixed = _attend_both(
    q,
    per_state(k_BxSxQxHxDh),
    per_state(v_BxSxQxHxDh),
    bias_own,
    shared_k_BxHxLxDh,
    shared_v_BxHxLxDh,
    bias_shared,
  )
  mixed = mixed.reshape(
    num_rows, groups, states, heads // groups, queries, size
  ).transpose(0, 2, 4, 1, 3, 5)
  return mixed.reshape(num_rows, states, queries, heads, size)


def _attend_side_by_side(q, keys, values, is_key, implementation, rows):
  """A kernel's attention of windows.

  q [B, S * W, H, Dh]; keys and values are pairs, shared [B, L, H, Dh] and own
  [B, S, Q, H, Dh]; is_key [B, L + S * Q] is False where nothing is seen.
  """
  states, window = keys[1].shape[1:3]
  # What a kernel is told beforehand: the windows of other states are not seen.
  is_own_SxS = np.eye(states, dtype=bool)
  mask = np.ones((q.shape[1], is_key.shape[1]), bool)
  mask[:, -states * window :] = np.kron(
    is_own_SxS, np.ones((q.shape[1] // states, window), bool)
  )
  k, v = (
    jnp.concatenate([shared, own.reshape(own.shape[0], -1, *own.shape[3:])], 1)
    for shared, own in (keys, values)
  )
  if implementation == "splash":
    return _splash(rows, mask)(q, k, v, is_key)
  return jax.nn.dot_product_attention(
    q,
    k,
    v,
    mask=is_key[:, None, None, :] & mask[None, None],
    implementation="cudnn",
  )


@jax.custom_vjp
def _attend(q, k, v, bias):
  """q [B, H, S, Dh], k and v [B, H, L, Dh], bias [B, 1, 1 or S, L]."""
  return _attend_fwd(q, k, v, bias)[0]


def _attend_fwd(q, k, v, bias):
  scores = _scores(q, k, bias)
  top = scores.max(axis=-1, keepdims=True)
  weight = jnp.exp(scores - top)
  total = weight.sum(axis=-1, keepdims=True)
  # Divided last: Dh numbers of a query instead of its L weights.
  mixed = _batched(weight.astype(v.dtype), v, 3, 2) / total
  mixed = mixed.astype(q.dtype)
  return mixed, (q, k, v, bias, mixed, top + jnp.log(total))


def _attend_bwd(saved, gradient):
  q, k, v, bias, mixed, log_total = saved
  of_queries = gradient, log_total, _weighted(gradient, mixed)
  gradients = _attend_gradients(q, k, v, bias, of_queries, q.dtype)
  # The bias is made of lengths, which have no gradient.
  return *gradients, None


def _weighted(gradient, mixed):
  """The mean over keys, by their weights, of the gradient of the weights."""
  # The product with what was mixed is that mean: no weights need be stored.
  return jnp.sum(gradient.astype(jnp.float32) * mixed, axis=-1, keepdims=True)


def _attend_gradients(q, k, v, bias, of_queries, q_dtype):
  """The gradients of q (in `q_dtype`), k and v, from one set of keys.

  The weights are computed again from their log-sum-exp, as in
  FlashAttention-2 (arXiv:2307.08691), instead of being kept.

  of_queries: the gradient of what was mixed, the log-sum-exp, `_weighted`.
  """
  gradient, log_total, mean = of_queries
  weight = jnp.exp(_scores(q, k, bias) - log_total)
  gradient_v = _batched(weight.astype(v.dtype), gradient, 2, 2, v.dtype)
  gradient_weight = _batched(gradient, v, 3, 3)
  gradient_scores = weight * (gradient_weight - mean) * q.shape[-1] ** -0.5
  gradient_scores = gradient_scores.astype(q.dtype)
  gradient_q = _batched(gradient_scores, k, 3, 2, q_dtype)
  gradient_k = _batched(gradient_scores, q, 2, 2, k.dtype)
  return gradient_q, gradient_k, gradient_v


_attend.defvjp(_attend_fwd, _attend_bwd)


@jax.custom_vjp
def _attend_both(q, k, v, bias, shared_k, shared_v, shared_bias):
  """Attention to own keys and to shared ones, S states per head.

  q [B, H * S, W, Dh], k and v [B, H * S, Q, Dh], bias [B, 1 or H * S, 1, Q],
  shared_k and shared_v [B, H, L, Dh], shared_bias [B, 1, 1 or S * W, L].
  """
  return _attend_both_fwd(q, k, v, bias, shared_k, shared_v, shared_bias)[0]


def _attend_both_fwd(q, k, v, bias, shared_k, shared_v, shared_bias):
  own = _scores(q, k, bias)
  shared = _scores(_per_head(q, shared_k), shared_k, shared_bias)
  shared = shared.reshape(*own.shape[:3], -1)
  # One maximum and one total over both, since it is one softmax.
  top = jnp.maximum(
    own.max(axis=-1, keepdims=True), shared.max(axis=-1, keepdims=True)
  )
  own, shared = jnp.exp(own - top), jnp.exp(shared - top)
  total = own.sum(axis=-1, keepdims=True) + shared.sum(axis=-1, keepdims=True)
  mixed = _batched(own.astype(v.dtype), v, 3, 2) + _batched(
    _per_head(shared.astype(v.dtype), shared_v), shared_v, 3, 2
  ).reshape(q.shape)
  mixed = (mixed / total).astype(q.dtype)
  saved = q, k, v, bias, shared_k, shared_v, shared_bias, mixed
  return mixed, (*saved, top + jnp.log(total))


def _attend_both_bwd(saved, gradient):
  q, k, v, bias, shared_k, shared_v, shared_bias, mixed, log_total = saved
  # Total and mean are over both sets of keys, so that the gradients from either
  # set are parts of those of the one softmax.
  of_queries = gradient, log_total, _weighted(gradient, mixed)
  own_q, own_k, own_v = _attend_gradients(
    q, k, v, bias, of_queries, jnp.float32
  )
  shared_q, gradient_shared_k, gradient_shared_v = _attend_gradients(
    _per_head(q, shared_k),
    shared_k,
    shared_v,
    shared_bias,
    [_per_head(x, shared_k) for x in of_queries],
    jnp.float32,
  )
  # Both parts came in float32: only their sum is rounded.
  gradient_q = (own_q + shared_q.reshape(q.shape)).astype(q.dtype)
  return (
    *(gradient_q, own_k, own_v, None),
    *(gradient_shared_k, gradient_shared_v, None),
  )


_attend_both.defvjp(_attend_both_fwd, _attend_both_bwd)


def _per_head(x, shared):
  """[B, H * S, W, ...] -> [B, H, S * W, ...], with the heads of `shared`."""
  return x.reshape(*shared.shape[:2], -1, x.shape[-1])


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
