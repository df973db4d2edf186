"""The HTML report: escaping and statistics as text, and the page itself in a real headless Chromium."""

import json
import math
import re
import shutil
import subprocess
import time
import urllib.request
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vidtrl.data.video import write_video
from vidtrl.report import Chart, Clip, Estimate, Metric, mean_interval, paired_difference, share_interval, write_report
from vidtrl.report.charts import layout, nice_ticks
from vidtrl.toy import captions, render


HOSTILE = (
    '<script>document.title="owned"</script><img src="http://attacker.invalid/x.png" onerror="document.title=1">'
    "\"' {{ 7*7 }} &amp; </figcaption></main>" + "x" * 200
)


MODELS = ("base", "SFT", "SFT + GRPO")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report with 14 clips (2 of them folded away), a hostile prompt, a table and charts."""
    folder = tmp_path_factory.mktemp("report")
    clips = []
    for i, caption in enumerate(captions()[:14]):
        raw, clean = folder / f"raw{i}.mp4", folder / f"clean{i}.mp4"
        write_video(raw, render(caption, "raw", i), fps=8)
        write_video(clean, render(caption, "clean", i), fps=8)
        files = dict(zip(MODELS, (raw, raw, clean), strict=True))
        notes = dict.fromkeys(files, HOSTILE if i == 1 else "red circle right")
        clips.append(
            Clip(HOSTILE if i == 1 else caption, files, notes, dict.fromkeys(files, False) | {MODELS[2]: True})
        )
    values = dict(
        zip(MODELS, (Estimate(0.6, 0.5, 0.7), Estimate(0.7, 0.5, 0.8), Estimate(0.85, 0.75, 0.92)), strict=True)
    )
    changes = {MODELS[1]: Estimate(0.1, -0.05, 0.2), MODELS[2]: Estimate(0.15, 0.05, 0.25)}
    return write_report(
        folder / "report.html",
        title=f"A run {HOSTILE}",
        summary="It went well.",
        notes=[HOSTILE],
        metrics=[Metric("All three right", values, changes, percent=True, help="as asked")],
        clips=clips,
        charts=[
            Chart("Loss", {"a": [(0, 1.0), (10, math.nan), (20, 0.25)], "b": [(0, 0.5)]}, "step", "loss"),
            Chart("By noise level", {"step 20": [(s / 10, s) for s in range(1, 10)]}, "sigma", "loss", HOSTILE),
        ],
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


def test_hostile_texts_stay_text(report):
    page = _Tags()
    page.feed(report.read_text())
    assert page.tags.count("script") == 1 and "img" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert sum(HOSTILE in text for text in page.text) >= 7  # prompt, three notes, title, settings, paragraph
    assert page.tags.count("figcaption") == 14 + 2


def test_report_refers_to_nothing_outside(report):
    page = _Tags()
    page.feed(report.read_text())
    references = [value for name, value in page.attributes if name in ("src", "href", "data-src", "srcset", "poster")]
    assert len(references) == 3 * 14 + 1 and all(value.startswith("data:") for value in references)
    css = re.search(r"<style>(.*?)</style>", report.read_text(), re.S).group(1)
    assert "url(" not in css and "@import" not in css


def test_metrics_over_different_models_are_refused(tmp_path):
    one = Metric("a", {"base": Estimate(0, 0, 0)}, {})
    two = Metric("b", {"other": Estimate(0, 0, 0)}, {})
    three = Metric("c", {"base": Estimate(0, 0, 0)}, {"base": Estimate(0, 0, 0)})
    with pytest.raises(ValueError, match="'c' has differences of .'base'., which follow no model"):
        write_report(tmp_path / "r.html", title="t", summary="s", metrics=[one, three])
    with pytest.raises(ValueError, match="metric 'b' covers"):
        write_report(tmp_path / "r.html", title="t", summary="s", metrics=[one, two])
    assert not list(tmp_path.iterdir())  # nothing half-written
    with pytest.raises(ValueError, match="5 series"):
        Chart("c", {str(i): [(0, 0)] for i in range(5)}, "x", "y")


def test_verdict_follows_the_interval():
    def verdict(*interval, **kwargs):
        return Metric("m", {"a": Estimate(0, 0, 0)}, {"b": Estimate(*interval)}, **kwargs).verdict("b")

    assert verdict(0.2, 0.1, 0.3) == "better"
    assert verdict(0.2, 0.1, 0.3, higher_is_better=False) == "worse"
    assert verdict(-0.2, -0.3, -0.1, higher_is_better=False) == "better"
    assert verdict(0.2, -0.1, 0.5) == "unclear" and verdict(0, -0.1, 0.1) == "unclear"
    assert verdict(0, 0, 0) == "equal"


def test_each_change_stands_under_its_model(report):
    page = _Tags()
    page.feed(report.read_text())
    text = " ".join(" ".join(page.text).split())
    cells = text[text.index("as asked") : text.index("The small figures")]
    for part in ("60 %", "70 %", "+10 points, unclear", "85 %", "+15 points, better", "+5 to +25"):
        cells = cells[cells.index(part) :]  # in this order
    assert "points, worse" not in text and text.count("points,") == 2


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


def test_layout_skips_points_that_are_not_finite():
    chart = layout({"a": [(0, 1.0), (1, math.inf), (2, math.nan), (3, 2.0)], "empty": []})
    assert chart["lines"][0]["path"].count("L") == 1 and chart["lines"][1]["path"] == ""
    assert layout({"flat": [(0, 1.0), (5, 1.0)]})["lines"][0]["end"] is not None


# The page in a browser, over the DevTools protocol.

CHROMIUM = next((c for c in ("chromium", "chromium-browser", "google-chrome", "chrome") if shutil.which(c)), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium binary on PATH (apt-get install chromium)")
PROBE = """(() => {
  const videos = [...document.querySelectorAll("video")];
  const open = videos.filter((v) => v.checkVisibility()
    && v.getBoundingClientRect().top < innerHeight && v.getBoundingClientRect().bottom > 0);
  return JSON.stringify({
    open: open.length, playing: open.filter((v) => !v.paused && v.currentTime > 0 && v.videoWidth === 64).length,
    total: videos.length, loaded: videos.filter((v) => v.src).length,
    width: document.documentElement.scrollWidth, inner: document.documentElement.clientWidth,
    wide: [...document.querySelectorAll("body *")].filter((e) => !e.closest(".scroll")
      && e.getBoundingClientRect().right > document.documentElement.clientWidth + 1).length,
    title: document.title, button: document.getElementById("play").textContent});
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

    def wait(self, condition, seconds=30):
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


@needs_chromium
@pytest.mark.parametrize("width", [375, 1440])
def test_page_plays_and_fits(report, browser, width):
    browser.open(report.as_uri(), width)
    browser.evaluate("document.querySelector('.cards').scrollIntoView()")
    probe = lambda: json.loads(browser.evaluate(PROBE))  # noqa: E731
    browser.wait(lambda: probe()["open"] >= 4 and probe()["playing"] == probe()["open"])
    state = probe()
    assert state["width"] <= state["inner"] == width and state["wide"] == 0
    assert state["total"] == 42 and state["loaded"] <= 36  # folded clips are not decoded
    assert state["title"].startswith("A run <script>") and state["button"] == "Pause all videos"
    assert browser.errors == []
    assert [u for u in browser.requests if not u.startswith(("data:", "file:"))] == []
    assert [u for u in browser.requests if u.startswith("file:")] == [report.as_uri()]

    browser.evaluate("document.getElementById('play').click()")
    browser.wait(lambda: probe()["playing"] == 0)
    browser.evaluate(
        "document.querySelector('details').open = true; document.querySelector('details').scrollIntoView()"
    )
    browser.evaluate("document.getElementById('play').click()")
    browser.wait(lambda: probe()["open"] >= 2 and probe()["playing"] == probe()["open"])
    assert probe()["wide"] == 0 and browser.errors == []


@needs_chromium
def test_browser_checks_can_fail(report, browser, tmp_path):
    """Negative control: a page with a script of its own, an outside request and a wide element is found out."""
    html = report.read_text().replace("</main>", "<script>1</script><p style='width:2000px'>wide</p></main>", 1)
    html = html.replace("<h2>Settings</h2>", '<img src="http://127.0.0.1:9/x.png">', 1)
    broken = tmp_path / "broken.html"
    broken.write_text(html)
    browser.open(broken.as_uri(), 375)
    state = json.loads(browser.evaluate(PROBE))
    assert state["width"] > 375 and state["wide"] > 0
    browser.wait(lambda: browser.evaluate("1") == 1 and len(browser.errors) >= 2)  # the CSP blocked script and image
