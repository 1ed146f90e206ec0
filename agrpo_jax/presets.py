"""Samplers by name: the settings under which published numbers were made.

    python -m agrpo_jax.evaluate --config=... --sampler=d1

A name sets every key of `config.evaluate` that says how completions are drawn;
keys given on the command line stay. `config` (the default) changes nothing.

config: what the config says.
llada: LLaDA's own `generate.py` as its example calls it: one token a step, all
  of the completion is always drawn. Where the best token is [MASK] itself it
  leaves the position masked and draws it again, and so does this sampler.
d1: d1's evaluation (and wd1's and SPG's): two tokens a step. Its other lengths,
  128 and 512, take half as many steps as tokens too.
agrpo: AGRPO's evaluation: as d1, but a block of nothing but EOS ends it.
fast_dllm: Fast-dLLM's parallel decoding without its caches: every token more
  probable than 0.9 is unmasked at once (its published settings for LLaDA).
"""

from collections.abc import Collection
from typing import Any

from absl import flags
from ml_collections import config_flags

from agrpo_jax import command
from agrpo_jax import config as config_lib
from agrpo_jax import errors

_GREEDY: dict[str, Any] = {
  "completion_length": 256,
  "block_length": 32,
  "num_denoise_steps": 128,
  "unmask_rule": "confidence",
  "temperature": 0.0,
  "top_k": 0,
  "top_p": 1.0,
  "confidence": "model",
  "threshold": None,
  "guidance": 0.0,
  "stop_at_eos": False,
  "redraw_mask": False,
}
PRESETS: dict[str, dict[str, Any]] = {
  "config": {},
  "llada": {**_GREEDY, "completion_length": 128, "redraw_mask": True},
  "d1": _GREEDY,
  "agrpo": {**_GREEDY, "stop_at_eos": True},
  "fast_dllm": {
    **_GREEDY,
    "unmask_rule": "threshold",
    "threshold": 0.9,
    "redraw_mask": True,
  },
}


def config(sampler: str, model: str = "") -> config_lib.ConfigDict:
  """The command line's config with a sampler and a model put in.

  Raises:
    UserError: an unknown sampler.
  """
  c = command.CONFIG.value
  given = config_flags.get_override_values(flags.FLAGS["config"])
  prefix = "evaluate."
  keep = [key[len(prefix) :] for key in given if key.startswith(prefix)]
  apply(c, sampler, keep)
  if model:
    c.model.path = model
  return c


def apply(
  c: config_lib.ConfigDict, name: str, keep: Collection[str] = ()
) -> None:
  """Gives `c.evaluate` the settings called `name`.

  Args:
    c: changed in place.
    name: one of PRESETS.
    keep: keys of `c.evaluate` that stay as they are.

  Raises:
    UserError: an unknown name.
  """
  if name not in PRESETS:
    raise errors.UserError(
      f"--sampler={name!r} is unknown; the known ones are {', '.join(PRESETS)}."
    )
  for key, value in PRESETS[name].items():
    if key not in keep:
      c.evaluate[key] = value
