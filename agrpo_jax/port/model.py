"""A network on a mesh, with its parameters and what reads and writes its text.

Where the words meet: a `Source` says where a network comes from, a `Shape` what
it computes, a `Model` is the network with its parameters, and `Model.bind`
gives the function that samplers and objectives know (`types.Network`).
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from agrpo_jax import errors
from agrpo_jax import models
from agrpo_jax import optimizer
from agrpo_jax import types
from agrpo_jax.models import base
from agrpo_jax.models import lora as lora_lib
from agrpo_jax.models import ops
from agrpo_jax.models import quantized
from agrpo_jax.models import tokens
from agrpo_jax.models import transformer
from agrpo_jax.parallel import mesh as mesh_lib
from agrpo_jax.parallel import split
from agrpo_jax.port import model_folder
from agrpo_jax.runs import checkpoint_meta
from agrpo_jax.runs import checkpoint_named
from agrpo_jax.samplers import host


@dataclasses.dataclass(frozen=True)
class Model:
  """A network with its parameters, and its tokenizer.

  Attributes:
    mesh: where it lives.
    shape: the network's shape and compute settings.
    params: its parameters: frozen when there are adapters, and then perhaps
      with kernels in int8.
    lora: adapters, or None when all parameters are trained.
    lora_settings: of the adapters, or None.
    tokenizer: text <-> ids.
    base_model: what the parameters were loaded from.
  """

  mesh: mesh_lib.Mesh
  shape: base.Shape
  params: types.Tree
  lora: types.Tree | None
  lora_settings: lora_lib.Lora | None
  tokenizer: tokens.Tokenizer
  base_model: checkpoint_meta.BaseModel | None

  @property
  def trainable(self) -> types.Tree:
    return self.params if self.lora is None else self.lora

  def bind(self, params: types.Tree, lora: types.Tree | None) -> types.Network:
    """Returns the network bound to parameters and adapter."""
    scale = self.lora_settings.scale if self.lora_settings else 1.0
    # The network must also be told of one device that is only described.
    is_here = mesh_lib.platform(self.mesh) == jax.default_backend()
    is_one = self.mesh.size == 1 and is_here
    rows = None if is_one else mesh_lib.rows(self.mesh)
    return transformer.bind(
      self.shape, params, lora, scale, rows, top_k=split.top_k_of(self.mesh)
    )

  def sampler(self, draw: host.Draw, bucket: int) -> host.Sampler:
    """Returns what draws completions; nothing is compiled yet.

    Args:
      draw: how.
      bucket: prompts are padded to a multiple of this many tokens.

    Raises:
      UserError: a batch that does not divide over the mesh.
    """
    return host.Sampler(
      self.bind,
      draw,
      self.tokenizer,
      self.mesh,
      bucket,
      prompt_multiple=self.shape.prompt_multiple,
    )

  def initial_state(
    self, transformation: optax.GradientTransformation
  ) -> types.TrainState:
    """Returns the state before the first train step, placed on the mesh."""
    replicated = mesh_lib.replicated(self.mesh)
    opt_state = jax.jit(
      transformation.init, out_shardings=self.state_shardings(transformation)
    )(self.trainable)
    return types.TrainState(
      train_step=jax.device_put(jnp.int32(0), replicated),
      params=self.params,
      lora=self.lora,
      opt_state=opt_state,
    )

  def state_shardings(
    self, transformation: optax.GradientTransformation
  ) -> types.Tree:
    """Returns where the arrays of the optimizer's state go."""
    return optimizer.state_shardings(
      transformation,
      self.trainable,
      jax.tree.map(lambda x: x.sharding, self.trainable),
      mesh_lib.replicated(self.mesh),
    )

  def cache_bytes(self, prompt_length: int, draw: host.Draw) -> int:
    """Returns what a device keeps of keys and values while it draws."""
    if draw.sampling.cache == "none" or draw.sampling.cache_refresh == 1:
      return 0  # nothing outlives a step
    shape = self.shape
    slots = draw.num_slots or draw.batch_size
    rows = math.ceil(slots / mesh_lib.num_row_shards(self.mesh))
    num_tokens = prompt_length + draw.sampling.completion_length
    heads = shape.num_kv_heads
    parts = self.mesh.shape[mesh_lib.RULES["kv_heads"]]
    if heads % parts == 0:
      heads //= parts
    per_token = 2 * shape.num_layers * heads * shape.head_dim
    return rows * num_tokens * per_token * jnp.dtype(shape.dtype).itemsize

  def check_draw(self, prompt_length: int, draw: host.Draw) -> None:
    """Raises UserError where the network or the devices cannot draw like that.

    Of the memory only what is certain is counted: parameters and cache.
    """
    check_draw(self.shape, prompt_length, draw)
    cache = self.cache_bytes(prompt_length, draw)
    held = mesh_lib.bytes_per_device((self.params, self.lora))
    memory = mesh_lib.memory_bytes(self.mesh)
    if cache and memory and held + cache > memory:
      shape, s = self.shape, draw.sampling
      raise errors.UserError(
        f"cache={s.cache!r} does not fit: keys and values of "
        f"{draw.num_slots or draw.batch_size} completions are 2 x "
        f"{shape.num_layers} layers x {shape.num_kv_heads} heads x "
        f"{shape.head_dim} x ({prompt_length} + {s.completion_length}) tokens "
        f"of {shape.dtype}, {cache / 1e9:.1f} GB a device on this mesh, beside "
        f"{held / 1e9:.1f} GB of parameters; a device has {memory / 1e9:.1f} "
        "GB. Lower batch_size or num_slots, or split rows or heads over more "
        "devices (config.mesh)."
      )


def check_draw(shape: base.Shape, prompt_length: int, draw: host.Draw) -> None:
  """Raises UserError where a network of this shape cannot draw like that.

  Prompt and completion may be too long together, its blocks not those of the
  sampler, or the cache not be one of its kind of attention.
  """
  cache = draw.sampling.cache
  size = shape.attention_block
  fitting = ("none", "block") if size else ("none", "prefix", "dual")
  if cache not in fitting:
    kind = "block-causal" if size else "not block-causal"
    is_unset = not size and shape.blocks_from == "end"
    raise errors.UserError(
      f"cache={cache!r} is not for a model whose attention is {kind} "
      f"(model_type {shape.model_type!r}); use cache={fitting[-1]!r} or 'none'"
      + (", or set model.attention_block=32 for bd3lm." if is_unset else ".")
    )
  if cache == "block" and not transformer.has_windows(shape):
    raise errors.UserError(
      f"cache={cache!r} is not for a model whose logits are shifted across "
      "blocks that are counted from the completion (model_type "
      f"{shape.model_type!r}); use cache='none'."
    )
  s = draw.sampling
  if size and size % s.block_length:
    raise errors.UserError(
      f"block_length={s.block_length}: the model's attention is block-causal "
      f"in blocks of {size}; use block_length={size} or a divisor of it."
    )
  rest = size and s.completion_length % size
  is_from_completion = shape.blocks_from == "end"
  if rest and not (is_from_completion and cache == "block"):
    below = s.completion_length - rest
    raise errors.UserError(
      f"completion_length={s.completion_length}: the model's attention is "
      f"block-causal in blocks of {size}, the last of which must be whole; use "
      f"completion_length={f'{below} or ' if below else ''}{below + size}"
      + (", or cache='block'." if is_from_completion else ".")
    )
  if s.lead_every not in (0, size):
    raise errors.UserError(
      f"lead_every={s.lead_every}: the first position of a block leads, and "
      f"this model's blocks have {size} positions (0: it has none); use "
      f"lead_every={size} or 0."
    )
  if draw.guidance and shape.prompt_multiple > 1:
    raise errors.UserError(
      f"guidance={draw.guidance}: of this model (model_type "
      f"{shape.model_type!r}) the end of a prompt shares a block with the "
      "completion, where guidance would not mask it; use guidance=0."
    )
  completion_length = draw.sampling.completion_length
  longest = prompt_length + completion_length
  if longest > shape.max_length:
    raise errors.UserError(
      f"config.data.max_prompt_length={prompt_length} and "
      f"completion_length={completion_length} make {longest} tokens, more "
      f"than the model's {shape.max_length}; lower one of them."
    )


def load_model(
  source: base.Source,
  lora: lora_lib.Lora | None,
  mesh: mesh_lib.Mesh,
  *,
  seed: int = 0,
  is_trained: bool = True,
) -> Model:
  """Loads a network onto a mesh.

  What is trained is float32; what is only read has the dtype it computes in, or
  is kept as `source.quantize` says.

  Args:
    source: where it comes from and how it is computed.
    lora: fresh adapters beside it, or None.
    mesh: where it goes.
    seed: of the adapters.
    is_trained: false if this run neither trains the parameters nor reads
      trained ones from a checkpoint.

  Raises:
    UserError: naming everything that is wrong with the model's folder, the
      mesh, or the adapter, before anything large is read if it shows by then.
  """
  if is_trained:
    _check_frozen(source.quantize, lora)
  _check_platform(source.attention, mesh)
  shape = load_shape(source)
  _check_attention(shape, mesh)
  if lora is not None:
    found = lora_lib.problems(lora, transformer.abstract_params(shape))
    if found:
      raise errors.UserError("; ".join(found) + ".")
  tokenizer = model_folder.load_tokenizer(
    source.tokenizer or source.path,
    shape,
    # The revision is one of the model's repository, not of another one's.
    revision=None if source.tokenizer else source.revision or None,
  )
  if source.quantize == "none":
    _, params = model_folder.load(
      source.path,
      dtype="float32" if is_trained and lora is None else source.dtype,
      shardings=lambda shape: _shardings(mesh, shape),
      revision=source.revision or None,
    )
    base_model = checkpoint_meta.describe_base(
      source.path, source.revision, params
    )
  else:
    params, base_model = model_folder.load_quantized(
      source.path,
      dtype=source.dtype,
      shardings=lambda shape: _shardings(mesh, shape, source.quantize),
      revision=source.revision or None,
    )
  adapters = None
  if lora is not None:
    init, shardings = _adapter(lora, shape, mesh)
    key = jax.random.fold_in(jax.random.key(seed), 1)
    adapters = jax.jit(init, out_shardings=shardings)(key)
  return Model(
    mesh=mesh,
    shape=shape,
    params=params,
    lora=adapters,
    lora_settings=lora,
    tokenizer=tokenizer,
    base_model=base_model,
  )


def describe_model(
  shape: base.Shape,
  lora: lora_lib.Lora | None,
  mesh: mesh_lib.Mesh,
  tokenizer: tokens.Tokenizer,
  quantize: str = "none",
) -> Model:
  """Returns what `load_model` would for training, as shapes and shardings."""
  _check_frozen(quantize, lora)
  _check_platform(shape.attention, mesh)
  _check_attention(shape, mesh)
  dtype = jnp.dtype("float32" if lora is None else shape.dtype)
  adapters = None
  if lora is not None:
    init, shardings = _adapter(lora, shape, mesh)
    adapters = placed(jax.eval_shape(init, jax.random.key(0)), shardings)
  return Model(
    mesh=mesh,
    shape=shape,
    params=placed(
      _abstract_params(shape, dtype, quantize),
      _shardings(mesh, shape, quantize),
    ),
    lora=adapters,
    lora_settings=lora,
    tokenizer=tokenizer,
    base_model=None,
  )


def placed(tree: types.Tree, shardings: types.Tree) -> types.Tree:
  """Returns the shapes of a tree of arrays, with shardings."""
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=sharding
    ),
    tree,
    shardings,
  )


def load_trained(
  source: base.Source,
  lora: lora_lib.Lora | None,
  mesh: mesh_lib.Mesh,
  checkpoint: str,
) -> Model:
  """Loads a model with what a run trained of it.

  Args:
    source: the run's, see `trained_by`.
    lora: the run's.
    mesh: where it goes; it need not be the run's.
    checkpoint: WORKDIR (its newest), WORKDIR:best or WORKDIR:TRAIN_STEP; "" for
      the model alone, without adapters.

  Raises:
    UserError: there is no such checkpoint, it cannot be read, or it was trained
      from another base model.
  """
  if not checkpoint:
    return load_model(source, None, mesh, is_trained=False)
  reader, train_step = checkpoint_named.find(checkpoint)
  model = load_model(source, lora, mesh)
  found = reader.read(
    {"trainable": model.trainable}, model.base_model, train_step
  )
  if found is None:
    raise errors.UserError(
      f"--checkpoint={checkpoint!r} holds no checkpoint any more."
    )
  part = "params" if model.lora is None else "lora"
  return dataclasses.replace(model, **{part: found[0]["trainable"]})


def load_first(
  source: base.Source,
  lora: lora_lib.Lora | None,
  mesh: mesh_lib.Mesh,
  checkpoint: str,
  seed: int,
) -> Model:
  """Loads the model that a run begins with.

  Args:
    source: where its base comes from.
    lora: its adapters, or None.
    mesh: where it goes.
    checkpoint: of another run, whose trained weights it begins with: of the
      same base and adapters of the same kind; "" for fresh adapters, or the
      source's own parameters.
    seed: of fresh adapters.

  Raises:
    UserError: as for `load_model` and `load_trained`.
  """
  if checkpoint:
    return load_trained(source, lora, mesh, checkpoint)
  return load_model(source, lora, mesh, seed=seed)


def trained_by(checkpoint: str) -> tuple[base.Source, lora_lib.Lora | None]:
  """Reads which model a run trains, and its adapter's settings.

  Args:
    checkpoint: the run's work directory, with or without :best or :TRAIN_STEP.

  Raises:
    UserError: there is no such checkpoint, or the run's config.json is missing,
      damaged, or of no run.
  """
  checkpoint_named.find(checkpoint)
  raw = checkpoint_named.read_config(checkpoint)
  try:
    model, lora = raw["model"], raw["lora"]
    fields = {
      field.name: _typed(model, field.name, field.type)
      for field in dataclasses.fields(base.Source)
      # What is newer than the run was what its default is.
      if field.name in model or field.default is dataclasses.MISSING
    }
    if model.get("network"):  # SFT from random parameters, kept by the run
      workdir, _ = checkpoint_named.split(checkpoint)
      fields["path"] = str(pathlib.Path(workdir).expanduser() / "initial")
    source = base.Source(**fields)
    if source.dtype not in base.DTYPES:
      raise ValueError(f"dtype={source.dtype!r}")
    if not _typed(lora, "rank", int):
      return source, None
    targets = tuple(map(str, _typed(lora, "targets", list)))
    if not base.is_number(lora["alpha"]):
      raise TypeError(f"alpha={lora['alpha']!r}")
    return source, lora_lib.Lora(lora["rank"], lora["alpha"], targets)
  except (KeyError, TypeError, AttributeError, ValueError) as error:
    raise errors.UserError(
      f"The config.json of {checkpoint!r} is not that of a run of this "
      f"package: {type(error).__name__}: {error}"
    ) from error


def _typed(raw: Mapping[str, Any], name: str, kind: Any) -> Any:
  """Returns a value of a config; raises where it is of another type."""
  value = raw[name]
  if isinstance(value, bool) or not isinstance(value, kind):
    raise TypeError(f"{name}={value!r}")
  return value


def load_shape(source: base.Source) -> base.Shape:
  """Reads the shape of a network, with what its source says of computing.

  Raises:
    UserError: the files are wrong, or do not tell the blocks of attention that
      the model's name speaks of.
  """
  shape = model_folder.load_shape(
    source.path,
    revision=source.revision or None,
    compute_dtype=source.dtype,
    remat=source.remat,
    attention=source.attention,
    unroll=source.unroll,
    attention_block=source.attention_block,
  )
  name = pathlib.PurePath(source.path).name
  block = models.family_of(shape).block_in_name(name)
  if block not in (0, shape.attention_block) and not source.attention_block:
    raise errors.UserError(
      f"{source.path}: the name speaks of attention in blocks of {block}, and "
      f"the files of {shape.attention_block or 'none'}. Set "
      "config.model.attention_block to what it is (with --config=..., where "
      "a command can do without one)."
    )
  return shape


def _check_frozen(quantize: str, lora: lora_lib.Lora | None) -> None:
  """Raises UserError where what is trained would be quantized."""
  if quantize != "none" and lora is None:
    raise errors.UserError(
      f"config.model.quantize={quantize!r} is for a frozen base, but "
      "config.lora.rank=0 trains all parameters, now or in the run that is "
      "read. Set a rank, 64 say, or quantize='none'; to quantize what a run "
      "trained write it with `python -m agrpo_jax.port` first, and give that "
      "folder as config.model.path."
    )


# Implementations of attention that have a platform of their own.
_PLATFORMS = {"cudnn": ("gpu", "an NVIDIA GPU"), "splash": ("tpu", "a TPU")}


def _check_platform(attention: str, mesh: mesh_lib.Mesh) -> None:
  """Raises UserError for an attention that other hardware computes."""
  platform, words = _PLATFORMS.get(attention, ("", ""))
  here = mesh_lib.platform(mesh)
  if platform not in ("", here):
    raise errors.UserError(
      f"config.model.attention={attention!r} needs {words}; here JAX computes "
      f"on the {here}. Set it to 'xla' or 'auto'."
    )


def _check_attention(shape: base.Shape, mesh: mesh_lib.Mesh) -> None:
  """Raises UserError for an attention that cannot compute these heads."""
  if shape.attention != "splash":
    return
  found = ops.splash_problem(
    shape.num_kv_heads, shape.head_dim, mesh_lib.rows(mesh)
  )
  if found:
    raise errors.UserError(
      f"config.model.attention='splash' cannot compute this network: {found}. "
      "Set it to 'xla' or 'auto'."
    )


def _abstract_params(shape: base.Shape, dtype: Any, quantize: str) -> Any:
  params = transformer.abstract_params(shape, dtype)
  return params if quantize == "none" else quantized.abstract_params(params)


def _shardings(
  mesh: mesh_lib.Mesh, shape: base.Shape, quantize: str = "none"
) -> Any:
  axes = transformer.logical_axes(shape)
  if quantize != "none":
    axes = quantized.logical_axes(axes)
  return mesh_lib.shardings(
    mesh, axes, _abstract_params(shape, jnp.float32, quantize)
  )


def _adapter(
  settings: lora_lib.Lora, shape: base.Shape, mesh: mesh_lib.Mesh
) -> tuple[Any, Any]:
  """(key) -> fresh adapters, and where on the mesh they go."""
  init = functools.partial(
    lora_lib.init, settings, transformer.abstract_params(shape)
  )
  axes = lora_lib.logical_axes(settings, transformer.logical_axes(shape))
  return init, mesh_lib.shardings(
    mesh, axes, jax.eval_shape(init, jax.random.key(0))
  )
