r"""Trains a masked diffusion language model by AGRPO.

    agrpo train --config=gsm8k --config.workdir=runs/gsm8k \
      [--config.model.path=FOLDER_OR_HUB_ID] [--config.data.path=FOLDER] \
      [--config.train.num_steps=N] [--config.seed=N] \
      [--checkpoint=WORKDIR[:best|:TRAIN_STEP]]

--config is a file, or the name of one in configs/, which say what hardware and
hours they take and which variants there are: gsm8k:dual. `sudoku_tiny` needs a
laptop and minutes. Any key can be changed, as in
`--config.rollout.temperature=0.8`; agrpo_jax/config.py lists them all. The same
command in the same work directory goes on where it stopped, and further with
more `train.num_steps`. --checkpoint begins a new run with what another one
trained: model and adapter are that run's.
"""

from collections.abc import Sequence

import jax
from absl import flags

from agrpo_jax import command
from agrpo_jax import evaluate
from agrpo_jax import settings
from agrpo_jax import train
from agrpo_jax.models import base as models
from agrpo_jax.runs import checkpoint_named

# How a network is computed, which the runs need not have in common.
_OWN = {f"model.{key}" for key in ("quantize", *models.SWITCHES)}


def main(argv: Sequence[str]) -> None:
  del argv
  c, checkpoint = command.CONFIG.value, flags.FLAGS.checkpoint
  if checkpoint:
    # The other run may be gone when this one goes on.
    other = c.workdir if checkpoint_named.exists(c.workdir) else checkpoint
    evaluate.use_run(c, other, {*command.given_keys(), *_OWN})
  s = settings.rl(c)
  devices = jax.devices()
  print(
    f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform}), "
    f"JAX {jax.__version__}",
    flush=True,
  )
  train.train(s, checkpoint)


if __name__ == "__main__":
  command.define_flags("checkpoint")
  command.main(main, required=["config"])
