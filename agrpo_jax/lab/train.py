"""Trains objectives at equal compute.

1. Three train steps of every objective tell what a train step costs, and so
   how many the budget pays for.
2. Of the learning rates asked for, each objective gets the one that does best
   on seeds that the comparison does not have. What train steps cost in these
   runs, which change as the model learns, corrects their number.
3. Every objective is trained with every seed: same prompts, same model.
4. All are evaluated on held-out prompts that no learning curve was drawn with.

Every run is an ordinary one (`agrpo_jax.main`), in a work directory of its own
below that of the comparison: what is done is not done again, what was stopped
goes on.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import time
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from agrpo_jax import config as config_lib
from agrpo_jax import data
from agrpo_jax import errors
from agrpo_jax import settings as settings_lib
from agrpo_jax import tasks
from agrpo_jax.evaluation import statistics
from agrpo_jax.lab import compare
from agrpo_jax.lab import prices
from agrpo_jax.lab import words
from agrpo_jax.port import model as model_lib
from agrpo_jax.port import model_folder
from agrpo_jax.runs import checkpoint_named
from agrpo_jax.runs import files
from agrpo_jax.runs import metrics
from agrpo_jax.runs import progress
from agrpo_jax.runs import run as run_lib
from agrpo_jax.runs import workdir

UNITS = ("passes", "seconds", "steps")

_CALIBRATION_STEPS = 3
# Train steps that tell what one of a run takes; of fewer, calibration does.
_FEWEST_TIMED = 3
# Seeds of calibration and sweep start so much behind those of the comparison.
_SWEEP_SEED = 1000


@dataclasses.dataclass(frozen=True)
class Budget:
  """What a run may cost.

  Attributes:
    unit: passes (per completion of a train step, summed over train steps),
      seconds (of rollout, grading and update), or steps (train steps).
    amount: of it.
  """

  unit: str
  amount: float

  def __str__(self) -> str:
    unit = "train steps" if self.unit == "steps" else self.unit
    return f"{self.amount:g} {unit}"

  def num_steps(self, word: str, cost: float, share: float = 1.0) -> int:
    """Returns how many train steps the budget pays for.

    Args:
      word: the objective, for the message.
      cost: of a train step.
      share: of the budget, --sweep_share if not all.

    Raises:
      UserError: not even one.
    """
    # A budget that is a multiple of the cost pays for all of it.
    num_steps = math.floor(self.amount * share / cost * (1 + 1e-9))
    if num_steps < 1:
      part = "" if share == 1 else f" times --sweep_share={share:g}"
      raise errors.UserError(
        f"--budget_{self.unit}={self.amount:g}{part} is less than a train step "
        f"of {word}, which takes {cost:.3g}."
      )
    return num_steps


@dataclasses.dataclass(frozen=True)
class Asked:
  """What is to be compared.

  Attributes:
    config: the task, model, sampler and optimizer that all have.
    objectives: OBJECTIVE/SETTING=VALUE/..., each once. One that has the name of
      the config's own starts from the settings there, any other from those of
      its class.
    num_seeds: runs of each.
    budget: of a run.
    learning_rates: to choose from; none for the config's.
    sweep_seeds: runs per learning rate.
    sweep_share: of the budget that these runs get.
    evaluations: points of a learning curve, about.
    final_examples: held-out prompts after training; 0 for as many as
      config.evaluate.num_examples.
    work: folder of all runs.
    command: the command line, for the report.
  """

  config: config_lib.ConfigDict
  objectives: tuple[str, ...]
  num_seeds: int
  budget: Budget
  learning_rates: tuple[float, ...]
  sweep_seeds: int
  sweep_share: float
  evaluations: int
  final_examples: int
  work: pathlib.Path
  command: str

  @property
  def is_sweep(self) -> bool:
    return len(self.learning_rates) > 1

  @property
  def rates(self) -> tuple[float, ...]:
    """The learning rates, the config's if none was asked for."""
    return self.learning_rates or (self.config.optimizer.learning_rate,)

  @property
  def sweep_budget(self) -> Budget:
    amount = self.budget.amount * self.sweep_share
    return dataclasses.replace(self.budget, amount=amount)

  def settings(
    self,
    word: str,
    folder: str,
    *,
    seed: int,
    learning_rate: float,
    num_steps: int,
    evaluations: int,
  ) -> settings_lib.Rl:
    """Returns the settings of a run.

    Args:
      word: its objective.
      folder: of its work directory, below `work`.
      seed: added to the config's.
      learning_rate: its highest.
      num_steps: train steps.
      evaluations: on the way, about.

    Raises:
      UserError: naming all that is wrong with them.
    """
    c = self.config.copy_and_resolve_references()
    c.seed += seed
    c.optimizer.learning_rate = learning_rate
    c.train.num_steps = num_steps
    # One that is stopped loses a quarter at most; only its end is kept.
    c.train.checkpoint_every = math.ceil(num_steps / 4)
    c.train.keep, c.train.keep_best = 1, 0
    c.evaluate.every = math.ceil(num_steps / evaluations) if evaluations else 0
    c.report.before = False  # it would be the same for all
    c.workdir = str(self.work / folder)
    c.accept_changed_config = False  # then it would be no comparison
    c.wandb.name = folder
    words.put(c, word)
    return settings_lib.rl(c)

  @functools.cached_property
  def shared(self) -> settings_lib.Rl:
    """The settings that all runs share, as the config has them."""
    c = self.config.copy_and_resolve_references()
    c.workdir = c.workdir or str(self.work)
    return settings_lib.rl(c)


def check(asked: Asked) -> None:
  """Refuses what cannot be compared, before anything starts.

  Raises:
    UserError: all that is wrong.
  """
  found = []

  def want(is_fine: bool, flag: str, value: Any, legal: str) -> None:
    if not is_fine:
      found.append(f"--{flag}={value} must be {legal}")

  listed = ",".join(asked.objectives)
  want(len(asked.objectives) >= 2, "objectives", listed, "two or more")
  seeds = asked.num_seeds
  legal = f"from 2, for there to be a spread, to {_SWEEP_SEED}"
  want(2 <= seeds <= _SWEEP_SEED, "seeds", seeds, legal)
  amount = asked.budget.amount
  is_fine, legal = 0 < amount < math.inf, "positive and finite"
  if asked.budget.unit == "steps":
    is_fine, legal = is_fine and amount.is_integer(), "a positive whole number"
  want(is_fine, f"budget_{asked.budget.unit}", f"{amount:g}", legal)
  want(asked.sweep_seeds >= 1, "sweep_seeds", asked.sweep_seeds, "at least 1")
  share = asked.sweep_share
  want(0 < share <= 1, "sweep_share", share, "in (0, 1]")
  want(asked.evaluations >= 1, "evaluations", asked.evaluations, "at least 1")
  examples = asked.final_examples
  want(examples >= 0, "final_examples", examples, "0 or more")
  _ = asked.shared  # mistakes of the config are nobody's own
  for word in asked.objectives:
    for rate in asked.rates:
      try:
        asked.settings(
          word,
          "check",
          seed=_SWEEP_SEED,
          learning_rate=rate,
          num_steps=1,
          evaluations=1,
        )
      except errors.UserError as error:
        found.append(f"{word}: {error}")
        break
  if found:
    raise errors.UserError("Nothing was run.\n" + "\n".join(found))


TrainFn = Callable[[settings_lib.Rl], None]
"""`train.train`."""

EvaluateFn = Callable[..., statistics.Result]
"""`evaluate.run`: settings, checkpoint, folder, and the examples by name."""


def run(
  asked: Asked, train_fn: TrainFn, evaluate_fn: EvaluateFn
) -> Iterator[compare.Outcome]:
  """Yields what is known after each seed, from the second on.

  Args:
    asked: what is to be compared.
    train_fn: trains one run, or goes on with it.
    evaluate_fn: evaluates a model, or what a run trained, unless that is done.

  Raises:
    UserError: anything that the user has to change.
    Stopped: asked to stop; the same command goes on.
  """
  check(asked)
  with workdir.claim(asked.work, "--work"):
    _same_comparison(asked)
    # Runs that differ by their seeds alone are the same programs.
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
      programs = str((asked.work / "programs").absolute())
      jax.config.update("jax_compilation_cache_dir", programs)
      jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    yield from _Comparison(asked, train_fn, evaluate_fn).run()


def _same_comparison(asked: Asked) -> None:
  """Refuses a folder of runs that had another config or budget.

  More objectives, seeds or learning rates may come: their runs are new ones.
  """
  config = json.loads(asked.config.to_json())
  for key in ("workdir", "accept_changed_config", "wandb"):
    del config[key]
  now = {
    "config": config,
    "budget": dataclasses.asdict(asked.budget),
    "sweep_seeds": asked.sweep_seeds,
    "sweep_share": asked.sweep_share,
    "evaluations": asked.evaluations,
    "final_examples": asked.final_examples,
  }
  file = asked.work / "comparison.json"
  if file.exists():
    before = files.read_json(file, "what the runs in this folder share")
    changes = files.differences(before, now)
    if changes:
      raise errors.UserError(
        f"--work={str(asked.work)!r} holds the runs of another comparison:\n  "
        + "\n  ".join(changes)
        + "\nGive another --work, or undo the changes."
      )
    return
  with files.rewrite(file) as opened:
    opened.write((json.dumps(now, indent=2, sort_keys=True) + "\n").encode())


@dataclasses.dataclass(frozen=True)
class _HeldOut:
  """Held-out examples: those of the learning curves, and the last ones.

  Attributes:
    curve: the first ones, which evaluations of a run take.
    final: those behind them, or the same where there are too few.
    longest: tokens of the longest prompt.
  """

  curve: Sequence[tasks.Example]
  final: Sequence[tasks.Example]
  longest: int

  @property
  def is_shared(self) -> bool:
    return self.curve is self.final


def held_out(s: settings_lib.Rl, num_final: int) -> _HeldOut:
  """Returns the held-out examples.

  Args:
    s: the settings.
    num_final: examples for the end; 0 for as many as for the curves.
  """
  tokenizer = model_folder.load_tokenizer(
    s.model.tokenizer or s.model.path,
    model_lib.load_shape(s.model),
    revision=None if s.model.tokenizer else s.model.revision or None,
  )
  dataset = data.load_dataset(s.task, s.data, tokenizer, s.evaluate.split)
  examples = [prompt.example for prompt in dataset.prompts]
  num_curve = s.evaluate.num_examples or len(examples)
  wanted = num_final or num_curve
  curve = examples[:num_curve]
  final = examples[num_curve : num_curve + wanted]
  if len(final) < min(wanted, len(curve)) / 2:
    final = curve
  return _HeldOut(curve=curve, final=final, longest=dataset.longest)


class _Comparison:
  """One comparison, as far as its folder has it."""

  def __init__(self, asked: Asked, train_fn: TrainFn, evaluate_fn: EvaluateFn):
    self._asked = asked
    self._train_fn, self._evaluate_fn = train_fn, evaluate_fn
    s = asked.shared
    self._held_out = held_out(s, asked.final_examples)
    bucket = s.data.bucket
    self._policy = prices.of_policy(
      s.rollout.sampling,
      model_lib.load_shape(s.model),
      -(-self._held_out.longest // bucket) * bucket,
      has_adapter=s.lora is not None,
    )
    # Objective -> seconds of a train step of its calibration.
    self._calibrated: dict[str, float] = {}
    num_runs = len(asked.objectives) * asked.num_seeds
    if asked.is_sweep:
      num_runs += (
        len(asked.objectives) * len(asked.learning_rates) * asked.sweep_seeds
      )
    self._watch = Watch(num_runs)

  def run(self) -> Iterator[compare.Outcome]:
    asked = self._asked
    before_N = self._before()
    num_final = len(self._held_out.final)
    costs = {word: self._calibrate(word) for word in asked.objectives}
    num_steps = self._num_steps(costs)
    for word, count in num_steps.items():
      print(
        f"{word}: {costs[word]:.3g} {asked.budget.unit} a train step, about "
        f"{count} train steps"
      )
    rates, chosen = self._sweep(costs)
    num_steps = self._num_steps(costs)
    runs: list[compare.Run] = []
    for seed in range(asked.num_seeds):
      for word in asked.objectives:
        runs.append(self._compared(word, chosen[word], seed, num_steps[word]))
      if seed > 0:
        yield compare.Outcome(
          # Sorted as asked, whatever the order they ran in.
          runs=sorted(runs, key=lambda r: asked.objectives.index(r.objective)),
          rates=rates,
          before_N=before_N[-num_final:],
          before_curve=float(before_N[: len(self._held_out.curve)].mean()),
          budget=str(asked.budget),
          unit=asked.budget.unit,
          amount=asked.budget.amount,
          notes=self._notes(),
          command=asked.command,
        )

  def _before(self) -> np.ndarray:
    """float64 [N], grades of the model before training, curves' first."""
    held_out = self._held_out
    examples = [*held_out.curve]
    if not held_out.is_shared:
      examples += held_out.final
    return self._evaluate(
      self._asked.shared, "", examples, self._asked.work / "before"
    )

  def _evaluate(
    self,
    s: settings_lib.Rl,
    checkpoint: str,
    examples: Sequence[tasks.Example],
    folder: pathlib.Path,
  ) -> np.ndarray:
    """float64 [N], the grade of every example, kept in a folder."""
    s = dataclasses.replace(
      s, evaluate=dataclasses.replace(s.evaluate, num_examples=0)
    )
    with _aside(folder):
      result = self._evaluate_fn(s, checkpoint, str(folder), examples=examples)
    return result.grades["accuracy"]

  def _num_steps(
    self, costs: Mapping[str, float], share: float = 1.0
  ) -> dict[str, int]:
    return {
      word: self._asked.budget.num_steps(word, cost, share)
      for word, cost in costs.items()
    }

  def _calibrate(self, word: str) -> float:
    """Returns what a train step costs, in units of the budget."""
    asked = self._asked
    if asked.budget.unit == "steps":
      return 1.0
    s = asked.settings(
      word,
      f"calibration/{_folder(word)}",
      seed=_SWEEP_SEED,
      # Whatever --learning_rates are: more may be added.
      learning_rate=asked.config.optimizer.learning_rate,
      num_steps=_CALIBRATION_STEPS,
      evaluations=0,
    )
    run = self._finite(
      word,
      s,
      "Costs are measured at --config.optimizer.learning_rate: give a smaller "
      "one, and another --work.",
    )
    self._calibrated[word] = run.end.seconds / run.num_steps
    return self._costs([run])

  def _costs(self, runs: Sequence["_Trained"]) -> float:
    """Returns what a train step of these runs cost, in units of the budget."""
    if self._asked.budget.unit == "steps":
      return 1.0
    unit = self._asked.budget.unit
    return _mean([getattr(run.end, unit) / run.num_steps for run in runs])

  def _sweep(
    self, costs: dict[str, float]
  ) -> tuple[list[compare.Rate], dict[str, float]]:
    """Chooses a learning rate per objective.

    Args:
      costs: of a train step; those of the chosen runs take their place.

    Returns:
      What was tried, and the rates by objective.
    """
    asked = self._asked
    if not asked.is_sweep:
      return [], dict.fromkeys(asked.objectives, asked.rates[0])
    num_steps = self._num_steps(costs, asked.sweep_share)
    tried, chosen = [], {}
    for word in asked.objectives:
      runs = {
        rate: self._swept(word, rate, num_steps[word])
        for rate in asked.learning_rates
      }
      accuracies = {
        rate: _mean([run.end.accuracy for run in found])
        for rate, found in runs.items()
        if found
      }
      if not accuracies:
        raise errors.UserError(
          f"{word}: the loss was not finite with any of --learning_rates="
          f"{','.join(f'{rate:g}' for rate in asked.learning_rates)}. Add "
          "smaller ones, or leave the objective out."
        )
      best = chosen[word] = compare.choose(accuracies)
      costs[word] = self._costs(runs[best])
      edges = min(asked.learning_rates), max(asked.learning_rates)
      tried += [
        compare.Rate(
          objective=word,
          learning_rate=rate,
          accuracy=accuracies.get(rate, math.nan),
          is_chosen=rate == best,
          is_edge=rate in edges,
        )
        for rate in asked.learning_rates
      ]
    return tried, chosen

  def _swept(self, word: str, rate: float, num_steps: int) -> list["_Trained"]:
    """Returns the runs of a learning rate; none if one was not finite."""
    found = []
    for seed in range(self._asked.sweep_seeds):
      s = self._asked.settings(
        word,
        f"sweep/{_folder(word)}/{rate:g}-{seed}",
        seed=_SWEEP_SEED + seed,
        learning_rate=rate,
        num_steps=num_steps,
        evaluations=self._asked.evaluations,
      )
      name = f"{word}, learning rate {rate:g}"
      with self._watch.run(name, seed) as say:
        try:
          run = self._trained(word, s)
        except FloatingPointError as error:
          say(str(error).partition(":")[0])
          return []
        say(f"{100 * run.end.accuracy:.1f} %")
      found.append(run)
    return found

  def _compared(
    self, word: str, rate: float, seed: int, num_steps: int
  ) -> compare.Run:
    """Trains and evaluates one run of the comparison."""
    s = self._asked.settings(
      word,
      f"runs/{_folder(word)}/{rate:g}-{seed}",
      seed=seed,
      learning_rate=rate,
      num_steps=num_steps,
      evaluations=self._asked.evaluations,
    )
    with self._watch.run(word, seed) as say:
      trained = self._finite(
        word,
        s,
        "Give --learning_rates that are all smaller, or leave the objective "
        "out: other runs are kept.",
      )
      grade_N = self._evaluate(
        s,
        s.workdir,
        self._held_out.final,
        pathlib.Path(s.workdir) / "final",
      )
      end = trained.end
      say(
        f"{100 * grade_N.mean():.1f} %, {num_steps} train steps, "
        f"{end.passes:.1f} passes, {end.seconds:.1f} s"
      )
    return compare.Run(
      objective=word,
      learning_rate=rate,
      seed=seed,
      num_steps=num_steps,
      passes=end.passes,
      seconds=end.seconds,
      grade_N=grade_N,
      curve=trained.curve,
    )

  def _finite(self, word: str, s: settings_lib.Rl, remedy: str) -> "_Trained":
    """Trains a run that the comparison cannot do without."""
    try:
      return self._trained(word, s)
    except FloatingPointError as error:
      raise errors.UserError(
        f"{word}, learning rate {s.optimizer.learning_rate:g}, config.seed "
        f"{s.seed}, in {s.workdir}: {error}. {remedy}"
      ) from error

  def _trained(self, word: str, s: settings_lib.Rl) -> "_Trained":
    """Trains unless that is done, and reads what the run logged."""
    folder = pathlib.Path(s.workdir)
    if not is_done(s):
      with run_lib.stop_requests() as stop, _aside(folder):
        self._train_fn(s)
      if stop.signal:
        raise errors.Stopped(
          f"Stopped behind a run, which is saved in {folder}. The same command "
          "goes on with the next.",
          code=128 + stop.signal,
        )
    records = [*metrics.read(folder / "metrics.jsonl")]
    passes = np.cumsum(
      [
        prices.of_train_step(s.objective, self._policy, s.rollout.num_rows, r)
        for r in records
      ]
    )
    second, num_timed = _second(folder, records)
    if num_timed < _FEWEST_TIMED:
      second = self._calibrated.get(word, second)
    points = [
      compare.Point(
        train_step=index + 1,
        passes=float(passes[index]),
        seconds=second * (index + 1),
        accuracy=record.get("eval/accuracy", math.nan),
      )
      for index, record in enumerate(records)
    ]
    curve = tuple(p for p in points if not math.isnan(p.accuracy))
    # Its accuracy is that of the last evaluation: earlier versions may have
    # ended with train steps that were not evaluated.
    last = curve[-1].accuracy if curve else math.nan
    return _Trained(curve, dataclasses.replace(points[-1], accuracy=last))

  def _notes(self) -> list[str]:
    """Returns how it was done, a sentence each."""
    asked = self._asked
    found = [
      "A pass is one row's forward and backward pass, a forward one alone "
      f"{self._policy.read:.2f} of it; a run's passes are those of its "
      "rollouts and updates, per completion of a train step, summed over train "
      "steps. Seconds are so many median train steps: no compilation, no "
      "evaluation."
    ]
    if asked.is_sweep:
      number = asked.sweep_seeds
      seeds = (
        f"{number} seeds of their own" if number > 1 else "a seed of its own"
      )
      found.append(
        "The learning rate of each objective is that of the highest accuracy "
        f"at the end of runs with {asked.sweep_budget}, on {seeds} "
        "and on the prompts of the learning curves."
      )
    if self._held_out.is_shared:
      found.append(
        "There are too few held-out prompts for two parts: final accuracy is "
        "on those of the learning curves"
        + (", which chose the learning rates too." if asked.is_sweep else ".")
      )
    else:
      found.append(
        f"Learning curves are on {len(self._held_out.curve)} other prompts."
      )
    return found


@dataclasses.dataclass(frozen=True)
class _Trained:
  """What a run logged.

  Attributes:
    curve: its evaluations.
    end: its last train step, with the accuracy of the last evaluation.
  """

  curve: tuple[compare.Point, ...]
  end: compare.Point

  @property
  def num_steps(self) -> int:
    return self.end.train_step


def is_done(s: settings_lib.Rl) -> bool:
  """Returns whether a run has ended; one of another config is refused."""
  if not (pathlib.Path(s.workdir) / "config.json").exists():
    return False
  with run_lib.claim(s, "Give another --work, or undo the changes."):
    try:
      saved = checkpoint_named.find_train_step(s.workdir)
    except errors.UserError:
      return False  # none yet
  return saved == s.train.num_steps


@contextlib.contextmanager
def _aside(folder: pathlib.Path) -> Iterator[None]:
  """Sends what a run says to a file in its folder: there are many runs."""
  folder.mkdir(parents=True, exist_ok=True)
  with (
    (folder / "said.txt").open("a") as out,
    contextlib.redirect_stdout(out),
    contextlib.redirect_stderr(out),
  ):
    yield


def _second(
  folder: pathlib.Path, records: Sequence[Mapping[str, float]]
) -> tuple[float, int]:
  """Returns what a train step of a run takes, and how many of them tell."""
  ran = files.read_json(folder / "environment.json", "where this run ran")
  # The first of a process compiles. That of a new width of prompts does too, as
  # a few do, which a median passes over.
  compile_at = {session["first_step"] for session in ran["sessions"]}
  timed = [_seconds(r) for r in records if r["train_step"] not in compile_at]
  found = timed or [_seconds(record) for record in records]
  return float(np.median(found)), len(timed)


def _seconds(record: Mapping[str, float]) -> float:
  """Returns what a train step took, its evaluation apart."""
  return sum(
    seconds
    for name, seconds in record.items()
    if name.startswith("seconds/") and name != "seconds/evaluate"
  )


def _mean(values: Sequence[float]) -> float:
  return sum(values) / len(values)


def _folder(word: str) -> str:
  return word.replace("/", ",")


class Watch:
  """A line per run, and how long all will take.

  Args:
    num_runs: in all.
  """

  def __init__(self, num_runs: int):
    self._num_runs = num_runs
    self._num_begun = 0
    self._seconds: list[float] = []

  @contextlib.contextmanager
  def run(self, name: str, seed: int) -> Iterator[Any]:
    """Prints a line when the run ends, with what the function was told."""
    said: list[str] = []
    self._num_begun += 1
    begin = time.monotonic()
    yield said.append
    seconds = time.monotonic() - begin
    left = self._num_runs - self._num_begun
    # One that was there already takes a moment, and predicts nothing.
    if seconds > 1.0:
      self._seconds.append(seconds)
    line = f"run {self._num_begun} of {self._num_runs}: {name}, seed {seed}: "
    line += ", ".join(said)
    if left and self._seconds:
      expected = left * _mean(self._seconds)
      line += f"; about {progress.duration(expected)} left"
    print(line, flush=True)
