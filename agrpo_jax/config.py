"""Every setting of a run, with its unit and legal values.

Files in `configs/` start from `rl()` or `sft()` and change what differs. On the
command line a key is changed by `--config.rollout.temperature=0.6`. Only
`settings.py` reads what comes out: everything else gets its typed records.
"""

from collections.abc import Collection
from collections.abc import Mapping
from typing import Any
from typing import TypeAlias

import ml_collections

from agrpo_jax import errors
from agrpo_jax import tasks
from agrpo_jax.models import lora as lora_lib

ConfigDict: TypeAlias = ml_collections.ConfigDict


def _common(kind: str) -> ConfigDict:
  c = ConfigDict()
  c.kind = kind  # of run: rl or sft
  c.workdir = ""  # folder of logs and checkpoints; a run there is continued
  c.seed = 0  # all randomness of the run comes from it
  # A work directory remembers its config; go on under a changed one?
  c.accept_changed_config = False

  c.model = m = ConfigDict()
  m.path = ""  # folder of a model, or its hub id
  m.revision = ""  # of the hub id; "": the newest
  m.tokenizer = ""  # another folder or hub id, "bytes", or "": the model's own
  m.dtype = "bfloat16"  # of activations and a frozen base: float32, bfloat16
  m.remat = "none"  # what the backward pass recomputes: none, dots, full
  m.attention = "auto"  # auto, xla, cudnn (GPU), splash (TPU)
  m.unroll = 1  # layers per iteration of the loop over them; more compile more
  # Tokens per block of block-causal attention, where config.json does not tell
  # (Tiny-A2D's bd3lm: 32); 0: as it says.
  m.attention_block = 0
  m.quantize = "none"  # how a frozen base's layers are kept: none, int8

  c.lora = lora = ConfigDict()
  lora.rank = 0  # R; 0: train all parameters
  lora.alpha = 64.0  # adapters are scaled by alpha / rank
  # Projections that get an adapter, by default all: q, k, v, attn_out, gate,
  # up, down, head.
  lora.targets = lora_lib.TARGETS

  c.mesh = mesh = ConfigDict()  # devices per axis; -1: what the others leave
  mesh.data = 1  # copies of the parameters
  mesh.fsdp = -1  # parameters and rows split
  mesh.tensor = 1  # heads, MLP and vocabulary split

  c.task = task = ConfigDict()
  task.name = ""  # gsm8k, math, countdown, sudoku, word_problems
  task.path = ""  # a task of your own, in place of `name`: its Python file
  task.options = _free()  # of the task; explained in its module
  task.defaults = _free()  # of the task `name` alone: filled by `use_task`

  c.data = data = ConfigDict()
  # Local file of problems, or folder of train.* and test.*; "": generated or
  # from the hub.
  data.path = ""
  data.test_path = ""  # held-out problems, where data.path is a file of others
  data.max_prompt_length = 512  # tokens; longer prompts are skipped, counted
  data.bucket = 64  # prompts are padded to a multiple of this many tokens

  c.optimizer = opt = ConfigDict()
  opt.learning_rate = 1e-5  # the highest of the schedule, in (0, 1]
  opt.schedule = "cosine"  # cosine (to zero at the end) or constant
  opt.warmup_steps = 0  # optimizer updates; before a decay at most half of all
  opt.b1 = 0.9  # Adam's decay of the mean of gradients, in [0, 1)
  opt.b2 = 0.99  # and of the mean of their squares
  opt.eps = 1e-8  # Adam's, in (0, 1]
  opt.weight_decay = 0.01  # decoupled, times the learning rate; 0: off
  opt.clip_norm = 1.0  # global norm that gradients are shrunk to; inf: off

  c.train = train = ConfigDict()
  train.num_steps = 100  # train steps
  # Train steps between saves, or until the one before is written; the last is
  # always saved.
  train.checkpoint_every = 20
  train.keep = 3  # newest checkpoints kept
  train.log_samples = 2  # completions per train step written to samples.jsonl

  c.report = report = ConfigDict()  # see `agrpo_jax.report`
  report.html = True  # write report.html into the work directory at the end
  # Of one chip, in any currency; 0: not known, the page gives chip hours only.
  report.chip_hour_price = 0.0

  c.wandb = wandb = ConfigDict()
  wandb.project = ""  # "": not used
  wandb.name = ""  # of the run there; "": one that Weights & Biases makes up
  return c


def _free() -> ConfigDict:
  """Returns a sub-tree that takes any key, on the command line too."""
  return ConfigDict(type_safe=False)


def _lock(c: ConfigDict) -> ConfigDict:
  """Locks `c`, so that a misspelt key is an error; free sub-trees stay open.

  Open is what names its own keys: `settings.py` knows those of an objective.
  """
  c.lock()
  free = [c.task.options, c.task.defaults, c.task.get("reward_weights")]
  for sub in (*free, c.model.get("network"), c.get("objective")):
    if sub is not None:
      sub.unlock()
  return c


def check_kind(c: ConfigDict, kind: str) -> None:
  """Raises UserError when a config is none of `rl()` or of `sft()`.

  Args:
    c: as a config file makes it.
    kind: "rl" or "sft", whichever is needed.
  """
  found = c.get("kind")
  if found == kind:
    return
  commands = {"rl": "agrpo_jax.main", "sft": "agrpo_jax.sft"}
  made_for = ""
  if found in commands:
    made_for = f", made for `python -m {commands[found]}`"
  raise errors.UserError(
    f"This config is of kind {found!r}{made_for}; this command needs one of "
    f"kind {kind!r}: a config file that starts from config.{kind}()."
  )


def use_task(c: ConfigDict, name: str, **options: Any) -> None:
  """Sets the task and all its options, for the record of a run.

  They stand in `task.defaults` and not in `task.options`: another task, given
  by `task.path`, is then not handed the options of this one.
  """
  c.task.name = name
  c.task.defaults = {**tasks.get(name).DEFAULTS, **options}


def use_objective(
  c: ConfigDict, name: str, path: str = "", **settings: Any
) -> None:
  """Sets another objective than AGRPO, with those of its settings that differ.

  Args:
    c: changed in place.
    name: a name in `objectives.NAMES`.
    path: of the Python file of an objective of your own, in place of `name`.
    **settings: fields of the objective's dataclass; the others keep the
      defaults that they have there.
  """
  kept = {key: c.objective[key] for key in ("microbatch", "step_price")}
  c.objective = _free()
  c.objective.update(name=name, path=path, **kept | settings)


def choose_objective(c: ConfigDict, given: Mapping[str, Any]) -> None:
  """Makes room for an objective that the command line names.

  Unless it is the config file's own, the settings there are those of another,
  and go; those of the command line stay.

  Args:
    c: changed in place.
    given: the keys that stand on the command line, with what the file says.
  """
  prefix = "objective."
  if given.keys() & {"objective.name", "objective.path"}:
    keys = [key.removeprefix(prefix) for key in given if key.startswith(prefix)]
    chosen = {key: c.objective[key] for key in {"name", *keys}}
    own = [
      given.get(prefix + key, c.objective.get(key, ""))
      for key in ("name", "path")
    ]
    if own != [chosen["name"], chosen.get("path", "")]:
      use_objective(c, **chosen)


def run_folder(name: str, variant: str) -> str:
  """Returns where runs of a config go: each of its variants to its own."""
  return "runs/" + "_".join([name, *filter(None, variant.split(","))])


def use_cache(c: ConfigDict, cache: str) -> None:
  """Draws with a cache, and visits what then is cheap.

  With a cache those are whole blocks, whose steps share the block's start;
  without one single steps, likelier where there is entropy.

  Args:
    c: changed in place.
    cache: of training's rollouts and of evaluation: none, prefix or dual; block
      for block-causal models.
  """
  c.rollout.cache = c.evaluate.cache = cache
  if "step_rule" in c.objective:
    c.objective.step_rule = "entropy" if cache == "none" else "blocks"


def task_options(c: ConfigDict) -> dict[str, Any]:
  """Returns the options that the task of `c` is given."""
  defaults = {} if c.task.path else c.task.defaults.to_dict()
  return defaults | c.task.options.to_dict()


def _sampling(sub: ConfigDict) -> None:
  sub.completion_length = 256  # C, tokens
  sub.block_length = 32  # T; the last block has what is left
  # Of every so many positions the first is unmasked before the others of its
  # block, alone (Fast-dLLM v2); a multiple of block_length, 0: none is.
  sub.lead_every = 0
  sub.num_denoise_steps = 128  # K, a multiple of the number of blocks
  # How a block's tokens are divided over its steps: equal; dream, mdlm: as in
  # these samplers, by a time that goes down evenly.
  sub.schedule = "equal"
  sub.last_time = 1e-3  # under dream, where time ends; it begins at 1
  # random, sequential, origin, confidence, entropy, margin, threshold, dynamic,
  # factor, entropy_bounded, soft_threshold
  sub.unmask_rule = "confidence"
  # Settings of some of these rules; unset (None) under the others.
  # threshold, dynamic, soft_threshold: probability in (0, 1] of a drawn token
  # from which on its position is unmasked.
  sub.threshold = ml_collections.config_dict.placeholder(float)
  # factor: positive; n positions at once are at least as probable as
  # 1 - factor / (n + 1), each.
  sub.factor = ml_collections.config_dict.placeholder(float)
  # entropy_bounded: nats, 0 or more; positions that are unmasked at once have
  # no more entropy together, the greatest of theirs apart.
  sub.gamma = ml_collections.config_dict.placeholder(float)
  # soft_threshold: log-odds, positive; how far about the threshold chance
  # decides.
  sub.soft_width = ml_collections.config_dict.placeholder(float)
  sub.temperature = 0.0  # 0: the most probable token
  sub.top_k = 0  # 0: off
  sub.top_p = 1.0  # 1: off
  sub.truncate_first = "top_k"  # top_k or top_p, where both are set
  sub.top_p_rule = "keep"  # keep or drop the token that crosses top_p
  sub.confidence = "policy"  # policy or model: what `confidence` ranks by
  # How much of a block must be EOS for it to end a completion: all, any (SDAR).
  sub.eos_per_block = "all"
  # Keys and values that the steps of a block share: none, prefix (of what is
  # before the block), dual (of all but the block); block: of what is before it,
  # exactly, in block-causal models.
  sub.cache = "none"
  sub.cache_refresh = 0  # steps until they are computed anew; 0: once a block
  sub.batch_size = 32  # completions drawn by one call
  # Rows that run at a time; one that ends early makes room for the next of the
  # batch. 0: batch_size.
  sub.num_slots = 0


def rl() -> ConfigDict:
  """Defaults of `agrpo_jax.main`: the exact estimator."""
  c = _common("rl")
  c.task.reward_weights = _free()  # of parts; the others keep the task's own

  c.rollout = rollout = ConfigDict()
  _sampling(rollout)
  rollout.num_prompts = 16  # N per train step
  rollout.group_size = 8  # G completions per prompt
  rollout.unmask_rule = "random"  # where evaluation has another default
  rollout.temperature = 1.0  # likewise

  c.objective = o = ConfigDict()
  o.name = "agrpo"  # a name in `objectives.NAMES`
  o.path = ""  # an objective of your own, in place of `name`: its Python file
  o.num_mc_steps = 24  # M denoising steps drawn per completion
  o.num_mc_blocks = 2  # M blocks drawn instead, if step_rule is one of blocks
  # uniform, entropy: steps; blocks, entropy_blocks: whole blocks; all: no draw.
  o.step_rule = "entropy"
  o.stratified = "row"  # row, batch, none
  o.budget = "completion"  # M draws for each, or batch: B * M for all together
  # Those that are visited: executed, or content: up to the last non-EOS token.
  o.visited_steps = "executed"
  o.normalize = "sum"  # sum or mean over steps
  o.likelihood = "exact"  # exact or product (matters if rules look at draws)
  o.baseline = "leave_one_out"  # or group_mean
  o.clip_low = 0.2  # how far below 1 the policy ratio may count
  o.clip_high = 0.2  # and how far above
  o.kl_coef = 0.0  # weight of the KL to the reference policy; 0: off
  o.kl_estimator = "k3"  # k3 or k3_ratio
  o.updates_per_batch = 1  # optimizer updates per rollout; divides M
  o.microbatch = 8  # (completion, step) pairs per forward and backward pass
  # 0 or more, in units of the reward: what a completion pays for all of its
  # denoising steps; one that executes less of them pays less.
  o.step_price = 0.0

  c.grading = grading = ConfigDict()
  grading.num_workers = 2  # processes
  grading.timeout_seconds = 10.0  # per completion
  # What a process may take besides what its task takes to load, 2^30 bytes.
  grading.memory_gib = 8.0

  # Checkpoints kept besides the newest: those of the highest eval/accuracy (of
  # equal ones the earlier), if evaluate.every lets a run know it. A new best is
  # saved when it is evaluated.
  c.train.keep_best = 1  # 0: off

  c.evaluate = e = ConfigDict()
  _sampling(e)
  # Train steps between evaluations; one more is after the last. 0: never.
  e.every = 0
  e.split = "test"  # test or train
  e.num_examples = 256  # the first ones; 0: all
  e.guidance = 0.0  # scale of classifier-free guidance; 0: off
  e.stop_at_eos = True  # a block of nothing but EOS ends the completion
  e.redraw_mask = False  # a position whose token is [MASK] stays masked

  # If evaluate.every is not 0: evaluate once before the first train step, too.
  c.report.before = True
  # Held-out problems whose completions each evaluation keeps, step by step.
  c.report.num_completions = 24
  return _lock(c)


def sft() -> ConfigDict:
  """Defaults of `agrpo_jax.sft`."""
  c = _common("sft")
  # To start from random parameters: num_layers, width, num_heads, mlp_width of
  # the network, and any other field of `base.Shape`. Empty: model.path.
  c.model.network = _free()
  c.sft = s = ConfigDict()
  s.completion_length = 256  # tokens; what is shorter ends in EOS, all targets
  s.batch_size = 32  # demonstrations per train step
  s.microbatch = 32  # of them at once
  s.output = ""  # folder for the checkpoint in Hugging Face's layout
  return _lock(c)


def paper(c: ConfigDict) -> None:
  """AGRPO's estimator as released (arXiv:2510.04019), in one optimizer update.

  The released launcher takes `updates_per_batch = num_mc_steps` (24) updates.
  """
  c.rollout.top_p_rule = "drop"
  c.objective.update(
    likelihood="product",
    step_rule="entropy",
    stratified="batch",
    visited_steps="content",
    normalize="mean",
    baseline="group_mean",
    kl_estimator="k3_ratio",
  )


# Samplers by name, the settings under which published numbers were made.
#
# A name sets every key of `config.evaluate` that says how completions are
# drawn; keys given on the command line stay. `config` changes nothing.
#
# config: what the config says.
# llada: LLaDA's own `generate.py` as its example calls it: one token a step,
#   all of the completion is always drawn. Where the best token is [MASK] itself
#   it leaves the position masked and draws it again, and so does this sampler.
# d1: d1's evaluation (and wd1's and SPG's): two tokens a step. Its other
#   lengths, 128 and 512, take half as many steps as tokens too.
# agrpo: AGRPO's evaluation: as d1, but a block of nothing but EOS ends it.
# fast_dllm: Fast-dLLM's parallel decoding without its caches: every token more
#   probable than 0.9 is unmasked at once (its published settings for LLaDA).
# prefix, dual: the same with its caches. A [MASK] that is drawn is a token like
#   any other then.
# sdar: SDAR's `generate.py` by its defaults, of block-causal models in blocks
#   of four tokens; behind a block with an EOS it stops.
# bd3lm: dllm's sampler of Tiny-A2D's bd3lm, a token a step.
# fast_dllm_v2: the `generate` of Fast-dLLM v2 as its card calls it: blocks of
#   32 in parts of 8, in each every token more probable than 0.9 at once, and
#   the first of a block alone, from the block before. At a temperature that one
#   is drawn here as all others are, while there it is the most probable one.
# dream: Dream's `diffusion_generate` as its example calls it, a token a step on
#   average. What it counts as a mean over the batch is the row's own here.
_GREEDY: dict[str, Any] = {
  "completion_length": 256,
  "block_length": 32,
  "lead_every": 0,
  "num_denoise_steps": 128,
  "schedule": "equal",
  "last_time": 1e-3,
  "unmask_rule": "confidence",
  "temperature": 0.0,
  "top_k": 0,
  "top_p": 1.0,
  "truncate_first": "top_k",
  "top_p_rule": "keep",
  "confidence": "model",
  "threshold": None,
  "factor": None,
  "gamma": None,
  "soft_width": None,
  "cache": "none",
  "cache_refresh": 0,
  "guidance": 0.0,
  "stop_at_eos": False,
  "eos_per_block": "all",
  "redraw_mask": False,
}
_PARALLEL = {**_GREEDY, "unmask_rule": "threshold", "threshold": 0.9}
SAMPLERS: dict[str, dict[str, Any]] = {
  "config": {},
  "llada": {**_GREEDY, "completion_length": 128, "redraw_mask": True},
  "d1": _GREEDY,
  "agrpo": {**_GREEDY, "stop_at_eos": True},
  "fast_dllm": {**_PARALLEL, "redraw_mask": True},
  "prefix": {**_PARALLEL, "cache": "prefix"},
  "dual": {**_PARALLEL, "cache": "dual"},
  "sdar": {
    **_GREEDY,
    "block_length": 4,
    "num_denoise_steps": 256,
    "unmask_rule": "dynamic",
    "temperature": 1.0,
    "confidence": "policy",
    "threshold": 0.85,
    "cache": "block",
    "stop_at_eos": True,
    "eos_per_block": "any",
  },
  "bd3lm": {
    **_GREEDY,
    "num_denoise_steps": 256,
    "schedule": "mdlm",
    "cache": "block",
  },
  "fast_dllm_v2": {
    **_GREEDY,
    "completion_length": 512,
    "block_length": 8,
    "lead_every": 32,
    "num_denoise_steps": 512,
    "unmask_rule": "dynamic",
    "top_p": 0.95,
    "confidence": "policy",
    "threshold": 0.9,
    "cache": "block",
    "stop_at_eos": True,
    "eos_per_block": "any",
  },
  "dream": {
    **_GREEDY,
    "completion_length": 512,
    "block_length": 512,
    "num_denoise_steps": 512,
    "schedule": "dream",
    "unmask_rule": "entropy",
    "temperature": 0.2,
    "top_p": 0.95,
    "truncate_first": "top_p",
    "confidence": "policy",
  },
}


def use_sampler(c: ConfigDict, name: str, keep: Collection[str] = ()) -> None:
  """Gives `c.evaluate` the settings called `name`.

  Args:
    c: changed in place.
    name: one of SAMPLERS.
    keep: keys of `c.evaluate` that stay as they are.

  Raises:
    UserError: an unknown name.
  """
  if name not in SAMPLERS:
    raise errors.UserError(
      f"--sampler={name!r} is unknown; the known ones are "
      f"{', '.join(SAMPLERS)}."
    )
  for key, value in SAMPLERS[name].items():
    if key not in keep:
      c.evaluate[key] = value


def set_evaluate(c: ConfigDict, changes: Mapping[str, Any]) -> None:
  """Sets keys of `c.evaluate`; None changes nothing.

  Raises:
    UserError: keys that are unknown or have values of other types.
  """
  unknown = sorted(changes.keys() - {*c.evaluate})
  if unknown:
    raise errors.UserError(
      f"Unknown settings {', '.join(unknown)}; the known ones are "
      f"{', '.join(sorted(c.evaluate))}."
    )
  for name, value in changes.items():
    if value is not None:
      try:
        c.evaluate[name] = value
      except TypeError as error:
        raise errors.UserError(f"{name}={value!r}: {error}") from error
