"""Times one train step, phase by phase, on random weights.

    python benchmarks/step.py --preset=mid
    python benchmarks/step.py --preset=mid --variants=none,dual/blocks=2
    python benchmarks/step.py --preset=llada8b --output=result.json

Rollout and update run the code that training runs; grading runs the task's
graders in worker processes on the decoded completions. Seconds are medians
over `--repeats` steps after one that compiles. Model FLOPs are those of the
matrix products that the step has to do, early ends and merged draws taken into
account; recomputation does not count.

A variant is CACHE/STEP_RULE=DRAWS@MICROBATCH, of which all but the cache may be
left out: the preset's own draws and microbatch. Several variants take their
steps in turns, and are compared step by step with the first.
"""

import dataclasses
import json
import pathlib
import platform
import re
import resource
import statistics
import sys
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import app
from absl import flags

from agrpo_jax import learner as learner_lib
from agrpo_jax import models
from agrpo_jax import optimizer
from agrpo_jax.grading import pool
from agrpo_jax.models import base
from agrpo_jax.models import lora as lora_lib
from agrpo_jax.models import tokens
from agrpo_jax.models import transformer
from agrpo_jax.objectives import agrpo
from agrpo_jax.objectives import mc_steps
from agrpo_jax.parallel import mesh as mesh_lib
from agrpo_jax.plan import chips
from agrpo_jax.port import model as model_lib
from agrpo_jax.samplers import host
from agrpo_jax.samplers import sampling as sampling_lib


@dataclasses.dataclass(frozen=True)
class Preset:
  """A shape to time. `network` holds fields of `base.Shape`."""

  network: dict
  dtype: str
  num_prompts: int
  group_size: int
  prompt_length: int
  completion_length: int
  block_length: int
  num_denoise_steps: int
  num_mc_steps: int
  microbatch: int
  lora_rank: int = 0
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  unroll: int = 1


def network(layers, width, heads, mlp, vocab):
  """Fields of `base.Shape`."""
  return dict(
    model_type="llada",
    num_layers=layers,
    width=width,
    num_heads=heads,
    num_kv_heads=heads,
    mlp_width=mlp,
    vocab_size=vocab,
    embedding_size=vocab,
    mask_id=vocab - 1,
    eos_id=vocab - 2,
    pad_id=vocab - 2,
    rope_theta=500_000.0,
    norm_eps=1e-5,
    qkv_bias=False,
    tied_head=False,
    max_length=4096,
  )


PRESETS = {
  # What the released code was timed on: benchmarks/results/mid_cpu.md.
  "mid": Preset(
    network=network(8, 512, 8, 1536, 8192),
    dtype="float32",
    num_prompts=2,
    group_size=8,
    prompt_length=64,
    completion_length=128,
    block_length=16,
    num_denoise_steps=64,
    num_mc_steps=8,
    microbatch=8,
    unroll=7,
  ),
  # Long completions: what is worth keeping grows with them.
  "long": Preset(
    network=network(8, 512, 8, 1536, 8192),
    dtype="float32",
    num_prompts=1,
    group_size=8,
    prompt_length=128,
    completion_length=256,
    block_length=32,
    num_denoise_steps=128,
    num_mc_steps=8,
    microbatch=8,
    unroll=7,
  ),
  # A block-causal model of Qwen3's kind, as SDAR is: --variants=none,block.
  "sdar": Preset(
    network=network(8, 512, 8, 1536, 8192)
    | dict(model_type="sdar", qk_norm=True, attention_block=4),
    dtype="float32",
    num_prompts=2,
    group_size=8,
    prompt_length=64,
    completion_length=128,
    block_length=4,
    num_denoise_steps=64,
    num_mc_steps=8,
    microbatch=8,
    unroll=7,
  ),
  # The shape of `make demo`.
  "demo": Preset(
    network=network(4, 64, 4, 192, 272),
    dtype="float32",
    num_prompts=8,
    group_size=16,
    prompt_length=24,
    completion_length=16,
    block_length=16,
    num_denoise_steps=8,
    num_mc_steps=2,
    microbatch=256,
  ),
  # LLaDA-8B under the GSM8K settings of the released code, 16 completions.
  "llada8b": Preset(
    network=network(32, 4096, 32, 12288, 126464),
    dtype="bfloat16",
    num_prompts=2,
    group_size=8,
    prompt_length=256,
    completion_length=384,
    block_length=12,
    num_denoise_steps=128,
    num_mc_steps=24,
    microbatch=8,
    lora_rank=64,
    temperature=0.6,
    top_k=150,
    top_p=0.99,
  ),
}


@dataclasses.dataclass(frozen=True)
class Variant:
  """One way to do a preset's train step; see the head of this file."""

  cache: str
  step_rule: str
  num_draws: int
  microbatch: int

  @classmethod
  def parse(cls, text: str, preset: Preset) -> "Variant":
    """Returns the variant that a word of `--variants` means."""
    match = re.fullmatch(r"(\w+)(?:/(\w+))?(?:=(\d+))?(?:@(\d+))?", text)
    if not match:
      raise app.UsageError(f"--variants: {text!r} is no variant")
    cache, step_rule, num_draws, microbatch = match.groups()
    return cls(
      cache,
      step_rule or "uniform",
      int(num_draws or preset.num_mc_steps),
      int(microbatch or preset.microbatch),
    )

  @property
  def objective(self) -> agrpo.Agrpo:
    return agrpo.Agrpo(
      step_rule=self.step_rule,
      num_mc_steps=self.num_draws,
      num_mc_blocks=self.num_draws,
    )


class Subject:
  """A variant that takes train steps, with what they took.

  Attributes:
    seconds: of every step, by phase.
    flops: of every step, of rollout and update.
    peak: bytes of device memory at most; of the process, on a CPU.
  """

  def __init__(
    self, model: model_lib.Model, preset: Preset, variant: Variant
  ) -> None:
    config = model.shape
    self.model, self.preset = model, preset
    self.visits_blocks = variant.step_rule not in mc_steps.DRAWN_STEPS
    self.sampling = sampling_lib.Sampling(
      mask_id=config.mask_id,
      eos_id=config.eos_id,
      completion_length=preset.completion_length,
      block_length=preset.block_length,
      num_denoise_steps=preset.num_denoise_steps,
      temperature=preset.temperature,
      top_k=preset.top_k,
      top_p=preset.top_p,
      cache=variant.cache,
    )
    num_rows = preset.num_prompts * preset.group_size
    draw = host.Draw(self.sampling, 0.0, batch_size=num_rows, num_slots=0)
    self.sampler = model.sampler(draw, preset.prompt_length)
    learner = learner_lib.Learner(
      bind=model.bind,
      optimizer=optimizer.make(optimizer.Optimizer(learning_rate=1e-6)),
      sampling=self.sampling,
      objective=variant.objective,
      group_size=preset.group_size,
      microbatch=variant.microbatch,
      policy=draw.policy_for(config),
      shard_rows=mesh_lib.shard_rows(model.mesh),
    )
    self.learn = jax.jit(learner.train_step, donate_argnames="state")
    # Donated, so each subject has a copy of what it trains.
    self.state = jax.tree.map(jnp.copy, model.initial_state(learner.optimizer))
    if model.lora is not None:
      self.state = self.state.replace(params=model.params)
    self.seconds: dict[str, list[float]] = {
      "rollout": [],
      "grade": [],
      "update": [],
    }
    self.flops: dict[str, list[float]] = {"rollout": [], "update": []}

  def step(self, repeat: int, prompts: np.ndarray, grader: pool.Grader) -> None:
    """Takes a train step and adds what it took."""
    num_rows, state = len(prompts), self.state
    row_id = np.stack([np.arange(num_rows)] * 2, axis=1).astype(np.uint32)
    row_key = jax.random.fold_in(jax.random.key(2), repeat)
    begin = time.perf_counter()
    (rollout,) = self.sampler.sample(
      state.params, state.lora, prompts.tolist(), row_key, row_id
    )
    completion = np.asarray(rollout.completion)
    self.seconds["rollout"].append(time.perf_counter() - begin)

    begin = time.perf_counter()
    texts = self.model.tokenizer.decode_batch(completion)
    graded = grader.submit(texts, [{"gold": "1"}] * num_rows).result()
    self.seconds["grade"].append(time.perf_counter() - begin)

    # Random weights earn nothing; a random reward makes every row count.
    noise_B = np.random.default_rng(repeat).normal(size=num_rows)
    reward_B = jnp.asarray(graded.reward_B + noise_B, jnp.float32)
    begin = time.perf_counter()
    self.state, metrics = self.learn(
      state, rollout, reward_B, row_key, row_id, None
    )
    metrics = jax.device_get(metrics)
    self.seconds["update"].append(time.perf_counter() - begin)
    num_steps = int(np.asarray(rollout.num_executed_steps).max())
    units, s = float(metrics["draws/pairs"]), self.sampling
    shares = s.steps_per_memory
    self.flops["rollout"].append(
      num_rows * self._flops(num_steps, num_steps // shares)
    )
    passes = 2 if self.model.lora is not None else 3
    if s.cache == "block":  # a unit is a completion beside its windows
      visits = float(metrics["draws/visits"])
      total = visits * self._flops(1, 0) + units * self._flops(0, 1, True)
    else:
      # A drawn step is scored beside its start state, which is another.
      num_states = shares if self.visits_blocks else 2
      total = units * self._flops(num_states, 1)
    self.flops["update"].append(passes * total)

  def _flops(
    self, num_steps: int, num_opened: int, is_whole: bool = False
  ) -> float:
    """FLOPs of steps of a row that read `num_opened` memories.

    The first step of each is its start state, which has no window. Of an exact
    cache, which has no such step, only the last block is added, unless
    `is_whole`.
    """
    s, config = self.sampling, self.model.shape
    length = self.preset.prompt_length + s.completion_length
    wanted = s.tokens_per_step
    if s.cache == "none":
      return num_steps * transformer.forward_flops(config, length, wanted)
    num_tokens = s.block_length
    opened = transformer.forward_flops(config, length, wanted)
    if s.cache == "block":
      row_tokens = length if is_whole else num_tokens
      opened = transformer.forward_flops(config, length, 0, row_tokens)
    else:
      num_steps -= num_opened
    if s.cache == "prefix":  # the mean over blocks: each has its own length
      num_tokens = (s.completion_length + s.block_length) // 2
    windows = transformer.forward_flops(config, length, wanted, num_tokens)
    return num_steps * windows + num_opened * opened

  def table(self) -> dict[str, float | str]:
    """Returns medians over the steps after the first, which compiles."""
    num_rows = self.preset.num_prompts * self.preset.group_size
    median = {k: statistics.median(v[1:]) for k, v in self.seconds.items()}
    table: dict[str, float | str] = {
      f"{phase}_seconds": value for phase, value in median.items()
    }
    total = sum(median.values())
    table["step_seconds"] = total
    table["compile_seconds"] = sum(
      self.seconds[phase][0] - median[phase] for phase in ("rollout", "update")
    )
    completion_tokens = num_rows * self.sampling.completion_length
    table["tokens_per_second"] = completion_tokens / total
    table["state_steps_per_second"] = (
      num_rows * self.sampling.num_denoise_steps / median["rollout"]
    )
    chip = chips.of_device(jax.devices()[0].device_kind)
    for phase, values in self.flops.items():
      rate = statistics.median(values[1:]) / median[phase]
      table[f"{phase}_model_tflops"] = rate / 1e12
      if chip:
        table[f"{phase}_mfu"] = rate / (chip.flops * jax.device_count())
    return table

  def times_as_fast(self, first: "Subject") -> dict[str, float]:
    """Returns median ratios of the first one's seconds to its own, in pairs."""

    def ratio(phases: Sequence[str]) -> float:
      pairs = zip(
        *(
          np.sum([of.seconds[phase][1:] for phase in phases], axis=0)
          for of in (first, self)
        ),
        strict=True,
      )
      return statistics.median(theirs / own for theirs, own in pairs)

    return {
      "rollout_times_as_fast": ratio(["rollout"]),
      "update_times_as_fast": ratio(["update"]),
      "step_times_as_fast": ratio(["rollout", "grade", "update"]),
    }


def make_model(preset: Preset, remat: str = "none") -> model_lib.Model:
  """Returns a model with random weights on all devices."""
  mesh = mesh_lib.make()
  config = base.Shape(
    **preset.network, dtype=preset.dtype, remat=remat, unroll=preset.unroll
  )
  axes = mesh_lib.shardings(
    mesh, transformer.logical_axes(config), transformer.abstract_params(config)
  )
  init = jax.jit(
    lambda key: transformer.init(
      config, key, jnp.dtype(preset.dtype if preset.lora_rank else "float32")
    ),
    out_shardings=axes,
  )
  params, lora, settings = init(jax.random.key(0)), None, None
  if preset.lora_rank:
    settings = lora_lib.Lora(preset.lora_rank, 64.0, lora_lib.TARGETS)
    lora = lora_lib.init(settings, params, jax.random.key(1))
  tokenizer = tokens.load(None, models.vocabulary(config))
  return model_lib.Model(mesh, config, params, lora, settings, tokenizer, None)


def measure(
  preset: Preset, remat: str, variants: dict[str, Variant], repeats: int
) -> dict[str, dict[str, float | str]]:
  """Returns the table of each variant of one preset."""
  model = make_model(preset, remat)
  subjects = {
    name: Subject(model, preset, variant) for name, variant in variants.items()
  }
  prompts = (
    np.random.default_rng(0)
    .integers(0, 200, (preset.num_prompts, preset.prompt_length))
    .repeat(preset.group_size, axis=0)
  )
  with pool.Grader("gsm8k") as grader:
    for repeat in range(repeats + 1):
      for subject in subjects.values():
        subject.step(repeat, prompts, grader)
  first = next(iter(subjects.values()))
  tables = {}
  for name, subject in subjects.items():
    tables[name] = subject.table()
    if subject is not first:
      tables[name] |= subject.times_as_fast(first)
  stats = jax.devices()[0].memory_stats() or {}
  resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  kind = jax.devices()[0].device_kind
  tables["all"] = {
    "peak_memory_gb": stats.get("peak_bytes_in_use", resident) / 1e9,
    "parameters": lora_lib.count(model.params),
    "device": f"{jax.device_count()} x {kind}",
    "versions": f"jax {jax.__version__}, Python {platform.python_version()}",
  }
  return tables


def main(argv: Sequence[str]) -> None:
  del argv
  asked = flags.FLAGS
  preset = PRESETS[asked.preset]
  variants = {text: Variant.parse(text, preset) for text in asked.variants}
  tables = measure(preset, asked.remat, variants, asked.repeats)
  for title, table in tables.items():
    print(title)
    for name, value in table.items():
      shown = f"{value:.4g}" if isinstance(value, float) else value
      print(f"{name:>24}  {shown}")
  if asked.output:
    record = {
      "command": " ".join(["python", *sys.argv]),
      "date": time.strftime("%Y-%m-%d"),
      "preset": dataclasses.asdict(preset),
      **tables,
    }
    pathlib.Path(asked.output).write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
  flags.DEFINE_enum("preset", "mid", sorted(PRESETS), "What to time.")
  flags.DEFINE_list("variants", ["none"], "Caches and step rules.")
  flags.DEFINE_integer("repeats", 3, "Timed steps.")
  flags.DEFINE_string("remat", "none", "none, dots or full.")
  flags.DEFINE_string("output", "", "JSON file to write.")
  app.run(main)
