"""Training at equal compute: budgets, prices, learning rates, resumption."""

import csv
import dataclasses
import json
import math
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest

from agrpo_jax import errors
from agrpo_jax import evaluate
from agrpo_jax import settings
from agrpo_jax import train as train_lib
from agrpo_jax.evaluation import statistics
from agrpo_jax.lab import __main__ as lab
from agrpo_jax.lab import compare
from agrpo_jax.lab import prices
from agrpo_jax.lab import train
from agrpo_jax.models import base as models
from agrpo_jax.objectives import agrpo
from agrpo_jax.objectives import espo
from agrpo_jax.runs import run as run_lib
from agrpo_jax.samplers import sampling as sampling_lib
from fixtures import commands
from fixtures import recordings


def asked(work, **changes):
  c = recordings.config("sudoku_tiny", "blocks")
  c.task.options.num_examples = 64
  c.evaluate.num_examples = 8
  values = dict(
    config=c,
    objectives=("agrpo", "espo"),
    num_seeds=2,
    budget=train.Budget("passes", 100.0),
    learning_rates=(),
    sweep_seeds=1,
    sweep_share=0.5,
    evaluations=2,
    final_examples=0,
    work=work,
    command="the command",
  )
  return train.Asked(**values | changes)


@pytest.mark.parametrize(
  "amount,cost,num_steps",
  [(10.0, 2.5, 4), (0.3, 0.1, 3), (9.99, 2.5, 3), (1.0, 1.0, 1)],
)
def test_a_budget_pays_for_whole_train_steps(amount, cost, num_steps):
  assert train.Budget("passes", amount).num_steps("espo", cost) == num_steps


def test_a_budget_of_less_than_a_train_step_is_refused():
  budget = train.Budget("seconds", 2.0)
  with pytest.raises(
    errors.UserError, match=r"--budget_seconds=2 is less .*es"
  ):
    budget.num_steps("espo", 2.5)
  said = "--budget_seconds=2 times --sweep_share=0.5 is less"
  with pytest.raises(errors.UserError, match=said):
    budget.num_steps("espo", 1.5, 0.5)


class TestPrices:
  def objective(self, **changes):
    flags = dict(
      replays=True,
      is_sum_over_visits=True,
      has_reference=False,
      behaviour="recorded",
      updates_per_batch=1,
    )
    return types.SimpleNamespace(**flags | changes)

  @pytest.mark.parametrize(
    "changes,passes",
    [
      ({}, 6.0),
      ({"updates_per_batch": 4}, 6.0),
      ({"behaviour": "scored"}, 6.0),  # it is the policy itself
      ({"behaviour": "scored", "updates_per_batch": 4}, 9.0),
      ({"has_reference": True}, 9.0),
      ({"is_sum_over_visits": False, "has_reference": True}, 12.0),
    ],
  )
  def test_reads_are_a_third(self, changes, passes):
    found = prices.of_updates(
      self.objective(**changes), prices.WHOLE_ROWS, 6.0, 9.0, 9.0
    )
    assert found == pytest.approx(passes)

  def test_a_memory_is_paid_once_per_unit(self):
    policy = prices.Prices(memory=0.5, state=0.25)
    found = prices.of_updates(self.objective(), policy, 2.0, 2.0, 8.0)
    assert found == pytest.approx(2 * (0.5 + 4 * 0.25))
    plain = self.objective(replays=False)
    assert prices.of_updates(plain, policy, 2.0, 2.0, 2.0) == 2.0
    assert prices.of_updates(plain, policy, 0.0, 0.0, 0.0) == 0.0
    assert prices.of_rollout(policy, 8, 2) == pytest.approx((1 + 2) / 3)

  def test_the_first_state_of_a_memory_is_paid_with_it(self):
    policy = prices.Prices(memory=0.5, state=0.25, has_start=True)
    assert prices.of_rollout(policy, 8, 2) == pytest.approx((1 + 1.5) / 3)
    block = prices.of_updates(self.objective(), policy, 2.0, 2.0, 8.0)
    assert block == pytest.approx(2 * (0.5 + 3 * 0.25))
    # A drawn step is seldom the first.
    step = prices.of_updates(self.objective(), policy, 2.0, 2.0, 2.0)
    assert step == pytest.approx(2 * (0.5 + 0.25))

  def test_a_train_step_pays_for_its_rollouts_too(self):
    record = {
      "completions/mean_denoise_steps": 6.0,
      "completions/mean_whole_passes": 6.0,
      "draws/pairs": 8.0,
      "draws/units": 8.0,
      "draws/visits": 8.0,
    }
    objective = self.objective()
    found = prices.of_train_step(objective, prices.WHOLE_ROWS, 4, record)
    assert found == pytest.approx(6 / 3 + 2)
    # Completions drawn on from states within others.
    record["values/mean_denoise_steps"] = 9.0
    found = prices.of_train_step(objective, prices.WHOLE_ROWS, 4, record)
    assert found == pytest.approx(6 / 3 + 9 / 3 + 2)

  def test_windows_are_cheaper_than_rows(self):
    shape, _ = recordings.random_network()
    assert isinstance(shape, models.Shape)
    made = sampling_lib.Sampling(
      mask_id=0,
      eos_id=1,
      completion_length=16,
      block_length=4,
      num_denoise_steps=8,
    )

    def priced(cache):
      policy = dataclasses.replace(made, cache=cache)
      return prices.of_policy(policy, shape, 32, has_adapter=False)

    assert priced("none") == prices.WHOLE_ROWS
    dual, prefix = priced("dual"), priced("prefix")
    assert dual.memory == prefix.memory == 1 and dual.has_start
    shape = dataclasses.replace(shape, attention_block=4)
    block = priced("block")
    # A mask hides tokens of all blocks, each of which is run beside the row.
    assert block.state < 0.2 and 1.2 < block.mask < 1.5
    assert dual.mask == 1.0
    assert dual.state < prefix.state < 1

  @pytest.mark.parametrize(
    "has_adapter,remat,read",
    [
      (False, "none", 1 / 3),
      (False, "full", 1 / 4),
      (True, "dots", 1 / 2),
      (True, "full", 1 / 3),
    ],
  )
  def test_reads_are_dearer_with_adapters(self, has_adapter, remat, read):
    shape = dataclasses.replace(recordings.random_network()[0], remat=remat)
    sampling = recordings.config("sudoku_tiny", "dual")
    made = settings.rl(sampling).rollout.sampling
    for cache in ("none", "dual"):
      policy = prices.of_policy(
        dataclasses.replace(made, cache=cache),
        shape,
        8,
        has_adapter=has_adapter,
      )
      assert policy.read == pytest.approx(read)
    whole = dataclasses.replace(prices.WHOLE_ROWS, read=read)
    assert prices.of_rollout(whole, 6, 6) == pytest.approx(6 * read)


class TestSettings:
  def settings(self, word, tmp_path):
    return asked(tmp_path).settings(
      word,
      "runs/x",
      seed=3,
      learning_rate=1e-3,
      num_steps=10,
      evaluations=3,
    )

  def test_the_configs_own_objective_keeps_its_settings(self, tmp_path):
    own = self.settings("agrpo", tmp_path).objective
    assert own == agrpo.Agrpo(num_mc_steps=2, step_rule="entropy")
    changed = self.settings("agrpo/step_rule=all", tmp_path).objective
    assert changed == agrpo.Agrpo(num_mc_steps=2, step_rule="all")

  def test_another_has_its_own_defaults(self, tmp_path):
    s = self.settings("espo/num_masks=4", tmp_path)
    assert s.objective == espo.Espo(num_masks=4)
    assert s.microbatch == 256
    assert s.optimizer.num_updates == 10 * s.objective.updates_per_batch

  def test_the_run_is_one_of_the_comparison(self, tmp_path):
    s = self.settings("espo", tmp_path)
    assert s.seed == 3 and s.optimizer.learning_rate == 1e-3
    assert s.evaluate.every == 4 and s.train.num_steps == 10
    assert s.workdir == str(tmp_path / "runs/x")

  def test_a_run_of_another_config_stays_one(self, tmp_path):
    wanted = asked(tmp_path)
    wanted.config.accept_changed_config = True
    s = wanted.settings(
      "wd1", "x", seed=0, learning_rate=1e-3, num_steps=1, evaluations=1
    )
    assert not s.accept_changed_config
    folder = pathlib.Path(s.workdir)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(s.as_json | {"seed": 9}))
    with pytest.raises(errors.UserError, match="Give another --work, ") as said:
      train.is_done(s)
    assert "--config." not in str(said.value)


@pytest.mark.parametrize(
  "changes,message",
  [
    ({"objectives": ("agrpo", "grpo")}, "objective 'grpo' is unknown"),
    ({"objectives": ("agrpo", "espo/masks=3")}, "'masks=3' is no SETTING"),
    ({"objectives": ("wd1", "espo/num_masks=0")}, "must be at least 1"),
    ({"objectives": ("wd1", "espo/num_masks=many")}, "espo/num_masks=many: "),
    ({"objectives": ("wd1",)}, "--objectives=wd1 must be two or more"),
    ({"num_seeds": 1}, "--seeds=1 must be from 2, for there to be a spread"),
    ({"budget": train.Budget("passes", 0.0)}, "--budget_passes=0 must be pos"),
    ({"budget": train.Budget("steps", 2.5)}, "=2.5 must be a positive whole"),
    ({"budget": train.Budget("steps", math.inf)}, "=inf must be a positive wh"),
    ({"budget": train.Budget("steps", math.nan)}, "=nan must be a positive wh"),
    ({"budget": train.Budget("passes", math.nan)}, "=nan must be positive and"),
    ({"objectives": ("wd1", "espo/num_masks=2.5")}, "must be of type int"),
    ({"learning_rates": (1e-3, -1.0)}, "learning_rate=-1.0 must be in"),
    ({"sweep_share": 0.0}, "--sweep_share=0.0 must be in"),
    ({"sweep_seeds": 0}, "--sweep_seeds=0 must be at least 1"),
  ],
)
def test_what_cannot_be_compared_is_refused(changes, message, tmp_path):
  with pytest.raises(errors.UserError, match=message):
    next(train.run(asked(tmp_path / "work", **changes), None, None))
  assert not (tmp_path / "work").exists()


def test_all_mistakes_are_named_at_once(tmp_path):
  wrong = asked(tmp_path, num_seeds=1, objectives=("grpo", "ppo"))
  with pytest.raises(errors.UserError) as caught:
    train.check(wrong)
  for part in ("--seeds=1", "'grpo'", "'ppo'"):
    assert part in str(caught.value)


class Fake:
  """Runs without training: what they cost and how good they get."""

  def __init__(self, monkeypatch, work):
    self.work = work
    self.runs: list[str] = []
    self.diverges = -1  # a seed
    monkeypatch.setattr(train._Comparison, "_trained", self.trained)

  def trained(self, word, s):
    del word
    name = "espo" if isinstance(s.objective, espo.Espo) else "agrpo"
    folder = pathlib.Path(s.workdir)
    self.runs.append(f"{folder.relative_to(self.work)} {s.train.num_steps}")
    # Train steps of runs get cheaper than they were at first.
    is_short = "calibration" in folder.parts
    cost = {"agrpo": 5.0, "espo": 10.0}[name] * (1.0 if is_short else 0.8)
    rate = s.optimizer.learning_rate
    if rate == 1.0 or s.seed == self.diverges:
      raise FloatingPointError("Not finite in train step 3: loss=nan")
    right = {"agrpo": rate, "espo": 0.1 - rate}[name]
    num_steps = s.train.num_steps
    point = compare.Point(num_steps, cost * num_steps, num_steps, right)
    return train._Trained((point,), point)

  def evaluate(self, s, checkpoint, output, *, examples):
    del output
    rng = np.random.default_rng(s.seed)
    grade_N = rng.integers(0, 2, len(examples)) * (1.0 if checkpoint else 0.0)
    records = [{"grades": {"accuracy": grade}} for grade in grade_N]
    return statistics.Result(records, 1, 0.0)

  def run(self, wanted):
    """The outcome after the last seed."""
    (*_, found) = train.run(wanted, None, self.evaluate)
    return found


class TestComparison:
  def test_without_a_sweep_calibration_gives_the_train_steps(
    self, monkeypatch, tmp_path
  ):
    fake = Fake(monkeypatch, tmp_path)
    found = fake.run(asked(tmp_path))
    assert fake.runs == [
      "calibration/agrpo 3",
      "calibration/espo 3",
      "runs/agrpo/0.0003-0 20",
      "runs/espo/0.0003-0 10",
      "runs/agrpo/0.0003-1 20",
      "runs/espo/0.0003-1 10",
    ]
    assert [(r.objective, r.seed) for r in found.runs] == [
      ("agrpo", 0),
      ("agrpo", 1),
      ("espo", 0),
      ("espo", 1),
    ]
    assert not found.rates and found.before_curve == 0.0

  def test_every_objective_gets_its_best_learning_rate(
    self, monkeypatch, tmp_path
  ):
    fake = Fake(monkeypatch, tmp_path)
    rates = (1e-3, 1e-2, 1.0)
    found = fake.run(asked(tmp_path, learning_rates=rates))
    chosen = {r.objective: r for r in found.rates if r.is_chosen}
    assert chosen["agrpo"].learning_rate == 1e-2 and not chosen["agrpo"].is_edge
    assert chosen["espo"].learning_rate == 1e-3 and chosen["espo"].is_edge
    # What is not finite is no candidate.
    diverged = [r for r in found.rates if r.learning_rate == 1.0]
    assert all(math.isnan(r.accuracy) for r in diverged)
    # What train steps cost is not measured at any of them.
    assert fake.runs[:2] == ["calibration/agrpo 3", "calibration/espo 3"]
    # Half of the budget for the sweep; then at the cost that it found.
    for expected in (
      "sweep/agrpo/0.01-0 10",
      "sweep/espo/0.01-0 5",
      "runs/agrpo/0.01-0 25",
      "runs/espo/0.001-1 12",
    ):
      assert expected in fake.runs
    assert {run.learning_rate for run in found.of("agrpo")} == {1e-2}

  def test_what_is_never_finite_is_no_choice(self, monkeypatch, tmp_path):
    fake = Fake(monkeypatch, tmp_path)
    fake.diverges = train._SWEEP_SEED
    monkeypatch.setattr(train._Comparison, "_calibrate", lambda *_: 5.0)
    with pytest.raises(errors.UserError, match=r"any of .*=0.001,0.01\. Add"):
      fake.run(asked(tmp_path, learning_rates=(1e-3, 1e-2)))

  @pytest.mark.parametrize(
    "seed,message",
    [
      (1, "agrpo, learning rate 0.0003, config.seed 1, in .*runs/agrpo/0.0003"),
      (train._SWEEP_SEED, "seed 1000, in .*calibration/agrpo: Not finite"),
    ],
  )
  def test_a_divergence_says_of_which_run(
    self, seed, message, monkeypatch, tmp_path
  ):
    fake = Fake(monkeypatch, tmp_path)
    fake.diverges = seed
    with pytest.raises(errors.UserError, match=message) as said:
      fake.run(asked(tmp_path))
    assert "loss=nan. " in str(said.value)

  def test_final_prompts_are_others_than_those_of_the_curves(self, tmp_path):
    c = asked(tmp_path)
    apart = train.held_out(c.shared, 0)
    assert len(apart.curve) == len(apart.final) == 8
    assert not {e.id for e in apart.curve} & {e.id for e in apart.final}
    assert train.held_out(c.shared, 20).final[:8] == apart.final
    # 64 in all: 56 are left.
    assert len(train.held_out(c.shared, 200).final) == 56
    c = asked(tmp_path)
    c.config.evaluate.num_examples = 48
    assert train.held_out(c.shared, 0).is_shared
    assert len(train.held_out(c.shared, 2).final) == 2

  def test_another_budget_in_the_same_folder_is_refused(
    self, monkeypatch, tmp_path
  ):
    fake = Fake(monkeypatch, tmp_path)
    fake.run(asked(tmp_path))
    # More seeds and objectives are welcome.
    more = asked(tmp_path, num_seeds=3, objectives=("agrpo", "espo", "wd1"))
    train._same_comparison(more)
    other = asked(tmp_path, budget=train.Budget("passes", 50.0))
    with pytest.raises(errors.UserError, match=r"budget.amount: 100.0 before"):
      fake.run(other)
    changed = asked(tmp_path)
    changed.config.rollout.temperature = 0.5
    with pytest.raises(errors.UserError, match=r"config.rollout.temperature"):
      fake.run(changed)


class TestWhatRunsTook:
  """Train steps of a second each, but those that begin a process."""

  def took(self, tmp_path, first_steps, num_steps, monkeypatch):
    """Seconds of the whole run; of a calibrated train step it is 7."""
    wanted = asked(tmp_path)
    comparison = train._Comparison(wanted, None, None)
    comparison._calibrated["agrpo"] = 7.0
    s = wanted.settings(
      "agrpo",
      "x",
      seed=0,
      learning_rate=1e-3,
      num_steps=num_steps,
      evaluations=1,
    )
    folder = pathlib.Path(s.workdir)
    folder.mkdir()
    sessions = [{"first_step": step} for step in first_steps]
    (folder / "environment.json").write_text(json.dumps({"sessions": sessions}))
    record = {
      "completions/mean_denoise_steps": 8.0,
      "completions/mean_whole_passes": 8.0,
      "draws/pairs": 0.0,
      "draws/units": 0.0,
      "draws/visits": 0.0,
    }
    (folder / "metrics.jsonl").write_text(
      "".join(
        json.dumps(
          record
          | {
            "train_step": step,
            "seconds/update": 100.0 if step in first_steps else 1.0,
          }
        )
        + "\n"
        for step in range(num_steps)
      )
    )
    monkeypatch.setattr(train, "is_done", lambda s: True)
    return comparison._trained("agrpo", s).end.seconds

  @pytest.mark.parametrize(
    "first_steps,num_steps,seconds",
    [
      ((0, 1, 2, 3), 7, 7.0),  # more of them compile than do not
      ((0,), 3, 21.0),  # two are left
      ((0,), 1, 7.0),
    ],
  )
  def test_compilation_is_no_part_of_it(
    self, first_steps, num_steps, seconds, monkeypatch, tmp_path
  ):
    assert self.took(tmp_path, first_steps, num_steps, monkeypatch) == seconds


@pytest.mark.parametrize("budget", ["steps", "passes"])
def test_a_signal_in_a_last_train_step_stops_between_runs(budget, tmp_path):
  ran = []

  def train_fn(s):
    with run_lib.stop_requests():
      ran.append(s.workdir)
      signal.raise_signal(signal.SIGTERM)

  wanted = asked(tmp_path, budget=train.Budget(budget, 100.0))
  fake = types.SimpleNamespace(grades={"accuracy": np.zeros(16)})
  with pytest.raises(errors.Stopped, match="goes on with the next") as stopped:
    next(train.run(wanted, train_fn, lambda *_, **__: fake))
  assert len(ran) == 1 and stopped.value.code == 128 + signal.SIGTERM


_CHANGES = {
  "rollout.num_prompts": 2,
  "rollout.group_size": 4,
  "rollout.batch_size": 8,
  "objective.microbatch": 16,
  "task.options.num_examples": 200,
  "grading.num_workers": 1,
  "evaluate.num_examples": 16,
  "evaluate.batch_size": 16,
}


def _rows(file):
  with file.open() as opened:
    return [
      {k: v for k, v in row.items() if k != "seconds"}
      for row in csv.DictReader(opened)
    ]


def test_a_killed_command_goes_on_to_the_same_result(tmp_path, capsys):
  """The command is killed within its first run, then called to the end.

  Once more without that run, which is then made anew and at one go.
  """
  work = tmp_path / "work"
  objectives = ("agrpo", "wd1/updates_per_batch=1")
  first = work / "runs" / "agrpo" / "0.0003-0"
  deadline = time.monotonic() + 300
  with subprocess.Popen(
    [
      sys.executable,
      "-m",
      "agrpo_jax.lab",
      "train",
      "--config=configs/sudoku_tiny.py:blocks",
      *(f"--config.{key}={value}" for key, value in _CHANGES.items()),
      f"--objectives={','.join(objectives)}",
      "--seeds=2",
      "--budget_steps=5",  # no calibration: less to compile
      "--evaluations=2",
      f"--work={work}",
      f"--output={tmp_path / 'none'}",
    ],
    cwd=commands.ROOT,
    env=commands.environment(1),
    stdout=subprocess.DEVNULL,
  ) as killed:
    try:
      log = first / "metrics.jsonl"
      while not log.exists() or log.read_text().count("\n") < 3:
        assert killed.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    finally:
      killed.kill()

  c = recordings.config("sudoku_tiny", "blocks")
  with c.unlocked():
    c.update_from_flattened_dict(_CHANGES)
  whole = asked(
    work,
    config=c,
    objectives=objectives,
    budget=train.Budget("steps", 5.0),
    sweep_share=1.0,
  )

  def tables(name):
    (outcome,) = train.run(whole, train_lib.train, evaluate.run)
    compare.write(outcome, tmp_path / name)
    return [
      _rows(tmp_path / name / file)
      for file in ("train.csv", "curves.csv", "pairs.csv")
    ]

  resumed = tables("resumed")
  assert "run 4 of 4" in capsys.readouterr().out
  assert "Continuing" in (first / "said.txt").read_text()
  shutil.rmtree(first)
  assert tables("again") == resumed
  runs, curves, pairs = resumed
  assert [run["objective"] for run in runs] == [
    objective for objective in objectives for _ in range(2)
  ]
  # After three train steps, and after the last.
  assert [point["train_step"] for point in curves] == ["3", "5"] * 4
  assert len(pairs) == 1
  for run in runs:
    # A completion of 8 steps, and a visit or two in each of 5 train steps.
    assert 5 * 8 / 3 <= float(run["passes"]) < 5 * (8 / 3 + 2)
    assert not math.isnan(float(run["accuracy"]))


@pytest.mark.parametrize(
  "words,message",
  [
    ((), "Missing: --objectives=..., --work=..., --output=..., --budget_pas"),
    (
      (
        "--objectives=agrpo,espo",
        "--work=runs/x",
        "--output=runs/y",
        "--budget_steps=3",
        "--budget_passes=30",
      ),
      "a run has one budget",
    ),
    (("--draws=3", "--estimators=wd1"), "train has no --estimators, --draws."),
  ],
)
def test_the_command_asks_for_what_it_needs(words, message):
  done = commands.run(
    *("-m", "agrpo_jax.lab", "train"),
    "--config=configs/sudoku_tiny.py:blocks",
    *words,
  )
  assert done.returncode == 2 and message in done.stderr


def test_a_place_that_takes_no_files_is_refused(tmp_path):
  assert lab.output_folder(str(tmp_path / "a" / "b")).is_dir()
  (tmp_path / "file").write_text("")
  for place, reason in (("file", "File exists"), ("file/x", "Not a directory")):
    with pytest.raises(errors.UserError, match=f"/{place}': {reason}. Give"):
      lab.output_folder(str(tmp_path / place))
  # Whoever is root may write anywhere else.
  with pytest.raises(errors.UserError, match="--output='/proc/x'"):
    lab.output_folder("/proc/x")
