"""Looks at how a model writes: step by step in the terminal, and as a page.

    python -m agrpo_jax.show --model=FOLDER "What is 3 + 4?" --html=seven.html

With --config=configs/X.py the model and the sampling settings are those of its
evaluation, and --example=N asks the N-th held-out problem instead of a prompt
of your own. Other flags change single settings. The page needs no network and
no other file.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from agrpo_jax import adhoc
from agrpo_jax import build
from agrpo_jax import command
from agrpo_jax import config as config_lib
from agrpo_jax import errors
from agrpo_jax import presets
from agrpo_jax.evaluation import candidate
from agrpo_jax.parallel import mesh as mesh_lib
from agrpo_jax.runs import checkpoint_named
from agrpo_jax.show import page as page_lib
from agrpo_jax.show import terminal
from agrpo_jax.show import text as text_lib

flags.declare_key_flag("config")  # listed by --help although it is optional

# Which flag changes which key of config.evaluate. Other commands have flags of
# the same names; only one command runs in a process.
_SETTINGS = {
  name: define(name, None, text, allow_override=True)
  for name, define, text in (
    ("completion_length", flags.DEFINE_integer, "Tokens; default 256."),
    ("block_length", flags.DEFINE_integer, "Tokens; default 32."),
    ("num_denoise_steps", flags.DEFINE_integer, "In all; default 128."),
    ("unmask_rule", flags.DEFINE_string, "random, confidence (default), ..."),
    ("temperature", flags.DEFINE_float, "Default 0: the most probable token."),
    ("top_k", flags.DEFINE_integer, "Default 0: off."),
    ("top_p", flags.DEFINE_float, "Default 1: off."),
  )
}
_MODEL = flags.DEFINE_string(
  "model", "", "A checkpoint's folder or hub id.", allow_override=True
)
_SAMPLER = flags.DEFINE_string(
  "sampler",
  "config",
  f"Settings by name: {', '.join(presets.PRESETS)}.",
  allow_override=True,
)
_CHECKPOINT = flags.DEFINE_string(
  "checkpoint", "", checkpoint_named.HELP, allow_override=True
)
_TOKENIZER = flags.DEFINE_string(
  "tokenizer", "", "Another folder or hub id, or 'bytes'.", allow_override=True
)
_SEED = flags.DEFINE_integer(
  "seed", None, "Of the draws; default 0.", allow_override=True
)
_NUM_COMPLETIONS = flags.DEFINE_integer(
  "num_completions", 1, "Drawn side by side; more need a temperature."
)
_EXAMPLE = flags.DEFINE_integer(
  "example", None, "A held-out problem of the config's task, from 0."
)
_PLAIN = flags.DEFINE_bool("plain", False, "Use no chat template.")
_HTML = flags.DEFINE_string("html", "", "File to write the page to.")
_ANIMATION = flags.DEFINE_bool(
  "animation", True, "Redraw in the terminal; otherwise print a few frames."
)
_SECONDS = flags.DEFINE_float("seconds", 6.0, "Of animation, per completion.")


def draw(
  c: config_lib.ConfigDict,
  *,
  prompt: str,
  example: int | None,
  num_completions: int,
  checkpoint: str = "",
  is_plain: bool = False,
) -> page_lib.Page:
  """Draws completions of one prompt.

  Args:
    c: from `adhoc.config`.
    prompt: the user's words; without effect when there is an example.
    example: index of a held-out problem, or None.
    num_completions: how many.
    checkpoint: work directory of a run under this config, or "".
    is_plain: the prompt alone, without chat template.

  Raises:
    UserError: settings under which it cannot be done.
  """
  if num_completions < 1:
    raise errors.UserError(f"{num_completions=} must be at least 1.")
  has_chance = c.evaluate.temperature > 0 or c.evaluate.unmask_rule == "random"
  if num_completions > 1 and not has_chance:
    raise errors.UserError(
      f"{num_completions=} would all be the same, since temperature=0 and "
      f"unmask_rule={c.evaluate.unmask_rule!r} leave nothing to chance. Set "
      "--temperature=0.8 to see several."
    )
  policy = candidate.policy(c, checkpoint)
  tokenizer = policy.tokenizer
  prompt_id = 0
  if example is not None:
    found, ids = _held_out(c, policy, example)
    prompt, prompt_id = found.messages[-1]["content"], found.id
  elif is_plain:
    ids = tokenizer.encode(prompt)
  else:
    ids = tokenizer.encode_chat([{"role": "user", "content": prompt}])
  if not ids:
    raise errors.UserError("The prompt is empty; write one in quotes.")
  # One batch: as many rows as asked for, and those that fill the devices.
  shards = mesh_lib.num_row_shards(policy.mesh)
  c.evaluate.batch_size = -(-num_completions // shards) * shards
  c.data.max_prompt_length = len(ids)
  sampler = build.make_sampler(c, c.evaluate, policy)
  (rollout,) = sampler.sample(
    policy.params,
    policy.lora,
    [ids] * num_completions,
    jax.random.key(c.seed),
    np.array(
      [(prompt_id, index) for index in range(num_completions)], np.uint32
    ),
  )
  return page_lib.Page(
    title=f"{pathlib.PurePath(c.model.path).name}, step by step",
    settings=_describe(c),
    prompt=text_lib.visible(prompt),
    raw_prompt=text_lib.visible(tokenizer.decode_raw(ids)),
    completions=text_lib.completions(rollout, tokenizer, num_completions),
    block_length=c.evaluate.block_length,
    eos_id=tokenizer.eos_id,
    eos_name=tokenizer.decode_raw([tokenizer.eos_id]),
  )


def _held_out(
  c: config_lib.ConfigDict, policy: build.Policy, example: int
) -> tuple[Any, list[int]]:
  if not (c.task.name or c.task.path):
    raise errors.UserError("--example needs a task: add --config=FILE.")
  rows = build.held_out(c, policy.tokenizer)
  if not 0 <= example < len(rows):
    raise errors.UserError(
      f"--example={example} must be between 0 and {len(rows) - 1}."
    )
  return rows[example]


def _describe(c: config_lib.ConfigDict) -> str:
  e = c.evaluate
  steps = f"{e.num_denoise_steps} denoising steps"
  if e.threshold is not None:
    steps = f"every token more probable than {e.threshold:g} unmasked at once"
  return (
    f"{e.completion_length} tokens in blocks of {e.block_length}, {steps}, "
    f"unmask rule {e.unmask_rule}, temperature {e.temperature:g}, "
    f"seed {c.seed}"
  )


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
  num_steps = max(one.num_steps for one in page.completions)
  console.print(terminal.legend(num_steps, terminal.has_colours(console)))


def _write(page: page_lib.Page, path: pathlib.Path) -> None:
  try:
    path.write_text(page_lib.render(page), encoding="utf-8")
  except OSError as error:
    raise errors.UserError(
      f"Cannot write --html={str(path)!r}: {error.strerror}."
    ) from error
  print(f"\nWrote {path}; open it in a browser.")


def main(argv: Sequence[str]) -> None:
  prompt = argv[1] if len(argv) > 1 else ""
  if bool(prompt) == (_EXAMPLE.value is not None):
    raise errors.UserError(
      "Give a prompt in quotes, or --example=N, and not both."
    )
  if _HTML.value and not pathlib.Path(_HTML.value).absolute().parent.is_dir():
    raise errors.UserError(f"--html={_HTML.value!r} is in no folder there is.")
  c = adhoc.config(
    command.CONFIG.value,
    _MODEL.value,
    _SAMPLER.value,
    **{name: flag.value for name, flag in _SETTINGS.items()},
  )
  if _SEED.value is not None:
    c.seed = _SEED.value
  if _TOKENIZER.value:
    c.model.tokenizer = _TOKENIZER.value
  page = draw(
    c,
    prompt=prompt,
    example=_EXAMPLE.value,
    num_completions=_NUM_COMPLETIONS.value,
    checkpoint=_CHECKPOINT.value,
    is_plain=_PLAIN.value,
  )
  _print(page, _ANIMATION.value, _SECONDS.value)
  if _HTML.value:
    _write(page, pathlib.Path(_HTML.value))


if __name__ == "__main__":
  command.main(main, num_words=1)
