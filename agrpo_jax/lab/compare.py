"""Which objectives differ: statistics, tables and the figure of `lab train`.

All objectives have the same seeds, and their runs are asked the same held-out
prompts. So two of them are compared by differences, seed by seed and prompt by
prompt, and what both have in common drops out. How far a mean difference may
be off is told by a bootstrap that resamples the seeds, and then the prompts:
those are the same for all seeds, and one choice of prompts is made for all.
"""

import csv
import dataclasses
import importlib.util
import itertools
import math
import pathlib
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

_LEVEL = 0.95
_NUM_RESAMPLES = 10_000


@dataclasses.dataclass(frozen=True)
class Point:
  """A point of a learning curve.

  Attributes:
    train_step: train steps done.
    passes: paid by then, per completion of a train step.
    seconds: rollout, grading and update by then.
    accuracy: held-out, in [0, 1].
  """

  train_step: int
  passes: float
  seconds: float
  accuracy: float


@dataclasses.dataclass(frozen=True)
class Run:
  """A run of the comparison.

  Attributes:
    objective: OBJECTIVE/SETTING=VALUE/...
    learning_rate: its highest.
    seed: of prompts, draws and adapters.
    num_steps: train steps.
    passes: paid in all, per completion of a train step.
    seconds: rollout, grading and update, without compilation.
    grade_N: float64 [N], of every held-out prompt, after training.
    curve: evaluations on the way, on other prompts where there are enough.
  """

  objective: str
  learning_rate: float
  seed: int
  num_steps: int
  passes: float
  seconds: float
  grade_N: np.ndarray
  curve: tuple[Point, ...]

  @property
  def accuracy(self) -> float:
    return float(self.grade_N.mean())


@dataclasses.dataclass(frozen=True)
class Rate:
  """A learning rate that was tried.

  Attributes:
    objective: OBJECTIVE/SETTING=VALUE/...
    learning_rate: the highest of the schedule.
    accuracy: at the end of its runs, on the prompts of the learning curves;
      NaN if a loss was not finite.
    is_chosen: whether the comparison takes it.
    is_edge: whether it is the smallest or the largest that was tried.
  """

  objective: str
  learning_rate: float
  accuracy: float
  is_chosen: bool
  is_edge: bool


@dataclasses.dataclass(frozen=True)
class Pair:
  """How two objectives differ in final accuracy.

  Attributes:
    first: the better one on average.
    second: the other.
    difference: first minus second, in [0, 1].
    low, high: its 95 % interval by bootstrap.
    won: share of resamples in which the first is better; ties count half.
    p: two-sided, the larger of that of the same resamples and of Student's t
      over the seeds: few of these, drawn again, vary too little.
    p_holm: adjusted for the number of pairs.
    low_seeds, high_seeds: the 95 % interval by Student's t over the seeds.
  """

  first: str
  second: str
  difference: float
  low: float
  high: float
  won: float
  p: float
  p_holm: float
  low_seeds: float
  high_seeds: float

  @property
  def differs(self) -> bool:
    """Whether they do, however many pairs were looked at."""
    return self.p_holm < 1 - _LEVEL and self.excludes_zero

  @property
  def excludes_zero(self) -> bool:
    """Whether both intervals do."""
    low = min(self.low, self.low_seeds)
    return low > 0 or max(self.high, self.high_seeds) < 0


@dataclasses.dataclass(frozen=True)
class Outcome:
  """All that a comparison found.

  Attributes:
    runs: every objective with every seed.
    rates: the learning rates tried; none without a sweep.
    before_N: float64 [N], grades of the held-out prompts before training.
    before_curve: accuracy before training on the prompts of the curves.
    budget: in words, such as "900 passes".
    unit: what it is counted in: passes, seconds or steps.
    amount: of it.
    notes: sentences on how it was done.
    command: the command line.
  """

  runs: Sequence[Run]
  rates: Sequence[Rate]
  before_N: np.ndarray
  before_curve: float
  budget: str
  unit: str
  amount: float
  notes: Sequence[str]
  command: str

  @property
  def objectives(self) -> list[str]:
    return list(dict.fromkeys(run.objective for run in self.runs))

  def of(self, objective: str) -> list[Run]:
    """Returns the runs of an objective, in the order of their seeds."""
    found = [run for run in self.runs if run.objective == objective]
    return sorted(found, key=lambda run: run.seed)

  def pairs(self) -> list[Pair]:
    """Returns every pair of objectives."""
    return pairs(
      {
        word: np.stack([run.grade_N for run in self.of(word)])
        for word in self.objectives
      }
    )


def half_width(values: np.ndarray) -> float:
  """Half of the 95 % interval of a mean, Student's t; NaN for one value."""
  if len(values) < 2:
    return math.nan
  quantile = stats.t.ppf((1 + _LEVEL) / 2, len(values) - 1)
  return float(stats.sem(values) * quantile)


def pairs(
  grades: Mapping[str, np.ndarray], num_resamples: int = _NUM_RESAMPLES
) -> list[Pair]:
  """Compares every two objectives; the resamples are the same for all.

  Args:
    grades: objective -> float64 [S, N], of N prompts after training with each
      of S seeds.
    num_resamples: of the bootstrap.
  """
  first_SxN = next(iter(grades.values()))
  num_seeds, num_prompts = first_SxN.shape
  rng = np.random.default_rng(0)
  # How often each seed, and each prompt, is drawn: weights of a mean.
  seeds_RxS = _shares(rng, num_seeds, num_resamples)
  prompts_RxN = _shares(rng, num_prompts, num_resamples)
  found = []
  for one, other in itertools.combinations(grades, 2):
    difference_SxN = grades[one] - grades[other]
    if difference_SxN.mean() < 0:
      one, other, difference_SxN = other, one, -difference_SxN
    mean_R = ((seeds_RxS @ difference_SxN) * prompts_RxN).sum(axis=1)
    # What cancels leaves rounding, which is no victory.
    mean_R = mean_R.round(12)
    low, high = np.quantile(mean_R, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    # The sample itself counts as a resample: p is never 0.
    fewest = 1 + min((mean_R <= 0).sum(), (mean_R >= 0).sum())
    mean_S = difference_SxN.mean(axis=1)
    width = half_width(mean_S)
    found.append(
      Pair(
        first=one,
        second=other,
        difference=float(mean_S.mean()),
        low=float(low),
        high=float(high),
        won=float((mean_R > 0).mean() + (mean_R == 0).mean() / 2),
        p=max(min(1.0, 2.0 * fewest / (num_resamples + 1)), _student(mean_S)),
        p_holm=math.nan,
        low_seeds=float(mean_S.mean() - width),
        high_seeds=float(mean_S.mean() + width),
      )
    )
  adjusted = holm([pair.p for pair in found])
  return [
    dataclasses.replace(pair, p_holm=p)
    for pair, p in zip(found, adjusted, strict=True)
  ]


def _student(values: np.ndarray) -> float:
  """Two-sided p of a mean of 0, Student's t; 1 for one value."""
  mean = abs(values.mean())
  if len(values) < 2 or mean == 0:
    return 1.0
  error = stats.sem(values)
  ratio = mean / error if error else math.inf
  return float(2 * stats.t.sf(ratio, len(values) - 1))


def _shares(
  rng: np.random.Generator, size: int, num_resamples: int
) -> np.ndarray:
  """float64 [R, size], rows that sum to 1: drawn with replacement."""
  return rng.multinomial(size, np.full(size, 1 / size), num_resamples) / size


def holm(ps: Sequence[float]) -> list[float]:
  """Returns p-values adjusted for their number (Holm 1979).

  Of m, the i-th smallest is multiplied by m - i + 1, and none is smaller than
  the adjusted ones before it: those below 0.05 are all right together with a
  chance of 95 %.
  """
  adjusted = [0.0] * len(ps)
  largest = 0.0
  for rank, index in enumerate(np.argsort(ps, kind="stable")):
    largest = max(largest, min(1.0, (len(ps) - rank) * ps[index]))
    adjusted[index] = largest
  return adjusted


def choose(accuracies: Mapping[float, float]) -> float:
  """Returns the learning rate of the highest accuracy; of equals the least."""
  return max(sorted(accuracies), key=lambda rate: accuracies[rate])


def write(outcome: Outcome, folder: pathlib.Path) -> None:
  """Writes the tables, the report, and the figure where matplotlib is."""
  found = outcome.pairs()
  folder.mkdir(parents=True, exist_ok=True)
  _write_csv(
    folder / "train.csv",
    [
      {
        "objective": run.objective,
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        "num_steps": run.num_steps,
        "passes": run.passes,
        "seconds": run.seconds,
        "accuracy": run.accuracy,
      }
      for run in outcome.runs
    ],
  )
  _write_csv(
    folder / "curves.csv",
    [
      {
        "objective": run.objective,
        "seed": run.seed,
        **dataclasses.asdict(point),
      }
      for run in outcome.runs
      for point in run.curve
    ],
  )
  _write_csv(folder / "pairs.csv", [dataclasses.asdict(p) for p in found])
  if outcome.rates:
    _write_csv(
      folder / "rates.csv", [dataclasses.asdict(r) for r in outcome.rates]
    )
  (folder / "train.md").write_text(report(outcome, found), "utf-8")
  if importlib.util.find_spec("matplotlib") is None:
    print("No figure without matplotlib: pip install 'agrpo_jax[plot]'")
    return
  _plot(outcome, folder / "train.png")


def _write_csv(file: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
  with file.open("w", newline="") as opened:
    writer = csv.DictWriter(opened, rows[0])
    writer.writeheader()
    writer.writerows(rows)


def report(outcome: Outcome, found: Sequence[Pair]) -> str:
  """Returns the table and what follows from it, as Markdown."""
  num_seeds = len({run.seed for run in outcome.runs})
  lines = [
    "# Objectives at equal compute",
    "",
    f"    {outcome.command}",
    "",
    f"Every run has a budget of {outcome.budget}. Accuracy after training, on "
    f"{len(outcome.before_N)} held-out prompts: the mean over {num_seeds} "
    "seeds and the half width of its 95 % interval (Student's t). Before "
    f"training it is {_percent(outcome.before_N.mean())}.",
    "",
    *outcome.notes,
    "",
    "| objective | learning rate | train steps | passes | seconds | accuracy |",
    "|---|---|---|---|---|---|",
  ]
  edges = {
    rate.objective: rate.is_edge for rate in outcome.rates if rate.is_chosen
  }
  for word in ranked(outcome):
    runs = outcome.of(word)
    accuracy_S = np.array([run.accuracy for run in runs])
    passes, seconds = (
      np.mean([getattr(run, name) for run in runs])
      for name in ("passes", "seconds")
    )
    lines.append(
      f"| `{word}` | {runs[0].learning_rate:g}"
      f"{' (edge)' if edges.get(word) else ''} | {runs[0].num_steps} | "
      f"{passes:.1f} | {seconds:.1f} | {_percent(accuracy_S.mean())} ± "
      f"{100 * half_width(accuracy_S):.1f} |"
    )
  lines += ["", *_equality(outcome), "", *_verdicts(found)]
  if outcome.rates:
    lines += ["", *_rates(outcome)]
  return "\n".join([*lines, "", "![learning curves](train.png)", ""])


def ranked(outcome: Outcome) -> list[str]:
  """Returns the objectives, the most accurate first."""
  return sorted(
    outcome.objectives,
    key=lambda word: -np.mean([run.accuracy for run in outcome.of(word)]),
  )


def _percent(share: float) -> str:
  return f"{100 * share:.1f} %"


def _equality(outcome: Outcome) -> list[str]:
  """Says whether the runs paid the same."""
  if outcome.unit == "steps":
    return [
      "The budget is one of train steps, which cost different amounts: the "
      "compute of the objectives is not equal."
    ]
  paid = [getattr(run, outcome.unit) / outcome.amount for run in outcome.runs]
  return [
    f"What the runs paid is {_percent(min(paid))} to {_percent(max(paid))} of "
    "the budget."
  ]


def _verdicts(found: Sequence[Pair]) -> list[str]:
  """Says which pairs differ and which do not."""
  differ = [pair for pair in found if pair.differs]
  maybe = [pair for pair in found if pair.excludes_zero and not pair.differs]
  rest = [pair for pair in found if not pair.excludes_zero]
  lines = [
    f"Paired differences, {_NUM_RESAMPLES:,} resamples of seeds and prompts. "
    f"Of {len(found)} pairs {len(differ)} differ (Holm's p < 0.05, both 95 % "
    "intervals exclude 0)" + (":" if differ else "."),
    "",
    *(_line(pair) for pair in differ),
  ]
  if maybe:
    lines += [
      "",
      "The intervals of these exclude 0 too, which among so many pairs may be "
      "chance:",
      "",
      *(_line(pair) for pair in maybe),
    ]
  if rest:
    listed = ", ".join(f"`{pair.first}` and `{pair.second}`" for pair in rest)
    lines += ["", f"No difference was found between {listed}."]
  lines += [
    "",
    "A few seeds, drawn again and again, vary less than new ones would: so p "
    "is the larger of the bootstrap's and of Student's t over the seeds.",
  ]
  return lines


def _line(pair: Pair) -> str:
  return (
    f"* `{pair.first}` over `{pair.second}`: {100 * pair.difference:+.1f} "
    f"points ({100 * pair.low_seeds:.1f} to {100 * pair.high_seeds:.1f} by "
    "Student's t over the seeds, "
    f"{100 * pair.low:.1f} to {100 * pair.high:.1f} by bootstrap), won "
    f"{_percent(pair.won)} of resamples, Holm's p {pair.p_holm:.2g}"
  )


def _rates(outcome: Outcome) -> list[str]:
  """A table of the learning rates that were tried."""
  rates = sorted({rate.learning_rate for rate in outcome.rates})
  lines = [
    "Accuracy at the end of the runs that chose the learning rate:",
    "",
    "| objective | " + " | ".join(f"{rate:g}" for rate in rates) + " |",
    "|---|" + "---|" * len(rates),
  ]
  for word in ranked(outcome):
    tried = {r.learning_rate: r for r in outcome.rates if r.objective == word}
    cells = [_cell(tried[rate]) for rate in rates]
    lines.append(f"| `{word}` | " + " | ".join(cells) + " |")
  return lines


def _cell(rate: Rate) -> str:
  if math.isnan(rate.accuracy):
    return "not finite"
  found = _percent(rate.accuracy)
  return f"**{found}**" if rate.is_chosen else found


def _plot(outcome: Outcome, file: pathlib.Path) -> None:
  """Curves with 95 % bands over the seeds, and final accuracies."""
  import matplotlib.figure

  figure = matplotlib.figure.Figure(figsize=(17, 6), layout="constrained")
  by_pass, by_second, final = figure.subplots(1, 3)
  words = ranked(outcome)
  for number, word in enumerate(words):
    runs = outcome.of(word)
    color = f"C{number % 10}"
    style = "-" if number < 10 else "--"
    accuracy_SxE = np.array(
      [[100 * p.accuracy for p in run.curve] for run in runs]
    )
    mean_E = accuracy_SxE.mean(axis=0)
    width_E = np.array([half_width(x) for x in accuracy_SxE.T])
    for axes, name in ((by_pass, "passes"), (by_second, "seconds")):
      x_E = np.mean(
        [[getattr(p, name) for p in run.curve] for run in runs], axis=0
      )
      # All start from the same model.
      x = [0.0, *x_E]
      y = [100 * outcome.before_curve, *mean_E]
      axes.plot(x, y, style, color=color, label=word)
      axes.fill_between(
        x_E, mean_E - width_E, mean_E + width_E, color=color, alpha=0.12
      )
    right_S = np.array([100 * run.accuracy for run in runs])
    final.errorbar(
      right_S.mean(), -number, xerr=half_width(right_S), fmt="o", color=color
    )
    final.plot(right_S, [-number - 0.2] * len(right_S), ".", color=color)
  final.axvline(100 * outcome.before_N.mean(), color="gray", linestyle=":")
  final.set_yticks([-i for i in range(len(words))], words, fontsize=8)
  by_pass.set(
    xlabel="passes per completion of a train step",
    ylabel="held-out accuracy, %",
    title="Learning curves, 95 % over seeds",
  )
  by_second.set(xlabel="seconds of rollout, grading and update")
  final.set(
    xlabel="held-out accuracy, %",
    title=f"After {outcome.budget}; dots: seeds; dotted: before",
  )
  by_pass.legend(fontsize=7)
  figure.savefig(file, dpi=110)
