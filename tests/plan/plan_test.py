"""Plans: topologies, costs of compiled programs, the search, the command."""

import math
import pathlib
from importlib import metadata

import jax
import jax.numpy as jnp
import pytest

from agrpo_jax import errors
from agrpo_jax import settings
from agrpo_jax.models import base
from agrpo_jax.models import lora
from agrpo_jax.models import transformer
from agrpo_jax.parallel import mesh as mesh_lib
from agrpo_jax.plan import __main__ as plan
from agrpo_jax.plan import chips
from agrpo_jax.plan import cost as cost_lib
from agrpo_jax.plan import hlo
from agrpo_jax.plan import programs
from agrpo_jax.port import model as model_lib
from agrpo_jax.port import model_folder
from agrpo_jax.samplers import host
from agrpo_jax.samplers import sampling as sampling_lib
from configs import gsm8k
from fixtures import commands
from fixtures import sudoku

ROOT = pathlib.Path(__file__).parents[2]

# One device's program: an outer loop that ends when its data say so; in it a
# loop over three layers, each with a product, a gathered weight, a slice of a
# stack, and a ring of four in steps of two. One all-gather runs beside two
# fusions and so is written twice.
MODULE = """\
HloModule jit_sample, is_scheduled=true

%beside.1 (p0: bf16[4,8], p1: bf16[16,8]) -> (f32[2,8], bf16[16,8]) {
  %p0 = bf16[4,8]{1,0} parameter(0)
  %p1 = bf16[16,8]{1,0} parameter(1)
  %mul.1 = f32[2,8]{1,0} multiply(%p0, %p0)
  %all-gather.1 = bf16[16,8]{1,0} all-gather(%p0), channel_id=7, \
replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, dimensions={0}
  ROOT %tuple.1 = (f32[2,8]{1,0}, bf16[16,8]{1,0}) tuple(%mul.1, %p1)
}

%beside.2 (q0: bf16[4,8]) -> bf16[16,8] {
  %q0 = bf16[4,8]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[16,8]{1,0} all-gather(%q0), channel_id=7, \
replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, dimensions={0}
}

%sliced (s0: f32[3,8,8], s1: s32[]) -> f32[8,8] {
  %s0 = f32[3,8,8]{2,1,0} parameter(0)
  %s1 = s32[] parameter(1)
  %slice.1 = f32[1,8,8]{2,1,0} dynamic-slice(%s0, %s1), \
dynamic_slice_sizes={1,8,8}
  ROOT %bitcast.1 = f32[8,8]{1,0} bitcast(%slice.1)
}

%ring_condition (r: (u32[], bf16[4,8])) -> pred[] {
  %r = (u32[], bf16[4,8]{1,0}) parameter(0)
  %r0 = u32[] get-tuple-element(%r), index=0
  %four = u32[] constant(4)
  ROOT %less.1 = pred[] compare(%r0, %four), direction=LT
}

%ring_body (rb: (u32[], bf16[4,8])) -> (u32[], bf16[4,8]) {
  %rb = (u32[], bf16[4,8]{1,0}) parameter(0)
  %rb0 = u32[] get-tuple-element(%rb), index=0
  %rb1 = bf16[4,8]{1,0:T(8,128)S(1)} get-tuple-element(%rb), index=1
  %two = u32[] constant(2)
  %rb2 = u32[] add(%rb0, %two)
  %collective-permute.1 = bf16[4,8]{1,0:T(8,128)S(1)} \
collective-permute(%rb1), channel_id=9, source_target_pairs={{0,1},{1,0}}
  ROOT %rb3 = (u32[], bf16[4,8]{1,0}) tuple(%rb2, %collective-permute.1)
}

%layer_condition (lc: (s32[], f32[2,8], f32[3,8,8])) -> pred[] {
  %lc = (s32[], f32[2,8]{1,0}, f32[3,8,8]{2,1,0}) parameter(0)
  %lc0 = s32[] get-tuple-element(%lc), index=0
  %three = s32[] constant(3)
  ROOT %less.2 = pred[] compare(%lc0, %three), direction=LT
}

%layer_body (lb: (s32[], f32[2,8], f32[3,8,8])) -> (s32[], f32[2,8], \
f32[3,8,8]) {
  %lb = (s32[], f32[2,8]{1,0}, f32[3,8,8]{2,1,0}) parameter(0)
  %lb0 = s32[] get-tuple-element(%lb), index=0
  %lb1 = f32[2,8]{1,0} get-tuple-element(%lb), index=1
  %lb2 = f32[3,8,8]{2,1,0} get-tuple-element(%lb), index=2
  %weight = f32[8,8]{1,0} fusion(%lb2, %lb0), kind=kLoop, calls=%sliced
  %dot.1 = f32[2,8]{1,0} dot(%lb1, %weight), lhs_contracting_dims={1}, \
rhs_contracting_dims={0}, metadata={op_name="jit(sample)/while/body/LLaDA/\
layers/while/body/mlp/gate/dot_general"}
  %ring = (u32[], bf16[4,8]{1,0}) tuple(%lb0, %lb1)
  %while.3 = (u32[], bf16[4,8]{1,0}) while(%ring), condition=%ring_condition, \
body=%ring_body
  %one = s32[] constant(1)
  %lb3 = s32[] add(%lb0, %one)
  ROOT %lb4 = (s32[], f32[2,8]{1,0}, f32[3,8,8]{2,1,0}) tuple(%lb3, %dot.1, \
%lb2)
}

%outer_condition (oc: (s32[], pred[])) -> pred[] {
  %oc = (s32[], pred[]) parameter(0)
  ROOT %oc1 = pred[] get-tuple-element(%oc), index=1
}

%outer_body (ob: (s32[], pred[])) -> (s32[], pred[]) {
  %ob = (s32[], pred[]) parameter(0)
  %gather = bf16[4,8]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %state = (s32[], f32[2,8]{1,0}, f32[3,8,8]{2,1,0}) tuple(%ob, %ob, %ob)
  %while.2 = (s32[], f32[2,8]{1,0}, f32[3,8,8]{2,1,0}) while(%state), \
condition=%layer_condition, body=%layer_body
  %part.1 = (f32[2,8]{1,0}, bf16[16,8]{1,0}) fusion(%gather, %gather), \
kind=kOutput, calls=%beside.1
  %part.2 = bf16[16,8]{1,0} fusion(%gather), kind=kOutput, calls=%beside.2
  ROOT %ob1 = (s32[], pred[]) tuple(%ob, %ob)
}

ENTRY %main (a: s32[]) -> (s32[], pred[]) {
  %a = s32[] parameter(0)
  %start = (s32[], pred[]) tuple(%a, %a)
  %all-reduce.1 = f32[10]{0} all-reduce(%a), channel_id=1, \
replica_groups=[2,4]<=[8], to_apply=%outer_condition
  ROOT %while.1 = (s32[], pred[]) while(%start), condition=%outer_condition, \
body=%outer_body
}
"""


def test_loops_multiply_what_is_in_them():
  cost = cost_lib.of(hlo.Program(MODULE), trips=[5])
  assert cost.flops == 5 * 3 * (2 * 2 * 8 * 8)
  counts = {one.kind: n for one, n in cost.collectives.items()}
  assert counts == {
    "all-reduce": 1,
    "all-gather": 5,  # not 10: one channel
    "collective-permute": 5 * 3 * 2,  # 4 shards in steps of 2
  }


def test_a_loop_in_a_loop_has_trips_of_its_own():
  """The second of two loops that do not say how often they run."""
  text = MODULE.replace(
    "%three = s32[] constant(3)",
    "%three = s32[] get-tuple-element(%lc), index=0",
  )
  for trips, times in (([5, 7], 5 * 7), ([5], 5)):
    cost = cost_lib.of(hlo.Program(text), trips=trips)
    assert cost.flops == times * (2 * 2 * 8 * 8)


def test_branches_count_as_often_as_told():
  def step(carry):
    n, x_DxD, kernel = carry
    with jax.named_scope("seldom"):
      x_DxD = jax.lax.cond(n == 0, lambda: x_DxD + 1, lambda: x_DxD @ kernel)
    return n + 1, x_DxD, kernel

  def run(x_DxD):
    return jax.lax.while_loop(
      lambda carry: (carry[0] < 5) & (carry[1].sum() > 0), step, (0, *x_DxD)
    )

  text = jax.jit(run).lower(jnp.ones((2, 8, 8))).compile().as_text()
  for shares, times in ((None, 2), ({"seldom": [3 / 4, 1 / 4]}, 3)):
    cost = cost_lib.of(hlo.Program(text), [4], shares)
    assert cost.flops == times * (2 * 8 * 8 * 8)


def test_memories_are_opened_as_often_as_they_are():
  """Blocks of 12 positions and four steps, three of them; see `host.Draw`."""
  for refresh, opened, steps in (
    (0, 3, 4),
    (2, 6, 2),
    (3, 6, 2),  # after three, and at the end of a block
    (100, 3, 4),
  ):
    sampling = sampling_lib.Sampling(
      mask_id=1,
      eos_id=0,
      completion_length=36,
      block_length=12,
      num_denoise_steps=12,
      cache="dual",
      cache_refresh=refresh,
    )
    draw = host.Draw(sampling, guidance=0.0, batch_size=8, num_slots=0)
    assert programs._rollout_trips(draw) == [opened, steps]
    assert programs._window_shares(sampling) == {
      "kept_or_windows": [1 - opened / 12, opened / 12]
    }


def test_bytes_on_the_wire():
  cost = cost_lib.of(hlo.Program(MODULE), trips=[1])
  wire = {one.kind: one.wire_bytes for one in cost.collectives}
  assert wire == {
    "all-reduce": 40 * 2 * 3 / 4,
    "all-gather": 16 * 8 * 2 * 3 / 4,
    "collective-permute": 4 * 8 * 2,
  }
  assert cost.wire_bytes == 60 + 192 + 3 * 2 * 64
  groups = {one.kind: one.group for one in cost.collectives}
  assert (groups["all-reduce"], groups["all-gather"]) == (4, 4)


def test_a_reduce_scatter_in_either_form():
  """libtpu writes it as an all-reduce in a fusion that keeps a slice."""
  program = hlo.Program("""\
HloModule jit_update

%all-reduce-scatter.1 (p: f32[32,8]) -> f32[8,8] {
  %p = f32[32,8]{1,0} parameter(0)
  %all-reduce.1 = f32[32,8]{1,0} all-reduce(%p), channel_id=1, \
replica_groups={{0,1,2,3}}
  %zero = s32[] constant(0)
  ROOT %slice.1 = f32[8,8]{1,0} dynamic-slice(%all-reduce.1, %zero, %zero), \
dynamic_slice_sizes={8,8}
}

ENTRY %main (a: f32[32,8]) -> f32[8,8] {
  %a = f32[32,8]{1,0} parameter(0)
  %reduce-scatter.1 = f32[8,8]{1,0} reduce-scatter(%a), channel_id=2, \
replica_groups={{0,1,2,3}}
  ROOT %fusion.1 = f32[8,8]{1,0} fusion(%a), kind=kCustom, \
calls=%all-reduce-scatter.1, metadata={op_name="jit(update)/down/dot_general"}
}
""")
  found = cost_lib.of(program, trips=[1]).collectives
  assert {(one.kind, one.wire_bytes) for one in found} == {
    ("reduce-scatter", 32 * 8 * 4 * 3 / 4)
  }
  assert {one.source for one in found} == {"", "jit(update)/down/dot_general"}


def test_memory_traffic_counts_slices_and_leaves_out_what_passes_by():
  cost = cost_lib.of(hlo.Program(MODULE), trips=[1])
  weight = 64 * 4 + 4 + 64 * 4  # a slice, the index, the result
  dot = 2 * 8 * 4 + 64 * 4 + 2 * 8 * 4
  adds = 3 * 4  # of two scalars
  layer = weight + dot + adds + 2 * adds  # the permuted shards are on the chip
  beside = 4 * 8 * 2 + 2 * 8 * 4
  # The operand and result of the all-gather are traffic of the network.
  assert cost.bytes == 3 * layer + beside + (4 + 40)
  assert (256, "f32[8,8]", "") in cost.buffers


def test_a_slice_of_a_stack_seen_in_other_tiles_is_a_slice():
  """As libtpu takes a layer of int8 for a product: nothing is copied."""
  text = """\
HloModule jit_sample

%view (v0: s8[3,8,8]) -> s8[3,8,8] {
  %v0 = s8[3,8,8]{2,1,0:T(32,128)(4,1)} parameter(0)
  ROOT %copy.1 = s8[3,8,8]{2,1,0:T(8,128)(4,1)} copy(%v0)
}

%sliced (s0: s8[3,8,8], s1: s32[]) -> s8[1,8,8] {
  %s0 = s8[3,8,8]{2,1,0:T(32,128)(4,1)} parameter(0)
  %s1 = s32[] parameter(1)
  %seen = s8[3,8,8]{2,1,0:T(8,128)(4,1)} fusion(%s0), kind=kLoop, \
output_to_operand_aliasing={{}: (0, {})}, calls=%view
  ROOT %slice.1 = s8[1,8,8]{2,1,0} dynamic-slice(%seen, %s1), \
dynamic_slice_sizes={1,8,8}
}

ENTRY %main (a: s8[3,8,8], i: s32[]) -> s8[1,8,8] {
  %a = s8[3,8,8]{2,1,0:T(32,128)(4,1)} parameter(0)
  %i = s32[] parameter(1)
  ROOT %layer = s8[1,8,8]{2,1,0} fusion(%a, %i), kind=kLoop, calls=%sliced
}
"""
  assert cost_lib.of(hlo.Program(text), trips=[1]).bytes == 64 + 4 + 64
  # What is copied is read whole.
  copied = text.replace("output_to_operand_aliasing={{}: (0, {})}, ", "")
  assert cost_lib.of(hlo.Program(copied), trips=[1]).bytes == 192 + 4 + 64


def test_what_is_moved_on_to_the_chip_is_read_once():
  """Beside other work; slices of an array that stays where it is."""
  program = hlo.Program("""\
HloModule jit_sample

ENTRY %main (a: s8[64]) -> s8[8] {
  %a = s8[64]{0} parameter(0)
  %copy-start.1 = (s8[64]{0:T(8)S(1)}, s8[64]{0}, u32[]{:S(2)}) copy-start(%a)
  %copy-done.1 = s8[64]{0:T(8)S(1)} copy-done(%copy-start.1)
  %copy-start.2 = (s8[64]{0}, s8[64]{0:T(8)S(1)}, u32[]{:S(2)}) \
copy-start(%copy-done.1)
  %slice-start.1 = ((s8[64]{0}), s8[8]{0:T(8)S(1)}, s32[]{:S(2)}) \
slice-start(%a), slice={[0:8]}
  ROOT %slice-done.1 = s8[8]{0:T(8)S(1)} slice-done(%slice-start.1)
}
""")
  assert cost_lib.of(program, trips=[1]).bytes == 64 + 64 + 8


# As libtpu writes them, with two heads of keys for four of queries, two rows.
KERNELS = """\
HloModule jit_update

ENTRY %main (q: bf16[2,4,128,64], k: bf16[2,2,256,64], m: s8[1,1,1]) -> bf16[] {
  %q = bf16[2,4,128,64]{3,2,1,0} parameter(0)
  %k = bf16[2,2,256,64]{3,2,1,0} parameter(1)
  %m = s8[1,1,1]{2,1,0} parameter(2)
  %splash_mha_fwd_segmented.1 = (f32[2,128,128]{2,1,0}, \
bf16[2,4,128,64]{3,2,1,0}) custom-call(%m, %q, %k, %k), \
custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 128}"
}}, metadata={op_name="jit(update)/splash_mha_fwd_segmented/pallas_call"}
  ROOT %splash_mha_dkv_segmented.1 = (DQbf16[2,2,256,64]{3,2,1,0}, \
bf16[2,2,256,64]{3,2,1,0}) custom-call(%m, %q, %k, %k, /*index=4*/%q), \
custom_call_target="tpu_custom_call", \
metadata={op_name="jit(update)/splash_mha_dkv_segmented/pallas_call"}
}
"""


@pytest.mark.parametrize("is_fused, products", [(False, 4), (True, 5)])
def test_kernels_of_splash_attention(is_fused, products):
  dq = "bf16[2,1,4,128,64]{4,3,2,1,0}, " if is_fused else ""
  cost = cost_lib.of(hlo.Program(KERNELS.replace("DQ", dq)), trips=[1])
  assert cost.flops == (2 + products) * 2 * (2 * 4 * 128) * 256 * 64
  q, k, scratch = 2 * 4 * 128 * 64 * 2, 2 * 2 * 256 * 64 * 2, 2 * 128 * 128 * 4
  forward = 1 + q + 2 * k + scratch + q
  backward = 1 + 2 * q + 2 * k + 2 * k + is_fused * q
  assert cost.bytes == forward + backward


def test_a_kernel_of_unknown_cost_is_no_free_one():
  text = KERNELS.replace("DQ", "").replace("splash_mha", "other")
  with pytest.raises(ValueError, match="a kernel of unknown cost"):
    cost_lib.of(hlo.Program(text), trips=[1])


def test_the_source_of_an_instruction_is_its_place_in_our_code():
  program = hlo.Program(MODULE)
  assert program.instructions["dot.1"].source == "layers/mlp/gate/dot_general"


@pytest.mark.parametrize(
  "left, right, result, attributes, flops",
  [
    # A matrix product.
    (
      *((2, 640, 4096), (4096, 64, 1), (2, 640, 64)),
      "window={size=1}, dim_labels=0bf_io0->0bf",
      2 * 2 * 640 * 4096 * 64,
    ),
    # A product for each of 2 x 32 pairs, written as dilated windows.
    (
      *((2, 32, 64, 128), (2, 32, 64, 128), (2, 32, 64, 64)),
      "window={size=2x32 stride=1x31 lhs_dilate=2x32}, "
      "dim_labels=01bf_01oi->01bf",
      2 * 2 * 32 * 64 * 64 * 128,
    ),
    (
      *((2, 32, 64, 64), (2, 32, 128, 64), (2, 32, 64, 128)),
      "window={size=2x32 stride=2x32 pad=1_1x31_31 lhs_dilate=1x31 "
      "rhs_reversal=1x1}, dim_labels=01bf_01oi->01bf",
      2 * 2 * 32 * 64 * 64 * 128,
    ),
  ],
)
def test_products_that_a_tpu_writes_as_convolutions(
  left, right, result, attributes, flops
):
  assert cost_lib._convolution_flops(left, right, result, attributes) == flops


def test_topologies():
  slice_ = chips.parse("v5e:4x8")
  assert (slice_.kind, slice_.shape, slice_.is_tpu) == ("v5e", "4x8", True)
  assert chips.parse("cpu:8").chip is None
  assert chips.parse("h100:8").chip.flops == 989e12
  assert not chips.parse("h100:8").is_tpu


@pytest.mark.parametrize(
  "name",
  ["v5e", "v5e:", "v5e:2x2x1", "v5p:2x2", "v5e:4xx", "v9:2x2", "cpu:0", "cpu"],
)
def test_an_unknown_topology_is_told_the_known_ones(name):
  with pytest.raises(errors.UserError, match=f"--topology={name} ") as raised:
    chips.parse(name)
  for known in (*chips.CHIPS, "4x8", "cpu:N", "2x2x1"):
    assert known in str(raised.value)


def test_the_table_of_chips():
  # GiB that the compiler allows, TFLOP/s of a whole chip.
  table = {
    "v4": (32, 275),
    "v5e": (16, 197),
    "v5p": (96, 459),
    "v6e": (32, 918),
  }
  for kind, (gib, tflops) in table.items():
    chip = chips.CHIPS[kind]
    assert gib - 2 < chip.hbm_bytes / 2**30 < gib
    assert chip.flops == tflops * 1e12
  for kind, chip in chips.CHIPS.items():
    # FLOPs per byte at which a product stops being bound by memory.
    least = 100 if kind != "t4" else 20  # float32
    assert least < chip.flops / chip.hbm_bandwidth < 600
    assert chip.wire_bandwidth < chip.hbm_bandwidth


@pytest.mark.parametrize(
  "path, millions",
  [
    ("GSAI-ML/LLaDA-8B-Instruct", 8016),
    ("dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1", 596),
    ("dllm-hub/Qwen2.5-Coder-0.5B-Instruct-diffusion-mdlm-v0.1", 494),
    ("Dream-org/Dream-v0-Instruct-7B", 7616),
  ],
)
def test_known_shapes_have_as_many_parameters_as_published(path, millions):
  source = base.Source(path, remat="full", unroll=2)
  shape = programs.read_shape(source)
  assert (shape.dtype, shape.remat, shape.unroll) == ("bfloat16", "full", 2)
  params = transformer.abstract_params(shape)
  count = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
  assert round(count / 1e6) == millions


def test_a_slice_without_libtpu_names_the_extra(monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(errors.UserError, match=r"agrpo_jax\[tpu\]"):
    chips.devices(chips.parse("v5e:4x8"))


@pytest.mark.parametrize("version", ["0.0.1", "99.0"])
def test_a_libtpu_of_another_jax_is_told_which_one_belongs(
  tmp_path, monkeypatch, version
):
  """jax's own metadata says so: libtpu==0.0.42.* for jax 0.10.2, say."""
  (tmp_path / "libtpu").mkdir()
  (tmp_path / "libtpu" / "__init__.py").touch()
  package = tmp_path / f"libtpu-{version}.dist-info"
  package.mkdir()
  (package / "METADATA").write_text(
    f"Metadata-Version: 2.1\nName: libtpu\nVersion: {version}\n"
  )
  monkeypatch.syspath_prepend(tmp_path)
  (line,) = (r for r in metadata.requires("jax") if r.startswith("libtpu"))
  wanted = line.split("==")[1].split(";")[0].strip()
  with pytest.raises(errors.UserError) as caught:
    chips.devices(chips.parse("v5e:4x8"))
  message = str(caught.value)
  assert f"libtpu {version} is installed" in message
  assert f"jax {jax.__version__} goes with libtpu {wanted}:" in message
  assert f"pip install 'jax[tpu]=={jax.__version__}'" in message


def test_llada_has_its_eight_billion_parameters():
  shape = programs.read_shape(settings.rl(gsm8k.get_config()).model)
  assert lora.count(transformer.abstract_params(shape)) == 8_015_581_184
  assert shape.dtype == "bfloat16"


def test_llada_in_int8_by_hand():
  """Kernels of the layers in a byte each; embedding and head in two."""
  s = settings.rl(gsm8k.get_config("rtx4090"))
  model = model_lib.describe_model(
    programs.read_shape(s.model), s.lora, s.mesh.make(), None, s.model.quantize
  )
  kernels = 32 * (4 * 4096 * 4096 + 3 * 4096 * 12288)
  scales = 32 * (4 * 4096 + 2 * 12288 + 4096)
  rest = 2 * 126464 * 4096 + 65 * 4096
  held = mesh_lib.bytes_per_device(model.params)
  assert held == kernels + 4 * scales + 2 * rest


def test_a_model_of_unknown_shape_is_refused():
  c = gsm8k.get_config()
  c.model.path = "someone/else"
  with pytest.raises(errors.UserError, match="LLaDA-8B-Instruct"):
    programs.read_shape(settings.rl(c).model)


def _program(**fields):
  cost = cost_lib.Cost(flops=197e12 * 3, bytes=0.819e12 * 2)
  fields = {"arguments": 8 * 2**30, "cost": cost, "trips": [128]} | fields
  return programs.Program("rollout", 2, **fields)


def test_what_fits():
  chip = chips.CHIPS["v5e"]
  assert _program().fits(chip)
  assert not _program(temporaries=8 * 2**30).fits(chip)
  assert not _program(resident=8 * 2**30).fits(chip)
  assert not _program(refusal="too large").fits(chip)
  assert _program(temporaries=8 * 2**30).fits(None)


def test_memory_traffic_of_cpu_code_says_nothing_about_gpus():
  assert {*_program().seconds(chips.CHIPS["v5e"])} == {
    *("compute", "network", "memory")
  }
  assert {*_program().seconds(chips.CHIPS["h100"])} == {"compute", "network"}


def test_the_run_as_a_whole():
  c = gsm8k.get_config()
  c.train.num_steps = 600
  s = settings.rl(c)
  chip = chips.CHIPS["v5e"]
  text = plan.summary(s, [_program(), _program()], chip, num_devices=32)
  # 2 programs x 2 runs x 3 s of compute; x 600 = 2 hours on 32 chips.
  assert "It fits. At the roofline 12.0 s a train step" in text
  assert "in 2.0 hours, 64 chip-hours" in text
  two_a_chip = chips.CHIPS["tpu7x"]
  text = plan.summary(s, [_program()], two_a_chip, num_devices=8)
  assert "NOT" not in text
  text = plan.summary(s, [_program(refusal="no")], chip, num_devices=32)
  assert text.strip() == "IT DOES NOT FIT."
  assert "Used 20G of 15G" in plan.describe(
    _program(refusal="Used 20G of 15G"), chip
  )


def _command(*arguments):
  done = commands.run(
    *("-m", "agrpo_jax.plan"),
    *("--config=configs/gsm8k.py:debug", "--topology=cpu:8"),
    "--config.model.path=agrpo_jax/assets/tiny-sudoku",
    *("--config.data.max_prompt_length=64", "--config.data.bucket=32"),
    *("--config.mesh.tensor=2", "--config.rollout.num_prompts=4"),
    *("--config.rollout.batch_size=8", "--config.objective.microbatch=8"),
    *arguments,
    without=("XLA_FLAGS",),
  )
  return done.returncode, done.stdout, done.stderr


def test_a_whole_plan_on_eight_virtual_devices():
  code, out, err = _command("--config.lora.rank=0")
  assert code == 0, err
  assert "8 devices as data 1, fsdp 4, tensor 2; full fine-tuning" in out
  assert "prompts of 64 tokens" in out
  # No device computes what another does: 8 rows of 64 + 24 tokens, logits at
  # 3 positions, 8 denoising steps, shared by 8 devices.
  shape = model_folder.load_shape(str(sudoku.MODEL))
  flops = 8 * transformer.forward_flops(shape, 64 + 24, 3)
  printed = float(out.split("FLOPs")[1].split()[0])
  assert printed == pytest.approx(flops, rel=0.02)
  assert "update: 1 a train step, outer loop 2 times" in out
  assert "all-gather" in out


@pytest.fixture
def optimized():
  """Programs are compiled as users compile them, not as other tests do."""
  jax.config.update("jax_disable_most_optimizations", False)
  yield
  jax.config.update("jax_disable_most_optimizations", True)


def test_stand_ins_make_no_float32_kernels_ahead_of_a_loop(optimized):
  """Of eight layers in a loop one at a time is float32, not all at once."""

  def steps(kernels, x):
    def layer(x, kernel):
      return jnp.tanh(x @ kernel.astype(jnp.float32)), None

    return jax.lax.fori_loop(
      0, 10, lambda _, x: jax.lax.scan(layer, x, kernels)[0], x
    )

  lowered = jax.jit(steps).lower(
    jax.ShapeDtypeStruct((8, 512, 512), jnp.bfloat16),
    jax.ShapeDtypeStruct((8, 512), jnp.float32),
  )
  layer = 4 * 512**2
  assert _temporaries(lowered, None) > 8 * layer
  assert _temporaries(lowered, programs._OF_STAND_INS) < 2 * layer


def _temporaries(lowered, options):
  return lowered.compile(options).memory_analysis().temp_size_in_bytes


def test_a_search_needs_an_accelerator_to_rank_by():
  code, _, err = _command("--search")
  assert code == 2
  assert "--search on --topology=cpu:8" in err


def test_a_mesh_that_does_not_divide_the_shapes():
  code, _, err = _command("--config.mesh.tensor=8", "--config.mesh.fsdp=1")
  assert code == 2
  assert "does not divide" in err
  assert "mesh.tensor=8" in err
  assert "Traceback" not in err
