"""Gradients that are spelled out equal those of the plain formulas."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agrpo_jax.models import ops


def draw(seed, *shapes):
  keys = jax.random.split(jax.random.key(seed), len(shapes))
  return [
    jax.random.normal(key, shape)
    for key, shape in zip(keys, shapes, strict=True)
  ]


class TestMatmul:
  def test_value_and_gradients(self):
    x, kernel, target = draw(0, (2, 5, 3), (3, 4), (2, 5, 4))

    def score(product):
      return lambda x, kernel: jnp.sum(jnp.sin(product(x, kernel)) * target)

    ours = jax.value_and_grad(score(ops.matmul), (0, 1))(x, kernel)
    plain = jax.value_and_grad(score(jnp.matmul), (0, 1))(x, kernel)
    chex.assert_trees_all_close(ours, plain, rtol=1e-5, atol=1e-5)

  def test_bfloat16_multiplies_bfloat16_only(self):
    """Float32 products in the backward pass would be slow on GPUs and TPUs."""
    x = jnp.ones((2, 5, 3), jnp.bfloat16)
    kernel = jnp.ones((3, 4), jnp.float32)
    gradient = jax.grad(lambda *a: ops.matmul(*a).sum(), (0, 1))
    dots = [
      equation
      for equation in jax.make_jaxpr(gradient)(x, kernel).eqns
      if equation.primitive.name == "dot_general"
    ]
    assert len(dots) >= 2
    for equation in dots:
      assert {v.aval.dtype.name for v in equation.invars} == {"bfloat16"}
    # The gradient of x is only rounded next: its float32 sums need not pass
    # through memory.
    results = [dot.outvars[0].aval.dtype.name for dot in dots]
    assert results == ["bfloat16", "float32"]
    gradient_x, gradient_kernel = gradient(x, kernel)
    assert gradient_x.dtype == jnp.bfloat16
    assert gradient_kernel.dtype == jnp.float32  # of a float32 master copy

  @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
  def test_a_rounded_product_is_the_product_rounded(self, dtype):
    x, kernel, target = draw(9, (40, 300), (300, 70), (40, 70))
    x, kernel, target = (one.astype(dtype) for one in (x, kernel, target))

    def rounded_after(x, kernel):
      return jnp.sum(ops.matmul(x, kernel).astype(dtype) * target)

    def rounded(x, kernel):
      product = ops.matmul(x, kernel, None, dtype)
      assert product.dtype == dtype
      return jnp.sum(product * target)

    chex.assert_trees_all_equal(
      ops.matmul(x, kernel, None, dtype), ops.matmul(x, kernel).astype(dtype)
    )
    chex.assert_trees_all_equal(
      jax.grad(rounded, (0, 1))(x, kernel),
      jax.grad(rounded_after, (0, 1))(x, kernel),
    )


def plain_attention(q, k, v, length):
  """Attention written out for one row and head in numpy's terms."""
  heads = q.shape[2] // k.shape[2]
  k, v = (jnp.repeat(x, heads, axis=2) for x in (k, v))
  scores = jnp.einsum("bshd,blhd->bhsl", q, k) / np.sqrt(q.shape[-1])
  is_key = jnp.arange(k.shape[1])[None] < length[:, None]
  scores = jnp.where(is_key[:, None, None], scores, -jnp.inf)
  weight = jax.nn.softmax(scores, axis=-1)
  return jnp.einsum("bhsl,blhd->bshd", weight, v)


class TestAttend:
  @pytest.mark.parametrize("kv_heads", [1, 2, 4])
  def test_value_and_gradients(self, kv_heads):
    q, k, v, target = draw(
      1, (3, 5, 4, 6), (3, 7, kv_heads, 6), (3, 7, kv_heads, 6), (3, 5, 4, 6)
    )
    length = jnp.array([7, 1, 4])

    def score(attention):
      return lambda *qkv: jnp.sum(attention(*qkv) * target)

    ours, plain = (
      jax.value_and_grad(score(attention), (0, 1, 2))(q, k, v)
      for attention in (
        lambda *qkv: ops.attend(*qkv, length[:, None]),
        lambda *qkv: plain_attention(*qkv, length),
      )
    )
    chex.assert_trees_all_close(ours, plain, rtol=2e-5, atol=2e-5)

  def test_same_as_jax(self):
    q, k, v = draw(2, (2, 4, 4, 8), (2, 6, 2, 8), (2, 6, 2, 8))
    length = jnp.array([3, 6])
    theirs = jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=length)
    chex.assert_trees_all_close(
      ops.attend(q, k, v, length[:, None]), theirs, rtol=1e-5, atol=1e-6
    )

  def test_row_without_keys_is_finite(self):
    q, k, v = draw(3, (1, 2, 1, 4), (1, 3, 1, 4), (1, 3, 1, 4))

    def score(q):
      return ops.attend(q, k, v, jnp.array([[0]])).sum()

    chex.assert_tree_all_finite(jax.value_and_grad(score)(q))

  def test_large_scores_do_not_overflow(self):
    q, k, v = draw(4, (1, 2, 1, 4), (1, 3, 1, 4), (1, 3, 1, 4))

    def score(q, k):
      return ops.attend(1e4 * q, 1e4 * k, v, jnp.array([[3]])).sum()

    chex.assert_tree_all_finite(jax.value_and_grad(score, (0, 1))(q, k))

  def test_no_attention_weights_are_kept(self):
    """What the backward pass is handed grows with L, not with L^2."""
    q, k, v = draw(5, (1, 64, 2, 4), (1, 64, 2, 4), (1, 64, 2, 4))
    _, pullback = jax.vjp(
      lambda *qkv: ops.attend(*qkv, jnp.array([[64]])), q, k, v
    )
    sizes = [x.size for x in jax.tree.leaves(pullback)]
    assert max(sizes) <= q.size


class TestRope:
  def test_by_hand(self):
    """theta 100, 4 numbers: frequencies 1 and 1/10, pairs (0, 2) and (1, 3)."""
    cos, sin = ops.rope_tables(4, 100.0, 6)
    x = jnp.array([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
    y = ops.rotate(x, cos[None, 5:, None], sin[None, 5:, None])
    one, tenth = 5.0, 0.5
    expected = [
      np.cos(one) - 3 * np.sin(one),
      2 * np.cos(tenth) - 4 * np.sin(tenth),
      3 * np.cos(one) + np.sin(one),
      4 * np.cos(tenth) + 2 * np.sin(tenth),
    ]
    np.testing.assert_allclose(y.ravel(), expected, rtol=1e-6)

  def test_only_distances_matter(self):
    cos, sin = ops.rope_tables(8, 500_000.0, 4000)
    q, k = draw(6, (8,), (8,))

    def product(at, other):
      q_at = ops.rotate(
        q.reshape(1, 1, 1, 8), cos[None, [at], None], sin[None, [at], None]
      )
      k_at = ops.rotate(
        k.reshape(1, 1, 1, 8),
        cos[None, [other], None],
        sin[None, [other], None],
      )
      return jnp.sum(q_at * k_at)

    np.testing.assert_allclose(product(3, 10), product(3903, 3910), rtol=1e-4)

  def test_bfloat16_is_rotated_in_float32(self):
    cos, sin = ops.rope_tables(4, 100.0, 300)
    (x,) = draw(7, (1, 300, 1, 4))
    x = x.astype(jnp.bfloat16)
    tables = cos[None, :, None], sin[None, :, None]
    exact = ops.rotate(x.astype(jnp.float32), *tables)
    y = ops.rotate(x, *tables)
    assert y.dtype == jnp.bfloat16
    chex.assert_trees_all_equal(y, exact.astype(jnp.bfloat16))


class TestNorm:
  def test_by_hand(self):
    x = jnp.array([[3.0, -4.0]])
    y = ops.rms_norm(x, jnp.array([1.0, 2.0]), 0.5)
    root = np.sqrt((9 + 16) / 2 + 0.5)
    np.testing.assert_allclose(y, [[3 / root, -8 / root]], rtol=1e-6)

  def test_bfloat16_is_normalised_in_float32(self):
    x, scale = (one.astype(jnp.bfloat16) for one in draw(8, (4, 999), (999,)))
    y = ops.rms_norm(x, scale, 1e-5)
    exact = ops.rms_norm(x.astype(jnp.float32), scale.astype(jnp.float32), 1e-5)
    assert y.dtype == jnp.bfloat16
    chex.assert_trees_all_equal(y, exact.astype(jnp.bfloat16))


class TestGatedSilu:
  def test_by_hand(self):
    y = ops.gated_silu(jnp.array([0.0, 1.0, -2.0]), jnp.array([5.0, 2.0, 3.0]))
    expected = [0.0, 2 / (1 + np.exp(-1.0)), -6 / (1 + np.exp(2.0))]
    np.testing.assert_allclose(y, expected, rtol=1e-6)
