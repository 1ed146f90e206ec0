"""Masked sums and means: the only place that divides by a mask."""

import jax
import jax.numpy as jnp


def total(x: jax.Array, mask: jax.Array) -> jax.Array:
  """Sum of `x` where `mask` is true; what stands elsewhere, even NaN, is not.

  x and mask have the same shape; the result is a scalar. The gradient where the
  mask is false is exactly zero.
  """
  return jnp.where(mask, x, 0).sum()


def mean(x: jax.Array, mask: jax.Array) -> jax.Array:
  """Mean of `x` where `mask` is true, 0 if it is true nowhere."""
  return total(x, mask) / jnp.maximum(mask.sum(), 1)


def largest(x: jax.Array, mask: jax.Array) -> jax.Array:
  """Largest of the non-negative `x` where `mask` is true, 0 if nowhere."""
  return jnp.where(mask, x, 0).max()
