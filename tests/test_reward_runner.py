import asyncio
import functools
import gc
import math
import subprocess
import sys
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vidtrl.rewards import RewardError, RewardRunner


PROMPTS = ["one", "two", "three"]
VIDEOS = [torch.full((3, 3, 4, 4), i / 4) for i in range(3)]


def brightness(videos, **kwargs):
    return [v.mean().item() for v in videos]


def failing_on(word, how):
    def failing(prompts, **kwargs):
        if word in prompts:
            return how(prompts)
        return [1.0] * len(prompts)

    return failing


def explode(prompts):
    raise KeyError("no such object")


def run(reward_funcs, prompts=PROMPTS, columns=None, trainer_state=None, **kwargs):
    runner = RewardRunner(reward_funcs, **kwargs)
    rewards = runner.collect(runner.submit(prompts, VIDEOS[: len(prompts)], columns, trainer_state))
    runner.close()
    return rewards, runner


def test_functions_are_called_by_keyword_with_everything_of_the_contract():
    seen = {}

    def spy(**kwargs):
        seen.update(kwargs)
        return [None, 1, torch.tensor(2.5)]

    rewards, _ = run(spy, columns={"style": ["a", "b", "c"]}, trainer_state="state")
    assert set(seen) == {
        "prompts", "videos", "completions", "style", "trainer_state", "log_metric", "log_extra"
    }  # fmt: skip
    assert seen["prompts"] == PROMPTS and seen["style"] == ["a", "b", "c"] and seen["trainer_state"] == "state"
    assert seen["completions"] is seen["videos"] and all(a is b for a, b in zip(seen["videos"], VIDEOS, strict=True))
    assert rewards.dtype == torch.float32 and rewards.device.type == "cpu" and rewards.shape == (3, 1)
    assert rewards[0].isnan() and rewards[1:, 0].tolist() == [1.0, 2.5]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.one_of(st.none(), st.floats(-(2.0**99), 2.0**99, width=32)), min_size=3, max_size=3), st.integers(0, 3)
)
def test_values_arrive_as_they_were_whatever_carries_them(values, carrier):
    if carrier and None not in values:
        result = [tuple(values), torch.tensor(values), torch.tensor(values).numpy()][carrier - 1]
    else:
        result = values
    rewards, runner = run([lambda **kwargs: result, brightness])
    for got, value in zip(rewards[:, 0].tolist(), values, strict=True):
        assert math.isnan(got) if value is None else got == value
    assert rewards[:, 1].tolist() == [0, 0.25, 0.5]  # None in one function leaves the others alone
    assert runner.num_skipped == 0


def test_names():
    class Judge:
        def __call__(self, videos, **kwargs):
            return [0.0] * len(videos)

        def method(self, videos, **kwargs):
            return [0.0] * len(videos)

    judge = Judge()
    functions = [brightness, functools.partial(brightness, x=1), judge, judge.method, "toy-presence", "toy-presence"]
    names = RewardRunner(functions, weights=[1, 2, 3, 4, 5, 6]).names
    assert names == ["brightness", "brightness_2", "Judge", "method", "toy-presence", "toy-presence_2"]
    assert RewardRunner("toy-presence").names == ["toy-presence"]


def test_async_functions_run_before_collect_and_together():
    started, order = threading.Event(), []
    meeting = []

    async def first(videos, **kwargs):
        meeting.append(asyncio.Event())
        started.set()
        await asyncio.wait_for(meeting[0].wait(), 10)  # only the second one ends this wait
        return [1.0] * len(videos)

    async def second(videos, **kwargs):
        while not meeting:
            await asyncio.sleep(0)
        meeting[0].set()
        return [2.0] * len(videos)

    def sync(videos, **kwargs):
        order.append("sync")
        return [3.0] * len(videos)

    runner = RewardRunner([first, second, sync])
    handle = runner.submit(PROMPTS, VIDEOS)
    assert started.wait(10)  # under way while the caller is still busy
    order.append("rollout")
    assert runner.collect(handle)[0].tolist() == [1, 2, 3]
    assert order == ["rollout", "sync"]  # the control: a sync function waits for collect


def test_overlap_saves_the_time_of_the_async_functions():
    async def remote(videos, **kwargs):
        await asyncio.sleep(0.3)
        return [0.0] * len(videos)

    def local(videos, **kwargs):
        time.sleep(0.3)
        return [0.0] * len(videos)

    waited = {}
    for name, functions in {"async": [remote, remote], "sync": [local, local]}.items():
        runner = RewardRunner(functions)
        handle = runner.submit(PROMPTS, VIDEOS)
        time.sleep(0.4)  # the next rollout
        runner.collect(handle)
        waited[name] = runner.seconds
    assert waited["async"] < 0.2 and waited["sync"] > 0.55


def test_several_handles_may_be_under_way_and_keep_their_own_data():
    async def slow_length(prompts, log_metric, **kwargs):
        await asyncio.sleep(0.05 if prompts[0] == "a" else 0)
        log_metric("first", len(prompts[0]))
        return [float(len(p)) for p in prompts]

    runner = RewardRunner(slow_length)
    handles = [runner.submit(p, VIDEOS[: len(p)]) for p in (["a", "bb"], ["ccc"])]
    assert runner.collect(handles[1]).tolist() == [[3.0]] and runner.metrics == {"first": [3]}
    assert runner.collect(handles[0]).tolist() == [[1.0], [2.0]] and runner.metrics == {"first": [1]}


def test_async_objects_and_functions_that_return_awaitables():
    class Judge:
        async def __call__(self, videos, **kwargs):
            return [1.0] * len(videos)

    async def inner(videos, **kwargs):
        return [2.0] * len(videos)

    for timeout in (None, 10):
        rewards, _ = run([Judge(), functools.partial(inner, x=1), lambda **kw: inner(**kw)], timeout=timeout)
        assert rewards[0].tolist() == [1, 2, 2]


def test_gradients_are_off_on_every_path():
    def sync(videos, **kwargs):
        return [float(torch.is_grad_enabled())] * len(videos)

    async def remote(**kwargs):
        return sync(**kwargs)

    assert torch.is_grad_enabled()
    for timeout in (None, 10):
        assert run([sync, remote], timeout=timeout)[0].sum() == 0
    assert torch.is_grad_enabled()


def test_logs_are_kept_by_name_and_column():
    def one(videos, log_metric, log_extra, **kwargs):
        log_metric("confidence", 0.5)
        log_metric("confidence", torch.tensor(0.7))
        log_extra("text", ["x", "y", "z"])
        return [0.0] * len(videos)

    rewards, runner = run([one, one])
    assert runner.metrics == {"confidence": [0.5, pytest.approx(0.7), 0.5, pytest.approx(0.7)]}
    assert runner.extra == {"text": ["x", "y", "z"], "one_2/text": ["x", "y", "z"]}
    runner.collect(runner.submit(PROMPTS[:0], []))
    assert runner.metrics == {} and runner.extra == {}

    def wrong(videos, log_extra, **kwargs):
        log_extra("text", ["x"] * 2)

    with pytest.raises(RewardError, match="one value a video: 1, not 2"):
        run(wrong)


def test_an_empty_batch():
    runner = RewardRunner([brightness, brightness])
    assert runner.collect(runner.submit([], [])).shape == (0, 2)


FAULTS = {
    "raises": (explode, "KeyError: 'no such object'"),
    "too short": (lambda prompts: [], r"returned 0 rewards for 1 videos"),
    "too long": (lambda prompts: [1.0] * 9, "returned 9 rewards for 1 videos"),
    "scalar": (lambda prompts: 1.0, "returned float; return a list"),
    "text": (lambda prompts: ["1.0"] * len(prompts), "returned '1.0' among"),
    "nested": (lambda prompts: torch.ones(len(prompts), 2), r"returned \[1.0, 1.0\] among"),
    "nan": (lambda prompts: [math.nan if p == "two" else 1.0 for p in prompts], "returned nan; .* or None"),
    "inf": (lambda prompts: [-math.inf if p == "two" else 1.0 for p in prompts], "returned -inf"),
    "beyond float32": (lambda prompts: [1e300 if p == "two" else 1.0 for p in prompts], r"returned 1e\+300"),
}


@pytest.mark.parametrize("timeout", [None, 30], ids=["caller", "thread"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_names_function_prompt_and_fix_or_costs_one_video(fault, timeout, caplog):
    how, message = FAULTS[fault]
    func = failing_on("two", how)
    with pytest.raises(RewardError, match=message) as caught:
        run([brightness, func], timeout=timeout)
    for part in ("'failing'", "video 1 of 3", "'two'", "on_error='skip'"):
        assert part in str(caught.value)
    rewards, runner = run([brightness, func], timeout=timeout, on_error="skip")
    assert rewards[1].isnan().all() and rewards[[0, 2]].tolist() == [[0, 1], [0.5, 1]]
    assert runner.num_skipped == 1 and "'two'" in caplog.text
    good, runner = run([brightness, func], prompts=["one", "five"], on_error="skip")
    assert good.isfinite().all() and runner.num_skipped == 0  # the control


def test_an_async_fault_is_treated_alike():
    async def remote(prompts, **kwargs):
        await asyncio.sleep(0)
        return failing_on("two", explode)(prompts=prompts)

    with pytest.raises(RewardError, match=r"'remote' failed on video 1 of 3 \(prompt 'two'\): KeyError"):
        run(remote)
    rewards, runner = run(remote, on_error="skip")
    assert rewards.isnan().flatten().tolist() == [False, True, False] and runner.num_skipped == 1


def test_a_function_that_needs_a_column_that_is_missing():
    async def remote(prompts, target, **kwargs):
        return [0.0] * len(prompts)

    with pytest.raises(RewardError, match="missing 1 required positional argument: 'target'"):
        run(remote)
    assert run(remote, columns={"target": PROMPTS})[0].sum() == 0


def test_logs_of_a_failed_call_are_dropped_and_those_of_its_parts_are_put_in_place():
    def func(prompts, log_metric, log_extra, **kwargs):
        log_metric("calls", len(prompts))
        log_extra("seen", prompts)
        return failing_on("two", explode)(prompts=prompts)

    _, runner = run(func, on_error="skip")
    assert runner.metrics == {"calls": [1.0, 1.0]} and runner.extra == {"seen": ["one", None, "three"]}


def test_a_failure_of_the_batch_alone_says_so(caplog):
    distinct = lambda prompts, **kwargs: [1.0] * len(set(prompts))  # noqa: E731
    prompts = ["same", "same", "other"]
    with pytest.raises(RewardError, match="failed on 3 videos, though on none of them alone .*'same'.*returned 2"):
        run(distinct, prompts=prompts)
    rewards, runner = run(distinct, prompts=prompts, on_error="skip")
    assert rewards.flatten().tolist() == [1, 1, 1] and runner.num_skipped == 0 and "separate calls" in caplog.text


@pytest.fixture
def release():
    event = threading.Event()
    yield event
    event.set()


def test_a_sync_function_that_hangs(release):
    calls = []

    def hanging(prompts, **kwargs):
        calls.append(prompts)
        if "two" in prompts:
            release.wait(60)
        return [1.0] * len(prompts)

    with pytest.raises(RewardError, match="'hanging' failed on 3 videos .*'one'.*no result after 0.2 s.*timeout"):
        run([brightness, hanging], timeout=0.2)
    runner = RewardRunner([brightness, hanging], timeout=0.2, on_error="skip")
    assert runner.collect(runner.submit(PROMPTS, VIDEOS)).isnan().all() and runner.num_skipped == 3
    assert 0.2 <= runner.seconds < 5
    before = len(calls)
    assert runner.collect(runner.submit(["x"], VIDEOS[:1])).isnan().all()  # its thread is still taken: not called
    assert len(calls) == before
    release.set()
    deadline = time.monotonic() + 10
    while not runner._busy[1].done() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert runner.collect(runner.submit(["x"], VIDEOS[:1])).tolist() == [[0, 1]] and runner.num_skipped == 0


def test_an_async_function_that_hangs_is_cancelled_and_the_others_are_not():
    ended = []

    async def hanging(prompts, **kwargs):
        try:
            await asyncio.sleep(0 if prompts == ["fine"] else 60)
        finally:
            ended.append(prompts)
        return [1.0] * len(prompts)

    async def quick(prompts, **kwargs):
        return [2.0] * len(prompts)

    with pytest.raises(RewardError, match="'hanging' failed on 3 videos .*no result after 0.2 s"):
        run([quick, hanging], timeout=0.2)
    runner = RewardRunner([quick, hanging], timeout=0.2, on_error="skip")
    assert runner.collect(runner.submit(PROMPTS, VIDEOS)).isnan().all() and runner.num_skipped == 3
    assert runner.collect(runner.submit(["fine"], VIDEOS[:1])).tolist() == [[2, 1]]
    assert ended.count(PROMPTS) == 2


def test_an_async_function_that_blocks_the_loop_is_noticed_and_the_loop_replaced(release):
    async def blocking(prompts, **kwargs):
        if prompts != ["fine"]:
            release.wait(60)
        return [1.0] * len(prompts)

    runner = RewardRunner(blocking, timeout=0.1)
    with pytest.raises(RewardError, match="the event loop is blocked: .* without `await`"):
        runner.collect(runner.submit(PROMPTS, VIDEOS))
    assert runner.collect(runner.submit(["fine"], VIDEOS[:1])).tolist() == [[1.0]]


def test_a_timeout_error_of_the_function_itself_is_an_ordinary_failure():
    def func(prompts):
        raise TimeoutError("server away")

    rewards, runner = run(failing_on("two", func), timeout=30, on_error="skip")
    assert runner.num_skipped == 1 and rewards.nansum() == 2


def test_a_hanging_function_does_not_keep_the_process_alive():
    code = (
        "import time, torch\n"
        "from vidtrl.rewards import RewardRunner\n"
        "runner = RewardRunner(lambda videos, **kwargs: time.sleep(600), timeout=0.1, on_error='skip')\n"
        "runner.collect(runner.submit(['x'], [torch.zeros(1, 3, 2, 2)]))\n"
        "print(runner.num_skipped)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.strip() == "1", done.stderr


def test_the_background_thread_ends_with_the_runner():
    async def remote(videos, **kwargs):
        return [0.0] * len(videos)

    def threads():
        return sum(t.name == "rewards" for t in threading.enumerate())

    def settle(wanted):
        deadline = time.monotonic() + 10
        while threads() != wanted and time.monotonic() < deadline:
            gc.collect()
            time.sleep(0.01)
        return threads() == wanted

    gc.collect()
    assert settle(0)
    runner = RewardRunner(remote)
    assert threads() == 0
    runner.collect(runner.submit(PROMPTS, VIDEOS))
    assert threads() == 1
    runner.close()
    assert settle(0)
    runner.collect(runner.submit(PROMPTS, VIDEOS))
    assert threads() == 1
    del runner
    assert settle(0)


def test_user_mistakes_name_the_fix():
    with pytest.raises(ValueError, match="no built-in reward 'toy-colour'. Did you mean 'toy-color'. Valid names: "):
        RewardRunner(["toy-colour"])
    with pytest.raises(ValueError, match="reward_funcs is empty"):
        RewardRunner([])
    with pytest.raises(TypeError, match=r"'f' is called with .* add \*\*kwargs"):

        def f(prompts, videos):
            pass

        RewardRunner(f)
    for not_a_function in (3, dict):
        with pytest.raises(TypeError, match="must be a function, an object with __call__, or a built-in name"):
            RewardRunner([not_a_function])
    with pytest.raises(ValueError, match="1 weights for 2 reward functions"):
        RewardRunner([brightness, brightness], weights=[1.0])
    with pytest.raises(ValueError, match="weights must be finite"):
        RewardRunner(brightness, weights=[math.nan])
    with pytest.raises(ValueError, match="timeout must be a positive"):
        RewardRunner(brightness, timeout=0)
    with pytest.raises(ValueError, match="on_error must be 'raise' or 'skip'"):
        RewardRunner(brightness, on_error="ignore")
    runner = RewardRunner(brightness)
    with pytest.raises(ValueError, match="3 videos but 1 values in 'prompts'"):
        runner.submit(["x"], VIDEOS)
    with pytest.raises(ValueError, match="3 videos but 2 values in 'style'"):
        runner.submit(PROMPTS, VIDEOS, {"style": ["a", "b"]})
    with pytest.raises(ValueError, match=r"rename_column\('videos', 'my_videos'\)"):
        runner.submit(PROMPTS, VIDEOS, {"videos": VIDEOS})
