"""The HTML report: escaping and statistics as text, and the page itself in a real headless Chromium."""

import base64
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import time
import urllib.request
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vidtrl.data.video import write_video
from vidtrl.report import (
    Chart,
    Clip,
    Estimate,
    Gallery,
    Metric,
    Stage,
    mean_interval,
    paired_difference,
    share_interval,
    write_report,
)
from vidtrl.report.charts import interval_bars, layout, nice_ticks
from vidtrl.report.curves import training_charts
from vidtrl.report.html import duration, size, visible
from vidtrl.toy import captions, render


HOSTILE = (
    '<script>document.title="owned"</script><img src="http://attacker.invalid/x.png" onerror="document.title=1">'
    "\"' {{ 7*7 }} &amp; </figcaption></main>" + "x" * 200
)
LONG = "\u202e" + "sesrever txet siht " + "y" * 5000  # an override of the writing direction, one word without a break


MODELS = ("base", "SFT", "SFT + GRPO")


def write_clips(folder, count=14):
    """(caption, raw file, clean file) each."""
    rows = []
    for i, caption in enumerate(captions()[:count]):
        raw, clean = folder / f"raw{i}.mp4", folder / f"clean{i}.mp4"
        write_video(raw, render(caption, "raw", i), fps=8)
        write_video(clean, render(caption, "clean", i), fps=8)
        rows.append((caption, raw, clean))
    return rows


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return write_clips(tmp_path_factory.mktemp("videos"))


@pytest.fixture(scope="module")
def report(tmp_path_factory, videos):
    """A report with 14 clips (2 of them on the second page), two hostile prompts, a table and charts."""
    clips = []
    for i, (caption, raw, clean) in enumerate(videos):
        files = dict(zip(MODELS, (raw, raw, clean), strict=True))
        right = {MODELS[0]: i % 2 == 0, MODELS[1]: i != 4, MODELS[2]: i not in (4, 7)}
        prompt = {1: HOSTILE, 2: LONG}.get(i, caption)
        clips.append(
            Clip(
                prompt,
                files,
                notes=dict.fromkeys(files, HOSTILE if i == 1 else "red circle right"),
                right=right,
                enhanced={MODELS[2]: HOSTILE if i == 1 else f"In soft light, {caption}"},
                scores={name: {"flicker": (i * 5 % 14) / 10 + k} for k, name in enumerate(MODELS)},
            )
        )
    values = (Estimate(0.6, 0.5, 0.7), Estimate(0.9, 0.5, 0.95), Estimate(0.85, 0.75, 0.92))
    changes = {MODELS[1]: Estimate(0.3, -0.05, 0.4), MODELS[2]: Estimate(0.15, 0.05, 0.25)}
    loss = Chart("Loss", {"a": [(0, 1.0), (10, math.nan), (20, 0.25)], "b": [(0, 0.5)]}, "step", "loss")
    sigma = Chart("By noise level", {"step 20": [(s / 10, s) for s in range(1, 10)]}, "sigma", "loss", HOSTILE)
    return write_report(
        tmp_path_factory.mktemp("report") / "report.html",
        title=f"A run {HOSTILE}",
        summary="It went well.",
        notes=[HOSTILE],
        warnings=[HOSTILE],
        stages=[
            Stage(MODELS[0], num_clips=14, evaluations=40, clip_seconds=0.0891),
            Stage(MODELS[1], num_clips=14, evaluations=40, train_seconds=133, peak_memory=3 * 2**29, curves=[sigma]),
            Stage(MODELS[2], num_clips=14, evaluations=4, note=HOSTILE, train_seconds=9000),
        ],
        metrics=[
            Metric("All three right", dict(zip(MODELS, values, strict=True)), changes, percent=True, help="as asked"),
            Metric("Reward", {MODELS[2]: Estimate(0.5, 0.4, 0.6)}, help=HOSTILE),
        ],
        clips=clips,
        charts=[loss],
        settings={"base": "/a/very/long/path" * 20, HOSTILE: HOSTILE},
        versions={"torch": "2.13"},
    )


class _Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text.append(data)


def parse(path):
    page = _Tags()
    page.feed(path.read_text(encoding="utf-8"))
    return page


def test_hostile_texts_stay_text(report):
    page = parse(report)
    assert page.tags.count("script") == 1 and "img" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on") or name == "style"]
    # title, heading, paragraph, warning, stage, help, prompt, enhanced, three notes, chart, setting and its value
    assert sum(HOSTILE in text for text in page.text) == 14
    assert page.tags.count("figcaption") == 42 + 2
    assert "\u202e" not in report.read_text(encoding="utf-8") and r"\u202e" + LONG[1:] in "".join(page.text)


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=())))
def test_every_text_can_be_written_and_turns_nothing(text):
    shown = visible(text)
    shown.encode("utf-8")  # lone surrogates could not
    assert not set(shown) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\0\x1b")
    if text.isprintable():  # nothing else is touched
        assert shown == text


def test_report_refers_to_nothing_outside(report):
    page = parse(report)
    references = [value for name, value in page.attributes if name in ("src", "href", "srcset", "poster")]
    outside = [value for value in references if not value.startswith(("data:", "#"))]
    assert outside == [] and sum(value.startswith("data:video/mp4;base64,") for value in references) == 42
    assert sum(value.startswith("data:image/jpeg;base64,") for value in references) == 42
    html = report.read_text(encoding="utf-8")
    css = re.search(r"<style>(.*?)</style>", html, re.S).group(1)
    assert "url(" not in css and "@import" not in css
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html).group(1)
    assert policy.startswith("default-src &#39;none&#39;; media-src data:; img-src data:;") and "unsafe" not in policy
    for tag in ("style", "script"):
        text = re.search(rf"<{tag}>(.*?)</{tag}>", html, re.S).group(1)
        assert base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() in unescape(policy)


def test_large_videos_are_linked_and_the_page_says_so(videos, tmp_path):
    caption, raw, _ = videos[0]
    (tmp_path / "clips of #1").mkdir()
    file = shutil.copy(raw, tmp_path / "clips of #1" / "a b.mp4")
    clip = Clip(caption, {"base": file})
    budget = os.path.getsize(file)
    linked = write_report(tmp_path / "p.html", title="t", summary="s", clips=[clip], max_embedded=budget - 1)
    assert 'src="clips%20of%20%231/a%20b.mp4"' in linked.read_text() and "files beside this page" in linked.read_text()
    whole = write_report(tmp_path / "q.html", title="t", summary="s", clips=[clip], max_embedded=budget)
    assert "clips%20of" not in whole.read_text() and "files beside this page" not in whole.read_text()


def test_mistakes_are_refused(videos, tmp_path):
    one = Metric("a", {"base": Estimate(0, 0, 0)})
    three = Metric("c", {"base": Estimate(0, 0, 0)}, {"base": Estimate(0, 0, 0)})
    with pytest.raises(ValueError, match="'c' has differences of .'base'., which follow no stage"):
        write_report(tmp_path / "r.html", title="t", summary="s", metrics=[one, three])
    with pytest.raises(ValueError, match="metric 'a' is of .'base'., but the stages are .'SFT'.: name them alike"):
        write_report(tmp_path / "r.html", title="t", summary="s", stages=[Stage("SFT")], metrics=[one])
    with pytest.raises(ValueError, match="5 series"):
        Chart("c", {str(i): [(0, 0)] for i in range(5)}, "x", "y")
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(videos[0][1].read_bytes()[:-100])
    with pytest.raises(ValueError, match="cut.mp4 is no mp4 file, or only the beginning of one"):
        write_report(tmp_path / "r.html", title="t", summary="s", clips=[Clip("p", {"base": cut})])
    assert [path.name for path in tmp_path.iterdir()] == ["cut.mp4"]  # nothing half-written


def test_scores_that_are_not_finite_leave_the_page_whole(tmp_path):
    clip = Clip("p", {"base": None}, scores={"base": {"a": math.nan, "b": -math.inf, "c": 0.5, "d": True}})
    page = write_report(tmp_path / "r.html", title="t", summary="s", clips=[clip]).read_text()
    data = unescape(re.search('data-scores="(.*?)"', page)[1])
    strict = json.loads(data, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert strict == {"base": {"a": None, "b": None, "c": 0.5, "d": True}} and "nan" not in page
    assert math.isnan(clip.scores["base"]["a"])  # what was passed is left as it was


def test_verdict_follows_the_interval():
    def verdict(*interval, **kwargs):
        return Metric("m", {"a": Estimate(0, 0, 0)}, {"b": Estimate(*interval)}, **kwargs).verdict("b")

    assert verdict(0.2, 0.1, 0.3) == "better"
    assert verdict(0.2, 0.1, 0.3, higher_is_better=False) == "worse"
    assert verdict(-0.2, -0.3, -0.1, higher_is_better=False) == "better"
    assert verdict(0.2, -0.1, 0.5) == "unclear" and verdict(0, -0.1, 0.1) == "unclear"
    assert verdict(0, 0, 0) == "equal"


def test_each_value_stands_in_its_row(report):
    text = " ".join(" ".join(parse(report).text).split())
    cells = text[text.index("Peak memory") : text.index("What is measured")]
    for part in (
        *("base", "14 clips", "60 %", "50 % to 70 %", "–", "40", "89.1 ms", "–", "–"),
        *("SFT", "90 %", "+30, unclear", "−5 to +40", "–", "40", "–", "2.22 min", "1.50 GiB"),
        *("SFT + GRPO", "85 %", "+15, better", "+5 to +25", "0.500", "4", "–", "2.5 h", "–"),
    ):
        assert part in cells
        cells = cells[cells.index(part) + len(part) :]  # in this order
    assert text.count(", better") == text.count(", unclear") == 1 and ", worse" not in text


def test_costs_are_in_readable_units():
    assert [duration(s) for s in (0.0031, 0.9, 1, 90, 600, 9000)] == [
        "3.1 ms",
        "900 ms",
        "1 s",
        "90 s",
        "10 min",
        "2.5 h",
    ]
    assert [size(b) for b in (5 * 2**20, 3 * 2**29)] == ["5 MiB", "1.50 GiB"]


def test_intervals_against_known_values():
    # Wilson 95 % for 8 of 10: 0.4902 to 0.9433 (Newcombe 1998, table of examples by the same formula)
    value, low, high = share_interval([True] * 8 + [False] * 2)
    assert value == 0.8 and abs(low - 0.4902) < 1e-3 and abs(high - 0.9433) < 1e-3
    assert share_interval([True] * 20)[2] == 1.0 and share_interval([True] * 20)[1] < 0.9
    # the bootstrap of a mean approaches the normal interval
    x = np.random.default_rng(0).normal(3, 1, 400)
    value, low, high = mean_interval(x)
    half = 1.96 * x.std() / 20
    assert abs(low - (value - half)) < 0.02 and abs(high - (value + half)) < 0.02
    with pytest.raises(ValueError, match="finite"):
        mean_interval([1.0, math.nan])
    with pytest.raises(ValueError, match="pairs"):
        paired_difference([1], [1, 2])


def test_pairing_narrows_the_interval():
    rng = np.random.default_rng(1)
    before = rng.normal(0, 1, 100)
    after = before + 0.1 + rng.normal(0, 0.05, 100)
    paired = paired_difference(before, after)
    shuffled = paired_difference(before, rng.permutation(after))  # negative control: the same values, pairs broken
    assert paired.low > 0.05 and shuffled.low < 0 < shuffled.high


@settings(max_examples=200, deadline=None)
@given(st.floats(-1e6, 1e6), st.floats(0, 1e6))
def test_ticks_cover_the_range(low, span):
    ticks = nice_ticks(low, low + span)
    tolerance = 1e-6 * max(1.0, abs(low), span)
    assert 2 <= len(ticks) <= 12 and ticks == sorted(set(ticks))
    assert ticks[0] <= low + tolerance and ticks[-1] >= low + span - tolerance


def test_interval_bars_share_a_scale():
    bars = interval_bars({"a": Estimate(0.5, 0.0, 0.6), "b": Estimate(1.0, 0.9, 1.0), "nan": Estimate(math.nan, 0, 1)})
    assert bars == {"a": {"value": 40, "low": 4, "high": 47.2}, "b": {"value": 76, "low": 68.8, "high": 76}}
    narrow = interval_bars({"a": Estimate(0.99, 0.98, 1.0)}, min_span=0.1)["a"]
    assert narrow["high"] - narrow["low"] == pytest.approx(0.2 * 72, abs=0.2)  # not the whole width
    assert interval_bars({"a": Estimate(0, 0, 0)})["a"]["value"] == 40


def test_curves_of_a_log():
    log = [
        {"step": 1, "loss": 1.0, "reward": 0.1, "rewards/a/mean": 0.1, "kl": 0.0, "learning_rate": 1e-3, "rollout_time": 3.0},
        {"step": 2, "loss": math.nan, "reward": 0.2, "rewards/a/mean": "x", "kl": None, "learning_rate": 0.0, "update_time": 1},
        {"step": 2, "eval_reward": 0.3, "eval_rewards/b/mean": 0.4, "eval_loss_sigma_0.5": 0.2, "eval_loss_sigma_0.1": 0.3},
        {"step": 2, "train_runtime": 9.0, "loss": 77.0},
        {"loss": 5.0},
        {f"loss/{i}": 1.0 for i in range(6)} | {"step": 3},
    ]  # fmt: skip
    charts = {f"{c.title} {i}": c for i, c in enumerate(training_charts(log, "X: "))}
    titles = [c.title for c in charts.values()]
    assert titles == [
        "X: Loss", "X: Loss of each network", "X: Loss of each network", "X: Reward", "X: Reward a", "X: Reward b",
        "X: Divergence from the reference", "X: Held-out loss by noise level", "X: Learning rate", "X: Step time",
    ]  # fmt: skip
    first, *_ = charts.values()
    assert first.series == {"training": [(1.0, 1.0)]}
    by_title = {c.title: c for c in charts.values()}
    assert by_title["X: Reward"].series == {"training": [(1, 0.1), (2, 0.2)], "fixed prompts": [(2, 0.3)]}
    assert "never trained on" in by_title["X: Reward b"].note and by_title["X: Reward a"].note == ""
    assert by_title["X: Held-out loss by noise level"].series == {"step 2": [(0.1, 0.3), (0.5, 0.2)]}
    assert by_title["X: Step time"].y_label == "seconds" and training_charts([]) == []


def test_layout_skips_points_that_are_not_finite():
    chart = layout({"a": [(0, 1.0), (1, math.inf), (2, math.nan), (3, 2.0)], "empty": []})
    assert chart["lines"][0]["path"].count("L") == 1 and chart["lines"][1]["path"] == ""
    assert json.loads(chart["data"])["lines"] == [["a", [[0, 1], [3, 2]]], ["empty", []]]
    assert layout({"flat": [(0, 1.0), (5, 1.0)]})["lines"][0]["end"] is not None


# The page in a browser, over the DevTools protocol.

CHROMIUM = next((c for c in ("chromium", "chromium-browser", "google-chrome", "chrome") if shutil.which(c)), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium binary on PATH (apt-get install chromium)")
PROBE = """(() => {
  const videos = [...document.querySelectorAll(".columns video")];
  const open = videos.filter((v) => v.checkVisibility()
    && v.getBoundingClientRect().top < innerHeight && v.getBoundingClientRect().bottom > 0);
  const canvas = new OffscreenCanvas(64, 64).getContext("2d", {willReadFrequently: true});
  const spread = (v) => {  // of the pixels; 0 of a blank picture
    canvas.drawImage(v, 0, 0, 64, 64);
    const pixels = canvas.getImageData(0, 0, 64, 64).data.filter((_, i) => i % 4 < 3);
    return Math.max(...pixels) - Math.min(...pixels);
  };
  return JSON.stringify({
    open: open.length, playing: open.filter((v) => !v.paused && v.currentTime > 0 && v.videoWidth === 64).length,
    blank: open.filter((v) => v.src.startsWith("data:") && v.readyState >= 2 && spread(v) < 40).length,
    times: open.map((v) => v.currentTime),
    total: videos.length, loaded: videos.filter((v) => v.getAttribute("src")).length,
    width: document.documentElement.scrollWidth, inner: document.documentElement.clientWidth,
    wide: [...document.querySelectorAll("body *")].filter((e) => !e.closest(".scroll")
      && e.getBoundingClientRect().right > document.documentElement.clientWidth + 1).length,
    title: document.title, button: document.getElementById("play")?.textContent});
})()"""


class Browser:
    """A headless Chromium driven over its DevTools websocket; collects console errors and requested URLs."""

    def __init__(self, profile):
        flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
        flags += " --disable-component-update --disable-sync --hide-scrollbars --remote-debugging-port=0"
        self.process = subprocess.Popen(
            [CHROMIUM, *flags.split(), f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.errors, self.requests, self.socket = [], [], None
        port_file, deadline = profile / "DevToolsActivePort", time.monotonic() + 60
        while not (port_file.is_file() and port_file.read_text().count("\n")):
            assert self.process.poll() is None and time.monotonic() < deadline, "chromium did not start"
            time.sleep(0.1)
        port = port_file.read_text().splitlines()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
            page = next(t for t in json.load(answer) if t["type"] == "page")
        import websocket

        self.socket, self.count = websocket.create_connection(page["webSocketDebuggerUrl"], suppress_origin=True), 0
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        self.count += 1
        self.socket.send(json.dumps({"id": self.count, "method": method, "params": params}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") == self.count:
                assert "error" not in message, message
                return message["result"]
            self.note(message.get("method"), message.get("params", {}))

    def note(self, method, params):
        if method == "Runtime.exceptionThrown":
            self.errors.append(params["exceptionDetails"]["text"])
        elif method == "Runtime.consoleAPICalled" and params["type"] == "error":
            self.errors.append(str(params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])

    def evaluate(self, expression):
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, userGesture=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def open(self, url, width, height=900):
        self.errors.clear()
        self.requests.clear()
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Page.navigate", url=url)
        self.wait(lambda: self.evaluate("document.readyState") == "complete")

    def key(self, key, code=0, text=None):
        """Press and release a key, as a user's keyboard does."""
        for kind in ("keyDown", "keyUp"):
            extra = {"text": text} if text and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **extra)

    def screenshot(self, path):
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def wait(self, condition, seconds=120):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"timed out; errors: {self.errors}; state: {self.evaluate(PROBE)}"
            time.sleep(0.1)

    def close(self):
        if self.socket is not None:
            self.socket.close()
        self.process.terminate()
        self.process.wait()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


def probe(browser):
    return json.loads(browser.evaluate(PROBE))


def set_value(browser, selector, value, event="change"):
    browser.evaluate(
        f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.value = {json.dumps(value)}; "
        f"e.dispatchEvent(new Event({json.dumps(event)}, {{bubbles: true}})); }})()"
    )


def shown(browser):
    """Prompts of the visible cards, in their order."""
    cards = "[...document.querySelectorAll('.card')].filter((c) => c.checkVisibility())"
    return json.loads(browser.evaluate(f"JSON.stringify({cards}.map((c) => c.querySelector('.prompt').textContent))"))


@needs_chromium
@pytest.mark.parametrize("width", [375, 1440])
def test_page_plays_and_fits(report, browser, width):
    browser.open(report.as_uri(), width)
    state = probe(browser)
    assert state["width"] <= state["inner"] == width and state["wide"] == 0
    browser.evaluate("document.querySelector('.cards').scrollIntoView()")
    browser.wait(lambda: probe(browser)["open"] >= 4 and probe(browser)["playing"] == probe(browser)["open"])
    state = probe(browser)
    assert state["blank"] == 0 and state["wide"] == 0 and state["button"] == "Pause all"
    assert state["total"] == 42 and 4 <= state["loaded"] <= 30  # far ones are not decoded
    assert state["title"].startswith("A run <script>")
    # all at the same moment, also after they started again at the end (2.1 s)
    for _ in range(2):
        now = max(state["times"])
        browser.wait(lambda now=now: max(probe(browser)["times"]) < now)
        browser.wait(lambda: probe(browser)["playing"] == probe(browser)["open"])
        state = probe(browser)
    assert browser.errors == []
    assert [u for u in browser.requests if not u.startswith(("data:", "file:", "blob:"))] == []
    assert [u for u in browser.requests if u.startswith("file:")] == [report.as_uri()]

    browser.key(" ", 32, " ")
    browser.wait(lambda: probe(browser)["playing"] == 0 and probe(browser)["button"] == "Play all")
    set_value(browser, "#scrub", "500", "input")
    middle = lambda: probe(browser)["times"]  # noqa: E731
    browser.wait(lambda: all(abs(t - 2.125 / 2) < 0.03 for t in middle()) and len(middle()) >= 4)
    browser.wait(lambda: browser.evaluate("[...player.active].every((v) => !v.seeking && v.readyState >= 2)"))
    assert probe(browser)["blank"] == 0
    # the long prompt scrolls in a box of its own, and so does everything hostile
    heights = json.loads(
        browser.evaluate("JSON.stringify([...document.querySelectorAll('.prompt')].map((p) => p.clientHeight))")
    )
    assert max(heights) <= 6 * 16 * 1.5 and len(heights) >= 14
    browser.evaluate("document.querySelector('details').open = true; scrollTo(0, document.body.scrollHeight)")
    assert probe(browser)["wide"] == 0 and browser.errors == []


TIP = """(() => {
  const chart = document.querySelectorAll(".chart")[INDEX], tip = chart.querySelector("output"), box = tip.getBoundingClientRect();
  return JSON.stringify({shown: !tip.hidden, lines: [...tip.children].map((line) => line.innerText.split(/\\s+/).join(" ")),
    marks: [...chart.querySelectorAll(".mark")].map((m) => [Number(m.getAttribute("cx")), Number(m.getAttribute("cy"))]),
    inside: box.left >= 0 && box.right <= document.documentElement.clientWidth});
})()"""


@needs_chromium
@pytest.mark.parametrize("width", [375, 1440])
def test_charts_show_their_values(report, browser, width):
    """Under the pointer, at a touch and by the arrow keys; the values are those of the data at the nearest step."""
    browser.open(report.as_uri(), width)
    browser.evaluate("document.querySelector('#curves').scrollIntoView()")

    def tip(index):
        return json.loads(browser.evaluate(TIP.replace("INDEX", str(index))))

    def move(index, share):
        box = json.loads(
            browser.evaluate(
                f"JSON.stringify(document.querySelectorAll('.chart svg')[{index}].getBoundingClientRect())"
            )
        )
        x, y = box["x"] + share * box["width"], box["y"] + box["height"] / 2
        browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    assert not tip(0)["shown"] and not tip(1)["shown"]
    move(0, 0.3)  # of two lines both have a value at 0, and the nearer one is chosen
    assert tip(0)["lines"] == ["step 0", "a 1", "b 0.5"] and len(tip(0)["marks"]) == 2 and tip(0)["inside"]
    move(0, 0.9)
    assert tip(0)["lines"] == ["step 20", "a 0.25"] and len(tip(0)["marks"]) == 1 and tip(0)["inside"]
    ends = "[...document.querySelectorAll('.chart')[0].querySelectorAll('circle:not(.mark)')]"
    ends = browser.evaluate(f"JSON.stringify({ends}.map((c) => [+c.getAttribute('cx'), +c.getAttribute('cy')]))")
    assert tip(0)["marks"][0] == pytest.approx(json.loads(ends)[1], abs=0.1)  # where the server drew the point
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=2, y=2)
    assert not tip(0)["shown"] and tip(0)["marks"] == []

    browser.evaluate("document.querySelector('.chart svg').previousElementSibling.scrollIntoView()")
    browser.evaluate("document.querySelectorAll('.chart svg')[1].focus({focusVisible: true})")
    assert tip(1)["lines"] == ["sigma 0.9", "step 20 9"] and tip(1)["inside"]
    browser.key("ArrowLeft", 37)
    assert tip(1)["lines"] == ["sigma 0.8", "step 20 8"]
    browser.key("Home", 36)
    browser.key("ArrowLeft", 37)
    assert tip(1)["lines"] == ["sigma 0.1", "step 20 1"]
    assert browser.evaluate("document.activeElement.blur()") is None and not tip(1)["shown"]
    assert browser.errors == [] and probe(browser)["wide"] == 0


@needs_chromium
def test_results_are_sorted_by_any_column(report, browser):
    browser.open(report.as_uri(), 1440)
    rows = "JSON.stringify([...document.querySelectorAll('.results tbody tr')].map((r) => r.cells[0].firstChild.textContent))"
    press = lambda i: browser.evaluate(f"document.querySelectorAll('.results thead button')[{i}].click()")  # noqa: E731
    headings = browser.evaluate(
        "[...document.querySelectorAll('.results thead button')].map((b) => b.textContent).join()"
    )
    assert headings == "Stage,All three right,Reward,Evaluations,A clip takes,Training took,Peak memory"
    for column, up, down in (
        (1, [0, 2, 1], [1, 2, 0]),
        (2, [2, 0, 1], [2, 0, 1]),  # what has no value stays last, as it stood
        (3, [2, 0, 1], [0, 1, 2]),
        (5, [1, 2, 0], [2, 1, 0]),
        (0, [0, 1, 2], [2, 1, 0]),
    ):
        press(0)
        if browser.evaluate("document.querySelector('.results th').ariaSort") == "descending":
            press(0)
        if column:
            press(column)
        assert json.loads(browser.evaluate(rows)) == [MODELS[i] for i in up]
        press(column)
        if column != 3 and column != 2:
            assert json.loads(browser.evaluate(rows)) == [MODELS[i] for i in down]
        assert browser.evaluate(f"document.querySelectorAll('.results thead th')[{column}].ariaSort") == "descending"
    assert browser.errors == []


@needs_chromium
def test_prompts_are_filtered_and_sorted(report, browser):
    browser.open(report.as_uri(), 1440)
    every = [HOSTILE if i == 1 else r"\u202e" + LONG[1:] if i == 2 else c for i, c in enumerate(captions()[:14])]
    assert shown(browser) == every[:12]
    browser.evaluate("document.querySelector('.more').click()")
    assert shown(browser) == every and not browser.evaluate("document.querySelector('.more').checkVisibility()")

    set_value(browser, "[type=search]", "MOVING left", "input")
    # 1 is hostile in both; of 2 the enhanced prompt alone could be found
    assert shown(browser) == [p for i, p in enumerate(every) if "moving left" in captions()[i] and i != 1]
    assert "filtered out" in browser.evaluate("document.querySelector('.count').textContent")
    set_value(browser, "[type=search]", "", "input")

    # wrong in: base 1 3 5 7 9 11 13, SFT 4, GRPO 4 7
    for condition, model, wanted in (
        ("wrong", 0, [1, 3, 5, 7, 9, 11, 13]),
        ("wrong", 2, [4, 7]),
        ("only-wrong", 2, []),
        ("only-wrong", 0, [1, 3, 5, 9, 11, 13]),
        ("only-right", 0, [4]),
    ):
        set_value(browser, "[aria-label=Condition]", condition)
        set_value(browser, "[aria-label='Column of the filter']", MODELS[model])
        assert shown(browser) == [every[i] for i in wanted], (condition, model)
    # a column that is not shown does not count: 7 is wrong in base and GRPO
    browser.evaluate("document.querySelector('.chip input').click()")
    set_value(browser, "[aria-label='Column of the filter']", MODELS[2])
    set_value(browser, "[aria-label=Condition]", "only-wrong")
    assert shown(browser) == [every[7]]
    assert browser.evaluate("document.querySelector('.card figure').checkVisibility()") is False
    set_value(browser, "[aria-label=Condition]", "any")

    set_value(browser, "[aria-label=Score]", "flicker")
    set_value(browser, "[aria-label='Sort by']", "score")
    scores = [i * 5 % 14 for i in range(14)]
    assert shown(browser) == [every[scores.index(k)] for k in range(13, 1, -1)]
    browser.evaluate(
        "[...document.querySelectorAll('.tools button')].find((b) => b.textContent.includes('desc')).click()"
    )
    assert shown(browser) == [every[scores.index(k)] for k in range(12)]
    set_value(browser, "[aria-label=Condition]", "least")
    set_value(browser, "[type=number]", "3.0", "input")  # of GRPO: score / 10 + 2
    assert shown(browser) == [every[scores.index(k)] for k in range(10, 14)]
    set_value(browser, "[aria-label=Condition]", "any")
    set_value(browser, "[aria-label=Score]", "right")
    set_value(
        browser, "[aria-label='Sort by']", "difference"
    )  # GRPO - base, ascending: 4 fell, then equal, then risen
    set_value(browser, "[aria-label='Minus the column']", MODELS[0])
    assert shown(browser)[0] == every[4] and set(shown(browser)[1:8]) == {every[i] for i in (0, 2, 6, 8, 10, 12, 7)}
    assert browser.errors == []


@needs_chromium
def test_a_video_is_enlarged_by_keyboard(report, browser):
    browser.open(report.as_uri(), 1440)
    browser.evaluate("document.querySelector('.card:nth-child(4) .name button').focus()")
    browser.key("Enter", 13, "\r")
    big = "document.getElementById('big')"
    browser.wait(lambda: browser.evaluate(f"{big}.currentTime > 0 && {big}.clientWidth > 500"))
    assert browser.evaluate("document.getElementById('which').textContent") == MODELS[0]
    assert browser.evaluate("document.getElementById('large-enhanced').textContent") == ""
    browser.key("ArrowRight", 39)
    browser.key("ArrowRight", 39)
    browser.key("ArrowRight", 39)  # there is no fourth
    assert browser.evaluate("document.getElementById('which').textContent") == MODELS[2]
    assert captions()[3] in browser.evaluate("document.getElementById('large-enhanced').textContent")
    browser.wait(lambda: browser.evaluate(f"{big}.currentTime > 0"))
    browser.key("Escape", 27)
    browser.wait(lambda: not browser.evaluate("document.getElementById('large').open"))
    assert browser.evaluate("document.activeElement.ariaLabel") == f"Enlarge {MODELS[0]}" and browser.errors == []


@needs_chromium
def test_page_can_be_read_without_javascript(report, browser):
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(report.as_uri(), 375)
        tree = browser.call("DOM.getDocument", depth=-1)["root"]["nodeId"]
        find = lambda selector: browser.call("DOM.querySelectorAll", nodeId=tree, selector=selector)["nodeIds"]  # noqa: E731
        assert len(find("video[controls][src][poster]")) == 42 and len(find(".tools")) == 0
        first = find(".card:last-child video")[0]
        browser.call("DOM.scrollIntoViewIfNeeded", nodeId=first)
        assert browser.call("DOM.getBoxModel", nodeId=first)["model"]["height"] > 100
        size = browser.call("Page.getLayoutMetrics")["cssContentSize"]
        assert size["width"] == 375 and size["height"] > 5000
        assert len(find("#transport[hidden]")) == 1
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)


@needs_chromium
def test_linked_videos_play(videos, browser, tmp_path):
    clips = [Clip(caption, {"raw": raw, "clean": clean}) for caption, raw, clean in videos[:2]]
    page = write_report(tmp_path / "linked.html", title="t", summary="s", clips=clips, max_embedded=0)
    browser.open(page.as_uri(), 1440)
    browser.evaluate("document.querySelector('.cards').scrollIntoView()")
    browser.wait(lambda: probe(browser)["open"] == 4 == probe(browser)["playing"])
    assert probe(browser)["total"] == 4 and browser.errors == []
    assert {u.rsplit("/", 1)[1] for u in browser.requests if u.startswith("file:") and u.endswith(".mp4")} == {
        "raw0.mp4", "clean0.mp4", "raw1.mp4", "clean1.mp4"
    }  # fmt: skip


@needs_chromium
def test_steps_are_chosen_with_a_slider(videos, browser, tmp_path):
    clips = [
        Clip(caption, {"sample 1": raw, "sample 2": None}, scores={"sample 1": {"reward": i / 10}}, step=10 * (i // 2))
        for i, (caption, raw, _) in enumerate(videos[:6])
    ]
    clips[4].prompt = clips[1].prompt
    page = write_report(
        tmp_path / "steps.html",
        title="t",
        summary="s",
        galleries=[Gallery("Completions", clips, "note"), Gallery("", [])],
    )
    browser.open(page.as_uri(), 375)
    prompts = [clip.prompt for clip in clips]
    assert shown(browser) == prompts[4:6]  # the last step
    set_value(browser, "[aria-label='Training step']", "1", "input")
    assert (
        shown(browser) == prompts[2:4]
        and browser.evaluate("document.querySelector('.step output').textContent") == "step 10"
    )
    browser.evaluate(
        "[...document.querySelectorAll('button')].find((b) => b.textContent === 'First beside last').click()"
    )
    # the prompt that both steps have comes first, beside itself, then the others in the order of the steps
    assert shown(browser) == [prompts[1], prompts[1], prompts[0], prompts[5]]
    assert probe(browser)["wide"] == 0 and browser.errors == []


@needs_chromium
def test_of_many_columns_six_are_shown_at_first(videos, browser, tmp_path):
    caption, raw, _ = videos[0]
    clip = Clip(caption, {f"step {i}": raw for i in range(11)})
    page = write_report(tmp_path / "many.html", title="t", summary="s", clips=[clip])
    browser.open(page.as_uri(), 1440)
    columns = "[...document.querySelectorAll('figure')].filter((f) => f.checkVisibility()).map((f) => f.dataset.column).join()"
    press = "[...document.querySelectorAll('fieldset button')][0].click()"
    assert browser.evaluate(columns) == "step 0,step 2,step 4,step 6,step 8,step 10"
    browser.evaluate(press)
    assert browser.evaluate(columns) == "step 0,step 10"
    browser.evaluate(press)
    assert browser.evaluate(columns).count("step") == 11 and browser.errors == []


@needs_chromium
def test_browser_checks_can_fail(report, browser, tmp_path):
    """Negative control: a page with a script of its own, an outside request and a wide element is found out."""
    html = report.read_text().replace(
        "</main>", "<script>1</script><p><svg width='2000' height='9'></svg></p></main>", 1
    )
    html = html.replace('<h2 id="settings">Settings</h2>', '<img src="http://127.0.0.1:9/x.png">', 1)
    broken = tmp_path / "broken.html"
    broken.write_text(html)
    browser.open(broken.as_uri(), 375)
    state = probe(browser)
    assert state["width"] > 375 and state["wide"] > 0
    browser.wait(lambda: browser.evaluate("1") == 1 and len(browser.errors) >= 2)  # the CSP blocked script and image
