r"""A model for EleutherAI's lm-eval (`pip install -e '.[lm-eval]'`).

    agrpo lm_eval --model agrpo_jax \
      --model_args path=FOLDER,completion_length=256,num_denoise_steps=256 \
      --tasks gsm8k --batch_size 8

The command is `lm_eval` itself, with this model known to it; lm-eval has no
way for other packages to add models to its own command. `--model_args` are the
arguments of `adapter.Adapter` and the sampling settings of `config.evaluate`.

A completion is drawn by these settings, not by those of the task: how long a
diffusion model's canvas is and in how many steps it is filled belongs to the
model here. Of a task's generation settings only `until` is heeded.
"""

import multiprocessing
import sys

from agrpo_jax import errors
from agrpo_jax.lm_eval import adapter


def main() -> None:
  is_help = not {"-h", "--help"}.isdisjoint(sys.argv)
  if is_help:
    print(__doc__)  # and then what lm-eval says, where there is one
  # lm-eval's bootstrap starts processes; forks of a process in which JAX has
  # threads may hang.
  multiprocessing.set_start_method("spawn")
  try:
    adapter.register()
    from lm_eval import __main__ as lm_eval_command

    lm_eval_command.cli_evaluate()
  except errors.UserError as error:
    print(error, file=sys.stderr)
    sys.exit(0 if is_help else 2)


if __name__ == "__main__":
  main()
