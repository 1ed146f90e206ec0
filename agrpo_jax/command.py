"""How the commands start and how they end."""

import difflib
import errno
import json
import logging as python_logging
import os
import pathlib
import re
import runpy
import sys
import time
import traceback
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from collections.abc import Set
from typing import Any
from typing import NoReturn

import jax
from absl import app
from absl import flags
from absl import logging
from ml_collections import config_flags

from agrpo_jax import config as config_lib
from agrpo_jax import errors
from agrpo_jax.parallel import processes
from agrpo_jax.runs import checkpoint_named
from agrpo_jax.samplers import sampling


def _shipped() -> dict[str, str]:
  """Returns the paths of the configs that come with the package, by name."""
  # A wheel has them inside of the package, a checkout beside it.
  package = pathlib.Path(__file__).parent
  folder = package / "configs"
  if not folder.is_dir():
    folder = package.parent / "configs"
  return {path.stem: str(path) for path in sorted(folder.glob("*.py"))}


CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  f"A config by name, of {', '.join(_shipped())}, or a file; NAME:VARIANT and "
  "FILE:VARIANT change it. "
  "--config.KEY=VALUE changes a key, as in --config.rollout.temperature=0.8; "
  "agrpo_jax/config.py lists the keys with their units and legal values.",
  # What has legal keys is locked by config.py; options of a task are free.
  lock_config=False,
  accept_new_attributes=True,
)


class _ConfigFile(flags.ArgumentParser):
  """Parses --config=FILE[:VARIANT], where FILE may be a shipped one's name.

  Attributes:
    file: the path that was last parsed, "" before.
    config: what its get_config returned.
  """

  def __init__(self, by_path: flags.ArgumentParser):
    self.file = ""
    self.config: Any = None
    self._by_path = by_path

  def parse(self, argument: str) -> Any:
    name, colon, variant = argument.partition(":")
    self.file = find_config(name)
    self.config = self._by_path.parse(self.file + colon + variant)
    return self.config

  def flag_type(self) -> str:
    return self._by_path.flag_type()


def find_config(file: str) -> str:
  """Returns the path of a config file.

  Args:
    file: its path, or the name of a shipped one. An existing file wins.

  Raises:
    UserError: neither is there.
  """
  path = os.path.expanduser(file)
  if pathlib.Path(path).is_file():
    return path
  found = _shipped()
  if file in found:
    return found[file]
  close = difflib.get_close_matches(pathlib.Path(file).stem, found, n=1)
  guess = f" Did you mean {close[0]}?" if close else ""
  raise errors.UserError(
    f"There is no file {file!r}, and no shipped config of that name.{guess} "
    f"Those are {', '.join(found)}."
  )


def load_config(name: str) -> config_lib.ConfigDict:
  """Returns the config that --config=NAME names, for programs and notebooks.

  Args:
    name: of a shipped config or path of a file, with :VARIANT or without.

  Raises:
    UserError: there is no such config.
  """
  file, _, variant = name.partition(":")
  get_config = runpy.run_path(find_config(file))["get_config"]
  return get_config(variant) if variant else get_config()


_PARSER = _ConfigFile(flags.FLAGS["config"].parser)
flags.FLAGS["config"].parser = _PARSER
_PROCESSES = {
  "coordinator": "Of a run of several processes: HOST:PORT of process 0.",
  "num_processes": "How many they are.",
  "process_id": "Which of them this one is, from 0.",
}
for _name, _meaning in _PROCESSES.items():
  flags.DEFINE_string(_name, None, f"{_meaning} Else AGRPO_{_name.upper()}.")

_HELP = ("help", "?", "helpshort", "helpfull", "helpxml")
# As ml_collections says it, before all that there is.
_ABSENT_KEY = re.compile(r'Key "([^"]*)" does not exist')
_KEY = re.compile(r"--?(?:no)?config\.([^=]+)")
# A disk's refusals; what has a place of its own to write to says more of it.
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def main(
  function: Callable[[Sequence[str]], None],
  required: Sequence[str] = (),
  num_words: int = 0,
) -> None:
  """Runs a command: flags, then `function`, then an exit code.

  Args:
    function: given the command line's words that are no flags, the first of
      them the program's name.
    required: flags that must be given.
    num_words: how many words besides flags it takes at most.

  A mistake of the user ends it with one message and code 2, a value that is not
  finite with code 3, the loss of another process with code 4, a signal to
  stop with 128 plus its number. Everything else is our mistake and shows its
  traceback. Of several processes, which must agree in flags and config, the
  first speaks.
  """

  def parse(argv: Sequence[str]) -> list[str]:
    for name in (*required, *_PROCESSES):
      _list_in_help(name)
    try:
      rest = flags.FLAGS(argv)
      missing = [name for name in required if flags.FLAGS[name].value is None]
      if _PARSER.file:
        _ = CONFIG.value.workdir  # raises what went wrong in the config file
        config_lib.choose_objective(
          CONFIG.value,
          {x: flags.FLAGS[f"config.{x}"].default for x in given_keys()},
        )
    except SystemExit:
      if any(word.lstrip("-") in _HELP for word in argv):
        sys.exit(0)  # absl's own code would be 1
      raise
    except flags.Error as error:
      _fail(_flags_mistake(error))
    except Exception as error:
      _fail(_config_mistake(error))
    if missing:
      listed = ", ".join(f"--{name}=..." for name in missing)
      _fail(f"Missing: {listed} (--help says what they are).")
    return rest

  def guarded(argv: Sequence[str]) -> None:
    if len(argv) > 1 + num_words:
      unknown = " ".join(argv[1 + num_words :])
      most = f" (at most {num_words} words)" if num_words else ""
      _fail(f"Unknown arguments {unknown}{most}; settings start with --.")
    try:
      processes.initialize(**{n: flags.FLAGS[n].value for n in _PROCESSES})
      if not processes.is_main():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
      different = processes.differences(_settings())
      if different:
        _fail(
          "The processes of the run differ in\n  "
          + "\n  ".join(different)
          + "\nStart all of them with the same command, config files and code.",
          is_shared=True,
        )
      function(argv)
    except errors.UserError as error:
      _fail(str(error))
    except errors.Stopped as stopped:
      _fail(str(stopped), stopped.code, is_shared=True)
    except FloatingPointError as error:
      _fail(str(error), code=3, is_shared=True)
    except KeyboardInterrupt as error:
      # What can go on says so where it is interrupted.
      _fail(str(error) or "Stopped.", code=130)
    except Exception as error:
      if isinstance(error, OSError) and error.errno in _UNWRITABLE:
        file = f" {error.filename!r}" if error.filename else ""
        _fail(
          f"Cannot write{file}: {error.strerror}. Make room, or give another "
          "place, and start the same command again."
        )
      if processes.is_lost(error):
        first_line = str(error).splitlines()[0][:200]
        processes.leave(f"{processes.LOST} ({first_line})")
      if not jax.distributed.is_initialized():
        raise
      _fail(traceback.format_exc(), code=1)

  logging.set_verbosity(logging.WARNING)
  # Orbax warns of options that it fills in by itself.
  logging.get_absl_logger().addFilter(
    lambda record: "orbax" not in record.pathname
  )
  python_logging.getLogger("jax").setLevel(python_logging.WARNING)
  python_logging.getLogger("asyncio").addFilter(_is_of_no_save)
  sys.unraisablehook = _show_unraisable
  app.run(guarded, flags_parser=parse)


def _flags_mistake(error: flags.Error) -> str:
  """Says what went wrong while the flags were read."""
  said = f"Cannot use the flags: {str(error).strip().splitlines()[-1]}"
  # A config's keys are flags from --config on.
  if _KEY.match(f"--{getattr(error, 'flagname', '')}") and not _PARSER.file:
    return f"{said}. It changes a config: give --config=NAME_OR_FILE too."
  return said


def _config_mistake(error: Exception) -> str:
  """Says what went wrong while the config file was read and changed."""
  file = _PARSER.file
  if isinstance(error, SyntaxError) and error.filename == file:
    return f"{file}, line {error.lineno}, is no Python: {error.msg}."
  frames = traceback.extract_tb(error.__traceback__)
  own = [frame for frame in frames if frame.filename == file]
  reason = f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"
  if own and (absent := _ABSENT_KEY.search(str(error))):
    names = {*_keys(config_lib.rl()), *_keys(config_lib.sft())}
    close = difflib.get_close_matches(absent[1], names, n=1)
    guess = f"; did you mean {close[0]}?" if close else "."
    reason = (
      f"there is no key {absent[1]!r} where it is set{guess} "
      f"{config_lib.__file__} says which there are."
    )
  if own:
    return f"{file}, line {own[-1].lineno}, failed: {reason}"
  if "get_config" in str(error):
    return (
      f"{file} has no function get_config(); a config file has one, returning "
      "a config, which starts from agrpo_jax.config.rl() or sft()."
    )
  if isinstance(error, (AttributeError, KeyError)):
    if not isinstance(_PARSER.config, config_lib.ConfigDict):
      return (
        f"get_config() of {file} returned {_PARSER.config!r:.80}; it returns a "
        "config, which starts from agrpo_jax.config.rl() or sft()."
      )
    for flag in filter(None, map(_KEY.match, sys.argv)):
      if unknown := _unknown_key(_PARSER.config, flag[1]):
        return unknown
  return f"Cannot use {file} with these flags: {reason}"


def _keys(c: config_lib.ConfigDict) -> Iterator[str]:
  for name, value in c.items():
    yield name
    if isinstance(value, config_lib.ConfigDict):
      yield from _keys(value)


def _unknown_key(c: config_lib.ConfigDict, key: str) -> str:
  """Says which part of `key` the config lacks; "" if it lacks none."""
  where, held = "config", c
  for name in key.split("."):
    is_tree = isinstance(held, config_lib.ConfigDict)
    if not is_tree or (held.is_locked and name not in held):
      names = [*held] if is_tree else []
      close = difflib.get_close_matches(name, names, n=1)
      guess = f"; did you mean {close[0]}?" if close else "."
      return (
        f"{where} has no key {name!r}{guess} It has "
        f"{', '.join(names) or 'none'}. {config_lib.__file__} says what each "
        "key is."
      )
    where, held = f"{where}.{name}", held.get(name)
  return ""


def _show_unraisable(unraisable: Any) -> None:
  """Shows an exception that nobody can catch, unless a failed save left it.

  Of the arrays that are being written, the first that fails ends the save with
  its event loop. Threads of the storage library that finish the others find it
  closed: a traceback for each, beside the one message that says why.
  """
  if str(unraisable.exc_value) != "Event loop is closed":
    sys.__unraisablehook__(unraisable)


def _is_of_no_save(record: python_logging.LogRecord) -> bool:
  """Drops what the event loop says of arrays that failed after the first.

  The save raises the error of the first. A second one that fails before the
  loop ends was "never retrieved", and would be a traceback of its own.
  """
  return "orbax" not in record.getMessage()


_SHARED = {
  "model": "Folder or hub id, instead of config.model.path.",
  "checkpoint": checkpoint_named.HELP,
  "sampler": f"Settings by name: {', '.join(config_lib.SAMPLERS)}.",
  "output": "Folder, or file ending in .jsonl, for the records.",
}


def define_flags(*names: str) -> None:
  """Defines flags that several commands have; called by the one that runs."""
  for name in names:
    default = "config" if name == "sampler" else ""
    flags.DEFINE_string(name, default, _SHARED[name])
    _list_in_help(name)


def _list_in_help(name: str) -> None:
  """Has --help list a flag that is not defined in the command's own module."""
  flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])


def given_keys() -> set[str]:
  """Returns the keys that --config.KEY=VALUE flags give."""
  if CONFIG.value is None:
    return set()
  return {*config_flags.get_override_values(flags.FLAGS["config"])}


def evaluation_config(
  sampler: str = "config", model: str = "", **changes: Any
) -> tuple[config_lib.ConfigDict, set[str]]:
  """Returns the command line's config with a sampler and a model put in.

  Without --config it starts from the defaults.

  Args:
    sampler: one of `config.SAMPLERS`; keys on the command line stay.
    model: folder or hub id, or "" for the config's.
    **changes: what flags of their own give for keys of `config.evaluate`, which
      stay too; None is nothing.

  Returns:
    The config, a copy; the keys that stand on the command line, `model.path`
    among them if `model` does.

  Raises:
    UserError: an unknown sampler, or a config of another kind.
  """
  c = (CONFIG.value or config_lib.rl()).copy_and_resolve_references()
  config_lib.check_kind(c, "rl")
  given = given_keys()
  prefix = "evaluate."
  keep = {key.removeprefix(prefix) for key in given if key.startswith(prefix)}
  keep |= {name for name, value in changes.items() if value is not None}
  config_lib.use_sampler(c, sampler, keep)
  config_lib.set_evaluate(c, changes)
  _drop_parameters(c, config_lib.SAMPLERS[sampler].keys() - keep)
  if model:
    c.model.path = model
    given.add("model.path")
  return c, given


def _drop_parameters(c: config_lib.ConfigDict, names: Set[str]) -> None:
  """Takes back what a sampler set for its rule, where another was asked for.

  Args:
    c: changed in place.
    names: keys of `c.evaluate` that the sampler set.
  """
  rule = c.evaluate.unmask_rule
  if rule not in sampling.RULES:
    return  # `settings` says so, with everything else that is wrong
  every = {x for other in sampling.RULES for x in sampling.parameters(other)}
  for name in (every & names).difference(sampling.parameters(rule)):
    c.evaluate[name] = None


def numbers(flag: str, texts: Sequence[str], kind: type) -> list[Any]:
  """Returns what a flag lists, as int or float.

  Raises:
    UserError: naming what is no number.
  """
  found = []
  for text in texts:
    try:
      found.append(kind(text))
    except ValueError:
      raise errors.UserError(
        f"--{flag}={','.join(texts)}: {text!r} is no {kind.__name__}."
      ) from None
  return found


def _settings() -> dict[str, Any]:
  """Returns what must be the same on all processes: the config, our flags."""
  found: dict[str, Any] = {
    f"--{flag.name}": flag.value
    for module, own in flags.FLAGS.flags_by_module_dict().items()
    if not module.startswith("absl")
    for flag in own
    if not flag.name.startswith("config") and flag.name not in _PROCESSES
  }
  if CONFIG.value is not None:
    found["config"] = json.loads(CONFIG.value.to_json())
  return found


def _fail(message: str, code: int = 2, *, is_shared: bool = False) -> NoReturn:
  """Says why and ends; `is_shared` tells that all processes do so here."""
  sys.stdout.flush()
  print(message, file=sys.stderr, flush=True)
  if jax.distributed.is_initialized() and not is_shared:
    if code == 2 and processes.is_main():
      # JAX ends the others with this one; those that failed alike say so first.
      time.sleep(1)
    # An orderly end waits for the others, who may be waiting for this process.
    os._exit(code)
  sys.exit(code)
