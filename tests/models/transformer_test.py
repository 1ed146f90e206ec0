"""The network: what it computes, where, and what it refuses."""

import functools
import pathlib

import chex
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agrpo_jax.models import base
from agrpo_jax.models import lora as lora_lib
from agrpo_jax.models import transformer
from agrpo_jax.port import model_folder
from fixtures import recordings

GOLDEN = pathlib.Path(__file__).parents[1] / "testdata" / "golden"
CHECKPOINTS = ("tiny_eos", "tiny_gqa_sharded", "tiny_loss", "tiny_mha")


@functools.cache
def load(name):
  return model_folder.load(str(GOLDEN / "ckpt" / name), dtype=jnp.float32)


def all_positions(tokens):
  return np.tile(np.arange(tokens.shape[1], dtype=np.int32), (len(tokens), 1))


@pytest.mark.parametrize("name", CHECKPOINTS)
class TestGolden:
  """Logits equal those of the original PyTorch code."""

  def test_without_padding(self, name):
    config, params = load(name)
    golden = np.load(GOLDEN / "forward" / f"{name}.npz")
    tokens = golden["ids"]
    logits = transformer.Transformer(config).apply(
      {"params": params},
      tokens,
      np.full(len(tokens), tokens.shape[1], np.int32),
      all_positions(tokens),
    )
    np.testing.assert_allclose(logits, golden["logits_nomask"], atol=3e-4)

  def test_with_padding(self, name):
    """Theirs is on the left, ours on the right; RoPE sees only distances."""
    config, params = load(name)
    golden = np.load(GOLDEN / "forward" / f"{name}.npz")
    valid = golden["attention_mask"].astype(bool)
    length = valid.sum(1).astype(np.int32)
    tokens = np.full_like(golden["ids"], config.pad_id)
    for row, real in enumerate(valid):
      tokens[row, : length[row]] = golden["ids_padded"][row, real]
    logits = transformer.bind(config, params).logits(
      tokens, length, all_positions(tokens)
    )
    for row, real in enumerate(valid):
      expected = golden["logits_padded"][row, real, : config.vocab_size]
      np.testing.assert_allclose(
        logits[row, : length[row]], expected, atol=3e-4
      )


class TestInvariance:
  """A row's logits depend on its own tokens and on nothing else."""

  def test_padding_and_batch(self):
    config, params = recordings.random_network()
    logits_fn = jax.jit(transformer.bind(config, params).logits)
    rng = np.random.default_rng(0)
    length = np.array([11, 1, 11, 16], np.int32)
    rows = [rng.integers(0, 37, n) for n in length]
    positions = np.array([[0, 3, 10], [0, 0, 0], [6, 2, 1], [15, 0, 8]])
    # Wild ids too: what stands in the padding must not matter at all.
    for width, garbage in ((16, 0), (24, 36), (24, 10**6), (24, -1)):
      tokens = np.full((4, width), garbage, np.int32)
      for row, real in enumerate(rows):
        tokens[row, : len(real)] = real
      together = logits_fn(tokens, length, positions)
      for row, real in enumerate(rows):
        alone = logits_fn(real[None], length[row : row + 1], positions[[row]])
        chex.assert_trees_all_close(together[row], alone[0], atol=2e-5)


def numpy_logits(config, params, tokens):
  """Logits of one row at all positions: a slow twin, in float64."""
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

  def norm(x, scale):
    root = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + config.norm_eps)
    return x / root * scale["scale"]

  def project(x, weights):
    return x @ weights["kernel"] + weights.get("bias", 0.0)

  def rotate(x):
    size = x.shape[-1]
    y = np.empty_like(x)
    for at in range(len(x)):
      for i in range(size // 2):
        angle = at * config.rope_theta ** (-2 * i / size)
        one, two = x[at, i], x[at, i + size // 2]
        y[at, i] = one * np.cos(angle) - two * np.sin(angle)
        y[at, i + size // 2] = two * np.cos(angle) + one * np.sin(angle)
    return y

  x = params["embed"]["table"][tokens]
  for number in range(config.num_layers):
    layer = params["last_layer"]
    if number < config.num_layers - 1:
      layer = jax.tree.map(lambda one, at=number: one[at], params["layers"])
    normed = norm(x, layer["attn_norm"])
    q, k, v = (project(normed, layer[name]) for name in ("q", "k", "v"))
    mixed = np.empty_like(x)
    for head in range(config.num_heads):
      size = config.head_dim
      own = slice(head * size, (head + 1) * size)
      group = head // (config.num_heads // config.num_kv_heads)
      shared = slice(group * size, (group + 1) * size)
      scores = rotate(q[:, own]) @ rotate(k[:, shared]).T / np.sqrt(size)
      weight = np.exp(scores - scores.max(axis=-1, keepdims=True))
      weight /= weight.sum(axis=-1, keepdims=True)
      mixed[:, own] = weight @ v[:, shared]
    x = x + project(mixed, layer["attn_out"])
    normed = norm(x, layer["mlp_norm"])
    gate = project(normed, layer["gate"])
    gated = gate / (1 + np.exp(-gate)) * project(normed, layer["up"])
    x = x + project(gated, layer["down"])
  x = norm(x, params["final_norm"])
  head = params["embed"]["table"].T
  if not config.tied_head:
    head = params["head"]["kernel"]
  logits = x @ head
  if config.scale_logits:
    logits /= np.sqrt(config.width)
  return logits[:, : config.vocab_size]


class TestNetwork:
  @pytest.mark.parametrize(
    "changes",
    [
      {},
      {"num_kv_heads": 1, "qkv_bias": False},
      {"tied_head": True, "scale_logits": True, "num_kv_heads": 4},
      {"num_layers": 1},
      {"num_layers": 2, "head_dim_of": 16},
    ],
    ids=["grouped", "multi_query", "tied_scaled", "one_layer", "two_heads"],
  )
  def test_numpy_twin(self, changes):
    changes = dict(changes)
    if changes.pop("head_dim_of", None):
      changes |= {"num_heads": 2, "num_kv_heads": 1}
    config, params = recordings.random_network(**changes)
    tokens = np.random.default_rng(3).integers(0, 37, 9)
    positions = np.array([[4, 0, 8, 4]])
    logits = jax.jit(transformer.bind(config, params).logits)(
      tokens[None], np.array([9]), positions
    )
    expected = numpy_logits(config, params, tokens)[positions[0]]
    np.testing.assert_allclose(logits[0], expected, rtol=1e-4, atol=1e-4)

  def test_bfloat16_is_near_the_original_in_bfloat16(self):
    config, params = model_folder.load(
      GOLDEN / "ckpt" / "tiny_gqa_sharded", compute_dtype="bfloat16"
    )
    golden = np.load(GOLDEN / "forward" / "tiny_gqa_sharded.npz")
    tokens = golden["ids"]
    logits = jax.jit(transformer.Transformer(config).apply)(
      {"params": params},
      tokens,
      np.full(len(tokens), tokens.shape[1], np.int32),
      all_positions(tokens),
    )
    assert logits.dtype == jnp.float32
    for name in ("logits_nomask", "logits_nomask_bf16"):
      assert np.abs(logits - golden[name]).mean() < 0.1

  def test_who_influences_whom(self):
    """Every real token every position, the padding none."""
    config, params = recordings.random_network()
    length, positions = np.array([6]), np.array([[0, 3, 5]])
    tokens = np.arange(9)[None]
    table = params["embed"]["table"]

    def score(table, position):
      logits = transformer.bind(
        config, params | {"embed": {"table": table}}
      ).logits(tokens, length, positions)
      return logits[0, position].sum()

    gradient = jax.jit(jax.grad(score))
    for position in range(3):
      influence = np.abs(gradient(table, position)).sum(axis=-1)
      assert np.all(influence[:6] > 0)
      np.testing.assert_array_equal(influence[6:], 0)

  def test_logits_exist_only_where_asked(self):
    config, params = recordings.random_network()
    tokens = np.zeros((2, 16), np.int32)
    args = tokens, np.array([16, 9]), np.zeros((2, 3), np.int32)

    def loss(params):
      return transformer.bind(config, params).logits(*args).sum()

    sizes = set()

    def visit(jaxpr):
      for equation in jaxpr.eqns:
        for value in equation.outvars:
          shape = value.aval.shape
          if config.embedding_size in shape and len(shape) > 2:
            sizes.add(shape)
        for inner in jax.tree.leaves(
          list(equation.params.values()),
          is_leaf=lambda one: hasattr(one, "eqns") or hasattr(one, "jaxpr"),
        ):
          inner = getattr(inner, "jaxpr", inner)
          if hasattr(inner, "eqns"):
            visit(inner)

    visit(jax.make_jaxpr(jax.grad(loss))(params).jaxpr)
    assert sizes == {(2, 3, config.embedding_size)}

  def test_flops_of_the_compiled_network(self):
    config, params = recordings.random_network(
      num_layers=1, width=64, mlp_width=128
    )
    args = np.zeros((1, 32), np.int32), np.array([32]), np.zeros((1, 8), int)
    compiled = (
      jax.jit(transformer.bind(config, params).logits).lower(*args).compile()
    )
    flops = transformer.forward_flops(config, 32, 8)
    # The compiler also counts norms, RoPE and softmax.
    assert flops < compiled.cost_analysis()["flops"] < 1.2 * flops

  def test_flops_by_hand(self):
    """2 layers, width 4, one kv head of 2, MLP 3, 5 ids; L = 7, S = 1."""
    config = base.Shape(
      model_type="llada",
      vocab_size=5,
      embedding_size=5,
      num_layers=2,
      width=4,
      num_heads=2,
      num_kv_heads=1,
      mlp_width=3,
      rope_theta=10.0,
      norm_eps=1e-5,
      qkv_bias=False,
      tied_head=False,
      max_length=8,
      mask_id=4,
      eos_id=3,
      pad_id=3,
    )
    keys_values = 2 * 4 * 2  # multiply-adds per token
    rest = 2 * 4 * 4 + 3 * 4 * 3
    scores = 2 * 7 * 4
    expected = 7 * (keys_values + rest + scores)
    expected += 7 * keys_values + (rest + scores) + 4 * 5
    assert transformer.forward_flops(config, 7, 1) == 2 * expected


class TestParameters:
  @pytest.mark.parametrize(
    "changes", [{}, {"num_layers": 1, "tied_head": True}]
  )
  def test_one_table(self, changes):
    """The network, `init`, shapes and axes agree on every array."""
    config, _ = recordings.random_network(**changes)
    shapes = transformer.abstract_params(config)
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    length = jax.ShapeDtypeStruct((1,), jnp.int32)
    network = jax.eval_shape(
      transformer.Transformer(config).init,
      jax.random.key(0),
      tokens,
      length,
      tokens,
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(network["params"], shapes)
    params = transformer.init(config, jax.random.key(0))
    chex.assert_trees_all_equal_shapes_and_dtypes(params, shapes)
    axes = flax.traverse_util.flatten_dict(transformer.logical_axes(config))
    for path, leaf in flax.traverse_util.flatten_dict(shapes).items():
      assert len(axes[path]) == len(leaf.shape)
      assert (axes[path][0] == "layers") == (path[0] == "layers")
    assert ("layers" in params) == (config.num_layers > 1)
    assert ("head" in params) == (not config.tied_head)

  def test_fresh_logits_are_of_order_one(self):
    config, _ = recordings.random_network(width=64, mlp_width=96, num_layers=6)
    params = transformer.init(config, jax.random.key(1))
    tokens = np.random.default_rng(0).integers(0, 37, (4, 12))
    logits = jax.jit(transformer.bind(config, params).logits)(
      tokens, np.full(4, 12), all_positions(tokens)
    )
    assert 0.5 < np.std(logits) < 2


class TestLora:
  def test_adapter_equals_merged(self):
    config, params = recordings.random_network()
    settings = lora_lib.Lora(3, 6.0, lora_lib.TARGETS)
    adapter = lora_lib.init(settings, params, jax.random.key(2))
    args = np.arange(12)[None], np.array([10]), np.array([[0, 9, 4]])

    @jax.jit
    def logits(params, adapter):
      return transformer.bind(config, params, adapter, settings.scale).logits(
        *args
      )

    before = logits(params, None)
    chex.assert_trees_all_close(logits(params, adapter), before, atol=1e-5)
    rng = np.random.default_rng(3)
    adapter = jax.tree.map(lambda x: x + rng.normal(0, 0.3, x.shape), adapter)
    adapted = logits(params, adapter)
    merged = lora_lib.merge(params, adapter, settings.scale)
    expected = logits(merged, None)
    assert np.abs(adapted - before).max() > 0.5
    np.testing.assert_allclose(adapted, expected, rtol=1e-4, atol=1e-4)
