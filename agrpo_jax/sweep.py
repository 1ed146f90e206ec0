r"""Accuracy over a grid of sampling settings, for several models.

    agrpo sweep --config=gsm8k --output=FOLDER \
      [--model=A --model=B] [--checkpoint=WORKDIR ...] [--sampler=NAME] \
      [--completion_length=128,256] [--num_denoise_steps=32,64,128] \
      [--unmask_rule=confidence,random] [--cache=none,dual] \
      [--temperature=0,0.6]

Every combination is one cell. A model is loaded once; a cell that is complete
in FOLDER is not done again, one that was stopped goes on. --checkpoint is a run
of the config's model. FOLDER gets the records of every cell, `sweep.csv` and
`sweep.png`: accuracy against denoising steps, with standard errors.
"""

import collections
import dataclasses
import functools
import importlib.util
import itertools
import pathlib
from collections.abc import Collection
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from absl import flags

from agrpo_jax import command
from agrpo_jax import config as config_lib
from agrpo_jax import data
from agrpo_jax import errors
from agrpo_jax import evaluate
from agrpo_jax import settings as settings_lib
from agrpo_jax import tasks
from agrpo_jax.evaluation import accuracy
from agrpo_jax.evaluation import table
from agrpo_jax.parallel import mesh as mesh_lib
from agrpo_jax.parallel import processes
from agrpo_jax.port import model as model_lib
from agrpo_jax.runs import checkpoint_named
from agrpo_jax.samplers import sampling as sampling_lib


@dataclasses.dataclass(frozen=True)
class Cell:
  """One evaluation of a sweep.

  Attributes:
    model: a name for tables.
    settings: of the evaluation.
    problems: what is wrong with them, or with the checkpoint.
    label: the values of the axes.
    checkpoint: a run's work directory, or "".
    output: folder of its records.
  """

  model: str
  settings: settings_lib.Rl
  problems: tuple[str, ...]
  label: str
  checkpoint: str
  output: str

  def __str__(self) -> str:
    return f"{self.model}: {self.label}"


def cells(
  c: config_lib.ConfigDict,
  models: Sequence[str],
  checkpoints: Sequence[str],
  axes: Mapping[str, Sequence[Any]],
  output: str,
  given: Collection[str] = (),
) -> list[list[Cell]]:
  """The cells of every model; of the config's model when none is named.

  Args:
    c: what all cells share.
    models: folders or hub ids.
    checkpoints: work directories of runs of the config's model.
    axes: key of `c.evaluate` -> its values; without values, the config's.
    output: folder of the sweep.
    given: keys on the command line, see `evaluate.use_run`.
  """
  sources = [(path, "") for path in models]
  sources += [(c.model.path, checkpoint) for checkpoint in checkpoints]
  sources = list(dict.fromkeys(sources or [(c.model.path, "")]))
  names = [pathlib.Path(run or path).resolve().name for path, run in sources]
  if len({*names}) < len(names):
    names = [
      (run or path).strip("/").replace("/", "_") for path, run in sources
    ]
  found: list[list[Cell]] = []
  for name, (path, checkpoint) in zip(names, sources, strict=True):
    grid = itertools.product(
      *(
        dict.fromkeys(axes.get(axis) or [c.evaluate[axis]])
        for axis in table.AXES
      )
    )
    found.append([])
    for values in grid:
      one = c.copy_and_resolve_references()
      one.model.path = path
      problems = []
      try:
        evaluate.use_run(one, checkpoint, given)
      except errors.UserError as error:
        problems.append(str(error))
      one.evaluate.update(dict(zip(table.AXES, values, strict=True)))
      length, steps, rule, cache, temperature = values
      _leave_to_other_cells(one, axes)
      folder = f"length{length}-steps{steps}-{rule}-{cache}"
      folder += f"-temperature{temperature:g}"
      folder = str(pathlib.Path(output) / "cells" / name / folder)
      settings, wrong = settings_lib.inspect(one)
      label = ", ".join(f"{axis}={one.evaluate[axis]}" for axis in table.AXES)
      found[-1].append(
        Cell(
          model=name,
          settings=settings,
          problems=(*problems, *wrong),
          label=label,
          checkpoint=checkpoint,
          output=folder,
        )
      )
  return found


def _leave_to_other_cells(
  c: config_lib.ConfigDict, axes: Mapping[str, Sequence[Any]]
) -> None:
  """Takes back what is meant for cells of another rule, or without a cache."""
  e = c.evaluate
  if axes.get("unmask_rule") and e.unmask_rule in sampling_lib.RULES:
    every = {
      name
      for rule in sampling_lib.RULES
      for name in sampling_lib.parameters(rule)
    }
    for name in every.difference(sampling_lib.parameters(e.unmask_rule)):
      e[name] = None
  if axes.get("cache") and e.cache != "none":
    e.redraw_mask = False


def run(models: Sequence[Sequence[Cell]]) -> Iterator[dict[str, Any]]:
  """Yields a row of the table per cell, as it is done.

  Args:
    models: from `cells`.

  Raises:
    UserError: everything that is wrong with any cell, before the first runs.
  """
  examples, asked = _check([cell for group in models for cell in group])
  first = models[0][0].settings
  provenance = tasks.provenance(first.task.load(), examples)
  print(f"problems: {provenance}", flush=True)
  with first.start_grader() as grader:
    for group in models:
      model = None
      for cell in group:
        s = cell.settings
        result = accuracy.finished(cell.output, asked[cell.output], 1)
        if result is None:
          if model is None:
            model = model_lib.load_trained(
              s.model, s.lora, s.mesh.make(), cell.checkpoint
            )
          result = evaluate.measure(
            s, model, examples, grader, asked[cell.output], cell.output
          )
        yield table.row(
          cell.model, dataclasses.asdict(s.evaluate.sampling), result
        )


def _check(
  every: Sequence[Cell],
) -> tuple[list[tasks.Example], dict[str, dict[str, Any]]]:
  """The problems to solve and the settings of each cell's records, by folder.

  Raises:
    UserError: all that is wrong, with the cells that have it.
  """
  found: dict[str, list[Cell]] = collections.defaultdict(list)
  load_shape = functools.cache(model_lib.load_shape)
  for cell in every:
    for problem in cell.problems:
      found[problem].append(cell)
    s = cell.settings
    try:
      mesh_lib.check_rows(
        s.mesh.make(), "config.evaluate.batch_size", s.evaluate.batch_size
      )
      model_lib.check_draw(
        load_shape(s.model), s.data.max_prompt_length, s.evaluate
      )
    except errors.UserError as error:
      found[str(error)].append(cell)
  examples: list[tasks.Example] = []
  asked = {}
  if not found:
    first = every[0].settings
    examples = data.load_examples(first.task, first.data, first.evaluate.split)
    for cell in every:
      asked[cell.output] = evaluate.record_settings(
        cell.settings, examples, cell.checkpoint, 1
      )
      try:
        accuracy.finished(cell.output, asked[cell.output], 1)
      except errors.UserError as error:
        found[str(error)].append(cell)
  if found:
    raise errors.UserError(
      "Nothing was run.\n"
      + "\n".join(
        f"{problem}\n  (in {len(having)} of {len(every)} cells; the first is "
        f"{having[0]})"
        for problem, having in found.items()
      )
    )
  return examples, asked


def main(argv: Sequence[str]) -> None:
  del argv
  if importlib.util.find_spec("matplotlib") is None:
    raise errors.UserError(
      "The picture needs matplotlib: pip install 'agrpo_jax[plot]'."
    )
  asked = flags.FLAGS
  kinds = {"unmask_rule": str, "cache": str, "temperature": float}
  axes = {
    name: command.numbers(name, getattr(asked, name), kinds.get(name, int))
    for name in table.AXES
  }
  c, given = command.evaluation_config(asked.sampler)
  output = pathlib.Path(asked.output).expanduser()
  grid = cells(c, asked.model, asked.checkpoint, axes, str(output), given)
  rows: list[dict[str, Any]] = []
  for row in run(grid):
    if not rows:
      print(table.line())
    rows.append(row)
    print(table.line(row), flush=True)
    if processes.is_main():
      table.write_csv(output / "sweep.csv", rows)
  if processes.is_main():
    table.plot(rows, output / "sweep.png")
    print(f"{output / 'sweep.csv'}\n{output / 'sweep.png'}")


if __name__ == "__main__":
  command.define_flags("sampler")
  flags.DEFINE_multi_string("model", [], "Folder or hub id.")
  flags.DEFINE_multi_string("checkpoint", [], checkpoint_named.HELP)
  flags.DEFINE_string("output", None, "Folder for the results.")
  for name in table.AXES:
    flags.DEFINE_list(name, [], f"Values of config.evaluate.{name}.")
  command.main(main, required=["config", "output"])
