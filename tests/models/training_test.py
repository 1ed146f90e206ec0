"""The network in training: what its backward pass keeps, what devices share."""

import chex
import jax
import numpy as np

from agrpo_jax.models import transformer
from fixtures import recordings


class TestRemat:
  def gradients(self, remat):
    config, params = recordings.random_network(
      remat=remat, num_layers=4, qkv_bias=False
    )
    tokens = np.random.default_rng(0).integers(0, 37, (2, 24))
    args = tokens, np.array([24, 9]), np.array([[3, 20], [0, 8]])

    def loss(params):
      logits = transformer.bind(config, params).logits(*args)
      return jax.nn.log_softmax(logits)[..., 0].sum()

    compiled = jax.jit(jax.grad(loss)).lower(params).compile()
    memory = compiled.memory_analysis().temp_size_in_bytes
    kept = {
      value.aval.shape
      for equation in jax.make_jaxpr(jax.grad(loss))(params).eqns
      if equation.primitive.name == "scan" and not equation.params["reverse"]
      for value in equation.outvars
      if value.aval.shape[:1] == (3,)  # stacked by the scan, not its carry
    }
    return compiled(params), memory, kept

  def test_same_gradients_less_memory(self):
    results = {
      remat: self.gradients(remat) for remat in ("none", "dots", "full")
    }
    for remat in ("dots", "full"):
      chex.assert_trees_all_close(
        results[remat][0], results["none"][0], rtol=1e-4, atol=1e-3
      )
    assert results["none"][1] > results["dots"][1] > results["full"][1]
    inputs, projected, mixed = (3, 2, 24, 32), (3, 2, 24, 48), (3, 2, 2, 48, 8)
    assert results["full"][2] == {inputs}
    assert projected in results["dots"][2] and mixed not in results["dots"][2]
    assert mixed in results["none"][2]

  def test_unrolled_layers_compute_the_same(self):
    results = []
    for unroll in (1, 2, 8):
      config, params = recordings.random_network(unroll=unroll, num_layers=4)
      tokens = np.random.default_rng(0).integers(0, 37, (2, 12))
      args = tokens, np.array([12, 9]), np.array([[3, 5], [0, 8]])
      results.append(
        jax.grad(
          lambda params, config=config, args=args: (
            transformer.bind(config, params).logits(*args).std()
          )
        )(params)
      )
    for other in results[1:]:
      chex.assert_trees_all_close(other, results[0], rtol=1e-4, atol=1e-6)


def test_rows_stay_split_when_parameters_are(run_in_subprocess):
  """Same logits on 8 devices, and nothing gathers the activations."""
  run_in_subprocess("""
    import re
    import jax, numpy as np
    from agrpo_jax.models import base
    from agrpo_jax.models import transformer
    from agrpo_jax.parallel import mesh as mesh_lib
    config = base.Shape(
      model_type="llada", vocab_size=120, embedding_size=128, num_layers=3,
      width=64, num_heads=8, num_kv_heads=4, mlp_width=96,
      rope_theta=500.0, norm_eps=1e-5,
      qkv_bias=True, tied_head=False, max_length=64, mask_id=119, eos_id=118,
      pad_id=118,
    )
    params = transformer.init(config, jax.random.key(0))
    rng = np.random.default_rng(0)
    batch = (
      rng.integers(0, 120, (8, 40)), rng.integers(1, 40, 8),
      rng.integers(0, 40, (8, 3)),
    )
    expected = jax.jit(transformer.bind(config, params).logits)(*batch)
    for sizes in ((1, 4, 2), (2, 4, 1)):
      mesh = mesh_lib.make(*sizes)
      rows = mesh_lib.rows(mesh)
      where = mesh_lib.shardings(mesh, transformer.logical_axes(config), params)
      compiled = jax.jit(
        lambda params, *batch: transformer.bind(
          config, params, rows=rows
        ).logits(*batch),
        in_shardings=(where, rows, rows, rows),
      ).lower(params, *batch).compile()
      split = jax.device_put(params, where), *jax.device_put(batch, rows)
      np.testing.assert_allclose(compiled(*split), expected, atol=1e-4)
    # On the last mesh every device has one row, so no device may exchange
    # what the layers make of several: [rows, 40, width or MLP width].
    exchanged = [
      line for line in compiled.as_text().splitlines()
      if re.search(r" all-(gather|reduce|to-all)\\(", line)
      and re.search(r"f32\\[([2-9]),40,(64|96)\\]", line)
    ]
    assert not exchanged, exchanged
  """)
