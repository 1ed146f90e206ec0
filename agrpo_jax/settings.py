"""A config as typed records, with everything that is wrong with it at once.

The one place that reads a `ConfigDict`: what `config.py` and the command line
made becomes frozen records, one per sub-tree, with the same names. Nothing is
loaded, downloaded or compiled for it. A record's attribute has the meaning,
unit and legal values that `config.py` gives the key of that name.
"""

import dataclasses
import importlib.util
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any
from typing import TypeVar

from agrpo_jax import config as config_lib
from agrpo_jax import data
from agrpo_jax import errors
from agrpo_jax import learner as learner_lib
from agrpo_jax import objectives
from agrpo_jax import optimizer as optimizer_lib
from agrpo_jax import tasks
from agrpo_jax import types
from agrpo_jax.grading import pool
from agrpo_jax.models import base as models
from agrpo_jax.models import lora as lora_lib
from agrpo_jax.objectives import agrpo
from agrpo_jax.parallel import mesh as mesh_lib
from agrpo_jax.runs import run as run_lib
from agrpo_jax.samplers import host
from agrpo_jax.samplers import sampling as sampling_lib

# What `jax.random.key` tells apart.
_MAX_SEED = 2**32 - 1
_MAX_TEMPERATURE = 100.0

R = TypeVar("R")


@dataclasses.dataclass(frozen=True)
class Mesh:
  """Devices per axis; -1 for what the others leave."""

  data: int
  fsdp: int
  tensor: int

  def make(self, devices: Any = None) -> mesh_lib.Mesh:
    """Returns the mesh of the devices, of this run if None."""
    return mesh_lib.make(self.data, self.fsdp, self.tensor, devices)


@dataclasses.dataclass(frozen=True)
class Grading:
  """Worker processes of the grader."""

  num_workers: int
  timeout_seconds: float
  memory_gib: float


@dataclasses.dataclass(frozen=True)
class Rollout(host.Draw):
  """The completions of a train step: N prompts, G of each."""

  num_prompts: int
  group_size: int

  @property
  def num_rows(self) -> int:
    return self.num_prompts * self.group_size


@dataclasses.dataclass(frozen=True)
class Evaluate(host.Draw):
  """The evaluations of a run, or of a model."""

  every: int
  split: str
  num_examples: int


@dataclasses.dataclass(frozen=True)
class Run:
  """The settings that runs of every kind have.

  Attributes:
    workdir: folder of logs and checkpoints.
    seed: all randomness of the run comes from it.
    accept_changed_config: go on in a work directory of another config.
    lora: adapters, or None to train all parameters.
    as_json: the config as it is dumped with the run.
    others: see the records.
  """

  workdir: str
  seed: int
  accept_changed_config: bool
  model: models.Source
  lora: lora_lib.Lora | None
  mesh: Mesh
  task: data.Task
  data: data.Files
  optimizer: optimizer_lib.Optimizer
  train: run_lib.Train
  wandb: run_lib.Wandb
  report: run_lib.Report
  as_json: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Rl(Run):
  """Reinforcement learning, `agrpo_jax.main`.

  Attributes:
    objective: what is visited, and the loss.
    microbatch: units (visits that share what the policy computes once) per
      forward and backward pass.
    step_price: what a completion pays for all K denoising steps.
    others: see the records.
  """

  rollout: Rollout
  objective: objectives.Objective
  microbatch: int
  step_price: float
  grading: Grading
  evaluate: Evaluate

  def start_grader(self) -> pool.Grader:
    """Starts the worker processes that grade the task's completions."""
    return pool.Grader(
      self.task.name,
      self.task.options,
      self.task.reward_weights,
      task_path=self.task.path or None,
      **dataclasses.asdict(self.grading),
    )

  def check_network(self, shape: models.Shape) -> None:
    """Raises UserError where the objective does not fit a network."""
    cache = self.rollout.sampling_for(shape).cache
    if shape.attention_block and not self.objective.replays and cache == "none":
      raise errors.UserError(
        f"config.objective.name={self.as_json['objective']['name']!r} masks "
        "completions by itself, in all blocks at once; a block-causal model "
        f"(model_type {shape.model_type!r}) predicts a block from whole ones "
        "before it, which only its cache tells: use config.rollout.cache=block."
      )

  def make_learner(
    self, bind: types.BindFn, vocabulary: host.Vocabulary, mesh: mesh_lib.Mesh
  ) -> learner_lib.Learner:
    """Returns the train step of these settings.

    Args:
      bind: binds the network to parameters and adapter.
      vocabulary: the ids of [MASK] and EOS.
      mesh: rows are split over it.

    Raises:
      UserError: a microbatch that does not divide over the mesh, or an
        objective that does not fit the sampler.
    """
    mesh_lib.check_rows(mesh, "config.objective.microbatch", self.microbatch)
    return learner_lib.Learner(
      bind=bind,
      optimizer=optimizer_lib.make(self.optimizer),
      sampling=self.rollout.sampling_for(vocabulary),
      objective=self.objective,
      group_size=self.rollout.group_size,
      microbatch=self.microbatch,
      step_price=self.step_price,
      policy=self.rollout.policy_for(vocabulary),
      shard_rows=mesh_lib.shard_rows(mesh),
    )


@dataclasses.dataclass(frozen=True)
class Sft(Run):
  """Supervised fine-tuning, `agrpo_jax.sft`.

  Attributes:
    network: shape of a network to start from random parameters; empty where
      `model.path` is given.
    completion_length: tokens.
    batch_size: demonstrations per train step.
    microbatch: of them at once.
    output: folder for the model that comes out, or "".
    others: see `Run`.
  """

  network: Mapping[str, Any]
  completion_length: int
  batch_size: int
  microbatch: int
  output: str


@dataclasses.dataclass(frozen=True)
class Drawing:
  """The settings of a command that draws or scores completions.

  Attributes:
    seed: of the draws.
    lora: adapters of a run, or None.
    evaluate: how completions are drawn.
    others: see the records; without a name or a path there is no task.
  """

  seed: int
  model: models.Source
  lora: lora_lib.Lora | None
  mesh: Mesh
  task: data.Task
  data: data.Files
  evaluate: Evaluate


def rl(c: config_lib.ConfigDict) -> Rl:
  """Returns the settings of reinforcement learning and evaluation.

  Raises:
    UserError: the config is of another kind of run, or has mistakes; all of
      them are named.
  """
  config_lib.check_kind(c, "rl")
  problems = _Problems(_type_problems(c, config_lib.rl()))
  problems.raise_if_any()  # nothing else can be said of a value of no number
  made = _rl(c, problems)
  problems.raise_if_any()
  return made


def sft(c: config_lib.ConfigDict) -> Sft:
  """Returns the settings of supervised fine-tuning.

  Raises:
    UserError: as for `rl`.
  """
  config_lib.check_kind(c, "sft")
  problems = _Problems(_type_problems(c, config_lib.sft()))
  problems.raise_if_any()
  made = _sft(c, problems)
  problems.raise_if_any()
  return made


def drawing(c: config_lib.ConfigDict) -> Drawing:
  """Returns the settings of a command that only draws or scores completions.

  Nothing is asked of the rest of the config: how to train, where to.

  Raises:
    UserError: as for `rl`.
  """
  config_lib.check_kind(c, "rl")
  problems = _Problems(_type_problems(c, config_lib.rl()))
  problems.raise_if_any()
  problems.want(bool(c.model.path), "model.path", "", "a folder or hub id")
  made = Drawing(
    **_model(c, problems),
    task=_task(c, problems),
    evaluate=_evaluate(c, problems),
  )
  problems.raise_if_any()
  return made


def inspect(c: config_lib.ConfigDict) -> tuple[Rl, list[str]]:
  """Returns the settings of a config of `config.rl`, and what is wrong.

  For those who tell of the mistakes of several configs together.
  """
  problems = _Problems()
  made = _rl(c, problems)
  return made, [f"config.{problem}" for problem in problems]


class _Problems(list):
  """The mistakes found so far, a line each."""

  def want(self, is_fine: bool, key: str, value: Any, legal: str) -> bool:
    if not is_fine:
      self.append(f"{key}={value!r} must be {legal}")
    return is_fine

  def known(self, key: str, value: Any, choices: tuple[str, ...]) -> None:
    self.want(value in choices, key, value, f"one of {', '.join(choices)}")

  def at_least(
    self, least: int, key: str, sub: config_lib.ConfigDict, *names: str
  ) -> bool:
    before = len(self)
    for name in names:
      value = sub[name]
      self.want(value >= least, f"{key}.{name}", value, f"at least {least}")
    return len(self) == before

  def raise_if_any(self) -> None:
    if self:
      raise errors.UserError(
        "The config has "
        + (f"{len(self)} problems" if len(self) > 1 else "a problem")
        + ":\n"
        + "\n".join(f"  config.{problem}" for problem in self)
      )


# Sub-trees whose keys are those of a task, a network, or an objective.
_FREE = ("options", "defaults", "reward_weights", "network", "objective")


def _type_problems(
  c: config_lib.ConfigDict, default: config_lib.ConfigDict, prefix: str = ""
) -> list[str]:
  """Returns what is missing, unknown, or of another type than its default."""
  found = [f"{prefix}{key} is unknown" for key in c if key not in default]
  for key, usual in default.items():
    name = prefix + key
    if key not in c:
      found.append(f"{name} is missing")
    elif isinstance(usual, config_lib.ConfigDict):
      if not isinstance(c[key], config_lib.ConfigDict):
        found.append(f"{name}={c[key]!r} must be a group of keys")
      elif key not in _FREE:
        found += _type_problems(c[key], usual, f"{name}.")
    elif not _is_like(c[key], usual):
      kind = "number" if usual is None else type(usual).__name__
      found.append(f"{name}={c[key]!r} must be of type {kind}")
  return found


def _is_like(value: Any, usual: Any) -> bool:
  """Returns whether a value has the type of the default; 1 is a float too."""
  # True is an int to Python, but no number in a config.
  if isinstance(usual, bool) or isinstance(value, bool):
    return isinstance(usual, bool) and isinstance(value, bool)
  if usual is None:  # an optional number
    return value is None or isinstance(value, (int, float))
  if isinstance(usual, float):
    return isinstance(value, (int, float))
  if isinstance(usual, (tuple, list)):
    return isinstance(value, (tuple, list))
  return isinstance(value, type(usual))


def _record(record: type[R], sub: Mapping[str, Any], **given: Any) -> R:
  """A dataclass from the keys of a sub-tree that are its fields."""
  names = {field.name for field in dataclasses.fields(record)}  # type: ignore
  return record(**{n: sub[n] for n in sub if n in names} | given)


def _model(c: config_lib.ConfigDict, found: _Problems) -> dict:
  """What runs and `Drawing` have in common; adds what is wrong with it."""
  found.want(0 <= c.seed <= _MAX_SEED, "seed", c.seed, f"from 0 to {_MAX_SEED}")
  for name, choices in (
    ("dtype", models.DTYPES),
    ("remat", models.REMAT),
    ("attention", models.ATTENTION),
    ("quantize", models.QUANTIZE),
  ):
    found.known(f"model.{name}", c.model[name], choices)
  found.at_least(1, "model", c.model, "unroll")
  found.at_least(0, "model", c.model, "attention_block")
  for axis in mesh_lib.AXES:
    size = c.mesh[axis]
    found.want(
      size >= 1 or size == -1, f"mesh.{axis}", size, "a number of devices or -1"
    )
  found.at_least(1, "data", c.data, "max_prompt_length", "bucket")
  for name in ("path", "test_path"):
    found.want(
      not c.data[name] or pathlib.Path(c.data[name]).expanduser().exists(),
      f"data.{name}",
      c.data[name],
      "an existing file or folder",
    )
  return dict(
    seed=c.seed,
    model=_record(models.Source, c.model),
    lora=_lora(c, found),
    mesh=_record(Mesh, c.mesh),
    data=_record(data.Files, c.data),
  )


def _run(c: config_lib.ConfigDict, found: _Problems, num_updates: int) -> dict:
  """The attributes of `Run`; adds what is wrong with them."""
  found.want(bool(c.workdir), "workdir", c.workdir, "the folder of this run")
  if c.kind == "rl" or not c.data.path:
    found.want(
      bool(c.task.name or c.task.path),
      "task.name",
      c.task.name,
      "a task's name, or task.path the file of one",
    )
  found.at_least(1, "train", c.train, "num_steps", "checkpoint_every", "keep")
  found.at_least(0, "train", c.train, "log_samples")
  optimizer = optimizer_lib.Optimizer(
    num_updates=num_updates, **c.optimizer.to_dict()
  )
  found += optimizer_lib.problems(optimizer)
  found.want(
    not c.wandb.project or importlib.util.find_spec("wandb") is not None,
    "wandb.project",
    c.wandb.project,
    "empty, or the package installed: pip install 'agrpo_jax[wandb]'",
  )
  return dict(
    **_model(c, found),
    workdir=c.workdir,
    accept_changed_config=c.accept_changed_config,
    task=_task(c, found),
    optimizer=optimizer,
    train=_record(run_lib.Train, c.train),
    wandb=_record(run_lib.Wandb, c.wandb),
    report=_report(c, found),
    as_json=json.loads(c.to_json()),
  )


def _report(c: config_lib.ConfigDict, found: _Problems) -> run_lib.Report:
  price = c.report.chip_hour_price
  found.want(
    0 <= price < math.inf,
    "report.chip_hour_price",
    price,
    "0 (not known) or more",
  )
  if c.kind == "rl":
    found.at_least(0, "report", c.report, "num_completions")
  return _record(run_lib.Report, c.report)


def _lora(c: config_lib.ConfigDict, found: _Problems) -> lora_lib.Lora | None:
  rank, alpha, targets = c.lora.rank, c.lora.alpha, tuple(c.lora.targets)
  if rank == 0:
    return None
  wrong = lora_lib.setting_problems(rank, alpha, targets)
  found += [f"lora.{problem}" for problem in wrong]
  return None if wrong else lora_lib.Lora(rank, alpha, targets)


def _task(c: config_lib.ConfigDict, found: _Problems) -> data.Task:
  if c.task.name and not c.task.path:
    found.known("task.name", c.task.name, tasks.NAMES)
  weights = c.task.get("reward_weights") or {}
  weights = {part: w for part, w in weights.items() if w is not None}
  for part, weight in weights.items():
    found.want(
      isinstance(weight, (int, float)) and math.isfinite(weight),
      f"task.reward_weights.{part}",
      weight,
      "a finite number",
    )
  return data.Task(
    name="" if c.task.path else c.task.name,
    path=c.task.path,
    options=config_lib.task_options(c),
    reward_weights=weights,
  )


def _draw(
  record: type[R],
  key: str,
  sub: config_lib.ConfigDict,
  found: _Problems,
) -> R:
  # The ids are a model's, and none is loaded yet: `Draw.sampling_for`.
  sampling = _record(sampling_lib.Sampling, sub, mask_id=-1, eos_id=-1)
  found += [f"{key}.{p}" for p in sampling_lib.problems(sampling)]
  found.want(
    sampling.temperature <= _MAX_TEMPERATURE,
    f"{key}.temperature",
    sampling.temperature,
    f"at most {_MAX_TEMPERATURE:g}",
  )
  guidance = sub.get("guidance", 0.0)
  found.want(
    0 <= guidance < math.inf, f"{key}.guidance", guidance, "0 (off) or more"
  )
  found.want(
    not guidance or sampling.cache == "none",
    f"{key}.cache",
    sampling.cache,
    f"none with guidance={guidance}, which runs whole rows",
  )
  found.at_least(1, key, sub, "batch_size")
  found.want(
    0 <= sub.num_slots <= max(1, sub.batch_size),
    f"{key}.num_slots",
    sub.num_slots,
    f"from 1 to batch_size={sub.batch_size}, or 0 for as many",
  )
  return _record(record, sub, sampling=sampling, guidance=guidance)


def _evaluate(c: config_lib.ConfigDict, found: _Problems) -> Evaluate:
  found.at_least(0, "evaluate", c.evaluate, "every", "num_examples")
  return _draw(Evaluate, "evaluate", c.evaluate, found)


def _rl(c: config_lib.ConfigDict, found: _Problems) -> Rl:
  found.want(bool(c.model.path), "model.path", "", "a model to train")
  rollout = _draw(Rollout, "rollout", c.rollout, found)
  sampling = rollout.sampling
  found.want(
    sampling.temperature > 0,
    "rollout.temperature",
    sampling.temperature,
    "positive: without chance there is no policy gradient",
  )
  # Steps per block and rule are defined for legal settings only.
  if (
    not sampling_lib.problems(sampling)
    and sampling.rule.schedule == "exact"
    and sampling.schedule == "equal"
  ):
    found.want(
      sampling.steps_per_block <= sampling.block_length,
      "rollout.num_denoise_steps",
      sampling.num_denoise_steps,
      f"at most one a token: its {sampling.steps_per_block} steps a block are "
      f"more than block_length={sampling.block_length}",
    )
  found.want(
    sampling.top_k != 1 or sampling.unmask_rule == "soft_threshold",
    "rollout.top_k",
    sampling.top_k,
    "0 (all) or at least 2: without chance there is no policy gradient",
  )
  found.at_least(1, "rollout", c.rollout, "num_prompts")
  found.want(
    rollout.group_size >= 2,
    "rollout.group_size",
    rollout.group_size,
    "at least 2: a completion is compared with the rest of its group",
  )
  found.want(
    rollout.batch_size < 1 or rollout.num_rows % rollout.batch_size == 0,
    "rollout.batch_size",
    rollout.batch_size,
    f"a divisor of num_prompts * group_size = {rollout.num_rows}",
  )
  microbatch, price = c.objective.microbatch, c.objective.step_price
  found.want(
    _is_like(microbatch, 1) and microbatch >= 1,
    "objective.microbatch",
    microbatch,
    "a whole number, at least 1",
  )
  found.want(
    _is_like(price, 0.0) and 0 <= price < math.inf,
    "objective.step_price",
    price,
    "0 (none) or more",
  )
  own_file = c.objective.get("path", "")
  try:
    record = objectives.get(c.objective.name, own_file)
  except errors.UserError as error:
    found.append(f"objective.{'path' if own_file else 'name'}: {error}")
    # The other mistakes are to be told with it.
    record = agrpo.Agrpo
  usual = {f.name: f.default for f in dataclasses.fields(record)}  # type: ignore
  found += [
    f"objective.{key} is no setting of the objective "
    f"{own_file or c.objective.name!r}, which has {', '.join(sorted(usual))}; "
    "config.use_objective sets another"
    for key in c.objective
    if key not in {*usual, *objectives.SHARED_KEYS}
  ]
  own = {key: value for key, value in c.objective.items() if key in usual}
  for key in [key for key in own if not _is_like(own[key], usual[key])]:
    kind = type(usual[key]).__name__
    found.append(f"objective.{key}={own.pop(key)!r} must be of type {kind}")
  try:
    objective, wrong = objectives.make(record, own, sampling, own_file)
    found += [f"objective.{p}" for p in wrong]
  except errors.UserError as error:
    found.append(f"objective.path: {error}")
    objective = agrpo.Agrpo()
  evaluate = _evaluate(c, found)
  found.at_least(0, "train", c.train, "keep_best")
  found.at_least(1, "grading", c.grading, "num_workers")
  for name in ("timeout_seconds", "memory_gib"):
    value = c.grading[name]
    found.want(0 < value < math.inf, f"grading.{name}", value, "positive")
  # Schedules count optimizer updates, of which a train step may have several.
  num_updates = c.train.num_steps * objective.updates_per_batch
  return Rl(
    **_run(c, found, num_updates),
    rollout=rollout,
    objective=objective,
    microbatch=microbatch,
    step_price=price,
    grading=_record(Grading, c.grading),
    evaluate=evaluate,
  )


def _sft(c: config_lib.ConfigDict, found: _Problems) -> Sft:
  network = c.model.network.to_dict()
  found.want(
    bool(c.model.path) != bool(network),
    "model.path",
    c.model.path,
    "set, or model.network for random parameters, and not both",
  )
  sub = c.sft
  if found.at_least(
    1, "sft", sub, "completion_length", "batch_size", "microbatch"
  ):
    found.want(
      sub.batch_size % sub.microbatch == 0,
      "sft.microbatch",
      sub.microbatch,
      f"a divisor of batch_size={sub.batch_size}",
    )
  found.want(
    not sub.output or _can_write(pathlib.Path(sub.output).expanduser()),
    "sft.output",
    sub.output,
    "a folder that can be made or written",
  )
  found.want(
    not sub.output or c.model.quantize == "none",
    "sft.output",
    sub.output,
    f"empty with model.quantize={c.model.quantize!r}: the adapter belongs into "
    "the weights as they were, and `python -m agrpo_jax.port --checkpoint="
    "WORKDIR --to=DIR` writes these, on the host, when the run is done",
  )
  return Sft(
    **_run(c, found, c.train.num_steps),
    network=network,
    **sub.to_dict(),
  )


def _can_write(folder: pathlib.Path) -> bool:
  """Returns whether files can be written to a folder; makes nothing."""
  while not folder.exists():
    folder = folder.parent
  return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)
