"""Real models on a borrowed GPU or TPU, in cells (see `tools/cells.py`)."""

# %% [markdown]
# # The real models
#
# On one borrowed accelerator: a Colab or Kaggle T4, a card of 24 GB, a Kaggle
# TPU. First what fits, before anything is downloaded; then a short run, its
# accuracy, its report, and what it trained as a folder for PyTorch. [First
# steps](first_steps.py) come before.
#
# Planned, not measured: nobody has run this page on its hardware yet. What each
# machine holds is in [hardware.md](../docs/hardware.md).
#
# In Colab and Kaggle upload the wheel that `make dist` in a checkout leaves in
# `dist/`; then, in a cell of its own (`tpu` in the place of `cuda` on a TPU):
#
#     pip install 'agrpo_jax-0.1.0-py3-none-any.whl[cuda,hub,plot]'

# %%
import json
import shlex
import subprocess
import sys


def run(command: str) -> None:
  """Runs a command of ours, as a line of a terminal would."""
  words = shlex.split(command)
  assert words[0] == "agrpo"
  subprocess.run([sys.executable, "-m", "agrpo_jax", *words[1:]], check=True)


# Asked in a process that ends: while one holds a TPU, or has taken the memory
# of a GPU, the commands below would find none.
QUESTION = """
import jax, json
one = jax.devices()[0]
memory = (one.memory_stats() or {}).get("bytes_limit", 0)
print(json.dumps([jax.device_count(), one.device_kind, one.platform, memory]))
"""
answer = subprocess.check_output([sys.executable, "-c", QUESTION], text=True)
number, kind, platform, memory = json.loads(answer.splitlines()[-1])
print(f"{number} x {kind} ({platform}), {memory / 1e9:.0f} GB each for JAX")

# %% [markdown]
# ## What fits
#
# `agrpo plan` compiles the programs of a train step for a machine that need not
# be here, and says whether they fit and how long they take at best. Qwen3-0.6B
# made a diffusion model (Tiny-A2D) with adapters, on a T4 of 16 GB and on a
# card of 24 GB; LLaDA-8B with its layers in int8, on a card of 24 GB:

# %%
run("agrpo plan --config=a2d:t4 --topology=t4:1")

# %%
run("agrpo plan --config=a2d --topology=rtx4090:1")

# %%
run("agrpo plan --config=gsm8k:rtx4090,dual --topology=rtx4090:1")

# %% [markdown]
# On a TPU of eight chips, Kaggle's v5e-8, the rows are split over the chips
# (`pip install 'agrpo_jax[tpu]'` brings its compiler to any machine; minutes):

# %%
if platform == "tpu":
  run("""
    agrpo plan --config=a2d --topology=v5e:2x4 --config.mesh.data=-1
      --config.mesh.fsdp=1 --config.objective.microbatch=8
  """)

# %% [markdown]
# ## A short run
#
# Ten train steps of GSM8K are twenty minutes on a T4 at the floor of the plan,
# perhaps forty, and show that all of it works; they teach little. On eight v5e
# chips they are seconds, and compiling is most of it. `a2d` without `:t4` is
# for cards of 24 GB. The same cell goes on where it was stopped, and longer
# with more `train.num_steps`; the constant learning rate is for that.

# %%
if platform == "tpu":
  run("""
    agrpo train --config=a2d --config.workdir=runs/a2d
      --config.mesh.data=-1 --config.mesh.fsdp=1
      --config.objective.microbatch=8
      --config.train.num_steps=100 --config.train.checkpoint_every=20
      --config.evaluate.every=50 --config.evaluate.num_examples=64
      --config.optimizer.schedule=constant
  """)
else:
  run("""
    agrpo train --config=a2d:t4 --config.workdir=runs/a2d
      --config.train.num_steps=10 --config.train.checkpoint_every=2
      --config.evaluate.every=10 --config.evaluate.num_examples=64
      --config.optimizer.schedule=constant
  """)

# %% [markdown]
# ## How good is it?

# %%
run("""
  agrpo evaluate --config=a2d:t4 --checkpoint=runs/a2d
    --config.evaluate.num_examples=64 --output=runs/a2d_accuracy
""")

# %%
run("agrpo report runs/a2d --html=report.html")

# %%
run("""
  agrpo show --config=a2d:t4 --checkpoint=runs/a2d --example=0
    --html=show.html
""")

# %% [markdown]
# Both pages are files without network: download and open them.
#
# ## For PyTorch
#
# The adapter alone, with a model card; without `--adapter` the whole model.

# %%
run("agrpo port --checkpoint=runs/a2d --to=a2d_adapter --adapter")

# %% [markdown]
# ## Larger
#
# LLaDA-8B on one card of 24 GB is for trying things out (with fewer prompts),
# on eight GPUs of 80 GB or a TPU slice for training: [from an empty cloud
# project to a trained model](../docs/cloud.md). The cell downloads 16 GB; on a
# smaller card it does nothing.

# %%
if memory > 18e9:  # of 24 GB JAX takes three quarters, more than 16 GB have
  run("""
    agrpo train --config=gsm8k:rtx4090,dual --config.workdir=runs/llada
      --config.rollout.num_prompts=2 --config.train.num_steps=4
      --config.evaluate.every=0
  """)
