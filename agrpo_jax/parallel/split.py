"""Work on a vocabulary that the mesh splits, where it lies."""

import functools

import jax
import jax.numpy as jnp

from agrpo_jax import types
from agrpo_jax.parallel import mesh as mesh_lib


def lookup(
  rows: mesh_lib.NamedSharding, table_VxD: jax.Array, tokens_BxL: jax.Array
) -> jax.Array:
  """table[tokens] of a table that the mesh of `rows` splits, [B, L, D].

  Every device looks up its part of the vocabulary and of the columns for all
  rows, so that the table does not travel, nor its gradient except over copies.
  """
  vocab, width = mesh_lib.RULES["vocab"], mesh_lib.RULES["embed"]
  copies = tuple(axis for axis in mesh_lib.ROW_AXES if axis != width)
  P = jax.sharding.PartitionSpec

  def look_up(part, tokens):
    row = tokens - jax.lax.axis_index(vocab) * part.shape[0]
    is_here = (row >= 0) & (row < part.shape[0])
    found = jnp.where(is_here[..., None], part[jnp.where(is_here, row, 0)], 0)
    return jax.lax.psum(found, vocab)

  return jax.shard_map(
    look_up,
    mesh=rows.mesh,
    in_specs=(P(vocab, width), P(copies)),
    out_specs=P(copies, None, width),
  )(table_VxD, tokens_BxL)


def top_k_of(mesh: mesh_lib.Mesh) -> types.TopK:
  """`jax.lax.top_k` of logits [V] whose vocabulary the mesh splits.

  Every device takes the best of its part, and the best of those are merged, so
  that only candidates travel; of equal values the first wins, as in the whole.
  The compiler would gather the logits, and those of all rows of a batch, to
  every device; callers map over rows with `mesh.vmap_rows`.
  """
  axis = mesh_lib.RULES["vocab"]
  parts = mesh.shape[axis]

  def best(part, k):
    values, ids = jax.lax.top_k(part, min(k, part.size))
    ids += jax.lax.axis_index(axis) * part.size
    values, ids = jax.lax.all_gather((values, ids), axis, axis=0, tiled=True)
    values, picks = jax.lax.top_k(values, k)
    return values, ids[picks]

  def top_k(x, k):
    whole = jax.sharding.PartitionSpec()
    return jax.shard_map(
      functools.partial(best, k=k),
      mesh=mesh,
      in_specs=jax.sharding.PartitionSpec(axis),
      out_specs=(whole, whole),
      check_vma=False,  # all parts merge alike, which it cannot see
    )(jnp.pad(x, (0, -x.size % parts), constant_values=-jnp.inf))

  return top_k
