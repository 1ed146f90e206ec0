"""Statistics of verdicts: errors of a mean, pass@k, majority vote at k.

Where a prompt has n completions, its score at k <= n is the exact mean over all
choices of k of them (no resampling): unbiased, and without noise of its own.
"""

import collections
import dataclasses
import fractions
import functools
import math
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np

from agrpo_jax import errors


def standard_error(score_N: np.ndarray) -> float:
  """Returns the standard error of the mean over the choice of prompts.

  It is NaN for fewer than two prompts.
  """
  if score_N.size < 2:
    return float("nan")
  return float(score_N.std(ddof=1) / math.sqrt(score_N.size))


def bootstrap_interval(
  score_N: np.ndarray, *, level: float = 0.95, num_resamples: int = 10_000
) -> tuple[float, float]:
  """Returns the percentile interval of the mean over resampled prompts.

  The resamples are the same every time: equal scores, equal interval. It is NaN
  for fewer than two prompts.
  """
  if score_N.size < 2:
    return float("nan"), float("nan")
  # Importing it takes as long as all of JAX; most commands need no interval.
  from scipy import stats

  found = stats.bootstrap(
    (score_N,),
    np.mean,
    n_resamples=num_resamples,
    confidence_level=level,
    method="percentile",
    batch=500,  # all at once would be 10,000 x N numbers
    rng=0,
  ).confidence_interval
  return float(found.low), float(found.high)


def check_k(ks: Sequence[int], num_samples: int) -> None:
  """Refuses a k that the samples cannot give.

  Raises:
    UserError: naming every such k.
  """
  wrong = [k for k in ks if not 1 <= k <= num_samples]
  if wrong:
    raise errors.UserError(
      f"k={', '.join(map(str, wrong))} must be at least 1 and not larger than "
      f"the samples drawn per prompt (--num_samples={num_samples})."
    )


def pass_at_k(grade_n: np.ndarray, k: int) -> float:
  """Returns the best grade among k of a prompt's n completions, on average.

  For verdicts 0 and 1, of which c are 1, it is 1 - C(n - c, k) / C(n, k), the
  unbiased estimator of pass@k (arXiv:2107.03374).
  """
  num_samples = grade_n.size
  check_k([k], num_samples)
  # The i-th smallest is the best of C(i - 1, k - 1) choices.
  weight_n = [math.comb(i, k - 1) for i in range(num_samples)]
  total = math.comb(num_samples, k)
  return float(
    sum(w / total * x for w, x in zip(weight_n, np.sort(grade_n), strict=True))
  )


def majority_at_k(answers: Sequence[str], grade_n: np.ndarray, k: int) -> float:
  """Returns the grade of the most frequent answer among k of n, on average.

  Completions without an answer ("") do not vote; when none votes the grade is
  0. Equally frequent answers win with equal probability. The grade of an answer
  is the mean grade of the completions that gave it.
  """
  check_k([k], grade_n.size)
  counts = collections.Counter(answer for answer in answers if answer)
  num_silent = len(answers) - counts.total()
  score = 0.0
  for answer, count in counts.items():
    # In one order, for the cache: who the rivals are makes no difference.
    rivals = sorted(n for each, n in counts.items() if each != answer)
    is_answer_n = np.array([each == answer for each in answers])
    win = _win_probability(count, tuple(rivals), num_silent, k)
    score += float(win) * float(grade_n[is_answer_n].mean())
  return score


@functools.cache
def _win_probability(
  count: int, rivals: tuple[int, ...], num_silent: int, k: int
) -> fractions.Fraction:
  """Returns the chance of an answer to win among k votes drawn at random.

  Among the n completions `count` vote for the answer, `rivals` for each of the
  others, and `num_silent` do not vote. Drawing k = n leaves nothing to chance;
  for smaller k the choices with `j` votes for the answer and at most `j` for
  every rival are counted, by how many rivals tie with it.
  """
  num_votes = count + sum(rivals) + num_silent
  wins = fractions.Fraction(0)
  for j in range(1, min(count, k) + 1):
    ways = {(0, 0): 1}
    for rival in rivals:
      ways = _add_votes(ways, rival, min(rival, j), k - j, j)
    ways = _add_votes(ways, num_silent, num_silent, k - j, 0)
    for (votes, ties), number in ways.items():
      if votes == k - j:
        wins += fractions.Fraction(math.comb(count, j) * number, ties + 1)
  return wins / math.comb(num_votes, k)


def _add_votes(
  ways: dict[tuple[int, int], int],
  available: int,
  most: int,
  room: int,
  tie: int,
) -> dict[tuple[int, int], int]:
  """Returns the ways after one more rival, given those before it.

  Args:
    ways: (votes, ties) -> number of ways to choose that many votes.
    available: completions that vote for the rival.
    most: votes that it may get.
    room: votes that may be chosen in all.
    tie: votes with which it ties; 0 for none.
  """
  found: dict[tuple[int, int], int] = collections.defaultdict(int)
  for (votes, ties), number in ways.items():
    for more in range(min(most, room - votes) + 1):
      key = (votes + more, ties + (0 < more == tie))
      found[key] += number * math.comb(available, more)
  return found


@dataclasses.dataclass(frozen=True)
class Result:
  """The records of an evaluation, and the figures that follow from them.

  Attributes:
    records: a dict per completion (`evaluation.evaluate` says what is in it),
      the completions of a prompt side by side.
    num_samples: completions per prompt, n.
    seconds: wall clock, grading and compilation included.
    problems: says in words which ones they were.
  """

  records: Sequence[Mapping[str, Any]]
  num_samples: int
  seconds: float
  problems: str = ""

  @functools.cached_property
  def _grades_Nxn(self) -> dict[str, np.ndarray]:
    """name -> float64 [N, n]."""
    # A grader that failed gives no names; its completion has 0 in each.
    names = dict.fromkeys(
      ("accuracy", *(name for r in self.records for name in r["grades"]))
    )
    return {
      name: np.array(
        [r["grades"].get(name, 0.0) for r in self.records], np.float64
      ).reshape(-1, self.num_samples)
      for name in names
    }

  @property
  def grades(self) -> dict[str, np.ndarray]:
    """name -> float64 [N], the mean grade over a prompt's completions."""
    return {name: x.mean(axis=1) for name, x in self._grades_Nxn.items()}

  @property
  def accuracy(self) -> float:
    return float(self.grades["accuracy"].mean())

  @property
  def standard_error(self) -> float:
    """The standard error of the accuracy, over the choice of prompts."""
    return standard_error(self.grades["accuracy"])

  @property
  def num_disagree(self) -> int:
    """The number of completions on which strict and tolerant verdict differ."""
    strict = self._grades_Nxn["accuracy"]
    tolerant = self._grades_Nxn.get("accuracy_tolerant", strict)
    return int((strict != tolerant).sum())

  def scalars(self, prefix: str = "") -> dict[str, float]:
    """Returns every figure by name, for logs and tables."""
    found = {name: float(x.mean()) for name, x in self.grades.items()}
    if "num_blanks" in found:  # per cell of the set, not per puzzle
      found["cells_micro"] = found["num_right"] / max(1, found["num_blanks"])
    # A single prompt tells nothing of the spread over prompts.
    if len(self.records) > self.num_samples:
      found["accuracy_standard_error"] = self.standard_error
      low, high = bootstrap_interval(self.grades["accuracy"])
      found |= {"accuracy_low": low, "accuracy_high": high}
    num_tokens = sum(r["num_tokens"] for r in self.records)
    found |= {
      "num_disagree": float(self.num_disagree),
      "mean_length": self._mean("num_tokens"),
      "mean_denoise_steps": self._mean("num_executed_steps"),
      "mean_whole_passes": self._mean("num_whole_passes"),
      "seconds": self.seconds,
      "tokens_per_second": num_tokens / max(self.seconds, 1e-9),
    }
    return {prefix + name: value for name, value in found.items()}

  def _mean(self, field: str) -> float:
    return float(np.mean([record[field] for record in self.records]))

  def at_k(self, ks: Sequence[int]) -> dict[str, float]:
    """Returns pass@k and majority@k of every verdict, as `accuracy/pass_at_4`.

    There is a majority only where the task extracts answers.

    Raises:
      UserError: for a k larger than the samples.
    """
    check_k(ks, self.num_samples)
    size = self.num_samples
    answers = [record["answer"] for record in self.records]
    voters = [answers[i : i + size] for i in range(0, len(answers), size)]
    found = {}
    for name, grade_Nxn in self._grades_Nxn.items():
      if not name.startswith("accuracy"):
        continue
      for k in ks:
        found[f"{name}/pass_at_{k}"] = float(
          np.mean([pass_at_k(grade_n, k) for grade_n in grade_Nxn])
        )
        if any(answers):
          found[f"{name}/majority_at_{k}"] = float(
            np.mean(
              [
                majority_at_k(each, grade_n, k)
                for each, grade_n in zip(voters, grade_Nxn, strict=True)
              ]
            )
          )
    return found
