"""Commands take model and adapter from the run that they are pointed at."""

import json
import shutil

import pytest
import safetensors.numpy

from agrpo_jax import errors
from agrpo_jax import evaluate
from agrpo_jax import likelihood
from agrpo_jax import settings
from agrpo_jax import sweep
from fixtures import commands
from fixtures import runs
from fixtures import sudoku

ALPHA = 16.0


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """The config of a run with adapters, far from its base model."""
  folder = tmp_path_factory.mktemp("trained")
  c = sudoku.config(num_examples=40)
  sudoku.use_copy(c, folder / "base")
  c.workdir = str(folder / "run")
  c.lora.update(rank=2, alpha=ALPHA, targets=("q", "down"))
  c.rollout.update(
    num_prompts=2,
    group_size=4,
    batch_size=8,
    completion_length=16,
    block_length=16,
    num_denoise_steps=4,
  )
  c.objective.update(num_mc_steps=2, microbatch=16)
  c.optimizer.update(learning_rate=0.1, schedule="constant")
  c.train.update(num_steps=2, checkpoint_every=2)
  runs.train(c)
  return c


def other():
  """A config that says other things than the run, in no flag."""
  c = sudoku.config(num_examples=8)
  c.model.path = "elsewhere"
  c.model.dtype = "bfloat16"
  c.lora.update(rank=4, alpha=1.0)
  return c


def completions(c, checkpoint):
  result = evaluate.run(settings.rl(c), checkpoint)
  return [record["completion"] for record in result.records]


@pytest.fixture(scope="module")
def expected(trained):
  """What the trained model writes on eight puzzles."""
  c = trained.copy_and_resolve_references()
  c.task.defaults.num_examples = 8
  found = completions(c, trained.workdir)
  # Another adapter's scale would show.
  c.lora.alpha = 1.0
  assert completions(c, trained.workdir) != found
  return found


def test_evaluation_has_the_settings_of_the_run(trained, expected):
  c = other()
  evaluate.use_run(c, trained.workdir)
  s = settings.rl(c)
  assert (s.lora.rank, s.lora.alpha, s.lora.targets) == (2, 16.0, ("q", "down"))
  assert (s.model.path, s.model.dtype) == (trained.model.path, "float32")
  assert completions(c, trained.workdir) == expected


def test_likelihood_has_them_too(trained):
  c = other()
  evaluate.use_run(c, trained.workdir)
  found = likelihood.run(settings.rl(c), "", trained.workdir, num_draws=1)
  own = trained.copy_and_resolve_references()
  own.task.defaults.num_examples = 8
  assert found == likelihood.run(
    settings.rl(own), "", trained.workdir, num_draws=1
  )


def test_a_sweep_has_them_too(trained, tmp_path):
  ((cell,),) = sweep.cells(other(), [], [trained.workdir], {}, str(tmp_path))
  assert cell.problems == ()
  assert cell.settings.lora.alpha == ALPHA
  assert cell.settings.model.path == trained.model.path


def test_a_base_model_that_moved_is_known_by_its_contents(
  trained, expected, tmp_path
):
  run = shutil.copytree(trained.workdir, tmp_path / "run")
  file = run / "config.json"
  recorded = json.loads(file.read_text("utf-8"))
  recorded["model"].update(path=str(tmp_path / "gone"), revision="main")
  file.write_text(json.dumps(recorded), "utf-8")
  c = other()
  evaluate.use_run(c, str(run))
  with pytest.raises(errors.UserError, match="gone"):
    completions(c, str(run))

  c = other()
  c.model.path = str(sudoku.MODEL)
  evaluate.use_run(c, str(run), given=["model.path"])
  assert c.model.revision == ""  # of the hub id that is gone
  assert completions(c, str(run)) == expected

  weights = shutil.copytree(sudoku.MODEL, tmp_path / "changed")
  weights = weights / "model.safetensors"
  tensors = safetensors.numpy.load_file(weights)
  tensors["model.transformer.ln_f.weight"] *= 2
  safetensors.numpy.save_file(tensors, weights)
  c.model.path = str(tmp_path / "changed")
  with pytest.raises(errors.UserError, match="changed") as error:
    completions(c, str(run))
  assert trained.model.path in str(error.value)


def command(name, *arguments):
  return commands.run("-m", f"agrpo_jax.{name}", *arguments)


@pytest.mark.parametrize(
  "words",
  [
    ("evaluate",),
    ("likelihood",),
    ("sweep", "--output=unused"),
    ("show", "3102200002100320"),
  ],
  ids=lambda words: words[0],
)
def test_a_contradiction_on_the_command_line_names_both(trained, words):
  done = command(
    *words,
    "--config=configs/sudoku_tiny.py",
    f"--checkpoint={trained.workdir}",
    "--config.lora.alpha=32.0",
    "--config.lora.rank=2",
  )
  assert done.returncode == 2, done.stderr
  assert "config.lora.alpha=32.0, but the run has 16.0" in done.stderr
  assert "lora.rank" not in done.stderr  # it says the same


def test_show_needs_no_more_than_the_run(trained, tmp_path):
  page = tmp_path / "page.html"
  done = command(
    *("show", f"--checkpoint={trained.workdir}", "3102200002100320"),
    *("--completion_length=16", "--block_length=16", "--num_denoise_steps=2"),
    f"--html={page}",
  )
  assert done.returncode == 0, done.stderr
  assert "after 2 of 2 steps" in done.stdout
  assert "<title>run:2, step by step</title>" in page.read_text()


def test_evaluate_says_which_checkpoint_it_is(trained):
  done = command(
    "evaluate",
    *("--config=sudoku_tiny", f"--checkpoint={trained.workdir}"),
    "--config.evaluate.num_examples=4",
    "--config.grading.num_workers=1",
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith(f"{trained.workdir}:2: 16 tokens in blocks of ")
