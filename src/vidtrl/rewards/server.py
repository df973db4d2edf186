"""Reward functions behind HTTP, for [`RemoteReward`]: a judge on a GPU of its own, shared by every rank that trains.

A request is one POST with the videos (`wire.py`). Functions run in one thread, one call at a time, since a model on a device
cannot be entered twice; requests wait in a queue of bounded length, and who finds it full is told to come back. A request that
is sent again under its id, because its answer was lost, gets the same answer and no second call.
"""

import asyncio
import contextlib
import hmac
import http.server
import inspect
import ipaddress
import json
import logging
import math
import queue
import re
import socket
import socketserver
import ssl
import sys
import threading
import time
import traceback
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from http import HTTPStatus

import numpy as np
import torch

from .connection import Handler, Job, error_answer
from .runner import RewardUnavailable, _Call, _check_signature, _values
from .wire import PROTOCOL, ScoreRequest, dequantize


logger = logging.getLogger(__name__)

TOKEN = re.compile("[!-~]{16,}")
MAX_CONNECTIONS = 256
MAX_ANSWERS = 1024  # kept for requests that are sent again


class _Failed(Exception):
    """What a reward function raised, and on which video where that is known."""

    def __init__(self, error: BaseException, index: int | None = None):
        super().__init__(str(error))
        self.error, self.index = error, index


class RewardServer(http.server.ThreadingHTTPServer):
    """
    Serves reward functions to [`RemoteReward`]. `with` starts and stops it; `url` is where it listens.

    Args:
        rewards (`dict[str, Callable]`): Reward functions, sync or async, by the name under which clients ask for them.
        host (`str`, *optional*, defaults to `"127.0.0.1"`): Name or address of the interface to listen on; `"0.0.0.0"` is
            every one. Any but a loopback interface needs a token.
        port (`int`, *optional*, defaults to `0`): 0 takes a free one.
        token (`str`, *optional*): The secret that clients must send: 16 or more printable ASCII characters. Without one,
            whoever can reach the port can use it; requests for another host's name are still refused.
        device (`str` or `torch.device`, *optional*): Where the functions get their videos. Default: the GPU if there is one.
        max_body (`int`, *optional*, defaults to 1 GiB): Bytes of a request. A larger one is refused unread.
        max_queue (`int`, *optional*, defaults to 16): Requests in memory, running, waiting or being read.
        batch_size (`int`, *optional*, defaults to 0): Join waiting requests for one reward into calls of up to so many
            videos; 0 calls once a request. What a joined call logs as a metric goes to each of its requests.
        read_timeout (`float`, *optional*, defaults to 120): Seconds in which a request's body must have arrived.
        request_timeout (`float`, *optional*, defaults to 600): Seconds after which a request that waits for its turn or
            its result is answered 504. The call goes on: Python cannot stop it. `/health` fails while one takes longer.
        tracebacks (`bool`, *optional*, defaults to `False`): Send clients the traceback of a reward function's error.
        tls (`tuple[str, str]`, *optional*): Files of certificate and private key (PEM), for https.

    Raises:
        `ValueError`: For an interface without a token, a weak token or a number out of range. `TypeError` for a function
            that cannot be called as a reward. `OSError` if the port is taken.

    Example:

    ```python
    >>> from vidtrl.rewards import RemoteReward, RewardServer

    >>> def brightness(videos, **kwargs):
    ...     return [v.mean().item() for v in videos]

    >>> with RewardServer({"brightness": brightness}) as server:
    ...     RemoteReward(server.url).check()
    ['brightness']
    ```
    """

    daemon_threads = True
    block_on_close = False  # `stop` waits for requests, and not for who keeps a connection open
    allow_reuse_address = sys.platform != "win32"  # there it would let two servers share a port
    request_queue_size = MAX_CONNECTIONS

    def __init__(
        self,
        rewards: Mapping[str, Callable],
        host: str = "127.0.0.1",
        port: int = 0,
        token: str | None = None,
        device: str | torch.device | None = None,
        max_body: int = 1 << 30,
        max_queue: int = 16,
        batch_size: int = 0,
        read_timeout: float = 120.0,
        request_timeout: float = 600.0,
        tracebacks: bool = False,
        tls: tuple[str, str] | None = None,
    ):
        if not rewards:
            raise ValueError("rewards is empty: serve at least one reward function")
        for name, func in rewards.items():
            _check_signature(name, func)
        if token is not None and not TOKEN.fullmatch(token):
            raise ValueError(
                "the token must be 16 or more printable ASCII characters without spaces, for example the output of "
                "`python -c 'import secrets; print(secrets.token_urlsafe())'`"
            )
        for name, value in (("max_body", max_body), ("max_queue", max_queue)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        for name, value in (("read_timeout", read_timeout), ("request_timeout", request_timeout)):
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be a positive number of seconds, not {value}")
        family, address = _resolve(host, port)
        self.is_local = ipaddress.ip_address(address[0].partition("%")[0]).is_loopback
        if not self.is_local and token is None:
            raise ValueError(
                f"{host!r} can be reached from other machines: give a token (VIDTRL_REWARD_TOKEN or --token_file), or "
                "listen on 127.0.0.1 and forward the port over SSH"
            )
        self.rewards, self.max_body, self.batch_size = dict(rewards), max_body, batch_size
        self.read_timeout, self.request_timeout, self.tracebacks = read_timeout, request_timeout, tracebacks
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.has_token, self._secret = token is not None, f"Bearer {token}".encode()
        self.slots = threading.BoundedSemaphore(max_queue)
        self._connections = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._waiting: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._jobs: OrderedDict[str, Job] = OrderedDict()  # by id, under way or answered
        self._changed = threading.Condition()
        self._active, self._stopping = 0, False  # requests being handled; whether new ones are sent away
        self._busy_since: float | None = None
        self._counts: Counter[tuple[str, str]] = Counter()  # by metric and labels
        # a daemon, so that a function that never returns does not keep the process alive
        self._worker = threading.Thread(target=self._work, name="reward-worker", daemon=True)
        self.address_family = family
        super().__init__(address, Handler)
        if tls is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*tls)
            # the handshake is left to the connection's own thread
            self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        shown = f"[{address[0]}]" if family == socket.AF_INET6 else address[0]
        self.url = f"http{'s' if tls else ''}://{shown}:{self.server_port}"

    def server_bind(self):
        # HTTPServer's own asks the resolver for this machine's name, which can hang without a network
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    def start(self) -> None:
        """Serve in background threads until `stop`."""
        self._worker.start()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True).start()

    def send_away(self) -> None:
        """Answer new requests with 503 from now on; [`~RewardServer.stop`] does it as well."""
        with self._changed:
            self._stopping = True

    def stop(self, grace: float = 60.0) -> bool:
        """
        Send new requests away, wait for those under way, and close.

        Args:
            grace (`float`, *optional*, defaults to 60): Seconds to wait.

        Returns:
            `bool`: Whether every request got its answer.
        """
        self.send_away()
        with self._changed:
            finished = self._changed.wait_for(lambda: self._active == 0, grace)
        self._waiting.put(None)
        self._worker.join(2.0)  # a thread that is freeing tensors while the interpreter ends would abort the process
        self.shutdown()
        self.server_close()
        return finished

    def __enter__(self) -> "RewardServer":
        self.start()
        return self

    def __exit__(self, *args):
        self.stop()

    # ---- Connections ----

    def process_request(self, request, client_address):
        if not self._connections.acquire(blocking=False):
            return self.shutdown_request(request)
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no thread can be started
            self._connections.release()
            raise

    def process_request_thread(self, request, client_address):
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], OSError):  # a client that went away
            logger.exception("a connection ended with a bug of the server")

    def is_allowed(self, authorization: str | None) -> bool:
        """Whether a request's Authorization header is right; compared in a time that does not tell where it is wrong."""
        return not self.has_token or hmac.compare_digest(
            (authorization or "").encode("utf-8", "replace"), self._secret
        )

    @contextlib.contextmanager
    def handling(self):
        """Counts a request that `stop` has to wait for; False while the server stops."""
        with self._changed:
            accepted = not self._stopping
            self._active += accepted
        try:
            yield accepted
        finally:
            with self._changed:
                self._active -= accepted
                self._changed.notify_all()

    def health(self) -> str:
        """`ok`, `stopping`, or `stuck` when a call has taken longer than a request may."""
        since = self._busy_since
        if self._stopping:
            return "stopping"
        return "stuck" if since is not None and time.monotonic() - since > self.request_timeout else "ok"

    def count(self, metric: str, value: float = 1, **labels: str) -> None:
        """Add to a counter of `/metrics`."""
        escape = lambda text: text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")  # noqa: E731
        with self._changed:
            self._counts[metric, ",".join(f'{name}="{escape(text)}"' for name, text in labels.items())] += value

    def metrics(self) -> str:
        """Counters and gauges in the text format of Prometheus."""
        with self._changed:
            counts, active = sorted(self._counts.items()), self._active
        lines = []
        for (metric, labels), value in counts:
            head = f"# TYPE vidtrl_reward_{metric} counter"
            if head not in lines:
                lines.append(head)
            lines.append(f"vidtrl_reward_{metric}{{{labels}}} {value}")
        running = self._busy_since is not None
        for metric, value in (
            ("active_requests", active),
            ("queued_requests", self._waiting.qsize()),
            ("busy", running),
        ):
            lines += [f"# TYPE vidtrl_reward_{metric} gauge", f"vidtrl_reward_{metric} {int(value)}"]
        return "\n".join(lines) + "\n"

    # ---- Scoring ----

    def enter(self, request: ScoreRequest, checksum: int) -> tuple[Job, bool]:
        """The job of a request, and whether it is new. It is not if the request came before under the same id."""
        with self._changed:
            job = self._jobs.get(request.id)
            if job is not None:
                self._jobs.move_to_end(request.id)
                return job, False
            job = self._jobs[request.id] = Job(request, checksum)
            answered = [name for name, other in self._jobs.items() if other.done.is_set()]
            for name in answered[: max(0, len(answered) - MAX_ANSWERS)]:
                del self._jobs[name]
            self._waiting.put(job)
        return job, True

    def _work(self) -> None:
        """The one thread in which reward functions run."""
        torch.set_grad_enabled(False)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self._loop = asyncio.new_event_loop()  # of async functions, kept since their clients may belong to it
        held = self._waiting.get()
        while held is not None:
            jobs, size, held = [held], len(held.request.videos), None
            while size < self.batch_size and held is None and not self._waiting.empty():
                held = self._waiting.get()
                if held is None:
                    self._waiting.put(None)  # the sign to end, for after this call
                    break
                if _alike(jobs[0].request, held.request) and size + len(held.request.videos) <= self.batch_size:
                    jobs.append(held)
                    size, held = size + len(held.request.videos), None
            self._busy_since = time.monotonic()
            try:
                self._score(jobs)
            except BaseException as error:  # the worker must outlive whatever a reward function does
                logger.exception("scoring ended with a bug of the server")
                for job in jobs:
                    if not job.done.is_set():
                        with self._changed:
                            del self._jobs[job.request.id]  # out of memory, for one: the next try may do better
                        job.finish(HTTPStatus.INTERNAL_SERVER_ERROR, error_answer(type(error).__name__, str(error)))
            self._busy_since = None
            for _ in jobs:
                self.slots.release()
            held = held or self._waiting.get()
        self._loop.close()

    def _score(self, jobs: list[Job]) -> None:
        requests = [job.request for job in jobs]
        videos = [dequantize(video, self.device) for request in requests for video in request.videos]
        try:
            call, start = self._call(requests, videos), 0
        except _Failed as failure:
            if isinstance(failure.error, RewardUnavailable):  # no video is at fault, and each alone would take as long
                for job in jobs:
                    self._report(job, failure)
            elif len(jobs) > 1:  # one request's mistake is none of the others'
                del videos
                for job in jobs:
                    self._score([job])
            else:
                self._report(jobs[0], self._find(requests[0], videos, failure))
            return
        for job in jobs:
            part = slice(start, start := start + len(job.request.videos))
            answer = {
                "protocol": PROTOCOL,
                "id": job.request.id,
                "rewards": call.values[part],
                "metrics": call.metrics,
                "extra": {column: values[part] for column, values in call.extra.items()},
            }
            self.count("samples_total", len(job.request.videos), reward=job.request.reward)
            job.finish(HTTPStatus.OK, answer)

    def _call(self, requests: list[ScoreRequest], videos: list[torch.Tensor]) -> _Call:
        """One call of a reward function on the videos of one or more requests, checked."""
        name, call = requests[0].reward, _Call(list(range(len(videos))))
        kwargs = {c: [v for request in requests for v in request.columns[c]] for c in requests[0].columns}
        began = time.perf_counter()
        try:
            result = self.rewards[name](
                **kwargs,
                prompts=[prompt for request in requests for prompt in request.prompts],
                videos=videos,
                completions=videos,
                trainer_state=requests[0].trainer_state,
                log_metric=call.log_metric,
                log_extra=call.log_extra,
            )
            if inspect.isawaitable(result):
                result = self._loop.run_until_complete(_awaited(result))
            call.values = [None if v is None else float(v) for v in _values(result, len(videos))]
            call.extra = json.loads(json.dumps(call.extra, default=_plain))
        except BaseException as error:  # SystemExit as well: it would end the worker
            raise _Failed(error) from error
        finally:
            self.count("calls_total", reward=name)
            self.count("call_seconds_total", time.perf_counter() - began, reward=name)
        for index, value in enumerate(call.values):
            if value is not None and not math.isfinite(value):
                error = ValueError(f"returned {value}; return a finite number, or None where it does not apply")
                raise _Failed(error, index)
        return call

    def _find(self, request: ScoreRequest, videos: list[torch.Tensor], failure: _Failed) -> _Failed:
        """The failure with the video at fault: the first on which the function fails alone."""
        if failure.index is not None or len(videos) == 1:
            return _Failed(failure.error, failure.index or 0)
        for i, video in enumerate(videos):
            columns = {name: [values[i]] for name, values in request.columns.items()}
            one = ScoreRequest(request.id, request.reward, [request.prompts[i]], [], columns, request.trainer_state)
            try:
                self._call([one], [video])
            except _Failed as alone:
                return _Failed(alone.error, i)
        return failure

    def _report(self, job: Job, failure: _Failed) -> None:
        name, error = job.request.reward, failure.error
        kind = (RewardUnavailable if isinstance(error, RewardUnavailable) else type(error)).__name__
        self.count("errors_total", reward=name, type=kind)
        logger.error("reward %r failed on request %s", name, job.request.id, exc_info=error)
        trace = "".join(traceback.format_exception(error)) if self.tracebacks else None
        answer = error_answer(kind, str(error), index=failure.index, reward=name, traceback=trace)
        job.finish(HTTPStatus.UNPROCESSABLE_ENTITY, answer)


def _resolve(host: str, port: int) -> tuple[socket.AddressFamily, tuple]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError, OverflowError) as error:
        raise ValueError(f"there is no interface {host!r}: give an address of this machine, or 127.0.0.1") from error
    return found[0][0], found[0][4]


def _alike(a: ScoreRequest, b: ScoreRequest) -> bool:
    """Whether one call can serve both."""
    return (a.reward, set(a.columns), a.trainer_state) == (b.reward, set(b.columns), b.trainer_state)


def _plain(value):
    """Numbers of numpy and torch as JSON has them."""
    if isinstance(value, (np.generic, np.ndarray, torch.Tensor)):
        return value.tolist()
    raise TypeError(
        f"log_extra takes numbers, strings, and lists and dicts of them from a served reward, not {value!r}"
    )


async def _awaited(awaitable):
    return await awaitable
