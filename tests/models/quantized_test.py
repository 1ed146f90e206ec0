"""Kernels in int8: how far off they are, and what is computed with them."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agrpo_jax.models import lora as lora_lib
from agrpo_jax.models import ops
from agrpo_jax.models import quantized
from agrpo_jax.models import transformer
from agrpo_jax.port import model_folder
from fixtures import recordings

ASSETS = pathlib.Path(__file__).parents[2] / "agrpo_jax" / "assets"


def kernel(seed):
  """[3, 24, 10], channels of very different sizes, one of them zero."""
  rng = np.random.default_rng(seed)
  heavy = rng.standard_t(2, (3, 24, 10))
  return (heavy * 10.0 ** rng.integers(-12, 12, (3, 1, 10))).astype(
    np.float32
  ) * (np.arange(10) != 4)


@pytest.mark.parametrize("seed", range(5))
def test_values_are_off_by_at_most_half_of_a_scale(seed):
  exact = kernel(seed)
  found = quantized.quantize(jnp.asarray(exact))
  assert (found.values.dtype, found.values.shape) == (jnp.int8, (3, 24, 10))
  assert (found.scale.dtype, found.scale.shape) == (jnp.float32, (3, 10))
  largest = np.abs(exact).max(axis=1)
  np.testing.assert_allclose(
    found.scale, np.where(largest > 0, largest / 127, 1), rtol=1e-6
  )
  bound = np.float64(0.5 * (1 + 1e-5)) * found.scale[:, None]
  assert (np.abs(quantized.dequantize(found) - exact) <= bound).all()
  # All of the range is used, and nothing but it.
  top = np.abs(np.asarray(found.values, int)).max(axis=1)
  np.testing.assert_array_equal(top, np.where(largest > 0, 127, 0))


def test_both_signs_alike_and_nothing_is_lost_twice():
  exact = jnp.asarray(kernel(7))
  found = quantized.quantize(exact)
  mirrored = quantized.quantize(-exact)
  np.testing.assert_array_equal(mirrored.values, -found.values)
  again = quantized.quantize(quantized.dequantize(found))
  np.testing.assert_array_equal(again.values, found.values)


def test_one_layer_is_quantized_as_among_others():
  exact = jnp.asarray(kernel(8))
  found = quantized.quantize(exact)
  for layer in range(3):
    alone = quantized.quantize(exact[layer])
    np.testing.assert_array_equal(alone.values, found.values[layer])
    np.testing.assert_array_equal(alone.scale, found.scale[layer])


@pytest.mark.parametrize("out_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_product_is_that_of_the_stored_numbers(dtype, out_dtype):
  """Of no rounded weights: int8 is exact in bfloat16."""
  rng = np.random.default_rng(0)
  stored = quantized.quantize(jnp.asarray(rng.normal(0, 0.1, (24, 10))))
  x = jnp.asarray(rng.normal(0, 1, (2, 5, 24)), dtype)
  cotangent = jnp.asarray(rng.normal(0, 1, (2, 5, 10)), out_dtype)
  y, pullback = jax.vjp(
    lambda x: ops.matmul_int8(x, stored, None, jnp.dtype(out_dtype)), x
  )
  (gradient,) = pullback(cotangent)
  assert (y.dtype, gradient.dtype) == (out_dtype, dtype)
  exact = np.asarray(stored.values, float) * np.asarray(stored.scale, float)
  expected = np.asarray(x, float) @ exact
  tolerance = 2e-6 if out_dtype == "float32" else 2**-8
  np.testing.assert_allclose(
    np.asarray(y, float), expected, atol=tolerance * np.abs(expected).max()
  )
  expected = np.asarray(cotangent, float) @ exact.T
  tolerance = 2e-6 if dtype == "float32" else 2**-7
  np.testing.assert_allclose(
    np.asarray(gradient, float), expected, atol=tolerance * expected.max()
  )


def network(**changes):
  """As `recordings.random_network`, of parameters as they are initialised."""
  shape, _ = recordings.random_network(**changes)
  return shape, transformer.init(shape, jax.random.key(0))


def of_layers(function, params):
  return quantized.map_tree(function, lambda x: x, params)


def adapter(params):
  settings = lora_lib.Lora(4, 8.0, lora_lib.TARGETS)
  fresh = lora_lib.init(settings, params, jax.random.key(1))
  rng = np.random.default_rng(2)
  return jax.tree.map(lambda x: x + rng.normal(0, 0.1, x.shape), fresh)


TOKENS = np.random.default_rng(3).integers(0, 37, (3, 14))
LENGTH = np.array([14, 9, 12])
POSITIONS = np.tile(np.array([[1, 5, 8]]), (3, 1))


def loss_and_gradient(shape, params, lora):
  def loss(lora):
    network = transformer.bind(shape, params, lora, 2.0)
    shared = network.keys_values(TOKENS, LENGTH)
    windows = jnp.asarray(TOKENS[:, None, 4:9])
    at = jnp.asarray(POSITIONS[:, None, 1:])
    logits = jnp.concatenate(
      [
        network.logits(TOKENS, LENGTH, POSITIONS),
        network.window_logits(
          shared, LENGTH, windows, jnp.full((3, 1), 4), at
        ).squeeze(1),
      ],
      axis=1,
    )
    return jax.nn.log_softmax(logits)[..., 3].sum(), logits

  return jax.jit(jax.value_and_grad(loss, has_aux=True))(lora)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_logits_and_gradients_of_the_dequantized_weights(remat):
  shape, params = network(remat=remat)
  stored = of_layers(quantized.quantize, params)
  plain = of_layers(
    lambda x: quantized.dequantize(quantized.quantize(x)), params
  )
  assert jax.tree.structure(
    jax.tree.map(lambda x: 0, quantized.abstract_params(params))
  ) == jax.tree.structure(jax.tree.map(lambda x: 0, stored))
  lora = adapter(params)
  (_, found), gradient = loss_and_gradient(shape, stored, lora)
  (_, expected), wanted = loss_and_gradient(shape, plain, lora)
  np.testing.assert_allclose(found, expected, atol=2e-4)
  for ours, theirs in zip(
    jax.tree.leaves(gradient), jax.tree.leaves(wanted), strict=True
  ):
    assert np.abs(theirs).max() > 1e-3
    np.testing.assert_allclose(ours, theirs, atol=2e-4 * np.abs(theirs).max())


def relative_error(found, expected):
  """Root mean square of the difference, over the spread of what is right."""
  found, expected = (np.asarray(x, float) for x in (found, expected))
  return np.sqrt(np.mean((found - expected) ** 2)) / expected.std()


def logits(shape, params):
  tokens = TOKENS % shape.vocab_size
  return jax.jit(transformer.bind(shape, params).logits)(
    tokens, LENGTH, POSITIONS
  )


def test_logits_error_of_a_random_network():
  shape, params = network()
  exact = logits(shape, params)
  found = logits(shape, of_layers(quantized.quantize, params))
  assert 1e-4 < relative_error(found, exact) < 0.02


@pytest.mark.parametrize("name", ["tiny-sudoku", "tiny-reasoning"])
def test_logits_error_of_a_trained_network(name):
  """Three times that of bfloat16, about: figures in benchmarks/results."""
  errors = {}
  for dtype in ("float32", "bfloat16"):
    shape, params = model_folder.load(
      ASSETS / name, dtype="float32", compute_dtype=dtype
    )
    errors[dtype] = (
      logits(shape, params),
      logits(shape, of_layers(quantized.quantize, params)),
    )
  exact, int8 = errors["float32"]
  assert relative_error(int8, exact) < 0.03
  bfloat16, both = errors["bfloat16"]
  assert relative_error(both, bfloat16) < 0.03
  assert relative_error(both, exact) < 4 * relative_error(bfloat16, exact)


def test_embedding_head_norms_and_biases_stay_as_they_are():
  _, params = recordings.random_network()
  is_int8 = jax.tree_util.tree_map_with_path(
    lambda path, x: x.dtype == jnp.int8, of_layers(quantized.quantize, params)
  )
  assert not any(jax.tree.leaves((is_int8["embed"], is_int8["head"])))
  for part in ("layers", "last_layer"):
    for name, arrays in is_int8[part].items():
      has_kernel = "norm" not in name
      assert [*jax.tree.leaves(arrays)].count(True) == has_kernel


def test_on_a_mesh_as_on_one_device(run_in_subprocess):
  """Values and scales in their shards; int8 is what is gathered."""
  run_in_subprocess("""
    import re
    import sys
    import jax
    import jax.numpy as jnp
    import numpy as np
    sys.path.insert(0, "tests")
    from agrpo_jax.models import lora as lora_lib
    from agrpo_jax.models import quantized
    from agrpo_jax.models import transformer
    from agrpo_jax.parallel import mesh as mesh_lib
    from fixtures import recordings

    shape, _ = recordings.random_network(
      num_kv_heads=4, width=64, mlp_width=96
    )
    params = transformer.init(shape, jax.random.key(0))
    settings = lora_lib.Lora(4, 8.0, lora_lib.TARGETS)
    lora = lora_lib.init(settings, params, jax.random.key(1))
    rng = np.random.default_rng(2)
    lora = jax.tree.map(lambda x: x + rng.normal(0, 0.1, x.shape), lora)
    axes = transformer.logical_axes(shape)
    stored = quantized.map_tree(quantized.quantize, lambda x: x, params)
    tokens = jax.random.randint(jax.random.key(2), (8, 16), 0, 37)
    length = jnp.full((8,), 14)
    positions = jnp.tile(jnp.array([[1, 5]]), (8, 1))

    def gradient(params, lora, rows):
      def loss(lora):
        network = transformer.bind(shape, params, lora, settings.scale, rows)
        logits = network.logits(tokens, length, positions)
        return jax.nn.log_softmax(logits)[..., 3].sum(), logits
      return jax.value_and_grad(loss, has_aux=True)(lora)

    one = jax.jit(lambda *trees: gradient(*trees, None))(stored, lora)
    for sizes in ((2, 2, 2), (1, 8, 1), (1, 2, 4)):
      mesh = mesh_lib.make(*sizes)
      rows = mesh_lib.rows(mesh)
      where = mesh_lib.shardings(mesh, quantized.logical_axes(axes), stored)
      placed = jax.device_put(stored, where)
      up = placed["layers"]["up"]["kernel"]
      assert up.values.sharding.spec == jax.P(None, "fsdp", "tensor")
      assert up.scale.sharding.spec == jax.P(None, "tensor")
      down = placed["layers"]["down"]["kernel"]
      assert down.scale.sharding.spec == jax.P(None, "fsdp")
      of_lora = lora_lib.logical_axes(settings, axes)
      adapter = jax.device_put(lora, mesh_lib.shardings(mesh, of_lora, lora))
      compiled = jax.jit(lambda *trees: gradient(*trees, rows)).lower(
        placed, adapter).compile()
      for a, b in zip(
        jax.tree.leaves(one), jax.tree.leaves(compiled(placed, adapter)),
        strict=True,
      ):
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(a).max())
      gathered = re.findall(r"= (\\S+?)\\[\\S* all-gather", compiled.as_text())
      assert gathered.count("s8") >= 14, gathered
  """)
