"""The two programs of a train step, compiled from shapes alone.

The same functions as `train.py` uses, called with arrays that have a shape, a
dtype and a place on the mesh, but no memory.
"""

import dataclasses
import math
import time
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from agrpo_jax import errors
from agrpo_jax import learner as learner_lib
from agrpo_jax import models
from agrpo_jax import settings as settings_lib
from agrpo_jax import types
from agrpo_jax.models import base
from agrpo_jax.models import tokens
from agrpo_jax.objectives import mc_steps
from agrpo_jax.parallel import mesh as mesh_lib
from agrpo_jax.plan import chips
from agrpo_jax.plan import cost as cost_lib
from agrpo_jax.plan import hlo
from agrpo_jax.port import hub
from agrpo_jax.port import model as model_lib
from agrpo_jax.samplers import host
from agrpo_jax.samplers import sampling as sampling_lib

# CPUs, which stand in for GPUs, multiply bfloat16 as float32, and their
# compiler would make float32 of all kernels ahead of a loop: memory that no GPU
# needs.
_OF_STAND_INS = {
  "xla_disable_hlo_passes": "while-loop-invariant-code-motion,"
  "while-loop-expensive-invariant-code-motion"
}

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
# The mask's id is the tokenizer's, and makes no difference to a plan.
_A2D_QWEN3 = base.Shape(
  model_type="a2d-qwen3",
  vocab_size=151936,
  embedding_size=151936,
  num_layers=28,
  width=1024,
  num_heads=16,
  num_kv_heads=8,
  head_dim=128,
  mlp_width=3072,
  rope_theta=1e6,
  norm_eps=1e-6,
  qkv_bias=False,
  qk_norm=True,
  tied_head=True,
  max_length=40960,
  mask_id=151669,
  eos_id=151645,
  pad_id=151643,
  blocks_from="end",
)
_A2D_QWEN2 = dataclasses.replace(
  _A2D_QWEN3,
  model_type="a2d-qwen2",
  num_layers=24,
  width=896,
  num_heads=14,
  num_kv_heads=2,
  head_dim=64,
  mlp_width=4864,
  qkv_bias=True,
  qk_norm=False,
  max_length=32768,
  mask_id=151665,
)
_DREAM_7B = dataclasses.replace(
  _A2D_QWEN2,
  model_type="Dream",
  vocab_size=152064,
  embedding_size=152064,
  num_layers=28,
  width=3584,
  num_heads=28,
  num_kv_heads=4,
  head_dim=128,
  mlp_width=18944,
  tied_head=False,
  max_length=131072,
  mask_id=151666,
  eos_id=151643,
  shift=1,
  blocks_from="start",
)
_SDAR_8B = dataclasses.replace(
  _A2D_QWEN3,
  model_type="sdar",
  num_layers=36,
  width=4096,
  num_heads=32,
  mlp_width=12288,
  tied_head=False,
  max_length=32768,
  eos_id=151643,
  attention_block=4,
  blocks_from="start",
)
_SDAR_4B = dataclasses.replace(_SDAR_8B, width=2560, mlp_width=9728)
_SDAR_1_7B = dataclasses.replace(
  _SDAR_8B, num_layers=28, width=2048, num_heads=16, mlp_width=6144
)
_FAST_DLLM_V2_7B = dataclasses.replace(
  _DREAM_7B,
  model_type="Fast_dLLM_Qwen",
  max_length=32768,
  mask_id=151665,
  eos_id=151645,
  attention_block=32,
)
_FAST_DLLM_V2_1_5B = dataclasses.replace(
  _FAST_DLLM_V2_7B,
  vocab_size=151936,
  embedding_size=151936,
  width=1536,
  num_heads=12,
  num_kv_heads=2,
  mlp_width=8960,
  tied_head=True,
)
KNOWN = {
  "GSAI-ML/LLaDA-8B-Base": _LLADA_8B,
  "GSAI-ML/LLaDA-8B-Instruct": _LLADA_8B,
  "GSAI-ML/LLaDA-1.5": _LLADA_8B,
  "dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1": _A2D_QWEN3,
  "dllm-hub/Qwen2.5-Coder-0.5B-Instruct-diffusion-mdlm-v0.1": _A2D_QWEN2,
  "Dream-org/Dream-v0-Base-7B": _DREAM_7B,
  "Dream-org/Dream-v0-Instruct-7B": _DREAM_7B,
  "dllm-hub/Qwen3-0.6B-diffusion-bd3lm-v0.1": _A2D_QWEN3,
  "JetLM/SDAR-8B-Chat": _SDAR_8B,
  "JetLM/SDAR-4B-Chat": _SDAR_4B,
  "JetLM/SDAR-1.7B-Chat": _SDAR_1_7B,
  "Gen-Verse/TraDo-8B-Instruct": _SDAR_8B,
  "Gen-Verse/TraDo-4B-Instruct": _SDAR_4B,
  "Efficient-Large-Model/Fast_dLLM_v2_7B": _FAST_DLLM_V2_7B,
  "Efficient-Large-Model/Fast_dLLM_v2_1.5B": _FAST_DLLM_V2_1_5B,
}


@dataclasses.dataclass(frozen=True)
class Program:
  """One compiled program, per device.

  Attributes:
    name: rollout or update.
    runs: how often it runs in a train step; a rollout that is taken up at a
      later block counts by the blocks that it draws.
    arguments, outputs, temporaries: bytes; outputs without those that take
      over the memory of a donated argument.
    resident: bytes that lie in memory meanwhile and are no argument.
    cache: bytes of temporaries that are keys and values of a block's start.
    trips: how often its loops run, one inside the other.
    cost: of one run.
    refusal: the compiler's words if the program is too large for it, else "".
  """

  name: str
  runs: int
  arguments: int = 0
  outputs: int = 0
  temporaries: int = 0
  resident: int = 0
  cache: int = 0
  trips: Sequence[float] = ()
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

  def step_seconds(self, chip: chips.Chip) -> float:
    """The least time of all its runs in a train step."""
    return self.runs * max(self.seconds(chip).values())


def read_shape(source: base.Source) -> base.Shape:
  """Returns the shape of a model, read without its parameters.

  Raises:
    UserError: a hub id that is not known here.
  """
  if source.path in KNOWN:
    shape = KNOWN[source.path]
    return dataclasses.replace(
      shape,
      attention_block=source.attention_block or shape.attention_block,
      **{name: getattr(source, name) for name in base.SWITCHES},
    )
  if not hub.is_id(source.path):
    return model_lib.load_shape(source)
  raise errors.UserError(
    f"config.model.path={source.path!r} is neither a folder with a "
    f"config.json nor one of {', '.join(KNOWN)}, whose shape is known. "
    "Download its config.json and give the folder."
  )


class Planner:
  """Compiles the programs of a config on a mesh."""

  def __init__(
    self,
    s: settings_lib.Rl,
    mesh: mesh_lib.Mesh,
    prompt_length: int,
  ):
    """Settles what does not change during a search for batch sizes."""
    self.mesh = mesh
    shape = read_shape(s.model)
    # Only the ids of special tokens matter, and those are the network's.
    tokenizer = tokens.load(None, models.vocabulary(shape))
    self._model = model_lib.describe_model(
      shape, s.lora, mesh, tokenizer, s.model.quantize
    )
    s.check_network(self._model.shape)
    self._model.check_draw(prompt_length, s.rollout)
    self.prompt_length = -(-prompt_length // s.data.bucket) * s.data.bucket

  def rollout(self, s: settings_lib.Rl) -> Program:
    """The program that draws `rollout.batch_size` completions."""
    model = self._model
    return self._compile(
      "rollout",
      self._sampler(s).program.lower(
        *self._rollout_arguments(s.rollout.batch_size)
      ),
      trips=_rollout_trips(s.rollout),
      shares=_window_shares(s.rollout.sampling),
      runs=s.rollout.num_rows // s.rollout.batch_size + self._restart_runs(s),
      # What the update alone reads, such as moments, lies in memory meanwhile.
      resident=self.held_bytes(s)
      - mesh_lib.bytes_per_device((model.params, model.lora)),
      cache=model.cache_bytes(self.prompt_length, s.rollout),
    )

  def _restart_runs(self, s: settings_lib.Rl) -> int:
    """Whole rollouts that cost as much as those of states within one."""
    restarts = self._learner(s).restarts
    if restarts is None:
      return 0
    num_blocks = s.rollout.sampling.num_blocks
    share = sum(1 - block / num_blocks for block in restarts.blocks)
    rows = s.rollout.num_rows * restarts.num * share
    return math.ceil(rows / s.rollout.batch_size)

  def update(self, s: settings_lib.Rl) -> Program:
    """The program that learns from a train step's completions."""
    model, rows = self._model, mesh_lib.rows(self._model.mesh)
    sampler = self._sampler(s)
    # No state is left out: what is run apart would be counted beside the rest.
    learner = dataclasses.replace(self._learner(s), cuts_units=False)
    size, restarts = s.rollout.num_rows, learner.restarts
    # As if drawn in one batch: an update gets those of a train step together.
    rollout = jax.eval_shape(sampler.program, *self._rollout_arguments(size))
    rollout = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), rollout
    )
    state = types.TrainState(
      train_step=self._array((), jnp.int32),
      params=model.params,
      lora=model.lora,
      opt_state=self._opt_state(learner.optimizer),
    )
    return self._compile(
      "update",
      jax.jit(learner.train_step, donate_argnames="state").lower(
        state,
        rollout,
        self._array((size,), jnp.float32),
        self._key(),
        self._array((size, 2), jnp.uint32),
        # A copy of the parameters from before training, of the same shapes.
        model.params if self._has_reference(s) else None,
        self._array((size, len(restarts.blocks)), jnp.float32)
        if restarts is not None
        else None,
      ),
      trips=[math.ceil(self.units_per_update(s) / s.microbatch)],
    )

  def held_bytes(self, s: settings_lib.Rl) -> int:
    """Returns what a device holds all the time: parameters and moments."""
    model = self._model
    opt_state = self._opt_state(self._learner(s).optimizer)
    reference = model.params if self._has_reference(s) else None
    return mesh_lib.bytes_per_device(
      (model.params, model.lora, opt_state, reference)
    )

  def units_per_update(self, s: settings_lib.Rl) -> int:
    """Returns how many units an optimizer update visits at most."""
    size = s.rollout.num_rows
    keys = self._array((size,), jax.eval_shape(lambda: jax.random.key(0)).dtype)
    objective = s.objective
    if isinstance(objective, mc_steps.McSteps) and objective.budget == "batch":
      # Any step of the batch may be among its draws.
      return size * objective.num_draws // objective.updates_per_batch
    visits, _ = jax.eval_shape(
      self._learner(s).visits,
      jax.eval_shape(self._sampler(s).program, *self._rollout_arguments(size)),
      self._array((size,), jnp.float32),
      self._key(),
      keys,
    )
    return visits.weight.shape[1] * visits.weight.shape[2]

  def _sampler(self, s: settings_lib.Rl) -> host.Sampler:
    model = self._model
    return model.sampler(s.rollout, s.data.bucket)

  def _learner(self, s: settings_lib.Rl) -> learner_lib.Learner:
    model = self._model
    return s.make_learner(model.bind, model.tokenizer, model.mesh)

  def _has_reference(self, s: settings_lib.Rl) -> bool:
    return s.objective.has_reference and self._model.lora is None

  def _rollout_arguments(self, size: int) -> tuple[Any, ...]:
    rows = mesh_lib.rows(self._model.mesh)
    return (
      self._model.params,
      self._model.lora,
      self._array((size, self.prompt_length), jnp.int32, rows),
      self._array((size,), jnp.int32, rows),
      self._key(),
      self._array((size, 2), jnp.uint32, rows),
    )

  def _opt_state(self, transformation: Any) -> types.Tree:
    return model_lib.placed(
      jax.eval_shape(transformation.init, self._model.trainable),
      self._model.state_shardings(transformation),
    )

  def _array(
    self,
    shape: tuple[int, ...],
    dtype: Any,
    sharding: mesh_lib.NamedSharding | None = None,
  ) -> Any:
    sharding = sharding or mesh_lib.replicated(self._model.mesh)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  def _key(self) -> Any:
    return self._array((), jax.eval_shape(lambda: jax.random.key(0)).dtype)

  def _compile(
    self,
    name: str,
    lowered: Any,
    trips: Sequence[float],
    shares: Mapping[str, Sequence[float]] | None = None,
    runs: int = 1,
    resident: int = 0,
    cache: int = 0,
  ) -> Program:
    start = time.monotonic()
    try:
      is_stand_in = self._model.mesh.devices.flat[0].platform == "cpu"
      compiled = lowered.compile(_OF_STAND_INS if is_stand_in else None)
    except jax.errors.JaxRuntimeError as error:
      # That a program is too large is an answer, and no failure of the plan.
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      refusal = str(error).split("RESOURCE_EXHAUSTED: ")[1].splitlines()[0]
      return Program(
        name, runs, resident=resident, cache=cache, refusal=refusal
      )
    memory = compiled.memory_analysis()
    return Program(
      name=name,
      runs=runs,
      arguments=memory.argument_size_in_bytes,
      outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
      temporaries=memory.temp_size_in_bytes
      + memory.generated_code_size_in_bytes,
      resident=resident,
      cache=cache,
      trips=trips,
      cost=cost_lib.of(hlo.Program(compiled.as_text()), trips, shares),
      compile_seconds=time.monotonic() - start,
    )


def _rollout_trips(draw: host.Draw) -> list[float]:
  """Returns how often a rollout opens a memory, and how many steps read it.

  Where the number of steps depends on the draws they are all that may be.
  """
  s = draw.sampling
  slots = draw.num_slots or draw.batch_size
  opened = math.ceil(s.steps_per_block / s.steps_per_memory)
  rounds = math.ceil(draw.batch_size / slots) * s.num_blocks * opened
  if s.steps_per_memory == 1:
    return [rounds]
  return [rounds, s.steps_per_block / opened]


def _window_shares(s: sampling_lib.Sampling) -> dict[str, list[float]]:
  """Returns how many steps run their windows, and how many need not."""
  opened = math.ceil(s.steps_per_block / s.steps_per_memory)
  first = opened / s.steps_per_block
  return {types.KEPT_OR_WINDOWS: [1 - first, first]}
