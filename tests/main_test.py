"""Mistakes of a user: one message that says what to change, exit code 2."""

import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

from agrpo_jax import config as config_lib
from agrpo_jax import data
from agrpo_jax import errors
from agrpo_jax import settings
from agrpo_jax import train
from agrpo_jax.port import model_folder
from fixtures import commands
from fixtures import recordings

ROOT = pathlib.Path(__file__).parents[1]
DATA = ROOT / "tests" / "testdata" / "gsm8k"
MODEL = recordings.GOLDEN / "ckpt" / "tiny_mha"


def command(*flags: str, module: str = "main") -> subprocess.CompletedProcess:
  return commands.run("-m", f"agrpo_jax.{module}", *flags)


def assert_told(done: subprocess.CompletedProcess, *parts: str) -> None:
  assert done.returncode == 2, done.stderr
  assert "Traceback" not in done.stderr
  for part in parts:
    assert part in done.stderr


def test_several_mistakes_are_reported_at_once_before_anything_is_loaded():
  done = command(
    "--config=gsm8k",
    "--config.model.path=nowhere/at/all",
    "--config.rollout.block_length=1000",
    "--config.rollout.group_size=1",
    "--config.rollout.unmask_rule=low_confidence",
    "--config.objective.updates_per_batch=7",
    "--config.optimizer.learning_rate=-1.0",
  )
  assert_told(
    done,
    "block_length=1000",
    "rollout.group_size=1",
    "low_confidence",
    "confidence, entropy",  # the known ones
    "updates_per_batch=7",
    "learning_rate=-1.0",
  )
  assert "nowhere" not in done.stderr


@pytest.mark.parametrize(
  "flags,part",
  [
    ([], "--config=..."),
    (["--config=configs/nothing.py"], "configs/nothing.py"),
    (["--config", "gsm9k:debug"], "Did you mean gsm8k?"),
    (
      ["--config=configs/gsm8k.py", "--config.rollout.temprature=1"],
      "config.rollout has no key 'temprature'; did you mean temperature?",
    ),
    (["--config=configs/gsm8k.py", "--config.rollout.top_k=many"], "many"),
    (["--config=configs/gsm8k.py:huge"], "huge"),
    (["--config", "gsm8k:huge"], "huge"),
    (["--config=configs/gsm8k.py", "stray"], "stray"),
    (["--config=configs/gsm8k.py", "--unknown=1"], "unknown"),
  ],
)
def test_wrong_flags(flags, part):
  assert_told(command(*flags), part)


def test_a_run_that_cannot_start_says_why(tmp_path):
  """One command to its end, for the exit code; the rest below in-process."""
  done = command(
    "--config=configs/gsm8k.py:debug",
    f"--config.model.path={MODEL}",
    f"--config.data.path={DATA}",
    f"--config.workdir={tmp_path / 'run'}",
  )
  assert_told(done, "tokenizer", "model.tokenizer")


def debug_config(tmp_path, **changes) -> config_lib.ConfigDict:
  c = recordings.config("gsm8k", "debug")
  c.model.path = str(MODEL)
  c.model.tokenizer = "bytes"
  c.data.path = str(DATA)
  c.workdir = str(tmp_path / "run")
  c.update_from_flattened_dict(changes)
  return c


def refused(c: config_lib.ConfigDict) -> str:
  with pytest.raises(errors.UserError) as error:
    train.train(settings.rl(c))
  return str(error.value)


@pytest.mark.parametrize(
  "changes,parts",
  [
    ({"rollout.completion_length": 25}, ["completion_length=25", "12"]),
    ({"rollout.num_denoise_steps": 7}, ["num_denoise_steps=7", "2 blocks"]),
    ({"rollout.num_denoise_steps": 26}, ["num_denoise_steps", "13 steps"]),
    ({"rollout.top_k": 1}, ["top_k=1", "without chance"]),
    ({"rollout.temperature": 1e-38}, ["temperature=1e-38", "0.001"]),
    ({"rollout.temperature": 0.0}, ["temperature=0.0"]),
    ({"rollout.group_size": 1}, ["group_size=1", "at least 2"]),
    ({"rollout.batch_size": 3}, ["batch_size=3", "4"]),
    ({"task.name": "chess"}, ["chess", "gsm8k", "sudoku"]),
    ({"task.name": ""}, ["task.name", "task.path"]),
    ({"model.path": ""}, ["model.path"]),
    ({"model.path": "./no_such_folder"}, ["no_such_folder"]),
    ({"model.dtype": "float16"}, ["float16", "bfloat16"]),
    ({"data.path": "/no/such/file"}, ["/no/such/file"]),
    ({"data.max_prompt_length": 20}, ["no example is left", "20"]),
    ({"data.max_prompt_length": 5000}, ["5000", "4096"]),
    ({"rollout.num_prompts": 64, "rollout.batch_size": 128}, ["64", "12"]),
    ({"lora.targets": ("q", "router")}, ["router", "attn_out"]),
    ({"mesh.tensor": 3}, ["mesh.tensor=3"]),
    ({"objective.step_rule": "best"}, ["best", "uniform", "entropy"]),
  ],
)
def test_settings_that_cannot_work(tmp_path, changes, parts):
  message = refused(debug_config(tmp_path, **changes))
  for part in parts:
    assert part in message


def test_work_directory_that_cannot_be_made(tmp_path):
  (tmp_path / "file").write_text("in the way")
  c = debug_config(tmp_path, workdir=str(tmp_path / "file" / "run"))
  assert "Cannot write to the work directory" in refused(c)


def test_work_directory_in_use(tmp_path):
  c = debug_config(tmp_path)
  script = (
    "import sys, time\n"
    "from agrpo_jax.runs import workdir\n"
    f"with workdir.claim({c.workdir!r}):\n"
    "  print('mine', flush=True)\n"
    "  time.sleep(60)\n"
  )
  other = subprocess.Popen(
    [sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=ROOT
  )
  try:
    assert other.stdout.readline() == b"mine\n"
    assert f"in use by process {other.pid}" in refused(c)
  finally:
    other.kill()
    other.wait()


@pytest.mark.parametrize(
  "text,parts",
  [
    ("", ["train.jsonl"]),
    ('{"question": "1+1?", "answer": "#### 2"}\n{"question":', ["line 2"]),
    ('{"question": "1+1?", "reply": "2"}\n', ["answer"]),
  ],
)
def test_broken_data_files(tmp_path, text, parts):
  (tmp_path / "train.jsonl").write_text(text)
  message = refused(debug_config(tmp_path, **{"data.path": str(tmp_path)}))
  for part in parts:
    assert part in message


def broken_model(tmp_path, change) -> pathlib.Path:
  folder = tmp_path / "model"
  shutil.copytree(MODEL, folder)
  change(folder)
  return folder


def truncate(folder):
  file = folder / "model.safetensors"
  file.write_bytes(file.read_bytes()[:1000])


def remove(folder):
  (folder / "model.safetensors").unlink()


def edit(**arrays):
  def change(folder):
    file = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    tensors.update(arrays)
    safetensors.numpy.save_file(tensors, file)

  return change


def other_config(folder):
  file = folder / "config.json"
  raw = json.loads(file.read_text())
  raw.update(alibi=True, residual_dropout=0.1)
  file.write_text(json.dumps(raw))


NORM = "model.transformer.ln_f.weight"


@pytest.mark.parametrize(
  "change,parts",
  [
    (truncate, ["model.safetensors"]),
    (remove, ["safetensors"]),
    (edit(**{NORM: np.zeros(7, np.float32)}), [NORM, "7", "64"]),
    (edit(**{NORM: np.full(64, np.nan, np.float32)}), [NORM]),
    (other_config, ["alibi", "residual_dropout"]),
  ],
)
def test_broken_checkpoints(tmp_path, change, parts):
  folder = broken_model(tmp_path, change)
  message = refused(debug_config(tmp_path, **{"model.path": str(folder)}))
  for part in parts:
    assert part in message


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
  c = debug_config(tmp_path)
  train.train(settings.rl(c))
  folder = broken_model(tmp_path, edit(**{NORM: np.full(64, 0.5, np.float32)}))
  c.model.path = str(folder)
  c.accept_changed_config = True
  message = refused(c)
  assert "base model" in message


def test_long_prompts_are_skipped_and_counted(tmp_path):
  c = debug_config(tmp_path, **{"data.max_prompt_length": 600})
  s = settings.rl(c)
  shape = model_folder.load_shape(s.model.path)
  tokenizer = model_folder.load_tokenizer("bytes", shape)
  dataset = data.load_dataset(s.task, s.data, tokenizer, "train")
  assert dataset.num_skipped > 0
  assert dataset.num_skipped + len(dataset) == 12
  assert dataset.longest <= 600
