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
  is_key_BxL: jax.Array,
  *,
  mask_SxL: np.ndarray | None = None,
  interpret: bool = False,
) -> jax.Array:
  """Returns softmax(q k / sqrt(Dh)) v, [B, S, H, Dh] in q's dtype.

  q is rounded once more, after it is divided by sqrt(Dh).

  Args:
    q_BxSxHxDh: queries.
    k_BxLxHxDh: keys, of as many heads or fewer.
    v_BxLxHxDh: values.
    is_key_BxL: bool, the keys of each row that are seen by its queries.
    mask_SxL: bool, which of them each query sees, alike in all rows; None: all.
    interpret: compute on any hardware, slowly, for tests.
  """
  num_queries, num_heads, size = q_BxSxHxDh.shape[1:]
  q = _by_head(q_BxSxHxDh * size**-0.5)
  k, v = _by_head(k_BxLxHxDh), _by_head(v_BxLxHxDh)
  queries, keys = q.shape[2], k.shape[2]  # with padding
  mask: splash_attention.Mask = splash_attention.FullMask((queries, keys))
  if mask_SxL is not None:
    # Queries of padding see whatever: without any key they would be NaN.
    padding = [(0, queries - num_queries), (0, keys - k_BxLxHxDh.shape[1])]
    mask = splash_attention.NumpyMask(
      np.pad(mask_SxL, padding, constant_values=True)
    )
  kernel = splash_attention.make_splash_mha_single_device(
    splash_attention.MultiHeadMask([mask] * num_heads),
    block_sizes=_blocks(queries, keys),
    interpret=interpret,
  )
  # Queries see the keys of their own segment.
  segment_S = jnp.zeros(queries, jnp.int32)
  # Padding is of no row's segment.
  is_key = jnp.pad(is_key_BxL, ((0, 0), (0, keys - is_key_BxL.shape[1])))
  segment_BxL = jnp.where(is_key, 0, 1)

  def attend_row(q, k, v, segment_L):
    segments = splash_attention.SegmentIds(q=segment_S, kv=segment_L)
    return kernel(q, k, v, segments)

  mixed = jax.vmap(attend_row)(q, k, v, segment_BxL)
  return mixed[:, :, :num_queries].transpose(0, 2, 1, 3)


def _by_head(x_BxLxHxDh):
  padding = -x_BxLxHxDh.shape[1] % _LANES
  x = jnp.pad(x_BxLxHxDh, ((0, 0), (0, padding), (0, 0), (0, 0)))
  return x.transpose(0, 2, 1, 3)


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
