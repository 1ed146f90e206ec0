"""What a start refuses, before anything is loaded, and what it leaves behind.

By the commands where their exit code and words matter, else in this process.
"""

import json
import pathlib
import shutil
import sys

import pytest

from agrpo_jax import config as config_lib
from agrpo_jax import errors
from agrpo_jax import settings
from agrpo_jax import sft
from fixtures import commands
from fixtures import recordings
from fixtures import runs


def told(*flags: str, module: str = "main") -> str:
  """The words with which a command is refused."""
  done = commands.run("-m", f"agrpo_jax.{module}", *flags)
  assert done.returncode == 2, done.stderr
  assert "Traceback" not in done.stderr
  return done.stderr


def refused(c: config_lib.ConfigDict, **changes) -> str:
  """What is wrong with a config whose model is nowhere: nothing is loaded."""
  c = c.copy_and_resolve_references()
  c.model.path = "no/model"
  c.update_from_flattened_dict(changes)
  with pytest.raises(errors.UserError) as caught:
    settings.rl(c)
  return str(caught.value)


def test_configs_of_the_other_kind_of_run():
  found = told("--config=configs/sft_sudoku.py")
  assert "kind 'sft'" in found and "agrpo_jax.sft" in found
  found = told("--config=configs/sudoku_tiny.py", module="sft")
  assert "kind 'rl'" in found and "agrpo_jax.main" in found


TYPO = """
from agrpo_jax import config as config_lib
def get_config():
  c = config_lib.rl()
  c.rollout.temprature = 0.3
  return c
"""


@pytest.mark.parametrize(
  "text,part",
  [
    ("def get_config(:\n", "line 1"),
    (TYPO, "no key 'temprature' where it is set; did you mean temperature?"),
    ("import agrpo_jax\n", "get_config"),
    ("def get_config():\n  return 1 / 0\n", "ZeroDivisionError"),
    ("def get_config():\n  return None\n", "returned None"),
    ("def get_config():\n  return {'seed': 1}\n", "returned {'seed': 1}"),
    ("import not_there\n", "not_there"),
  ],
)
def test_config_files_that_are_broken(tmp_path, text, part):
  file = tmp_path / "broken.py"
  file.write_text(text)
  found = told(f"--config={file}")
  assert part in found
  assert "broken.py" in found


@pytest.mark.parametrize(
  "key,value,part",
  [
    ("seed", -1, "seed=-1"),
    ("seed", 2**32, "seed=4294967296"),
    ("evaluate.num_examples", -1, "num_examples=-1"),
    ("rollout.temperature", float("inf"), "temperature=inf"),
    ("rollout.temperature", float("nan"), "temperature=nan"),
    ("evaluate.temperature", float("inf"), "temperature=inf"),
    ("rollout.top_p", float("nan"), "top_p=nan"),
    ("optimizer.learning_rate", 1e30, "learning_rate=1e+30"),
    ("optimizer.learning_rate", float("nan"), "learning_rate=nan"),
    ("optimizer.eps", float("inf"), "eps=inf"),
    ("optimizer.weight_decay", float("nan"), "weight_decay=nan"),
    ("objective.clip_low", float("nan"), "clip_low=nan"),
    ("objective.kl_coef", float("inf"), "kl_coef=inf"),
    ("grading.timeout_seconds", float("nan"), "timeout_seconds=nan"),
    ("evaluate.guidance", float("inf"), "guidance=inf"),
    ("train.keep", None, "train.keep=None must be of type int"),
    ("rollout.group_size", True, "group_size=True must be of type int"),
    ("objective.name", "grpo", "objective.name: objective 'grpo' is unknown"),
    ("rollout.unmask_rule", "threshold", "rollout.threshold=None"),
    ("rollout.factor", 1.0, "rollout.factor=1.0 needs unmask_rule='factor'"),
    ("evaluate.gamma", 0.1, "evaluate.gamma=0.1 needs unmask_rule="),
    ("objective.step_price", -0.1, "step_price=-0.1"),
    ("objective.step_price", float("nan"), "step_price=nan"),
    ("objective.step_price", "dear", "step_price='dear'"),
    ("objective.step_price", True, "step_price=True"),
    ("objective.microbatch", 0, "microbatch=0 must be a whole number"),
    ("objective.microbatch", "8", "microbatch='8' must be a whole number"),
    ("objective.microbatch", None, "microbatch=None"),
    ("objective.microbatch", 2.5, "microbatch=2.5"),
    ("objective.microbatch", True, "microbatch=True"),
  ],
)
def test_values_that_cannot_be(tmp_path, key, value, part):
  c = runs.small(tmp_path)
  with c.unlocked():
    section, _, name = key.rpartition(".")
    group = c[section] if section else c
    group._fields[name] = value  # as a config file could have it
  assert part in refused(c)


@pytest.mark.parametrize("weight", [float("nan"), float("-inf")])
def test_reward_weights_that_are_no_numbers(tmp_path, weight):
  c = runs.small(tmp_path)
  c.task.reward_weights.correct = weight
  assert "task.reward_weights.correct" in refused(c)


@pytest.mark.parametrize(
  "changes,part",
  [
    ({"lora.rank": -1}, "rank=-1"),
    ({"lora.rank": 4, "lora.alpha": float("nan")}, "alpha=nan"),
    ({"lora.rank": 4, "lora.targets": ("qq",)}, "targets=('qq',)"),
  ],
)
def test_adapters_that_cannot_be(tmp_path, changes, part):
  assert part in refused(runs.small(tmp_path), **changes)


def test_an_absurd_rank_is_refused_by_the_shape_alone(tmp_path):
  c = runs.small(tmp_path)
  c.lora.rank = 10**9
  folder = shutil.copytree(c.model.path, tmp_path / "model")
  (folder / "model.safetensors").write_bytes(b"")  # would be told if read
  c.model.path = str(folder)
  with pytest.raises(errors.UserError, match="1000000000"):
    runs.train(c)


def test_wandb_that_is_not_installed(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)
  c = runs.small(tmp_path)
  c.wandb.project = "mine"
  assert "wandb.project='mine'" in refused(c)


def test_too_few_examples_are_told_before_the_model_is_looked_for(tmp_path):
  c = runs.small(tmp_path)
  c.model.path = "no/model"
  c.rollout.update(num_prompts=64, batch_size=128)
  with pytest.raises(errors.UserError, match="only 12 examples"):
    runs.train(c)


def sft_config(tmp_path) -> config_lib.ConfigDict:
  file = tmp_path / "pairs.jsonl"
  pairs = [{"prompt": f"{n}?", "completion": str(n)} for n in range(8)]
  file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
  c = config_lib.sft()
  c.workdir = str(tmp_path / "run")
  c.model.network = dict(num_layers=1, width=32, num_heads=2, mlp_width=48)
  c.model.dtype = "float32"
  c.data.path = str(file)
  c.data.bucket = 32
  c.sft.update(completion_length=4, batch_size=8, microbatch=4)
  c.train.update(num_steps=1, checkpoint_every=1)
  return c


def test_an_output_that_cannot_be_written(tmp_path):
  (tmp_path / "file").write_text("in the way")
  c = sft_config(tmp_path)
  c.sft.output = str(tmp_path / "file" / "out")
  with pytest.raises(errors.UserError, match=r"sft\.output="):
    settings.sft(c)


def test_too_few_demonstrations_and_a_network_that_cannot_be(tmp_path):
  c = sft_config(tmp_path)
  c.sft.update(batch_size=16)
  with pytest.raises(
    errors.UserError, match=r"config\.sft\.batch_size=16 .* only 8 examples"
  ):
    sft.fine_tune(settings.sft(c))
  # The corrected start is not held to what the refused one left.
  c.sft.update(batch_size=8)
  c.model.network.width = 64
  sft.fine_tune(settings.sft(c))
  shape, _, _ = recordings.network_at(pathlib.Path(c.workdir) / "initial")
  assert shape.width == 64
  c = sft_config(tmp_path)
  c.workdir = str(tmp_path / "other")
  c.model.network.depth = 3
  with pytest.raises(errors.UserError, match="depth"):
    sft.fine_tune(settings.sft(c))
  assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
  "changes",
  [
    {"model.path": "no/model"},
    {"mesh.tensor": 3},
    {"data.max_prompt_length": 20},
    {"model.tokenizer": ""},
  ],
)
def test_a_refused_start_leaves_no_trace(tmp_path, changes):
  c = runs.small(tmp_path)
  good = c.copy_and_resolve_references()
  good.train.num_steps = 1
  c.update_from_flattened_dict(changes)
  with pytest.raises(errors.UserError):
    runs.train(c)
  assert not pathlib.Path(c.workdir).exists()
  runs.begin(good)  # and another start is free to use it


@pytest.mark.parametrize(
  "changes,part",
  [
    ({"seed": 1}, "config.seed"),
    ({"seed": -1}, "seed=-1"),
    ({"model.path": "no/model"}, "no/model"),
    ({"mesh.tensor": 3, "accept_changed_config": True}, "tensor"),
  ],
)
def test_a_refused_start_changes_nothing_in_an_old_run(tmp_path, changes, part):
  c = runs.small(tmp_path)
  runs.begin(c)
  folder = pathlib.Path(c.workdir)
  before = contents(folder)
  other = c.copy_and_resolve_references()
  other.update_from_flattened_dict(changes)
  with pytest.raises(errors.UserError, match=part):
    runs.train(other)
  assert contents(folder) == before
  runs.begin(c)  # the corrected start works


def contents(folder: pathlib.Path) -> dict[str, bytes]:
  """Returns what stands in the files of a folder, by their paths.

  But for who held its lock last, which is told to the second.
  """
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in folder.rglob("*")
    if path.is_file() and path.name != "lock.json"
  }


def test_a_damaged_record_of_the_config(tmp_path):
  c = runs.small(tmp_path)
  runs.begin(c)
  file = pathlib.Path(c.workdir) / "config.json"
  for damage in (file.read_text()[:100], "[]", ""):
    file.write_text(damage)
    with pytest.raises(errors.UserError, match=r"config\.json"):
      runs.begin(c)


def test_checkpoints_that_are_a_file(tmp_path):
  c = runs.small(tmp_path)
  folder = pathlib.Path(c.workdir)
  folder.mkdir()
  (folder / "checkpoints").write_text("in the way")
  with pytest.raises(errors.UserError, match="checkpoints"):
    runs.begin(c)
  done = told(
    "--config=configs/sudoku_tiny.py",
    f"--checkpoint={folder}",
    module="evaluate",
  )
  assert "is not a work directory with checkpoints/" in done
