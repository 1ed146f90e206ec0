"""The two programs of a train step, compiled from shapes alone.

The same functions as `train.py` uses, called with arrays that have a shape, a
dtype and a place on the mesh, but no memory.
"""

import dataclasses
import functools
import math
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp

from agrpo_jax import build
from agrpo_jax import config as config_lib
from agrpo_jax import errors
from agrpo_jax import models
from agrpo_jax import optimizer
from agrpo_jax import types
from agrpo_jax.models import base
from agrpo_jax.models import lora as lora_lib
from agrpo_jax.models import tokens
from agrpo_jax.models import transformer
from agrpo_jax.parallel import mesh as mesh_lib
from agrpo_jax.plan import chips
from agrpo_jax.plan import cost as cost_lib
from agrpo_jax.plan import hlo
from agrpo_jax.port import model_folder

# Shapes that need not be downloaded.
_LLADA_8B = base.Shape(
  model_type="llada",
  vocab_size=126464,
  embedding_size=126464,
  num_layers=32,
  width=4096,
  num_heads=32,
  num_kv_heads=32,
  mlp_width=12288,
  rope_theta=500000.0,
  norm_eps=1e-5,
  qkv_bias=False,
  tied_head=False,
  max_length=4096,
  mask_id=126336,
  eos_id=126081,
  pad_id=126081,
)
KNOWN = {
  "GSAI-ML/LLaDA-8B-Base": _LLADA_8B,
  "GSAI-ML/LLaDA-8B-Instruct": _LLADA_8B,
  "GSAI-ML/LLaDA-1.5": _LLADA_8B,
}


@dataclasses.dataclass(frozen=True)
class Program:
  """One compiled program, per device.

  Attributes:
    name: rollout or update.
    runs: how often it runs in a train step.
    arguments, outputs, temporaries: bytes; outputs without those that take
      over the memory of a donated argument.
    resident: bytes that lie in memory meanwhile and are no argument.
    trips: how often its outer loop runs.
    cost: of one run.
    refusal: the compiler's words if the program is too large for it, else "".
  """

  name: str
  runs: int
  arguments: int = 0
  outputs: int = 0
  temporaries: int = 0
  resident: int = 0
  trips: int = 0
  cost: cost_lib.Cost = dataclasses.field(default_factory=cost_lib.Cost)
  compile_seconds: float = 0.0
  refusal: str = ""

  @property
  def total(self) -> int:
    return self.arguments + self.outputs + self.temporaries + self.resident

  def fits(self, chip: chips.Chip | None) -> bool:
    return not self.refusal and (chip is None or self.total <= chip.hbm_bytes)

  def seconds(self, chip: chips.Chip) -> dict[str, float]:
    """The least time of one run for each resource.

    Without memory for GPUs: which products pass through it is up to their
    compiler, and this program is of the one for CPUs.
    """
    seconds = {
      "compute": self.cost.flops / chip.flops,
      "network": self.cost.wire_bytes / chip.wire_bandwidth,
    }
    if chip.is_tpu:
      seconds["memory"] = self.cost.bytes / chip.hbm_bandwidth
    return seconds


def network_of(c: config_lib.ConfigDict) -> base.Shape:
  """The shape of the config's model, read without its parameters.

  Raises:
    UserError: a hub id that is not known here.
  """
  switches = dict(
    dtype=c.model.dtype, remat=c.model.remat, attention=c.model.attention
  )
  if c.model.path in KNOWN:
    return dataclasses.replace(KNOWN[c.model.path], **switches)
  if pathlib.Path(c.model.path).expanduser().is_dir():
    return model_folder.load_shape(c.model.path, **switches)
  raise errors.UserError(
    f"config.model.path={c.model.path!r} is neither a folder with a "
    f"config.json nor one of {', '.join(KNOWN)}, whose shape is known. "
    "Download its config.json and give the folder."
  )


def policy_of(
  c: config_lib.ConfigDict, mesh: mesh_lib.Mesh, network: base.Shape
) -> build.Policy:
  """`build.policy` with arrays that have shapes and places but no memory."""
  axes = transformer.logical_axes(network)
  dtype = jnp.dtype(c.model.dtype if c.lora.rank else "float32")
  params = transformer.abstract_params(network, dtype)
  params = _placed(params, mesh_lib.shardings(mesh, axes, params))
  lora = settings = None
  if c.lora.rank:
    settings = lora_lib.Lora(c.lora.rank, c.lora.alpha, tuple(c.lora.targets))
    init = functools.partial(lora_lib.init, settings, params)
    lora = jax.eval_shape(init, jax.random.key(0))
    axes = lora_lib.logical_axes(settings, axes)
    lora = _placed(lora, mesh_lib.shardings(mesh, axes, lora))
  return build.Policy(
    mesh=mesh,
    network=network,
    params=params,
    lora=lora,
    lora_settings=settings,
    # Only the ids of special tokens matter, and those are the network's.
    tokenizer=tokens.load(None, models.vocabulary(network)),
    base_model=None,
  )


def _placed(tree: types.Tree, shardings: types.Tree) -> types.Tree:
  return jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
    tree,
    shardings,
  )


class Planner:
  """Compiles the programs of a config on a mesh."""

  def __init__(
    self,
    c: config_lib.ConfigDict,
    mesh: mesh_lib.Mesh,
    prompt_length: int,
  ):
    """Settles what does not change during a search for batch sizes."""
    self.mesh = mesh
    self._policy = policy_of(c, mesh, network_of(c))
    self.prompt_length = -(-prompt_length // c.data.bucket) * c.data.bucket

  def rollout(self, c: config_lib.ConfigDict) -> Program:
    """The program that draws `rollout.batch_size` completions."""
    sampler = build.make_sampler(c, c.rollout, self._policy)
    policy = self._policy
    trainable = policy.params if policy.lora is None else policy.lora
    opt_state = self._opt_state(build.make_learner(c, policy).optimizer)
    resident = _bytes(opt_state)
    if c.objective.kl_coef and policy.lora is None:
      resident += _bytes(trainable)  # the reference policy
    return self._compile(
      "rollout",
      sampler.program.lower(*self._rollout_arguments(c.rollout.batch_size)),
      trips=c.rollout.num_denoise_steps,
      runs=num_rows(c) // c.rollout.batch_size,
      resident=resident,
    )

  def update(self, c: config_lib.ConfigDict) -> Program:
    """The program that learns from a train step's completions."""
    policy, rows = self._policy, mesh_lib.rows(self._policy.mesh)
    learner = build.make_learner(c, policy)
    sampler = build.make_sampler(c, c.rollout, policy)
    size = num_rows(c)
    rollout = jax.eval_shape(sampler.program, *self._rollout_arguments(size))
    rollout = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), rollout
    )
    state = types.TrainState(
      train_step=self._array((), jnp.int32),
      params=policy.params,
      lora=policy.lora,
      opt_state=self._opt_state(learner.optimizer),
    )
    has_reference = c.objective.kl_coef and policy.lora is None
    o = c.objective
    return self._compile(
      "update",
      jax.jit(learner.train_step, donate_argnames="state").lower(
        state,
        rollout,
        self._array((size,), jnp.float32),
        self._key(),
        self._array((size, 2), jnp.uint32),
        policy.params if has_reference else None,
      ),
      trips=math.ceil(
        size * o.num_mc_steps / o.updates_per_batch / o.microbatch
      ),
    )

  def _rollout_arguments(self, size: int) -> tuple[Any, ...]:
    rows = mesh_lib.rows(self._policy.mesh)
    return (
      self._policy.params,
      self._policy.lora,
      self._array((size, self.prompt_length), jnp.int32, rows),
      self._array((size,), jnp.int32, rows),
      self._key(),
      self._array((size, 2), jnp.uint32, rows),
    )

  def _opt_state(self, transformation: Any) -> types.Tree:
    policy = self._policy
    trainable = policy.params if policy.lora is None else policy.lora
    return _placed(
      jax.eval_shape(transformation.init, trainable),
      optimizer.state_shardings(
        transformation,
        trainable,
        jax.tree.map(lambda x: x.sharding, trainable),
        mesh_lib.replicated(policy.mesh),
      ),
    )

  def _array(
    self,
    shape: tuple[int, ...],
    dtype: Any,
    sharding: mesh_lib.NamedSharding | None = None,
  ) -> Any:
    sharding = sharding or mesh_lib.replicated(self._policy.mesh)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  def _key(self) -> Any:
    return self._array((), jax.eval_shape(lambda: jax.random.key(0)).dtype)

  def _compile(
    self,
    name: str,
    lowered: Any,
    trips: int,
    runs: int = 1,
    resident: int = 0,
  ) -> Program:
    start = time.monotonic()
    try:
      compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      refusal = str(error).split("RESOURCE_EXHAUSTED: ")[1].splitlines()[0]
      return Program(name, runs, resident=resident, refusal=refusal)
    memory = compiled.memory_analysis()
    return Program(
      name=name,
      runs=runs,
      arguments=memory.argument_size_in_bytes,
      outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
      temporaries=memory.temp_size_in_bytes
      + memory.generated_code_size_in_bytes,
      resident=resident,
      trips=trips,
      cost=cost_lib.of(hlo.Program(compiled.as_text()), trips),
      compile_seconds=time.monotonic() - start,
    )


def num_rows(c: config_lib.ConfigDict) -> int:
  """B, completions per train step."""
  return c.rollout.num_prompts * c.rollout.group_size


def _bytes(tree: types.Tree) -> int:
  """Returns the bytes of a tree of arrays on one device."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )
