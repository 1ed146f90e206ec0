"""The page in a real browser: played, searched, sorted, at every width.

`tests/conftest.py` leaves this file out where there is no browser, and says so.
"""

import dataclasses
import itertools
import math

import pytest
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from agrpo_jax.report import page
from fixtures import browser
from fixtures import run_logs

HOSTILE = "</script><img src=x onerror=\"document.title='taken'\">"
LONG = "another run, whose name has quite some words"
TEXTS = {0: "3 + 4 = 8", 1: "I do not know", 2: "two\nlines", 3: HOSTILE}


def going(name="run", seed=0, num_steps=60):
  """A run that goes on, with something in every part of the page."""
  reward = [0.2 + 0.01 * step for step in range(num_steps)]
  log = run_logs.log(
    num_steps,
    name=name,
    config={**run_logs.CONFIG, "seed": seed},
    before={"accuracy": 0.1, "accuracy_low": 0.05, "accuracy_high": 0.15},
    completions=[
      *(
        run_logs.completion(
          text if step < 0 else f"{text} = 7",
          step,
          reward=0.25 * id_ if step < 0 else 1.0,
          source="held out",
          id=id_,
          prompt=f"Question {id_}",
          answer="7",
        )
        for step in (-1, 29, 59)
        for id_, text in TEXTS.items()
      ),
      run_logs.completion("a training answer", 3, reward=0.4),
      run_logs.completion(
        HOSTILE, 4, failure=f"raised ValueError: {HOSTILE}", unmasking=None
      ),
    ],
    reward=reward,
    accuracy=reward,
    loss=[(-1.0) ** step for step in range(num_steps)],
    frac_reward_zero_std=1.0,
    entropy=0.5,
    policy_ratio__max_deviation=1e-6,
    clip_ratio__high_mean=0.01,
    clip_ratio__low_mean=0.02,
    completions__mean_length=12.0,
    completions__max_length=16.0,
    grading__num_failed=0.5,
    seconds__rollout=[9.0] + [1.0] * (num_steps - 1),
    seconds__update=0.5,
  )
  for step in (29, 59):
    log.records[step].update(
      {
        "eval/accuracy": step / 100,
        "eval/accuracy_low": step / 100 - 0.05,
        "eval/accuracy_high": step / 100 + 0.05,
        "seconds/evaluate": 2.0,
      }
    )
  return log


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
  folder = tmp_path_factory.mktemp("pages")
  for name, read in {
    "one": [going()],
    "two": [going(), going(LONG, seed=7)],
  }.items():
    (folder / f"{name}.html").write_text(page.render(read), "utf-8")
  return {name: folder / f"{name}.html" for name in ("one", "two")}


@pytest.fixture(scope="module")
def driven():
  with browser.start() as driver:
    yield driver


@pytest.fixture
def driver(driven):
  """The browser; after each test its console is empty."""
  driven.get_log("browser")
  yield driven
  assert driven.get_log("browser") == []
  driven.execute_script("sessionStorage.clear()")  # what was chosen


def press(driver, *keys):
  driver.switch_to.active_element.send_keys(*keys)


def all_of(driver, selector):
  return driver.find_elements(By.CSS_SELECTOR, selector)


def one_of(driver, selector):
  return driver.find_element(By.CSS_SELECTOR, selector)


def texts(driver, selector):
  return [found.text for found in all_of(driver, selector)]


def wait(driver, is_so, seconds=10):
  # A page that is just being read has nothing to be asked for.
  WebDriverWait(driver, seconds, 0.05, (WebDriverException,)).until(
    lambda _: is_so()
  )


def click(driver, element):
  """Clicks in the middle of the window, where no header is in the way."""
  driver.execute_script(
    "arguments[0].scrollIntoView({block: 'center'})", element
  )
  element.click()


def to_completions(driver):
  driver.execute_script(
    "document.getElementById('completions').scrollIntoView()"
  )


@pytest.mark.parametrize("is_dark", [False, True])
@pytest.mark.parametrize("width", [375, 1280])
@pytest.mark.parametrize("name", ["one", "two"])
def test_it_fits_and_loads_nothing(driver, pages, name, width, is_dark):
  browser.look(driver, pages[name], width, is_dark)
  driver.execute_script(
    "for (const one of document.querySelectorAll('details')) one.open = true"
  )
  wide = "return document.documentElement.scrollWidth"
  assert driver.execute_script(wide) <= width
  loaded = "return performance.getEntriesByType('resource').length"
  assert driver.execute_script(loaded) == 0
  assert len(all_of(driver, ".chart svg path.line")) > 10


@pytest.mark.parametrize("width", [375, 1280])
def test_a_run_of_any_kind_makes_a_page(driver, tmp_path, width):
  nan = float("nan")
  read = [
    run_logs.log(
      50,
      name="sft",
      config={"kind": "sft", "train": {"num_steps": 50}},
      loss=[1 / (step + 1) for step in range(50)],
      seconds__update=0.4,
    ),
    run_logs.log(0, name="not begun", sessions=()),
    run_logs.log(
      3,
      name="broken",
      reward=nan,
      policy_ratio__max_deviation=0.0,
      seconds__update=nan,
    ),
  ]
  for index, shown in enumerate([*([one] for one in read), read]):
    file = tmp_path / f"{index}.html"
    file.write_text(page.render(shown), "utf-8")
    browser.look(driver, file, width)
    said = one_of(driver, "body").text
    assert "NaN" not in said and "undefined" not in said
    assert "Machine and cost" in said


CONTRAST = """
const shade = (text) => {
  const canvas = document.createElement("canvas").getContext("2d");
  canvas.fillStyle = text;
  canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data];
};
const light = ([r, g, b]) => [r, g, b].map((x) => x / 255).map((x) =>
  x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
  .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
const bad = [];
for (const node of document.querySelectorAll("body *")) {
  const own = [...node.childNodes].some((one) =>
    one.nodeType === 3 && one.textContent.trim());
  const style = getComputedStyle(node);
  const ink = shade(node instanceof SVGElement ? style.fill : style.color);
  if (!own || !node.getClientRects().length || ink[3] < 255) continue;
  let under = node;
  while (under && shade(getComputedStyle(under).backgroundColor)[3] < 255) {
    under = under.parentElement;
  }
  const ground = under ? getComputedStyle(under).backgroundColor : "white";
  const [a, b] = [light(ink), light(shade(ground))].sort((x, y) => y - x);
  const ratio = (a + 0.05) / (b + 0.05);
  if (ratio < 4.5) {
    bad.push(node.tagName + "." + node.getAttribute("class") + " " +
      ratio.toFixed(2) + " " + node.textContent.slice(0, 20));
  }
}
return bad;
"""


@pytest.mark.parametrize("is_dark", [False, True])
@pytest.mark.parametrize("name", ["one", "two"])
def test_every_text_can_be_read(driver, pages, name, is_dark):
  browser.look(driver, pages[name], 1280, is_dark)
  for shading in all_of(driver, "[data-shade]"):
    shading.click()
    assert driver.execute_script(CONTRAST) == []


# Where distances are those that the eye sees: OKLab.
COLOURS = """
return [...document.querySelectorAll(".legend .swatch")].map((one) => {
  one.style.color = "oklab(from var(--c) l a b)";
  return getComputedStyle(one).color.match(/-?[0-9.]+/g).map(Number);
});
"""


@pytest.mark.parametrize("is_dark", [False, True])
def test_every_run_has_a_colour_of_its_own(driver, tmp_path, is_dark):
  file = tmp_path / "page.html"
  read = [run_logs.log(2, name=f"run {i}", reward=0.5) for i in range(12)]
  file.write_text(page.render(read), "utf-8")
  browser.look(driver, file, is_dark=is_dark)
  colours = driver.execute_script(COLOURS)
  pairs = itertools.combinations(colours, 2)
  assert len(colours) == 12
  assert min(math.dist(one, other) for one, other in pairs) > 0.08
  # And none comes close to what is under it.
  assert all(light > 0.7 if is_dark else light < 0.6 for light, *_ in colours)


def test_it_says_what_matters_first(driver, pages):
  browser.look(driver, pages["one"])
  said = one_of(driver, "#overview").text
  assert "Train step 60 of 100" in said
  assert "No group has had spread for 60 train steps" in said
  assert "Raise rollout.temperature" in said
  assert "10.0 → 59.0 %" in said
  assert "54.0 % to 64.0 %" in said
  rules = [
    found.get_attribute("data-rule") for found in all_of(driver, ".warning")
  ]
  assert rules == ["no_spread", "grading_failed"]


def test_a_run_that_has_just_begun_lacks_nothing(driver, tmp_path):
  file = tmp_path / "page.html"
  begun = run_logs.log(0)
  for read, note in (
    ([begun], "No train step is done yet."),
    ([begun, run_logs.log(2, name="other", reward=0.5)], "Without data: "),
  ):
    file.write_text(page.render(read), "utf-8")
    browser.look(driver, file)
    assert one_of(driver, "#curves .absent").text.startswith(note)
    said = one_of(driver, "body").text
    for reason in ("does not evaluate", "plan/chips.py", "no reference policy"):
      assert reason not in said
    assert ("can be played" in said) == (len(read) > 1)


def test_a_run_that_was_killed_has_stopped(driver, tmp_path):
  file = tmp_path / "page.html"
  log = dataclasses.replace(going(), is_stopped=True)
  file.write_text(page.render([log], seconds=0.5), "utf-8")
  browser.look(driver, file)
  said = one_of(driver, "#overview").text
  assert "Stopped after train step 60 of 100" in said
  assert "reads itself again" not in said
  assert "at the end" not in said and "to go" not in said
  assert "To the end" not in one_of(driver, "#machine").text


def test_metrics_are_found_whatever_their_case(driver, pages):
  browser.look(driver, pages["one"])
  click(driver, one_of(driver, "#figures summary"))
  one_of(driver, "#find-metric").send_keys("Ratio/MAX")
  found = texts(driver, "#metrics tbody td:first-child")
  assert found == ["policy_ratio/max_deviation"]


def test_a_completion_is_played_step_by_step(driver, pages):
  browser.look(driver, pages["one"])
  to_completions(driver)
  assert one_of(driver, "#where").text == "step 13 of 13"
  assert not all_of(driver, ".text i.masked")
  press(driver, " ")
  wait(driver, lambda: all_of(driver, ".text i.masked"))
  wait(driver, lambda: one_of(driver, "#where").text == "step 13 of 13")
  assert not all_of(driver, ".text i.masked")
  # By hand: the character after the second is masked after two steps.
  press(driver, *[Keys.ARROW_LEFT] * 11)
  assert one_of(driver, "#where").text == "step 2 of 13"
  (before, after) = all_of(driver, ".version")
  for pane, length in ((before, 9), (after, 13)):
    masked = [
      "masked" in found.get_attribute("class")
      for found in pane.find_elements(By.CSS_SELECTOR, ".text i")
    ]
    assert masked == [False] * 2 + [True] * (length - 2)
    assert len(pane.find_elements(By.CSS_SELECTOR, ".text i.new")) == 1


def test_completions_that_cannot_be_played(driver, tmp_path):
  long = "x" * (page.MAX_PIECES + 1)
  ungraded = run_logs.completion("c", 1, failure="E", unmasking=None)
  log = run_logs.log(
    2, completions=[run_logs.completion(long), ungraded], reward=0.5
  )
  file = tmp_path / "page.html"
  file.write_text(page.render([log]), "utf-8")
  browser.look(driver, file)
  said = []
  for button in all_of(driver, "#list button"):
    click(driver, button)
    said.append(one_of(driver, ".version").text)
  assert not any("undefined" in words for words in said)
  assert "denoising steps of 2,049 tokens left out of the page" in said[0]
  assert "denoising steps not recorded" in said[1]


def test_before_and_after_and_in_between(driver, pages):
  browser.look(driver, pages["one"])
  # Most gained first: Question 0 earned nothing before.
  assert one_of(driver, "#detail .prompt").text == "Question 0"
  assert texts(driver, ".version .text") == ["3 + 4 = 8", "3 + 4 = 8 = 7"]
  assert "✗ wrong" in texts(driver, ".version")[0]
  assert "✓ right" in texts(driver, ".version")[1]
  picker = all_of(driver, ".version select")[0]
  options = picker.find_elements(By.TAG_NAME, "option")
  assert [o.text for o in options] == ["before training", "step 30", "step 60"]
  options[1].click()
  assert texts(driver, ".version .text") == ["3 + 4 = 8 = 7"] * 2


def test_search_by_keyboard(driver, pages):
  browser.look(driver, pages["one"])
  count = one_of(driver, "#count")
  assert count.text == "6 problems"
  press(driver, "/")
  press(driver, "not KNOW")
  assert count.text == "1 of 6 problems"
  assert one_of(driver, "#detail .prompt").text == "Question 1"
  # No keys of the page while somebody writes.
  press(driver, "jk")
  assert count.text == "0 of 6 problems"
  assert (
    "No completion has all of these words" in one_of(driver, "#detail").text
  )
  press(driver, Keys.BACKSPACE, Keys.BACKSPACE, Keys.ENTER)
  assert count.text == "1 of 6 problems"


def test_next_and_previous_by_keyboard(driver, pages):
  browser.look(driver, pages["one"])
  asked = [one_of(driver, "#detail .prompt").text]
  for key in "jjk":
    press(driver, key)
    asked.append(one_of(driver, "#detail .prompt").text)
  assert asked == ["Question 0", "Question 1", "Question 2", "Question 1"]
  all_of(driver, "#list button")[0].click()
  press(driver, Keys.ARROW_DOWN)
  assert one_of(driver, "#detail .prompt").text == "Question 1"
  current = one_of(driver, "#list button[aria-current=true]")
  assert "Question 1" in current.text
  assert driver.switch_to.active_element == current


def test_kinds_and_orders(driver, pages):
  browser.look(driver, pages["one"])
  one_of(driver, "#order option[value=worst]").click()
  assert "not graded, step 5" in texts(driver, "#list button")[0]
  one_of(driver, "#source option[value=training]").click()
  assert len(all_of(driver, "#list button")) == 1
  assert "✗ 0.4" in texts(driver, "#list button")[0]


def test_tables_are_sorted_by_click_and_keyboard(driver, pages):
  browser.look(driver, pages["two"])

  def seen():
    return texts(driver, "#config tbody tr td:first-child")

  assert seen() == ["seed"]
  click(driver, one_of(driver, "#only-different"))
  keys = seen()
  assert "rollout.cache" in keys and keys == sorted(keys)
  head = one_of(driver, "#config th")
  assert head.get_attribute("aria-sort") == "none"
  click(driver, head.find_element(By.TAG_NAME, "button"))
  assert head.get_attribute("aria-sort") == "ascending"
  press(driver, Keys.ENTER)
  assert head.get_attribute("aria-sort") == "descending"
  assert seen() == keys[::-1]
  # Numbers by size and not by their letters; what has none comes last.
  name, steps = all_of(driver, "#runs th")[0], all_of(driver, "#runs th")[4]
  click(driver, steps.find_element(By.TAG_NAME, "button"))
  assert name.get_attribute("aria-sort") == "none"
  one_of(driver, "#find-setting").send_keys("clip_norm")
  assert seen() == ["optimizer.clip_norm"]


def test_runs_answer_the_same_prompts_side_by_side(driver, pages):
  browser.look(driver, pages["two"])
  one_of(driver, "#source option[value='held out']").click()
  assert one_of(driver, "#count").text == "4 of 8 problems"
  chosen = [
    found.get_attribute("textContent")
    for found in all_of(driver, ".version select option:checked")
  ]
  assert chosen == ["run, step 60", f"{LONG}, step 60"]


def test_charts_are_read_by_keyboard_at_one_step(driver, pages):
  browser.look(driver, pages["one"])
  chart = one_of(driver, ".chart svg[aria-label^='Reward']")
  assert "from 0.2 to 0.79" in chart.get_attribute("aria-label")
  driver.execute_script("arguments[0].focus()", chart)
  press(driver, Keys.HOME, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
  assert {*texts(driver, ".chart .where")} == {"step 2"}
  assert texts(driver, ".chart .readout")[0] == "0.21"
  press(driver, Keys.ESCAPE)
  assert "step 2" not in texts(driver, ".chart .where")
  assert texts(driver, ".chart .readout")[0] == "0.79"


def test_a_value_that_a_run_lacks_leaves_its_place_empty(driver, tmp_path):
  file = tmp_path / "page.html"
  evaluated = run_logs.log(2, accuracy=0.25, eval__accuracy=0.5)
  trained = run_logs.log(2, name="other", accuracy=0.75)
  for read, note, values in (
    (
      [evaluated, trained],
      "held out / training (dashed)",
      "50.0 % / 25.0 %\n– / 75.0 %",
    ),
    (
      [trained, dataclasses.replace(trained, name="third")],
      "training (dashed)",
      "75.0 %\n75.0 %",
    ),
  ):
    file.write_text(page.render(read), "utf-8")
    browser.look(driver, file)
    chart = one_of(driver, ".chart:has(svg[aria-label^='Accuracy'])")
    said = chart.find_element(By.CSS_SELECTOR, ".what").text
    assert said.split("; ")[-1] == note
    assert chart.find_element(By.CSS_SELECTOR, ".readout").text == values


@pytest.mark.parametrize(
  "values,labels",
  [
    ([1.2e-4, 3e-4], ["1e−4", "1.5e−4", "2e−4", "2.5e−4", "3e−4"]),
    ([1.9991e-4, 2e-4], ["1.999e−4", "1.9995e−4", "2e−4"]),
    ([1000.5, 1010], ["1000", "1002.5", "1005", "1007.5", "1010"]),
    ([12_000, 12_010], ["12k", "12.0025k", "12.005k", "12.0075k", "12.01k"]),
    ([-2e-3, 4e-3], ["−2e−3", "0", "2e−3", "4e−3"]),
  ],
)
def test_neighbouring_ticks_have_labels_of_their_own(
  driver, tmp_path, values, labels
):
  file = tmp_path / "page.html"
  log = run_logs.log(2, learning_rate=values)
  file.write_text(page.render([log]), "utf-8")
  browser.look(driver, file)
  axis = ".chart svg[aria-label^='Learning rate'] text[text-anchor=end]"
  assert texts(driver, axis) == labels
  # And all of their digits are on the card.
  card = one_of(driver, ".chart:has(svg[aria-label^='Learning rate'])")
  assert all(found.rect["x"] > card.rect["x"] for found in all_of(driver, axis))


def test_hostile_text_stays_text(driver, pages):
  browser.look(driver, pages["one"])
  seen = []
  for order in ("worst", "gained"):
    one_of(driver, f"#order option[value={order}]").click()
    buttons = all_of(driver, "#list button")
    buttons[0].click()
    for _ in buttons:
      seen += [found.text for found in all_of(driver, ".version .text")]
      press(driver, "j")
  # Played and not, and of the grader's own words.
  assert {HOSTILE, f"{HOSTILE} = 7"} <= {*seen}
  assert f"raised ValueError: {HOSTILE}" in one_of(driver, "#grading").text
  assert driver.title == "run"
  assert not all_of(driver, "img")


def test_light_and_dark_by_the_system_or_by_hand(driver, pages):
  def ground():
    return driver.execute_script(
      "return getComputedStyle(document.body).backgroundColor"
    )

  browser.look(driver, pages["one"], is_dark=True)
  dark = ground()
  browser.look(driver, pages["one"])
  light = ground()
  assert light != dark
  button = one_of(driver, "#theme")
  button.click()
  assert ground() == light
  button.click()
  assert ground() == dark and "dark" in button.get_attribute("aria-label")
  driver.refresh()
  assert ground() == dark
  one_of(driver, "#theme").click()
  assert ground() == light


# In one go: the page may be read again between two questions.
STATE = """
const byId = (id) => document.getElementById(id);
return {
  said: byId("overview").textContent,
  search: byId("search") && byId("search").value,
  count: byId("count") && byId("count").textContent,
  open: document.querySelector("details").open,
  place: scrollY,
};
"""


def test_a_page_that_is_rewritten_reads_itself_again(driver, tmp_path):
  def write(log):
    page_text = page.render([log], seconds=0.5)
    file.with_suffix(".new").write_text(page_text, "utf-8")
    file.with_suffix(".new").rename(file)

  def until(words):
    seen = []

    def is_so():
      seen.append(driver.execute_script(STATE))
      return words in seen[-1]["said"]

    wait(driver, is_so)
    return seen[-1]

  file = tmp_path / "live.html"
  write(going())
  browser.look(driver, file)
  assert "reads itself again" in until("Train step 60")["said"]
  # As somebody left it.
  driver.execute_script(
    "const s = document.getElementById('search'); s.value = 'know';"
    "s.dispatchEvent(new Event('input'));"
    "document.querySelector('details').open = true; scrollTo(0, 700);"
  )
  write(going(num_steps=61))
  found = until("Train step 61")
  assert (found["search"], found["count"]) == ("know", "1 of 6 problems")
  assert found["open"] and found["place"] == 700
  config = {**run_logs.CONFIG, "train": {"num_steps": 2}}
  write(run_logs.log(2, config=config, reward=0.5))
  assert "reads itself again" not in until("The run is done")["said"]
