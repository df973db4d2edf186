"""Good/Same/Bad comparison: pairing and statistics, the server over real sockets, and the page in a real browser."""

import http.client
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Video, load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from test_report import HOSTILE, Browser, needs_chromium

from vidtrl.cli.main import main
from vidtrl.data.video import write_video
from vidtrl.report import mean_interval
from vidtrl.report.compare import AXES, Comparison, Pair, export_preferences, find_clips, gsb, pair_clips, read_votes
from vidtrl.report.compare_server import CompareServer
from vidtrl.toy import captions, render


PROMPTS = [*captions()[:4], HOSTILE, captions()[0]]  # one hostile, one twice


def write_folder(folder, style, prompts=PROMPTS):
    folder.mkdir(parents=True)
    rows = []
    for i, prompt in enumerate(prompts):
        write_video(folder / f"{style}{i}.mp4", render(captions()[i], style, i), fps=8)
        rows.append(json.dumps({"file_name": f"{style}{i}.mp4", "prompt": prompt}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return write_folder(root / "tuned", "clean"), write_folder(root / "plain-model", "raw")


@pytest.fixture
def served(folders, tmp_path):
    """A comparison on a real server; yields both."""
    server = CompareServer(Comparison(*folders, tmp_path / "votes", seed=3))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server.comparison, server
    server.shutdown()
    server.server_close()
    thread.join()


# ---- Which clips belong together ----


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


def test_prompts_are_found_where_each_command_writes_them(tmp_path):
    demo = tmp_path / "demo"
    touch(demo / "videos" / "base", "000.mp4", "001.mp4")
    jobs = [{"prompt": f"p{i}", "seed": i, "file": f"{i:03d}.mp4"} for i in range(3)]  # 002 is not generated yet
    (demo / "jobs.json").write_text(json.dumps(jobs))
    assert find_clips(demo / "videos" / "base") == [("p0", "000.mp4"), ("p1", "001.mp4")]

    step = tmp_path / "validation" / "step_000010"
    touch(step, "00-a.mp4")
    (step / "prompts.json").write_text(json.dumps({"00-a.mp4": "a"}))
    assert find_clips(step) == [("a", "00-a.mp4")]

    log = tmp_path / "completions"
    touch(log, "step_000001/00-a.mp4", "step_000002/00-a.mp4", "step_000002/01-a.mp4")
    for number, videos in ((1, ["00-a"]), (2, ["00-a", "01-a"])):
        videos = [f"step_{number:06d}/{name}.mp4" for name in videos]
        table = pa.table({"prompt": ["a\u2028b"] * len(videos), "video": videos, "seed": range(len(videos))})
        pq.write_table(table, log / f"completions_{number:05d}.parquet")
    everything = [("a\u2028b", f"step_{s}.mp4") for s in ("000001/00-a", "000002/00-a", "000002/01-a")]
    assert find_clips(log) == everything
    assert find_clips(log / "step_000002") == [("a\u2028b", "00-a.mp4"), ("a\u2028b", "01-a.mp4")]
    rows = [{"file_name": name, "prompt": prompt, "seed": 1} for prompt, name in everything]
    (log / "metadata.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    assert find_clips(log) == everything and len(find_clips(log / "step_000002")) == 2


def test_the_trainers_own_completion_log_is_read(tmp_path):
    import torch

    from vidtrl.trainer.completions import CompletionLog

    log = CompletionLog(tmp_path, num_print=0)
    log.write(7, ["red", "blue"], [torch.zeros(2, 3, 16, 16)] * 2, {"r": [0.0, None]}, [0.0, 0.0], [1, 2])
    assert [prompt for prompt, _ in find_clips(log.folder)] == ["red", "blue"]
    assert find_clips(log.folder)[0][1] == "step_000007/00-red.mp4"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file_name": "../secret.mp4", "prompt": "p"}', "inside the folder"),
        ('{"file_name": "/etc/secret.mp4", "prompt": "p"}', "inside the folder"),
        ('{"file_name": "metadata.jsonl", "prompt": "p"}', "must be an mp4"),
        ('{"file_name": "a.mp4"}', 'needs "file_name" and "prompt"'),
        ('{"file_name": "a.mp4", "prompt": 3}', "must be text"),
        ("[1, 2", 'needs "file_name" and "prompt"'),
    ],
)
def test_malformed_lists_are_refused(tmp_path, line, message):
    touch(tmp_path, "a/a.mp4", "secret.mp4")
    (tmp_path / "a" / "metadata.jsonl").write_text(line)
    with pytest.raises(ValueError, match=message):
        find_clips(tmp_path / "a")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from("pqrs"), max_size=7), st.lists(st.sampled_from("pqrs"), max_size=7), st.integers(0, 9))
def test_pairs_share_prompt_and_order(tmp_path_factory, a, b, seed):
    root = tmp_path_factory.mktemp("pairs")
    for name, prompts in (("a", a), ("b", b)):
        touch(root / name, *(f"{i}.mp4" for i in range(len(prompts))))
        rows = [json.dumps({"file_name": f"{i}.mp4", "prompt": p}) for i, p in enumerate(prompts)]
        (root / name).mkdir(exist_ok=True)
        (root / name / "metadata.jsonl").write_text("\n".join(rows))
    if not set(a) & set(b):
        with pytest.raises(ValueError, match="no prompt in common: generate both with the same prompts"):
            pair_clips(root / "a", root / "b", seed)
        return
    pairs, alone_a, alone_b = pair_clips(root / "a", root / "b", seed)
    assert len(pairs) == sum(min(a.count(p), b.count(p)) for p in "pqrs")
    assert len(pairs) + len(alone_a) == len(a) and len(pairs) + len(alone_b) == len(b)
    for prompt in "pqrs":
        mine = sorted((p for p in pairs if p.prompt == prompt), key=lambda p: p.number)
        for side, prompts in (("video_a", a), ("video_b", b)):
            files = [f"{i}.mp4" for i, p in enumerate(prompts) if p == prompt]
            assert [getattr(pair, side) for pair in mine] == files[: len(mine)]
    assert pair_clips(root / "a", root / "b", seed)[0] == pairs


def test_order_and_side_are_random_and_then_stay(folders, tmp_path):
    orders, first = set(), 0
    for seed in range(60):
        pairs = pair_clips(*folders, seed)[0]
        orders.add(tuple((p.prompt, p.number) for p in pairs))
        first += sum(p.a_first for p in pairs)
    assert len(orders) > 50
    assert abs(first / 360 - 0.5) < 4 * 0.5 / math.sqrt(360)
    shown = [(p.video_a, p.a_first) for p in Comparison(*folders, tmp_path / "v").pairs]
    for _ in range(4):  # another draw would agree by chance with 1 in 6! x 2^6
        assert [(p.video_a, p.a_first) for p in Comparison(*folders, tmp_path / "v").pairs] == shown


# ---- Votes on disk ----


def test_votes_are_on_disk_at_once_and_mean_the_same_video(folders, tmp_path):
    comparison = Comparison(*folders, tmp_path, seed=0)
    for i, pair in enumerate(comparison.pairs):
        comparison.vote(i, "motion_quality", "first" if pair.a_first else "second")  # always A, wherever it is shown
    names, pairs = read_votes(tmp_path)
    assert names == ("tuned", "plain-model") and [p.votes for p in pairs] == [{"motion_quality": "good"}] * 6
    assert {p.a_first for p in pairs} == {True, False}
    again = Comparison(*folders, tmp_path)
    assert again.pairs == comparison.pairs and again.results()["motion_quality"].good == 6
    again.vote(2, "motion_quality", None)
    again.vote(3, "motion_quality", "same")
    assert read_votes(tmp_path)[1][2].votes == {} and again.results()["motion_quality"][:3] == (4, 1, 0)
    rows = load_dataset("parquet", data_files=str(tmp_path / "votes.parquet"), split="train")
    assert rows[0]["motion_quality"] == "good" and rows[0]["visual_quality"] is None
    assert [p.name for p in tmp_path.iterdir()] == ["votes.parquet"]
    for wrong in ((99, AXES[0], "same"), (-1, AXES[0], "same"), (0, "taste", "same"), (0, AXES[0], "good")):
        with pytest.raises(ValueError, match=r"there is no pair|cannot vote"):
            again.vote(*wrong)


def test_new_clips_come_last_and_other_videos_are_refused(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    for folder in (a, b):
        touch(folder, *(f"{folder.name}/../{i}.mp4" for i in range(4)))
        (folder / "0.mp4").write_bytes(folder.name.encode())
        rows = [json.dumps({"file_name": f"{i}.mp4", "prompt": f"p{i}"}) for i in range(4)]
        (folder / "metadata.jsonl").write_text("\n".join(rows))
    (a / "3.mp4").unlink()
    comparison = Comparison(a, b, tmp_path / "v")
    index = next(i for i, p in enumerate(comparison.pairs) if p.prompt == "p0")
    comparison.vote(index, "visual_quality", "first")
    (a / "3.mp4").write_bytes(b"late")
    grown = Comparison(a, b, tmp_path / "v")
    assert grown.pairs[:3] == comparison.pairs and grown.pairs[3].prompt == "p3" and not comparison.unpaired_a
    with pytest.raises(ValueError, match="A and B were exchanged"):
        Comparison(b, a, tmp_path / "v")
    (a / "0.mp4").write_bytes(b"another video of the same name")
    with pytest.raises(ValueError, match="choose another --output"):
        Comparison(a, b, tmp_path / "v")
    assert read_votes(tmp_path / "v")[1][index].votes  # the refusal has not touched the file
    with pytest.raises(ValueError, match="are the same folder"):
        pair_clips(a, b / ".." / "a")


def test_a_vote_that_cannot_be_written_is_not_kept(folders, tmp_path):
    comparison = Comparison(*folders, tmp_path / "v")
    shutil.rmtree(tmp_path / "v")
    (tmp_path / "v").write_text("a file where the folder was")
    with pytest.raises(OSError):
        comparison.vote(0, AXES[0], "same")
    assert comparison.pairs[0].votes == {}


def test_two_processes_do_not_overwrite_each_others_votes(folders, tmp_path):
    one = Comparison(*folders, tmp_path)
    two = Comparison(*folders, tmp_path)  # has only looked
    one.vote(0, AXES[0], "same")
    with pytest.raises(ValueError, match="end this one and start it again"):
        two.vote(1, AXES[0], "same")
    one.vote(2, AXES[0], "same")
    assert [bool(pair.votes) for pair in read_votes(tmp_path)[1]] == [True, False, True, False, False, False]


# ---- What the votes say ----


def judged(votes, prompts=None):
    prompts = prompts or [f"p{i}" for i in range(len(votes))]
    return [Pair(p, 0, "", "", "", "", True, {AXES[0]: vote}) for p, vote in zip(prompts, votes, strict=True)]


def test_gsb_against_the_closed_form():
    good, same, bad = 120, 50, 30
    result = gsb(judged(["good"] * good + ["same"] * same + ["bad"] * bad), AXES[0])
    n = good + same + bad
    expected = (good - bad) / n
    half = 1.96 * math.sqrt(((good + bad) / n - expected**2) / n)  # the variance of a score in {-1, 0, 1}
    assert result[:3] == (good, same, bad) and result.gsb.value == pytest.approx(expected)
    assert result.gsb.low == pytest.approx(expected - half, abs=0.01)
    assert result.gsb.high == pytest.approx(expected + half, abs=0.01)
    # with one pair a prompt it is the bootstrap of a mean
    assert result.gsb == pytest.approx(mean_interval([1] * good + [0] * same + [-1] * bad))
    assert gsb(judged(["good"]), AXES[1]).gsb is None and gsb([], AXES[0]) == (0, 0, 0, None)


def test_interval_covers_no_difference_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = [0.0 >= r.low and 0.0 <= r.high for r in (_random_gsb(rng, (0.4, 0.2, 0.4)) for _ in range(200))]
    assert 0.90 <= np.mean(hits) <= 0.99
    found = [r.low > 0 for r in (_random_gsb(rng, (0.6, 0.2, 0.2)) for _ in range(50))]
    assert np.mean(found) > 0.9  # negative control: a real preference is found


def _random_gsb(rng, shares):
    return gsb(judged(rng.choice(["good", "same", "bad"], size=80, p=shares).tolist()), AXES[0]).gsb


def test_interval_knows_that_clips_of_one_prompt_agree():
    votes = ["good"] * 40 + ["bad"] * 24
    prompts = [f"p{i // 8}" for i in range(64)]  # eight clips each, of one mind
    together, apart = gsb(judged(votes, prompts), AXES[0]).gsb, gsb(judged(votes), AXES[0]).gsb
    assert together.value == apart.value
    assert together.high - together.low > 2 * (apart.high - apart.low)  # sqrt(8) in the limit


def test_prompts_with_many_clips_weigh_as_many_votes():
    votes, prompts = ["good"] * 12 + ["bad"] * 4, ["many"] * 12 + ["p0", "p1", "p2", "p3"]
    result = gsb(judged(votes, prompts), AXES[0]).gsb
    assert result.value == 0.5 and -1 <= result.low < 0 and 0.5 < result.high <= 1  # a share in each resample, too


def test_preferences_export_as_a_dataset(folders, tmp_path):
    comparison = Comparison(*folders, tmp_path / "v", seed=1)
    wanted = [("good", "good", "bad"), ("bad", "same", "same"), ("good", "same", "bad"), ("good", "good")]
    for i, votes in enumerate(wanted):
        for axis, vote in zip(AXES, votes, strict=False):
            first = comparison.pairs[i].a_first == (vote == "good")
            comparison.vote(i, axis, "same" if vote == "same" else "first" if first else "second")
    folder, rows, ties = export_preferences(comparison, tmp_path / "preferences")
    assert (rows, ties) == (2, 1)  # the fourth pair is not judged on every axis
    dataset = load_dataset(str(folder), split="train")
    assert set(dataset.column_names) == {"prompt", "chosen", "rejected"}
    assert isinstance(dataset.features["chosen"], Video) and isinstance(dataset.features["rejected"], Video)
    for column in ("chosen", "rejected"):
        dataset = dataset.cast_column(column, Video(decode=False))
    for row, pair, better in zip(dataset, comparison.pairs, ("a", "b"), strict=False):
        worse = "b" if better == "a" else "a"
        assert row["prompt"] == pair.prompt
        for column, side in (("chosen", better), ("rejected", worse)):
            assert Path(row[column]["path"]).read_bytes() == comparison.video(pair, side).read_bytes()
    assert export_preferences(comparison, tmp_path / "text", "text_alignment")[1:] == (2, 1)
    with pytest.raises(ValueError, match="is not empty"):
        export_preferences(comparison, folder)
    with pytest.raises(ValueError, match="no pair has a preference"):
        export_preferences(Comparison(*folders, tmp_path / "none"), tmp_path / "empty")
    assert not (tmp_path / "empty").exists()


# ---- The server ----


def ask(server, path, method="GET", body=None, headers=None, token=None):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.request(method, f"/{server.token if token is None else token}/{path}", body, headers or {})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer, content


def test_server_is_bound_to_loopback_and_wants_its_token(served):
    _, server = served
    assert server.server_address[0] == "127.0.0.1" and len(server.token) >= 20
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/[\w-]+/", server.url)
    for path, method in (("", "GET"), ("pairs", "GET"), ("video/0/first", "GET"), ("vote", "POST")):
        for token in ("wrong", "", server.token[:-1], "%2e%2e"):
            answer, content = ask(server, path, method, b"{}" if method == "POST" else None, token=token)
            assert answer.status == 403 and content == b"Forbidden"
    assert ask(server, "")[0].status == 200
    for path, status in (
        ("/\xe9/pairs", b"403"),
        (f"/{server.token}/video/\u0663/first", b"404"),
    ):  # http.client refuses these
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=10) as connection:
            connection.sendall(f"GET {path} HTTP/1.1\r\nConnection: close\r\n\r\n".encode())
            assert connection.recv(99).split()[1] == status
    other = CompareServer(served[0])
    other.server_close()
    assert other.token != server.token


@pytest.mark.parametrize(
    "path",
    [
        "../../etc/passwd",
        "video/../../x/first",
        "video/%2e%2e%2f0/first",
        "video/0/a",
        "video/99/first",
        "video/-1/first",
    ]
    + ["compare.html", "templates/report.html", "votes.parquet", "//etc/passwd", "video/0/first/"],
)
def test_nothing_but_the_pages_and_the_videos_is_served(served, path):
    assert ask(served[1], path)[0].status == 404


def test_videos_come_in_ranges(served):
    comparison, server = served
    pair = comparison.pairs[0]
    whole = comparison.video(pair, "a" if pair.a_first else "b").read_bytes()
    answer, content = ask(server, "video/0/first")
    assert answer.status == 200 and content == whole and answer.headers["Accept-Ranges"] == "bytes"
    other = comparison.video(pair, "b" if pair.a_first else "a").read_bytes()
    assert ask(server, "video/0/second")[1] == other != whole
    n = len(whole)
    for text, start, end in (
        ("0-", 0, n),
        ("5-9", 5, 10),
        (f"{n - 3}-{n + 99}", n - 3, n),
        ("-7", n - 7, n),
        (f"-{2 * n}", 0, n),
    ):
        answer, content = ask(server, "video/0/first", headers={"Range": f"bytes={text}"})
        assert answer.status == 206 and content == whole[start:end]
        assert answer.headers["Content-Range"] == f"bytes {start}-{end - 1}/{n}"
    for text in (f"{n}-", "-0", "9-5"):
        answer, _ = ask(server, "video/0/first", headers={"Range": f"bytes={text}"})
        assert answer.status == 416 and answer.headers["Content-Range"] == f"bytes */{n}"
    for text in ("bytes=-", "bytes=0-1,4-5", "lines=1-2"):
        assert ask(server, "video/0/first", headers={"Range": text})[1] == whole


def test_wrong_votes_change_nothing(served):
    comparison, server = served
    bodies = [b"", b"{", b"[]", b'{"pair": 0}', b'{"pair": 99, "axis": "visual_quality", "choice": "same"}']
    bodies += [b'{"pair": true, "axis": "visual_quality", "choice": "same"}', b'{"pair": 0, "axis": [], "choice": {}}']
    for body in bodies:
        assert ask(server, "vote", "POST", body)[0].status == 400
    assert ask(server, "vote", "POST", b"x" * 5000)[0].status == 413
    assert ask(server, "pairs", "POST", b"{}")[0].status == 404
    assert not any(pair.votes for pair in comparison.pairs)
    good = {"pair": 0, "axis": "visual_quality", "choice": "first"}
    assert ask(server, "vote", "POST", json.dumps(good))[0].status == 200
    assert read_votes(comparison.output)[1][0].votes


def test_the_page_cannot_tell_which_is_which(served):
    comparison, server = served
    for path in ("", "compare.js", "pairs", "video/0/first", "video/0/second"):
        answer, content = ask(server, path)
        seen = str(answer.headers).encode() + (b"" if path.startswith("video") else content)
        for secret in (b"tuned", b"plain-model", b"clean", b"raw0", b"a_first", str(comparison.output).encode()):
            assert secret not in seen
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    answer, content = ask(server, "results")
    assert answer.status == 409 and b"tuned" not in content  # names only after the last vote


# ---- The page ----


STATE = """(() => {
  const videos = [...document.querySelectorAll("video")];
  return JSON.stringify({
    playing: videos.filter((v) => !v.paused && v.currentTime > 0 && v.videoWidth === 64).length,
    times: videos.map((v) => v.currentTime), src: videos.map((v) => v.src),
    width: document.documentElement.scrollWidth, inner: document.documentElement.clientWidth,
    wide: [...document.querySelectorAll("body *")].filter((e) =>
      e.getBoundingClientRect().right > document.documentElement.clientWidth + 1).map((e) => e.outerHTML.slice(0, 80)),
    pressed: [...document.querySelectorAll(".axis")].map((row) =>
      row.querySelector("[aria-pressed=true]")?.dataset.choice ?? null),
    active: [...document.querySelectorAll(".axis")].findIndex((row) => row.classList.contains("active")),
    prompt: document.getElementById("prompt").textContent, where: document.getElementById("where").textContent,
    message: document.getElementById("message").hidden ? "" : document.getElementById("message").textContent,
    results: document.getElementById("results").hidden ? "" : document.getElementById("results").innerText,
    title: document.title, images: document.images.length, scripts: document.scripts.length});
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


def state(browser):
    return json.loads(browser.evaluate(STATE))


def press(browser, *keys):
    """Real key events, as from a keyboard."""
    for key in keys:
        text = {"Enter": "\r", "Space": " "}.get(key, key if len(key) == 1 else "")
        name = {"Space": " "}.get(key, key)
        for kind in ("keyDown", "keyUp"):
            extra = {"text": text} if text and kind == "keyDown" else {}
            browser.call("Input.dispatchKeyEvent", type=kind, key=name, **extra)


def click(browser, selector):
    """A real click in the middle of an element."""
    x, y = json.loads(
        browser.evaluate(
            f"""(() => {{ const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: "center"}});
            const r = e.getBoundingClientRect(); return JSON.stringify([r.x + r.width / 2, r.y + r.height / 2]); }})()"""
        )
    )
    for kind in ("mousePressed", "mouseReleased"):
        browser.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)


def reload(browser):
    browser.evaluate("window.before = true")  # the old page answers for a while after the call
    browser.call("Page.reload")
    browser.wait(lambda: browser.evaluate("!window.before && document.readyState === 'complete'"))
    browser.wait(lambda: state(browser)["playing"] == 2)


def votes_on_disk(comparison):
    return [pair.votes for pair in read_votes(comparison.output)[1]]


@needs_chromium
@pytest.mark.parametrize("width", [375, 1440])
def test_rating_in_the_browser(served, browser, width):
    comparison, server = served
    pairs = comparison.pairs
    browser.open(server.url, width)
    browser.wait(lambda: state(browser)["playing"] == 2)
    seen = state(browser)
    assert seen["prompt"] == pairs[0].prompt and seen["where"] == "Pair 1 of 6, 0 judged"
    assert seen["width"] <= seen["inner"] == width and seen["wide"] == []

    press(browser, "g", "S", "b")  # each goes to the next axis
    browser.wait(lambda: len(votes_on_disk(comparison)[0]) == 3)
    assert state(browser)["pressed"] == ["first", "same", "second"]
    a, b = ("good", "bad") if pairs[0].a_first else ("bad", "good")
    assert votes_on_disk(comparison)[0] == {"visual_quality": a, "motion_quality": "same", "text_alignment": b}
    press(browser, "ArrowUp", "Backspace")
    browser.wait(lambda: "motion_quality" not in votes_on_disk(comparison)[0])
    press(browser, "b", "Enter")
    browser.wait(lambda: state(browser)["where"] == "Pair 2 of 6, 1 judged" and state(browser)["playing"] == 2)
    assert votes_on_disk(comparison)[0]["motion_quality"] == b
    click(browser, ".axis:nth-child(2) [data-choice=first]")
    browser.wait(lambda: votes_on_disk(comparison)[1])
    assert list(votes_on_disk(comparison)[1]) == ["motion_quality"] and state(browser)["active"] == 0
    press(browser, "Enter", "p")  # the button that was clicked does not swallow the key
    browser.wait(lambda: state(browser)["where"] == "Pair 2 of 6, 1 judged" and state(browser)["playing"] == 2)
    assert len(votes_on_disk(comparison)[1]) == 1

    before = state(browser)
    reload(browser)
    after = state(browser)
    for key in ("where", "prompt", "pressed", "src", "active"):  # the same pair, the same sides, the same votes
        assert after[key] == before[key]
    assert after["pressed"] == [None, "first", None]
    press(browser, "p")
    browser.wait(lambda: state(browser)["pressed"] == ["first", "second", "second"])
    reload(browser)  # a judged pair, too, and not the next open one
    assert state(browser)["where"] == "Pair 1 of 6, 1 judged"
    browser.evaluate(
        "document.querySelector('main').append(Object.assign(element('p', 'wide'), {style: 'width: 2000px'}))"
    )
    assert state(browser)["width"] > width and state(browser)["wide"]  # negative control: what does not fit is found
    assert browser.errors == []
    assert {url[: len(server.url)] for url in browser.requests if not url.startswith("data:")} == {server.url}


@needs_chromium
def test_hostile_prompt_is_text_and_the_end_shows_results(served, browser):
    comparison, server = served
    for i, pair in enumerate(comparison.pairs[:-1]):
        for axis in AXES:
            comparison.vote(i, axis, "first" if pair.a_first else "second")
    hostile = next(i for i, pair in enumerate(comparison.pairs) if pair.prompt == HOSTILE)
    browser.open(f"{server.url}#{hostile + 1}", 375)
    browser.wait(lambda: state(browser)["playing"] == 2)
    seen = state(browser)
    assert seen["prompt"] == HOSTILE and seen["title"] == "Compare videos"
    assert (seen["images"], seen["scripts"]) == (0, 1) and seen["width"] <= 375 and seen["wide"] == []
    browser.open("about:blank", 375)
    browser.open(server.url, 375)  # without a number: the first pair that is not judged
    browser.wait(lambda: state(browser)["where"] == "Pair 6 of 6, 5 judged" and state(browser)["results"] == "")
    press(browser, "s", "s", "s")
    browser.wait(lambda: "tuned" in state(browser)["results"])
    seen = state(browser)
    assert seen["where"] == "Pair 6 of 6, 6 judged" and "+0.83 (" in seen["results"]
    assert seen["width"] <= 375 and seen["wide"] == [] and browser.errors == []
    assert [url for url in browser.requests if not url.startswith((server.url, "data:"))] == []


@needs_chromium
def test_both_videos_pause_seek_and_start_together(served, browser):
    browser.open(served[1].url, 1440)
    browser.wait(lambda: state(browser)["playing"] == 2)
    press(browser, "Space")
    browser.wait(lambda: state(browser)["playing"] == 0)
    browser.evaluate("(() => { const s = at('scrub'); s.value = 0.5; s.dispatchEvent(new Event('input')); })()")
    duration = browser.evaluate("seconds()")
    browser.wait(lambda: browser.evaluate("players.every((v) => !v.seeking)"))
    assert duration > 1 and state(browser)["times"] == pytest.approx([duration / 2] * 2, abs=0.02)
    press(browser, "r")
    browser.wait(lambda: state(browser)["playing"] == 2)
    assert browser.evaluate("Math.abs(players[0].currentTime - players[1].currentTime)") < 0.2
    browser.evaluate("window.starts = 0; players[0].addEventListener('seeked', () => { window.starts += 1; })")
    browser.wait(lambda: browser.evaluate("window.starts") >= 1 and state(browser)["playing"] == 2)  # again at the end
    assert browser.errors == []


@needs_chromium
def test_a_vote_that_is_not_saved_is_taken_back_and_said(served, browser):
    """Also the negative control of the console check: a failed request is found there."""
    comparison, server = served
    browser.open(server.url, 1440)
    browser.wait(lambda: state(browser)["playing"] == 2)
    token, server.token = server.token, "another"  # as a server that was started anew has
    press(browser, "g")
    browser.wait(lambda: "not saved" in state(browser)["message"])
    assert state(browser)["pressed"] == [None] * 3 and votes_on_disk(comparison)[0] == {} and browser.errors
    server.token = token
    press(browser, "g")
    browser.wait(lambda: votes_on_disk(comparison)[0] and state(browser)["message"] == "")


@needs_chromium
def test_a_video_that_cannot_be_played_is_said(folders, tmp_path, browser):
    a = shutil.copytree(folders[0], tmp_path / "a")
    for path in a.glob("*.mp4"):
        path.write_bytes(b"no video")
    server = CompareServer(Comparison(a, folders[1], tmp_path / "v"))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    browser.open(server.url, 1440)
    browser.wait(lambda: state(browser)["message"])
    assert "video of this pair cannot be played. Is its file whole" in state(browser)["message"]
    assert state(browser)["playing"] == 0
    server.shutdown()
    server.server_close()
    thread.join()


# ---- The command ----


def test_command_starts_without_torch():
    code = "import sys, vidtrl.cli.compare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_command_serves_resumes_and_ends_with_the_table(folders, tmp_path):
    output = tmp_path / "v"
    command = [sys.executable, "-m", "vidtrl.cli.main", "compare", *map(str, folders), "--output", str(output)]
    for judged_before in (0, 1):
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"COLUMNS": "120"},
            # a shell's background job, in which tests may run, ignores it
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        line = next(line for line in process.stdout if line.startswith("Open http://127.0.0.1:"))
        port, token = re.fullmatch(r"Open http://127\.0\.0\.1:(\d+)/(.+)/\n", line).groups()
        connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=10)
        connection.request("GET", f"/{token}/pairs")
        pairs = json.loads(connection.getresponse().read())["pairs"]
        assert sum(pair["votes"]["visual_quality"] is not None for pair in pairs) == judged_before
        for axis in AXES:
            vote = {"pair": judged_before, "axis": axis, "choice": "same"}
            connection.request("POST", f"/{token}/vote", json.dumps(vote))
            assert connection.getresponse().read() == b'{"saved": true}'
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=90)
        assert process.returncode == 0 and err == "" and f"{judged_before + 1} of 6 pairs judged" in out
        connection.close()


def test_command_prints_exports_and_explains(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    a, b = map(str, folders)
    output = str(tmp_path / "v")
    comparison = Comparison(a, b, output, seed=0)
    for i, choice in enumerate(("good", "good", "bad", "same")):
        first = comparison.pairs[i].a_first == (choice == "good")
        for axis in AXES:
            comparison.vote(i, axis, "same" if choice == "same" else "first" if first else "second")
    assert main(["compare", "--results", "--output", output]) == 0
    out = capsys.readouterr().out
    assert "4 of 6 pairs judged" in out and "G: tuned better" in out and out.count("+0.25") == 3
    assert main(["compare", a, b, "--output", output, "--export", str(tmp_path / "p")]) == 0
    assert "3 preferences in" in " ".join(capsys.readouterr().out.split())
    assert len((tmp_path / "p" / "metadata.jsonl").read_text().splitlines()) == 3

    lone = write_folder(tmp_path / "lone", "raw", ["nobody else has this"])
    for argv, message in (
        (["compare", a], "vidtrl compare A B"),
        (["compare", a, str(lone), "--output", str(tmp_path / "x")], "no prompt in common"),
        (["compare", a, str(tmp_path / "nowhere")], "is no folder"),
        (["compare", a, str(tmp_path / "p" / "videos"), "--output", output], "needs"),
        (["compare", "--results", "--output", str(tmp_path / "x")], "holds no comparison"),
        (["compare", a, b, "--output", output, "--port", "70000"], "--port is a number"),
        (["compare", b, a, "--output", output], "exchanged"),
    ):
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (tmp_path / "x").exists()
    taken = CompareServer(comparison)
    assert main(["compare", a, b, "--output", output, "--port", str(taken.server_port)]) == 2
    assert "choose another --port" in capsys.readouterr().err
    taken.server_close()


def test_clips_without_partner_are_reported(folders, tmp_path, capsys):
    more = write_folder(tmp_path / "more", "raw", [*PROMPTS[:2], "an unknown prompt"])
    comparison = Comparison(folders[0], more, tmp_path / "v")
    comparison.vote(0, AXES[0], "first")
    assert (
        main(["compare", str(folders[0]), str(more), "--output", str(tmp_path / "v"), "--export", str(tmp_path / "x")])
        == 2
    )  # that clip is not judged on every axis
    out = " ".join(capsys.readouterr().out.split())
    assert (
        "4 clips of tuned have no partner" in out
        and "1 clips of more have no partner and are left out: raw2.mp4" in out
    )
