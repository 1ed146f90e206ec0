"""Splash attention: a TPU kernel that keeps the scores on the chip.

XLA's attention writes softmax weights [B, H, S, L] to HBM and reads them again,
several times; this kernel (`jax.experimental.pallas.ops.tpu.splash_attention`)
reads q, k and v and writes the mixture.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention

from agrpo_jax.models import base
from agrpo_jax.parallel import mesh as mesh_lib

# Sequences are padded to a multiple: the width of a TPU's vector registers.
_LANES = 128

# Of queries by keys: their float32 scores are 4 MiB of on-chip memory, of which
# a kernel can have 16 on every generation.
_LARGEST_BLOCK = 1024


def problem(shape: base.Shape, rows: mesh_lib.NamedSharding | None) -> str:
  """Returns why the kernel cannot compute a network's heads; "" if it can.

  Args:
    shape: of the network.
    rows: how a batch is split over devices, None for one device.
  """
  axis = mesh_lib.RULES["kv_heads"]
  parts = rows.mesh.shape[axis] if rows else 1
  if shape.num_kv_heads % parts:
    return (
      f"mesh.{axis}={parts} splits one of its {shape.num_kv_heads} KV heads"
    )
  return ""


def attend(
  q_BxSxHxDh: jax.Array,
  k_BxLxHxDh: jax.Array,
  v_BxLxHxDh: jax.Array,
  length_B: jax.Array,
  rows: mesh_lib.NamedSharding | None = None,
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
    rows: how a batch is split over devices, None for one device. Every device
      computes its rows and heads; the compiler cannot split a kernel itself.
    interpret: compute on any hardware, slowly, for tests.
  """
  one_device = functools.partial(_attend, interpret=interpret)
  if rows is None:
    return one_device(q_BxSxHxDh, k_BxLxHxDh, v_BxLxHxDh, length_B)
  P = jax.sharding.PartitionSpec
  axes, rules = mesh_lib.ROW_AXES, mesh_lib.RULES
  queries = P(axes, None, rules["heads"])
  keys = P(axes, None, rules["kv_heads"])
  return jax.shard_map(
    one_device,
    mesh=rows.mesh,
    in_specs=(queries, keys, keys, P(axes)),
    out_specs=queries,
    check_vma=False,  # a kernel says nothing of what varies over the mesh
  )(q_BxSxHxDh, k_BxLxHxDh, v_BxLxHxDh, length_B)


def _attend(q, k, v, length_B, interpret):
  num_queries, heads, size = q.shape[1:]
  q, k, v = (_by_head(x) for x in (q * size**-0.5, k, v))
  padded_queries, keys = q.shape[2], k.shape[2]
  kernel = splash_attention.make_splash_mha_single_device(
    splash_attention.MultiHeadMask(
      [splash_attention.FullMask((padded_queries, keys))] * heads
    ),
    block_sizes=_blocks(padded_queries, keys),
    interpret=interpret,
  )
  # Queries see the keys of their own segment.
  is_padding_BxL = jnp.arange(keys)[None] >= length_B[:, None]
  segment_S = jnp.zeros(padded_queries, jnp.int32)
  segment_BxL = is_padding_BxL.astype(jnp.int32)

  def attend_row(q, k, v, segment_L):
    segments = splash_attention.SegmentIds(q=segment_S, kv=segment_L)
    return kernel(q, k, v, segments)

  mixed_BxHxSxDh = jax.vmap(attend_row)(q, k, v, segment_BxL)
  return mixed_BxHxSxDh[:, :, :num_queries].transpose(0, 2, 1, 3)


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
