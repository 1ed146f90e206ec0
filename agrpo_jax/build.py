"""From a config to the objects of a run; beyond here there is no ConfigDict."""

import dataclasses
import functools
import pathlib
import random
import types as python_types
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from agrpo_jax import config as config_lib
from agrpo_jax import data
from agrpo_jax import demonstrations
from agrpo_jax import errors
from agrpo_jax import learner as learner_lib
from agrpo_jax import optimizer
from agrpo_jax import tasks
from agrpo_jax import types
from agrpo_jax.grading import pool
from agrpo_jax.models import base
from agrpo_jax.models import lora as lora_lib
from agrpo_jax.models import tokens
from agrpo_jax.models import transformer
from agrpo_jax.parallel import mesh as mesh_lib
from agrpo_jax.parallel import split
from agrpo_jax.policies import guided
from agrpo_jax.policies import plain
from agrpo_jax.port import model_folder
from agrpo_jax.runs import checkpoint_meta
from agrpo_jax.samplers import host
from agrpo_jax.samplers import sampling as sampling_lib
from agrpo_jax.tasks import contract


@dataclasses.dataclass(frozen=True)
class Policy:
  """A network with its parameters, and what reads and writes its text.

  Attributes:
    mesh: where it lives.
    network: the network's shape and compute settings.
    params: its parameters: frozen when there are adapters.
    lora: adapters, or None when all parameters are trained.
    lora_settings: of the adapters, or None.
    tokenizer: text <-> ids.
    base_model: the checkpoint that the parameters came from; None if they are
      only described.
  """

  mesh: mesh_lib.Mesh
  network: base.Shape
  params: types.Tree
  lora: types.Tree | None
  lora_settings: lora_lib.Lora | None
  tokenizer: tokens.Tokenizer
  base_model: checkpoint_meta.BaseModel | None

  def bind(self, params: types.Tree, lora: types.Tree | None) -> types.Network:
    """Returns the network bound to parameters and adapter."""
    scale = self.lora_settings.scale if self.lora_settings else 1.0
    rows = mesh_lib.rows(self.mesh) if self.mesh.size > 1 else None
    return types.Network(
      transformer.logits_fn(self.network, params, lora, scale, rows),
      split.top_k_of(self.mesh),
    )


def policy(c: config_lib.ConfigDict, *, is_trained: bool = True) -> Policy:
  """Loads the model that a config names onto the mesh it asks for.

  What is trained is float32; what is only read has the dtype it computes in.
  `is_trained` false says that this run neither trains the parameters nor reads
  trained ones from a checkpoint.
  """
  mesh = mesh_lib.make(c.mesh.data, c.mesh.fsdp, c.mesh.tensor)
  network, params = model_folder.load(
    c.model.path,
    dtype="float32" if is_trained and not c.lora.rank else c.model.dtype,
    shardings=lambda network: mesh_lib.shardings(
      mesh,
      transformer.logical_axes(network),
      transformer.abstract_params(network),
    ),
    revision=c.model.revision or None,
    compute_dtype=c.model.dtype,
    remat=c.model.remat,
    attention=c.model.attention,
  )
  return from_params(c, mesh, network, params)


def from_params(
  c: config_lib.ConfigDict,
  mesh: mesh_lib.Mesh,
  network: base.Shape,
  params: types.Tree,
) -> Policy:
  """Adds adapters and tokenizer to a network whose parameters are there."""
  settings = adapters = None
  if c.lora.rank:
    settings = lora_lib.Lora(c.lora.rank, c.lora.alpha, tuple(c.lora.targets))
    init = functools.partial(
      lora_lib.init, settings, transformer.abstract_params(network)
    )
    key = jax.random.fold_in(jax.random.key(c.seed), 1)
    axes = lora_lib.logical_axes(settings, transformer.logical_axes(network))
    adapters = jax.jit(
      init,
      out_shardings=mesh_lib.shardings(mesh, axes, jax.eval_shape(init, key)),
    )(key)
  return Policy(
    mesh=mesh,
    network=network,
    params=params,
    lora=adapters,
    lora_settings=settings,
    tokenizer=model_folder.load_tokenizer(
      c.model.tokenizer or c.model.path, network
    ),
    base_model=checkpoint_meta.describe_base(
      c.model.path, c.model.revision, params
    ),
  )


def task(c: config_lib.ConfigDict) -> python_types.ModuleType:
  return tasks.get(c.task.name, c.task.path or None)


def examples(c: config_lib.ConfigDict, split: str) -> list[tasks.Example]:
  """The task's problems of a split."""
  path = c.data.path
  if split == "test":
    path = c.data.test_path or path
    if not c.data.test_path and pathlib.Path(path).is_file():
      logging.warning(
        "The held-out problems are those of config.data.path=%s, training's "
        "too; give others as config.data.test_path, or a folder of train.* "
        "and test.* as config.data.path.",
        path,
      )
  return contract.examples(
    task(c), split, path=path or None, options=config_lib.task_options(c)
  )


def dataset(
  c: config_lib.ConfigDict, tokenizer: tokens.Tokenizer, split: str
) -> data.Dataset:
  """The task's problems of a split, tokenized."""
  return data.Dataset(examples(c, split), tokenizer, c.data.max_prompt_length)


def held_out(
  c: config_lib.ConfigDict, tokenizer: tokens.Tokenizer
) -> list[tuple[tasks.Example, list[int]]]:
  """(example, prompt's ids) of the problems that an evaluation looks at."""
  prompts = dataset(c, tokenizer, c.evaluate.split).prompts
  return [
    (prompt.example, prompt.tokens)
    for prompt in prompts[: c.evaluate.num_examples or None]
  ]


def reference(c: config_lib.ConfigDict, policy: Policy) -> types.Tree | None:
  """The reference policy's parameters where training would change them."""
  if c.objective.kl_coef == 0 or policy.lora is not None:
    return None
  return jax.tree.map(jnp.copy, policy.params)


def pairs(
  c: config_lib.ConfigDict, tokenizer: tokens.Tokenizer
) -> demonstrations.Demonstrations:
  """Demonstrations for SFT: the task's own, or those of a JSONL file.

  Raises:
    UserError: a task that cannot make demonstrations.
  """
  if c.task.name or c.task.path:
    if not hasattr(task(c), "demonstration"):
      raise errors.UserError(
        f"The task {c.task.name or c.task.path!r} makes no demonstrations; "
        "give a JSONL file of prompt and completion as config.data.path and "
        "leave config.task.name empty."
      )
    rows = dataset(c, tokenizer, "train")
    options = config_lib.task_options(c)

    def completion_fn(example: tasks.Example, rng: random.Random) -> str:
      return contract.demonstration(task(c), example, rng, options)

  else:
    rows = data.Dataset(
      demonstrations.from_jsonl(c.data.path),
      tokenizer,
      c.data.max_prompt_length,
    )
    completion_fn = demonstrations.recorded
  return demonstrations.Demonstrations(
    rows,
    completion_fn,
    tokenizer,
    completion_length=c.sft.completion_length,
    batch_size=c.sft.batch_size,
    bucket=c.data.bucket,
    seed=c.seed,
  )


def grader(c: config_lib.ConfigDict) -> pool.Grader:
  return pool.Grader(
    c.task.name,
    config_lib.task_options(c),
    c.task.reward_weights.to_dict(),
    c.grading.num_workers,
    c.grading.timeout_seconds,
    memory_gib=c.grading.memory_gib,
    task_path=c.task.path or None,
  )


def sampling(
  sub: config_lib.ConfigDict, tokenizer: tokens.Tokenizer
) -> sampling_lib.Sampling:
  return sampling_lib.Sampling(
    mask_id=tokenizer.mask_id,
    eos_id=tokenizer.eos_id,
    **config_lib.sampling_settings(sub),
  )


def check_rows(mesh: mesh_lib.Mesh, key: str, rows: int) -> None:
  """Raises UserError when rows do not divide over the mesh."""
  shards = mesh_lib.num_row_shards(mesh)
  if rows % shards:
    raise errors.UserError(
      f"config.{key}={rows} rows do not divide over the {shards} devices of "
      "the mesh axes data and fsdp; make it a multiple."
    )


def check_sampler(
  c: config_lib.ConfigDict,
  sub: config_lib.ConfigDict,
  mesh: mesh_lib.Mesh,
  network: base.Shape,
) -> None:
  """Raises UserError for rows that do not fit the mesh or the network."""
  name = "rollout" if "num_prompts" in sub else "evaluate"
  check_rows(mesh, f"{name}.batch_size", sub.batch_size)
  longest = c.data.max_prompt_length + sub.completion_length
  if longest > network.max_length:
    raise errors.UserError(
      f"config.data.max_prompt_length={c.data.max_prompt_length} and "
      f"completion_length={sub.completion_length} make {longest} tokens, more "
      f"than the model's {network.max_length}; lower one of them."
    )


def make_sampler(
  c: config_lib.ConfigDict, sub: config_lib.ConfigDict, policy: Policy
) -> host.Sampler:
  """Draws completions under the settings of a sub-tree of the config.

  Raises:
    UserError: see `check_sampler`.
  """
  check_sampler(c, sub, policy.mesh, policy.network)
  guidance = sub.get("guidance", 0.0)
  return host.Sampler(
    bind=policy.bind,
    sampling=sampling(sub, policy.tokenizer),
    mesh=policy.mesh,
    batch_size=sub.batch_size,
    bucket=c.data.bucket,
    policy=guided.Guided(guidance, policy.tokenizer.mask_id)
    if guidance
    else plain.PLAIN,
  )


def make_learner(
  c: config_lib.ConfigDict, policy: Policy
) -> learner_lib.Learner:
  """The train step that a config asks for.

  Raises:
    UserError: a microbatch that does not divide over the mesh.
  """
  o = c.objective
  check_rows(policy.mesh, "objective.microbatch", o.microbatch)
  return learner_lib.Learner(
    bind=policy.bind,
    optimizer=optimizer.make(config_lib.optimizer_settings(c)),
    sampling=sampling(c.rollout, policy.tokenizer),
    objective=config_lib.objective_settings(o),
    group_size=c.rollout.group_size,
    microbatch=o.microbatch,
    shard_rows=shard_rows(policy.mesh),
  )


def shard_rows(mesh: mesh_lib.Mesh) -> Any:
  """Puts the leading axis of the arrays of a tree on the mesh, inside jit."""
  if mesh_lib.num_row_shards(mesh) == 1:
    return lambda tree: tree
  rows = mesh_lib.rows(mesh)
  return lambda tree: jax.lax.with_sharding_constraint(tree, rows)


def init_state(policy: Policy, transformation: Any) -> types.TrainState:
  """The state before the first train step, placed on the mesh."""
  trainable = policy.params if policy.lora is None else policy.lora
  replicated = mesh_lib.replicated(policy.mesh)
  opt_state = jax.jit(
    transformation.init,
    out_shardings=optimizer.state_shardings(
      transformation,
      trainable,
      jax.tree.map(lambda x: x.sharding, trainable),
      replicated,
    ),
  )(trainable)
  return types.TrainState(
    train_step=jax.device_put(jnp.int32(0), replicated),
    params=policy.params,
    lora=policy.lora,
    opt_state=opt_state,
  )
