"""Splash attention: a TPU kernel that keeps the scores on the chip.

XLA's attention writes softmax weights [B, H, S, L] to HBM and reads them again,
several times; this kernel (`jax.experimental.pallas.ops.tpu.splash_attention`)
reads q, k and v and writes the mixture.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention

# Sequences are padded to a multiple: the width of a TPU's vector registers.
_LANES = 128

# Queries and keys that are on the chip together, and keys multiplied at once.
# With more the float32 scores and their gradients overflow the 16 MiB that a
# kernel can have on v4.
_LARGEST_BLOCK = 1024
_LARGEST_PRODUCT = 896
LARGEST_HEAD = 128
"""Columns of a head for which the blocks fit on the chip."""


def attend(
  q_BxSxHxDh: jax.Array,
  k_BxLxHxDh: jax.Array,
  v_BxLxHxDh: jax.Array,
  length_B: jax.Array,
  *,
  interpret: bool = False,
) -> jax.Array:
  """Returns `ops.attend` of the same arguments, [B, S, H, Dh] in q's dtype.

  q is rounded once more, after it is divided by sqrt(Dh).

  Args:
    q_BxSxHxDh: queries.
    k_BxLxHxDh: keys, of as many heads or fewer.
    v_BxLxHxDh: values.
    length_B: int32, the keys of each row that are seen.
    interpret: compute on any hardware, slowly, for tests.
  """
  is_hidden_BxL = jnp.arange(k_BxLxHxDh.shape[1])[None] >= length_B[:, None]
  return _attend(
    q_BxSxHxDh,
    _heads_first(k_BxLxHxDh),
    _heads_first(v_BxLxHxDh),
    is_hidden_BxL,
    None,
    interpret,
  )


def attend_windows(
  q_BxSxWxHxDh: jax.Array,
  k_BxSxQxHxDh: jax.Array,
  v_BxSxQxHxDh: jax.Array,
  shared_k_BxHxLxDh: jax.Array,
  shared_v_BxHxLxDh: jax.Array,
  is_shared_BxL: jax.Array,
  is_own_BxQ: jax.Array,
  *,
  interpret: bool = False,
) -> jax.Array:
  """Returns `ops.attend_windows` of the same arguments, [B, S, W, H, Dh].

  Shared keys and those of all windows are laid side by side: where they come
  from one pass that is the copy which lays out any keys for the kernel.

  Args:
    q_BxSxWxHxDh: queries of W positions of each state.
    k_BxSxQxHxDh: the windows' own keys.
    v_BxSxQxHxDh: the windows' own values.
    shared_k_BxHxLxDh: keys of whole rows.
    shared_v_BxHxLxDh: their values.
    is_shared_BxL: bool, the shared keys that are seen.
    is_own_BxQ: bool, the own keys that are seen.
    interpret: see `attend`.
  """
  rows, states, queries, heads, size = q_BxSxWxHxDh.shape
  window, length = k_BxSxQxHxDh.shape[2], shared_k_BxHxLxDh.shape[2]

  def beside(shared: jax.Array, own: jax.Array) -> jax.Array:
    own = _heads_first(own.reshape(rows, states * window, *own.shape[3:]))
    return jnp.concatenate([shared, own], axis=2)

  # Who sees what but for padding: what is shared, and one's own window.
  state_Q = np.arange(states).repeat(queries)
  state_K = np.arange(states).repeat(window)
  is_seen_QxK = np.concatenate(
    [
      np.ones((states * queries, length), bool),
      state_Q[:, None] == state_K[None],
    ],
    axis=1,
  )
  is_key_BxK = jnp.concatenate(
    [is_shared_BxL, jnp.tile(is_own_BxQ, (1, states))], axis=1
  )
  mixed = _attend(
    q_BxSxWxHxDh.reshape(rows, states * queries, heads, size),
    beside(shared_k_BxHxLxDh, k_BxSxQxHxDh),
    beside(shared_v_BxHxLxDh, v_BxSxQxHxDh),
    ~is_key_BxK,
    is_seen_QxK,
    interpret,
  )
  return mixed.reshape(q_BxSxWxHxDh.shape)


def _attend(
  q_BxSxHxDh: jax.Array,
  k_BxHxLxDh: jax.Array,
  v_BxHxLxDh: jax.Array,
  is_hidden_BxL: jax.Array,
  is_seen_SxL: np.ndarray | None,
  interpret: bool,
) -> jax.Array:
  """Attention to keys that are not hidden, and seen by the query.

  is_seen_SxL: the same for all rows; None: all.
  """
  num_queries, num_heads, size = q_BxSxHxDh.shape[1:]
  q = _padded(_heads_first(q_BxSxHxDh * size**-0.5))
  k, v = _padded(k_BxHxLxDh), _padded(v_BxHxLxDh)
  queries, keys = q.shape[2], k.shape[2]  # with padding
  mask: splash_attention.Mask = splash_attention.FullMask((queries, keys))
  if is_seen_SxL is not None:
    # What is padding may see all: no row of a mask should be empty.
    seen = np.ones((queries, keys), bool)
    seen[: is_seen_SxL.shape[0], : is_seen_SxL.shape[1]] = is_seen_SxL
    mask = splash_attention.NumpyMask(seen)
  kernel = splash_attention.make_splash_mha_single_device(
    splash_attention.MultiHeadMask([mask] * num_heads),
    block_sizes=_blocks(queries, keys),
    interpret=interpret,
  )
  # Queries see the keys of their own segment.
  segment_S = jnp.zeros(queries, jnp.int32)
  is_hidden_BxL = jnp.pad(
    is_hidden_BxL,
    ((0, 0), (0, keys - is_hidden_BxL.shape[1])),
    constant_values=True,
  )

  def attend_row(q, k, v, segment_L):
    segments = splash_attention.SegmentIds(q=segment_S, kv=segment_L)
    return kernel(q, k, v, segments)

  mixed = jax.vmap(attend_row)(q, k, v, is_hidden_BxL.astype(jnp.int32))
  return mixed[:, :, :num_queries].transpose(0, 2, 1, 3)


def _heads_first(x_BxLxHxDh):
  return x_BxLxHxDh.transpose(0, 2, 1, 3)


def _padded(x_BxHxLxDh):
  padding = -x_BxHxLxDh.shape[2] % _LANES
  return jnp.pad(x_BxHxLxDh, ((0, 0), (0, 0), (0, padding), (0, 0)))


def _blocks(queries: int, keys: int) -> splash_attention.BlockSizes:
  block_q, block_kv = (_divisor(n, _LARGEST_BLOCK) for n in (queries, keys))
  at_once = _divisor(block_kv, _LARGEST_PRODUCT)
  # One kernel for all gradients adds up those of q over blocks of keys in q's
  # dtype; where there are several blocks, q has a kernel of its own.
  is_fused = block_kv == keys
  return splash_attention.BlockSizes(
    block_q=block_q,
    block_kv=block_kv,
    block_kv_compute=at_once,
    block_q_dkv=block_q,
    block_kv_dkv=block_kv,
    block_kv_dkv_compute=at_once,
    block_q_dq=None if is_fused else block_q,
    block_kv_dq=None if is_fused else block_kv,
    use_fused_bwd_kernel=is_fused,
  )


def _divisor(length: int, most: int) -> int:
  """The largest multiple of the lanes that divides a length, at most `most`."""
  sizes = range(_LANES, min(length, most) + 1, _LANES)
  return max(size for size in sizes if length % size == 0)
