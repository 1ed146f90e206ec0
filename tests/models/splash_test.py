"""The TPU kernel computes what XLA computes, and refuses what it cannot."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agrpo_jax.models import ops
from agrpo_jax.models import splash
from agrpo_jax.models import transformer
from agrpo_jax.parallel import mesh as mesh_lib
from fixtures import recordings


def draw(seed, rows, queries, keys, heads, kv_heads, dtype=jnp.float32):
  """q, k, v and a direction for the gradient."""
  shapes = (
    (rows, queries, heads, 128),
    (rows, keys, kv_heads, 128),
    (rows, keys, kv_heads, 128),
    (rows, queries, heads, 128),
  )
  return [
    jax.random.normal(key, shape).astype(dtype)
    for key, shape in zip(
      jax.random.split(jax.random.key(seed), 4), shapes, strict=True
    )
  ]


def value_and_gradients(attend, q, k, v, target, length):
  def score(q, k, v):
    mixed = attend(q, k, v, length)
    return jnp.sum((mixed * target).astype(jnp.float32)), mixed

  return jax.value_and_grad(score, (0, 1, 2), has_aux=True)(q, k, v)


interpreted = functools.partial(splash.attend, interpret=True)


def by_xla(q, k, v, length):
  return ops.attend(q, k, v, length[:, None])


@pytest.fixture(autouse=True)
def no_tpu(monkeypatch):
  monkeypatch.setattr(splash, "attend", interpreted)


def by_splash(q, k, v, length):
  return ops.attend(q, k, v, length[:, None], "splash")


@pytest.mark.parametrize(
  "queries, keys, heads, kv_heads, lengths",
  [
    (256, 256, 2, 2, (256, 1)),
    (200, 200, 2, 2, (200, 77)),  # no multiple of 128
    (24, 24, 1, 1, (24, 5)),  # one padded block
    (3, 300, 2, 1, (300, 129)),  # few queries, shared keys
    (130, 260, 4, 2, (259, 128)),
    (128, 1152, 2, 2, (1152, 700)),  # several blocks of keys
  ],
)
def test_same_as_xla(queries, keys, heads, kv_heads, lengths):
  arrays = draw(0, 2, queries, keys, heads, kv_heads)
  length = jnp.array(lengths)
  chex.assert_trees_all_close(
    value_and_gradients(by_splash, *arrays, length),
    value_and_gradients(by_xla, *arrays, length),
    rtol=2e-5,
    atol=2e-5,
  )


@pytest.mark.parametrize("size", [4, 7])
def test_blocks_that_see_those_before_them(size):
  """Rows of several lengths, attention in blocks: as XLA, gradients too."""
  q, k, v, target = draw(5, 2, 150, 150, 4, 2)
  length = jnp.array([150, 61])[:, None]
  block = np.arange(150) // size
  seen = jnp.minimum((block + 1)[None] * size, length)
  mask = block[:, None] >= block[None]
  # What padding puts out means nothing.
  is_real = jnp.arange(150)[None] < length
  target = jnp.where(is_real[..., None, None], target, 0.0)

  def value_and_gradients(*how):
    def score(q, k, v):
      return jnp.sum(ops.attend(q, k, v, seen, *how) * target)

    return jax.jit(jax.value_and_grad(score, (0, 1, 2)))(q, k, v)

  chex.assert_trees_all_close(
    value_and_gradients("splash", None, mask),
    value_and_gradients("xla"),
    rtol=2e-5,
    atol=2e-5,
  )


def test_a_block_causal_network_takes_the_kernel_where_rows_are_alike(
  monkeypatch,
):
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  block = shape(dtype="bfloat16", attention_block=4)
  assert transformer._block_mask(block, 10).sum() == 4 * 4 + 4 * 8 + 2 * 10
  assert transformer._attention(block, 896, None) == "splash"
  asked = shape(attention="splash", attention_block=4)
  for one in (block, asked):
    assert transformer._attention(one, 896, None, is_known=False) == "xla"
  end = shape(attention_block=4, blocks_from="end")
  assert transformer._block_mask(end, 10) is None


def test_bfloat16_is_as_near_to_float32_as_xla_is():
  arrays = draw(1, 2, 200, 200, 4, 2, jnp.bfloat16)
  length = jnp.array([200, 77])
  exact = value_and_gradients(
    by_xla, *(x.astype(jnp.float32) for x in arrays), length
  )

  def error(attend):
    found = value_and_gradients(attend, *arrays, length)
    return [
      float(jnp.abs(x.astype(jnp.float32) - y).mean() / jnp.abs(y).mean())
      for x, y in zip(
        jax.tree.leaves((found[0][1], found[1])),
        jax.tree.leaves((exact[0][1], exact[1])),
        strict=True,
      )
    ]

  for ours, theirs in zip(error(by_splash), error(by_xla), strict=True):
    assert ours < 1.5 * theirs < 0.02


def test_padding_reaches_nothing():
  """Not the mixture, not the gradients, and gets no gradient itself."""
  q, k, v, target = draw(2, 1, 40, 40, 1, 1)
  length = jnp.array([17])
  is_padding = jnp.arange(40)[None, :, None, None] >= 17
  wild = [jnp.where(is_padding, 1e4, x) for x in (k, v)]
  (_, mixed), (of_q, of_k, of_v) = value_and_gradients(
    by_splash, q, k, v, target, length
  )
  (_, same), (of_same_q, *_) = value_and_gradients(
    by_splash, q, *wild, target, length
  )
  chex.assert_trees_all_equal((mixed, of_q), (same, of_same_q))
  assert not jnp.where(is_padding, of_k, 0).any()
  assert not jnp.where(is_padding, of_v, 0).any()


def test_a_row_without_keys_is_finite():
  arrays = draw(3, 1, 20, 20, 1, 1)
  chex.assert_tree_all_finite(
    value_and_gradients(by_splash, *arrays, jnp.array([0]))
  )


def cudnn_of_xla(monkeypatch):
  """cuDNN's call, computed by what any hardware has."""
  real = jax.nn.dot_product_attention

  def attend(*arrays, implementation, **keys):
    assert implementation == "cudnn"
    return real(*arrays, **keys)

  monkeypatch.setattr(jax.nn, "dot_product_attention", attend)


@pytest.mark.parametrize("how", ["splash", "cudnn"])
@pytest.mark.parametrize(
  "states, queries, window, kv_heads, starts",
  [
    (3, 8, 8, 2, (5, 40)),  # the second row's window ends in padding
    (2, 96, 96, 4, (0, 33)),
    (4, 5, 40, 2, (50, 8)),  # the last layer's, at some positions only
  ],
)
def test_windows_as_xla(
  monkeypatch, how, states, queries, window, kv_heads, starts
):
  cudnn_of_xla(monkeypatch)
  keys = iter(jax.random.split(jax.random.key(4), 6))
  size, length = 128, jnp.array([90, 44])

  def normal(*shape):
    return jax.random.normal(next(keys), shape)

  q, target = (normal(2, states, queries, 4, size) for _ in range(2))
  own = [normal(2, states, window, kv_heads, size) for _ in range(2)]
  shared = [normal(2, kv_heads, 100, size) for _ in range(2)]

  def value_and_gradients(how):
    def score(arrays):
      mixed = ops.attend_windows(
        *arrays, jnp.array(starts)[:, None], length[:, None], how
      )
      return jnp.sum(mixed * target), mixed

    return jax.jit(jax.value_and_grad(score, has_aux=True))([q, *own, *shared])

  chex.assert_trees_all_close(
    value_and_gradients(how), value_and_gradients("xla"), rtol=2e-5, atol=2e-5
  )


def test_on_a_mesh_every_device_computes_its_rows_and_heads(run_in_subprocess):
  run_in_subprocess(
    """
    import functools
    import chex, jax, jax.numpy as jnp
    from agrpo_jax.models import ops, splash
    from agrpo_jax.parallel import mesh as mesh_lib

    splash.attend = functools.partial(splash.attend, interpret=True)
    rows = mesh_lib.rows(mesh_lib.make(data=2, fsdp=1, tensor=2))
    keys = jax.random.split(jax.random.key(0), 4)
    q, target = (jax.random.normal(k, (4, 100, 4, 128)) for k in keys[:2])
    k, v = (jax.random.normal(k, (4, 100, 2, 128)) for k in keys[2:])
    length = jnp.array([[100], [3], [40], [99]])

    def value_and_gradients(rows, *qkv):
      def score(*qkv):
        mixed = ops.attend(*qkv, length, "splash", rows)
        return jnp.sum(mixed * target), mixed
      return jax.value_and_grad(score, (0, 1, 2), has_aux=True)(*qkv)

    chex.assert_trees_all_close(
      jax.jit(functools.partial(value_and_gradients, rows))(q, k, v),
      value_and_gradients(None, q, k, v),
      rtol=1e-5,
      atol=1e-5,
    )

    # Nothing travels: what a device needs is what it has.
    by_row = jax.sharding.PartitionSpec(("data", "fsdp"), None, "tensor")
    place = jax.sharding.NamedSharding(rows.mesh, by_row)
    attend = functools.partial(ops.attend, implementation="splash", rows=rows)
    program = jax.jit(attend, out_shardings=place).lower(
      *jax.device_put((q, k, v), place), jax.device_put(length, rows)
    )
    text = program.compile().as_text()
    for communication in ("all-gather", "all-reduce", "all-to-all", "permute("):
      assert communication not in text, communication
    """,
    devices=4,
  )


def shape(**changes):
  return recordings.random_network(**changes)[0]


def test_heads_that_the_kernel_cannot_compute():
  assert ops.splash_problem(2, 128, None) == ""
  assert ops.splash_problem(2, 256, None) == "head_dim=256 is above 128"
  for tensor, found in (
    (2, ""),
    (4, "mesh.tensor=4 splits one of its 2 KV heads"),
  ):
    mesh = jax.sharding.AbstractMesh((1, 1, tensor), mesh_lib.AXES)
    assert ops.splash_problem(2, 128, mesh_lib.rows(mesh)) == found


@pytest.mark.parametrize(
  "platform, changes, queries, expected",
  [
    ("tpu", {}, 896, "splash"),
    ("tpu", {}, 12, "xla"),  # the last layer's
    ("tpu", {"dtype": "float32"}, 896, "xla"),
    ("tpu", {"head_dim": 256}, 896, "xla"),
    ("tpu", {"attention": "xla"}, 896, "xla"),
    ("tpu", {"attention": "splash"}, 12, "splash"),
    ("gpu", {}, 896, "cudnn"),
    ("cpu", {}, 896, "xla"),
  ],
)
def test_auto(monkeypatch, platform, changes, queries, expected):
  monkeypatch.setattr(jax, "default_backend", lambda: platform)
  one = shape(**{"dtype": "bfloat16"} | changes)
  assert transformer._attention(one, queries, None) == expected


def test_the_network_on_described_devices_is_theirs(monkeypatch):
  """A plan is made on a CPU for a TPU."""
  mesh = mesh_lib.make(devices=jax.devices()[:1])
  monkeypatch.setattr(mesh_lib, "platform", lambda mesh: "tpu")
  one = shape(dtype="bfloat16")
  assert transformer._attention(one, 896, mesh_lib.rows(mesh)) == "splash"


@pytest.mark.parametrize(
  "length, most, size",
  [(128, 1024, 128), (896, 896, 896), (1024, 896, 512), (1152, 1024, 384)],
)
def test_blocks_divide(length, most, size):
  assert splash._divisor(length, most) == size
