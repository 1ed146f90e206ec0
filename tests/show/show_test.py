"""What is shown of a rollout: in a terminal, as a page, by the command."""

import html.parser
import io
import re
import subprocess

import pytest
import rich.console

from agrpo_jax import config as config_lib
from agrpo_jax import errors
from agrpo_jax import settings
from agrpo_jax.show import __main__ as show
from agrpo_jax.show import page as page_lib
from agrpo_jax.show import terminal
from agrpo_jax.show import text as text_lib
from fixtures import commands
from fixtures import completions
from fixtures import sudoku

PUZZLE = "3102200002100320"
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")

EOS = completions.EOS


@pytest.fixture
def accent() -> text_lib.Completion:
  """ "é!" and a position that no step unmasked; its bytes at steps 2 and 0."""
  return completions.completion("é!", [2, 0, 1, 4])


def frame(found, num_done, *, width=80, **how) -> list[str]:
  lines = terminal.frame(found, num_done, width=width, eos_id=EOS, **how)
  return [line.plain for line in lines]


def test_frames_by_hand(accent):
  frames = [frame(accent, n) for n in range(4)]
  assert frames == [["░░░"], ["▒░░"], ["▒!░"], ["é!∎"]]


def terminal_of(width=80, height=24, **how) -> rich.console.Console:
  """A console that takes a string for a terminal with 256 colours."""
  return rich.console.Console(
    file=io.StringIO(),
    force_terminal=True,
    color_system="256",
    width=width,
    height=height,
    **how,
  )


def test_colours_by_hand(accent):
  console = terminal_of()
  for num_done, mark_new in ((2, True), (3, False)):
    (line,) = terminal.frame(
      accent, num_done, width=80, eos_id=EOS, mark_new=mark_new
    )
    console.print(line)
  # Of three steps the first is blue, the last red, the middle one green.
  assert console.file.getvalue().splitlines() == [
    "\x1b[2m▒\x1b[0m\x1b[1;7;38;5;71m!\x1b[0m\x1b[2m░\x1b[0m",
    "\x1b[38;5;160mé\x1b[0m\x1b[38;5;71m!\x1b[0m\x1b[2m∎\x1b[0m",
  ]
  # The first step and the last have the ends of the scale, however many.
  assert terminal.colour(0, 1) == terminal.colour(0, 99)
  assert terminal.colour(2, 3) == terminal.colour(98, 99)


def test_lines_break_at_the_width_and_do_not_jump():
  text = "ab日c\n\nd"
  size = len(text.encode())
  found = completions.completion(text, [0] * 4 + [3] * (size - 4))
  frames = [frame(found, n, width=4) for n in (0, 1, 4)]
  assert frames[-1] == ["ab日", "c↵", "↵", "d"]
  assert frames[1] == ["ab▒▒", "░░", "░", "░"]
  assert frames[0] == ["░░░░", "░░", "░", "░"]


def test_model_text_sends_nothing_to_the_terminal():
  found = completions.completion("\x1b[2J[b]", [0] * 7)
  assert frame(found, 1) == ["<U+001B>[2J[b]"]
  console = terminal_of(no_color=True)
  terminal.print_frames(found, console, eos_id=EOS)
  assert "<U+001B>[2J[b]" in console.file.getvalue()  # nor is it markup


def test_files_and_pipes_get_plain_characters(accent):
  out = io.StringIO()
  console = terminal.make_console(out)
  terminal.print_frames(accent, console, eos_id=EOS)
  assert out.getvalue().splitlines() == [
    "after 1 of 3 steps",
    "▒░░",
    "after 2 of 3 steps",
    "▒!░",
    "after 3 of 3 steps",
    "é!∎",
  ]
  assert not terminal.has_colours(console)
  assert "■" not in terminal.legend(3, has_colours=False).plain
  assert terminal.has_colours(terminal_of())
  assert not terminal.has_colours(terminal_of(no_color=True))


def test_animation_draws_over_itself(accent):
  console, waits = terminal_of(no_color=True), []
  terminal.animate(accent, console, eos_id=EOS, seconds=8.0, sleep=waits.append)
  assert waits == [2.0] * 4
  told = console.file.getvalue()
  lines = ESCAPES.sub("", told).replace("\r", "\n").split("\n")
  shown = [line for line in lines if line]
  assert shown[:8] == [
    *("step 0 of 3", "░░░"),
    *("step 1 of 3", "▒░░"),
    *("step 2 of 3", "▒!░"),
    *("step 3 of 3", "é!∎"),
  ]
  assert shown[-2:] == ["3 steps", "é!∎"]
  # Every frame but the first goes up over the one before, two lines high.
  assert told.count("\x1b[1A") >= 4


def test_an_interrupted_animation_gives_the_cursor_back(accent):
  def interrupt(seconds):
    raise KeyboardInterrupt

  console = terminal_of()
  with pytest.raises(KeyboardInterrupt):
    terminal.animate(accent, console, eos_id=EOS, seconds=1.0, sleep=interrupt)
  told = console.file.getvalue()
  assert told.rindex("\x1b[?25h") > told.rindex("\x1b[?25l")


def test_animation_stays_within_the_screen():
  found = completions.completion("a\n" * 20, [0] * 20 + [2] * 20)
  console, frames = terminal_of(height=10), []

  def look(seconds):
    frames.append(ESCAPES.sub("", console.file.getvalue()))
    console.file.truncate(0)
    console.file.seek(0)

  terminal.animate(found, console, eos_id=EOS, seconds=0.0, sleep=look)
  assert all(one.count("\n") < 10 for one in frames)
  assert "a↵" in frames[-1]  # where the last step unmasked something
  whole = ESCAPES.sub("", console.file.getvalue()).split("3 steps\n")[-1]
  assert whole.count("a↵") == 20


class _Parsed(html.parser.HTMLParser):
  """The tags of a page with their attributes, and its tokens."""

  def __init__(self, page: str):
    super().__init__()
    self.tags: list[tuple[str, dict]] = []
    self.tokens: list[tuple[dict, str]] = []
    self._open: list[str] = []
    self.feed(page)

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag == "i":
      self.tokens.append((dict(attrs), ""))
    self._open.append(tag)

  def handle_endtag(self, tag):
    while self._open and self._open.pop() != tag:
      pass

  def handle_data(self, data):
    if self._open and self._open[-1] == "i":
      attrs, text = self.tokens.pop()
      self.tokens.append((attrs, text + data))


def page(*shown: text_lib.Completion, **changes) -> page_lib.Page:
  fields = dict(
    title="model",
    settings="settings",
    prompt="prompt",
    raw_prompt="raw",
    completions=shown,
    block_length=2,
    eos_id=completions.EOS,
    eos_name="<|eos|>",
  )
  return page_lib.Page(**(fields | changes))


def test_page_by_hand(accent):
  parsed = _Parsed(page_lib.render(page(accent)))
  tokens = [
    (attrs["class"], attrs["data-done"], attrs["data-first"], text)
    for attrs, text in parsed.tokens
    if "data-done" in attrs
  ]
  assert tokens == [
    ("", "3", "1", "é"),
    ("block", "2", "2", "!"),
    ("special filled", "3", "3", "∎"),
  ]
  styles = [attrs["style"] for attrs, _ in parsed.tokens if "style" in attrs]
  # exp(-0.5), the last of three steps, 1 of at most 1.5 nats.
  assert styles[0] == "--p:0.607;--s:1.000;--h:0.667"
  tip = next(
    attrs["data-tip"] for attrs, _ in parsed.tokens if "style" in attrs
  )
  assert "unmasked at step 3\nprobability 0.779 (log -0.250)" in tip
  assert "entropy 1.000 nats" in tip
  slider = next(attrs for tag, attrs in parsed.tags if tag == "input")
  assert slider["max"] == "3"
  articles = [attrs for tag, attrs in parsed.tags if tag == "article"]
  assert [attrs["data-done"] for attrs in articles] == ["[3, 1, 2]"]


def test_what_the_model_writes_is_never_markup():
  hostile = "</script><script>x()</script>\"' onclick=x() <b>@@STEPS@@&amp;"
  token = text_lib.Token(0, id=5, unmask_step=0, logprob=-1.0, entropy=1.0)
  piece = text_lib.Piece(hostile, is_special=False, tokens=(token,))
  found = text_lib.Completion((piece,), num_executed_steps=1, text=hostile)
  rendered = page_lib.render(
    page(found, title=hostile, prompt=hostile, raw_prompt=hostile)
  )
  parsed = _Parsed(rendered)
  shown = [text for attrs, text in parsed.tokens if "data-done" in attrs]
  assert shown == [hostile]
  tags = [tag for tag, _ in parsed.tags]
  assert tags.count("script") == 1
  assert not any("onclick" in attrs for _, attrs in parsed.tags)
  bars = sum(attrs.get("class") == "bar" for _, attrs in parsed.tags)
  assert tags.count("b") == bars + found.num_executed_steps


def test_page_loads_nothing(accent):
  rendered = page_lib.render(page(accent, accent))
  assert "@@" not in rendered
  assert not re.search(r"https?:|//[a-z]|url\(|@import", rendered)
  parsed = _Parsed(rendered)
  for _, attrs in parsed.tags:
    assert not {"src", "href", "srcset", "action"} & attrs.keys()
  policy = next(
    attrs["content"] for _, attrs in parsed.tags if "http-equiv" in attrs
  )
  assert policy.startswith("default-src 'none'")


def drawing(**changes) -> settings.Drawing:
  """Settings without a task, and with nothing to train for."""
  c = config_lib.rl()
  c.model.path = str(sudoku.MODEL)
  fields = dict(
    completion_length=16, block_length=16, num_denoise_steps=8, temperature=1.0
  )
  config_lib.set_evaluate(c, fields | changes)
  return settings.drawing(c)


def test_draws_what_it_shows():
  shown = show.draw(drawing(), prompt=PUZZLE, example=None, num_completions=2)
  assert shown.prompt == PUZZLE
  assert f"user<|end_header_id|>\n\n{PUZZLE}<|eot_id|>" in shown.raw_prompt
  assert shown.eos_name == "<|endoftext|>"
  for one in shown.completions:
    assert re.fullmatch("[1-4]{16}", one.text)
    steps = sorted(token.unmask_step for token in one.tokens)
    assert steps == [step for step in range(8) for _ in range(2)]
    assert all(token.logprob <= 0 <= token.entropy for token in one.tokens)
  # The first of two is the only one of one.
  alone = show.draw(drawing(), prompt=PUZZLE, example=None, num_completions=1)
  for a, b in zip(
    alone.completions[0].tokens, shown.completions[0].tokens, strict=True
  ):
    assert (a.id, a.unmask_step) == (b.id, b.unmask_step)


def test_mistakes_are_named():
  with pytest.raises(errors.UserError, match="block_length=17"):
    drawing(block_length=17)
  s = drawing(temperature=0.0)
  with pytest.raises(errors.UserError, match="all be the same"):
    show.draw(s, prompt=PUZZLE, example=None, num_completions=2)
  with pytest.raises(errors.UserError, match="num_completions=0"):
    show.draw(s, prompt=PUZZLE, example=None, num_completions=0)
  with pytest.raises(errors.UserError, match="needs a task"):
    show.draw(s, prompt="", example=1, num_completions=1)
  with pytest.raises(errors.UserError, match="empty"):
    show.draw(s, prompt="", example=None, num_completions=1, is_plain=True)


def run(*arguments: str) -> subprocess.CompletedProcess:
  return commands.run("-m", "agrpo_jax.show", *arguments)


def test_the_command(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  file = tmp_path / "page.html"
  done = run(
    "--config=configs/sudoku_tiny.py",
    "--config.task.options.num_examples=8",
    *("--example=3", "--html=~/page.html"),
  )
  assert done.returncode == 0, done.stderr
  plain = done.stdout
  assert "\x1b" not in plain  # a pipe has no colours
  assert re.search(r"after 16 of 16 steps\n[1-4]{16}\n", plain)
  assert str(file) in plain
  tokens = [
    text
    for attrs, text in _Parsed(file.read_text("utf-8")).tokens
    if "data-done" in attrs
  ]
  assert "".join(tokens) in plain
  for arguments, message in (
    ([], "Give a prompt"),
    (["one", "two"], "Unknown arguments two"),
    (["one", f"--html={tmp_path}/no/page.html"], "is in no folder"),
    (
      ["one", "--config.evaluate.cache=dual"],
      "'config.evaluate.cache'. It changes a config: give --config=",
    ),
  ):
    done = run(f"--model={sudoku.MODEL}", *arguments)
    assert (done.returncode, message in done.stderr) == (2, True), done.stderr
  for arguments, message in (
    (["one"], "Which model? Give --model="),
    (
      ["--config=configs/sft_sudoku.py", "one"],
      "made for `python -m agrpo",
    ),
  ):
    done = run(*arguments)
    assert (done.returncode, message in done.stderr) == (2, True), done.stderr


def test_the_command_needs_no_config():
  done = run(
    f"--model={sudoku.MODEL}",
    *("--completion_length=16", "--block_length=16", "--num_denoise_steps=4"),
    PUZZLE,
  )
  assert done.returncode == 0, done.stderr
  assert re.search(r"after 4 of 4 steps\n[1-4]{16}\n", done.stdout)


def test_keys_on_the_command_line_stay_under_a_sampler():
  done = run(
    *("--config=configs/sudoku_tiny.py", "--sampler=dual", PUZZLE),
    *("--config.evaluate.completion_length=16", "--config.evaluate.top_k=5"),
    *("--config.evaluate.block_length=16", "--num_denoise_steps=4"),
    "--unmask_rule=confidence",  # without the sampler's threshold
  )
  assert done.returncode == 0, done.stderr
  assert (
    "16 tokens in blocks of 16, 4 denoising steps, unmask rule confidence, "
    "cache dual, temperature 0"
  ) in done.stdout
