"""Tests of agrpo_jax.mesh."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agrpo_jax import errors
from agrpo_jax.parallel import mesh


def test_one_device_fills_every_axis():
  one = mesh.make()
  assert dict(one.shape) == {"data": 1, "fsdp": 1, "tensor": 1}
  assert one.axis_types == (jax.sharding.AxisType.Auto,) * 3
  assert mesh.num_row_shards(one) == 1


@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    ({"data": 2, "fsdp": 1}, "needs 2 devices, but there are 1"),
    ({"data": 3}, "needs a multiple of 3 devices, but there are 1"),
    ({"data": -1}, "At most one mesh axis can be -1"),
    ({"tensor": 0}, r"positive number of devices, or -1.*mesh\.tensor=0"),
    ({"fsdp": -2}, r"positive number of devices, or -1.*mesh\.fsdp=-2"),
  ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
  with pytest.raises(errors.UserError, match=message):
    mesh.make(**sizes)


def test_a_parameter_is_split_by_the_rules():
  spec = mesh.partition_spec(("layers", "embed", "mlp"))
  assert spec == jax.P(None, "fsdp", "tensor")
  assert mesh.partition_spec(()) == jax.P()


def test_rules_name_mesh_axes():
  assert set(mesh.RULES.values()) <= {None, *mesh.AXES}


def test_one_mesh_axis_cannot_split_two_dimensions():
  with pytest.raises(ValueError, match="only one dimension"):
    mesh.partition_spec(("mlp", "vocab"))


def test_an_axis_without_a_rule_is_named():
  with pytest.raises(ValueError, match=r"\['width'\].*known.*'embed'"):
    mesh.partition_spec(("width",))


def test_axes_and_shape_must_have_equal_rank():
  with pytest.raises(ValueError, match="shape"):
    mesh.shardings(mesh.make(), {"a": ("embed",)}, {"a": np.zeros((2, 2))})


def test_shardings_keep_the_tree_and_place_arrays():
  one = mesh.make()
  axes = {"kernel": ("embed", "mlp"), "norm": {"scale": ("norm",)}}
  arrays = {"kernel": jnp.ones((4, 6)), "norm": {"scale": jnp.ones(4)}}
  placed = jax.device_put(arrays, mesh.shardings(one, axes, arrays))
  chex.assert_trees_all_equal(placed, arrays)
  assert placed["kernel"].sharding.spec == jax.P("fsdp", "tensor")


def test_eight_devices(run_in_subprocess):
  """Sizes, shards, refusals, and a sharded matmul that gives the same sum."""
  run_in_subprocess("""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from agrpo_jax import errors
    from agrpo_jax.parallel import mesh

    m = mesh.make(data=2, fsdp=-1, tensor=2)
    assert dict(m.shape) == {"data": 2, "fsdp": 2, "tensor": 2}, m
    assert mesh.num_row_shards(m) == 4
    half = mesh.make(data=1, devices=jax.devices()[4:])
    assert [d.id for d in half.devices.flat] == [4, 5, 6, 7]
    assert dict(half.shape) == {"data": 1, "fsdp": 4, "tensor": 1}, half

    axes = {"up": ("embed", "mlp"), "down": ("mlp", "embed"), "n": ("norm",)}
    keys = jax.random.split(jax.random.key(0), 2)
    params = {
      "up": jax.random.normal(keys[0], (4, 6)),
      "down": jax.random.normal(keys[1], (6, 4)),
      "n": jnp.ones(5),  # 5 does not divide, but it is not split
    }
    where = mesh.shardings(m, axes, params)
    placed = jax.device_put(params, where)
    assert placed["up"].addressable_shards[0].data.shape == (2, 3)
    assert placed["n"].sharding.is_fully_replicated

    x_BxD = jnp.arange(32.0).reshape(8, 4)
    x_sharded = jax.device_put(x_BxD, mesh.rows(m))
    assert x_sharded.addressable_shards[0].data.shape == (2, 4)
    out = jax.jit(lambda p, x: x @ p["up"] @ p["down"])(placed, x_sharded)
    np.testing.assert_allclose(
        out, x_BxD @ params["up"] @ params["down"], rtol=1e-5, atol=1e-4)

    bad = {"up": np.ones((5, 6)), "down": np.ones((7, 4)), "n": np.ones(5)}
    try:
      mesh.shardings(m, axes, bad)
    except errors.UserError as error:
      message = str(error)
    assert "up: dimension 'embed' of size 5 over mesh.fsdp=2" in message
    assert "down: dimension 'mlp' of size 7 over mesh.tensor=2" in message

    for sizes, needed in (
      ({"data": 3}, "a multiple of 3"), ({"data": 2, "fsdp": 2}, "4")):
      try:
        mesh.make(**sizes)
      except errors.UserError as error:
        assert f"needs {needed} devices, but there are 8 (cpu)" in str(error)
      else:
        raise AssertionError(f"{sizes} does not fit 8 devices")
  """)


def test_a_weight_in_use_is_whole_over_fsdp(run_in_subprocess):
  """And the gradients are those of one device."""
  run_in_subprocess("""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from agrpo_jax.models import base
    from agrpo_jax.models import transformer
    from agrpo_jax.models import lora as lora_lib
    from agrpo_jax.parallel import mesh as mesh_lib

    config = base.Shape(
      model_type="llada", vocab_size=40, embedding_size=64, num_layers=2,
      width=32, num_heads=4, num_kv_heads=4, mlp_width=64,
      rope_theta=1e4, norm_eps=1e-5,
      qkv_bias=False, tied_head=False, max_length=64, mask_id=39, eos_id=38,
      pad_id=38,
    )
    settings = lora_lib.Lora(4, 8.0, lora_lib.TARGETS)
    params = transformer.init(config, jax.random.key(0))
    lora = lora_lib.init(settings, params, jax.random.key(1))
    lora = jax.tree.map(lambda x: x + 0.01, lora)
    tokens_BxL = jax.random.randint(jax.random.key(2), (8, 16), 0, 40)
    length_B = jnp.full((8,), 14)
    position_BxS = jnp.tile(jnp.array([[1, 5]]), (8, 1))

    def gradient(trees, rows):
      def loss(trees):
        network = transformer.bind(config, *trees, settings.scale, rows)
        logits = network.logits(tokens_BxL, length_B, position_BxS)
        return jax.nn.log_softmax(logits)[..., 3].sum()
      return jax.grad(loss)(trees)

    mesh = mesh_lib.make(1, 4, 2)
    rows = mesh_lib.rows(mesh)
    kept, used = mesh_lib.weight_shardings(rows, ("embed", "mlp"))
    assert kept.spec == jax.sharding.PartitionSpec("fsdp", "tensor"), kept
    assert used.spec == jax.sharding.PartitionSpec(None, "tensor"), used
    axes = transformer.logical_axes(config)
    shardings = (
      mesh_lib.shardings(mesh, axes, params),
      mesh_lib.shardings(mesh, lora_lib.logical_axes(settings, axes), lora),
    )
    one = jax.jit(lambda trees: gradient(trees, None))((params, lora))
    trees = jax.device_put((params, lora), shardings)
    compiled = jax.jit(lambda trees: gradient(trees, rows)).lower(trees)
    compiled = compiled.compile()
    many = compiled(trees)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
      np.testing.assert_allclose(a, b, atol=2e-6 * np.abs(a).max() + 1e-6)
    # Weights travel, not activations of all rows: f32[8 rows, 16 tokens, ..].
    assert "f32[8,16,32]" not in compiled.as_text()
  """)


def test_top_k_of_a_split_vocabulary(run_in_subprocess):
  """Equals that of the whole: values, places, ties, gradients."""
  run_in_subprocess("""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from agrpo_jax.parallel import mesh as mesh_lib
    from agrpo_jax.parallel import split

    mesh = mesh_lib.make(2, 1, 4)
    top_k = split.top_k_of(mesh)
    for size, k in ((64, 5), (64, 16), (64, 40), (61, 17), (61, 61), (3, 2)):
      # Few different values, so that most are tied; -inf, as masked ids are.
      x = jax.random.randint(jax.random.key(size + k), (8, 3, size), -2, 3)
      x = jnp.where(x == -2, -jnp.inf, x.astype(jnp.float32))

      def both(x, top_k):
        one = lambda x: top_k(x, k)
        rows = jax.vmap(jax.vmap(one), spmd_axis_name=mesh_lib.ROW_AXES)
        values, places = rows(x)
        finite = jnp.where(jnp.isfinite(values), values, 0.0)
        return (finite @ jnp.arange(1.0, k + 1)).sum(), (values, places)

      gradient = jax.grad(both, has_aux=True)
      one = jax.jit(lambda x: gradient(x, jax.lax.top_k))(x)
      where = jax.sharding.PartitionSpec(mesh_lib.ROW_AXES)
      x = jax.device_put(x, jax.sharding.NamedSharding(mesh, where))
      many = jax.jit(lambda x: gradient(x, top_k))(x)
      for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=f"{size}, {k}")
  """)


def test_lookup_in_a_split_table(run_in_subprocess):
  """Equals that in the whole, gradient included, which stays in its parts."""
  run_in_subprocess("""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from agrpo_jax.plan import hlo
    from agrpo_jax.parallel import mesh as mesh_lib
    from agrpo_jax.parallel import split

    table = jax.random.normal(jax.random.key(0), (48, 24))
    target = jax.random.normal(jax.random.key(1), (8, 5, 24))
    tokens = jax.random.randint(jax.random.key(2), (8, 5), 0, 48)

    def both(lookup):
      def score(table):
        found = lookup(table, tokens)
        return (found * target).sum(), found
      return jax.grad(score, has_aux=True)

    whole = jax.jit(both(lambda table, at: table[at]))(table)
    for sizes in ((1, 2, 4), (2, 2, 2), (8, 1, 1), (1, 8, 1), (1, 1, 8)):
      mesh = mesh_lib.make(*sizes)
      rows = mesh_lib.rows(mesh)
      place = mesh_lib.shardings(mesh, ("vocab", "embed"), table)
      program = jax.jit(both(lambda *x: split.lookup(rows, *x)))
      program = program.lower(jax.device_put(table, place)).compile()
      many = program(jax.device_put(table, place))
      for a, b in zip(whole, many, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
      if sizes[0] == 1:
        shapes = [
          shape.dims
          for one in hlo.Program(program.as_text()).instructions.values()
          for shape in one.shapes
        ]
        assert (48, 24) not in shapes, sizes
  """)


def test_the_logits_of_a_split_vocabulary_are_never_gathered(run_in_subprocess):
  """Neither drawing nor learning moves more of them than candidates."""
  run_in_subprocess("""
    import jax
    import jax.numpy as jnp
    from agrpo_jax.plan import hlo
    from agrpo_jax.models import base
    from agrpo_jax.models import transformer
    from agrpo_jax.parallel import mesh as mesh_lib
    from agrpo_jax.samplers import noise
    from agrpo_jax import learner as learner_lib
    from agrpo_jax.objectives import agrpo
    from agrpo_jax.objectives import mc_steps
    from agrpo_jax.parallel import split
    from agrpo_jax.samplers import rollout
    from agrpo_jax.samplers import sampling as sampling_lib
    from agrpo_jax import types

    vocab_size = 4096
    config = base.Shape(
      model_type="llada", vocab_size=vocab_size, embedding_size=vocab_size,
      num_layers=1, width=40, num_heads=4, num_kv_heads=4, mlp_width=64,
      rope_theta=1e4, norm_eps=1e-5,
      qkv_bias=False, tied_head=False, max_length=64, mask_id=39, eos_id=38,
      pad_id=38,
    )
    mesh = mesh_lib.make(1, 2, 4)
    rows = mesh_lib.rows(mesh)
    params = transformer.abstract_params(config)
    params = jax.tree.map(
      lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
      params,
      mesh_lib.shardings(mesh, transformer.logical_axes(config), params),
    )

    def array(*shape, dtype=jnp.int32):
      return jax.ShapeDtypeStruct(shape, dtype, sharding=rows)

    def bind(params, lora):
      return transformer.bind(
        config, params, lora, rows=rows, top_k=split.top_k_of(mesh)
      )

    def sample(params, tokens, length, row_id, sampling):
      keys = noise.row_keys(jax.random.key(0), row_id)
      return rollout.sample_rollout(
        bind(params, None), types.Prompts(tokens, length, keys), sampling
      )

    def gradient(params, drawn, step, weight, sampling):
      objective = agrpo.Agrpo(num_mc_steps=1)
      learner = learner_lib.Learner(
        bind=bind, optimizer=None, sampling=sampling, objective=objective,
        group_size=2, microbatch=8,
        shard_rows=lambda x: jax.lax.with_sharding_constraint(x, rows),
      )
      steps = mc_steps.Drawn(step=step[:, None], weight=weight[:, None])
      visits = agrpo.visits_of(drawn, steps, sampling, objective)
      state = types.TrainState(jnp.int32(0), params, None, ())
      return learner.gradient(state, drawn, weight, visits)[0]

    # What may travel: weights, which have the width or its half, which fsdp
    # leaves; candidates; and of top-p alone a bit per token.
    def check(name, lowered):
      program = hlo.Program(lowered.compile().as_text())
      for one in program.instructions.values():
        if one.opcode.startswith(("all-", "collective", "reduce-scatter")):
          for shape in one.shapes:
            is_weight = {40, 20} & {*shape.dims} and (
              max(shape.dims) <= vocab_size // 4
            )
            is_small = max(shape.dims, default=1) <= vocab_size // 8
            assert is_weight or is_small, (name, one.opcode, str(shape))

    for name, settings in {
      "released": dict(unmask_rule="random", top_k=20, top_p=0.9),
      "nucleus": dict(unmask_rule="random", top_p=0.9),
      "whole": dict(unmask_rule="entropy"),
      "order": dict(unmask_rule="confidence", top_k=20, confidence="model"),
    }.items():
      settings = dict(temperature=1.0) | settings
      sampling = sampling_lib.Sampling(
        mask_id=39, eos_id=38, completion_length=16, block_length=8,
        num_denoise_steps=8, **settings,
      )
      arguments = params, array(8, 12), array(8), array(8, 2, dtype=jnp.uint32)
      draw = jax.jit(sample, static_argnums=4, out_shardings=rows)
      check(name, draw.lower(*arguments, sampling))
      drawn = jax.eval_shape(draw, *arguments, sampling)
      drawn = jax.tree.map(lambda x: array(*x.shape, dtype=x.dtype), drawn)
      learn = jax.jit(gradient, static_argnums=4)
      weight = array(8, dtype=jnp.float32)
      check(name, learn.lower(params, drawn, array(8), weight, sampling))
  """)
