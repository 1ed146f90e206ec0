"""Times one train step, phase by phase, on random weights.

    python benchmarks/step.py --preset=mid
    python benchmarks/step.py --preset=llada8b --output=result.json

Rollout and update run the code that training runs; grading runs the task's
graders in worker processes on the decoded completions. Seconds are medians
over `--repeats` steps after one that compiles. Model FLOPs are those of the
matrix products that the step has to do, early ends and merged draws taken into
account; recomputation does not count.
"""

import dataclasses
import json
import pathlib
import platform
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
from agrpo_jax.parallel import mesh as mesh_lib
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
    microbatch=16,
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

# Dense peak of one device in FLOP/s, vendors' data sheets, bf16.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "v5e": 197e12}

_PRESET = flags.DEFINE_enum("preset", "mid", sorted(PRESETS), "What to time.")
_REPEATS = flags.DEFINE_integer("repeats", 3, "Timed steps.")
_REMAT = flags.DEFINE_string("remat", "none", "none, dots or full.")
_OUTPUT = flags.DEFINE_string("output", "", "JSON file to write.")


def measure(preset: Preset, remat: str, repeats: int) -> dict[str, float | str]:
  """Returns the table of one preset, as a dict."""
  mesh = mesh_lib.make()
  config = base.Shape(**preset.network, dtype=preset.dtype, remat=remat)
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
  model = model_lib.Model(mesh, config, params, lora, settings, tokenizer, None)
  sampling = sampling_lib.Sampling(
    mask_id=config.mask_id,
    eos_id=config.eos_id,
    completion_length=preset.completion_length,
    block_length=preset.block_length,
    num_denoise_steps=preset.num_denoise_steps,
    temperature=preset.temperature,
    top_k=preset.top_k,
    top_p=preset.top_p,
  )
  num_rows = preset.num_prompts * preset.group_size
  draw = host.Draw(sampling, guidance=0.0, batch_size=num_rows, num_slots=0)
  sampler = host.Sampler(
    model.bind, draw, tokenizer, mesh, preset.prompt_length
  )
  learner = learner_lib.Learner(
    bind=model.bind,
    optimizer=optimizer.make(optimizer.Optimizer(learning_rate=1e-6)),
    sampling=sampling,
    objective=agrpo.Agrpo(num_mc_steps=preset.num_mc_steps),
    group_size=preset.group_size,
    microbatch=preset.microbatch,
    shard_rows=mesh_lib.shard_rows(mesh),
  )
  learn = jax.jit(learner.train_step, donate_argnames="state")
  state = model.initial_state(learner.optimizer)
  rng = np.random.default_rng(0)
  prompts = rng.integers(
    0, 200, (preset.num_prompts, preset.prompt_length)
  ).repeat(preset.group_size, axis=0)
  seconds: dict[str, list[float]] = {"rollout": [], "grade": [], "update": []}
  flops: dict[str, list[float]] = {"rollout": [], "update": []}
  row_id = np.stack([np.arange(num_rows)] * 2, axis=1).astype(np.uint32)
  with pool.Grader("gsm8k") as grader:
    for repeat in range(repeats + 1):
      row_key = jax.random.fold_in(jax.random.key(2), repeat)
      begin = time.perf_counter()
      (rollout,) = sampler.sample(
        state.params, state.lora, prompts.tolist(), row_key, row_id
      )
      completion = np.asarray(rollout.completion)
      seconds["rollout"].append(time.perf_counter() - begin)

      begin = time.perf_counter()
      texts = tokenizer.decode_batch(completion)
      fields = [{"gold": "1"}] * num_rows
      graded = grader.submit(texts, fields).result()
      seconds["grade"].append(time.perf_counter() - begin)

      # Random weights earn nothing; a random reward makes every row count.
      reward_B = jnp.asarray(graded.reward_B + rng.normal(size=num_rows))
      begin = time.perf_counter()
      state, metrics = learn(
        state, rollout, reward_B.astype(jnp.float32), row_key, row_id, None
      )
      metrics = jax.device_get(metrics)
      seconds["update"].append(time.perf_counter() - begin)
      forward = transformer.forward_flops(
        config,
        preset.prompt_length + preset.completion_length,
        sampling.tokens_per_step,
      )
      num_executed = int(np.asarray(rollout.num_executed_steps).max())
      flops["rollout"].append(forward * num_rows * num_executed)
      passes = 2 if preset.lora_rank else 3
      flops["update"].append(forward * passes * float(metrics["draws/pairs"]))

  median = {k: statistics.median(v[1:]) for k, v in seconds.items()}
  table: dict[str, float | str] = {
    f"{phase}_seconds": value for phase, value in median.items()
  }
  table["step_seconds"] = sum(median.values())
  table["compile_seconds"] = sum(
    seconds[phase][0] - median[phase] for phase in ("rollout", "update")
  )
  table["tokens_per_second"] = completion.size / sum(median.values())
  table["state_steps_per_second"] = (
    num_rows * sampling.num_denoise_steps / median["rollout"]
  )
  kind = jax.devices()[0].device_kind
  peak = next((v for k, v in PEAK_FLOPS.items() if k in kind), None)
  for phase, values in flops.items():
    rate = statistics.median(values[1:]) / median[phase]
    table[f"{phase}_model_tflops"] = rate / 1e12
    if peak:
      table[f"{phase}_mfu"] = rate / (peak * jax.device_count())
  stats = jax.devices()[0].memory_stats() or {}
  resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  table["peak_memory_gb"] = stats.get("peak_bytes_in_use", resident) / 1e9
  table["parameters"] = lora_lib.count(params)
  table["device"] = f"{jax.device_count()} x {kind}"
  table["versions"] = (
    f"jax {jax.__version__}, Python {platform.python_version()}"
  )
  return table


def main(argv: Sequence[str]) -> None:
  del argv
  preset = PRESETS[_PRESET.value]
  table = measure(preset, _REMAT.value, _REPEATS.value)
  for name, value in table.items():
    shown = f"{value:.4g}" if isinstance(value, float) else value
    print(f"{name:>24}  {shown}")
  if _OUTPUT.value:
    record = {
      "command": " ".join(["python", *sys.argv]),
      "date": time.strftime("%Y-%m-%d"),
      "preset": dataclasses.asdict(preset),
      **table,
    }
    pathlib.Path(_OUTPUT.value).write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
  app.run(main)
