"""The page on which a rater compares videos: a server for this machine alone, and nothing outside the standard library.

It listens on 127.0.0.1 and answers nothing without the random token in its URL. Of a request's path only the number of a
pair reaches the disk, so no file can be named by it. The page learns neither the folders nor which of them a video is from.
"""

import http.server
import json
import re
import secrets
import socketserver
import sys
from http import HTTPStatus
from importlib import resources

from .compare import AXES, Comparison


HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'unsafe-inline'; media-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
PAGES = {
    "": ("compare.html", "text/html; charset=utf-8"),
    "compare.js": ("compare.js", "text/javascript; charset=utf-8"),
}
MAX_BODY = 4096  # bytes; a vote has about 60
CHUNK = 1 << 18  # bytes


class CompareServer(http.server.ThreadingHTTPServer):
    """
    Serves one comparison; `serve_forever()` runs it, `url` is where.

    Args:
        comparison ([`Comparison`]): What to show, and where votes go.
        port (`int`, *optional*, defaults to `0`): On 127.0.0.1; 0 takes a free one.
        token (`str`, *optional*): The secret part of the URL; drawn by default.

    Raises:
        `OSError`: If the port is taken.
    """

    allow_reuse_address = sys.platform != "win32"  # there it would let two servers share a port

    def __init__(self, comparison: Comparison, port: int = 0, token: str | None = None):
        self.comparison = comparison
        self.token = token or secrets.token_urlsafe(16)
        super().__init__(("127.0.0.1", port), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/{self.token}/"

    def server_bind(self):
        # HTTPServer's own asks the resolver for this machine's name, which can hang without a network
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    def handle_error(self, request, client_address):
        # a browser drops a video's connection whenever it has enough
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "vidtrl", ""
    timeout = 60  # seconds
    server: CompareServer

    def log_message(self, *args):
        pass

    def do_GET(self):
        route = self._route()
        if route is None:
            return
        if route in PAGES:
            name, kind = PAGES[route]
            self._answer((resources.files("vidtrl.report") / "templates" / name).read_bytes(), kind)
        elif route == "pairs":
            self._json(self._pairs())
        elif route == "results":
            self._results()
        elif match := re.fullmatch(r"video/([0-9]{1,9})/(first|second)", route):
            self._video(int(match[1]), match[2])
        else:
            self._fail(HTTPStatus.NOT_FOUND)

    def do_POST(self):
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,9}", length) or int(length) > MAX_BODY:
            self.close_connection = True  # the body stays unread
            return self._fail(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        body = self.rfile.read(int(length))
        route = self._route()
        if route is None:
            return
        if route != "vote":
            return self._fail(HTTPStatus.NOT_FOUND)
        try:
            vote = json.loads(body)
            self.server.comparison.vote(vote["pair"], vote["axis"], vote["choice"])
        except (ValueError, KeyError, TypeError) as error:
            return self._fail(HTTPStatus.BAD_REQUEST, str(error))
        except OSError as error:
            return self._fail(HTTPStatus.INTERNAL_SERVER_ERROR, f"the vote could not be written: {error}")
        self._json({"saved": True})

    def _route(self) -> str | None:
        """The path after the token; without the token the request is refused."""
        token, _, route = self.path.split("?", 1)[0].removeprefix("/").partition("/")
        if not secrets.compare_digest(token.encode(), self.server.token.encode()):
            self._fail(HTTPStatus.FORBIDDEN)
            return None
        return route

    def _pairs(self) -> dict:
        comparison = self.server.comparison
        pairs = [
            {"prompt": pair.prompt, "votes": {axis: comparison.choice(pair, axis) for axis in AXES}}
            for pair in comparison.pairs
        ]
        return {"axes": AXES, "pairs": pairs}

    def _results(self):
        comparison = self.server.comparison
        if comparison.num_done < len(comparison.pairs):  # names and tendency would end the blinding
            return self._fail(HTTPStatus.CONFLICT, "there are pairs left to judge")
        results = {axis: result._asdict() for axis, result in comparison.results().items()}
        self._json({"a": comparison.names[0], "b": comparison.names[1], "axes": results})

    def _video(self, index: int, place: str):
        comparison = self.server.comparison
        if index >= len(comparison.pairs):
            return self._fail(HTTPStatus.NOT_FOUND)
        pair = comparison.pairs[index]
        try:
            file = comparison.video(pair, "a" if (place == "first") == pair.a_first else "b").open("rb")
        except OSError:
            return self._fail(HTTPStatus.NOT_FOUND)
        with file:
            size = file.seek(0, 2)
            start, end = 0, size
            # without ranges browsers cannot seek; several at once may be answered with the whole file (RFC 9110, 14.2)
            match = re.fullmatch(r"bytes=([0-9]{0,18})-([0-9]{0,18})", self.headers.get("Range", "").strip())
            wanted = match is not None and match[0] != "bytes=-"
            if wanted:
                first, last = match.groups()
                if not first:
                    start = max(0, size - int(last))
                else:
                    start, end = int(first), min(size, int(last) + 1) if last else size
                if start >= end:
                    return self._fail(
                        HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, headers={"Content-Range": f"bytes */{size}"}
                    )
            self.send_response(HTTPStatus.PARTIAL_CONTENT if wanted else HTTPStatus.OK)
            if wanted:
                self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
            self.send_header("Accept-Ranges", "bytes")
            self._headers("video/mp4", end - start)
            file.seek(start)
            while start < end and (chunk := file.read(min(CHUNK, end - start))):
                self.wfile.write(chunk)
                start += len(chunk)
            self.close_connection = self.close_connection or start < end  # the file was cut short meanwhile

    def _json(self, value):
        self._answer(json.dumps(value).encode(), "application/json")

    def _fail(self, status: HTTPStatus, text: str = "", headers: dict | None = None):
        self._answer((text or status.phrase).encode(), "text/plain; charset=utf-8", status, headers)

    def _answer(self, body: bytes, kind: str, status=HTTPStatus.OK, headers: dict | None = None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self._headers(kind, len(body))
        self.wfile.write(body)

    def _headers(self, kind: str, length: int):
        for name, value in (HEADERS | {"Content-Type": kind, "Content-Length": str(length)}).items():
            self.send_header(name, value)
        self.end_headers()
