"""Defaults, presets, and the check of a config."""

import pytest

from agrpo_jax import config as config_lib
from agrpo_jax import errors
from agrpo_jax import objectives
from agrpo_jax import settings
from agrpo_jax import sft
from agrpo_jax.objectives import agrpo
from fixtures import recordings

CONFIGS = sorted(path.stem for path in recordings.CONFIGS.glob("*.py"))


def check(c):
  """Raises UserError for what is wrong with a config of either kind."""
  {"rl": settings.rl, "sft": settings.sft}[c.kind](c)


def make_data(c, folder, monkeypatch):
  """Makes the file that a config names, which a command writes otherwise."""
  monkeypatch.chdir(folder)
  if c.data.path:
    path = folder / c.data.path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
  if c.kind == "sft" and c.model.path:
    (folder / c.model.path).mkdir(parents=True, exist_ok=True)


@pytest.mark.parametrize("name", CONFIGS)
def test_shipped_configs_hold(name, tmp_path, monkeypatch):
  c = recordings.config(name)
  make_data(c, tmp_path, monkeypatch)
  check(c)


@pytest.mark.parametrize("name", objectives.NAMES)
def test_published_recipes_hold(name):
  c = recordings.config("published", name)
  check(c)
  assert c.objective.name == name
  with pytest.raises(ValueError, match="is not of"):
    recordings.config("published", name + "s")


@pytest.mark.parametrize("name,share", [("agrpo", 0.01), ("espo", 0.001)])
def test_published_warm_ups_are_shares_of_the_updates(name, share):
  optimizer = settings.rl(recordings.config("published", name)).optimizer
  assert optimizer.warmup_steps == share * optimizer.num_updates


@pytest.mark.parametrize("name", ["trace_rl", "random_mask"])
def test_no_eos_is_scored_as_published(name):
  assert recordings.config("published", name).objective.max_eos == 0


@pytest.mark.parametrize(
  "config,changes,parts",
  [
    (
      ("published", "dipo"),
      {"rollout.unmask_rule": "dynamics", "objective.kl_coef": -1.0},
      ["config.rollout.unmask_rule='dynamics'", "config.objective.kl_coef=-1"],
    ),
    (
      ("gsm8k", "dual"),
      {"rollout.block_length": 0, "objective.num_mc_blocks": 0},
      ["config.rollout.block_length=0", "config.objective.num_mc_blocks=0"],
    ),
    (
      ("published", "dipo"),
      {
        "rollout.num_denoise_steps": 256,
        "rollout.cache": "prefix",
        "rollout.cache_refresh": 3,
      },
      [
        "config.objective.name: whole blocks are visited, their 4 steps in "
        "lots of config.rollout.cache_refresh=3"
      ],
    ),
  ],
)
def test_an_objective_copes_with_a_sampler_that_cannot_be(
  config, changes, parts
):
  c = recordings.config(*config)
  c.update_from_flattened_dict(changes)
  for problem, part in zip(settings.inspect(c)[1], parts, strict=True):
    assert problem.startswith(part)


@pytest.mark.parametrize("arg", ["exact", "debug", "v5e", "v6e,exact", "v5p"])
def test_variants_of_gsm8k_hold(arg):
  c = recordings.config("gsm8k", arg)
  check(c)
  is_exact = c.objective.normalize == "sum"
  assert is_exact == ("exact" in arg)
  assert c.rollout.cache == "none"
  if "v5e" in arg:
    assert (c.rollout.batch_size, c.mesh.tensor) == (128, 2)


@pytest.mark.parametrize("more", ["", "dual", "exact", "dual,threshold"])
def test_gsm8k_on_one_card(more):
  c = recordings.config("gsm8k", f"rtx4090,{more}")
  check(c)
  assert (c.model.quantize, c.lora.rank) == ("int8", 64)
  assert c.rollout.batch_size == c.evaluate.batch_size <= 16


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("more", ["", "v5e", "h100", "debug", "threshold"])
def test_gsm8k_with_a_cache(cache, more):
  c = recordings.config("gsm8k", f"{cache},{more}")
  check(c)
  assert c.rollout.cache == c.evaluate.cache == cache
  assert (c.objective.likelihood, c.objective.step_rule) == ("exact", "blocks")


def test_the_demo_in_blocks():
  for variant, cache in (("blocks", "none"), ("dual", "dual")):
    c = recordings.config("sudoku_tiny", variant)
    check(c)
    assert (c.rollout.cache, c.rollout.block_length) == (cache, 8)
  with pytest.raises(ValueError, match="blocks, dual"):
    recordings.config("sudoku_tiny", "duel")


@pytest.mark.parametrize(
  "arg", ["countdown", "both", "words", "clean", "careless", "pairs", "adding"]
)
def test_runs_of_the_tiny_reasoning_model_hold(arg, tmp_path, monkeypatch):
  c = recordings.config("sft_reasoning", arg)
  make_data(c, tmp_path, monkeypatch)
  check(c)
  with pytest.raises(ValueError, match="pairs, adding"):
    recordings.config("sft_reasoning", "all")


def test_word_problems_with_a_cache():
  c = recordings.config("word_problems_tiny", "dual")
  check(c)
  assert (c.rollout.cache, c.objective.step_rule) == ("dual", "all")
  with pytest.raises(ValueError, match="not of dual"):
    recordings.config("word_problems_tiny", "prefix")


def test_dream_on_one_card():
  c = recordings.config("dream", "h200")
  check(c)
  assert c.evaluate.schedule == c.rollout.schedule == "dream"
  with pytest.raises(ValueError, match="not of h200"):
    recordings.config("dream", "t4")


@pytest.mark.parametrize(
  "name, variants, cache, block",
  [
    ("a2d", "t4", "dual", 32),
    ("a2d", "bd3lm,math", "block", 32),
    ("dream", "h200,math", "none", 256),
    ("sdar", "4b,math", "block", 4),
    ("sdar", "trado", "block", 4),
    ("fast_dllm_v2", "1.5b,math", "block", 8),
    ("sudoku_tiny", "sdar", "block", 4),
  ],
)
def test_recipes_of_other_families_hold(name, variants, cache, block):
  c = recordings.config(name, variants)
  check(c)
  assert c.rollout.cache == c.evaluate.cache == cache
  assert c.rollout.block_length == c.evaluate.block_length == block
  if name != "sudoku_tiny":
    assert c.task.name == ("math" if "math" in variants else "gsm8k")
  with pytest.raises(ValueError, match="is not of"):
    recordings.config(name, "sudoku")


@pytest.mark.parametrize("stage", ["clean", "careless"])
@pytest.mark.parametrize("family", ["sdar", "a2d"])
def test_tiny_models_of_other_families_can_be_made(
  stage, family, tmp_path, monkeypatch
):
  c = recordings.config("sft_sudoku", f"{stage}_{family}")
  make_data(c, tmp_path, monkeypatch)
  check(c)
  if stage == "clean":
    sft.initial_shape(c.model.network)
  with pytest.raises(ValueError, match="is not clean or careless"):
    recordings.config("sft_sudoku", f"{stage}_llada")


def test_defaults_are_the_exact_estimator():
  o = config_lib.rl().objective
  assert (o.likelihood, o.visited_steps, o.normalize) == (
    "exact",
    "executed",
    "sum",
  )
  assert (o.baseline, o.updates_per_batch) == ("leave_one_out", 1)


def test_the_paper_preset_sets_every_switch_to_the_released_value():
  c = config_lib.rl()
  config_lib.paper(c)
  o = c.objective
  assert (o.likelihood, o.visited_steps, o.normalize) == (
    "product",
    "content",
    "mean",
  )
  assert (o.baseline, o.stratified) == ("group_mean", "batch")
  assert (o.kl_estimator, c.rollout.top_p_rule) == ("k3_ratio", "drop")


def test_settings_and_records_have_the_same_names_and_defaults():
  """A key that a record lacks would be ignored without a word."""
  o = config_lib.rl().objective
  shared = {"name", "path", "microbatch", "step_price"}
  assert set(o) == {*vars(agrpo.Agrpo()), *shared}


def test_all_problems_at_once_by_their_full_names():
  c = config_lib.sft()
  c.model.network = dict(num_layers=1)
  c.model.path = "also"
  c.sft.batch_size = 10
  c.sft.microbatch = 3
  c.optimizer.b1 = 1.5
  with pytest.raises(errors.UserError) as error:
    check(c)
  for part in (
    "config.workdir",
    "config.model.path='also'",
    "config.sft.microbatch=3",
    "config.optimizer.b1=1.5",
    "config.task.name",
  ):
    assert part in str(error.value)


def test_use_task_lists_every_option():
  c = config_lib.rl()
  config_lib.use_task(c, "sudoku", protocol="bare")
  c.task.options.shots = 0  # what the command line does
  options = config_lib.task_options(c)
  assert (options["protocol"], options["shots"]) == ("bare", 0)
  assert "min_blanks" in options


def test_a_task_of_ones_own_gets_its_own_options_alone():
  c = config_lib.rl()
  config_lib.use_task(c, "sudoku", protocol="bare")
  c.task.path = "reverse.py"
  c.task.options.exact_weight = 5.0
  assert config_lib.task_options(c) == {"exact_weight": 5.0}


@pytest.mark.parametrize("make", [config_lib.rl, config_lib.sft])
def test_a_misspelt_key_is_an_error(make):
  c = make()
  with pytest.raises(AttributeError, match="learning_rate"):
    c.optimizer.learning_rat = 1.0


def sudoku() -> config_lib.ConfigDict:
  c = config_lib.rl()
  c.workdir = c.model.path = "x"
  config_lib.use_task(c, "sudoku")
  return c


@pytest.mark.parametrize("name", config_lib.SAMPLERS)
def test_every_sampler_holds(name):
  c = sudoku()
  config_lib.use_sampler(c, name)
  assert settings.inspect(c)[1] == []


def test_a_sampler_sets_what_is_not_kept():
  c = sudoku()
  c.evaluate.temperature = 0.7
  c.evaluate.num_denoise_steps = 16
  config_lib.use_sampler(c, "config")
  assert c.evaluate.num_denoise_steps == 16
  config_lib.use_sampler(
    c, "fast_dllm", keep=["temperature", "num_denoise_steps"]
  )
  assert c.evaluate.temperature == 0.7
  assert c.evaluate.num_denoise_steps == 16
  assert c.evaluate.threshold == 0.9
  config_lib.use_sampler(c, "llada")
  assert c.evaluate.threshold is None
  assert c.evaluate.temperature == 0.0


def test_an_unknown_sampler_is_refused():
  with pytest.raises(errors.UserError, match=r"'dreams' is unknown.*fast_dllm"):
    config_lib.use_sampler(sudoku(), "dreams")
