"""Calls reward functions: sync or async, several at once, with every mistake traced to its function and prompt."""

import asyncio
import functools
import inspect
import logging
import math
import numbers
import threading
import time
import weakref
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from .builtin import get_reward, is_url


logger = logging.getLogger(__name__)

RESERVED = ("prompts", "videos", "completions", "trainer_state", "log_metric", "log_extra")
LOOP_GRACE = 1.0  # seconds that the event loop may be late in reporting a timeout


class RewardError(RuntimeError):
    """A reward function failed. The message names the function, the prompt and the fix."""


class RewardUnavailable(RuntimeError):
    """What scores cannot be had, a server that is down for one. A reward function raises it where no video is at fault
    and calling it again on each video alone would only take longer."""


class _TookTooLong(RewardUnavailable):
    """A call is not back in time. It cannot be told which video held it up."""


@dataclass
class _Call:
    """One call of one function on some of a handle's videos, and what it logged. A failed call is dropped with its
    logs, and so is whatever a thread that was given up still logs."""

    indices: list[int]
    kwargs: dict[str, Any] = field(default_factory=dict)
    metrics: list[tuple[str, float]] = field(default_factory=list)
    extra: dict[str, list] = field(default_factory=dict)
    values: list[float | None] = field(default_factory=list)

    def log_metric(self, name: str, value: float):
        self.metrics.append((name, float(value)))

    def log_extra(self, column: str, values: list):
        if len(values) != len(self.indices):
            raise ValueError(
                f"log_extra({column!r}, ...) takes one value a video: {len(self.indices)}, not {len(values)}"
            )
        self.extra[column] = list(values)


@dataclass
class RewardHandle:
    """Videos on their way to their rewards: what [`~RewardRunner.submit`] returns and `collect` takes."""

    prompts: list[str]
    videos: list[torch.Tensor]
    columns: dict[str, list]
    trainer_state: Any
    pending: dict[int, tuple[_Call, Future, float]]  # async calls under way and when they began, by position


class RewardRunner:
    """
    Run reward functions on batches of videos.

    Every function is called with keywords only: `prompts`, `videos`, `completions` (the same list as `videos`), every
    dataset column, `trainer_state`, `log_metric(name, value)` and `log_extra(column, values)`. It returns one float a
    video, or `None` where it does not apply, and must score each video on its own. Gradients are off during the calls.

    Async functions start in `submit`, on an event loop in a background thread, so they overlap with whatever the caller
    does until `collect`. Sync functions run in `collect`, in order, in the caller's thread. With a `timeout` they run in
    a thread of their own. Python cannot stop a thread: a sync function that hangs keeps its thread until it returns,
    and is not called again meanwhile.

    When a function raises or returns the wrong number of rewards, it is called again on each video alone to find the
    one at fault.

    Args:
        reward_funcs (`Callable` or `str` or `list`): Functions, or names of built-in rewards (see [`get_reward`]).
        weights (`list[float]`, *optional*): One finite weight a function. Defaults to 1 each. Kept for the caller as
            `weights`, a float32 tensor of shape (R,); the rewards that `collect` returns are not weighted.
        timeout (`float`, *optional*): Seconds that one call may take. By default a call may take forever.
        on_error (`str`, *optional*, defaults to `"raise"`): `"raise"`, or `"skip"` to drop the videos at fault (NaN in
            every column: a sum that lacks one reward is not comparable to the others of its group) and count them.

    Attributes, each about the last `collect`:
        metrics (`dict[str, list[float]]`): Values given to `log_metric`, by name.
        extra (`dict[str, list]`): Values given to `log_extra`, one a video, by column.
        num_skipped (`int`): Videos dropped because a function failed on them.
        seconds (`float`): Time that the caller waited in `collect`.

    Raises:
        `ValueError` or `TypeError`: For an unknown name, a wrong number of weights, or a function that cannot be called
            this way.

    Example:

    ```python
    >>> import torch
    >>> from vidtrl.rewards import RewardRunner

    >>> def brightness(videos, **kwargs):
    ...     return [v.mean().item() for v in videos]

    >>> runner = RewardRunner([brightness, "flicker"])
    >>> handle = runner.submit(prompts=["a cat"], videos=[torch.ones(5, 3, 64, 64)])
    >>> runner.collect(handle)
    tensor([[1., 1.]])
    ```
    """

    def __init__(
        self,
        reward_funcs: Callable | str | list[Callable | str],
        weights: list[float] | None = None,
        timeout: float | None = None,
        on_error: str = "raise",
    ):
        if not isinstance(reward_funcs, (list, tuple)):
            reward_funcs = [reward_funcs]
        if not reward_funcs:
            raise ValueError("reward_funcs is empty: pass at least one function or built-in name")
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error must be 'raise' or 'skip', not {on_error!r}")
        if timeout is not None and not (timeout > 0 and math.isfinite(timeout)):
            raise ValueError(f"timeout must be a positive number of seconds or None, not {timeout!r}")
        if weights is not None and len(weights) != len(reward_funcs):
            raise ValueError(f"{len(weights)} weights for {len(reward_funcs)} reward functions: give one for each")
        self.weights = torch.tensor([1.0] * len(reward_funcs) if weights is None else weights, dtype=torch.float32)
        if not self.weights.isfinite().all():
            raise ValueError(f"weights must be finite, got {weights}")
        self.timeout, self.on_error = timeout, on_error
        self.functions: list[Callable] = []
        self.names: list[str] = []
        for func in reward_funcs:
            named = isinstance(func, str)
            function = get_reward(func) if named else func
            name, func = func if named and not is_url(func) else _name(function), function
            _check_signature(name, func)
            self.functions.append(func)
            self.names.append(_unused(name, self.names))
        self.metrics: dict[str, list[float]] = {}
        self.extra: dict[str, list] = {}
        self.num_skipped = 0
        self.seconds = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop_loop: weakref.finalize | None = None
        self._busy: dict[int, Future] = {}  # sync calls that outlived their timeout, by position

    def submit(
        self,
        prompts: list[str],
        videos: list[torch.Tensor],
        columns: dict[str, list] | None = None,
        trainer_state: Any = None,
    ) -> RewardHandle:
        """
        Take videos in and start the async functions.

        Args:
            prompts (`list[str]`): One prompt a video.
            videos (`list[torch.Tensor]`): Float tensors of shape (F, C, H, W) in [0, 1]. Leave them unchanged until
                the handle is collected.
            columns (`dict[str, list]`, *optional*): Other dataset columns, one value a video.
            trainer_state (`transformers.TrainerState`, *optional*): Handed on to the functions.

        Returns:
            `RewardHandle`: For `collect`. Several may be on their way at once.

        Raises:
            `ValueError`: If lengths differ or a column has a reserved name.
        """
        columns = columns or {}
        for name, values in {"prompts": prompts, **columns}.items():
            if len(values) != len(videos):
                raise ValueError(f"{len(videos)} videos but {len(values)} values in {name!r}: give one a video")
        for name in columns:
            if name in RESERVED:
                raise ValueError(
                    f"the dataset column {name!r} has the name of an argument that every reward function receives: "
                    f"rename it, e.g. dataset.rename_column({name!r}, 'my_{name}')"
                )
        handle = RewardHandle(list(prompts), list(videos), dict(columns), trainer_state, {})
        for position, func in enumerate(self.functions if videos else ()):
            if _is_async(func):
                call = self._call(handle)
                future = self._start(functools.partial(func, **call.kwargs), videos)
                handle.pending[position] = call, future, time.monotonic()
        return handle

    def collect(self, handle: RewardHandle) -> torch.Tensor:
        """
        Run the sync functions, wait for the async ones, and check what all of them returned.

        Args:
            handle (`RewardHandle`): From `submit`. Collect each handle once.

        Returns:
            `torch.Tensor`: Unweighted rewards, float32 on the CPU, of shape (N, R). NaN where a function returned
            `None`, and in the whole row of a video that was skipped.

        Raises:
            `RewardError`: If a function raised, took too long, or returned a wrong length, a NaN or an infinity, unless
                `on_error="skip"`.
        """
        start = time.perf_counter()
        n = len(handle.videos)
        rewards = torch.full((n, len(self.functions)), float("nan"))
        skipped: set[int] = set()
        self.metrics, self.extra, self.num_skipped = {}, {}, 0
        for position, name in enumerate(self.names if n else ()):
            calls, failed = self._score(position, handle)
            skipped |= failed
            taken = set(self.extra)
            for call in calls:
                for index, value in zip(call.indices, call.values, strict=True):
                    if value is not None and index not in failed:
                        rewards[index, position] = value
                for metric, value in call.metrics:
                    self.metrics.setdefault(metric, []).append(value)
                for column, values in call.extra.items():
                    column = f"{name}/{column}" if column in taken else column
                    merged = self.extra.setdefault(column, [None] * n)
                    for index, value in zip(call.indices, values, strict=True):
                        merged[index] = value
                call.kwargs.clear()  # log_metric refers back to the call: videos would wait for the garbage collector
        rewards[sorted(skipped)] = float("nan")
        self.num_skipped = len(skipped)
        self.seconds = time.perf_counter() - start
        return rewards

    def close(self):
        """Stop the background thread and cancel what runs on it. A later `submit` starts a new one."""
        if self._stop_loop is not None:
            self._stop_loop()
        self._loop = self._stop_loop = None

    def _score(self, position: int, handle: RewardHandle) -> tuple[list[_Call], set[int]]:
        """The calls of one function that succeeded, and the videos that failed."""
        everything = range(len(handle.videos))
        try:
            calls = [self._finish(position, handle)]
        except RewardUnavailable as error:  # calling again would take just as long
            self._report(position, handle, list(everything), error)
            return [], set(everything)
        except Exception as error:
            if len(everything) == 1:
                self._report(position, handle, [0], error)
                return [], {0}
            return self._score_one_by_one(position, handle, error)
        return calls, self._check_finite(position, handle, calls)

    def _score_one_by_one(self, position, handle, error) -> tuple[list[_Call], set[int]]:
        calls, failed = [], set()
        for index in range(len(handle.videos)):
            try:
                calls.append(self._run(position, self._call(handle, [index])))
            except RewardUnavailable as late:
                rest = list(range(index, len(handle.videos)))
                self._report(position, handle, rest, late)
                failed |= set(rest)
                break
            except Exception as alone:
                self._report(position, handle, [index], alone)
                failed.add(index)
        if not failed:
            message = (
                f"reward function {self.names[position]!r} failed on {len(handle.videos)} videos, though on none of "
                f"them alone (first prompt {handle.prompts[0]!r}): {type(error).__name__}: {error}. Make it score each "
                "video on its own and return one value a video."
            )
            if self.on_error == "raise":
                raise RewardError(message) from error
            logger.warning("%s The values of the separate calls are used.", message)
        return calls, failed | self._check_finite(position, handle, calls)

    def _check_finite(self, position, handle, calls) -> set[int]:
        bad = set()
        for call in calls:
            for index, value in zip(call.indices, call.values, strict=True):
                if value is not None and not abs(value) <= torch.finfo(torch.float32).max:  # true for NaN as well
                    error = ValueError(f"returned {value}; return a finite number, or None where it does not apply")
                    self._report(position, handle, [index], error)
                    bad.add(index)
        return bad

    def _report(self, position, handle, indices, error):
        which = f"video {indices[0]}" if len(indices) == 1 else f"{len(indices)} videos from video {indices[0]} on"
        message = (
            f"reward function {self.names[position]!r} failed on {which} of {len(handle.videos)} (prompt "
            f"{handle.prompts[indices[0]]!r}): {type(error).__name__.lstrip('_')}: {error}."
        )
        if self.on_error == "raise":
            raise RewardError(
                f"{message} Fix the function, or drop such videos and count them with on_error='skip' "
                "(reward_error='skip' in the trainer's config)."
            ) from error
        logger.warning("%s Skipped.", message)

    def _call(self, handle: RewardHandle, indices: list[int] | None = None) -> _Call:
        call = _Call(list(range(len(handle.videos))) if indices is None else indices)
        pick = lambda values: [values[i] for i in call.indices]  # noqa: E731
        videos = pick(handle.videos)
        call.kwargs = {name: pick(values) for name, values in handle.columns.items()}
        call.kwargs.update(prompts=pick(handle.prompts), videos=videos, completions=videos)
        call.kwargs.update(trainer_state=handle.trainer_state, log_metric=call.log_metric, log_extra=call.log_extra)
        return call

    def _finish(self, position: int, handle: RewardHandle) -> _Call:
        if position not in handle.pending:
            return self._run(position, self._call(handle))
        call, future, began = handle.pending.pop(position)
        call.values = _values(self._wait(future, began), len(call.indices))
        return call

    def _run(self, position: int, call: _Call) -> _Call:
        func, videos = self.functions[position], call.kwargs["videos"]
        if _is_async(func):
            result = self._wait(self._start(functools.partial(func, **call.kwargs), videos), time.monotonic())
        elif self.timeout is None:
            with torch.no_grad():
                result = func(**call.kwargs)
        else:
            result = self._run_in_thread(position, call)
        if inspect.isawaitable(result):  # a plain function that wraps an async one
            result = self._wait(self._start(lambda: result, videos), time.monotonic())
        call.values = _values(result, len(call.indices))
        return call

    def _run_in_thread(self, position: int, call: _Call):
        if position in self._busy and not self._busy[position].done():
            raise _TookTooLong(f"an earlier call is still running after more than {self.timeout:g} s")
        future: Future = Future()

        def work():
            _set_up_thread(call.kwargs["videos"])
            try:
                future.set_result(self.functions[position](**call.kwargs))
            except BaseException as error:  # handed to the caller, who raises it
                future.set_exception(error)

        # a daemon, so that a function that never returns does not keep the process alive
        threading.Thread(target=work, name=f"reward-{self.names[position]}", daemon=True).start()
        if not wait([future], self.timeout).done:
            self._busy[position] = future
            raise _TookTooLong(f"no result after {self.timeout:g} s; a larger reward timeout allows more")
        return future.result()

    def _start(self, make: Callable[[], Awaitable], videos) -> Future:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            # stops the thread when the runner is collected, and at exit
            self._stop_loop = weakref.finalize(self, self._loop.call_soon_threadsafe, self._loop.stop)
            threading.Thread(target=_run_loop, args=(self._loop, videos), name="rewards", daemon=True).start()
        return asyncio.run_coroutine_threadsafe(_bounded(make, self.timeout), self._loop)

    def _wait(self, future: Future, began: float):
        """The result of an async call. Its own deadline is kept on the loop; here only a loop that is stuck is noticed:
        a coroutine that blocks without `await` keeps every other one from running."""
        if self.timeout is not None:
            left = began + self.timeout - time.monotonic()
            if not wait([future], max(0.0, left) + LOOP_GRACE).done:
                self.close()
                raise _TookTooLong(
                    f"no result after {self.timeout:g} s, and the event loop is blocked: this async function or another "
                    "one waits without `await` (use asyncio.sleep, an async client, or asyncio.to_thread)"
                )
        return future.result()


async def _bounded(make, timeout):
    task = asyncio.ensure_future(make())  # called here, so that a wrong signature counts as a failed call
    # asyncio.wait, because wait_for's TimeoutError could not be told from one that the function raises
    done, _ = await asyncio.wait({task}, timeout=timeout)
    if not done:
        task.cancel()
        raise _TookTooLong(f"no result after {timeout:g} s; a larger reward timeout allows more")
    return task.result()


def _run_loop(loop: asyncio.AbstractEventLoop, videos):
    _set_up_thread(videos)
    asyncio.set_event_loop(loop)
    loop.run_forever()
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
    loop.close()


def _set_up_thread(videos):
    """Gradient mode and current device belong to a thread; a new one starts with gradients on device 0."""
    torch.set_grad_enabled(False)
    if videos[0].is_cuda:
        torch.cuda.set_device(videos[0].device)


def _values(result, n: int) -> list[float | None]:
    """One Python float or `None` a video, whatever list, tuple, tensor or array came back."""
    if isinstance(result, (torch.Tensor, np.ndarray)):
        result = result.tolist()
    if not isinstance(result, (list, tuple)):
        raise TypeError(f"returned {type(result).__name__}; return a list with one float or None a video")
    if len(result) != n:
        raise ValueError(f"returned {len(result)} rewards for {n} videos; return one float or None a video")
    values = []
    for value in result:
        if isinstance(value, (torch.Tensor, np.ndarray, np.generic)) and value.ndim == 0:
            value = value.item()
        if value is not None and not isinstance(value, numbers.Real):
            raise TypeError(f"returned {value!r} among its rewards; return one float or None a video")
        values.append(value)
    return values


def _is_async(func: Callable) -> bool:
    return inspect.iscoroutinefunction(func) or inspect.iscoroutinefunction(type(func).__call__)


def _name(func: Callable) -> str:
    while isinstance(func, functools.partial):
        func = func.func
    return getattr(func, "__name__", type(func).__name__)


def _unused(name: str, names: list[str]) -> str:
    """The name, or `name_2`, `name_3`, ... where it is taken."""
    count, candidate = 1, name
    while candidate in names:
        count += 1
        candidate = f"{name}_{count}"
    return candidate


def _check_signature(name: str, func: Callable):
    if not callable(func) or inspect.isclass(func):
        raise TypeError(f"a reward must be a function, an object with __call__, or a built-in name, not {func!r}")
    parameters = inspect.signature(func).parameters.values()
    takes = {p.name for p in parameters}
    if not any(p.kind is p.VAR_KEYWORD for p in parameters) and not takes.issuperset(RESERVED):
        raise TypeError(
            f"reward function {name!r} is called with {', '.join(RESERVED)} and every dataset column by keyword: add "
            "**kwargs to its signature"
        )
