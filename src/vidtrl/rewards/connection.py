"""What a [`RewardServer`] does with one connection: who is let in, how much is read, and what comes back."""

import contextlib
import http.server
import json
import logging
import re
import socket
import threading
import zlib
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING

from .wire import CONTENT_TYPE, PATH, PROTOCOL, ScoreRequest, unpack


if TYPE_CHECKING:
    from .server import RewardServer

logger = logging.getLogger(__name__)

LOCAL_HOST = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d{1,5})?", re.IGNORECASE)
HEADER_TIME = 10.0  # seconds for a request's first lines
QUEUE_WAIT = 5.0  # seconds that a request may wait for a place in the queue before it is sent away
LINGER = 2.0  # seconds for reading on after a refusal, so that the sender gets to see it


@dataclass
class Job:
    """A request, and later its answer. The videos are dropped as soon as there is one."""

    request: ScoreRequest | None
    checksum: int
    done: threading.Event = field(default_factory=threading.Event)
    status: HTTPStatus = HTTPStatus.OK
    answer: dict = field(default_factory=dict)

    def finish(self, status: HTTPStatus, answer: dict):
        """Hand the answer to whoever waits for it."""
        self.status, self.answer, self.request = status, answer, None
        self.done.set()


def error_answer(kind: str, message: str, **more) -> dict:
    """What is sent instead of rewards."""
    return {"error": {"type": kind, "message": message, **{name: v for name, v in more.items() if v is not None}}}


class Handler(http.server.BaseHTTPRequestHandler):
    """One request to a [`RewardServer`], from its first byte to its answer."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "vidtrl", ""
    server: "RewardServer"

    def setup(self):
        self.timeout = max(self.server.read_timeout, HEADER_TIME)
        self.deadline = Deadline(self.request, HEADER_TIME)
        super().setup()

    def finish(self):
        self.deadline.cancel()
        super().finish()

    def log_message(self, *args):
        pass  # it would repeat what a stranger wrote, headers included

    def do_GET(self):
        self.deadline.cancel()
        path = self.path.partition("?")[0]
        if path == "/health":  # open to all, so that whoever watches the server needs no token
            health = self.server.health()
            return self._answer(
                HTTPStatus.OK if health == "ok" else HTTPStatus.SERVICE_UNAVAILABLE, {"status": health}
            )
        if not self._is_allowed():
            return
        if path == "/metrics":
            self._send(HTTPStatus.OK, self.server.metrics().encode(), "text/plain; version=0.0.4; charset=utf-8")
        elif path == "/v1/info":
            limits = {"max_body": self.server.max_body, "protocol": PROTOCOL}
            self._answer(HTTPStatus.OK, {"rewards": list(self.server.rewards), **limits})
        else:
            self._refuse(HTTPStatus.NOT_FOUND, f"there is nothing here; videos are posted to {PATH}")

    def do_POST(self):
        self.deadline.cancel()
        with self.server.handling() as accepted:
            length = self._acceptable()
            if length is None:
                return
            if not accepted:
                return self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, "the server is stopping", retry_after=1)
            if not self.server.slots.acquire(timeout=QUEUE_WAIT):
                return self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, "the queue is full", retry_after=1)
            is_new = False
            try:
                job = self._read(length)
                if job is None:
                    return
                job, is_new = job
            finally:
                if not is_new:  # the worker gives back the place of a new one
                    self.server.slots.release()
            if not job.done.wait(self.server.request_timeout):
                seconds = self.server.request_timeout
                return self._refuse(HTTPStatus.GATEWAY_TIMEOUT, f"there is no result after {seconds:g} s", drain=False)
            if not is_new:
                self.server.count("replays_total")
            self._answer(job.status, job.answer)

    def _is_allowed(self) -> bool:
        if not self.server.is_allowed(self.headers.get("Authorization")):
            self._refuse(
                HTTPStatus.UNAUTHORIZED,
                "the token is missing or wrong: set VIDTRL_REWARD_TOKEN to the server's",
                headers={"WWW-Authenticate": "Bearer"},
            )
            return False
        # without a token, a web page could reach the port under a name of its own that leads to 127.0.0.1
        if not self.server.has_token and not LOCAL_HOST.fullmatch(self.headers.get("Host", "")):
            self._refuse(HTTPStatus.FORBIDDEN, "without a token the server answers to localhost and 127.0.0.1 only")
            return False
        return True

    def _acceptable(self) -> int | None:
        """The length of a body that is worth reading; anything else is refused."""
        if not self._is_allowed():
            return None
        length, limit = self.headers.get("Content-Length", ""), self.server.max_body
        if self.path.partition("?")[0] != PATH:
            self._refuse(HTTPStatus.NOT_FOUND, f"videos are posted to {PATH}")
        elif self.headers.get("Content-Type") != CONTENT_TYPE:
            self._refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"the body must be {CONTENT_TYPE}; pickles are not read")
        elif "Transfer-Encoding" in self.headers or not re.fullmatch("[0-9]{1,15}", length):
            self._refuse(HTTPStatus.LENGTH_REQUIRED, "a Content-Length is required")
        elif int(length) > limit:
            self._refuse(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"a request of {int(length)} bytes is larger than the {limit} that the server takes: lower batch_size of "
                "RemoteReward, or start the server with a larger --max_body_mb",
            )
        else:
            return int(length)
        return None

    def _read(self, length: int) -> tuple[Job, bool] | None:
        """The job of a body, which is dropped here; `None` once it is refused."""
        self.deadline = Deadline(self.request, self.server.read_timeout)
        body = self.rfile.read(length)
        self.deadline.cancel()
        if len(body) < length:
            why = "took too long" if self.deadline.passed else "ended early"
            self._refuse(
                HTTPStatus.REQUEST_TIMEOUT, f"the body {why}: {len(body)} of {length} bytes came", drain=False
            )
            return None
        try:
            request = unpack(body)
            names = list(self.server.rewards)
            if request.reward is None and len(names) == 1:
                request.reward = names[0]
            if request.reward not in names:
                wanted = "name one" if request.reward is None else f"it has no {request.reward[:100]!r}"
                raise ValueError(
                    f"the server has the rewards {', '.join(names)}: {wanted}, as in http://host:8000#{names[0]}"
                )
        except ValueError as error:
            self._refuse(HTTPStatus.BAD_REQUEST, str(error), drain=False)
            return None
        checksum = zlib.crc32(body)
        job, is_new = self.server.enter(request, checksum)
        if job.checksum != checksum:
            self._refuse(HTTPStatus.CONFLICT, f"another request has the id {request.id}: draw a new one", drain=False)
            return None
        return job, is_new

    def _refuse(self, status: HTTPStatus, message: str, retry_after: int | None = None, headers=None, drain=True):
        """Say no. `drain` where a body may be on its way: closing at once would keep its sender from seeing this."""
        headers = dict(headers or {})
        if retry_after is not None:
            headers["Retry-After"] = str(retry_after)
        logger.warning("%s: %d %s", self.client_address[0], status, message)
        self._answer(status, error_answer(status.phrase, message), headers)
        if drain and self.command == "POST":
            self.wfile.flush()
            deadline = Deadline(self.request, LINGER)
            with contextlib.suppress(OSError):
                socket.socket.shutdown(self.request, socket.SHUT_WR)
                while self.rfile.read1(1 << 16):
                    pass
            deadline.cancel()

    def _answer(self, status: HTTPStatus, answer: dict, headers: dict | None = None):
        self._send(status, json.dumps(answer).encode(), "application/json", headers)

    def _send(self, status: HTTPStatus, body: bytes, kind: str, headers: dict | None = None):
        self.server.count("requests_total", status=str(int(status)))
        self.close_connection = True
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": str(len(body)), "Connection": "close", **(headers or {})}
        for name, value in (headers | {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


class Deadline:
    """Ends what a connection receives after a time, however slowly it drips. Sending goes on."""

    def __init__(self, connection: socket.socket, seconds: float):
        self.passed = False
        self._connection = connection
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True
        self._timer.start()

    def _end(self):
        self.passed = True
        with contextlib.suppress(OSError):
            # of the socket below TLS: an SSLSocket's own would send and receive in the clear from then on
            socket.socket.shutdown(self._connection, socket.SHUT_RD)

    def cancel(self):
        self._timer.cancel()
