"""What a run trained, exported by the command and evaluated like any model."""

import json
import pathlib
import shutil

import chex
import jax
import jax.numpy as jnp
import pytest
import safetensors.numpy

from agrpo_jax import config as config_lib
from agrpo_jax import errors
from agrpo_jax import evaluate
from agrpo_jax import settings
from agrpo_jax import sft
from agrpo_jax.models import base as models
from agrpo_jax.models import lora as lora_lib
from agrpo_jax.port import export
from agrpo_jax.port import model as model_lib
from agrpo_jax.port import model_folder
from agrpo_jax.port import peft
from agrpo_jax.runs import checkpoint_read
from fixtures import commands
from fixtures import recordings
from fixtures import runs
from fixtures import sudoku

NUM_STEPS = 3


@pytest.fixture(scope="module", params=[0, 4], ids=["full", "lora"])
def run(request, tmp_path_factory):
  """The config of a run that trained the bundled model for a few steps."""
  c = recordings.config("sudoku_tiny")
  c.workdir = str(tmp_path_factory.mktemp("export") / "run")
  c.lora.rank = request.param
  c.lora.alpha = 16.0
  c.task.options.num_examples = 200
  c.rollout.update(num_prompts=4, group_size=8, batch_size=32)
  c.objective.microbatch = 64
  c.optimizer.update(learning_rate=3e-3, schedule="constant", warmup_steps=0)
  c.train.update(num_steps=NUM_STEPS, checkpoint_every=1, keep=NUM_STEPS)
  c.evaluate.update(every=0, num_examples=32, batch_size=32)
  c.grading.num_workers = 1
  runs.train(c)
  return c


def command(*args):
  return commands.run("-m", "agrpo_jax.port", *args)


def use_base(workdir, folder):
  """Writes another base model into the record of a run."""
  record = workdir / "config.json"
  config = json.loads(record.read_text())
  config["model"]["path"] = str(folder)
  record.write_text(json.dumps(config))


def completions(c, checkpoint=""):
  return [
    record["completion"]
    for record in evaluate.run(settings.rl(c), checkpoint).records
  ]


def trained(c, train_step=None):
  """What a checkpoint of the run holds."""
  _, params = model_folder.load(sudoku.MODEL, dtype="float32")
  tree = params
  if c.lora.rank:
    settings = lora_lib.Lora(c.lora.rank, c.lora.alpha, tuple(c.lora.targets))
    tree = lora_lib.init(settings, params, jax.random.key(0))
  reader = checkpoint_read.Reader(c.workdir)
  items, _ = reader.read({"trainable": tree}, None, train_step)
  if not c.lora.rank:
    return params, items["trainable"]
  adapter = items["trainable"]
  return params, lora_lib.merge(params, adapter, c.lora.alpha / c.lora.rank)


def test_the_exported_model_completes_as_the_run(run, tmp_path):
  done = command(
    f"--checkpoint={run.workdir}", f"--to={tmp_path}", "--dtype=float32"
  )
  assert done.returncode == 0, done.stderr
  exported = run.copy_and_resolve_references()
  exported.lora.rank = 0
  exported.model.path = str(tmp_path)
  assert completions(exported) == completions(run, run.workdir)


def test_weights_have_the_dtype_of_the_base_model(run, tmp_path):
  done = command(f"--checkpoint={run.workdir}:2", f"--to={tmp_path}")
  assert done.returncode == 0, done.stderr
  base, expected = trained(run, 2)
  shape, params = model_folder.load(tmp_path)
  assert shape == model_folder.load_shape(sudoku.MODEL)
  chex.assert_trees_all_equal(
    params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), expected)
  )
  change = jax.tree.map(lambda x, y: float(abs(x - y).max()), expected, base)
  assert max(jax.tree.leaves(change)) > 1e-3
  for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
    source = sudoku.MODEL / name
    assert (tmp_path / name).read_bytes() == source.read_bytes()
  written = (tmp_path / "README.md").read_text()
  assert f"# {pathlib.Path(run.workdir).name}\n" in written
  assert f"2 of {NUM_STEPS} train steps" in written


def test_the_adapter_is_written_for_peft(run, tmp_path):
  done = command(
    f"--checkpoint={run.workdir}", f"--to={tmp_path / 'out'}", "--adapter"
  )
  if not run.lora.rank:
    assert done.returncode == 2
    assert "trained all parameters" in done.stderr
    assert not (tmp_path / "out").exists()
    return
  assert done.returncode == 0, done.stderr
  shape = model_folder.load_shape(sudoku.MODEL)
  adapter, settings = peft.load(tmp_path / "out", shape)
  assert (settings.rank, settings.alpha) == (4, 16.0)
  base, expected = trained(run)
  merged = lora_lib.merge(base, adapter, settings.scale)
  chex.assert_trees_all_equal(merged, expected)
  described = json.loads((tmp_path / "out" / peft.CONFIG).read_text())
  assert described["base_model_name_or_path"] == str(sudoku.MODEL)
  assert (tmp_path / "out" / "tokenizer.json").exists()
  written = (tmp_path / "out" / "README.md").read_text()
  assert "library_name: peft" in written and "in this folder" in written


def test_another_base_model_is_refused(run, tmp_path):
  if not run.lora.rank:
    return  # the run's own weights are all that is needed
  other = shutil.copytree(sudoku.MODEL, tmp_path / "other")
  tensors = safetensors.numpy.load_file(other / "model.safetensors")
  tensors["model.transformer.ln_f.weight"][:] = 0.5
  safetensors.numpy.save_file(tensors, other / "model.safetensors")
  workdir = shutil.copytree(run.workdir, tmp_path / "run")
  use_base(workdir, other)
  done = command(f"--checkpoint={workdir}", f"--to={tmp_path / 'out'}")
  assert done.returncode == 2
  for path in (str(other), run.model.path):
    assert repr(path) in done.stderr


@pytest.mark.parametrize(
  "args,parts",
  [
    (["--to=x", "--from=a", "--checkpoint=b"], ["either --from="]),
    (
      ["--adapter", "--merge_adapter=c", "--dtype=float32", "--checkpoint=b"],
      ["--to=", "--merge_adapter goes with --from", "leave out --dtype"],
    ),
    (["--from=a", "--to=x", "--adapter"], ["--adapter goes with --checkpoint"]),
    (["--to=x", "--checkpoint=nowhere"], ["'nowhere' is not a work directory"]),
  ],
)
def test_flags_that_do_not_go_together(args, parts):
  done = command(*args)
  assert done.returncode == 2
  assert "Traceback" not in done.stderr
  for part in parts:
    assert part in done.stderr


@pytest.mark.parametrize("name", ["model.safetensors", "adapter_model.bin"])
def test_weights_that_are_there_are_kept(tmp_path, name):
  (tmp_path / name).write_bytes(b"precious")
  done = command("--checkpoint=nowhere", f"--to={tmp_path}")
  assert done.returncode == 2
  assert f"already holds weights ({name})" in done.stderr
  assert (tmp_path / name).read_bytes() == b"precious"


def test_a_base_model_that_is_not_there(run, tmp_path):
  workdir = shutil.copytree(run.workdir, tmp_path / "run")
  gone = tmp_path / "gone"
  use_base(workdir, gone)
  with pytest.raises(errors.UserError, match=r"model\.path in the") as caught:
    export.merged(str(workdir), tmp_path / "out")
  assert repr(str(gone)) in str(caught.value)
  # Its contents decide: another path in the record is all it takes.
  shutil.copytree(sudoku.MODEL, gone)
  assert export.merged(str(workdir), tmp_path / "out") == 247_616


def test_damaged_records_are_refused_before_weights_are_written(run, tmp_path):
  workdir = shutil.copytree(run.workdir, tmp_path / "run")
  (workdir / "environment.json").write_text("{}")
  with pytest.raises(errors.UserError, match="are not what a run writes"):
    export.merged(str(workdir), tmp_path / "out")
  assert not (tmp_path / "out").exists()


def record(*, path="x", dtype="float32", alpha=1.0) -> str:
  """What a run's config.json says of its model and adapter."""
  lora = {"rank": 2, "alpha": alpha, "targets": ["q"]}
  return json.dumps({"model": {"path": path, "dtype": dtype}, "lora": lora})


@pytest.mark.parametrize(
  "text,part",
  [
    (None, "there is no"),
    ('{"model": ', "cannot be read"),
    ("[]", "does not hold a JSON object"),
    ('{"model": {}}', "not that of a run"),
    (record(dtype="foo"), "dtype='foo'"),
    (record(alpha=10**400), "alpha=10"),
    (record(path="a" * 5000), "There is no folder"),
  ],
)
def test_a_damaged_record_is_refused(tmp_path, text, part):
  (tmp_path / "checkpoints" / "1").mkdir(parents=True)
  if text is not None:
    (tmp_path / "config.json").write_text(text)
  with pytest.raises(errors.UserError, match=part):
    export.merged(str(tmp_path), tmp_path / "out")


def test_a_run_that_an_earlier_version_began(tmp_path):
  (tmp_path / "checkpoints" / "1").mkdir(parents=True)
  config = {"model": {"path": "x", "dtype": "float32"}, "lora": {"rank": 0}}
  (tmp_path / "config.json").write_text(json.dumps(config))
  source, lora = model_lib.trained_by(str(tmp_path))
  assert source == models.Source("x", dtype="float32")
  assert lora is None


def test_a_run_from_random_parameters(tmp_path):
  """The model it started from is in its work directory."""
  file = tmp_path / "pairs.jsonl"
  file.write_text('{"prompt": "1?", "completion": "1"}\n' * 4)
  c = config_lib.sft()
  c.workdir = str(tmp_path / "run")
  c.model.network = dict(num_layers=1, width=32, num_heads=2, mlp_width=48)
  c.model.dtype = "float32"
  c.data.path = str(file)
  c.sft.update(
    completion_length=4,
    batch_size=4,
    microbatch=4,
    output=str(tmp_path / "out"),
  )
  c.optimizer.update(schedule="constant", warmup_steps=0)
  c.train.num_steps = 1
  sft.fine_tune(settings.sft(c))
  done = command(
    f"--checkpoint={c.workdir}",
    f"--to={tmp_path / 'again'}",
    "--dtype=bfloat16",
  )
  assert done.returncode == 0, done.stderr
  for name in ("model.safetensors", "tokenizer.json", "config.json"):
    again = (tmp_path / "again" / name).read_bytes()
    assert again == (tmp_path / "out" / name).read_bytes()
