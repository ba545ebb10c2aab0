"""Tests of the pages of report/page.py in a browser: a Chromium of the system, from file://.

The gallery has 45 samples in five kinds, by number modulo five:
  0: right at once; 1: improved to right; 2: worse; 3: unchanged and finished;
  4: no score at the end.
"""

import dataclasses
import pathlib
import shutil
import time

import numpy as np
from playwright import sync_api
import pytest

from r3jax.evaluation import bootstrap
from r3jax.evaluation import sample_log
from r3jax.report import charts
from r3jax.report import gallery as gallery_lib
from r3jax.report import page as page_lib
from r3jax.report import tables

_NAMES = (
  "chromium",
  "chromium-browser",
  "google-chrome",
  "google-chrome-stable",
)
_CHROMIUM = next(filter(None, map(shutil.which, _NAMES)), None)
_ARGUMENTS = (
  "--no-sandbox",
  "--disable-gpu",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
  "--disable-default-apps",
  "--no-first-run",
)
pytestmark = pytest.mark.skipif(
  _CHROMIUM is None,
  reason=f"needs a browser: one of {', '.join(_NAMES)} on the PATH",
)

SCORES = ([1.0], [0.5, 1.0], [0.75, 0.25], [0.5, 0.5, 0.5], [0.0, None])
BOX = [0.125, 0.25, 0.5, 0.875]
ATTACKS = (
  "</script><script>window.hacked = 1</script>",
  "<img src=x onerror='window.hacked = 1'>",
  "javascript:window.hacked=1",
  '" onfocus="window.hacked=1" autofocus x="',
  "' onload='window.hacked=1",
  "<!--\u2028]]>&lt;",
)


def key(number):
  return f"{number:05d}_00"


def make_turn(number, index, score):
  return {
    "image": f"images/{key(number)}_{index}.png",
    "score": score,
    "parts": {"strict": score},
    "format": 1.0,
    "text": {
      7: "a violet thought",
      8: "and more " * 60,
      12: "middling " * 24,
    }.get(number, "<think>as asked</think>"),
    "instruction": f"repaint number {number}" if index else "",
    "stop": index == 2,
    "tokens": 12,
    "boxes": [{"label": "red ring", "box": BOX}] if number % 5 == 1 else [],
  }


def make_sample(number):
  turns = [
    make_turn(number, index, score)
    for index, score in enumerate(SCORES[number % 5])
  ]
  sample = {
    "step": 10 * (number // 15 + 1),
    "key": key(number),
    "prompt": f"a photo of thing {number:02d}",
    "tag": ("colors", "counting", "position")[number % 3],
    "turns": turns,
  }
  if number % 5 == 0:
    sample["answers"] = [
      {
        "kind": "count",
        "question": "How many?",
        "expected": "2",
        "answer": "3",
        "text": "3",
      },
      {
        "kind": "existence",
        "question": "Is there a ring?",
        "expected": "yes",
        "answer": " Yes. ",
        "text": " Yes. ",
      },
    ]
  return sample


def image(number):
  shape = (120, 160, 3) if number % 2 else (48, 48, 3)
  return np.random.default_rng(number).integers(0, 256, shape, np.uint8)


@pytest.fixture(scope="module")
def chromium():
  with sync_api.sync_playwright() as playwright:
    browser = playwright.chromium.launch(
      executable_path=_CHROMIUM, args=_ARGUMENTS
    )
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
  """The gallery of the module's docstring."""
  folder, samples = (
    tmp_path_factory.mktemp("a page #1 ü"),
    [make_sample(number) for number in range(45)],
  )
  images = {
    turn["image"]: image(number)
    for number, sample in enumerate(samples)
    for turn in sample["turns"]
  }
  typed = [sample_log.Sample.from_json(line) for line in samples]
  sample_log.append(folder, typed, images)
  better = tables.Difference(bootstrap.Estimate(0.1, 0.05, 0.2), "better")
  worse = tables.Difference(bootstrap.Estimate(-0.1, -0.2, -0.05), "worse")
  table = tables.Table(
    "Scores",
    ("score", "before", "difference"),
    [
      ("draft", (bootstrap.Estimate(0.5, 0.4, 0.6), better)),
      ("last", (0.5, worse)),
    ],
  )
  series = [
    charts.Series(
      "ours", [(0, 0.1, 0, 0.2), (5, 0.3, 0.2, 0.4), (10, 0.2, 0.1, 0.3)]
    ),
    charts.Series("theirs", [(0, 0.2, None, None), (10, 0.1, None, None)]),
  ]
  drawn = [
    charts.Chart("Score", series, "round"),
    charts.Chart(
      "a/metric_with_a_very_long_name_that_does_not_end_soon", series[1:]
    ),
  ]
  page = page_lib.Page(
    "A run", ["Mind the gap."], [table], drawn, sample_log.read(folder)
  )
  return page_lib.write_page(folder, page)


def as_url(path, address=""):
  return pathlib.Path(path).as_uri() + address


@pytest.fixture(scope="module")
def watched(chromium, gallery):
  """Yields a function that opens the gallery in a context of its own, and the pages' logs."""
  reported, requested = [], []

  def open_page(address="", **options):
    options = {
      "viewport": {"width": 1360, "height": 900},
      "color_scheme": "light",
    } | options
    page = chromium.new_context(**options).new_page()
    page.on("console", lambda message: reported.append(message.text))
    page.on("pageerror", lambda error: reported.append(str(error)))
    page.on("request", lambda request: requested.append(request.url))
    page.goto(as_url(gallery, address))
    return page

  return open_page, reported, requested


@pytest.fixture(scope="module")
def shared(watched):
  """The page that most tests use one after the other."""
  return watched[0]()


@pytest.fixture(autouse=True)
def nothing_is_reported(watched):
  """No test may leave an error in the console or load anything from elsewhere."""
  yield
  _, reported, requested = watched
  errors, elsewhere = (
    list(reported),
    [url for url in requested if not url.startswith(("file:", "data:"))],
  )
  reported.clear()
  requested.clear()
  assert (errors, elsewhere) == ([], [])


@pytest.fixture
def opened(watched):
  """Opens the gallery anew."""
  contexts = []

  def open_page(address="", **options):
    page = watched[0](address, **options)
    contexts.append(page.context)
    return page

  yield open_page
  for context in contexts:
    context.close()


@pytest.fixture
def at(shared):
  """Brings the shared page to an address, as a change of the address does."""

  def go(address=""):
    shared.evaluate(
      """(address) => {
      document.activeElement.blur();
      scrollTo(0, 0);
      history.replaceState(null, "", location.pathname + address);
      dispatchEvent(new HashChangeEvent("hashchange"));
    }""",
      address,
    )
    return shared

  return go


def wait_for(page, condition, argument=None):
  """Waits until an expression holds; Playwright's own way would need the policy to allow `eval`."""
  deadline = time.monotonic() + 10
  while not page.evaluate(condition, argument):
    assert time.monotonic() < deadline, f"waited in vain for {condition}"
    page.wait_for_timeout(20)


def status(page):
  return page.locator("#shown strong").inner_text()


def prompts(page):
  """Returns the numbers of the samples on this page of the gallery."""
  return [
    int(text[-2:]) for text in page.locator(".sample h3").all_inner_texts()
  ]


def current(page):
  """Returns the number of the sample that has the focus."""
  return "".join(page.locator(".sample:focus h3").all_inner_texts())[-2:]


def set_filters(page, **values):
  for name, value in values.items():
    field = page.locator(f"#filters [name={name}]")
    field.select_option(value) if field.evaluate(
      "field => field.matches('select')"
    ) else field.fill(value)


class TestPage:
  def test_visible_images_load(self, opened):
    page = opened()
    page.locator("#gallery").scroll_into_view_if_needed()
    page.evaluate("document.getElementById('gallery').scrollIntoView()")
    visible = """[...document.querySelectorAll('.sample img')].filter((image) => {
      const { top, bottom } = image.getBoundingClientRect();
      return bottom > 0 && top < innerHeight;
    })"""
    wait_for(
      page,
      f"{visible}.every((image) => image.complete && image.naturalWidth > 0)",
    )
    assert page.evaluate(f"{visible}.length") >= 2
    hard = page.evaluate(
      f"{visible}.map((image) => [image.naturalWidth, getComputedStyle(image).imageRendering])"
    )
    assert all(
      rendering == ("pixelated" if width < 128 else "auto")
      for width, rendering in hard
    )
    assert {width for width, _ in hard} == {48, 160}

  def test_works_without_script(self, opened):
    page = opened(java_script_enabled=False)
    assert (
      "scripts are switched off" in page.locator("noscript .note").inner_text()
    )
    assert (
      page.locator("table").first.is_visible()
      and page.locator(".chart svg").first.is_visible()
    )
    assert (
      not page.locator("#browser").is_visible()
      and not page.locator("#theme").is_visible()
    )

  @pytest.mark.parametrize("width", [320, 380, 800, 1360])
  def test_nothing_sticks_out(self, opened, width):
    page = opened("#boxes=1", viewport={"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.locator(".open").first.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    frame = page.locator("#view").bounding_box()
    assert frame["x"] >= 0 and frame["x"] + frame["width"] <= width
    assert (
      page.locator("#view").evaluate(
        "view => view.scrollWidth - view.clientWidth"
      )
      <= 0
    )

  def test_pointer_reads_the_curves(self, opened):
    page = opened()
    chart = page.locator(".chart").first
    chart.scroll_into_view_if_needed()  # samples stand above it
    frame = chart.locator("svg").first.bounding_box()
    # x = 5.0 of 0 to 10
    page.mouse.move(frame["x"] + frame["width"] * 0.55, frame["y"] + 20)
    assert chart.locator(".reading").inner_text() == "round 5"
    assert chart.locator(".legend strong").all_inner_texts()[0] == "0.3"
    page.mouse.move(2, 2)
    assert chart.locator(".legend strong").all_inner_texts() == ["0.2", "0.1"]
    chart.locator("summary").click()
    sync_api.expect(chart.locator("tbody tr")).to_have_count(3)
    assert chart.locator("tbody tr").all_inner_texts() == [
      "0\t0.1 [0, 0.2]\t0.2",
      "5\t0.3 [0.2, 0.4]\t",
      "10\t0.2 [0.1, 0.3]\t0.1",
    ]


class TestTheme:
  def test_follows_the_system_until_it_is_chosen(self, opened):
    page = opened(color_scheme="dark")

    def background():
      return page.evaluate("getComputedStyle(document.body).backgroundColor")

    button = page.locator("#theme")
    assert (background(), button.inner_text()) == ("rgb(19, 20, 23)", "☀ Light")
    button.click()
    assert (background(), button.inner_text()) == (
      "rgb(245, 245, 242)",
      "☾ Dark",
    )
    page.reload()
    assert background() == "rgb(245, 245, 242)"

  @pytest.mark.parametrize("theme", ["light", "dark"])
  def test_texts_stand_out(self, opened, theme):
    """WCAG 2.2 AA: a contrast of 4.5 of every text that is no disabled control."""
    page = opened(
      "#boxes=1&q=violet&sample=00007_00&view=1",
      color_scheme=theme,
      reduced_motion="reduce",
    )
    found = page.evaluate("""() => {
      const parse = (color) => color.match(/[\\d.]+/g).map(Number);
      const linear = (x) => x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4;
      const light = (color) => [.2126, .7152, .0722]
        .reduce((sum, share, i) => sum + share * linear(color[i] / 255), 0);
      const behind = (element) => {
        for (let at = element; at; at = at.parentElement) {
          const color = parse(getComputedStyle(at).backgroundColor);
          if (color.length === 3 || color[3] > 0) return color;
        }
      };
      const texts = [...document.querySelectorAll("body *")].filter((element) =>
        element.checkVisibility() &&
        !element.closest(".boxes, script, style, option, :disabled") &&
        (element.matches("input, select") ||
        [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim())));
      return texts.map((element) => {
        const style = getComputedStyle(element);
        const front = parse(element.closest(".grid") ? style.fill : style.color);
        const [high, low] = [light(front), light(behind(element))].sort((a, b) => b - a);
        return [(high + .05) / (low + .05), element.outerHTML.slice(0, 80)];
      });
    }""")
    assert len(found) > 60
    assert [(ratio, text) for ratio, text in found if ratio < 4.5] == []


class TestFilters:
  @pytest.mark.parametrize(
    ("filters", "count"),
    [
      ({}, 45),
      ({"q": "violet"}, 1),
      ({"q": "VIOLET thing"}, 1),
      ({"q": "violet nothing"}, 0),
      ({"q": "repaint"}, 36),
      ({"q": "number 44"}, 1),
      ({"tag": "colors"}, 15),
      ({"step": "20"}, 15),
      ({"tag": "colors", "step": "20"}, 5),
      ({"outcome": "right"}, 18),
      ({"outcome": "wrong"}, 18),
      ({"outcome": "improved"}, 9),
      ({"outcome": "worse"}, 9),
      ({"outcome": "unchanged"}, 9),
      ({"outcome": "finished"}, 9),
      ({"outcome": "missing"}, 9),
      ({"outcome": "right", "tag": "colors"}, 6),
      ({"turn": "1"}, 45),
      ({"turn": "2"}, 36),
      ({"turn": "3"}, 9),
      ({"turn": "1", "outcome": "right"}, 9),
      ({"turn": "2", "outcome": "unchanged"}, 9),
      ({"turn": "1", "outcome": "unchanged"}, 0),
      ({"min": "0.25", "max": "0.5"}, 18),
      ({"min": "0.26"}, 27),
      ({"max": "0"}, 0),
      ({"turn": "1", "max": "0"}, 9),
    ],
  )
  def test_show_what_fits(self, at, filters, count):
    page = at()
    set_filters(page, **filters)
    assert status(page) == f"{count} of 45 shown"
    assert page.locator(".sample").count() == min(count, 20)
    assert page.locator("#nothing").is_visible() == (count == 0)

  @pytest.mark.parametrize(
    ("sort", "first"),
    [
      ("", [30, 31]),
      ("oldest", [0, 1]),
      ("lowest", [2, 7]),
      ("highest", [0, 1]),
      ("gain", [1, 6]),
      ("loss", [2, 7]),
    ],
  )
  def test_order(self, at, sort, first):
    page = at()
    set_filters(page, sort=sort)
    assert prompts(page)[:2] == first

  @pytest.mark.parametrize("sort", ["lowest", "highest"])
  def test_missing_scores_come_last(self, at, sort):
    assert prompts(at(f"#sort={sort}&page=3")) == [24, 29, 34, 39, 44]

  def test_status_says_how_good_they_are(self, at):
    page = at("#outcome=wrong")
    assert (
      page.locator("#shown").inner_text()
      == "18 of 45 shown · mean score 0.38, 0 right (0 %)"
    )
    assert page.locator("#shown").get_attribute("aria-live") == "polite"

  def test_clear_shows_all(self, at):
    page = at("#q=violet&tag=counting&min=0.1")
    assert status(page) == "1 of 45 shown"
    page.get_by_role("button", name="Clear").click()
    wait_for(
      page,
      "document.querySelector('#shown strong').textContent === '45 of 45 shown'",
    )
    assert page.evaluate("location.hash") == ""

  def test_pages_hold_twenty(self, at):
    page = at("#sort=oldest")
    page.locator("#next").click()
    assert (prompts(page)[0], page.locator("#page").input_value()) == (20, "2")
    assert page.locator("#pages").inner_text() == "of 3"
    page.locator("#page").fill("3")
    page.locator("#page").press("Enter")
    assert (
      prompts(page) == [40, 41, 42, 43, 44]
      and page.locator("#next").is_disabled()
    )

  def test_search_marks_what_it_found(self, at):
    page = at("#q=violet")
    assert page.evaluate("[...CSS.highlights.get('found')].map(String)") == [
      "violet",
      "violet",
    ]


class TestCards:
  def test_change_is_said_with_sign_and_word(self, at):
    page = at("#sort=oldest")

    def said(number):
      sample = page.locator(".sample").nth(number)
      return sample.locator(".scores").all_inner_texts()

    assert said(1) == ["score 0.50", "score 1.00 ✓\n▲ +0.50 better"]
    assert said(2) == ["score 0.75", "score 0.25\n▼ −0.50 worse"]
    assert said(3) == ["score 0.50", "score 0.50\n= same", "score 0.50\n= same"]
    assert said(4) == ["score 0.00", "score missing"]

  def test_finished_is_said(self, at):
    page = at("#sort=oldest&q=thing+03")
    assert page.locator(".finished").all_inner_texts() == [
      "finished: no further edit"
    ]
    assert page.locator(".turn").all_inner_texts() == [
      "draft",
      "round 2",
      "round 3",
    ]

  def test_thought_is_set_apart_and_an_instruction_said_once(
    self, chromium, tmp_path
  ):
    first = make_turn(1, 0, 0.5) | {"reason": "missing: heart"}
    edited = make_turn(1, 1, 1.0) | {
      "text": "<think> no heart </think> add a heart",
      "instruction": "add a heart",
    }
    # Its chain has finished: the image before is its image.
    stopped = edited | {
      "text": "<think> all there </think> no further edit",
      "instruction": "no further edit",
      "stop": True,
    }
    repeated = stopped | {"text": "", "instruction": ""}
    turns = [first, edited, stopped, repeated]
    line = make_sample(1) | {"turns": turns}
    sample = sample_log.Sample.from_json(line)
    path = page_lib.write_page(tmp_path, page_lib.Page("t", samples=[sample]))
    page = chromium.new_page()
    page.goto(as_url(path))
    assert page.locator(".said").all_inner_texts() == [
      "thought\n\nas asked",
      "thought\n\nno heart",
      "instruction\n\nadd a heart",
      "thought\n\nall there",
    ]
    assert page.locator(".reason").all_inner_texts() == ["missing: heart"]
    assert page.locator(".turn").all_inner_texts() == [
      "draft",
      "round 2",
      "round 3",
    ]
    assert page.locator(".sample img").count() == 2
    assert page.locator(".repeated").all_inner_texts() == ["the same image"]
    page.close()

  def test_answers_are_judged(self, at):
    page = at("#q=thing+00")
    page.get_by_text("Questions about the first image: 1 of 2 right").click()
    assert page.locator(".answers tbody tr").all_inner_texts() == [
      "count\tHow many?\t2\t3\t✗ wrong",
      "existence\tIs there a ring?\tyes\tYes.\t✓ right",
    ]

  def test_long_texts_open(self, at):
    page = at("#q=thing+08")
    text = page.locator(".said p").first
    short = text.bounding_box()["height"]
    page.get_by_role("button", name="Whole texts").click()
    assert text.bounding_box()["height"] > short
    assert page.locator(".more").get_attribute("aria-expanded") == "true"

  def test_whole_texts_are_offered_where_some_are_cut(self, opened):
    page = opened("#tag=position&sort=oldest")

    def cut():
      return [
        number
        for number, more in zip(prompts(page), page.locator(".more").all())
        if more.is_visible()
      ]

    assert prompts(page)[:3] == [2, 5, 8] and cut() == [8]
    page = opened(
      "#sort=oldest&q=middling", viewport={"width": 380, "height": 800}
    )
    assert cut() == [12]
    page.set_viewport_size({"width": 1360, "height": 800})
    wait_for(page, "document.querySelector('.more').hidden")

  def test_everything_has_a_name(self, at):
    page = at("#boxes=1")
    assert page.evaluate(
      "[...document.querySelectorAll('img')].every((image) => image.alt)"
    )
    second = page.locator(".sample").nth(1).locator("img").nth(1)
    assert (
      second.get_attribute("alt")
      == "round 2 of: a photo of thing 31, score 1.00"
    )
    unnamed = """[...document.querySelectorAll("button, input, select")]
      .map((element) => [element.outerHTML,
      element.ariaLabel || element.labels?.length || element.textContent.trim()])
      .filter(([, name]) => !name)"""
    assert page.evaluate(unnamed) == []


class TestBoxes:
  @pytest.mark.parametrize("where", ["card", "view"])
  @pytest.mark.parametrize("number", [1, 6])  # a wide image, a square one
  def test_stand_where_they_should(self, at, where, number):
    page = at(
      f"#boxes=1&q=thing+{number:02d}&sample={key(number)}"
      + ("&view=1" if where == "view" else "")
    )
    picture = page.locator(
      ("#view" if where == "view" else ".sample") + " .picture"
    ).first
    wait_for(
      page,
      "picture => picture.querySelector('img').naturalWidth > 0",
      picture.element_handle(),
    )
    rectangle = """(element) => {
      const { left, top, right, bottom } = element.getBoundingClientRect();
      return [left, top, right, bottom];
    }"""
    left, top, right, bottom = picture.locator("img").evaluate(rectangle)
    width, height = right - left, bottom - top
    assert width / height == pytest.approx(
      160 / 120 if number % 2 else 1, rel=0.02
    )
    expected = [
      left + BOX[1] * width,
      top + BOX[0] * height,
      left + BOX[3] * width,
      top + BOX[2] * height,
    ]
    for rect in picture.locator("rect").all():
      np.testing.assert_allclose(rect.evaluate(rectangle), expected, atol=1)
    assert picture.locator("text").text_content() == "red ring"

  def test_are_switched_by_button_and_key(self, at):
    page = at("#outcome=improved")
    overlay, button = page.locator(".boxes").first, page.locator("#boxes")

    def seen():
      return (
        overlay.is_visible(),
        button.get_attribute("aria-pressed"),
        button.inner_text(),
      )

    assert seen() == (False, "false", "Boxes off")
    page.keyboard.press("b")
    assert seen() == (True, "true", "Boxes on")
    assert "boxes=1" in page.evaluate("location.hash")
    assert "boxes=1" in page.locator(".link").first.get_attribute("href")
    button.click()
    assert not overlay.is_visible()


class TestKeys:
  def test_move_between_samples_and_pages(self, at):
    page = at("#sort=oldest")
    seen = []
    for pressed in ["j", "j", "ArrowDown", "ArrowUp", "k", "k"]:
      page.keyboard.press(pressed)
      seen.append(current(page))
    assert seen == ["00", "01", "02", "01", "00", "00"]
    for _ in range(20):
      page.keyboard.press("j")
    assert (current(page), prompts(page)[0]) == ("20", 20)
    top, height = page.evaluate(
      "[document.activeElement.getBoundingClientRect().top, innerHeight]"
    )
    assert 0 <= top < height / 2
    page.keyboard.press("k")
    assert (current(page), prompts(page)[0]) == ("19", 0)

  def test_arrows_scroll_where_no_sample_has_the_focus(self, at):
    page = at()
    page.keyboard.press("ArrowDown")
    wait_for(page, "scrollY > 0")
    assert current(page) == ""

  def test_are_not_taken_from_a_field(self, at):
    page = at()
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.name") == "q"
    page.keyboard.type("jkob/?")
    assert page.locator("[name=q]").input_value() == "jkob/?"
    assert (
      page.locator("dialog[open]").count() == 0
      and page.locator(".with-boxes").count() == 0
    )

  def test_are_left_to_the_browser_with_a_modifier(self, at):
    page = at()
    page.keyboard.press("Alt+j")
    assert current(page) == ""

  def test_large_view_goes_through_the_turns(self, at):
    page = at("#sort=oldest&sample=00003_00")
    page.keyboard.press("Enter")

    def shown():
      return page.locator("#view .side h3").inner_text()

    assert page.locator("#view").is_visible() and shown() == "draft"
    seen = []
    for pressed in ["ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft"]:
      page.keyboard.press(pressed)
      seen.append(shown())
    assert seen == ["round 2", "round 3", "round 3", "round 2"]
    assert page.locator("#view-said").text_content() == "round 2, turn 2 of 3"
    assert page.evaluate("location.hash").endswith("sample=00003_00&view=2")
    page.keyboard.press("j")
    assert page.locator("#view-title").inner_text() == "a photo of thing 04"
    page.keyboard.press("Escape")
    assert not page.locator("#view").is_visible() and current(page) == "04"
    page.keyboard.press("o")
    assert page.locator("#view").is_visible()

  def test_click_opens_the_turn(self, at):
    page = at("#q=thing+01")
    page.locator(".open").nth(1).click()
    assert page.locator("#view .side h3").inner_text() == "round 2"
    page.locator("#strip button").first.click()
    assert page.locator("#view .side h3").inner_text() == "draft"
    assert page.evaluate("document.activeElement.textContent") == "draft0.50"
    page.locator("#view .close").click()
    assert not page.locator("#view").is_visible()

  def test_help(self, at):
    page = at()
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
    page.keyboard.press("j")
    page.keyboard.press("Escape")
    assert not page.locator("#help").is_visible() and current(page) == ""


class TestLinks:
  def test_filters_and_sample_are_restored(self, opened):
    page = opened("#tag=counting&sort=oldest&sample=00004_00")
    assert (status(page), current(page)) == ("15 of 45 shown", "04")
    assert page.locator("[name=tag]").input_value() == "counting"
    page.reload()
    assert (status(page), current(page)) == ("15 of 45 shown", "04")
    assert (
      0
      <= page.evaluate("document.activeElement.getBoundingClientRect().top")
      < 450
    )

  def test_sample_of_a_later_page_is_found(self, opened):
    page = opened("#sort=oldest&sample=00044_00")
    assert (current(page), page.locator("#page").input_value()) == ("44", "3")

  def test_change_of_the_address_is_followed(self, at):
    page = at("#tag=counting")
    page.evaluate("location.hash = '#tag=colors&q=thing'")
    wait_for(page, "document.forms[0].elements.tag.value === 'colors'")
    assert (
      status(page) == "15 of 45 shown"
      and page.locator("[name=q]").input_value() == "thing"
    )

  def test_address_follows_the_filters(self, at):
    page = at()
    set_filters(page, q="a ring & more", outcome="wrong")
    assert page.evaluate("location.hash") == "#q=a+ring+%26+more&outcome=wrong"

  def test_card_links_to_itself_among_what_is_shown(self, at):
    page = at("#tag=counting&sort=oldest")
    link = page.locator(".link").nth(2)
    assert (
      link.get_attribute("href") == "#tag=counting&sort=oldest&sample=00007_00"
    )
    link.click()
    assert (status(page), current(page)) == ("15 of 45 shown", "07")

  @pytest.mark.parametrize(
    ("address", "said"),
    [
      ("#sample=nobody", "The sample nobody is not here"),
      (
        "#tag=colors&sample=00001_00",
        "The sample 00001_00 is hidden by the filters",
      ),
    ],
  )
  def test_sample_that_is_not_shown_is_said(self, at, address, said):
    assert said in at(address).locator("#shown").inner_text()

  @pytest.mark.parametrize(
    "address",
    [
      "#tag=none&step=x&turn=9&sort=y&page=99",
      "#page=-3",
      "#%E0%A4%A",
      "#min=x",
      "#view=4&sample=00000_00",
    ],
  )
  def test_address_of_nonsense_shows_something(self, at, address):
    assert status(at(address)) == "45 of 45 shown"

  @pytest.mark.parametrize("section", ["curves", "gallery"])
  def test_page_opened_at_a_section_shows_its_samples(self, opened, section):
    page = opened(f"#{section}")
    assert status(page) == "45 of 45 shown"
    set_filters(page, tag="counting")
    page.locator(".contents a[href='#numbers']").click()
    assert status(page) == "15 of 45 shown"

  def test_skip_link_keeps_the_filters(self, opened):
    page = opened("#tag=counting")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert (status(page), page.evaluate("document.activeElement.id")) == (
      "15 of 45 shown",
      "gallery",
    )


class TestInjection:
  @pytest.fixture(scope="class")
  @classmethod
  def attacked(cls, tmp_path_factory):
    def sample(number, text):
      turns = [
        {
          "image": "images/one.png",
          "label": text,
          "score": 0.5,
          "parts": {text: 0.5, "__proto__": 1.0},
          "text": text,
          "instruction": text,
          "stop": False,
          "boxes": [{"label": text, "box": BOX}],
        }
      ] * 2
      line = {
        "step": number,
        "key": text,
        "prompt": text,
        "tag": text,
        "turns": turns,
        "answers": [
          {
            "kind": text,
            "question": text,
            "expected": text,
            "answer": text,
            "text": text,
          }
        ],
      }
      parsed = sample_log.Sample.from_json(line)
      # The reader refuses such a path; the page must not rely on that.
      attacked_turns = tuple(
        dataclasses.replace(turn, image=text) for turn in parsed.turns
      )
      return dataclasses.replace(parsed, turns=attacked_turns)

    page = page_lib.Page(
      ATTACKS[0],
      ATTACKS,
      [tables.Table(text, ("", text), [(text, (text,))]) for text in ATTACKS],
      [
        charts.Chart(
          text, [charts.Series(text, [(0, 1.0, None, None)])] * 2, text
        )
        for text in ATTACKS
      ],
      [sample(number, text) for number, text in enumerate(ATTACKS)],
    )
    return page_lib.write_page(tmp_path_factory.mktemp("attacked"), page)

  def test_is_inert(self, chromium, attacked):
    page = chromium.new_page()
    page.goto(as_url(attacked, "#sort=oldest&boxes=1"))
    assert page.locator(".sample h3").all_text_contents() == list(ATTACKS)
    page.evaluate(
      "document.querySelectorAll('summary').forEach((summary) => summary.click())"
    )
    for number in range(len(ATTACKS)):
      page.keyboard.press("j")
      page.keyboard.press("o")
      assert page.locator("#view-title").text_content() == ATTACKS[number]
      assert (
        page.locator("#view .said p").first.text_content() == ATTACKS[number]
      )
      page.keyboard.press("Escape")
    assert page.evaluate("document.scripts.length") == 2
    assert (
      page.evaluate("""[...document.querySelectorAll("*")]
      .flatMap((element) => element.getAttributeNames())
      .filter((name) => name.startsWith("on") || name === "autofocus" || name === "style")""")
      == []
    )
    assert page.locator("a:not([href^='#'])").count() == 0
    assert page.evaluate("window.hacked") is None
    page.close()

  def test_key_of_any_text_is_linked_to(self, chromium, attacked):
    page = chromium.new_page()
    page.goto(as_url(attacked, "#sort=oldest"))
    for number, text in enumerate(ATTACKS):
      page.locator(".link").nth(number).click()
      wait_for(
        page,
        "text => document.activeElement.querySelector('h3')?.textContent === text",
        text,
      )
    page.close()

  def test_policy_stops_what_would_slip_through(self, chromium, attacked):
    page = chromium.new_page()
    page.goto(as_url(attacked))
    page.evaluate("""() => {
      const script = document.createElement("script");
      script.textContent = "window.hacked = 1";
      document.body.append(script);
      document.body.insertAdjacentHTML("beforeend", "<img src=x onerror='window.hacked = 1'>");
    }""")
    page.wait_for_timeout(100)
    assert page.evaluate("window.hacked") is None
    page.close()

  def test_page_of_generated_images_runs_and_loads_nothing(
    self, chromium, tmp_path
  ):
    for number, text in enumerate(ATTACKS):
      turn = gallery_lib.GeneratedTurn(
        image="",
        text=text,
        instruction=text,
        score=0.5,
        stop=False,
        seconds=1.0,
      )
      sample = gallery_lib.GeneratedSample(
        prompt=text,
        prompt_number=number,
        image_number=0,
        seed=0,
        model=text,
        size=(48, 48),
        turns=(turn,),
      )
      gallery_lib.write(tmp_path, sample, [image(0)])
    page = chromium.new_page()
    refusals = []
    page.on("console", lambda message: refusals.append(message.text))
    page.goto(as_url(gallery_lib.write_page(tmp_path, ATTACKS[0])))
    assert page.locator("h2").all_text_contents() == list(ATTACKS)
    assert page.evaluate("document.scripts.length") == 0
    # The style and the images are let in.
    color = "getComputedStyle(document.querySelector('figcaption p')).color"
    assert page.evaluate(color) == "rgb(95, 95, 91)"
    assert page.evaluate("document.images[0].naturalWidth") == 48
    assert refusals == []
    page.evaluate("""() => {
      const script = document.createElement("script");
      script.textContent = "window.hacked = 1";
      document.body.append(script);
      document.body.setAttribute("style", "color: red");
    }""")
    page.wait_for_timeout(100)
    assert page.evaluate("window.hacked") is None
    assert len(refusals) == 2
    page.close()


class TestSpeed:
  def test_five_thousand_samples_open_fast(self, chromium, tmp_path):
    """On two busy cores, 13 MB took 0.7 to 1.9 s to the first cards, 0.06 to 0.3 s a filter."""
    samples = []
    for number in range(5000):
      changes = {
        "image": "images/one.png",
        "text": f"thought {number} " + "of an object " * 25,
      }
      turns = [
        make_turn(number, index, 0.25 * index) | changes for index in range(4)
      ]
      line = make_sample(number) | {"turns": turns}
      samples.append(sample_log.Sample.from_json(line))
    sample_log.append(tmp_path, [], {"images/one.png": image(0)})
    path = page_lib.write_page(
      tmp_path, page_lib.Page("Large", samples=samples)
    )
    page = chromium.new_page()
    start = time.monotonic()
    page.goto(as_url(path), wait_until="commit")
    page.wait_for_selector(".sample")
    seconds = time.monotonic() - start
    assert seconds < 3
    taken = page.evaluate("""["thought 49", "thing", "no such"].map((text) => {
      const start = performance.now();
      document.forms[0].elements.q.value = text;
      document.forms[0].elements.q.dispatchEvent(new Event("input", { bubbles: true }));
      document.body.getBoundingClientRect();
      return performance.now() - start;
    })""")
    assert max(taken) < 500
    assert status(page) == "0 of 5000 shown"
    page.close()
