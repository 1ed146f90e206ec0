r"""One page about a run, or about several side by side.

    agrpo report WORKDIR [WORKDIR ...] --html=report.html

reads what the runs have logged so far: curves, held-out accuracy, completions
step by step, settings and where they differ, hardware, cost, and warnings in
words. The page needs no network and no other file. With --watch it is written
anew whenever the logs grow, until all runs have ended, if only by `kill -9`; an
open page reads itself again. A long run's logs take long to read: the watch
rests nine times as long, and so never takes more than a tenth of a core.
"""

import math
import pathlib
import sys
import time
from collections.abc import Sequence

import jax
from absl import flags

from agrpo_jax import command
from agrpo_jax import errors
from agrpo_jax.report import logs
from agrpo_jax.report import page

_MAX_RUNS = 12
_REST = 9  # times as long as a page took

_HTML = flags.DEFINE_string("html", "report.html", "File to write.")
_WATCH = flags.DEFINE_bool("watch", False, "Write it anew while runs go on.")
_SECONDS = flags.DEFINE_float(
  "watch_seconds", 10.0, "How often at most --watch looks at the logs."
)
_PRICE = flags.DEFINE_float(
  "chip_hour_price", 0.0, "Of one chip, in any currency; 0: the runs' own."
)


def main(argv: Sequence[str]) -> None:
  # A folder that is named twice is one run.
  workdirs = [*{logs.place(word): word for word in argv[1:]}.values()]
  file = pathlib.Path(_HTML.value).expanduser()
  if not workdirs:
    raise errors.UserError(
      "Give the work directory of a run, or of several: python -m "
      "agrpo_jax.report WORKDIR [WORKDIR ...]"
    )
  if len(workdirs) > _MAX_RUNS:
    raise errors.UserError(
      f"These are {len(workdirs)} runs; a page holds at most {_MAX_RUNS}."
    )
  if file.is_dir():
    raise errors.UserError(f"--html={str(file)!r} is a folder; name a file.")
  if not 0 <= _PRICE.value < math.inf:
    raise errors.UserError(
      f"--chip_hour_price={_PRICE.value:g} must be 0 (not known) or a price."
    )
  if not _SECONDS.value > 0:
    raise errors.UserError(
      f"--watch_seconds={_SECONDS.value:g} must be positive."
    )
  while True:
    began = time.monotonic()
    stamps = [logs.stamp(workdir) for workdir in workdirs]
    read = page.write(
      workdirs,
      file,
      price=_PRICE.value,
      seconds=_SECONDS.value if _WATCH.value else 0.0,
    )
    size = file.stat().st_size / 1e6
    done = ", ".join(map(_progress, read))
    print(f"Wrote {file} ({size:.1f} MB): {done}", flush=True)
    if not _WATCH.value or all(log.has_ended for log in read):
      return
    # All logs are read anew for every page.
    time.sleep(max(_SECONDS.value, _REST * (time.monotonic() - began)))
    while stamps == [logs.stamp(workdir) for workdir in workdirs]:
      time.sleep(_SECONDS.value)


def _progress(log: logs.Log) -> str:
  if log.is_stopped and not log.is_finished:
    return f"{log.name} stopped after train step {log.num_done}/{log.num_steps}"
  return f"{log.name} {log.num_done}/{log.num_steps}"


if __name__ == "__main__":
  # An accelerator is the run's, if there is one.
  jax.config.update("jax_platforms", "cpu")
  command.main(main, num_words=sys.maxsize)  # `main` counts runs
