"""What a page holds: its data, bounded, and nothing that acts."""

import dataclasses
import html.parser
import json
import re

import pytest

from agrpo_jax import errors
from agrpo_jax.report import logs
from agrpo_jax.report import page
from fixtures import run_logs

HOSTILE = "</script><img src=x onerror=\"document.title='taken'\"><!--<script>"


def content(*read, **how):
  """The data of a page, as its script gets them."""
  text = page.render([*read], **how)
  (found,) = re.findall(r'<script type="application/json"[^>]*>(.*)</', text)
  return json.loads(found)


class Elements(html.parser.HTMLParser):
  """Counts elements; what stands in a script is none."""

  def __init__(self, text):
    super().__init__()
    self.names, self.addresses = [], []
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.names.append(tag)
    self.addresses += [v for k, v in attrs if k in ("src", "href", "data")]


def hostile():
  config = {**run_logs.CONFIG, "task": {"name": HOSTILE}}
  return run_logs.log(
    2,
    config=config,
    completions=[
      run_logs.completion(HOSTILE, prompt=HOSTILE, answer=HOSTILE),
      run_logs.completion("x", failure=HOSTILE),
    ],
    name=HOSTILE,
    **{HOSTILE: 1.0},
  )


def _changed(key, **values):
  return run_logs.CONFIG | {key: values}


@pytest.mark.parametrize(
  "what",
  [
    {"config": _changed("train", num_steps="x")},
    {"config": _changed("report", chip_hour_price=float("nan"))},
    {"sessions": [1]},
    {"before": {"accuracy": "x"}},
    {"completions": [run_logs.completion("a") | {"completion": 5}]},
    {"completions": [run_logs.completion("a", unmasking=[1])]},
    {
      "completions": [
        run_logs.completion(
          "a", unmasking=run_logs.unmasking("a") | {"logprob": [float("nan")]}
        )
      ]
    },
  ],
)
def test_what_no_run_writes_is_refused_by_the_runs_name(what):
  good, bad = run_logs.log(2), run_logs.log(2, name="bad one", **what)
  with pytest.raises(errors.UserError, match="of 'bad one' holds what no run"):
    page.render([good, bad])


def test_hostile_text_is_data_and_no_element():
  plain = Elements(page.render([run_logs.log(2, reward=0.5)]))
  taken = Elements(page.render([hostile()]))
  assert taken.names == plain.names
  assert "img" not in taken.names
  assert taken.names.count("script") == 2
  (run,) = content(hostile())["runs"]
  assert run["name"] == HOSTILE
  first = run["completions"][0]
  assert first["prompt"] == first["versions"][0]["text"] == HOSTILE


def test_nothing_is_loaded_from_anywhere():
  text = page.render([run_logs.log(2, reward=0.5)])
  addresses = Elements(text).addresses
  assert all(address.startswith("#") for address in addresses)
  assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
  assert "https://" not in text
  (policy,) = re.findall('content="(default-src[^"]*)"', text)
  assert policy.startswith("default-src 'none'")
  assert "unsafe" not in policy


def test_text_that_would_act_on_a_screen_is_shown():
  found = content(
    run_logs.log(1, completions=[run_logs.completion("a\x1b[31m\u202eb\ud800")])
  )
  (item,) = found["runs"][0]["completions"]
  assert item["versions"][0]["text"] == "a<U+001B>[31m<U+202E>b<U+D800>"


def test_many_evaluations_and_no_command():
  """Of a start what the page shows: its command names folders."""
  session = {**run_logs.SESSION, "command": ["train", "--config.workdir=/own"]}
  found = run_logs.log(
    1000, eval__accuracy=0.5, eval__extra=1.0, sessions=[session]
  )
  (run,) = content(found)["runs"]
  assert len(run["evaluations"]) == 240
  first, last = run["evaluations"][0], run["evaluations"][-1]
  assert first == {"step": 1, "accuracy": 0.5} and last["step"] == 1000
  assert "/own" not in json.dumps(run)


def test_a_long_run_makes_a_bounded_page():
  num_steps = 4000
  evaluated = [
    run_logs.completion(
      "y" * 300, step, source="held out", id=id_, reward=id_ / 100
    )
    for step in range(-1, 2000, 100)
    for id_ in range(60)
  ]
  trained = [
    run_logs.completion("z" * 20_000, step, unmasking=None)
    for step in range(3000)
  ]
  metrics = {f"extra/{number}": 0.1 for number in range(200)}
  found = run_logs.log(
    num_steps,
    completions=evaluated + trained,
    reward=[step / num_steps for step in range(num_steps)],
    seconds__rollout=1.0,
    **metrics,
  )
  data = content(found)
  assert len(json.dumps(data)) < 4e6
  (run,) = data["runs"]
  xs, _ = run["series"]["reward"]
  assert len(xs) <= 240 and (xs[0], xs[-1]) == (1, num_steps)
  assert len(run["phases"]["first"]) <= 60
  assert len(run["table"]) == page.MAX_METRICS < run["num_metrics"]
  held_out = [one for one in run["completions"] if one["source"] == "held out"]
  assert len(held_out) == page.MAX_PROBLEMS
  steps = [version["step"] for version in held_out[0]["versions"]]
  assert len(steps) == page.MAX_VERSIONS
  assert (steps[0], steps[-1]) == (0, 2000)
  assert run["num_logged"] == len(evaluated) + len(trained)
  assert run["num_shown"] < 400
  cut = run["completions"][-1]["versions"][0]["text"]
  assert cut.endswith("… (20000 in all)")


def test_settings_and_their_difference():
  other = {**run_logs.CONFIG, "seed": 1, "note": "x"}
  rows = content(run_logs.log(1), run_logs.log(1, config=other, name="other"))[
    "settings"
  ]
  by_key = {row["key"]: row for row in rows}
  assert by_key["seed"] == {
    "key": "seed",
    "values": ["0", "1"],
    "differs": True,
  }
  assert by_key["note"]["values"] == ["—", "x"]
  assert not by_key["rollout.cache"]["differs"]


def test_settings_say_where_a_run_began(tmp_path):
  start = {"run": "first", "train_step": 40}
  began = dataclasses.replace(run_logs.log(1), start=start)
  read = logs.read(run_logs.write(tmp_path / "run", began))
  rows = content(read, run_logs.log(1))["settings"]
  (row,) = (row for row in rows if row["key"] == "--checkpoint")
  assert row["values"] == ["first:40", "—"] and row["differs"]


def test_runs_in_folders_of_one_name_can_be_told_apart(tmp_path):
  places = ("agrpo/0", "espo/0", "espo/1", "more/espo/0")
  workdirs = [
    run_logs.write(tmp_path / place, run_logs.log(1, reward=0.5))
    for place in places
  ]
  names = ["agrpo/0", f"{tmp_path.name}/espo/0", "1", "more/espo/0"]
  read = page.write(workdirs, tmp_path / "page.html")
  assert [log.name for log in read] == names
  assert str(tmp_path) not in (tmp_path / "page.html").read_text()


def test_failures_of_grading_are_counted_by_reason():
  failed = [
    run_logs.completion("x", step, failure=reason)
    for step, reason in enumerate(["took too long"] * 3 + ["raised E: no"])
  ]
  log = run_logs.log(
    4, completions=failed, grading__num_failed=2, grading__num_timed_out=3
  )
  (run,) = content(log)["runs"]
  assert run["failures"] == [
    {"reason": "took too long", "count": 3},
    {"reason": "raised E: no", "count": 1},
  ]
  assert (run["num_failed"], run["num_timed_out"]) == (8, 12)
  assert {one["source"] for one in run["completions"]} == {"failed"}


def test_charts_are_those_of_the_kind_of_run():
  def titles(*read):
    return [chart["title"] for chart in content(*read)["charts"]]

  config = {"kind": "sft", "train": {"num_steps": 2}}
  sft = run_logs.log(2, config=config, loss=1.0, grad_norm=0.5)
  assert titles(sft) == ["Loss", "Gradient norm"]
  rl = run_logs.log(2, name="rl", reward=0.5, loss=0.1)
  assert {*titles(sft, rl)} == {*titles(rl)} and "KL" in titles(rl)


def test_a_loss_that_is_learned_stands_with_what_is_learned():
  def loss(*read):
    charts = content(*read)["charts"]
    (found,) = (one for one in charts if one["title"] == "Loss")
    return found["section"], found["note"]

  config = {"kind": "sft", "train": {"num_steps": 2}}
  sft = run_logs.log(2, config=config, loss=1.0)
  rl = run_logs.log(2, name="rl", reward=0.5, loss=0.1)
  surrogate = "a surrogate: no level to reach"
  assert loss(rl) == ("Policy", surrogate)
  assert loss(sft) == ("Learning", "mean of a train step")
  both = f"mean of a train step; of RL {surrogate}"
  assert loss(sft, rl) == loss(rl, sft) == ("Learning", both)


def test_a_price_makes_money_of_chip_hours():
  log = run_logs.log(1, seconds__rollout=3600.0)
  assert content(log)["runs"][0]["cost"]["price"] is None
  assert content(log, price=2.5)["runs"][0]["cost"]["price"] == 2.5
  config = {**run_logs.CONFIG, "report": {"chip_hour_price": 3.0}}
  log = run_logs.log(1, config=config, seconds__rollout=3600.0)
  assert content(log)["runs"][0]["cost"]["price"] == 3.0
  assert content(log)["runs"][0]["cost"]["chip_hours"] == 1


def test_only_a_page_of_an_unfinished_run_reads_itself_again():
  config = {**run_logs.CONFIG, "train": {"num_steps": 2}}
  done, going = run_logs.log(2, config=config), run_logs.log(2)
  assert content(going, seconds=9.0)["seconds"] == 9
  assert content(going)["seconds"] == 0
  assert content(done, seconds=9.0)["seconds"] == 0
  stopped = dataclasses.replace(going, is_stopped=True)
  assert content(stopped, seconds=9.0)["seconds"] == 0
  assert content(stopped, going, seconds=9.0)["seconds"] == 9


def test_a_page_that_cannot_be_written(tmp_path):
  workdir = run_logs.write(tmp_path / "run", run_logs.log(1, reward=0.5))
  with pytest.raises(errors.UserError, match="Cannot write --html"):
    page.write([workdir], tmp_path / "nowhere" / "page.html")
