"""The search for settings, on costs made up by hand."""

import dataclasses
import types

import pytest

from agrpo_jax import errors
from agrpo_jax import settings
from agrpo_jax.plan import __main__ as plan
from agrpo_jax.plan import chips
from agrpo_jax.plan import cost as cost_lib
from agrpo_jax.plan import programs
from configs import gsm8k

CHIP = chips.CHIPS["v5e"]  # 15.75 GiB
GIB = 2**30

# What a row takes of a device in an update: GiB, seconds.
REMAT = {"full": (0.25, 3.0), "dots": (1.0, 2.5), "none": (4.0, 2.0)}


class FakePlanner:
  """A network of `gib` GiB whose split weights take 2 s to gather.

  A completion takes 1 GiB and 1 s of a device, a third of it with a cache.
  """

  def __init__(self, s, gib, refused=()):
    self.mesh = type("Mesh", (), {"shape": dataclasses.asdict(s.mesh)})()
    self.prompt_length = 512
    self.parts = s.mesh.fsdp * s.mesh.tensor
    self.gib = gib
    if self.parts in refused:
      raise errors.UserError(f"{self.parts} parts are too many.")

  def held_bytes(self, s):
    return self.gib * GIB / self.parts

  def program(self, name, s, runs, rows, gib, seconds):
    seconds = rows * seconds + (2 if self.parts > 1 else 0)
    return programs.Program(
      name,
      runs,
      arguments=self.held_bytes(s) + rows * gib * GIB,
      cost=cost_lib.Cost(flops=CHIP.flops * seconds),
    )

  def rollout(self, s):
    runs = s.rollout.num_rows // s.rollout.batch_size
    rows = s.rollout.batch_size / (s.mesh.data * s.mesh.fsdp)
    seconds = 1.0 if s.rollout.sampling.cache == "none" else 1 / 3
    return self.program("rollout", s, runs, rows, 1.0, seconds)

  def update(self, s):
    rows = s.microbatch / (s.mesh.data * s.mesh.fsdp)
    return self.program("update", s, 1, rows, *REMAT[s.model.remat])

  def units_per_update(self, s):
    return s.rollout.num_rows * s.objective.num_mc_steps


def fastest(gib, num_devices=4, caches=("",), **kwargs):
  # 128 completions
  candidates = [settings.rl(gsm8k.get_config(cache)) for cache in caches]
  tried = []

  def make_planner(s):
    tried.append(s.mesh)
    return FakePlanner(s, gib, **kwargs)

  choices = plan.fastest(candidates, make_planner, num_devices, CHIP)
  assert [c.seconds for c in choices] == sorted(c.seconds for c in choices)
  return choices, tried


def test_weights_that_fit_whole_stay_whole(capsys):
  choices, _ = fastest(gib=8)
  best = choices[0].s
  assert best.mesh == settings.Mesh(data=4, fsdp=1, tensor=1)
  # 32 completions a device, one microbatch of one unit each.
  assert choices[0].seconds == pytest.approx(32 + 2)
  assert (best.microbatch, best.model.remat) == (4, "none")
  out = capsys.readouterr().out
  assert "--config.rollout.batch_size=32 does not fit" in out
  assert "--config.model.remat=none --config.objective.microbatch=8" in out


def test_caches_are_compared_on_each_mesh():
  choices, _ = fastest(gib=8, caches=("", "dual"))
  caches = [choice.s.rollout.sampling.cache for choice in choices]
  assert {*caches} == {"none", "dual"}
  assert caches[0] == "dual"
  assert "cache=dual --config.objective.step_rule=blocks" in str(choices[0])


def test_a_choice_is_told_as_flags():
  choices, _ = fastest(gib=8)
  assert str(choices[0]).startswith(
    "34 s: --config.mesh.data=4 --config.mesh.fsdp=1 --config.mesh.tensor=1 "
    "--config.rollout.cache=none --config.objective.step_rule=entropy "
    "--config.rollout.batch_size="
  )
  assert str(choices[0]).endswith(
    "--config.objective.microbatch=4 --config.model.remat=none"
  )


def test_the_command(monkeypatch, capsys):
  """It needs no batch that divides, and describes the fastest."""
  c = gsm8k.get_config()
  c.rollout.batch_size = 3
  for name, value in (
    ("command.CONFIG", c),
    ("_SEARCH", True),
    ("_TOPOLOGY", "v5e:2x2"),
    ("_PROMPT_LENGTH", 0),
    ("_CACHES", ["none"]),
  ):
    flag = types.SimpleNamespace(value=value)
    monkeypatch.setattr(f"agrpo_jax.plan.__main__.{name}", flag)
  monkeypatch.setattr(chips, "devices", lambda topology: [None] * 4)
  monkeypatch.setattr(settings.Mesh, "make", lambda mesh, devices: mesh)
  monkeypatch.setattr(
    programs, "Planner", lambda s, mesh, length: FakePlanner(s, gib=8)
  )
  plan.main([])
  out = capsys.readouterr().out
  assert "The fastest that fit" in out
  assert "4 devices as data 4, fsdp 1, tensor 1; LoRA, remat none" in out
  assert "At the roofline 34.0 s a train step" in out


def test_weights_that_do_not_fit_are_split_over_as_few_as_hold_them():
  choices, tried = fastest(gib=24, num_devices=16)
  assert {c.s.mesh.fsdp * c.s.mesh.tensor for c in choices} <= {2, 4, 8}
  assert settings.Mesh(data=1, fsdp=16, tensor=1) not in tried
  # Gathering is paid for once a rollout: the largest batch wins.
  rows = [
    c.s.rollout.batch_size // c.s.mesh.data // c.s.mesh.fsdp
    for c in choices[:1]
  ]
  assert rows[0] > 1


def test_a_slower_size_ends_the_trials(capsys):
  fastest(gib=8)
  out = capsys.readouterr().out
  # An update of two units a device takes longer than one of one unit: 4 of the
  # 16 that fit are never tried.
  full = [line for line in out.splitlines() if "remat=full" in line]
  assert [line.split()[1] for line in full[:2]] == [
    "--config.objective.microbatch=4",
    "--config.objective.microbatch=8",
  ]
  assert "microbatch=16" not in "".join(full[:3])


def test_meshes_that_a_network_refuses_are_passed_over():
  choices, _ = fastest(gib=24, refused=(2,))
  assert {c.s.mesh.fsdp * c.s.mesh.tensor for c in choices} == {4}


def test_a_cache_that_cannot_be_is_passed_over(monkeypatch, capsys):
  c = gsm8k.get_config()
  c.objective.updates_per_batch = 24  # as released; blocks are fewer
  flag = types.SimpleNamespace(value=["none", "dual"])
  monkeypatch.setattr("agrpo_jax.plan.__main__._CACHES", flag)
  (found,) = plan._with_caches(c)
  assert found.rollout.sampling.cache == "none"
  assert "Under cache=dual: " in capsys.readouterr().out
  flag.value = ["dual"]
  with pytest.raises(errors.UserError, match="Under cache=dual: "):
    plan._with_caches(c)


def test_nothing_fits():
  with pytest.raises(errors.UserError, match="No mesh of these 4 devices"):
    fastest(gib=100)
  with pytest.raises(errors.UserError, match="4 parts are too many"):
    fastest(gib=8, refused=(1, 2, 4))


def test_meshes():
  assert list(plan.meshes(4)) == [
    settings.Mesh(data=4, fsdp=1, tensor=1),
    settings.Mesh(data=2, fsdp=2, tensor=1),
    settings.Mesh(data=2, fsdp=1, tensor=2),
    settings.Mesh(data=1, fsdp=4, tensor=1),
    settings.Mesh(data=1, fsdp=1, tensor=4),
  ]
