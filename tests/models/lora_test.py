"""Adapters: what they adapt, how they start, how they merge."""

import chex
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agrpo_jax import errors
from agrpo_jax.models import base
from agrpo_jax.models import lora
from agrpo_jax.models import transformer
from agrpo_jax.parallel import mesh as mesh_lib


def network(**changes):
  return base.Shape(
    **{
      "model_type": "llada",
      "vocab_size": 11,
      "embedding_size": 12,
      "num_layers": 3,
      "width": 8,
      "num_heads": 2,
      "num_kv_heads": 1,
      "mlp_width": 6,
      "rope_theta": 500.0,
      "norm_eps": 1e-5,
      "qkv_bias": False,
      "tied_head": False,
      "max_length": 64,
      "mask_id": 10,
      "eos_id": 9,
      "pad_id": 9,
      **changes,
    }
  )


def shapes(adapter):
  flat = flax.traverse_util.flatten_dict(adapter, sep="/")
  return {name: leaf.shape for name, leaf in flat.items()}


class TestInit:
  @pytest.mark.parametrize("rank", [9, 10**12])
  def test_a_rank_above_that_of_all_projections(self, rank):
    """Width 8: q is 8 x 8, down 6 x 8. Nothing of that size is allocated."""
    params = transformer.abstract_params(network())
    settings = lora.Lora(rank, 6.0, ("q", "down"))
    with pytest.raises(errors.UserError, match=f"rank {rank} is above 8"):
      lora.init(settings, params, jax.random.key(0))
    lora.init(lora.Lora(8, 6.0, ("q", "down")), params, jax.random.key(0))

  def test_shapes_by_hand(self):
    settings = lora.Lora(3, 6.0, ("k", "down", "head"))
    params = transformer.abstract_params(network(), jnp.bfloat16)
    adapter = lora.init(settings, params, jax.random.key(0))
    assert shapes(adapter) == {
      "layers/k/a": (2, 8, 3),
      "layers/k/b": (2, 3, 4),
      "layers/down/a": (2, 6, 3),
      "layers/down/b": (2, 3, 8),
      "last_layer/k/a": (8, 3),
      "last_layer/k/b": (3, 4),
      "last_layer/down/a": (6, 3),
      "last_layer/down/b": (3, 8),
      "head/a": (8, 3),
      "head/b": (3, 12),
    }
    assert {leaf.dtype.name for leaf in jax.tree.leaves(adapter)} == {"float32"}
    expected = 3 * (8 * 3 + 3 * 4 + 6 * 3 + 3 * 8) + 8 * 3 + 3 * 12
    assert lora.count(adapter) == expected

  def test_as_peft_starts(self):
    """a is uniform in +-1/sqrt(in), different in each layer; b is zero."""
    params = transformer.abstract_params(network(width=64, mlp_width=128))
    adapter = lora.init(lora.Lora(16, 32.0), params, jax.random.key(0))
    a = np.asarray(adapter["layers"]["down"]["a"])
    bound = 1 / np.sqrt(128)
    assert 0.99 * bound < np.abs(a).max() <= bound
    np.testing.assert_allclose(a.std(), bound / np.sqrt(3), rtol=0.03)
    assert np.abs(a[0] - a[1]).max() > bound
    for leaf in (adapter["layers"]["q"]["b"], adapter["last_layer"]["q"]["b"]):
      np.testing.assert_array_equal(leaf, 0)

  def test_target_that_matches_nothing(self):
    params = transformer.abstract_params(network(tied_head=True))
    settings = lora.Lora(2, 4.0, ("q", "head"))
    with pytest.raises(errors.UserError, match=r"\['head'\].*embedding"):
      lora.init(settings, params, jax.random.key(0))

  def test_bad_settings_reported_together(self):
    with pytest.raises(errors.UserError) as caught:
      lora.Lora(0, -1.0, ("q", "ff_out"))
    for part in ("rank=0", "alpha=-1.0", "ff_out", "down, head"):
      assert part in str(caught.value)
    with pytest.raises(errors.UserError, match="targets"):
      lora.Lora(1, 1.0, ())

  def test_scale(self):
    assert lora.Lora(64, 128.0).scale == 2.0


class TestAxes:
  def test_every_axis_has_a_rule(self):
    settings = lora.Lora(2, 4.0, lora.TARGETS)
    config = network()
    axes = lora.logical_axes(settings, transformer.logical_axes(config))
    adapter = lora.init(
      settings, transformer.abstract_params(config), jax.random.key(0)
    )
    flat = flax.traverse_util.flatten_dict(axes, sep="/")
    assert flat["layers/gate/a"] == ("layers", "embed", "rank")
    assert flat["layers/gate/b"] == ("layers", "rank", "mlp")
    assert flat["head/b"] == ("rank", "vocab")
    mesh = mesh_lib.make(1, 1, 1, devices=jax.devices()[:1])
    placed = mesh_lib.shardings(mesh, axes, adapter)
    chex.assert_trees_all_equal_structs(placed, adapter)


class TestMerge:
  def test_by_hand(self):
    params = {
      "layers": {
        "q": {"kernel": jnp.ones((1, 2, 2)), "bias": jnp.ones((1, 2))}
      },
      "embed": {"table": jnp.ones((3, 2))},
    }
    a = jnp.array([[[1.0], [2.0]]])
    b = jnp.array([[[3.0, 5.0]]])
    adapter = {"layers": {"q": {"a": a, "b": b}}}
    merged = lora.merge(params, adapter, 0.5)
    np.testing.assert_allclose(
      merged["layers"]["q"]["kernel"], [[[2.5, 3.5], [4.0, 6.0]]]
    )
    assert merged["layers"]["q"]["bias"] is params["layers"]["q"]["bias"]
    assert merged["embed"]["table"] is params["embed"]["table"]
    np.testing.assert_array_equal(params["layers"]["q"]["kernel"], 1)

  def test_sums_in_float32_and_keeps_the_dtype(self):
    params = {"q": {"kernel": jnp.full((1, 1), 256.0, jnp.bfloat16)}}
    adapter = {"q": {"a": jnp.full((1, 3), 1.0), "b": jnp.full((3, 1), 1.0)}}
    merged = lora.merge(params, adapter, 1.0)["q"]["kernel"]
    assert merged.dtype == jnp.bfloat16
    # bfloat16 steps by 2 here: adding 1 three times would stay at 256.
    assert merged.item() == 260.0
