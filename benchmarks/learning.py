r"""What runs learn from fast samplers, and what scoring them exactly is worth.

    python benchmarks/learning.py --config=sudoku_tiny \
      --work=runs/learning --output=benchmarks/results/learning

The demo's task in four blocks. Every arm trains under its own sampler and
scorer, on the same puzzles, several times with other seeds; each run is then
evaluated under every decoder: fixed numbers of steps, and hard thresholds, most
of them with the dual cache.

Runs and evaluations lie in --work and are not done twice: the command can be
stopped, and several with other --seeds or --arms can run side by side; one with
all of them draws the figure. Seconds are those of rollout, grading and update.
"""

import csv
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags
from scipy import stats

from agrpo_jax import command
from agrpo_jax import config as config_lib
from agrpo_jax import evaluate
from agrpo_jax import settings as settings_lib
from agrpo_jax import train
from agrpo_jax.lab import train as lab_train
from agrpo_jax.runs import metrics

_DUAL = {"rollout.cache": "dual", "objective.step_rule": "all"}
_THRESHOLD = {
  **_DUAL,
  "rollout.unmask_rule": "threshold",
  "rollout.threshold": 0.9,
}
_SOFT = {
  **_THRESHOLD,
  "rollout.unmask_rule": "soft_threshold",
  "rollout.soft_width": 1.0,
}
_PRICE = {"objective.step_price": 0.3}
ARMS: dict[str, dict[str, Any]] = {
  "random": {"rollout.unmask_rule": "random"},
  "plain": {},
  "dual_all": _DUAL,
  "dual_blocks": {**_DUAL, "objective.step_rule": "blocks"},
  "dual_scored_without_cache": {
    **_DUAL,
    "objective.path": str(
      pathlib.Path(__file__).with_name("scored_without_cache.py")
    ),
  },
  "threshold": _THRESHOLD,
  "threshold_priced": _THRESHOLD | _PRICE,
  "soft": _SOFT,
  "soft_priced": _SOFT | _PRICE,
}
"""What differs from the demo's config in four blocks, `confidence` order."""

_BLOCK_LENGTH = 4
_THRESHOLDS = (0.5, 0.7, 0.9, 0.97)
_FIXED_STEPS = (4, 8, 16)

DECODERS: dict[str, dict[str, Any]] = {
  "16 steps, no cache": {},
  "threshold 0.9, no cache": {"unmask_rule": "threshold", "threshold": 0.9},
  **{
    f"{steps} steps": {"cache": "dual", "num_denoise_steps": steps}
    for steps in _FIXED_STEPS
  },
  **{
    f"threshold {threshold:g}": {
      "cache": "dual",
      "unmask_rule": "threshold",
      "threshold": threshold,
    }
    for threshold in _THRESHOLDS
  },
}
"""Keys of `config.evaluate`; those without a word on it have the dual cache."""


def config(
  asked: Any, arm: str, seed: int, decoder: dict[str, Any]
) -> config_lib.ConfigDict:
  c = command.CONFIG.value.copy_and_resolve_references()
  c.rollout.unmask_rule = "confidence"
  c.rollout.block_length = c.evaluate.block_length = _BLOCK_LENGTH
  c.objective.microbatch = 64
  with c.unlocked():
    c.update_from_flattened_dict(ARMS[arm])
  c.evaluate.update(decoder)
  c.train.num_steps = asked.num_steps
  c.train.checkpoint_every = c.train.num_steps
  c.train.keep_best = 0
  c.seed = seed
  c.workdir = str(pathlib.Path(asked.work) / f"{arm}-{seed}")
  return c


def learn(asked: Any, arm: str, seed: int) -> list[dict[str, Any]]:
  """Trains unless that is done; returns held-out accuracy as it went."""
  s = settings_lib.rl(config(asked, arm, seed, {}))
  log = pathlib.Path(s.workdir) / "metrics.jsonl"
  if not lab_train.is_done(s):
    train.train(s)
  records = [*metrics.read(log)]
  seconds = [
    sum(r[f"seconds/{phase}"] for phase in ("rollout", "grade", "update"))
    for r in records
  ]
  # The first train step compiles, which a long run does not notice.
  seconds[0] = float(np.median(seconds))
  elapsed = np.cumsum(seconds)
  return [
    {
      "arm": arm,
      "seed": seed,
      "train_step": record["train_step"] + 1,
      "seconds": elapsed[i],
      "accuracy": record["eval/accuracy"],
      "denoise_steps": record["completions/mean_denoise_steps"],
      "max_ratio_deviation": record["policy_ratio/max_deviation"],
    }
    for i, record in enumerate(records)
    if "eval/accuracy" in record
  ]


def decode(asked: Any, arm: str, seed: int) -> list[dict[str, Any]]:
  """Evaluates a run, or the model before it, under every decoder."""
  rows = []
  for name, keys in DECODERS.items():
    is_base = arm == "before"
    s = settings_lib.rl(config(asked, "plain" if is_base else arm, seed, keys))
    folder = pathlib.Path(asked.work) / "decoded" / f"{arm}-{seed}"
    folder /= name.replace(", ", "-").replace(" ", "")
    if not (folder / "result.json").exists():
      evaluate.run(s, "" if is_base else s.workdir, str(folder))
    found = json.loads((folder / "result.json").read_text())
    rows.append(
      {
        "arm": arm,
        "seed": seed,
        "decoder": name,
        "accuracy": found["accuracy"],
        "denoise_steps": found["mean_denoise_steps"],
        "whole_passes": found["mean_whole_passes"],
      }
    )
  return rows


def by_seed(
  rows: Sequence[dict[str, Any]], key: str, **wanted: Any
) -> np.ndarray:
  """Returns the values of the rows that match, in the order of their seeds."""
  found = [r for r in rows if all(r[k] == v for k, v in wanted.items())]
  return np.array([r[key] for r in sorted(found, key=lambda r: r["seed"])])


def half_width(values: np.ndarray) -> float:
  """Half of the 95 % interval of a mean, Student's t over seeds."""
  if len(values) < 2:
    return float("nan")
  return float(stats.sem(values) * stats.t.ppf(0.975, len(values) - 1))


def table(
  arms: Sequence[str],
  learned: Sequence[dict[str, Any]],
  decoded: Sequence[dict[str, Any]],
) -> str:
  """Returns a Markdown table of the runs' ends, and differences from plain."""
  last = max(row["train_step"] for row in learned)
  shown = ("16 steps, no cache", "threshold 0.9, no cache", "threshold 0.9")
  lines = [
    "| arm | s a train step | " + " | ".join(shown) + " | minus plain, p |",
    "|---|" + "---|" * (len(shown) + 2),
  ]
  for arm in ("before", *arms):
    cells = []
    for decoder in shown:
      of = {"arm": arm, "decoder": decoder}
      right = 100 * by_seed(decoded, "accuracy", **of)
      steps = by_seed(decoded, "denoise_steps", **of).mean()
      cells.append(
        f"{right.mean():.1f} ± {half_width(right):.1f} % in {steps:.2f}"
      )
    seconds = by_seed(learned, "seconds", arm=arm, train_step=last) / last
    pace = f"{np.median(seconds):.2f}" if seconds.size else ""
    versus = ""
    if arm not in ("before", "plain") and "plain" in arms:
      ours, plain = (
        100 * by_seed(decoded, "accuracy", arm=a, decoder=shown[-1])
        for a in (arm, "plain")
      )
      if len(ours) == len(plain) > 1:
        p = stats.ttest_rel(ours, plain).pvalue
        versus = f"{(ours - plain).mean():+.1f}, {p:.2g}"
    lines.append(f"| {arm} | {pace} | " + " | ".join(cells) + f" | {versus} |")
  return "\n".join(lines)


def plot(
  arms: Sequence[str],
  learned: Sequence[dict[str, Any]],
  decoded: Sequence[dict[str, Any]],
  path: pathlib.Path,
) -> None:
  """Accuracy against train steps, against seconds, and against steps."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  figure, (by_step, by_second, decoders) = pyplot.subplots(
    1, 3, figsize=(17, 5), sharey=True
  )
  train_steps = sorted({row["train_step"] for row in learned})
  for number, arm in enumerate(arms):
    color = f"C{number}"
    right = np.stack(
      [by_seed(learned, "accuracy", arm=arm, train_step=t) for t in train_steps]
    )
    seconds = np.stack(
      [by_seed(learned, "seconds", arm=arm, train_step=t) for t in train_steps]
    )
    width = [half_width(values) for values in right]
    for axes, x in ((by_step, train_steps), (by_second, seconds.mean(axis=1))):
      axes.errorbar(
        x, right.mean(axis=1), width, color=color, label=arm, capsize=2
      )
  for number, arm in enumerate(("before", *arms)):
    color = "black" if arm == "before" else f"C{number - 1}"
    for kind, style in (("threshold", "o-"), ("steps", "x:")):
      points = sorted(
        (
          by_seed(decoded, "denoise_steps", arm=arm, decoder=name).mean(),
          by_seed(decoded, "accuracy", arm=arm, decoder=name).mean(),
        )
        for name in DECODERS
        if kind in name and "no cache" not in name
      )
      decoders.plot(
        *zip(*points, strict=True),
        style,
        color=color,
        label=arm if kind == "threshold" else None,
        markersize=4,
      )
  decoders.set(
    xlabel="denoising steps per completion",
    title="Afterwards, dual cache: thresholds (o), fixed numbers of steps (x)",
  )
  by_step.set(xlabel="train steps", ylabel="held-out puzzles solved")
  by_second.set(xlabel="seconds of training")
  by_step.set_title("16 steps, no cache; 95 % over seeds")
  by_step.legend(fontsize=7)
  decoders.legend(fontsize=7)
  figure.tight_layout()
  figure.savefig(path, dpi=100)


def write(path: pathlib.Path, rows: Sequence[dict[str, Any]]) -> None:
  with path.open("w", newline="") as file:
    writer = csv.DictWriter(file, rows[0])
    writer.writeheader()
    writer.writerows(rows)


def main(argv: Sequence[str]) -> None:
  del argv
  asked = flags.FLAGS
  seeds = command.numbers("seeds", asked.seeds, int)
  learned: list[dict[str, Any]] = []
  decoded: list[dict[str, Any]] = []
  for seed in seeds:
    for arm in asked.arms:
      learned += learn(asked, arm, seed)
      decoded += decode(asked, arm, seed)
    decoded += decode(asked, "before", seed)
  print(table(asked.arms, learned, decoded))
  if asked.output:
    path = pathlib.Path(asked.output)
    write(path.with_name(f"{path.name}_curves.csv"), learned)
    write(path.with_name(f"{path.name}_decoded.csv"), decoded)
    plot(asked.arms, learned, decoded, path.with_suffix(".png"))


if __name__ == "__main__":
  flags.DEFINE_string("work", "runs/learning", "Work directories of the runs.")
  flags.DEFINE_string("output", "", "CSV and PNG, without the suffix.")
  flags.DEFINE_list("seeds", ["0", "1", "2", "3", "4"], "One run each.")
  flags.DEFINE_list("arms", list(ARMS), "Of those that this file lists.")
  flags.DEFINE_integer("num_steps", 50, "Train steps of a run.")
  command.main(main, required=["config"])
