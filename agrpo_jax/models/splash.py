"""Splash attention: a TPU kernel that keeps the scores on the chip.

XLA's attention writes softmax weights [B, H, S, L] to HBM and reads them again,
several times; this kernel (`jax.experimental.pallas.ops.tpu.splash_attention`)
reads q, k and v and writes the mixture.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention

# Sequences are padded to a multiple: the width of a TPU's vector registers.
_LANES = 128

# Of queries by keys: their float32 scores are 4 MiB of on-chip memory, of which
# a kernel can have 16 on every generation.
_LARGEST_BLOCK = 1024


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
  num_queries, num_heads, size = q_BxSxHxDh.shape[1:]
  q = _by_head(q_BxSxHxDh * size**-0.5)
  k, v = _by_head(k_BxLxHxDh), _by_head(v_BxLxHxDh)
  queries, keys = q.shape[2], k.shape[2]  # with padding
  kernel = splash_attention.make_splash_mha_single_device(
    splash_attention.MultiHeadMask(
      [splash_attention.FullMask((queries, keys))] * num_heads
    ),
    block_sizes=_blocks(queries, keys),
    interpret=interpret,
  )
  # Queries see the keys of their own segment.
  segment_S = jnp.zeros(queries, jnp.int32)
  is_padding_BxL = jnp.arange(keys)[None] >= length_B[:, None]

  def attend_row(q, k, v, segment_L):
    segments = splash_attention.SegmentIds(q=segment_S, kv=segment_L)
    return kernel(q, k, v, segments)

  mixed = jax.vmap(attend_row)(q, k, v, is_padding_BxL.astype(jnp.int32))
  return mixed[:, :, :num_queries].transpose(0, 2, 1, 3)


def _by_head(x_BxLxHxDh):
  padding = -x_BxLxHxDh.shape[1] % _LANES
  x = jnp.pad(x_BxLxHxDh, ((0, 0), (0, padding), (0, 0), (0, 0)))
  return x.transpose(0, 2, 1, 3)


def _blocks(queries: int, keys: int) -> splash_attention.BlockSizes:
  block_q, block_kv = _block(queries), _block(keys)
  # One kernel for all gradients adds up those of q over blocks of keys in q's
  # dtype; where there are several blocks, q has a kernel of its own.
  is_fused = block_kv == keys
  return splash_attention.BlockSizes(
    block_q=block_q,
    block_kv=block_kv,
    block_kv_compute=block_kv,
    block_q_dkv=block_q,
    block_kv_dkv=block_kv,
    block_kv_dkv_compute=block_kv,
    block_q_dq=None if is_fused else block_q,
    block_kv_dq=None if is_fused else block_kv,
    use_fused_bwd_kernel=is_fused,
  )


def _block(length: int) -> int:
  """The largest block of whole vector registers that divides a length."""
  most = min(length, _LARGEST_BLOCK)
  return max(n for n in range(_LANES, most + 1, _LANES) if length % n == 0)
