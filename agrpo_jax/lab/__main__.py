r"""A laboratory for objectives.

    agrpo lab gradients --config=sudoku_tiny:blocks \
      --output=FOLDER [--draws=32] \
      [--estimators=espo,agrpo/step_rule=blocks/num_mc_blocks=2]
    agrpo lab train --config=sudoku_tiny:blocks \
      --objectives=agrpo,espo/num_masks=4,diffu_grpo --seeds=5 \
      --budget_passes=900 --work=FOLDER --output=FOLDER \
      [--learning_rates=1e-4,3e-4,1e-3]

`gradients` draws one batch of completions with the config's model and sampler,
computes the exact gradient of every denoising step, and says of every estimate
how biased and how noisy it is, and what it costs. An estimate is
OBJECTIVE/SETTING=VALUE/..., with one optimizer update per rollout; without
--estimators it is all objectives, at several budgets. FOLDER gets
`gradients.csv` and `gradients.png`. In both commands the config's own objective
has the settings that it has there, others those of their classes.

`train` trains every objective with every seed at equal compute (one of
--budget_passes, --budget_seconds, --budget_steps), each with its best learning
rate, and says which of them differ. The runs lie in --work: what is done there
is not done again, and a command that was stopped goes on. --output gets the
report `train.md`, its figure, and the tables.
"""

import pathlib
import shlex
import sys
import tempfile
from collections.abc import Sequence

from absl import flags

from agrpo_jax import command
from agrpo_jax import errors
from agrpo_jax import evaluate
from agrpo_jax import settings as settings_lib
from agrpo_jax import train as train_lib
from agrpo_jax.lab import compare
from agrpo_jax.lab import gradients
from agrpo_jax.lab import train


def measure_gradients() -> None:
  """Runs `gradients`."""
  asked = flags.FLAGS
  if asked.draws < 2:
    raise errors.UserError(f"--draws={asked.draws}: at least 2.")
  c = command.CONFIG.value
  s = settings_lib.rl(c)
  words = asked.estimators or gradients.default_estimators(s.rollout.sampling)
  objectives = {word: gradients.parse(c, word) for word in words}
  folder = output_folder(asked.output) if asked.output else None
  batch = gradients.draw(s)
  rows = gradients.measure(batch, objectives, asked.draws)
  if folder:
    gradients.write(rows, folder)


def compare_training() -> None:
  """Runs `train`."""
  asked = flags.FLAGS
  missing = [
    f"--{name}=..."
    for name in ("objectives", "work", "output")
    if not getattr(asked, name)
  ]
  budgets = [
    train.Budget(unit, getattr(asked, f"budget_{unit}"))
    for unit in train.UNITS
    if getattr(asked, f"budget_{unit}") is not None
  ]
  if not budgets:
    missing.append(" or ".join(f"--budget_{unit}=..." for unit in train.UNITS))
  if missing:
    raise errors.UserError(f"Missing: {', '.join(missing)}.")
  if len(budgets) > 1:
    given = ", ".join(f"--budget_{b.unit}={b.amount:g}" for b in budgets)
    raise errors.UserError(f"{given}: a run has one budget; give one of them.")
  rates = command.numbers("learning_rates", asked.learning_rates, float)
  folder = output_folder(asked.output)
  outcomes = train.run(
    train.Asked(
      config=command.CONFIG.value,
      objectives=tuple(dict.fromkeys(asked.objectives)),
      num_seeds=asked.seeds,
      budget=budgets[0],
      learning_rates=tuple(dict.fromkeys(rates)),
      sweep_seeds=asked.sweep_seeds,
      sweep_share=asked.sweep_share,
      evaluations=asked.evaluations,
      final_examples=asked.final_examples,
      work=pathlib.Path(asked.work).expanduser(),
      command=f"python -m agrpo_jax.lab {shlex.join(sys.argv[1:])}",
    ),
    train_lib.train,
    evaluate.run,
  )
  for outcome in outcomes:
    compare.write(outcome, folder)
    print(f"{folder / 'train.md'}", flush=True)


def output_folder(given: str) -> pathlib.Path:
  """Makes the folder of --output, to which all comes at the end.

  Raises:
    UserError: it cannot be made or written.
  """
  folder = pathlib.Path(given).expanduser()
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
      return folder
  except OSError as error:
    raise errors.UserError(
      f"Cannot write to --output={str(folder)!r}: {error.strerror}. Give "
      "another folder."
    ) from error


_COMMANDS = {"gradients": measure_gradients, "train": compare_training}
# Flags of one command alone.
_OWN = {
  "gradients": ("estimators", "draws"),
  "train": (
    *("objectives", "seeds", "work", "evaluations", "final_examples"),
    *("learning_rates", "sweep_seeds", "sweep_share"),
    *(f"budget_{unit}" for unit in train.UNITS),
  ),
}


def main(argv: Sequence[str]) -> None:
  """Runs the command that the first word names."""
  word = " ".join(argv[1:])
  if word not in _COMMANDS:
    raise errors.UserError(
      f"agrpo_jax.lab {word}: the command is one of {', '.join(_COMMANDS)}."
    )
  others = [
    f"--{flag}"
    for command_word, own in _OWN.items()
    for flag in own
    if command_word != word and flags.FLAGS[flag].present
  ]
  if others:
    raise errors.UserError(f"agrpo_jax.lab {word} has no {', '.join(others)}.")
  _COMMANDS[word]()


if __name__ == "__main__":
  flags.DEFINE_list("estimators", [], "OBJECTIVE/SETTING=VALUE/..., ...")
  flags.DEFINE_integer("draws", 32, "Estimates of each kind.")
  flags.DEFINE_string("output", "", "Folder for the tables and the figure.")
  flags.DEFINE_list("objectives", [], "OBJECTIVE/SETTING=VALUE/..., ...")
  flags.DEFINE_integer("seeds", 5, "Runs of each objective.")
  for _unit, _meaning in (
    ("passes", "Forward and backward passes per completion"),
    ("seconds", "Seconds of rollout, grading and update"),
    ("steps", "Train steps"),
  ):
    flags.DEFINE_float(f"budget_{_unit}", None, f"{_meaning}, of a run.")
  flags.DEFINE_string("work", "", "Folder of the runs.")
  flags.DEFINE_list(
    "learning_rates", [], "To choose from, each objective for itself."
  )
  flags.DEFINE_integer("sweep_seeds", 1, "Runs per learning rate tried.")
  flags.DEFINE_float("sweep_share", 1.0, "Of the budget, that they get.")
  flags.DEFINE_integer("evaluations", 8, "Points of a learning curve, about.")
  flags.DEFINE_integer(
    "final_examples",
    0,
    "Held-out prompts after training, others than config.evaluate.num_examples "
    "of the learning curves; 0: as many.",
  )
  command.main(main, required=("config",), num_words=1)
