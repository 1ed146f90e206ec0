"""A config for commands that are given a model and settings, but no config."""

from __future__ import annotations

from typing import Any

from agrpo_jax import config as config_lib
from agrpo_jax import errors
from agrpo_jax import presets
from agrpo_jax.samplers import sampling as sampling_lib


def config(
  base: config_lib.ConfigDict | None,
  model: str = "",
  sampler: str = "config",
  **changes: Any,
) -> config_lib.ConfigDict:
  """The config to draw completions under.

  Args:
    base: as from a config file; None for the defaults.
    model: folder or hub id in place of the base's; "" for the same.
    sampler: a name in `presets`.
    **changes: keys of `config.evaluate` that differ from all of this; None
      changes nothing.

  Raises:
    UserError: no model, or settings that are unknown or contradict each other.
  """
  c = config_lib.rl() if base is None else base.copy_and_resolve_references()
  if model:
    c.model.path = model
  if not c.model.path:
    raise errors.UserError("Which model? Give its folder or hub id.")
  presets.apply(c, sampler)
  known = config_lib.sampling_settings(c.evaluate)
  unknown = sorted(changes.keys() - known.keys())
  if unknown:
    raise errors.UserError(
      f"Unknown settings {', '.join(unknown)}; the known ones are "
      f"{', '.join(sorted(known))}."
    )
  for name, value in changes.items():
    if value is not None:
      try:
        c.evaluate[name] = value
      except TypeError as error:
        raise errors.UserError(f"{name}={value!r}: {error}") from error
  known = config_lib.sampling_settings(c.evaluate)
  found = sampling_lib.problems(
    sampling_lib.Sampling(mask_id=0, eos_id=0, **known)
  )
  if found:
    raise errors.UserError("; ".join(found) + ".")
  return c
