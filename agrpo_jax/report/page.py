"""Runs as one HTML page that needs nothing but a browser.

The page's looks and behaviour are in page.html, page.css and page.js; here it
gets its data, as JSON that no browser takes for anything else: what a model
wrote is in no other place, and the script only ever makes text of it.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import datetime
import hashlib
import html
import itertools
import json
import math
import pathlib
import re
import sys
from collections import Counter
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import agrpo_jax
from agrpo_jax import errors
from agrpo_jax.parallel import processes
from agrpo_jax.plan import chips
from agrpo_jax.report import figures
from agrpo_jax.report import logs
from agrpo_jax.report import rules
from agrpo_jax.report import series
from agrpo_jax.runs import files
from agrpo_jax.runs import progress
from agrpo_jax.runs import run as run_lib
from agrpo_jax.show import text as text_lib

_FOLDER = pathlib.Path(__file__).parent
_START = "--checkpoint"  # among the settings, with whose weights a run began

# What a page holds at most, of each run.
MAX_METRICS = 150
MAX_PROBLEMS = 40
MAX_VERSIONS = 6  # of a held-out problem; of several runs' first and last
MAX_OTHERS = 80  # completions of training, and as many that failed; of all runs
MAX_CHARS = 6000  # of a prompt or a completion
MAX_PIECES = 2048  # tokens of a completion that is played


@dataclasses.dataclass(frozen=True)
class Chart:
  """A chart of some metrics.

  Attributes:
    title: of the chart.
    lines: metric -> what its line is called; the first says most.
    section: heading that it stands under.
    note: what is drawn, where the title does not say it.
    form: "number", "percent" (values are shares), "seconds", "log".
  """

  title: str
  lines: Mapping[str, str]
  section: str
  note: str = ""
  form: str = "number"


# Metrics that stand in no log, and are made here.
TOKENS, MFU, FLOPS = "tokens_per_second", "mfu", "model_tflops_per_second"

CHARTS = (
  Chart("Reward", {"reward": "mean"}, "Learning", "mean of a train step"),
  Chart(
    "Accuracy",
    {"eval/accuracy": "held out", "accuracy": "training"},
    "Learning",
    "held out with its 95 % interval",
    form="percent",
  ),
  Chart(
    "Groups without spread",
    {"frac_reward_zero_std": "share"},
    "Policy",
    "nothing is learned from them",
    form="percent",
  ),
  Chart("Entropy", {"entropy": "entropy"}, "Policy", "nats per token drawn"),
  Chart("KL", {"kl": "KL"}, "Policy", "nats, from the reference policy"),
  Chart(
    "Ratio deviation",
    {"policy_ratio/max_deviation": "largest"},
    "Policy",
    "|ratio − 1| on the first update",
    form="log",
  ),
  Chart(
    "Clipped",
    {"clip_ratio/high_mean": "above", "clip_ratio/low_mean": "below"},
    "Policy",
    "share of the factors",
    form="percent",
  ),
  Chart("Gradient norm", {"grad_norm": "norm"}, "Policy", "before clipping"),
  Chart("Learning rate", {"learning_rate": "rate"}, "Policy", "last update"),
  Chart("Loss", {"loss": "loss"}, "Policy", "a surrogate: no level to reach"),
  Chart(
    "Completion length",
    {"completions/mean_length": "mean", "completions/max_length": "longest"},
    "Completions",
    "tokens up to the last that is not EOS",
  ),
  Chart(
    "Cut at the limit",
    {"completions/clipped_ratio": "share"},
    "Completions",
    "share of completions without EOS",
    form="percent",
  ),
  Chart(
    "Denoising steps",
    {"completions/mean_denoise_steps": "mean"},
    "Completions",
    "mean per completion",
  ),
  Chart(
    "Not graded",
    {"grading/num_failed": "failed", "grading/num_timed_out": "out of time"},
    "Completions",
    "completions per train step; what is not decided counts as 0",
  ),
  Chart(
    "Tokens per second",
    {TOKENS: "tokens/s"},
    "Speed",
    "of completions; evaluation left out",
  ),
  Chart(
    "MFU",
    {MFU: "MFU"},
    "Speed",
    "model FLOP/s of the chips' bfloat16 peak",
    form="percent",
  ),
  Chart(
    "Model TFLOP/s",
    {FLOPS: "TFLOP/s"},
    "Speed",
    "of all devices together",
  ),
)
# Why a chart may have nothing to show.
_ABSENT = {
  "kl": "the objective has no reference policy",
  "eval/accuracy": "the run does not evaluate (evaluate.every)",
  MFU: "the device is not in plan/chips.py, or the run is older than this page",
}


def write(
  workdirs: Sequence[str],
  file: pathlib.Path,
  *,
  price: float = 0.0,
  seconds: float = 0.0,
) -> list[logs.Log]:
  """Writes the page of one run or of several, and returns their logs.

  Args:
    workdirs: of the runs.
    file: the page; until all is written it is what it was.
    price: of a chip hour; 0: that of the runs' configs.
    seconds: an open page reads itself again so often, until all runs have
      ended; 0: never.

  Raises:
    UserError: a folder that holds no run, or not what a run writes, or a page
      that cannot be written.
  """
  read = [
    dataclasses.replace(logs.read(workdir), name=name)
    for workdir, name in zip(workdirs, _names(workdirs), strict=True)
  ]
  content = render(read, price=price, seconds=seconds).encode()
  try:
    # `--watch` and the run itself may write it at once.
    with files.rewrite(file, is_shared=True) as opened:
      opened.write(content)
  except OSError as error:
    raise errors.UserError(
      f"Cannot write --html={str(file)!r}: {error.strerror}."
    ) from error
  return read


@contextlib.contextmanager
def at_end(
  settings: run_lib.Settings, claimed: run_lib.Claim
) -> Iterator[None]:
  """Writes `report.html` into the work directory when a run ends or fails.

  A start that is refused leaves the page of the run that is there. What goes
  wrong with the page costs the run nothing.
  """
  try:
    yield
  finally:
    folder = claimed.folder
    if settings.report.html and claimed.is_running and processes.is_main():
      try:
        write([str(folder)], folder / "report.html")
        progress.say(f"Wrote {folder / 'report.html'}; open it in a browser.")
      except Exception as error:
        progress.say(
          f"The report of {folder} could not be written ({error}). `python -m "
          f"agrpo_jax.report {folder}` tries again.",
          sys.stderr,
        )


def render(
  read: Sequence[logs.Log], *, price: float = 0.0, seconds: float = 0.0
) -> str:
  """Returns the page's HTML.

  Raises:
    UserError: naming a run whose files hold what no run writes.
  """
  title = ", ".join(log.name for log in read)
  style = (_FOLDER / "page.css").read_text("utf-8")
  script = (_FOLDER / "page.js").read_text("utf-8")
  runs, configs = [], []
  for log in read:
    try:
      runs.append(_run(log, price, len(read)))
      configs.append(_flat(log.config))
      if log.start:
        configs[-1] |= _flat("{run}:{train_step}".format(**log.start), _START)
      embed(runs[-1])  # which refuses NaN
    except Exception as error:  # as many kinds as there are values to misuse
      raise errors.UserError(
        f"The work directory of {log.name!r} holds what no run writes "
        f"({type(error).__name__}: {error}). Copy it again, or leave it out."
      ) from error
  content = {
    "title": title,
    "written": datetime.datetime.now(datetime.UTC).isoformat(" ", "minutes")[
      :16
    ],
    "version": agrpo_jax.__version__,
    "seconds": 0 if all(log.has_ended for log in read) else seconds,
    "charts": [dataclasses.asdict(chart) for chart in _charts(runs)],
    "absent": _ABSENT,
    "runs": runs,
    "settings": _settings(configs),
  }
  values = {
    "TITLE": html.escape(title),
    "STYLE": style,
    "SCRIPT": script,
    "DATA": embed(content),
    # Nothing else runs or paints, whatever found its way into the page.
    "STYLE_HASH": _hash(style),
    "SCRIPT_HASH": _hash(script),
  }
  # In one pass: a value that contains a place's name is left as it is.
  return re.sub(
    "@@([A-Z_]+)@@",
    lambda match: values[match.group(1)],
    (_FOLDER / "page.html").read_text("utf-8"),
  )


def _charts(runs: Sequence[Mapping[str, Any]]) -> list[Chart]:
  """Returns the charts that runs like these have."""
  there = {name for run in runs for name in run["series"]}
  # FLOP/s are for those that have no MFU.
  left_out = {FLOPS} if MFU in there else set()
  charts = [chart for chart in CHARTS if not left_out & chart.lines.keys()]
  kinds = {run["kind"] for run in runs}
  if kinds == {"rl"}:
    return charts
  # What fine-tuning is about is its loss.
  note = "mean of a train step"
  if "rl" in kinds:
    note += "; of RL a surrogate: no level to reach"
  else:  # it has a few of them
    charts = [chart for chart in charts if chart.lines.keys() & there]
  loss = Chart("Loss", {"loss": "loss"}, "Learning", note)
  return [loss, *(chart for chart in charts if "loss" not in chart.lines)]


def embed(content: Any) -> str:
  """Returns JSON that stands in a script element and cannot end it."""
  text = json.dumps(
    content, ensure_ascii=False, allow_nan=False, separators=(",", ":")
  )
  for sign in "<>&\u2028\u2029":
    text = text.replace(sign, f"\\u{ord(sign):04x}")
  # Half characters, which a byte tokenizer can give, are none in UTF-8.
  return text.encode("utf-8", "replace").decode()


def _hash(text: str) -> str:
  digest = hashlib.sha256(text.encode()).digest()
  return f"'sha256-{base64.b64encode(digest).decode()}'"


def _names(workdirs: Sequence[str]) -> list[str]:
  """Returns of each path as many of its last parts as no other one ends with.

  The root is no part of it: where a user keeps runs is nobody's business.
  """
  every = [logs.place(workdir).parts[1:] for workdir in workdirs]
  names = []
  for parts in every:
    others = [other for other in every if other != parts]
    size = next(
      size
      for size in itertools.count(1)
      if all(other[-size:] != parts[-size:] for other in others)
    )
    names.append("/".join(parts[-size:]))
  return names


# What the page reads of an evaluation, and of a start of the run; the command
# names folders, which are nobody's business elsewhere.
_EVALUATION = ("accuracy", "accuracy_low", "accuracy_high")
_SESSION = (
  "first_step",
  "since",
  "device_kind",
  "platform",
  "num_devices",
  "num_processes",
  "versions",
)


def _run(log: logs.Log, price: float, num_runs: int) -> dict[str, Any]:
  by_metric, num_metrics = _metrics(log)
  shown, table = {}, []
  for name, points in by_metric:
    shown[name] = series.as_json(series.thin(points))
    table.append(_row(name, points))
  cost = figures.cost(log)
  price = price or log.setting("report.chip_hour_price", 0.0)
  return {
    "name": text_lib.visible(log.name),
    "kind": log.setting("kind", "rl"),
    "done": log.num_done,
    "steps": log.num_steps,
    "finished": log.is_finished,
    "stopped": log.is_stopped,
    "warnings": [dataclasses.asdict(one) for one in rules.find(log)],
    "missing": figures.missing(log),
    "series": shown,
    "num_metrics": num_metrics,
    "table": table,
    "phases": series.phases(log.records),
    "evaluations": [
      {
        "step": step,
        **{k: series.brief(found[k]) for k in _EVALUATION if k in found},
      }
      for step, found in series.spread(log.evaluations())
    ],
    "cost": {
      **{k: series.brief(v) for k, v in dataclasses.asdict(cost).items()},
      "price": price or None,
    },
    "sessions": [
      {
        **{key: session[key] for key in _SESSION if key in session},
        "chip": chips.of_device(session["device_kind"]) is not None,
      }
      for session in log.sessions
    ],
    **_completions(log, num_runs),
  }


def _metrics(
  log: logs.Log,
) -> tuple[Iterator[tuple[str, list[tuple[int, float]]]], int]:
  """Returns metrics one by one, as there may be many steps; how many there are.

  Each is its name and its (train steps done, value).
  """
  speed = figures.flops_per_second(log)
  figured = {
    TOKENS: figures.tokens_per_second(log),
    FLOPS: [(step, rate / 1e12) for step, rate, _ in speed],
    MFU: [(step, share) for step, _, share in speed if share is not None],
  }
  before = {}
  if "accuracy" in log.before:
    before["eval/accuracy"] = log.before["accuracy"]
  logged = dict.fromkeys(name for record in log.records for name in record)
  names = [*before, *logged, *(n for n, points in figured.items() if points)]
  names = [name for name in dict.fromkeys(names) if name != "train_step"]
  # What has a chart comes first, and is never left out.
  shown = {name for chart in CHARTS for name in chart.lines}
  names.sort(key=lambda name: name not in shown)

  def points(name: str) -> list[tuple[int, float]]:
    if name in figured:
      return figured[name]
    found = [(0, before[name])] if name in before else []
    return found + [
      (int(record["train_step"]) + 1, record[name])
      for record in log.records
      if name in record
    ]

  return ((name, points(name)) for name in names[:MAX_METRICS]), len(names)


def _row(name: str, points: Sequence[tuple[int, float]]) -> dict[str, Any]:
  finite = [y for _, y in points if math.isfinite(y)] or [math.nan]
  values = {
    "first": points[0][1],
    "last": points[-1][1],
    "least": min(finite),
    "most": max(finite),
  }
  return {"name": name, **{k: series.brief(v, 4) for k, v in values.items()}}


def _settings(flat: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
  """Returns a row per setting: its key, and its value in every run."""
  # That their folders are others is known, and nobody's business elsewhere.
  keys = sorted({key for one in flat for key in one} - {"workdir"})
  rows = []
  for key in keys:
    values = [one.get(key, "—") for one in flat]
    rows.append({"key": key, "values": values, "differs": len({*values}) > 1})
  return rows


def _flat(config: Any, name: str = "") -> dict[str, str]:
  if isinstance(config, Mapping) and config:
    return {
      path: leaf
      for key, value in config.items()
      for path, leaf in _flat(value, f"{name}.{key}" if name else key).items()
    }
  text = config if isinstance(config, str) else json.dumps(config)
  return {name: text_lib.visible(text)[:MAX_CHARS]}


def _completions(log: logs.Log, num_runs: int) -> dict[str, Any]:
  """Returns the completions that the page shows, and how many there are."""
  by_source: dict[str, list[Mapping[str, Any]]] = {
    "held out": [],
    "training": [],
    "failed": [],
  }
  for record in log.completions:
    source = "failed" if "failure" in record else record.get("source")
    by_source.setdefault(source or "training", by_source["training"]).append(
      record
    )
  most = MAX_VERSIONS if num_runs == 1 else 2
  problems: dict[Any, list[Mapping[str, Any]]] = {}
  for record in by_source["held out"]:
    problems.setdefault(record.get("id"), []).append(record)
  items = [
    {
      "source": "held out",
      "prompt": _text(versions[0].get("prompt", "")),
      "versions": [_version(one) for one in _spread(versions, most)],
    }
    for versions in list(problems.values())[:MAX_PROBLEMS]
  ]
  for source in ("training", "failed"):
    items += [
      {
        "source": source,
        "prompt": _text(one.get("prompt", "")),
        "versions": [_version(one)],
      }
      for one in _spread(by_source[source], max(2, MAX_OTHERS // num_runs))
    ]
  reasons = Counter(
    text_lib.visible(str(one["failure"]))[:200] for one in by_source["failed"]
  )
  return {
    "completions": items,
    "num_shown": sum(len(item["versions"]) for item in items),
    "num_logged": len(log.completions),
    "failures": [
      {"reason": reason, "count": count}
      for reason, count in reasons.most_common(50)
    ],
    "num_failed": _total(log, "grading/num_failed"),
    "num_timed_out": _total(log, "grading/num_timed_out"),
  }


def _total(log: logs.Log, name: str) -> int:
  return round(sum(x for x in log.values(name) if math.isfinite(x)))


def _spread(records: Sequence[Any], most: int) -> list[Any]:
  """Returns at most so many, evenly over all, first and last among them."""
  if len(records) <= most:
    return list(records)
  return [
    records[round(i * (len(records) - 1) / (most - 1))] for i in range(most)
  ]


def _version(record: Mapping[str, Any]) -> dict[str, Any]:
  found = {
    "step": int(record["train_step"]) + 1,
    "text": _text(record.get("completion", "")),
    "reward": series.brief(record.get("reward"), 4),
    "accuracy": series.brief(record.get("accuracy"), 4),
    "answer": _text(record.get("answer") or ""),
  }
  if "failure" in record:
    found["failure"] = _text(str(record["failure"]))
  how = record.get("unmasking")
  if how and len(how["text"]) > MAX_PIECES:
    found["left_out"] = len(how["text"])
  elif how:
    found["play"] = {
      "text": how["text"],
      "step": how["unmask_step"],
      "logprob": how["logprob"],
      "entropy": how["entropy"],
      "special": how["special"],
      "steps": how["num_steps"],
    }
  return found


def _text(text: str) -> str:
  """Returns text with nothing that acts on a screen, cut where it is long."""
  shown = text_lib.visible(text[:MAX_CHARS])
  return shown if len(text) <= MAX_CHARS else f"{shown} … ({len(text)} in all)"
