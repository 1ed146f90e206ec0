"""Ten minutes on a CPU, in cells; `tools/cells.py` makes a notebook."""

# %% [markdown]
# # First steps
#
# Ten minutes on a laptop's CPU: what a masked diffusion language model is, how
# its answers come about, why their score has to be estimated, how a model
# learns from a reward, and how a reward of your own takes the place of ours.
# Nothing is downloaded: a tiny LLaDA that has learned 4x4 Sudoku comes with the
# package. In a checkout:
#
#     pip install -e '.[plot]'
#
# These cells are `examples/first_steps.py`. As a notebook:
#
#     python tools/cells.py examples/first_steps.py first_steps.ipynb

# %%
import os
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import pyplot as plt

from agrpo_jax import command
from agrpo_jax import data
from agrpo_jax import settings
from agrpo_jax import train
from agrpo_jax.lab import gradients
from agrpo_jax.port import model as model_lib
from agrpo_jax.report import page
from agrpo_jax.runs import metrics

WORK = pathlib.Path(os.environ.get("FIRST_STEPS") or tempfile.mkdtemp())
TRAIN_STEPS = int(os.environ.get("FIRST_STEPS_TRAIN", "60"))
DRAWS = int(os.environ.get("FIRST_STEPS_DRAWS", "16"))

# %% [markdown]
# ## A model that fills in blanks
#
# A config says everything about a run; this one is what `make demo` trains.
# With it come the model and the problems.

# %%
c = command.load_config("sudoku_tiny")
s = settings.rl(c)
model = model_lib.load_model(s.model, s.lora, s.mesh.make(), seed=s.seed)
tokenizer = model.tokenizer
held_out = data.load_dataset(s.task, s.data, tokenizer, "test").prompts
puzzle = held_out[0].example.fields["puzzle"]
print("\n".join(" ".join(puzzle[i : i + 4]) for i in range(0, 16, 4)))

# %% [markdown]
# An autoregressive model is asked for the next token. A masked diffusion model
# is shown the prompt and a completion whose tokens are [MASK], all or some of
# them, and says for every position at once which token may stand there. So it
# can begin with what is easy.

# %%
prompt = held_out[0].tokens
row = jnp.array([[*prompt, *[tokenizer.mask_id] * 16]])
place = len(prompt) + jnp.arange(16)[None]
network = model.bind(model.params, model.lora)
logits = network.logits(row, jnp.array([row.shape[1]]), place)[0]
most_probable = jax.nn.softmax(logits).max(axis=-1).reshape(4, 4)
guess = tokenizer.decode(logits.argmax(axis=-1).tolist())

figure, axes = plt.subplots(figsize=(3, 3))
axes.imshow(most_probable, vmin=0, vmax=1, cmap="Greens")
for i, digit in enumerate(guess):
  is_clue = puzzle[i] != "0"
  weight = "bold" if is_clue else "normal"
  axes.text(i % 4, i // 4, digit, ha="center", va="center", weight=weight)
axes.set(xticks=[], yticks=[], title="all masked: its best guesses")
figure.savefig(WORK / "guesses.png")

# %% [markdown]
# Clues (bold) it copies with certainty (green). Of the blanks it is less sure:
# it has not seen what it will write into the others.
#
# ## Watching one unmask
#
# So an answer is drawn in *denoising steps*. Each asks the network once, draws
# tokens, and unmasks some positions for good; the next sees these. A `Rollout`
# records for every position at which step it was unmasked, and how probable its
# token was.

# %%
sampler = model.sampler(s.evaluate, s.data.bucket)
ids = np.array([(held_out[0].example.id, 0)], np.uint32)
rollout = next(
  sampler.sample(model.params, model.lora, [prompt], jax.random.key(0), ids)
)
answer = tokenizer.decode(rollout.completion[0].tolist())
step = np.asarray(rollout.unmask_step[0])

shown = (0, 4, 8, 12, 15)
figure, many = plt.subplots(1, len(shown), figsize=(2 * len(shown), 2.2))
for axes, last in zip(many, shown, strict=True):
  axes.imshow(
    np.where(step <= last, step, np.nan).reshape(4, 4), vmin=0, vmax=15
  )
  for i in np.flatnonzero(step <= last).tolist():
    axes.text(i % 4, i // 4, answer[i], ha="center", va="center", color="w")
  axes.set(xticks=[], yticks=[], title=f"after step {last + 1}")
figure.savefig(WORK / "unmask.png")
print("gold", held_out[0].example.fields["gold"], "answer", answer)

# %% [markdown]
# Colours are the order: confident positions came first. Played, with
# probabilities and entropies of every token, a page shows the same:
#
#     agrpo show --config=sudoku_tiny --example=0 --html=unmask.html
#
# ## The score of a completion, and its noise
#
# The probability of a completion is a product over denoising steps, so its
# score is a sum over them:
#
#     grad log P(rollout) = sum of grad log P(what a step unmasks | its state)
#
# Reinforcement learning multiplies that by an advantage. All K steps are K
# passes of the network, forward and backward; AGRPO draws M of them and weighs
# them, which has the same expectation. What does it cost in noise? One batch of
# completions, graded; the exact gradient; and estimates, drawn again and again
# (`agrpo lab gradients`):

# %%
c = command.load_config("sudoku_tiny")
c.rollout.update(num_prompts=4, group_size=8, batch_size=32)
c.objective.microbatch = 64
small = settings.rl(c)
batch = gradients.draw(small)
words = [f"agrpo/step_rule=uniform/num_mc_steps={m}" for m in (1, 4)]
words += ["diffu_grpo"]
estimators = {word: gradients.parse(c, word) for word in words}
rows = gradients.measure(batch, estimators, DRAWS)

figure, axes = plt.subplots(figsize=(6, 3), layout="tight")
for found in rows:
  axes.plot(found.passes, found.relative_variance, "o", label=found.estimate)
axes.set(xlabel="passes a completion", ylabel="variance / |gradient|²")
axes.set_ylim(bottom=0)
axes.legend(fontsize=6)
figure.savefig(WORK / "variance.png")

# %% [markdown]
# Each of AGRPO's estimates is unbiased, and more steps are less noise.
# `diffu_grpo` scores one partial completion that the sampler never was in: its
# mean points elsewhere, and has a bias however often it is drawn. [The
# estimator](../docs/estimator.md) has the mathematics, and what is exact.
#
# ## A short run
#
# The bundled model knows Sudoku under a bad habit: it fills rows in increasing
# order. The reward is the share of blanks that are right. A train step draws 16
# completions of each of 8 puzzles, grades them, and takes one optimizer update;
# every 10 train steps held-out puzzles are solved. (`make demo` runs 120 train
# steps, to about 95 %.)

# %%
c = command.load_config("sudoku_tiny")
c.workdir = str(WORK / "run")
c.train.num_steps = TRAIN_STEPS
c.train.checkpoint_every = TRAIN_STEPS
c.evaluate.every = max(1, TRAIN_STEPS // 6)
c.evaluate.num_examples = 128
train.train(settings.rl(c))

# %%
log = list(metrics.read(WORK / "run" / "metrics.jsonl"))
evaluated = [one for one in log if "eval/accuracy" in one]

figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="tight")
left.plot(
  [one["train_step"] + 1 for one in log], [one["reward"] for one in log]
)
left.set(xlabel="train step", title="reward")
right.plot(
  [one["train_step"] + 1 for one in evaluated],
  [one["eval/accuracy"] for one in evaluated],
  "o-",
)
right.set(xlabel="train step", title="held-out puzzles solved", ylim=(0, 1))
figure.savefig(WORK / "run.png")

# %% [markdown]
# ## Its report
#
# Every run leaves a page in its work directory: curves, held-out accuracy with
# intervals, the same problems before and after, each played step by step, and
# warnings in words with what to change. It is a file without network; open it
# in a browser.

# %%
page.write([str(WORK / "run")], WORK / "report.html")
print("open", WORK / "report.html")

# %% [markdown]
# The command is `agrpo report runs/sudoku_tiny --html=report.html`; with more
# work directories it compares.
#
# ## Your own task
#
# A task is one Python file with four functions. This one asks the same puzzles,
# and grades by the rules alone: it never looks at a solution. What `reward`
# returns is paid, what `grade` returns is reported.

# %%
RULES = '''"""4x4 Sudoku graded by its rules, without solutions."""

from agrpo_jax.tasks import sudoku

UNITS = [
  *([4 * r + c for c in range(4)] for r in range(4)),
  *([4 * r + c for r in range(4)] for c in range(4)),
  *(
    [4 * (r + i) + c + j for i in range(2) for j in range(2)]
    for r in (0, 2)
    for c in (0, 2)
  ),
]


def examples(split, *, path=None, options=None):
  return sudoku.examples(
    split, path=path, options={"protocol": "bare", "num_examples": 2000}
  )


def reward_weights(options):
  return {"units": 1.0, "clues": 1.0}


def reward(completion, fields, options):
  grid = completion.strip()
  if len(grid) != 16:
    return {"units": 0.0, "clues": 0.0}
  good = sum(sorted(grid[i] for i in unit) == list("1234") for unit in UNITS)
  kept = all(p in ("0", g) for p, g in zip(fields["puzzle"], grid))
  return {"units": good / len(UNITS), "clues": float(kept)}


def grade(completion, fields, options):
  parts = reward(completion, fields, options)
  return {"accuracy": float(parts == {"units": 1.0, "clues": 1.0})}
'''
(WORK / "rules.py").write_text(RULES)

c = command.load_config("sudoku_tiny")
c.task.path = str(WORK / "rules.py")
c.workdir = str(WORK / "rules")
c.train.num_steps = max(1, TRAIN_STEPS // 2)
c.evaluate.every = c.train.num_steps
c.evaluate.num_examples = 128
train.train(settings.rl(c))

# %% [markdown]
# It learns from the rules as it does from solutions. On the command line, with
# the text of `RULES` in a file `rules.py` where you are, that is
#
#     agrpo train --config=sudoku_tiny --config.task.path=rules.py \
#       --config.workdir=runs/rules
#
# and with `--config=gsm8k` in its place, and a GPU or a TPU, LLaDA-8B. [A task
# of your own](../docs/custom_task.md) says what a task file may do, and [the
# real models](real_models.py) goes on from here.
