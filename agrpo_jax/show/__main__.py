"""Looks at how a model writes: step by step in the terminal, and as a page.

    agrpo show --model=FOLDER "What is 3 + 4?" --html=seven.html

With --config=X the model and the sampling settings are those of its
evaluation, and --example=N asks the N-th held-out problem instead of a prompt
of your own. Other flags change single settings. The page needs no network and
no other file.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from agrpo_jax import command
from agrpo_jax import data
from agrpo_jax import errors
from agrpo_jax import evaluate
from agrpo_jax import settings as settings_lib
from agrpo_jax.parallel import mesh as mesh_lib
from agrpo_jax.port import model as model_lib
from agrpo_jax.runs import checkpoint_named
from agrpo_jax.samplers import sampling as sampling_lib
from agrpo_jax.show import page as page_lib
from agrpo_jax.show import terminal
from agrpo_jax.show import text as text_lib

# Which flag changes which key of config.evaluate.
_SETTINGS: dict[str, tuple[Callable[..., Any], str]] = {
  "completion_length": (flags.DEFINE_integer, "Tokens; default 256."),
  "block_length": (flags.DEFINE_integer, "Tokens; default 32."),
  "num_denoise_steps": (flags.DEFINE_integer, "In all; default 128."),
  "unmask_rule": (
    flags.DEFINE_string,
    f"{', '.join(sampling_lib.RULES)}; default confidence.",
  ),
  "threshold": (flags.DEFINE_float, "Of threshold, dynamic, soft_threshold."),
  "factor": (flags.DEFINE_float, "Of the unmask rule factor."),
  "gamma": (flags.DEFINE_float, "Of the unmask rule entropy_bounded."),
  "soft_width": (flags.DEFINE_float, "Of the unmask rule soft_threshold."),
  "temperature": (flags.DEFINE_float, "Default 0: the most probable token."),
  "top_k": (flags.DEFINE_integer, "Default 0: off."),
  "top_p": (flags.DEFINE_float, "Default 1: off."),
}


def draw(
  s: settings_lib.Drawing,
  *,
  prompt: str,
  example: int | None,
  num_completions: int,
  checkpoint: str = "",
  is_plain: bool = False,
) -> page_lib.Page:
  """Draws completions of one prompt.

  Args:
    s: the settings, of which `evaluate` says how to draw.
    prompt: the user's words; without effect when there is an example.
    example: index of a held-out problem, or None.
    num_completions: how many.
    checkpoint: of a run that trained the model of `s`, or "".
    is_plain: the prompt alone, without chat template.

  Raises:
    UserError: settings under which it cannot be done.
  """
  if num_completions < 1:
    raise errors.UserError(f"{num_completions=} must be at least 1.")
  if num_completions > 1 and not s.evaluate.has_chance:
    raise errors.UserError(
      f"{num_completions=} would all be the same, since temperature=0 and "
      f"unmask_rule={s.evaluate.sampling.unmask_rule!r} leave nothing to "
      "chance. Set --temperature=0.8 to see several."
    )
  mesh = s.mesh.make()
  model = model_lib.load_trained(s.model, s.lora, mesh, checkpoint)
  tokenizer = model.tokenizer
  prompt_id = 0
  if example is not None:
    found = _held_out(s, tokenizer, example)
    ids, prompt_id = found.tokens, found.example.id
    prompt = found.example.messages[-1]["content"]
  elif is_plain:
    ids = tokenizer.encode(prompt)
  else:
    ids = tokenizer.encode_chat([{"role": "user", "content": prompt}])
  if not ids:
    raise errors.UserError("The prompt is empty; write one in quotes.")
  model.check_draw(len(ids), s.evaluate)
  # One batch: as many rows as asked for, and those that fill the devices.
  shards = mesh_lib.num_row_shards(mesh)
  batch_size = -(-num_completions // shards) * shards
  draw = dataclasses.replace(s.evaluate, batch_size=batch_size)
  sampler = model.sampler(draw, s.data.bucket)
  (rollout,) = sampler.sample(
    model.params,
    model.lora,
    [ids] * num_completions,
    jax.random.key(s.seed),
    np.array(
      [(prompt_id, index) for index in range(num_completions)], np.uint32
    ),
  )
  name = checkpoint_named.pinned(checkpoint) if checkpoint else s.model.path
  return page_lib.Page(
    title=f"{pathlib.PurePath(name).name}, step by step",
    settings=evaluate.describe(s),
    prompt=text_lib.visible(prompt),
    raw_prompt=text_lib.visible(tokenizer.decode_raw(ids)),
    completions=text_lib.completions(rollout, tokenizer, num_completions),
    block_length=s.evaluate.sampling.block_length,
    eos_id=tokenizer.eos_id,
    eos_name=tokenizer.decode_raw([tokenizer.eos_id]),
  )


def _held_out(
  s: settings_lib.Drawing, tokenizer: data.Tokenizer, example: int
) -> data.Prompt:
  if not s.task:
    raise errors.UserError("--example needs a task: add --config=FILE.")
  found = data.load_dataset(s.task, s.data, tokenizer, s.evaluate.split)
  prompts = found.prompts[: s.evaluate.num_examples or None]
  if not 0 <= example < len(prompts):
    raise errors.UserError(
      f"--example={example} must be between 0 and {len(prompts) - 1}."
    )
  return prompts[example]


def _print(page: page_lib.Page, is_animated: bool, seconds: float) -> None:
  """Shows the completions in the terminal, one after the other."""
  console = terminal.make_console()
  console.print(f"{page.settings}\n\n{page.prompt}")
  for number, completion in enumerate(page.completions, 1):
    console.print(f"\n— completion {number} of {len(page.completions)}")
    if is_animated and console.is_terminal and not console.is_dumb_terminal:
      terminal.animate(completion, console, eos_id=page.eos_id, seconds=seconds)
    else:
      terminal.print_frames(completion, console, eos_id=page.eos_id)
  num_executed_steps = max(one.num_executed_steps for one in page.completions)
  console.print(
    terminal.legend(num_executed_steps, terminal.has_colours(console))
  )


def _write(page: page_lib.Page, path: pathlib.Path) -> None:
  try:
    path.write_text(page_lib.render(page), encoding="utf-8")
  except OSError as error:
    raise errors.UserError(
      f"Cannot write --html={str(path)!r}: {error.strerror}."
    ) from error
  print(f"\nWrote {path}; open it in a browser.")


def main(argv: Sequence[str]) -> None:
  asked = flags.FLAGS
  prompt = argv[1] if len(argv) > 1 else ""
  if bool(prompt) == (asked.example is not None):
    raise errors.UserError(
      "Give a prompt in quotes, or --example=N, and not both."
    )
  html = pathlib.Path(asked.html).expanduser()
  if asked.html and not html.absolute().parent.is_dir():
    raise errors.UserError(f"--html={asked.html!r} is in no folder there is.")
  changes = {name: asked[name].value for name in _SETTINGS}
  c, given = command.evaluation_config(asked.sampler, asked.model, **changes)
  if asked.tokenizer:
    c.model.tokenizer = asked.tokenizer
    given.add("model.tokenizer")
  evaluate.use_run(c, asked.checkpoint, given)
  if not c.model.path:
    raise errors.UserError(
      "Which model? Give --model=FOLDER_OR_HUB_ID, --checkpoint=WORKDIR or "
      "--config=FILE."
    )
  if asked.seed is not None:
    c.seed = asked.seed
  page = draw(
    settings_lib.drawing(c),
    prompt=prompt,
    example=asked.example,
    num_completions=asked.num_completions,
    checkpoint=asked.checkpoint,
    is_plain=asked.plain,
  )
  _print(page, asked.animation, asked.seconds)
  if asked.html:
    _write(page, html)


if __name__ == "__main__":
  flags.declare_key_flag("config")  # listed by --help although it is optional
  command.define_flags("model", "sampler", "checkpoint")
  for _name, (_define, _meaning) in _SETTINGS.items():
    _define(_name, None, _meaning)
  flags.DEFINE_string("tokenizer", "", "Another folder or hub id, or 'bytes'.")
  flags.DEFINE_integer("seed", None, "Of the draws; default 0.")
  flags.DEFINE_integer(
    "num_completions", 1, "Drawn side by side; more need a temperature."
  )
  flags.DEFINE_integer(
    "example", None, "A held-out problem of the config's task, from 0."
  )
  flags.DEFINE_bool("plain", False, "Use no chat template.")
  flags.DEFINE_string("html", "", "File to write the page to.")
  flags.DEFINE_bool(
    "animation", True, "Redraw in the terminal; otherwise print a few frames."
  )
  flags.DEFINE_float("seconds", 6.0, "Of animation, per completion.")
  command.main(main, num_words=1)
