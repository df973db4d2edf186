"""Remote rewards over real sockets: nothing lost, nothing mixed up, nothing accepted from strangers."""

import asyncio
import contextlib
import http.client
import http.server
import json
import logging
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import numpy as np
import pytest
import safetensors.torch
import torch
from datasets import Dataset
from grpo_setup import Watching, brightness, history, make_trainer
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_pipelines import wan_i2v

from vidtrl.cli.errors import UserError
from vidtrl.cli.grpo import resolve_reward
from vidtrl.cli.main import main
from vidtrl.cli.reward_server import load_reward
from vidtrl.rewards import RemoteReward, RemoteRewardError, RewardError, RewardRunner, RewardServer, RewardUnavailable
from vidtrl.rewards import connection as connection_module
from vidtrl.rewards import remote as remote_module
from vidtrl.rewards.wire import CONTENT_TYPE, ScoreRequest, check_reply, dequantize, pack, quantize, unpack


TOKEN = "correct-horse-battery-staple"
ENV = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
JUDGE = '''
import json, os, time

def number(video):
    """Which video this is, spelled in its pixels."""
    red, green, blue = (round(255 * x) for x in video[0, :, 0, 0].tolist())
    return 65536 * red + 256 * green + blue

def judge(prompts, videos, serial, **kwargs):
    seen = [number(video) for video in videos]
    if seen != serial or prompts != [f"video {i}" for i in serial]:
        raise ValueError("mixed up")
    with open(os.environ["CALLS"], "a") as file:
        file.write(json.dumps([os.getpid(), seen]) + "\\n")
    time.sleep(0.01)
    return [i + 0.125 for i in seen]

def slow(videos, **kwargs):
    print("begun", flush=True)
    time.sleep(2)
    return [1.0] * len(videos)
'''
VIDEOS = [torch.full((3, 3, 4, 4), i / 5) for i in range(6)]
PROMPTS = [f"p{i}" for i in range(6)]


def numbered(i):
    """A video that says which one it is."""
    red, green, blue = (x / 255 for x in i.to_bytes(3, "big"))
    return torch.tensor([red, green, blue]).view(1, 3, 1, 1).expand(2, 3, 4, 4).clone()


def ask(reward, prompts=PROMPTS, videos=VIDEOS, **kwargs):
    return asyncio.run(reward(prompts=prompts, videos=videos, **kwargs))


def mean(videos, **kwargs):
    return [video.mean().item() for video in videos]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Short pauses, and no token from outside."""
    monkeypatch.setattr(remote_module, "FIRST_REST", 0.05)
    monkeypatch.setattr(remote_module, "LONGEST_REST", 1.0)
    monkeypatch.setattr(connection_module, "LINGER", 0.5)
    monkeypatch.delenv("VIDTRL_REWARD_TOKEN", raising=False)


def send(url, body=b"", method="POST", path="/v1/score", length=None, **headers):
    """A request of any shape; (status, decoded answer, headers)."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=20)
    connection.putrequest(method, path, skip_host="Host" in headers)
    defaults = {"Content-Length": str(len(body) if length is None else length), "Content-Type": CONTENT_TYPE}
    for name, value in ({name.replace("-", "_"): v for name, v in defaults.items()} | headers).items():
        if value is not None:
            connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    connection.send(body)
    if length is not None:
        connection.sock.shutdown(socket.SHUT_WR)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    if answer.headers["Content-Type"] == "application/json":
        content = json.loads(content)
    return answer.status, content, answer.headers


def body_of(identity="abc", reward=None, n=2, **columns):
    return pack(ScoreRequest(identity, reward, PROMPTS[:n], VIDEOS[:n], columns))


class Process:
    """`vidtrl reward-server` in a process of its own."""

    def __init__(self, *argv, port=0, **env):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vidtrl.cli.main", "reward-server", *map(str, argv), "--port", str(port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=ENV | env,
        )
        self.output = self.process.stdout.readline()
        match = re.match(r"Serving .* on (https?://\S+?) \(", self.output)
        assert match, self.output + self.process.stderr.read()
        self.url = match[1]

    def end(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=30)
        return self.process.returncode, self.output + out + err


# ---- The load test ----


def test_eight_clients_lose_nothing_when_the_server_is_killed_and_restarted(tmp_path, monkeypatch):
    judge, calls = tmp_path / "judge.py", tmp_path / "calls.jsonl"
    judge.write_text(JUDGE)
    calls.touch()
    argv = ["--reward", f"{judge}:judge", "--max_queue", "4", "--batch_size", "8"]
    env = {"CALLS": str(calls), "VIDTRL_REWARD_TOKEN": TOKEN}
    first = Process(*argv, **env)
    results, errors, refused = {}, [], set()

    def stranger(stop):  # all the while, through both servers
        mine = {"Authorization": f"Bearer {TOKEN}"}
        bad = [
            (body_of(), {"Authorization": "Bearer another-token-altogether"}),
            (b"", {**mine, "Content_Length": str(1 << 40)}),
            (bytes(range(256)) * 20, mine),
            (body_of()[:-1], mine),
            (pickle.dumps([0.5]), {**mine, "Content_Type": "application/x-pickle"}),
        ]
        while not stop.wait(0.02):
            for body, headers in bad:
                with contextlib.suppress(OSError, http.client.HTTPException):  # none of the two servers is there
                    refused.add(send(first.url, body, **headers)[0])

    def client(number):
        reward = RemoteReward(first.url, token=TOKEN, batch_size=3, max_retries=200)
        try:
            for call in range(10):
                ids = [number * 100_000 + 7 * call + k for k in range(7)]
                videos = [numbered(i) for i in ids]
                scores = ask(reward, [f"video {i}" for i in ids], videos, serial=ids)
                results.update(zip(ids, scores, strict=True))
        except Exception as error:
            errors.append(error)

    clients = [threading.Thread(target=client, args=(number,)) for number in range(1, 9)]
    stop = threading.Event()
    nuisance = threading.Thread(target=stranger, args=(stop,))
    for thread in [*clients, nuisance]:
        thread.start()
    while calls.read_text().count("\n") < 12 and not errors:
        time.sleep(0.005)
    first.process.kill()
    first.process.communicate()
    second = Process(*argv, port=urlsplit(first.url).port, **env)
    for thread in clients:
        thread.join()
    stop.set(), nuisance.join()
    assert {400, 401, 413, 415} <= refused <= {400, 401, 413, 415, 503}  # 503: the queue was full
    code, output = second.end()
    assert errors == [] and len(results) == 8 * 10 * 7
    assert all(score == i + 0.125 for i, score in results.items())
    lines = [json.loads(line) for line in calls.read_text().splitlines()]
    by = {pid: [i for who, seen in lines for i in seen if who == pid] for pid in {who for who, _ in lines}}
    assert len(by) == 2 and min(map(len, by.values())) > 30  # both servers were under load
    assert set().union(*by.values()) == set(results)
    for scored in by.values():
        assert len(set(scored)) == len(scored)  # a server scores nothing twice
    assert max(len(seen) for _, seen in lines) > 3  # waiting requests were joined
    assert code == 0 and TOKEN not in output and TOKEN not in first.output


def test_sigterm_lets_a_running_request_finish(tmp_path):
    judge, token = tmp_path / "judge.py", tmp_path / "token"
    judge.write_text(JUDGE)
    token.write_text(TOKEN + "\n")
    server = Process("--reward", f"{judge}:slow", "--token_file", token)
    answers = []
    thread = threading.Thread(
        target=lambda: answers.append(ask(RemoteReward(server.url, token=TOKEN, batch_size=6, max_retries=0)))
    )
    thread.start()
    assert server.process.stdout.readline() == "begun\n"
    server.process.send_signal(signal.SIGTERM)
    assert server.process.stdout.readline().startswith("Stopping")
    status, answer, headers = send(server.url, body_of(), Authorization=f"Bearer {TOKEN}")
    assert (status, headers["Retry-After"]) == (503, "1") and "stopping" in answer["error"]["message"]
    assert send(server.url, method="GET", path="/health")[0] == 503
    out, err = server.process.communicate(timeout=20)
    thread.join()
    assert answers == [[1.0] * 6] and server.process.returncode == 0
    assert TOKEN not in server.output + out + err and "503" in err


# ---- The same numbers as here ----


@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32"])
def test_scores_equal_the_local_function_bit_for_bit(dtype):
    def awkward(prompts, videos, weight, trainer_state, log_metric, log_extra, completions):
        log_metric("largest", max(video.max().item() for video in videos))
        log_extra("first", [video[0, 0, 0, 0] for video in videos])
        step = trainer_state.global_step
        return [
            None if w is None else (video.double().pow(1 / 3).sum() * w / 7 + step).item() * len(p)
            for p, video, w in zip(prompts, videos, weight, strict=True)
        ]

    generator = torch.Generator().manual_seed(0)
    videos = [torch.rand(3, 3, 7, 5, generator=generator) for _ in range(11)]
    prompts = ["ünïcode \u2028 \U0001f600" + "x" * i for i in range(11)]
    columns = {"weight": [None if i == 4 else i / 3 for i in range(11)]}
    state = SimpleNamespace(global_step=3, max_steps=9, epoch=0.5, num_train_epochs=1, log_history=["not sent"])
    sent = [dequantize(quantize(video, dtype)) for video in videos]
    local, here = RewardRunner(awkward), RewardRunner([awkward])
    want = local.collect(local.submit(prompts, sent, columns, state))
    with RewardServer({"awkward": awkward}) as server:
        runner = RewardRunner(RemoteReward(server.url, dtype=dtype, batch_size=4))
        got = runner.collect(runner.submit(prompts, videos, columns, state))
        runner.close()
    assert got.equal(want) or (got.isnan().equal(want.isnan()) and got[~got.isnan()].equal(want[~want.isnan()]))
    assert runner.names == ["awkward"] and got[4].isnan() and got.isnan().sum() == 1
    assert runner.extra == {"first": [float(x) for x in local.extra["first"]]}
    assert max(runner.metrics["largest"]) == local.metrics["largest"][0] and len(runner.metrics["largest"]) == 3
    exact = here.collect(here.submit(prompts, videos, columns, state))
    assert (got[:4] == exact[:4]).all() == (dtype == "float32")  # control: what is lost on the way is seen


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 255), min_size=1, max_size=20))
def test_bytes_survive(values):
    video = torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1)
    assert quantize(dequantize(video)).equal(video)


def test_pixels_that_no_byte_can_hold_are_refused():
    for bad in (float("nan"), float("inf"), 1.01, -0.01):
        video = torch.full((1, 3, 2, 2), bad)
        with pytest.raises(ValueError, match=r"pixels must be in \[0, 1\]"):
            quantize(video)
        assert quantize(video, "float32").equal(video) or bad != bad


# ---- Images ----


def picture(seed, mode="RGB", width=5, height=3):
    """Noise: every bit of it would be missed."""
    channels = {"L": (), "LA": (2,), "RGB": (3,), "RGBA": (4,)}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, *channels), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_images_arrive_bit_for_bit_as_they_left():
    seen = {}

    def look(prompts, image, mask, style, **kwargs):
        seen.update(zip(prompts, zip(image, mask, style, strict=True), strict=True))
        return [None if i is None else float(np.asarray(i).astype(np.float64).mean()) for i in image]

    images = [None, *(picture(i, mode, 4 + i) for i, mode in enumerate(("L", "LA", "RGB", "RGBA")))] + [None]
    masks = [picture(7, "L", 1, 1), *[None] * 5]  # the second and third request have none
    columns = {"image": images, "mask": masks, "style": list("abcdef")}
    with RewardServer({"look": look}) as server:
        scores = ask(RemoteReward(server.url, batch_size=2), **columns)
        local = look(PROMPTS, **columns)
        assert scores == local and scores[0] is None and scores[-1] is None
        seen.clear()
        ask(RemoteReward(server.url, batch_size=4), **columns)
    for i, prompt in enumerate(PROMPTS):
        for got, want in zip(seen[prompt], (images[i], masks[i], columns["style"][i]), strict=True):
            if isinstance(want, Image.Image):
                assert isinstance(got, Image.Image) and (got.mode, got.size) == (want.mode, want.size)
                assert got.tobytes() == want.tobytes() != picture(i + 50, want.mode, *want.size).tobytes()
            else:
                assert got == want


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["L", "LA", "RGB", "RGBA"]),
    st.integers(1, 9),
    st.integers(1, 9),
    st.lists(st.booleans(), min_size=2),
)
def test_images_survive_the_wire(mode, width, height, there):
    n = len(there)
    images = [picture(i, mode, width, height) if is_there else None for i, is_there in enumerate(there)]
    request = ScoreRequest("a", None, ["p"] * n, [VIDEOS[0]] * n, {"a/0": images, "": images})
    columns = unpack(pack(request)).columns
    for name in ("a/0", ""):
        assert [i and (i.mode, i.size, i.tobytes()) for i in columns[name]] == [
            i and (i.mode, i.size, i.tobytes()) for i in images
        ]


def test_images_that_would_change_on_the_way_are_refused():
    for mode in ("P", "1", "I;16", "F", "CMYK", "HSV"):
        with pytest.raises(TypeError, match=rf"'image' holds an image of mode {mode}.*convert\('RGB'\).*columns="):
            body_of(image=[Image.new(mode, (2, 2)), None])
    with pytest.raises(TypeError, match="'image' holds images and 'a.png': images and None go together"):
        body_of(image=[picture(0), "a.png"])
    for name in ("prompts", "log_extra"):
        with pytest.raises(ValueError, match=f"cannot be named '{name}'"):
            unpack(body_of(**{name: [picture(0)] * 2}))


def test_images_count_towards_the_size_of_a_request():
    image = picture(0, "RGB", 640, 640)  # 1.2 MB
    with RewardServer({"mean": mean}, max_body=2_000_000) as server:
        with pytest.raises(RewardUnavailable, match="413.*lower batch_size"):
            ask(RemoteReward(server.url, batch_size=2), PROMPTS[:2], VIDEOS[:2], image=[image] * 2)
        assert len(ask(RemoteReward(server.url, batch_size=1), PROMPTS[:2], VIDEOS[:2], image=[image] * 2)) == 2


# ---- Training ----


def grpo(tmp_path, rewards, **config):
    torch.manual_seed(0)
    trainer = make_trainer(tmp_path, rewards=rewards, rollout_batch_size=1, **config)
    trainer.train()
    weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    return [entry["reward"] for entry in trainer.state.log_history if "reward" in entry], weights, trainer


def test_a_run_with_a_remote_reward_equals_the_local_run(tmp_path):
    def quantised(videos, **kwargs):
        return brightness([dequantize(quantize(video)) for video in videos])

    local = grpo(tmp_path / "local", quantised)
    plain = grpo(tmp_path / "plain", brightness)
    with RewardServer({"brightness": brightness}) as server:
        remote = grpo(tmp_path / "remote", [f"{server.url}#brightness"])
    assert len(remote[0]) == 2 and remote[0] == local[0] and remote[0] != plain[0]
    assert all(remote[1][name].equal(weight) for name, weight in local[1].items())
    assert not all(plain[1][name].equal(weight) for name, weight in local[1].items())  # control: rewards matter
    assert history(remote[2], "rewards/brightness/mean") == remote[0]


def test_an_image_to_video_run_with_a_remote_reward_equals_the_local_run(tmp_path):
    shown = []

    def resembles(videos, image, **kwargs):
        shown.extend(image)
        wanted = [torch.from_numpy(np.array(i)).permute(2, 0, 1).double() / 255 for i in image]
        return [-100 * (v.double() - w).abs().mean().item() for v, w in zip(videos, wanted, strict=True)]

    def quantised(videos, **kwargs):
        return resembles([dequantize(quantize(video)) for video in videos], **kwargs)

    def run(name, reward, first=0):
        pipe, call = wan_i2v()
        call = {key: value for key, value in call.items() if key != "image"} | {"guidance_scale": 1.0}
        rows = Dataset.from_list(
            [{"prompt": f"prompt {i}", "image": picture(first + i, width=24, height=40)} for i in range(2)]
        )
        config = dict(num_inference_steps=2, num_generations=2, per_device_train_batch_size=4, max_steps=1)
        return grpo(tmp_path / name, reward, pipe=pipe, rows=rows, **call | config)

    local = run("local", quantised)
    want = [image.tobytes() for image in shown]
    shown.clear()
    with RewardServer({"resembles": resembles}) as server:
        remote = run("remote", [server.url])
        assert sorted(image.tobytes() for image in shown) == sorted(want) and len(set(want)) == 2 and len(want) == 4
        other = run("other", [server.url], first=50)
    assert len(remote[0]) == 1 and remote[0] == local[0] != other[0]  # control: the images matter
    assert all(remote[1][name].equal(weight) for name, weight in local[1].items())
    assert not all(other[1][name].equal(weight) for name, weight in local[1].items())


class Announcing(Watching):
    """Says when the videos of a generation's second part exist."""

    def _submit(self, *args):
        self.parts = getattr(self, "parts", 0) + 1
        if self.parts == 2:
            self.second_rollout_done.set()
        return super()._submit(*args)


def test_a_remote_reward_works_while_the_next_videos_are_sampled(tmp_path):
    done = threading.Event()
    Announcing.second_rollout_done = done
    patience = [60.0]

    def waits_for_the_next_rollout(videos, **kwargs):
        if not done.wait(patience[0]):
            raise TimeoutError("the next rollout did not begin before this one was scored")
        return brightness(videos)

    with RewardServer({"waits": waits_for_the_next_rollout}) as server:
        _, _, trainer = grpo(tmp_path / "a", RemoteReward(server.url), cls=Announcing, max_steps=1)
    assert trainer.parts == 2 and len(trainer.generations) == 1

    def scored_at_once(videos, **kwargs):  # control: what trains without overlap cannot satisfy it
        return waits_for_the_next_rollout(videos)

    class Eager(Announcing):
        def _submit(self, runner, rows, videos):
            scored_at_once(videos)
            return super()._submit(runner, rows, videos)

    done.clear()
    patience[0] = 0.1
    with pytest.raises(TimeoutError, match="did not begin"):
        grpo(tmp_path / "b", brightness, cls=Eager, max_steps=1)


# ---- Retries, replicas, idempotence ----


class Forgetful:
    """A TCP proxy that swallows the first answers and closes instead, after the server has given them."""

    def __init__(self, target, drops):
        self.target, self.drops = urlsplit(target), drops
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self):
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client):
        with client, socket.create_connection((self.target.hostname, self.target.port)) as server:
            threading.Thread(target=self._pump, args=(client, server), daemon=True).start()
            answer = b""
            while piece := server.recv(1 << 16):
                answer += piece
            if self.drops > 0 and b"200 OK" in answer:
                self.drops -= 1
                client.sendall(answer[:-5] if self.drops % 2 else b"")  # once cut short, once nothing
            else:
                client.sendall(answer)
            client.shutdown(socket.SHUT_RDWR)

    def _pump(self, source, sink):
        try:
            while piece := source.recv(1 << 16):
                sink.sendall(piece)
        except OSError:
            pass


def test_a_lost_answer_is_asked_for_again_and_scored_once():
    calls = []

    def counted(prompts, videos, **kwargs):
        calls.append(prompts)
        return mean(videos)

    with RewardServer({"counted": counted}) as server:
        proxy = Forgetful(server.url, drops=4)
        assert ask(RemoteReward(proxy.url, batch_size=2)) == mean([dequantize(quantize(v)) for v in VIDEOS])
        proxy.listener.close()
        assert proxy.drops == 0 and sorted(calls) == [PROMPTS[0:2], PROMPTS[2:4], PROMPTS[4:6]]
        assert "replays_total{} 4" in server.metrics()

        body, other = body_of("abc"), body_of("abc", n=3)  # by hand, and an id that is taken
        assert send(server.url, body)[1] == send(server.url, body)[1] and len(calls) == 4
        status, answer, _ = send(server.url, other)
        assert status == 409 and "another request has the id abc" in answer["error"]["message"] and len(calls) == 4


def test_a_request_that_times_out_is_taken_up_again_not_repeated():
    calls, go = [], threading.Event()

    def slow(videos, **kwargs):
        calls.append(len(videos))
        go.wait(30)
        return mean(videos)

    with RewardServer({"slow": slow}) as server:
        threading.Timer(1.0, go.set).start()
        assert len(ask(RemoteReward(server.url, timeout=0.3, batch_size=6, max_retries=50))) == 6
        assert calls == [6]


def test_replicas_share_the_work_and_a_dead_one_is_put_aside_and_taken_back(caplog):
    counts = [0, 0]

    def counting(which):
        def count(videos, **kwargs):
            counts[which] += len(videos)
            time.sleep(0.01)
            return mean(videos)

        return count

    one, two = RewardServer({"r": counting(0)}), RewardServer({"r": counting(1)})
    one.start()
    two.start()
    reward = RemoteReward([one.url, f"{two.url}#r"], batch_size=1, max_retries=4)
    want = mean([dequantize(quantize(v)) for v in VIDEOS])
    assert ask(reward) == want and min(counts) >= 2
    one.stop()
    with caplog.at_level(logging.WARNING):
        before = counts[0]
        for _ in range(3):
            assert ask(reward) == want
    assert counts[0] == before and caplog.text.count(f"reward server {one.url} failed") == 1
    with RewardServer({"r": counting(0)}, port=one.server_port):
        deadline = time.monotonic() + 10
        while counts[0] == before and time.monotonic() < deadline:
            assert ask(reward) == want
        assert counts[0] > before
    two.stop()
    with pytest.raises(RewardUnavailable, match=r"no answer from .* in 10 tries; .*Refused.*See that the server runs"):
        ask(reward, PROMPTS[:1], VIDEOS[:1])


def test_a_server_that_is_down_is_one_error_and_not_one_a_video():
    reward = RemoteReward("http://127.0.0.1:1", max_retries=0, batch_size=6, name="judge")
    runner = RewardRunner([reward, mean], on_error="skip")
    rewards = runner.collect(runner.submit(PROMPTS, VIDEOS))
    runner.close()
    assert rewards.isnan().all() and runner.num_skipped == 6 and reward.replicas[0].sent == 1
    assert runner.names == ["judge", "mean"]
    runner = RewardRunner(reward)
    with pytest.raises(RewardError, match=r"'judge' failed on 6 videos .*RewardUnavailable.*http://127.0.0.1:1"):
        runner.collect(runner.submit(PROMPTS, VIDEOS))
    runner.close()


def test_a_full_queue_sends_requests_away_and_they_come_back(monkeypatch):
    monkeypatch.setattr(connection_module, "QUEUE_WAIT", 0.01)
    begun, go = threading.Event(), threading.Event()

    def held(videos, **kwargs):
        begun.set()
        go.wait(30)
        return mean(videos)

    with RewardServer({"held": held}, max_queue=1) as server:
        threads = [threading.Thread(target=send, args=(server.url, body_of("a")))]
        threads[0].start()
        begun.wait(10)
        status, answer, headers = send(server.url, body_of("b"))
        assert status == 503 and answer["error"]["message"] == "the queue is full" and headers["Retry-After"] == "1"
        with pytest.raises(RewardUnavailable, match="the queue is full.*more replicas help"):
            ask(RemoteReward(server.url, batch_size=6, timeout=0.2, max_retries=0))
        threading.Timer(0.3, go.set).start()
        assert len(ask(RemoteReward(server.url, batch_size=1, max_retries=0))) == 6  # being busy is no failure
        threads[0].join()


def test_a_runner_that_gives_up_cuts_the_connection():
    go = threading.Event()

    def held(videos, **kwargs):
        go.wait(30)
        return mean(videos)

    with RewardServer({"held": held}) as server:
        reward = RemoteReward(server.url, name="slow", batch_size=1)
        runner = RewardRunner(reward, timeout=0.3)
        with pytest.raises(RewardError, match=r"no result after 0.3 s"):
            runner.collect(runner.submit(PROMPTS, VIDEOS))
        deadline = time.monotonic() + 10
        while reward.replicas[0].outstanding and time.monotonic() < deadline:
            time.sleep(0.01)
        assert reward.replicas[0].outstanding == 0 and reward.replicas[0].sent == 2
        runner.close()
        go.set()


# ---- Mistakes of the function ----


def picky(prompts, videos, **kwargs):
    if "p3" in prompts:
        raise KeyError("no such object")
    return mean(videos)


def test_an_error_of_the_function_follows_the_runners_policy(caplog):
    with RewardServer({"picky": picky}) as server, caplog.at_level(logging.CRITICAL):
        reward = RemoteReward(server.url, batch_size=6)
        with pytest.raises(RemoteRewardError, match=r"KeyError: 'no such object' \(reward 'picky' at .*, video 3\)$"):
            ask(reward)
        runner = RewardRunner(reward, on_error="skip")
        rewards = runner.collect(runner.submit(PROMPTS, VIDEOS))
        assert rewards.isnan().flatten().tolist() == [i == 3 for i in range(6)] and runner.num_skipped == 1
        runner.on_error = "raise"
        with pytest.raises(RewardError, match=r"'picky' failed on video 3 of 6 \(prompt 'p3'\): .*KeyError"):
            runner.collect(runner.submit(PROMPTS, VIDEOS))
        runner.close()
        status, answer, _ = send(server.url, body_of("x", n=5))
        assert status == 422 and answer["error"] == {
            "type": "KeyError", "message": "'no such object'", "index": 3, "reward": "picky"
        }  # fmt: skip
        assert 'errors_total{reward="picky",type="KeyError"}' in server.metrics()
    with RewardServer({"picky": picky}, tracebacks=True) as server, caplog.at_level(logging.CRITICAL):
        assert "in picky" in send(server.url, body_of("x", n=5))[1]["error"]["traceback"]


def test_what_no_video_is_at_fault_for_is_not_tried_again_on_each(caplog):
    calls = []

    class KeyExpired(RewardUnavailable):
        pass

    def judge(prompts, videos, **kwargs):
        calls.append(len(videos))
        raise KeyExpired("renew the key of the judge")

    with RewardServer({"judge": judge}) as server, caplog.at_level(logging.CRITICAL):
        runner = RewardRunner(RemoteReward(server.url, batch_size=6), on_error="skip")
        assert runner.collect(runner.submit(PROMPTS, VIDEOS)).isnan().all() and runner.num_skipped == 6
        runner.close()
        assert calls == [6]
        with pytest.raises(RewardUnavailable, match="renew the key of the judge .*'judge' at .*no video alone"):
            ask(RemoteReward(server.url, batch_size=6))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda videos, **kw: [1.0, float("nan"), 1.0][: len(videos)], "ValueError: returned nan.*video 1"),
        (lambda videos, **kw: [1.0], "ValueError: returned 1 rewards for 3 videos"),
        (lambda videos, **kw: "abc", "TypeError: returned str; return a list"),
        (lambda videos, **kw: sys.exit(3), "SystemExit: 3"),
        (lambda videos, log_extra, **kw: log_extra("x", [object()] * len(videos)) or mean(videos), "log_extra takes"),
    ],
)
def test_wrong_returns_come_back_as_errors_and_the_server_lives(function, message, caplog):
    with RewardServer({"f": function, "mean": mean}) as server, caplog.at_level(logging.CRITICAL):
        with pytest.raises(RemoteRewardError, match=message):
            ask(RemoteReward(server.url, reward="f"), PROMPTS[:3], VIDEOS[:3])
        assert len(ask(RemoteReward(f"{server.url}#mean"), PROMPTS[:3], VIDEOS[:3])) == 3


def test_joined_requests_stay_apart(caplog):
    sizes, go = [], threading.Event()

    async def judge(prompts, videos, log_extra, **kwargs):
        sizes.append(len(prompts))
        if prompts[0] == "first":
            await asyncio.to_thread(go.wait, 30)
        if "bad" in prompts:
            raise ValueError("bad prompt")
        log_extra("prompt", prompts)
        return [float(prompt.split()[-1]) if " " in prompt else None for prompt in prompts]

    answers = {}

    def one(name, prompts, **columns):
        request = ScoreRequest(name, None, prompts, VIDEOS[: len(prompts)], columns)
        answers[name] = send(server.url, pack(request))[:2]

    def queued(n):
        while server._waiting.qsize() < n:
            time.sleep(0.005)

    with RewardServer({"judge": judge}, batch_size=5) as server, caplog.at_level(logging.CRITICAL):
        threads = []

        def start(*args, **kwargs):
            threads.append(threading.Thread(target=one, args=args, kwargs=kwargs))
            threads[-1].start()

        start("a", ["first"])
        while sizes != [1]:
            time.sleep(0.005)
        for i, (name, prompts, columns) in enumerate(
            [
                ("b", ["n 1", "n 2"], {}),
                ("c", ["bad"], {}),
                ("d", ["n 3", "n 4"], {}),
                ("e", ["n 5"], {}),  # a sixth video
                ("f", ["n 6"], {"style": ["x"]}),  # another column
                ("g", ["n 7"], {"style": ["y"]}),
            ]
        ):
            start(name, prompts, **columns)
            queued(i + 1)
        go.set()
        for thread in threads:
            thread.join()
    assert sizes == [1, 5, 2, 1, 2, 1, 2]  # b, c and d together, then each alone; e; f and g
    assert answers["c"][0] == 422 and answers["c"][1]["error"]["message"] == "bad prompt"
    rewards = {name: answer.get("rewards") for name, (_, answer) in answers.items()}
    assert rewards == {"a": [None], "b": [1, 2], "c": None, "d": [3, 4], "e": [5], "f": [6], "g": [7]}
    assert answers["g"][1]["extra"] == {"prompt": ["n 7"]}


def test_a_call_that_hangs_is_answered_and_shows_in_health():
    go = threading.Event()

    def held(videos, **kwargs):
        go.wait(30)
        return mean(videos)

    with RewardServer({"held": held}, request_timeout=0.2) as server:
        assert send(server.url, method="GET", path="/health")[:2] == (200, {"status": "ok"})
        with pytest.raises(RewardUnavailable, match=r"HTTP 504: there is no result after 0.2 s"):
            ask(RemoteReward(server.url, batch_size=6, max_retries=1))
        assert send(server.url, method="GET", path="/health")[:2] == (503, {"status": "stuck"})
        go.set()
        while server.metrics().splitlines()[-1] != "vidtrl_reward_busy 0":
            time.sleep(0.01)
        assert send(server.url, method="GET", path="/health")[0] == 200


# ---- Strangers ----


def test_wrong_tokens_are_refused_and_no_token_is_logged(caplog, capfd):
    other = "another-token-altogether"
    caplog.set_level(logging.DEBUG)
    with RewardServer({"mean": mean}, token=TOKEN) as server:
        assert ask(RemoteReward(server.url, token=TOKEN)) and RemoteReward(server.url, token=TOKEN).check() == ["mean"]
        for token in (other, TOKEN[:-1], TOKEN + "x", TOKEN.upper(), None):
            with pytest.raises(RewardUnavailable, match="401.*VIDTRL_REWARD_TOKEN"):
                ask(RemoteReward(server.url, token=token))
            with pytest.raises(RewardUnavailable, match="401"):
                RemoteReward(server.url, token=token).check()
        for value in (f"Basic {TOKEN}", f"bearer {TOKEN}", TOKEN, "Bearer", "", "Bearer ü"):
            assert send(server.url, body_of(), Authorization=value.encode("utf-8"))[0] == 401
        for path in ("/metrics", "/v1/info", "/nothing"):
            assert send(server.url, method="GET", path=path)[0] == 401
        status, text, _ = send(server.url, method="GET", path="/metrics", Authorization=f"Bearer {TOKEN}")
        assert status == 200 and b'vidtrl_reward_samples_total{reward="mean"} 6\n' in text
        assert send(server.url, method="GET", path="/health")[0] == 200
        assert (
            send(server.url, method="GET", path="/v1/info", Authorization=f"Bearer {TOKEN}", Host="x.example")[0]
            == 200
        )
        shown = repr(server.__class__) + repr(RemoteReward(server.url, token=TOKEN)) + caplog.text
    seen = shown + "".join(capfd.readouterr())
    assert "401" in caplog.text and TOKEN not in seen and other not in seen


def test_without_a_token_only_this_machine_is_served(monkeypatch):
    for host in ("0.0.0.0", "::"):
        with pytest.raises(ValueError, match=r"can be reached from other machines: give a token"):
            RewardServer({"mean": mean}, host=host)
    for token in ("short", "with spaces in the middle of it", "line\nbreak-line-break", "ünïcödeünïcödeünïcöde"):
        with pytest.raises(ValueError, match="16 or more printable ASCII") as raised:
            RewardServer({"mean": mean}, token=token)
        assert token not in str(raised.value)
    with RewardServer({"mean": mean}, host="localhost") as server:
        port = server.server_port
        for host in ("localhost", f"127.0.0.1:{port}", f"[::1]:{port}"):
            assert send(server.url, method="GET", path="/v1/info", Host=host)[0] == 200
        for host in ("evil.example", f"evil.example:{port}", "localhost.evil.example", "127.0.0.1.evil.example", ""):
            assert send(server.url, method="GET", path="/v1/info", Host=host)[0] == 403
            assert send(server.url, body_of(), Host=host)[0] == 403
    for url in ("http://user:secret@host", f"http://host?token={TOKEN}"):
        with pytest.raises(ValueError, match="no credentials") as raised:
            RemoteReward(url)
        assert "secret" not in str(raised.value) and TOKEN not in str(raised.value)
    monkeypatch.setenv("VIDTRL_REWARD_TOKEN", "bad\r\nX-Evil: 1")
    with pytest.raises(ValueError, match="printable ASCII") as raised:
        RemoteReward("http://host")
    assert "Evil" not in str(raised.value)


class Trap:
    def __reduce__(self):
        return Path.touch, (Path(os.environ["TRAP"]),)


def with_head(tensors=None, **changes):
    head = {
        "protocol": 1,
        "id": "a",
        "reward": None,
        "prompts": ["p"],
        "columns": {},
        "trainer_state": None,
        "images": [],
    }
    tensors = {"0": torch.zeros(1, 3, 2, 2, dtype=torch.uint8)} if tensors is None else tensors
    return safetensors.torch.save(tensors, {"request": json.dumps(head | changes)})


def with_image(pixels, name="image/0", images=("image",)):
    return with_head({"0": torch.zeros(1, 3, 2, 2, dtype=torch.uint8), name: pixels}, images=list(images))


MALFORMED = {
    "nothing": (b"", "no safetensors"),
    "short": (b"1234", "no safetensors"),
    "noise": (bytes(range(256)) * 20, "no safetensors"),
    "long header": ((1 << 62).to_bytes(8, "little") + b"{}", "no safetensors"),
    "no metadata": (safetensors.torch.save({"0": torch.zeros(1, 3, 2, 2)}), "no safetensors file with a request"),
    "deep": (
        safetensors.torch.save({"0": torch.zeros(1, 3, 2, 2)}, {"request": "[" * 100_000}), "no safetensors file with"
    ),
    "no object": (safetensors.torch.save({"0": torch.zeros(1, 3, 2, 2)}, {"request": "[]"}), "must be an object"),
    "cut": (body_of()[:-1], "no safetensors file that"),
    "longer": (body_of() + b"x", "no safetensors file that"),
    "protocol": (with_head(protocol=2), "speaks protocol 1, not 2: install one version"),
    "id": (with_head(id="../../etc"), "ASCII letters and digits"),
    "long id": (with_head(id="a" * 65), "ASCII letters and digits"),
    "prompts": (with_head(prompts=["a", "b"]), "need the tensors '0' to '1'"),
    "no prompts": (with_head(prompts=[]), "one string a video"),
    "numbers": (with_head(prompts=[1]), "one string a video"),
    "columns": (with_head(columns={"style": ["a", "b"]}), "lists of 1 values"),
    "reserved": (with_head(columns={"videos": ["a"]}), "cannot be named 'videos'"),
    "state": (with_head(trainer_state=[1]), "trainer_state"),
    "names": (with_head({"x": torch.zeros(1, 3, 2, 2)}), "need the tensors"),
    "dtype": (with_head({"0": torch.zeros(1, 3, 2, 2, dtype=torch.int64)}), "not int64 of shape"),
    "shape": (with_head({"0": torch.zeros(3, 2, 2)}), r"must be a video .* not float32 of shape \(3, 2, 2\)"),
    "empty": (with_head({"0": torch.zeros(0, 3, 2, 2)}), "must be a video"),
    "image names": (with_head(images="image"), "images must be a list of the names of columns"),
    "image number": (with_head(images=[1]), "images must be a list of the names of columns"),
    "images twice": (with_head(images=["image", "image"]), "a column must stand once"),
    "image in both": (with_head(columns={"image": [None]}, images=["image"]), "a column must stand once"),
    "image reserved": (with_head(images=["prompts"]), "cannot be named 'prompts'"),
    "image unnamed": (with_image(torch.zeros(2, 2, 3, dtype=torch.uint8), images=[]), "and no other"),
    "image beyond": (with_image(torch.zeros(2, 2, 3, dtype=torch.uint8), "image/1"), "and no other"),
    "image dtype": (with_image(torch.zeros(2, 2, 3)), "must be an image .* not float32 of shape"),
    "image shape": (with_image(torch.zeros(2, 2, dtype=torch.uint8)), r"must be an image .* of shape \(2, 2\)"),
    "image channels": (with_image(torch.zeros(2, 2, 5, dtype=torch.uint8)), "must be an image"),
    "image channels first": (with_image(torch.zeros(3, 2, 2, 1, dtype=torch.uint8)), "must be an image"),
    "image empty": (with_image(torch.zeros(0, 2, 3, dtype=torch.uint8)), "must be an image"),
    "unknown reward": (with_head(reward="nope\nfake log line"), r"it has no 'nope\\n"),
}  # fmt: skip


def test_malformed_bodies_are_refused_and_the_server_lives(tmp_path, monkeypatch):
    monkeypatch.setenv("TRAP", str(tmp_path / "sprung"))
    trap = pickle.dumps(Trap())
    with RewardServer({"mean": mean}) as server:
        for name, (body, message) in {**MALFORMED, "pickle": (trap, "no safetensors")}.items():
            status, answer, _ = send(server.url, body)
            assert status == 400 and re.search(message, answer["error"]["message"]), (name, answer)
        for kind in ("application/octet-stream", "application/x-pickle", "text/plain", None):
            status, answer, _ = send(server.url, trap, Content_Type=kind)
            assert status == 415 and "pickles are not read" in answer["error"]["message"]
        for length in (None, "-5", "abc", "1e3", "99999999999999999999"):
            assert send(server.url, b"", Content_Length=length)[0] == 411
        assert send(server.url, body_of(), Transfer_Encoding="chunked")[0] == 411
        assert send(server.url, body_of(), path="/")[0] == 404
        assert send(server.url, body_of(), path="/v1/score/../../etc/passwd")[0] == 404
        status, answer, _ = send(server.url, body_of()[:-40], length=len(body_of()))
        assert status == 408 and "ended early" in answer["error"]["message"]
        assert not (tmp_path / "sprung").exists()
        assert ask(RemoteReward(server.url)) == mean([dequantize(quantize(v)) for v in VIDEOS])
        deadline = time.monotonic() + 10  # an answer is there a moment before its place is free
        while (server._active, server.slots._value) != (0, 16) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server._active == 0 and server.slots._value == 16  # no place in the queue was lost
    pickle.loads(trap)
    assert (tmp_path / "sprung").exists()  # control: the trap works where pickles are read


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_bodies_are_errors_of_value_or_the_same_shape(data):
    body = bytearray(body_of(style=["a", "b"], image=[None, picture(0)]))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(body) - 1))
        body[at] = data.draw(st.integers(0, 255))
    try:
        request = unpack(bytes(body))
    except ValueError:
        return
    assert len(request.videos) == len(request.prompts) == 2
    assert all(video.ndim == 4 and video.numel() for video in request.videos)
    for image in request.columns.get("image", ()):
        assert image is None or isinstance(image, Image.Image) and image.size[0] * image.size[1] > 0


def test_oversized_bodies_are_refused_unread_and_the_client_sees_why():
    big = [torch.rand(8, 3, 512, 512) for _ in range(2)]  # 12 MiB, far more than a socket buffers
    with RewardServer({"mean": mean}, max_body=7 << 20) as server:
        with pytest.raises(RewardUnavailable, match=r"413.*lower batch_size of RemoteReward.*--max_body_mb"):
            ask(RemoteReward(server.url, batch_size=2), PROMPTS[:2], big)
        assert len(ask(RemoteReward(server.url, batch_size=1), PROMPTS[:2], big)) == 2
        assert send(server.url, b"", Content_Length=str(1 << 40))[0] == 413


def test_slow_senders_are_cut_off(monkeypatch):
    monkeypatch.setattr(connection_module, "HEADER_TIME", 0.3)

    def drip(head):
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as sock:
            sock.sendall(head)
            answer, began = b"", time.monotonic()
            sock.settimeout(0.05)
            while time.monotonic() - began < 10:
                try:
                    sock.sendall(b"x")
                    if not (piece := sock.recv(1 << 12)):
                        break
                    answer += piece
                except TimeoutError:
                    continue
                except OSError:
                    break
            return answer, time.monotonic() - began

    with RewardServer({"mean": mean}, read_timeout=0.3) as server:
        answer, seconds = drip(b"POST /v1/score HTTP/1.1\r\nX-Slow: ")
        assert seconds < 5
        answer, seconds = drip(
            f"POST /v1/score HTTP/1.1\r\nHost: localhost\r\nContent-Type: {CONTENT_TYPE}\r\nContent-Length: 9999\r\n\r\n".encode()
        )
        assert seconds < 5 and b" 408 " in answer and b"took too long" in answer
        assert len(ask(RemoteReward(server.url))) == 6


def test_slow_answers_are_given_up():
    class Dripping(Liar):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.wfile.write(self.server.head)
            with contextlib.suppress(OSError):
                for _ in range(200):  # ten seconds
                    self.wfile.write(b"x")
                    time.sleep(0.05)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Dripping) as server:
        server.daemon_threads, server.block_on_close = True, False
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        reward = RemoteReward(f"http://127.0.0.1:{server.server_port}", timeout=0.3, max_retries=1, batch_size=6)
        for server.head in (b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n", b"HTTP/1.1 200 OK\r\nX-Slow: "):
            began = time.monotonic()
            with pytest.raises(RewardUnavailable, match="in 2 tries; .*TimeoutError: no whole answer after 0.3 s"):
                ask(reward)
            assert time.monotonic() - began < 5
        server.shutdown()


class Liar(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        content = self.server.lie if isinstance(self.server.lie, bytes) else json.dumps(self.server.lie).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST

    def log_message(self, *args):
        pass


def test_what_is_no_answer_is_never_taken_for_rewards():
    good = {"protocol": 1, "id": "x", "rewards": [1.0, None], "metrics": [["m", 1]], "extra": {"c": [1, 2]}}
    assert check_reply(good, "x", 2) is good
    for change in (
        {"id": "y"}, {"protocol": 2}, {"rewards": [1.0]}, {"rewards": [1.0, float("nan")]}, {"rewards": [1.0, 10**400]},
        {"rewards": [1.0, "2"]}, {"rewards": [1.0, True]}, {"rewards": None}, {"metrics": [["m", "1"]]}, {"metrics": {}},
        {"extra": {"c": [1]}}, {"extra": []},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="the answer"):
            check_reply(good | change, "x", 2)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Liar) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        reward = RemoteReward(f"http://127.0.0.1:{server.server_port}", batch_size=6)
        for server.lie in (good, b"<html>", b"[" * 100_000, [], "x"):
            with pytest.raises(RewardUnavailable, match="no vidtrl reward server"):
                ask(reward)
        server.shutdown()


def test_a_redirect_is_refused_at_once_and_not_followed():
    asked = []

    class Elsewhere(Liar):
        def do_POST(self):
            asked.append(self.headers["Authorization"])
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(302)
            self.send_header("Location", self.path)
            self.send_header("Content-Length", "0")
            self.end_headers()

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        with pytest.raises(RewardUnavailable, match="refused the request \\(HTTP 302"):
            ask(RemoteReward(f"http://127.0.0.1:{server.server_port}", token=TOKEN, batch_size=6))
        server.shutdown()
    assert len(asked) == 1


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command to make a certificate")
def test_https(tmp_path, monkeypatch):
    key, cert = str(tmp_path / "key.pem"), str(tmp_path / "cert.pem")
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
            "-keyout",
            key,
        ]
        + ["-out", cert, "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True,
        capture_output=True,
    )
    with RewardServer({"mean": mean}, token=TOKEN, tls=(cert, key)) as server:
        assert server.url.startswith("https://")
        with pytest.raises(RewardUnavailable, match="certificate that is not trusted.*SSL_CERT_FILE"):
            ask(RemoteReward(server.url, token=TOKEN))
        monkeypatch.setenv("SSL_CERT_FILE", cert)
        assert len(ask(RemoteReward(server.url, token=TOKEN))) == 6
        with pytest.raises(RewardUnavailable, match="401"):
            ask(RemoteReward(server.url))
        silent = socket.create_connection(("127.0.0.1", server.server_port))  # says nothing, and holds up nobody
        assert len(ask(RemoteReward(server.url, token=TOKEN))) == 6
        silent.close()


# ---- Names, files and options ----


def test_a_reward_without_a_name_has_the_servers():
    with RewardServer({"mean": mean}) as one, RewardServer({"picky": picky}) as two:
        runner = RewardRunner([one.url, two.url, RemoteReward(one.url), RemoteReward(one.url, name="mine")])
        assert runner.names == ["mean", "picky", "mean_2", "mine"]
        rewards = runner.collect(runner.submit(PROMPTS[:2], VIDEOS[:2]))
        runner.close()
        assert rewards.shape == (2, 4) and rewards[:, 0].equal(rewards[:, 2])
        gone = RemoteReward(one.url, max_retries=0)
    with pytest.raises(RewardUnavailable, match="no answer from"):  # and not another name than with the server
        RewardRunner(gone)
    with RewardServer({"mean": mean, "picky": picky}) as both:
        with pytest.raises(RewardUnavailable, match="serves mean, picky; one has to be named"):
            RewardRunner(both.url)


def test_urls_name_a_server_a_reward_and_replicas():
    reward = RemoteReward("http://a:8000, https://b/judge/#motion")
    assert [(r.host, r.port, r.prefix, r.is_https) for r in reward.replicas] == [
        ("a", 8000, "", False), ("b", 443, "/judge", True)
    ]  # fmt: skip
    assert reward.reward == reward.__name__ == "motion" and RemoteReward("http://a", name="j").__name__ == "j"
    same = ["http://a:8000#motion", "http://b:8000#motion", RemoteReward("http://a:8000", name="judge")]
    assert RewardRunner(same).names == ["motion", "motion_2", "judge"]
    for url, message in (
        ("http://a:1#x,http://b:1#y", "replicas serve one reward, not x, y"),
        ("http://a:1,http://a:1", "different addresses"),
        ("http://a:99999", "is no address"),
        ("ftp://a", "is no address"),
        ("http://", "is no address"),
        ([], "one or more"),
    ):
        with pytest.raises(ValueError, match=message):
            RemoteReward(url)
    for wrong in ({"dtype": "int8"}, {"batch_size": 0}, {"concurrency": 0}, {"timeout": 0}, {"max_retries": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            RemoteReward("http://a", **wrong)


def test_columns_that_cannot_be_sent_are_named():
    def seen(videos, trainer_state, prompts, completions, log_metric, log_extra, **columns):
        return [float(sorted(columns) == ["style"])] * len(videos)

    columns = {"style": ["a"] * 6, "picture": [object()] * 6}
    with RewardServer({"seen": seen}) as server:
        with pytest.raises(TypeError, match=r"column 'picture' cannot be sent .* RemoteReward\(columns="):
            ask(RemoteReward(server.url), **columns)
        assert ask(RemoteReward(server.url, columns=["style"]), **columns) == [1.0] * 6
        with pytest.raises(ValueError, match="no column 'size'; it has style, picture"):
            ask(RemoteReward(server.url, columns=["size"]), **columns)


def test_a_server_with_several_rewards_and_names_on_the_command_line():
    with RewardServer({"mean": mean, "picky": picky}) as server:
        assert resolve_reward(f"{server.url}#mean") == f"{server.url}#mean"
        with pytest.raises(UserError, match=r"serves mean, picky; there is no 'nope', as in http://.*#mean"):
            resolve_reward(f"{server.url}#nope")
        with pytest.raises(UserError, match="one has to be named"):
            resolve_reward(server.url)
        with pytest.raises(RewardUnavailable, match="400.*has the rewards mean, picky: name one"):
            ask(RemoteReward(server.url))


def test_rewards_are_loaded_by_name_module_and_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("scores.py").write_text(
        "def one(videos, **kwargs):\n    return [1.0] * len(videos)\n\n"
        "def get_constant(value):\n    return lambda videos, **kwargs: [value] * len(videos)\n"
    )
    assert load_reward("toy-color")[0] == "toy-color"
    for spec in ("scores:one", "scores.py:one", f"{tmp_path}/scores.py:one"):
        name, function = load_reward(spec)
        assert name == "one" and function(videos=VIDEOS) == [1.0] * 6
    name, function = load_reward("scores.py:get_constant", {"value": 3.0})
    assert name == "get_constant" and function(videos=VIDEOS[:1]) == [3.0]
    for argv, message in (
        (["--reward", "nope.py:f"], "there is no file 'nope.py'"),
        (["--reward", "scores.py:two"], "has no function 'two'; it has one, get_constant"),
        (["--reward", "scores:get_constant", "--kwargs", '{"valu": 1}'], "--kwargs do not fit"),
        (["--reward", "scores:one", "--kwargs", "[1]"], "must be a JSON object"),
        (["--reward", "toy-color", "--kwargs", "{}"], "--kwargs are for a factory of yours"),
        (["--reward", "toy-color", "scores:one", "--kwargs", "{}"], "are for one --reward"),
        (["--reward", "toy-colour"], "Did you mean 'toy-color'"),
        (["--reward", "http://host"], "is a reward server already"),
        (["--reward", "scores:one", "scores.py:one"], "two rewards are named 'one'"),
        (["--reward", "scores:one", "--host", "0.0.0.0", "--port", "0"], "give a token"),
        (["--reward", "scores:one", "--host", "no.such.host.invalid"], "there is no interface"),
        (["--reward", "scores:one", "--token_file", "nope"], "--token_file 'nope' cannot be read"),
        (["--reward", "scores:one", "--tls_cert", "x"], "go together"),
        (["--reward", "scores:one", "--port", "70000"], "from 0 to 65535"),
    ):
        assert main(["reward-server", *argv]) == 2, argv
        assert message in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["reward-server", "--reward", "scores:one", "--port", str(port)]) == 2
    assert f"port {port} cannot be had" in capsys.readouterr().err
