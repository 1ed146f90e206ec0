"""A base in int8 through loading, training, checkpoints and export."""

import json
import pathlib
import shutil

import chex
import jax
import numpy as np
import pytest
import safetensors.numpy

from agrpo_jax import config as config_lib
from agrpo_jax import errors
from agrpo_jax import evaluate
from agrpo_jax import settings
from agrpo_jax.models import base
from agrpo_jax.models import lora as lora_lib
from agrpo_jax.models import quantized
from agrpo_jax.parallel import mesh as mesh_lib
from agrpo_jax.port import arrays
from agrpo_jax.port import export
from agrpo_jax.port import model as model_lib
from agrpo_jax.port import model_folder
from agrpo_jax.port import peft
from agrpo_jax.runs import checkpoint_read
from agrpo_jax.runs import metrics
from fixtures import recordings
from fixtures import runs

LORA = lora_lib.Lora(4, 8.0)
MHA = recordings.GOLDEN / "ckpt" / "tiny_mha"


def small(tmp_path):
  c = runs.varied(tmp_path)
  c.model.quantize = "int8"
  c.lora.rank = 4
  return c


def load(quantize, dtype="float32", path=MHA):
  source = base.Source(str(path), "", "bytes", dtype, quantize=quantize)
  mesh = mesh_lib.make()
  return model_lib.load_model(source, None, mesh, is_trained=False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loaded_are_the_quantized_values_of_the_model(dtype):
  """And the record of the base model is that of the model itself."""
  plain, int8 = load("none", dtype), load("int8", dtype)
  expected = quantized.map_tree(
    jax.jit(quantized.quantize), lambda x: x, plain.params
  )
  chex.assert_trees_all_equal(int8.params, expected)
  assert int8.base_model == plain.base_model
  described = model_lib.describe_model(
    int8.shape, LORA, int8.mesh, int8.tokenizer, "int8"
  )
  chex.assert_trees_all_equal_shapes(int8.params, described.params)


def test_a_layer_at_a_time_is_in_memory(tmp_path, monkeypatch):
  """Beside what is kept: two tensors at most, of 14 that two arrays have."""
  shape, params = recordings.random_network(
    num_layers=8, width=64, mlp_width=192, qkv_bias=False
  )
  model_folder.save(tmp_path, shape, params)
  layer = 4 * params["layers"]["up"]["kernel"][0].size
  del params
  mesh = mesh_lib.make()
  where = model_lib.describe_model(shape, LORA, mesh, None, "int8").params
  where = jax.tree.map(lambda x: x.sharding, where)
  at_rest = sum(x.nbytes for x in jax.live_arrays())
  read, seen = arrays.read_onto, []

  def watched(*args):
    array = read(*args)
    seen.append(sum(x.nbytes for x in jax.live_arrays()) - at_rest)
    return array

  monkeypatch.setattr(arrays, "read_onto", watched)
  params, _ = model_folder.load_quantized(
    str(tmp_path), dtype="float32", shardings=lambda shape: where
  )
  held = sum(x.nbytes for x in jax.tree.leaves(params))
  assert len(seen) > 50
  assert max(seen) < held + 2 * layer


def test_each_device_reads_its_part(run_in_subprocess):
  run_in_subprocess(f"""
    import chex
    import jax
    import numpy as np
    from agrpo_jax.models import base
    from agrpo_jax.parallel import mesh as mesh_lib
    from agrpo_jax.port import model as model_lib

    source = base.Source(
      "{MHA}", tokenizer="bytes", dtype="float32", quantize="int8"
    )
    one = mesh_lib.make(1, 1, 1, devices=jax.devices()[:1])
    whole = model_lib.load_model(source, None, one, is_trained=False)
    mesh = mesh_lib.make(2, 2, 2)
    split = model_lib.load_model(source, None, mesh, is_trained=False)
    up = split.params["layers"]["up"]["kernel"]
    assert up.values.sharding.spec == jax.P(None, "fsdp", "tensor")
    part = up.values.addressable_shards[0].data.shape
    assert 4 * np.prod(part) == up.values.size, part
    chex.assert_trees_all_equal(
      jax.tree.map(np.asarray, split.params),
      jax.tree.map(np.asarray, whole.params),
    )
    assert split.base_model == whole.base_model
  """)


def test_a_checkpoint_that_is_damaged_is_refused(tmp_path):
  folder = shutil.copytree(MHA, tmp_path / "model")
  tensors = safetensors.numpy.load_file(folder / "model.safetensors")
  (name, *_) = (n for n in tensors if "blocks.0.ff_proj" in n)
  tensors[name].flat[3] = np.nan
  safetensors.numpy.save_file(tensors, folder / "model.safetensors")
  with pytest.raises(errors.UserError, match=r"ff_proj.*NaN or infinite"):
    load("int8", path=folder)


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_agrpo_trains_adapters_of_it_on_policy(tmp_path, cache):
  """Sampler and scorer see the same base."""
  c = small(tmp_path)
  config_lib.use_cache(c, cache)
  c.objective.num_mc_blocks = 1
  c.train.num_steps = 2
  runs.train(c)
  log = [*metrics.read(pathlib.Path(c.workdir) / "metrics.jsonl")]
  assert any(record["grad_norm"] > 0 for record in log)
  for record in log:
    if record["grad_norm"]:
      assert record["policy_ratio/max_deviation"] < 1e-4


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """The config of a run of four train steps, all of them saved."""
  c = small(tmp_path_factory.mktemp("quantized"))
  c.train.keep = c.train.num_steps
  runs.train(c)
  return c


def test_a_killed_run_goes_on_bit_equal(run, tmp_path):
  c = run.copy_and_resolve_references()
  c.workdir = str(shutil.copytree(run.workdir, tmp_path / "run"))
  whole = runs.losses(c)
  assert [step for step, *_ in whole] == [0, 1, 2, 3]
  assert whole[1][2] > 0
  for step in checkpoint_read.Reader(c.workdir).steps():
    if step > 2:
      shutil.rmtree(pathlib.Path(c.workdir) / "checkpoints" / str(step))
  assert checkpoint_read.Reader(c.workdir).latest_step in (1, 2)
  runs.train(c)
  assert runs.losses(c) == whole


def test_another_base_model_is_refused(run, tmp_path):
  c = run.copy_and_resolve_references()
  c.workdir = str(shutil.copytree(run.workdir, tmp_path / "run"))
  c.model.path = str(shutil.copytree(MHA, tmp_path / "other"))
  file = tmp_path / "other" / "model.safetensors"
  tensors = safetensors.numpy.load_file(file)
  (name, *_) = (n for n in tensors if "blocks.0.ff_proj" in n)
  tensors[name][0, 0] *= 1.001  # too little for int8 to show
  safetensors.numpy.save_file(tensors, file)
  with pytest.raises(errors.UserError, match="trained from the base model"):
    runs.train(c)


def test_it_goes_on_without_int8_if_that_is_said(run, tmp_path):
  c = run.copy_and_resolve_references()
  c.workdir = str(shutil.copytree(run.workdir, tmp_path / "run"))
  c.model.quantize = "none"
  with pytest.raises(errors.UserError, match=r"model\.quantize: 'int8' before"):
    runs.train(c)
  c.accept_changed_config = True
  c.train.num_steps += 1
  runs.train(c)
  assert len(runs.losses(c)) == run.train.num_steps + 1


def test_commands_take_the_base_of_the_run(run):
  c = config_lib.rl()
  evaluate.use_run(c, run.workdir)
  assert c.model.quantize == "int8"
  assert settings.drawing(c).model.quantize == "int8"
  kept = evaluate.model_settings(settings.drawing(c), run.workdir)
  assert kept["model"]["quantize"] == "int8"
  # How to compute is the command's business.
  c.model.quantize = "none"
  evaluate.use_run(c, run.workdir, {"model.quantize"})
  assert c.model.quantize == "none"


def test_a_checkpoint_is_evaluated_beside_it(run):
  s = settings.rl(run)
  found = evaluate.run(s, run.workdir)
  assert len(found.records) == 5
  model = model_lib.load_trained(s.model, s.lora, s.mesh.make(), run.workdir)
  kernel = model.params["layers"]["q"]["kernel"]
  assert isinstance(kernel, quantized.Kernel)
  assert np.abs(model.lora["layers"]["q"]["b"]).max() > 0


def test_what_is_exported_are_the_original_weights_and_the_adapter(
  run, tmp_path
):
  export.merged(run.workdir, tmp_path / "merged", "float32")
  export.adapter(run.workdir, tmp_path / "adapter")
  shape, original = model_folder.load(MHA, dtype="float32")
  adapter, lora = peft.load(tmp_path / "adapter", shape)
  _, merged = model_folder.load(tmp_path / "merged")
  expected = lora_lib.merge(original, adapter, lora.scale)
  chex.assert_trees_all_equal(merged, expected)
  described = json.loads((tmp_path / "adapter" / peft.CONFIG).read_text())
  assert described["base_model_name_or_path"] == str(MHA)


def test_all_parameters_are_not_trained_in_int8(tmp_path):
  c = small(tmp_path)
  c.lora.rank = 0
  c.model.path = "nowhere"  # nothing is looked for before
  with pytest.raises(errors.UserError, match="int8' is for a frozen base"):
    runs.train(c)
  assert not pathlib.Path(c.workdir).exists()
  shape = model_folder.load_shape(str(MHA))
  with pytest.raises(errors.UserError, match="int8' is for a frozen base"):
    model_lib.describe_model(shape, None, mesh_lib.make(), None, "int8")


def test_a_model_is_evaluated_in_int8(tmp_path):
  """Nothing is trained where completions are only drawn."""
  c = small(tmp_path)
  c.lora.rank = 0
  assert len(evaluate.run(settings.rl(c)).records) == 5


def test_nor_is_what_a_run_trained_of_all_parameters(tmp_path):
  c = small(tmp_path)
  c.lora.rank, c.model.quantize = 0, "none"
  c.train.num_steps = 1
  runs.train(c)
  c.model.quantize = "int8"
  with pytest.raises(errors.UserError, match=r"agrpo_jax\.port` first"):
    evaluate.run(settings.rl(c), c.workdir)


def test_a_quantization_that_is_unknown(tmp_path):
  c = small(tmp_path)
  c.model.quantize = "nf4"
  with pytest.raises(errors.UserError, match="one of none, int8"):
    settings.rl(c)


def test_sft_writes_no_model_with_it(tmp_path):
  c = config_lib.sft()
  c.workdir, c.model.path = str(tmp_path / "run"), str(MHA)
  config_lib.use_task(c, "sudoku")
  c.model.quantize, c.lora.rank = "int8", 4
  settings.sft(c)
  c.sft.output = str(tmp_path / "out")
  with pytest.raises(errors.UserError, match=r"agrpo_jax\.port --checkpoint="):
    settings.sft(c)
