r"""A laboratory for objectives.

    python -m agrpo_jax.lab gradients --config=configs/sudoku_tiny.py:blocks \
      --output=FOLDER [--draws=32] \
      [--estimators=espo,agrpo/step_rule=blocks/num_mc_blocks=2]

`gradients` draws one batch of completions with the config's model and sampler,
computes the exact gradient of every denoising step, and says of every estimate
how biased and how noisy it is, and what it costs. An estimate is
OBJECTIVE/SETTING=VALUE/..., with one optimizer update per rollout; without
--estimators it is all objectives, at several budgets. FOLDER gets
`gradients.csv` and `gradients.png`.
"""

import pathlib
from collections.abc import Sequence

from absl import flags

from agrpo_jax import command
from agrpo_jax import errors
from agrpo_jax import settings as settings_lib
from agrpo_jax.lab import gradients


def main(argv: Sequence[str]) -> None:
  """Runs the command that the first word names."""
  if argv[1:] != ["gradients"]:
    raise errors.UserError(
      f"agrpo_jax.lab {' '.join(argv[1:])}: the command is `gradients`."
    )
  asked = flags.FLAGS
  if asked.draws < 2:
    raise errors.UserError(f"--draws={asked.draws}: at least 2.")
  s = settings_lib.rl(command.CONFIG.value)
  words = asked.estimators or gradients.default_estimators(s.rollout.sampling)
  objectives = {
    word: gradients.parse(word, s.rollout.sampling) for word in words
  }
  batch = gradients.draw(s)
  rows = gradients.measure(batch, objectives, asked.draws)
  if asked.output:
    folder = pathlib.Path(asked.output).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    gradients.write(rows, folder)


if __name__ == "__main__":
  flags.DEFINE_list("estimators", [], "OBJECTIVE/SETTING=VALUE/..., ...")
  flags.DEFINE_integer("draws", 32, "Estimates of each kind.")
  flags.DEFINE_string("output", "", "Folder for the table and the figure.")
  command.main(main, required=("config",), num_words=1)
