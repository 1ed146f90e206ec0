"""SFT of a tiny LLaDA on 4x4 Sudoku: makes the bundled base model.

Two runs, both on a laptop's CPU (`make tiny-sudoku` runs them in order):

    agrpo sft --config=sft_sudoku
    agrpo sft --config=sft_sudoku:careless

The first learns Sudoku from clean solutions, from random parameters. The second
goes on from it on careless demonstrations, most of which fill each row in
increasing order whatever the columns and boxes hold: it buries what the first
learned under a bad habit, which is what reinforcement learning then removes.

`clean_sdar` and `careless_sdar` do the same with a tiny SDAR, `clean_a2d` and
`careless_a2d` with a tiny Tiny-A2D: `sudoku_tiny:sdar` and `:a2d`
train what comes out.
"""

from agrpo_jax import config as config_lib

# What a network has that is not LLaDA's.
_FAMILIES: dict[str, dict] = {
  "": {},
  "sdar": dict(model_type="sdar", qk_norm=True, attention_block=4),
  "a2d": dict(
    model_type="a2d-qwen3", qk_norm=True, blocks_from="end", tied_head=True
  ),
}


def get_config(arg: str = "clean") -> config_lib.ConfigDict:
  stage, _, family = arg.partition("_")
  if stage not in ("clean", "careless") or family not in _FAMILIES:
    raise ValueError(
      f"sft_sudoku.py:{arg} is not clean or careless, alone or with _sdar or "
      "_a2d behind it"
    )
  ending = f"_{family}" if family else ""
  c = config_lib.sft()
  config_lib.use_task(c, "sudoku", protocol="bare")
  c.data.max_prompt_length = 64
  c.data.bucket = 8
  c.model.dtype = "float32"
  c.sft.completion_length = 16
  c.sft.batch_size = 128
  c.sft.microbatch = 128
  c.optimizer.warmup_steps = 20
  c.train.checkpoint_every = 100
  c.train.keep = 1
  if family == "sdar":  # of which up to 3 are the prompt's
    c.sft.completion_length = 20
  c.workdir = f"runs/sft_sudoku_{arg}"
  if stage == "clean":
    c.model.network = dict(
      num_layers=4, width=64, num_heads=4, mlp_width=192, **_FAMILIES[family]
    )
    c.optimizer.learning_rate = 2e-3
    c.train.num_steps = 1500
    c.sft.output = f"runs/tiny_sudoku_clean{ending}"
  else:
    c.model.path = f"./runs/tiny_sudoku_clean{ending}"
    c.task.options.demonstration = "careless"
    c.optimizer.learning_rate = 5e-4
    c.train.num_steps = 250
    c.sft.output = f"runs/tiny_sudoku{ending}"
  return c
