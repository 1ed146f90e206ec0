r"""Trains a masked diffusion language model by AGRPO.

    python -m agrpo_jax.main --config=configs/gsm8k.py \
      --config.workdir=runs/gsm8k

Any key of the config can be changed: `--config.rollout.temperature=0.8`. The
files in configs/ name hardware, hours and variants; agrpo_jax/config.py lists
every key. The same command in the same work directory goes on where it stopped.
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
