"""The report in a real browser, opened from its file with the network off."""

import random
import re
import shutil
import time

import pytest

from sapo.report.charts import CHARTS
from sapo.report.page import write_report
from tests.reports import HOSTILE, kept_pair, write_run

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install sapo-llm[test]")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield opened
        opened.close()


class Opened:
    """A page, and everything that it complained of or asked the network for."""

    def __init__(self, browser, file, **context):
        self.context = browser.new_context(offline=True, viewport={"width": 1280, "height": 900}, **context)
        self.context.set_default_timeout(10_000)
        self.page = self.context.new_page()
        self.complaints, self.requests = [], []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        began = time.perf_counter()
        self.page.goto(file.as_uri())
        self.page.locator("html[data-ready=true]").wait_for(state="attached")
        self.seconds = time.perf_counter() - began

    def settle(self):
        self.page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def rows(self):
        return self.page.locator("[role=option]").count()

    def end(self):
        assert self.complaints == []
        assert all(url.startswith(("file:", "data:")) for url in self.requests), self.requests
        self.context.close()


@pytest.fixture
def opened(browser, tmp_path):
    pages = []

    def make(*runs, file=None, **context):
        file = file or runs[0] / "report.html"
        write_report(file, runs)
        pages.append(Opened(browser, file, **context))
        return pages[-1]

    yield make
    for page in pages:
        page.end()


def test_every_chart_is_drawn_with_a_table_behind_it(opened, tmp_path):
    page = opened(write_run(tmp_path / "run", evaluations=[(50, 0.6), (100, 0.5)])).page
    charts = page.locator(".chart")
    # Two are drawn with eval_retention only.
    assert charts.count() == len(CHARTS) - 2
    for index in range(charts.count()):
        chart = charts.nth(index)
        drawn = chart.locator("path.line").evaluate_all("paths => paths.map((path) => path.getTotalLength())")
        assert drawn
        assert max(drawn) > 100
    loss = charts.first
    loss.locator("summary").click()
    playwright.expect(loss.locator("tbody tr")).to_have_count(100)
    cells = loss.locator("tbody tr").all_inner_texts()
    assert cells[49].split("\t")[2] == "0.6"


def test_the_summary_and_the_options_are_told_in_words(opened, tmp_path):
    fall = {"self_play/chosen_logp_change_per_token": lambda step: -step / 200}
    page = opened(write_run(tmp_path / "run", **fall)).page
    summary = page.locator("#summary").inner_text()
    assert "some/model (7.24 B parameters) was trained for 100 steps" in summary
    assert "The chosen responses became less likely" in summary
    options = page.locator("#options-body")
    assert "0.25" in options.inner_text()
    assert "temperature" not in options.inner_text()
    page.get_by_role("searchbox", name="Find an option").fill("temperature")
    assert "Sampling temperature of the opponent" in options.inner_text()


def test_search_and_filters_leave_what_matches(opened, tmp_path):
    rng = random.Random(0)
    pairs = [kept_pair(step, step % 5, rng) for step in range(40)]
    pairs[7]["rejected"][1] = "A Wholly Different answer"
    pairs[9]["rejected"] = pairs[9]["chosen"]
    pairs[9]["identical"] = True
    shown = opened(write_run(tmp_path / "run", pairs=pairs))
    page = shown.page
    assert shown.rows() == 40
    page.get_by_role("searchbox", name="Search prompts and responses").fill("wholly different")
    assert shown.rows() == 1
    assert "A Wholly Different answer" in page.locator(".response.rejected mark").inner_text()
    assert page.locator(".response.rejected mark del").count() >= 1
    page.get_by_role("button", name="Reset filters").click()
    assert shown.rows() == 40
    page.get_by_label("First step", exact=True).fill("10")
    page.get_by_label("Last step", exact=True).fill("19")
    assert shown.rows() == 10
    page.get_by_role("button", name="Reset filters").click()
    page.get_by_label("Minimum margin").fill("0.5")
    assert shown.rows() == sum(pair["margin"] >= 0.5 for pair in pairs)
    page.get_by_role("button", name="Reset filters").click()
    page.get_by_label("Hide identical pairs").check()
    assert shown.rows() == 39
    page.get_by_role("searchbox", name="Search prompts and responses").fill("nowhere to be found")
    assert shown.rows() == 0
    assert page.get_by_text("No pair matches.").is_visible()


def test_a_prompt_is_followed_through_the_run(opened, tmp_path):
    page = opened(write_run(tmp_path / "run")).page
    rows = page.locator(".through tbody tr")
    assert rows.count() == 5
    rows.nth(3).get_by_role("button").click()
    assert page.locator(".detail-head h3").inner_text().startswith("Step 16, row 0")
    assert page.locator(".through tr[aria-current=true]").count() == 1


def test_everything_is_reached_by_keyboard(opened, tmp_path):
    shown = opened(write_run(tmp_path / "run"))
    page = shown.page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the summary"
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "pair-search"
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.getAttribute('role')") == "listbox"
    first = page.locator("[aria-selected=true]").get_attribute("id")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("j")
    second = page.locator("[aria-selected=true]").get_attribute("id")
    assert second != first
    assert page.locator("[role=listbox]").get_attribute("aria-activedescendant") == second
    page.keyboard.press("End")
    assert page.locator("[role=option]").last.get_attribute("aria-selected") == "true"
    chart = page.locator(".plot").first
    chart.focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert page.locator("#chart-value").inner_text().startswith("Step 3: training 0.6")
    page.keyboard.press("+")
    assert page.locator("#zoom-reset").is_enabled()
    assert int(page.get_by_label("Last step shown").input_value()) < 60
    page.keyboard.press("0")
    assert page.locator("#zoom-reset").is_disabled()


def test_dragging_zooms_all_charts(opened, tmp_path):
    page = opened(write_run(tmp_path / "run")).page
    box = page.locator(".plot").first.bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] * 0.5, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.8, middle, steps=5)
    page.mouse.up()
    first = int(page.get_by_label("First step shown").input_value())
    last = int(page.get_by_label("Last step shown").input_value())
    assert 35 < first < 60 < last < 90
    page.locator(".chart").nth(2).locator("summary").click()
    # A table is filled when its browser says that it was opened, a moment after the click.
    playwright.expect(page.locator(".chart").nth(2).locator("tbody tr")).to_have_count(last - first + 1)


def ticks(chart):
    return chart.locator("svg text").all_text_contents()


def test_curves_can_be_drawn_over_epochs_hours_and_tokens(opened, tmp_path):
    page = opened(write_run(tmp_path / "run")).page
    loss = page.locator(".chart").first
    # 100 steps of 1.8 s and 4,000 tokens, 50 of them an epoch.
    for axis, unit, last in (
        ("step", "step", 100),
        ("epochs", "epoch", 2),
        ("hours", "h", 0.05),
        ("tokens", "M tok.", 0.4),
    ):
        page.get_by_label("Over").select_option(label="steps" if axis == "step" else axis)
        *shown, name = ticks(loss)
        assert name == unit
        assert float(shown[-1]) == pytest.approx(last, rel=0.3)
    loss.locator(".plot").hover(position={"x": 300, "y": 80})
    assert loss.locator(".at").inner_text().startswith("step ")


def test_a_short_run_has_more_than_one_tick(opened, tmp_path):
    page = opened(write_run(tmp_path / "run", steps=8)).page
    numbers = [text for text in ticks(page.locator(".chart").first)[:-1] if text.isdigit()]
    assert {"2", "4", "6", "8"} <= set(numbers)


def test_a_log_scale_shows_what_falls_by_magnitudes(opened, tmp_path):
    page = opened(write_run(tmp_path / "run", loss=lambda step: 10.0 ** (-step / 20))).page
    loss = page.locator(".chart").first
    page.get_by_label("Log scale").check()
    assert {"1e-4", "0.01"} <= set(ticks(loss))
    # A margin below 0 has no logarithm: its chart stays as it is.
    rates = page.locator(".chart", has=page.get_by_role("heading", name="Rewards"))
    assert "log" not in rates.get_attribute("class").split()


def test_one_chart_is_enlarged_and_saved_as_csv_and_png(opened, tmp_path):
    page = opened(write_run(tmp_path / "run"), accept_downloads=True).page
    loss = page.locator(".chart").first
    small = loss.locator("svg").bounding_box()
    page.get_by_role("button", name="Enlarge: Loss").click()
    large = loss.locator("svg").bounding_box()
    assert large["width"] > 2 * small["width"]
    assert large["height"] > 2 * small["height"]
    with page.expect_download() as saved:
        page.get_by_role("button", name="Save as CSV: Loss").click()
    lines = (saved.value.path()).read_text().splitlines()
    assert saved.value.suggested_filename == "loss.csv"
    assert lines[0] == 'step,"training"'
    assert len(lines) == 101
    with page.expect_download() as saved:
        page.get_by_role("button", name="Save as PNG: Loss").click()
    picture = saved.value.path().read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert int.from_bytes(picture[16:20], "big") == pytest.approx(2 * large["width"], abs=4)
    assert len(picture) > 5000


def test_a_pair_has_an_address(opened, tmp_path):
    shown = opened(write_run(tmp_path / "run"))
    page = shown.page
    page.locator("[role=option]").nth(7).click()
    page.get_by_role("link", name="Link to this pair").click()
    address = page.url
    assert "#pair=0." in address
    title = page.locator(".pair-detail h3").inner_text()
    page.goto("about:blank")
    page.goto(address)
    page.locator("html[data-ready=true]").wait_for(state="attached")
    assert page.locator(".pair-detail h3").inner_text() == title


def test_evaluation_rewards_and_local_measures_are_drawn(opened, tmp_path):
    folder = write_run(tmp_path / "run", evaluations=[(50, 0.6), (100, 0.5)])
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 100, "eval_rewards/chosen": 0.5, "eval_rewards/rejected": -0.5, "eval_loss": 0.5}\n')
    page = opened(folder).page
    rewards = page.locator(".chart", has=page.get_by_role("heading", name="Rewards"))
    assert "chosen, evaluation" in rewards.locator(".legend").inner_text()
    shares = page.locator(".chart", has=page.get_by_role("heading", name="Samples at evaluations: shares"))
    assert "ending in a loop" in shares.locator(".legend").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_printed_page_is_light_and_has_its_colours(scheme, opened, tmp_path):
    page = opened(write_run(tmp_path / "run"), color_scheme=scheme).page
    page.get_by_label("Theme").select_option(scheme)
    page.emulate_media(media="print", color_scheme=scheme)
    style = page.evaluate(
        """() => [getComputedStyle(document.body).backgroundColor,
        getComputedStyle(document.querySelector(".card")).backgroundColor,
        getComputedStyle(document.querySelector(".legend .key")).printColorAdjust,
        getComputedStyle(document.querySelector(".legend .key")).color,
        getComputedStyle(document.querySelector(".controls")).display]"""
    )
    assert style[:3] == ["rgb(255, 255, 255)", "rgb(255, 255, 255)", "exact"]
    assert style[3] == "rgb(42, 95, 196)"
    assert style[4] == "none"
    # At the width of A4 no curve leaves its card.
    page.set_viewport_size({"width": 794, "height": 1123})
    edges = page.evaluate(
        """() => [...document.querySelectorAll(".chart")].map((card) =>
        card.getBoundingClientRect().right - card.querySelector("svg").getBoundingClientRect().right)"""
    )
    assert min(edges) >= 0


def test_a_metric_of_few_log_lines_is_a_line(opened, tmp_path):
    sparse = {"self_play/chosen_logp_change_per_token": lambda step: step / 100 if step % 25 == 0 else None}
    page = opened(write_run(tmp_path / "run", **sparse)).page
    chart = page.locator(".chart", has=page.get_by_role("heading", name="Likelihood of the chosen responses"))
    assert chart.locator("path.line").evaluate("(path) => path.getTotalLength()") > 100
    assert chart.locator(".dot").count() == 4
    assert re.match(r"[\d.]+$", chart.locator(".value").inner_text())


def test_smoothing_changes_the_curve_and_not_the_table(opened, tmp_path):
    page = opened(write_run(tmp_path / "run")).page
    chart = page.locator(".chart", has=page.get_by_role("heading", name="Gradient norm"))
    chart.locator("summary").click()
    playwright.expect(chart.locator("tbody tr")).not_to_have_count(0)
    before = chart.locator("tbody").inner_text(), chart.locator("path.line:not(.raw)").get_attribute("d")
    page.locator("#smoothing").fill("0.9")
    after = chart.locator("tbody").inner_text(), chart.locator("path.line:not(.raw)").get_attribute("d")
    assert before[0] == after[0]
    assert before[1] != after[1]


def test_hostile_text_is_inert_wherever_it_stands(opened, tmp_path):
    rng = random.Random(0)
    pair = kept_pair(1, 0, rng, text=HOSTILE)
    pair["prompt"] = pair["chosen"][0] = pair["rejected"][0] = HOSTILE
    folder = write_run(tmp_path / "run", pairs=[pair, pair | {"step": 2}])
    facts = (folder / "run.json").read_text().replace("some/model", "<img src=x onerror=document.title=1>")
    (folder / "run.json").write_text(facts)
    page = opened(folder).page
    page.wait_for_timeout(200)
    assert page.title() == "run \u2013 SAPO report"
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 2
    assert HOSTILE in page.locator("pre.prompt").text_content()
    assert HOSTILE in page.locator(".response.rejected mark").text_content()


def test_several_runs_are_overlaid_and_can_be_hidden(opened, tmp_path):
    runs = [write_run(tmp_path / name) for name in ("one", "two", "three")]
    page = opened(*runs, file=tmp_path / "all.html").page
    loss = page.locator(".chart").first
    assert loss.locator("path.line:not(.raw)").count() == 3
    page.locator("#run-switches").get_by_label("two").uncheck()
    assert loss.locator("path.line:not(.raw)").count() == 2
    assert page.locator("#summary article").count() == 3
    page.get_by_label("Of run").select_option(label="three")
    assert page.locator("[role=option]").count() == 20


@pytest.mark.parametrize("width", [320, 390, 768])
def test_a_narrow_page_does_not_scroll_sideways(width, opened, tmp_path):
    shown = opened(write_run(tmp_path / "run"))
    shown.page.set_viewport_size({"width": width, "height": 800})
    shown.settle()
    assert shown.page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(scheme, opened, tmp_path):
    """WCAG's contrast of 4.5 between every text and the ground that it stands on."""
    page = opened(
        write_run(tmp_path / "run", **{"self_play/chosen_logp_change_per_token": lambda step: -step / 200}),
        color_scheme=scheme,
    ).page
    poor = page.evaluate(
        """() => {
        const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
        const light = ([r, g, b]) => {
          const part = (c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4);
          return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
        };
        const ground = (element) => {
          for (let at = element; at; at = at.parentElement) {
            const colour = getComputedStyle(at).backgroundColor;
            const parts = rgb(colour);
            if (colour.startsWith("rgb") && (parts.length < 4 || parts[3] === 1)) return parts;
          }
          return [255, 255, 255];
        };
        const poor = [];
        for (const element of document.querySelectorAll("main *, header *, footer *")) {
          if (![...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim())) continue;
          if (element.closest("select, .unseen, :disabled") || !element.getClientRects().length) continue;
          const style = getComputedStyle(element);
          const [a, b] = [light(rgb(element.closest("svg") ? style.fill : style.color)), light(ground(element))];
          const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
          if (contrast < 4.5) poor.push(`${contrast.toFixed(2)} ${element.className} ${element.textContent}`);
        }
        return poor;
      }"""
    )
    assert poor == []


def test_every_control_has_a_name(opened, tmp_path):
    page = opened(write_run(tmp_path / "run")).page
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("input, select, button, [role=group], [role=listbox], [role=region]")]
        .filter((e) => !(e.getAttribute("aria-label") || e.getAttribute("aria-labelledby") || e.closest("label") ||
                         e.textContent.trim())).map((e) => e.outerHTML.slice(0, 80))"""
    )
    assert nameless == []
    headings = page.locator("h2").all_inner_texts()
    assert headings == ["Summary", "Curves", "Pairs", "Options", "Environment"]


def test_a_run_that_has_logged_nothing_yet_opens(opened, tmp_path):
    folder = write_run(tmp_path / "run", pairs=[])
    (folder / "metrics.jsonl").write_text("")
    page = opened(folder).page
    assert page.get_by_text("Nothing logged yet.").first.is_visible()
    assert page.get_by_text("✓").count() == 0
    assert page.get_by_text("No pairs were kept").is_visible()


def test_ten_thousand_steps_open_in_under_two_seconds(opened, tmp_path):
    rng = random.Random(0)
    pairs = [kept_pair(50 * i, i % 150, rng, words=500) for i in range(200)]
    run = write_run(tmp_path / "run", steps=10_000, pairs=pairs)
    # By the clock, and other tests run beside this one: the quickest of a few openings is the page's own time.
    quickest = 100.0
    for _ in range(5):
        shown = opened(run)
        assert shown.page.locator("path.line").count() > 15
        quickest = min(quickest, shown.seconds)
        if quickest < 2:
            break
    assert quickest < 2


def test_a_live_page_shows_what_the_run_writes(browser, tmp_path):
    import threading

    from sapo.report.serve import make_server

    run = write_run(tmp_path / "run", steps=5)
    with make_server([run], 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        context = browser.new_context()
        page = context.new_page()
        complaints = []
        page.on("console", lambda message: complaints.append(message.text))
        page.goto(f"http://127.0.0.1:{server.server_address[1]}/")
        page.get_by_role("searchbox", name="Search prompts and responses").fill("lorem")
        playwright.expect(page.locator("#live")).to_have_text("ended")
        with (run / "metrics.jsonl").open("a") as stream:
            stream.write('{"step": 6, "loss": 0.125}\n')
        loss = page.locator(".chart").first
        playwright.expect(loss.locator(".value").first).to_have_text("0.125", timeout=8000)
        # It goes on again, as after a resume.
        playwright.expect(page.locator("#live")).to_have_text("live")
        assert page.get_by_role("searchbox", name="Search prompts and responses").input_value() == "lorem"
        context.close()
        server.shutdown()
        thread.join()
    assert complaints == []
