"""How the commands start and how they end."""

import logging as python_logging
import sys
from collections.abc import Callable
from collections.abc import Sequence

from absl import app
from absl import flags
from absl import logging
from ml_collections import config_flags

from agrpo_jax import errors

CONFIG = config_flags.DEFINE_config_file(
  "config", None, "A file in configs/; --config.KEY=VALUE changes a key."
)


def main(
  function: Callable[[Sequence[str]], None], required: Sequence[str] = ()
) -> None:
  """Runs a command: flags, then `function`, then an exit code.

  A mistake of the user ends it with one message and code 2, Ctrl-C with code
  130, a value that is not finite with code 3. Everything else is our mistake
  and shows its traceback.
  """
  flags.mark_flags_as_required(required)

  def guarded(argv: Sequence[str]) -> None:
    if len(argv) > 1:
      _fail(f"Unknown arguments {' '.join(argv[1:])}; settings start with --.")
    try:
      function(argv)
    except errors.UserError as error:
      _fail(str(error))
    except FloatingPointError as error:
      _fail(str(error), code=3)
    except KeyboardInterrupt:
      _fail(
        "Stopped. The same command goes on from the last checkpoint.", code=130
      )

  logging.set_verbosity(logging.WARNING)
  python_logging.getLogger("jax").setLevel(python_logging.WARNING)
  app.run(guarded)


def _fail(message: str, code: int = 2) -> None:
  sys.stdout.flush()
  print(message, file=sys.stderr, flush=True)
  sys.exit(code)
