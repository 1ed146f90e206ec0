r"""Trains a masked diffusion language model by AGRPO.

    agrpo train --config=gsm8k --config.workdir=runs/gsm8k \
      [--config.model.path=FOLDER_OR_HUB_ID] [--config.data.path=FOLDER] \
      [--config.train.num_steps=N] [--config.seed=N]

--config is a file, or the name of one in configs/, which say what hardware and
hours they take and which variants there are: gsm8k:dual. `sudoku_tiny` needs a
laptop and minutes. Any key can be changed, as in
`--config.rollout.temperature=0.8`; agrpo_jax/config.py lists them all. The same
command in the same work directory goes on where it stopped.
"""

from collections.abc import Sequence

import jax

from agrpo_jax import command
from agrpo_jax import settings
from agrpo_jax import train


def main(argv: Sequence[str]) -> None:
  del argv
  devices = jax.devices()
  print(
    f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform}), "
    f"JAX {jax.__version__}",
    flush=True,
  )
  train.train(settings.rl(command.CONFIG.value))


if __name__ == "__main__":
  command.main(main, required=["config"])
