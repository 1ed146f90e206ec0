"""The network: what it computes, where, and what it refuses."""

import functools
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agrpo_jax import llada, port

GOLDEN = pathlib.Path(__file__).parent / "testdata" / "golden"
CHECKPOINTS = ("tiny_eos", "tiny_gqa_sharded", "tiny_loss", "tiny_mha")


@functools.cache
def load(name):
  return port.load(str(GOLDEN / "ckpt" / name), dtype=jnp.float32)


def all_positions(tokens):
  return np.tile(np.arange(tokens.shape[1], dtype=np.int32), (len(tokens), 1))


@pytest.mark.parametrize("name", CHECKPOINTS)
class TestGolden:
  """Logits equal those of the original PyTorch code."""

  def test_without_padding(self, name):
    config, params = load(name)
    golden = np.load(GOLDEN / "forward" / f"{name}.npz")
    tokens = golden["ids"]
    logits = llada.LLaDA(config).apply(
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
    logits = llada.logits_fn(config, params)(
      tokens, length, all_positions(tokens)
    )
    for row, real in enumerate(valid):
      expected = golden["logits_padded"][row, real, : config.vocab_size]
      np.testing.assert_allclose(
        logits[row, : length[row]], expected, atol=3e-4
      )


def random_network(**changes):
  """A small network with grouped heads, biases and a wide embedding."""
  config = llada.Config(
    **{
      "vocab_size": 37,
      "embedding_size": 40,
      "num_layers": 3,
      "width": 32,
      "num_heads": 4,
      "num_kv_heads": 2,
      "mlp_width": 48,
      "rope_theta": 500.0,
      "norm_eps": 1e-5,
      "qkv_bias": True,
      "tied_head": False,
      "max_length": 64,
      "mask_id": 36,
      "eos_id": 35,
      "pad_id": 35,
      **changes,
    }
  )
  params = llada.init(config, jax.random.key(0))
  # Biases and scales start constant; draw them, so that they can be wrong.
  leaves, treedef = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  leaves = [
    leaf + 0.3 * jax.random.normal(key, leaf.shape)
    for leaf, key in zip(leaves, keys, strict=True)
  ]
  return config, jax.tree.unflatten(treedef, leaves)


class TestInvariance:
  """A row's logits depend on its own tokens and on nothing else."""

  def test_padding_and_batch(self):
    config, params = random_network()
    logits_fn = jax.jit(llada.logits_fn(config, params))
    rng = np.random.default_rng(0)
    length = np.array([11, 1, 7, 16], np.int32)
    rows = [rng.integers(0, 37, n) for n in length]
    positions = np.array([[0, 3, 10], [0, 0, 0], [6, 2, 1], [15, 0, 8]])
    # Wild ids too: what stands in the padding must not matter at all.
    for width, garbage in ((16, 0), (19, 36), (24, 10**6), (24, -1)):
      tokens = np.full((4, width), garbage, np.int32)
      for row, real in enumerate(rows):
        tokens[row, : len(real)] = real
      together = logits_fn(tokens, length, positions)
      for row, real in enumerate(rows):
        alone = logits_fn(real[None], length[row : row + 1], positions[[row]])
        chex.assert_trees_all_close(together[row], alone[0], atol=2e-5)
