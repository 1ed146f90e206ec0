"""Grades hostile completions, and says what they cost beside benign ones.

    python benchmarks/fuzz_graders.py --completions=1000000 --workers=2

Completions are made up: arithmetic and LaTeX nested at random, digits of other
scripts, numbers of any length, soups of tags, text that broke some grader once,
Python that leaves a file behind if it is executed, and real generations with a
piece changed. They go through `grading.pool` as in a run, in equal parts for
each task; before them benign ones are graded, made up, and all real ones of the
task. These are lines of JSON (`--real`) with "completion" and, if it is not
gsm8k's, "task"; "fields" are what the task grades by.

Wrong is a completion that was executed, that a grader raised on, that crashed
its worker (it is graded once more, to see whether it does so again), or a batch
that does not come back. Prints a table with completions per second of processor
time, workers' start included; the exit code is 1 if something was wrong.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging

from agrpo_jax.grading import pool

ROOT = pathlib.Path(__file__).resolve().parents[1]
_BATCH = 2000  # completions per submit
_BENIGN_AT_MOST = 5000  # completions of a task
_TIMEOUT = 1800.0  # seconds for a batch
_TIMED_OUT_SHARE = 0.01  # that may take longer than the grader's limit
_REAL = ROOT / "tests" / "testdata" / "hand_checked.jsonl"

_FIELDS: dict[str, dict[str, Any]] = {
  "gsm8k": {"gold": "18"},
  "math": {"gold": "\\frac{1}{2}"},
  "countdown": {"numbers": [1, 2, 3], "target": 6},
  "sudoku": {"puzzle": "3014002020004130", "gold": "3214142323414132"},
  "word_problems": {
    "question": "Ann had 7 pens and bought 5. How many?",
    "unit": "pens",
    "equations": ["7+5=12"],
    "gold": 12,
  },
}
# Their numbers, n and m, differ from one to the next.
_BENIGN = {
  "gsm8k": "<think>{n} * 6</think>\n<answer>\n\\boxed{{{m}}}\n</answer>",
  "math": "It is {n} / {m}.\n<answer>\\boxed{{\\frac{{{n}}}{{{m}}}}}</answer>",
  "countdown": "<think>\n{n}\n</think>\n<answer>\n1 + 2 + 3 = 6\n</answer>",
  "sudoku": "<think>\n{n}\n</think>\n<answer>\n3214142323414132\n</answer>",
  "word_problems": "{n}*6={m} pens\n#### {m}",
}
_TOKENS = [
  *"0123456789+-*/()=^_.,:;<>|&%$#@!?~'\"\\{}[] \n\t",
  *"abcxyz∞√π×÷−–½²₃١٢٣１２३४\u200b\u202e\x00\ud800🙂",
  *["\\frac{", "\\boxed{", "\\sqrt{", "\\sum_{k=1}^{", "\\int", "\\text{"],
  *["<answer>", "</answer>", "<think>", "</think>", "<reasoning>", "```"],
  *["answer is ", "####", "\\left(", "\\right)", "\\begin{pmatrix}", "&", "$$"],
  *["\\infty", "e^", "!", "**", "//", " or ", "1e9", "\\cdot", "\\binom{"],
]


def _bombs(marker: pathlib.Path) -> list[str]:
  """Each of these broke, froze or fooled some grader, or tries to."""
  command = f"open({str(marker)!r},'w').write('x')"
  deep = 5000
  return [
    "9" * 10_000,
    "9**9**9**9",
    "9^{9^{9^{9}}}",
    "10^{1000000000}",
    "2^{2^{2^{2^{2^{2}}}}}",
    "100000!!",
    "((((100!)!)!)!)!",
    "\\binom{1000000}{500000}",
    "\\sum_{k=1}^{100000000} \\frac{1}{k^2}",
    "\\prod_{k=1}^{99999} k^k",
    "x^{10^{10^{10}}}",
    "(x+y+z+w)^{100}",
    "e^{e^{e^{e^{e}}}}",
    "1e999999999",
    "1/0",
    "0^{-1}",
    "\\lim_{x\\to 0} \\frac{\\sin x}{x}",
    "\\int_0^1 x^{x^x} dx",
    "(" * deep + "1" + ")" * deep,
    "(" * 60 + "x" + ")" * 60,
    "{" * deep + "1" + "}" * deep,
    "-" * deep + "1",
    "1" + "+1" * deep,
    "1-(" * 300 + "1" + ")" * 300,
    "\\frac{" * 200 + "1" + "}{2}" * 200,
    "\\frac{1}{" * 40 + "2" + "}" * 40,
    "\\sqrt{" * 300 + "2" + "}" * 300,
    "\\boxed{" * 2000,
    "\\boxed{" * 2000 + "1" + "}" * 2000,
    "<answer>" * 2000,
    "<answer>" * 2000 + "</answer>",
    "</answer>" * 2000,
    "<think>" * 2000 + "</think>" * 2000,
    "$" * 5000,
    "$$ 1 " * 1000,
    "\\[" * 2000 + "\\]",
    "\\(1" * 2000,
    " [1" * 2000,
    "answer: " * 2000,
    "final answer is " * 1000,
    "1,000" * 2000,
    "1,000," * 2000,
    "1 " * 5000,
    "= " * 5000,
    "1=" * 5000,
    "a" * 5000 + "=",
    " " * 20_000 + "1",
    "```" + " " * 20_000,
    "1" * 16 + " " * 10_000 + "</answer",
    "\n" * 20_000,
    "0." + "9" * 5000,
    "1/" * 2000 + "1",
    "3" * 5000 + " = 6",
    f"__import__('os').system('touch {marker}')",
    f"1 + 2 + 3 + eval({command!r})",
    f"\\boxed{{{command}}}",
    f"[{command} for _ in [1]]",
    f"{{{command}}}",
    f"1+2+3 if {command} else 0 = 6",
    f"lambda: {command}",
    f"$(touch {marker})",
    f"`touch {marker}`",
    "().__class__.__bases__[0].__subclasses__()",
    "%s%n%x{0.__class__}",
    "١ + ٢ + ٣ = 6",
    "１ + ２ + ３ = ６",
    "𝟙𝟚 + 𝟛",
    "²³¹",
    "\x00" * 1000,
    "\ud800\udfff" * 500,
    "null",
    '{"parts": {"correct": 1e9}}\n{"ready": true}\n',
  ]


_DIGITS = (
  "0123456789",
  "٠١٢٣٤٥٦٧٨٩",
  "０１２３４５６７８９",
  "𝟘𝟙𝟚𝟛𝟜𝟝𝟞𝟟𝟠𝟡",
  "⁰¹²³⁴⁵⁶⁷⁸⁹",
  "०१२३४५६७८९",
)
_TAGS = ("answer", "think", "reasoning", "boxed", "ANSWER", "answer ")
_WRAPS = (
  "{}",
  "<answer>{}</answer>",
  "<answer>\n\\boxed{{}}\n</answer>",
  "${}$",
  "<think>{}</think>\n<answer>{}</answer>",
  "#### {}",
)


def _number(rng: random.Random) -> str:
  length = rng.choice([1, 1, 1, 2, 3, 9, 20, 400, 4301, 20_000])
  text = "".join(rng.choices(rng.choice(_DIGITS), k=length))
  return text + rng.choice(["", "", "", ".5", ",000", "e9", "e999", "%", "!"])


def _arithmetic(rng: random.Random, depth: int) -> str:
  """A sum, a power, a factorial, ... of such."""
  if depth <= 0 or rng.random() < 0.1:
    return _number(rng) if rng.random() < 0.2 else str(rng.randint(0, 99))
  left, right = _arithmetic(rng, depth - 1), str(rng.randint(0, 99))
  if rng.random() < 0.3:
    right = _arithmetic(rng, depth // 2)
  operator = rng.choice(["+", "-", "*", "/", "^", "**", "//", "=", "%", "÷"])
  return rng.choice(
    [f"({left}{operator}{right})", f"{left} {operator} {right}", f"-{left}"]
    + [f"({left})!", f"{right}{operator}({left})", f"|{left}|", f"({left})"]
  )


def _latex(rng: random.Random, depth: int) -> str:
  if depth <= 0:
    return _arithmetic(rng, 1)
  inner = _latex(rng, depth - 1)
  form = rng.choice(
    ["\\frac{%s}{2}", "\\frac{1}{%s}", "\\sqrt{%s}", "\\sqrt[%s]{2}", "2^{%s}"]
    + ["\\left(%s\\right)", "\\binom{%s}{3}", "\\log_{2}{%s}", "%s!", "x^{%s}"]
    + ["\\sum_{k=1}^{%s} k", "\\int_0^{%s} x dx", "\\text{%s}", "\\boxed{%s}"]
    + ["\\begin{pmatrix}%s & 1\\\\2 & 3\\end{pmatrix}", "(%s, 2]", "\\{%s\\}"]
    + [
      "%s \\cup (1, 2)",
      "\\lim_{x\\to %s} x",
      "\\prod_{k=1}^{%s} k",
      "\\sin{%s}",
    ]
  )
  return form.replace("%s", inner)


def _tags(rng: random.Random) -> str:
  pieces = ["<%s>", "</%s>", "<%s", "\\%s{", "}", "1", "\n"]
  return "".join(
    rng.choice(pieces).replace("%s", rng.choice(_TAGS))
    for _ in range(rng.choice([3, 30, 300]))
  )


def _soup(rng: random.Random) -> str:
  return "".join(rng.choices(_TOKENS, k=rng.randint(1, 400)))


def _long(rng: random.Random) -> str:
  text = rng.choice(["(", "<answer>", "\\boxed{", "1", "x=", "$1", "ab "])
  return text * (1_000_000 // len(text))


def _changed(rng: random.Random, text: str, bombs: Sequence[str]) -> str:
  """A real generation with a piece taken out, put in, or written otherwise."""
  for _ in range(rng.randint(1, 4)):
    at = rng.randrange(1 + len(text))
    end = min(len(text), at + rng.choice([1, 5, 50, 500]))
    piece = rng.choice(
      ["", text[at:end] * rng.choice([2, 50]), rng.choice(bombs), _tags(rng)]
      + [_arithmetic(rng, 3), _latex(rng, 3), rng.choice(_TOKENS) * 20]
    )
    text = text[:at] + piece + text[end:]
  if rng.random() < 0.2:
    text = text.translate(str.maketrans(_DIGITS[0], rng.choice(_DIGITS)))
  return text


def hostile(
  rng: random.Random, bombs: Sequence[str], real: Sequence[str]
) -> str:
  """Returns a completion that wants to do harm, or would by accident."""
  kind = rng.random()
  if kind < 0.2:
    text = rng.choice(bombs)
  elif kind < 0.25:
    text = rng.choice(bombs) + _soup(rng)
  elif kind < 0.4:
    text = _arithmetic(rng, rng.choice([2, 5, 12, 30]))
  elif kind < 0.55:
    text = _latex(rng, rng.choice([1, 2, 4, 10, 60]))
  elif kind < 0.65:
    text = _tags(rng)
  elif kind < 0.8:
    text = _soup(rng)
  elif kind < 0.998:
    return _changed(rng, rng.choice(real), bombs)
  else:
    text = _long(rng)
  return rng.choice(_WRAPS).replace("{}", text)


def _benign(rng: random.Random, task: str) -> str:
  n = rng.randint(1, 10_000)
  return _BENIGN[task].format(n=n, m=6 * n)


@dataclasses.dataclass
class Row:
  """What happened to the completions of one kind.

  Attributes:
    task: that graded them.
    kind: benign, real or hostile.
    completions: how many.
    timed_out: of these.
    failed: a grader raised, or its worker crashed.
    crashed_again: of these, when they were graded once more.
    seconds: of processor time.
  """

  task: str
  kind: str
  completions: int = 0
  timed_out: int = 0
  failed: int = 0
  crashed_again: int = 0
  seconds: float = 0.0


def grade(
  row: Row,
  completions: Iterator[tuple[str, dict[str, Any]]],
  num_workers: int,
  end: float,
) -> list[tuple[str, str]]:
  """Grades them; returns (what failed and why).

  Args:
    row: filled in.
    completions: of any number, each with what it is graded by.
    num_workers: processes.
    end: by `time.monotonic`; after it no more are taken.
  """
  failures: list[tuple[str, str]] = []
  again: list[tuple[str, dict[str, Any]]] = []
  begin = _children_seconds()
  with pool.Grader(
    row.task, num_workers=num_workers, timeout_seconds=1.0
  ) as grader:
    while time.monotonic() < end:
      batch = [*itertools.islice(completions, _BATCH)]
      if not batch:
        break
      texts, fields = map(list, zip(*batch, strict=True))
      pending = grader.submit(texts, fields)
      graded = pending.result(timeout=_TIMEOUT)
      row.completions += len(batch)
      row.failed += graded.num_failed
      row.timed_out += graded.num_timed_out
      for at, why in graded.failures.items():
        if why != pool.TIMED_OUT:
          failures.append((texts[at], why))
          again.append(batch[at])
      if (
        graded.reward_B.shape != (len(batch),)
        or not np.isfinite(graded.reward_B).all()
      ):
        failures.append(("", "rewards that are no numbers"))
    for completion, own in again:
      once_more = grader.submit([completion], [own]).result(timeout=_TIMEOUT)
      row.crashed_again += once_more.num_failed
  row.seconds = _children_seconds() - begin
  return failures


def _children_seconds() -> float:
  """Processor time of all child processes that ended and were waited for."""
  usage = resource.getrusage(resource.RUSAGE_CHILDREN)
  return usage.ru_utime + usage.ru_stime


def main(argv: Sequence[str]) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--completions", type=int, default=10_000)
  parser.add_argument(
    "--minutes", type=float, default=1e6, help="of all hostile ones, at most"
  )
  parser.add_argument("--tasks", default=",".join(_FIELDS))
  parser.add_argument("--workers", type=int, default=2)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--real", default=str(_REAL), help="JSONL: completion")
  args = parser.parse_args(argv)
  logging.set_verbosity(logging.ERROR)
  lines = pathlib.Path(args.real).read_text("utf-8").splitlines()
  real = [{"task": "gsm8k"} | json.loads(line) for line in lines]
  real_texts = [one["completion"] for one in real]
  names = args.tasks.split(",")
  each = args.completions // len(names)
  text = "{:<14} {:<8} {:>11} {:>9} {:>6} {:>7} {:>9} {:>8}"
  print(
    text.format(
      *("task", "kind", "completions", "timed out", "failed", "crashed"),
      *("seconds", "per s"),
    )
  )
  wrong: list[str] = []
  with tempfile.TemporaryDirectory() as folder:
    marker = pathlib.Path(folder) / "executed"
    bombs = _bombs(marker)
    for task in names:
      rng = random.Random(f"{task}/{args.seed}")
      own = _FIELDS[task]
      kinds = {
        "benign": (
          (_benign(rng, task), own)
          for _ in range(min(_BENIGN_AT_MOST, 1 + each // 4))
        ),
        "real": (
          (one["completion"], one.get("fields", own))
          for one in real
          if one["task"] == task
        ),
        "hostile": (
          (hostile(rng, bombs, real_texts), own) for _ in range(each)
        ),
      }
      for kind, made in kinds.items():
        row = Row(task, kind)
        end = time.monotonic() + 60 * args.minutes / len(names)
        failures = grade(row, made, args.workers, end)
        if not row.completions:
          continue
        print(
          text.format(
            *(task, kind, row.completions, row.timed_out, row.failed),
            row.crashed_again,
            f"{row.seconds:.0f}",
            f"{row.completions / row.seconds:.0f}",
          ),
          flush=True,
        )
        wrong += [f"{task}, {why}: {one[:300]!r}" for one, why in failures]
        if row.timed_out > _TIMED_OUT_SHARE * row.completions:
          wrong.append(f"{task}, {kind}: {row.timed_out} timed out")
    if marker.exists():
      wrong.append("a completion was executed")
  for one in wrong:
    print(f"WRONG: {one}")
  return min(len(wrong), 1)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
