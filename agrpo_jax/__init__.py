"""AGRPO for masked diffusion language models, in JAX.

A file beside this one is something you run, or the spine: `main.py` is the
command, `train.py` the recipe, `learner.py` one train step of any objective,
`config.py` every setting, `types.py` the records that cross borders. A folder
is a layer, and imports only folders above it in this list:

  parallel/    devices in a mesh, a split vocabulary, the processes of a run
  models/      parameters -> logits: the transformer, families, tokenizers, LoRA
  policies/    how the logits of a denoising step follow from a row's state
  samplers/    x_K -> ... -> x_0: the draw, the unmask rules, the loop
  objectives/  graded completions -> loss: what is visited, read, and paid
  tasks/       where problems come from and how completions are graded; no jax
  grading/     worker processes in which completions are graded
  runs/        a work directory that survives kills: checkpoints, metrics
  port/        model folders in the layout of Hugging Face <-> parameters
  evaluation/  held-out accuracy: one evaluation, records, statistics, tables
  lm_eval/     a model for lm-eval
  show/        completions shown step by step
  plan/        whether a run fits, and what it takes, before it is started
  report/      a run, or several side by side, as one page
  lab/         how biased and how noisy the objectives are
"""

__version__ = "0.1.0"
