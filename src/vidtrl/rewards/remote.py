"""A reward that is computed elsewhere: the client of [`RewardServer`].

To the trainer it is one more async reward function, so it works while the next rollout is sampled. A call is cut into requests
of a few videos, spread over the replicas of the server. A request keeps its id through every retry: a server that has scored it
already, but whose answer was lost, answers again without scoring twice.
"""

import asyncio
import contextlib
import http.client
import json
import logging
import math
import os
import random
import socket
import ssl
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from urllib.parse import urlsplit

import torch

from .connection import Deadline
from .runner import RewardUnavailable
from .wire import CONTENT_TYPE, DTYPES, PATH, ScoreRequest, check_reply, pack


logger = logging.getLogger(__name__)

TOKEN_VARIABLE = "VIDTRL_REWARD_TOKEN"
CONNECT_TIMEOUT = 10.0  # seconds
FIRST_REST, LONGEST_REST = 0.5, 15.0  # seconds that a replica is left alone after its first failure, doubled each time
MAX_ANSWER = 1 << 26  # bytes
JITTER = random.Random()  # of its own: drawing from the global one in threads would change what training draws


class RemoteRewardError(RuntimeError):
    """The reward function on the server failed. The message has the type, the message and the video of its error."""


class _Cancelled(Exception):
    """Nobody waits for the result any more."""


@dataclass
class _Replica:
    """One server, and how it fares."""

    url: str
    host: str
    port: int
    prefix: str
    is_https: bool
    outstanding: int = 0
    sent: int = 0
    failures: int = 0  # in a row
    rests_until: float = 0.0


class _Call:
    """The connections of one call, which are cut when nobody waits for it any more."""

    def __init__(self):
        self.stopped = threading.Event()
        self._sockets: set[socket.socket] = set()
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def using(self, sock: socket.socket):
        with self._lock:
            if self.stopped.is_set():
                raise _Cancelled
            self._sockets.add(sock)
        try:
            yield
        finally:
            with self._lock:
                self._sockets.discard(sock)

    def stop(self):
        with self._lock:
            self.stopped.set()
            for sock in self._sockets:
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)  # ends a blocking read, which `close` does not


class RemoteReward:
    """
    A reward function that runs on one or more servers started with `vidtrl reward-server`.

    Pass it to a trainer or [`RewardRunner`] like any function. In a list of reward functions or a YAML file the URL alone
    stands for it: `"http://host:8000"`, `"http://host:8000#motion-magnitude"` for one of several rewards of a server,
    `"http://a:8000,http://b:8000"` for replicas.

    Args:
        url (`str` or `list[str]`): Address of the server, or of several that serve the same reward. A path before the
            server's own is kept (`https://host/judge`); certificates are checked against the system's, or those of
            `SSL_CERT_FILE`. Proxies are not used.
        reward (`str`, *optional*): Name of the reward on the server. Default: what stands after `#` in the URL, or the
            server's only one.
        name (`str`, *optional*): Under which the reward is logged here. Default: `reward`, or else what the server calls its
            only one, for which it is asked when a trainer or runner takes this reward.
        token (`str`, *optional*): The server's secret. Default: the environment variable `VIDTRL_REWARD_TOKEN`.
        columns (`list[str]`, *optional*): Dataset columns that are sent. Default: all. They may hold what JSON holds, or PIL
            images (L, LA, RGB or RGBA, `None` between them), which arrive as such and bit for bit.
        dtype (`str`, *optional*, defaults to `"uint8"`): Of the videos on their way: `"uint8"`, `"float16"` or
            `"float32"`. See [`~vidtrl.rewards.wire.quantize`].
        batch_size (`int`, *optional*, defaults to 4): Videos in one request.
        concurrency (`int`, *optional*, defaults to 2): Requests under way at once, for each replica.
        timeout (`float`, *optional*, defaults to 300): Seconds that a server may take over one request, waiting included,
            before it counts as failed; also how long it may send requests away because it is busy.
        max_retries (`int`, *optional*, defaults to 12): How often a request is sent again, for each replica, when
            connections fail, time out or end early. Pauses double from 0.5 s to 15 s: about two minutes in all.

    Raises:
        `ValueError`: For a URL that is none, a token that no header can carry, or a number out of range.

    When called, it raises [`RemoteRewardError`] if the reward function failed on the server, and
    [`~vidtrl.rewards.RewardUnavailable`] if no server answered or it refused the request, with the fix in the message, or if
    the function raised that itself.

    Example:

    ```python
    trainer = VideoGRPOTrainer(
        model="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        reward_funcs=[RemoteReward(["http://gpu1:8000", "http://gpu2:8000"], name="judge"), "motion-magnitude"],
        ...
    )
    ```
    """

    def __init__(
        self,
        url: str | list[str],
        reward: str | None = None,
        name: str | None = None,
        token: str | None = None,
        columns: list[str] | None = None,
        dtype: str = "uint8",
        batch_size: int = 4,
        concurrency: int = 2,
        timeout: float = 300.0,
        max_retries: int = 12,
    ):
        urls = [part.strip() for part in url.split(",")] if isinstance(url, str) else list(url)
        named = {urlsplit(one).fragment for one in urls} - {""} | ({reward} - {None})
        if not urls or len(set(urls)) < len(urls):
            raise ValueError(f"give one or more different addresses of reward servers, not {url!r}")
        if len(named) > 1:
            raise ValueError(
                f"replicas serve one reward, not {', '.join(sorted(named))}: make one RemoteReward for each"
            )
        self.replicas = [_replica(one) for one in urls]
        self.reward = named.pop() if named else None
        self._name = name or self.reward
        token = os.environ.get(TOKEN_VARIABLE) if token is None else token
        if token and not (token.isascii() and token.isprintable() and " " not in token):
            raise ValueError("the token must be printable ASCII without spaces: check VIDTRL_REWARD_TOKEN")
        self._token = token or None
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
        for key, value in (("batch_size", batch_size), ("concurrency", concurrency)):
            if value < 1:
                raise ValueError(f"{key} must be at least 1, not {value}")
        if not (timeout > 0 and math.isfinite(timeout)) or max_retries < 0:
            raise ValueError(f"timeout must be positive and max_retries not negative, not {timeout} and {max_retries}")
        self.columns, self.dtype, self.batch_size = columns, dtype, batch_size
        self.timeout, self.max_retries = timeout, max_retries
        # a plain lock and semaphore, since calls may come from several event loops
        self._lock = threading.Lock()
        self._places = threading.BoundedSemaphore(concurrency * len(urls))

    def __repr__(self):
        return f"RemoteReward({[replica.url for replica in self.replicas]}, reward={self.reward!r})"

    @property
    def __name__(self) -> str:
        """Under which it is logged. Raises as `check` where the server has to be asked."""
        if self._name is None:
            (self._name,) = self.check()
        return self._name

    def check(self) -> list[str]:
        """
        Ask each server what it serves; servers that are still starting are waited for as in a call.

        Returns:
            `list[str]`: The names of the rewards.

        Raises:
            [`~vidtrl.rewards.RewardUnavailable`]: If none can be reached, the token is wrong, or there is no such reward.
        """
        answer = self._persist(lambda replica: self._exchange(replica, "GET", "/v1/info", None, _Call()), _Call())
        names = answer.get("rewards") if isinstance(answer, dict) else None
        if not isinstance(names, list):
            raise RewardUnavailable(f"what answers at {self._where()} is no vidtrl reward server: check the address")
        if self.reward not in names and (self.reward is not None or len(names) > 1):
            wanted = "one has to be named" if self.reward is None else f"there is no {self.reward!r}"
            raise RewardUnavailable(
                f"{self._where()} serves {', '.join(names)}; {wanted}, as in {self.replicas[0].url}#{names[0]}"
            )
        return names

    async def __call__(
        self,
        prompts: list[str],
        videos: list[torch.Tensor],
        completions=None,
        trainer_state=None,
        log_metric: Callable | None = None,
        log_extra: Callable | None = None,
        **columns,
    ) -> list[float | None]:
        if self.columns is not None:
            if missing := [name for name in self.columns if name not in columns]:
                raise ValueError(f"the dataset has no column {missing[0]!r}; it has {', '.join(columns) or 'none'}")
            columns = {name: columns[name] for name in self.columns}
        call, n, size = _Call(), len(videos), self.batch_size
        parts = [slice(start, min(start + size, n)) for start in range(0, n, size)]
        futures = []
        try:
            for part in parts:
                request = ScoreRequest(
                    uuid.uuid4().hex,
                    self.reward,
                    list(prompts[part]),
                    list(videos[part]),
                    {name: list(values[part]) for name, values in columns.items()},
                    trainer_state,
                )
                futures.append(asyncio.wrap_future(_in_thread(self._score, request, call, part.start)))
            answers = await asyncio.gather(*futures)
        finally:  # after an error or a cancellation the other parts are not waited for
            call.stop()
        extra: dict[str, list] = {}
        for part, answer in zip(parts, answers, strict=True):
            for metric, value in answer["metrics"] if log_metric else ():
                log_metric(metric, value)
            for column, values in answer["extra"].items():
                extra.setdefault(column, [None] * n)[part] = values
        for column, values in extra.items() if log_extra else ():
            log_extra(column, values)
        return [value for answer in answers for value in answer["rewards"]]

    def _score(self, request: ScoreRequest, call: _Call, start: int) -> dict:
        """One request, from the first try to the answer. Runs in a thread of its own."""
        with self._places:  # bodies are made here, so that few are in memory
            if call.stopped.is_set():
                raise _Cancelled
            body = pack(request, self.dtype)
            n = len(request.videos)

            def attempt(replica: _Replica) -> tuple[int, dict, object]:
                status, retry_after, answer = self._exchange(replica, "POST", PATH, body, call)
                if status == 200:
                    answer = check_reply(answer, request.id, n)
                return status, retry_after, answer

            return self._persist(attempt, call, start)

    def _persist(self, attempt: Callable, call: _Call, start: int = 0):
        """Try the replicas until one answers, and return its answer."""
        failures, busy_since, last = 0, None, ""
        while failures < (self.max_retries + 1) * len(self.replicas):
            replica = self._take(call)
            began = time.monotonic()
            try:
                status, retry_after, answer = attempt(replica)
                problem = f"HTTP {status}: {_message(answer)}"
            except ssl.SSLCertVerificationError as error:
                raise RewardUnavailable(
                    f"{replica.url} has a certificate that is not trusted ({error.verify_message}): set SSL_CERT_FILE to "
                    "the file of the one that signed it"
                ) from error
            except ValueError as error:
                raise RewardUnavailable(
                    f"{replica.url} is no vidtrl reward server of this version: {error}"
                ) from error
            except (OSError, http.client.HTTPException) as error:
                status, retry_after, problem = 0, None, f"{type(error).__name__}: {error}"
            finally:
                with self._lock:
                    replica.outstanding -= 1
            if call.stopped.is_set():
                raise _Cancelled
            if status == 200:
                with self._lock:
                    replica.failures, replica.rests_until = 0, 0.0
                return answer
            if 300 <= status < 500 and status not in (408, 429):  # another try would not change it
                raise self._refusal(replica, status, answer, start)
            last = f"{replica.url}: {problem}"
            if status in (429, 503):  # busy, not broken
                busy_since = busy_since or began
                if time.monotonic() - busy_since > self.timeout:
                    break
                with self._lock:
                    replica.rests_until = time.monotonic() + min(retry_after or 1.0, LONGEST_REST) * JITTER.uniform(
                        0.5, 1
                    )
            else:
                failures, busy_since = failures + 1, None
                self._put_aside(replica, began, problem)
        raise RewardUnavailable(
            f"no answer from {self._where()} in {failures + (busy_since is not None)} tries; the last: {last}. See that the "
            "server runs (vidtrl reward-server) and can be reached; timeout and max_retries of RemoteReward say how long to "
            "try, and more replicas help one that is busy"
        )

    def _take(self, call: _Call) -> _Replica:
        """The replica with the least to do among those that have not failed just now; waits until there is one."""
        while True:
            with self._lock:
                now = time.monotonic()
                ready = [replica for replica in self.replicas if replica.rests_until <= now]
                if ready:
                    replica = min(ready, key=lambda r: (r.outstanding, r.sent))
                    replica.outstanding += 1
                    replica.sent += 1
                    return replica
                wait = min(replica.rests_until for replica in self.replicas) - now
            if call.stopped.wait(wait + JITTER.uniform(0, 0.05)):
                raise _Cancelled

    def _put_aside(self, replica: _Replica, began: float, problem: str) -> None:
        with self._lock:
            if began < replica.rests_until:
                return  # several requests met the same failure: it counts once
            replica.failures += 1
            rest = min(FIRST_REST * 2 ** min(replica.failures - 1, 10), LONGEST_REST) * JITTER.uniform(0.5, 1)
            replica.rests_until = time.monotonic() + rest
            first = replica.failures == 1
        logger.log(
            logging.WARNING if first else logging.INFO,
            "reward server %s failed (%s); %s",
            replica.url,
            problem,
            "trying again, or the other replicas" if first else f"again in {rest:.1f} s",
        )

    def _exchange(self, replica: _Replica, method: str, path: str, body: bytes | None, call: _Call):
        """One request over a connection of its own: (status, seconds of Retry-After or `None`, decoded answer)."""
        kind = http.client.HTTPSConnection if replica.is_https else http.client.HTTPConnection
        connection = kind(replica.host, replica.port, timeout=min(CONNECT_TIMEOUT, self.timeout))
        headers = {"Connection": "close", "Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = CONTENT_TYPE
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        with contextlib.closing(connection):
            connection.connect()
            sock = connection.sock
            sock.settimeout(self.timeout)  # of sending all of the body, but of each piece that is received
            deadline = Deadline(sock, self.timeout)
            try:
                with call.using(sock):
                    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                        # a server that refuses a request says so before it has read all of it, and closes
                        connection.request(method, replica.prefix + path, body, headers)
                    response = connection.getresponse()
                    content = response.read(MAX_ANSWER + 1)
            except http.client.HTTPException:
                if not deadline.passed:
                    raise
            finally:
                deadline.cancel()
        if deadline.passed:
            raise TimeoutError(f"no whole answer after {self.timeout:g} s")
        if len(content) > MAX_ANSWER:
            raise ValueError(f"the answer is longer than {MAX_ANSWER} bytes")
        if response.length:  # http.client reads a body that ends early as if it were whole when given a size
            raise http.client.IncompleteRead(content, response.length)
        retry_after = response.headers.get("Retry-After", "")
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            if response.status == 200:
                raise ValueError("the answer is no JSON") from None
            answer = None  # a page of a proxy
        return response.status, float(retry_after) if retry_after.isdecimal() else None, answer

    def _refusal(self, replica: _Replica, status: int, answer, start: int) -> Exception:
        """The error for an answer that another try would not change."""
        error = answer.get("error") if isinstance(answer, dict) else None
        if status == 422 and isinstance(error, dict):
            index = error.get("index")
            where = f"video {start + index}" if isinstance(index, int) else "no video alone"
            trace = f"\nOn the server:\n{error['traceback']}" if "traceback" in error else ""
            unavailable = error.get("type") == RewardUnavailable.__name__  # no video is at fault
            return (RewardUnavailable if unavailable else RemoteRewardError)(
                f"{error.get('type')}: {error.get('message')} (reward {error.get('reward')!r} at {replica.url}, {where}){trace}"
            )
        fixes = {
            401: f"set the environment variable {TOKEN_VARIABLE} to the server's token, or pass token=",
            403: "ask for it by the address that it listens on, or give the server a token",
            404: "check the address",
        }
        message = f"{replica.url} refused the request (HTTP {status}: {_message(answer)})"
        return RewardUnavailable(f"{message}: {fixes[status]}" if status in fixes else message)

    def _where(self) -> str:
        return ", ".join(replica.url for replica in self.replicas)


def _replica(url: str) -> _Replica:
    parts = urlsplit(url)
    if "@" in parts.netloc or parts.query:
        raise ValueError(
            f"the URL of a reward server holds no credentials and no query: set {TOKEN_VARIABLE} instead"
        )  # the URL is not shown: it may hold a secret
    try:
        port = parts.port
    except ValueError:
        port = -1
    if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
        raise ValueError(f"{url!r} is no address of a reward server: write http://host:port or https://host:port")
    is_https = parts.scheme == "https"
    prefix = parts.path.rstrip("/")
    return _Replica(
        f"{parts.scheme}://{parts.netloc}{prefix}", parts.hostname, port or (443 if is_https else 80), prefix, is_https
    )


def _message(answer) -> str:
    error = answer.get("error") if isinstance(answer, dict) else None
    return str(error.get("message"))[:500] if isinstance(error, dict) else "no reason given"


def _in_thread(work: Callable, *args) -> Future:
    """Run in a daemon thread, so that a server that never answers does not keep the process alive."""
    future: Future = Future()

    def run():
        if not future.set_running_or_notify_cancel():
            return
        try:
            with torch.no_grad():
                result = work(*args)
        except BaseException as error:  # handed to the caller, who raises it
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, name="remote-reward", daemon=True).start()
    return future
