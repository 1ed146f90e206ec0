"""The card of an export says what is known of the run, and nothing else."""

import json
import os

import pytest

from agrpo_jax import errors
from agrpo_jax.models import base
from agrpo_jax.models import lora as lora_lib
from agrpo_jax.port import card
from fixtures import recordings

STEP = 4


@pytest.fixture
def workdir(tmp_path):
  """A run that evaluated itself before, and after its fourth train step."""
  folder = tmp_path / "my_run"
  folder.mkdir()
  before = {"accuracy": 0.18, "accuracy_low": 0.15, "accuracy_high": 0.213}
  (folder / "before.json").write_text(json.dumps(before))
  records = [{"train_step": step, "loss": 0.5} for step in range(6)]
  records[STEP - 1] |= {
    "eval/accuracy": 0.5,
    "eval/accuracy_low": 0.444,
    "eval/accuracy_high": 0.556,
  }
  lines = [json.dumps(record) + "\n" for record in records]
  (folder / "metrics.jsonl").write_text("".join(lines) + '{"train_st')
  words = ["python", "-m", "agrpo_jax.main", "--config=gsm8k", "--config.x=a b"]
  sessions = [{"command": ["earlier"]}, {"command": words}]
  (folder / "environment.json").write_text(json.dumps({"sessions": sessions}))
  return folder


def written(
  workdir, to, *, which="", train_step=STEP, path="owner/base", **changes
) -> str:
  config = json.loads(recordings.config("gsm8k").to_json())
  config["workdir"] = config["data"]["path"] = str(workdir)
  source = base.Source(path, "abc")
  meta = {
    "config": config,
    "train_step": train_step,
    "versions": {"agrpo_jax": "1.2.3"},
  }
  lora = lora_lib.Lora(8, 16.0, ("q", "v"))
  meta |= changes
  to.mkdir(exist_ok=True)
  made = card.make(to, f"{workdir}{which}", meta, source, lora, is_adapter=True)
  card.write(to, made)
  return (to / "README.md").read_text()


def test_what_it_says(workdir, tmp_path):
  text = written(workdir, tmp_path / "out")
  for part in (
    "base_model: owner/base\nlibrary_name: peft\n",
    "# my_run\n",
    "`owner/base`, revision `abc`; its licence applies to this one.",
    "Task: gsm8k.",
    "4 of 2335 train steps",
    "objective `agrpo`) by agrpo_jax 1.2.3.",
    "rank 8 and alpha 16, on q, v; they are in this folder.",
    "| before | 18.0 % | 15.0 to 21.3 % |",
    "| this checkpoint | 50.0 % | 44.4 to 55.6 % |",
    "    python -m agrpo_jax.main --config=gsm8k '--config.x=a b'\n",
  ):
    assert part in text
  assert "flatters" not in text
  kept = json.loads(text.split("```json\n")[1].split("```")[0])
  assert kept["rollout"]["group_size"] == 8


def test_the_best_of_a_run_is_called_so(workdir, tmp_path):
  assert "flatters" in written(workdir, tmp_path / "out", which=":best")


def test_accuracy_is_that_of_the_checkpoint_or_none(workdir, tmp_path):
  text = written(workdir, tmp_path / "out", train_step=STEP + 1)
  assert "did not evaluate this checkpoint" in text
  assert "50.0 %" not in text


def test_what_the_run_began_with(workdir, tmp_path):
  (workdir / "start.json").write_text('{"run": "first", "train_step": 40}')
  text = written(workdir, tmp_path / "out")
  assert "It began with what another run trained: `first`, train step 40." in (
    text
  )
  assert "* Data: `my_run`." in text


def test_random_parameters_are_no_base_model(workdir, tmp_path):
  config = json.loads(recordings.config("gsm8k").to_json())
  config["model"]["network"] = {"width": 8}
  path = str(workdir / "initial")
  text = written(workdir, tmp_path / "out", path=path, config=config)
  assert "* Base model: none; it began from random parameters." in text
  assert "initial" not in text and "licence" not in text


def test_what_is_not_recorded_is_left_out(workdir, tmp_path):
  for file in workdir.iterdir():
    file.unlink()
  text = written(workdir, tmp_path / "out")
  assert "did not evaluate this checkpoint" in text
  assert "python" not in text


def test_folders_of_this_machine_are_not_told(workdir, tmp_path):
  path = tmp_path / "owner" / "local"
  text = written(workdir, tmp_path / "out", path=str(path))
  assert "Base model: `local`" in text
  assert "base_model:" not in text
  assert str(tmp_path) not in text


@pytest.mark.parametrize(
  "changes",
  [{"config": {}}, {"config": []}, {"versions": None}, {"versions": {}}],
)
def test_a_meta_that_is_none(workdir, tmp_path, changes):
  with pytest.raises(errors.UserError, match=r"my_run' are not .* README\.md"):
    written(workdir, tmp_path / "out", **changes)


@pytest.mark.parametrize(
  "name,text",
  [
    ("before.json", "{}"),
    ("before.json", '{"accuracy": "x"}'),
    ("metrics.jsonl", "[1]"),
    ("metrics.jsonl", "[" * 100_000),
    ("metrics.jsonl", '{"train_step": 3, "eval/accuracy": "x"}'),
    ("start.json", "{}"),
    ("environment.json", "{}"),
    ("environment.json", '{"sessions": [1]}'),
    ("environment.json", '{"sessions": [{"command": [1]}]}'),
    ("environment.json", '{"sessions": [{"command": ["\\ud800"]}]}'),
  ],
)
def test_records_that_no_run_writes(workdir, tmp_path, name, text):
  (workdir / name).write_text(text)
  with pytest.raises(errors.UserError, match=r"my_run' are not .* README\.md"):
    written(workdir, tmp_path / "out")


def test_a_pipe_is_not_waited_for(workdir, tmp_path):
  (workdir / "metrics.jsonl").unlink()
  os.mkfifo(workdir / "metrics.jsonl")
  with pytest.raises(errors.UserError, match="is no file that can be read"):
    written(workdir, tmp_path / "out")


def test_what_a_record_says_stays_on_its_line(workdir, tmp_path):
  words = ["python", "a\n\n# b\u2028c"]
  (workdir / "environment.json").write_text(
    json.dumps({"sessions": [{"command": words}]})
  )
  text = written(workdir, tmp_path / "out")
  assert "\n    python 'a  # b c'\n" in text


def test_a_card_that_is_there_stays(workdir, tmp_path):
  (tmp_path / "README.md").write_text("mine")
  assert written(workdir, tmp_path) == "mine"
