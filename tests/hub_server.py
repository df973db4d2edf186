"""The Hub on 127.0.0.1: the part of its protocol that `huggingface_hub`, `datasets` and `diffusers` use, over real sockets.

Repositories with commits, branches and tags; users with tokens; LFS in one or several parts; resolve with ETag, redirects
and ranges; a check of model cards. It refuses what the Hub refuses: a commit that names content nobody uploaded, content that
is not what its hash says, a write without permission, a private repository without a token.

`fail(...)` makes it misbehave: answer with a status, or close the connection after so many bytes of a transfer.

Files go through LFS and not through xet, whose chunk store is a service of its own: set HF_HUB_DISABLE_XET=1
(`Hub.environment`).
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml


LFS = re.compile(r"\.(safetensors|bin|pt|pth|mp4|png|jpg|parquet|arrow|tfevents.*)$|tfevents")
CHUNK = 64 << 10
LICENSES = {"apache-2.0", "mit", "cc-by-4.0", "cc-by-nc-4.0", "openrail", "openrail++", "other", "unknown"}
TASKS = {"text-to-video", "image-to-video", "text-generation", "text-to-image", "reinforcement-learning"}
REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
ME, READER, OTHER = "hf_MeMayWriteEverything1", "hf_ReaderMayWriteNothing1", "hf_OtherOwnsSomethingElse1"
MIME = {".mp4": "video/mp4", ".png": "image/png", ".json": "application/json", ".md": "text/markdown"}


@dataclass
class User:
    name: str
    write: bool = True
    organizations: tuple[str, ...] = ()


@dataclass
class Blob:
    data: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def git_oid(self) -> str:
        data = self.data
        if self.lfs:
            data = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(data)}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_oid


@dataclass
class Repo:
    type: str
    id: str
    private: bool = False
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)  # in their order
    messages: list[str] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, Blob], message: str) -> str:
        content = json.dumps([len(self.commits), branch, message, sorted((p, b.git_oid) for p, b in files.items())])
        oid = hashlib.sha1(content.encode()).hexdigest()
        self.commits[oid] = files
        self.messages.append(message)
        self.refs[branch] = oid
        return oid

    def resolve(self, revision: str) -> str | None:
        revision = revision.removeprefix("refs/heads/")
        return self.refs.get(revision) or (revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return {path: blob.data for path, blob in self.commits[self.resolve(revision)].items()}


@dataclass
class Fault:
    method: str
    path: re.Pattern
    status: int | None
    headers: dict[str, str]
    message: str
    drop_after: int | None
    reset: bool
    times: int
    hits: int = 0


class Hub(ThreadingHTTPServer):
    """
    One Hub. `users` are tokens and whose they are.

    Args:
        part_size (`int`, *optional*): LFS files above so many bytes are uploaded in parts.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, part_size: int | None = None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.hub = self
        self.url = f"http://127.0.0.1:{self.server_port}"
        # large files come from another origin, which gets no token
        self.cdn = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.cdn.hub, self.cdn.daemon_threads = self, True
        self.cdn_url = f"http://127.0.0.1:{self.cdn.server_port}"
        self.part_size = part_size
        self.users = {
            ME: User("me", organizations=("lab",)),
            READER: User("reader", write=False),
            OTHER: User("other"),
        }
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.requests: list[tuple[str, str, int]] = []  # method, path, status (0: the connection was closed)
        self.ranges: list[tuple[int, str]] = []  # status, what was asked for
        self.received = 0  # bytes of LFS content
        self.faults: list[Fault] = []
        self.lock = threading.RLock()

    @contextlib.contextmanager
    def running(self):
        """Answer until the context ends."""
        servers = (self, self.cdn)
        threads = [threading.Thread(target=one.serve_forever, args=(0.05,), daemon=True) for one in servers]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            for one, thread in zip(servers, threads, strict=True):
                one.shutdown()
                one.server_close()
                thread.join()

    def fail(
        self,
        method: str,
        path: str,
        status: int | None = None,
        *,
        headers: dict[str, str] | None = None,
        message: str = "injected",
        drop_after: int | None = None,
        reset: bool = False,
        times: int = 1,
    ) -> Fault:
        """Misbehave on the next `times` requests whose path matches: a status, or a connection closed (or reset) after
        some bytes."""
        assert (status is None) != (drop_after is None)
        fault = Fault(method, re.compile(path), status, headers or {}, message, drop_after, reset, times)
        self.faults.append(fault)
        return fault

    def fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.hits < fault.times and fault.method == method and fault.path.search(path):
                    fault.hits += 1
                    return fault
        return None

    def create(self, repo_id: str, type: str = "model", private: bool = False) -> Repo:
        repo = self.repos[type, repo_id] = Repo(type, repo_id, private)
        repo.commit("main", {}, "initial commit")
        return repo

    def repo(self, repo_id: str, type: str = "model") -> Repo:
        return self.repos[type, repo_id]

    def put(self, repo_id: str, files: dict[str, bytes], type: str = "model", message: str = "put") -> str:
        """A commit without HTTP, for what a test presupposes."""
        repo = self.repos.get((type, repo_id)) or self.create(repo_id, type)
        blobs = {path: Blob(data, bool(LFS.search(path))) for path, data in files.items()}
        self.objects |= {blob.sha256: blob.data for blob in blobs.values() if blob.lfs}
        return repo.commit("main", {**repo.commits[repo.refs["main"]], **blobs}, message)

    def count(self, method: str, path: str) -> int:
        return sum(m == method and re.search(path, p) is not None for m, p, _ in self.requests)

    def environment(self, cache: os.PathLike, token: str | None = ME) -> dict[str, str]:
        """Of a fresh process whose Hub this is."""
        environment = dict(os.environ) | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(cache),
            "HF_HUB_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",  # beats the one above where it is set, as in .ci/run
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "OMP_NUM_THREADS": "1",
        }
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "HF_DATASETS_CACHE"):
            environment.pop(name, None)
        return environment | ({"HF_TOKEN": token} if token is not None else {})

    def run(self, *argv: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
        """A fresh Python process in `folder`, whose Hub this is; it has to succeed, and to keep the token to itself."""
        done = subprocess.run(
            [sys.executable, *argv],
            env=self.environment(folder / "home") | environment,
            capture_output=True,
            text=True,
            cwd=folder,
            timeout=400,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        assert ME not in done.stdout + done.stderr
        return done


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub = property(lambda self: self.server.hub)

    def log_message(self, *args):
        pass

    # ---- Dispatch ----

    def do_GET(self):
        self.handle_request("GET")

    def do_HEAD(self):
        self.handle_request("HEAD")

    def do_POST(self):
        self.handle_request("POST")

    def do_PUT(self):
        self.handle_request("PUT")

    def do_DELETE(self):
        self.handle_request("DELETE")

    def handle_request(self, method):
        self.method, self.cut = method, None
        url = urlsplit(self.path)
        self.route, self.query = url.path, parse_qs(url.query)
        fault = self.hub.fault(method, self.route)
        if fault is not None and fault.drop_after is not None and method in ("PUT", "POST"):
            self.rfile.read(min(fault.drop_after, int(self.headers.get("Content-Length", fault.drop_after))))
            self.hub.requests.append((method, self.route, 0))
            return self.drop(fault.reset)
        self.body = self.read_body()
        if fault is not None and fault.status is not None:
            return self.error(fault.status, fault.message, **fault.headers)
        self.cut = None if fault is None else fault
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.user = self.hub.users.get(token)
        if self.server is not self.hub and token:
            return self.error(400, "a token was sent to another origin")
        if token and self.user is None:
            return self.error(401, "Invalid credentials in Authorization header")
        with self.hub.lock:
            self.answer()

    def read_body(self) -> bytes:
        if "chunked" in (self.headers.get("Transfer-Encoding") or ""):
            parts = []
            while size := int(self.rfile.readline().strip(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def drop(self, reset):
        self.close_connection = True
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()

    def answer(self):
        path, method = unquote(self.route), self.method
        if path == "/api/whoami-v2":
            return self.whoami()
        if path == "/api/repos/create" and method == "POST":
            return self.create_repo()
        if path == "/api/validate-yaml" and method == "POST":
            return self.validate_yaml()
        if match := re.fullmatch(r"/lfs/([0-9a-f]{64})(?:/(\d+|complete|verify))?", path):
            return self.lfs_content(match[1], match[2])
        if match := re.fullmatch(r"/cdn/([0-9a-f]{64})", path):
            return self.send_file(self.hub.objects[match[1]], "application/octet-stream", {"ETag": f'"{match[1]}"'})
        if match := re.fullmatch(r"/(datasets/|)([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            repo = self.find("dataset" if match[1] else "model", match[2], write=True)
            return repo and self.lfs_batch()
        if match := re.fullmatch(r"/(datasets/|)([^/]+/[^/]+)/resolve/(refs/[^/]+/[^/]+|[^/]+)/(.+)", path):
            repo = self.find("dataset" if match[1] else "model", match[2])
            return repo and self.resolve(repo, match[3], match[4])
        match = re.fullmatch(r"/api/(model|dataset)s/([^/]+/[^/]+)(?:/(\w[\w-]*)(?:/(.*))?)?", path)
        if match is None:
            return self.error(404, f"no such endpoint: {path}")
        kind, repo_id, action, rest = match.groups()
        repo = self.find(kind, repo_id, write=action in ("preupload", "commit", "branch", "tag"))
        if repo is None:
            return None
        if action in (None, "revision"):
            return self.repo_info(repo, rest or "main")
        if action == "refs":
            return self.refs(repo)
        if action in ("branch", "tag"):
            return self.make_ref(repo, rest)
        # revisions are quoted, so that the first part of the raw path is the whole revision
        revision = unquote(self.route.split(f"/{action}/", 1)[1].split("/")[0])
        handler = {
            "preupload": self.preupload,
            "commit": self.commit,
            "tree": self.tree,
            "paths-info": self.paths_info,
        }.get(action)
        if handler is None:
            return self.error(404, f"no such endpoint: {path}")
        if repo.resolve(revision) is None:
            return self.error(404, f"Invalid rev id: {revision}", **{"X-Error-Code": "RevisionNotFound"})
        return handler(repo, revision)

    def find(self, kind: str, repo_id: str, write: bool = False) -> Repo | None:
        repo = self.hub.repos.get((kind, repo_id))
        owner = repo_id.split("/")[0]
        mine = self.user is not None and (owner == self.user.name or owner in self.user.organizations)
        if repo is None or (repo.private and not mine):
            # the Hub does not tell a private repository from a missing one
            if self.user is None:
                return self.error(401, "Invalid username or password.", **{"X-Error-Code": "RepoNotFound"})
            return self.error(404, "Repository not found", **{"X-Error-Code": "RepoNotFound"})
        if write and self.user is None:
            return self.error(401, "Invalid username or password.")
        if write and not (mine and self.user.write):
            return self.error(403, "you don't have the rights to write to this repository")
        return repo

    # ---- Answers ----

    def reply(self, content, status=200, **headers):
        data = json.dumps(content).encode()
        self.send(status, data, {"Content-Type": "application/json", **headers})

    def error(self, status, message, **headers):
        self.reply({"error": message}, status, **{"X-Error-Message": message, "X-Request-Id": "Root=1", **headers})

    def send(self, status, data, headers):
        self.hub.requests.append((self.method, self.route, status))
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.method == "HEAD":
            return
        if self.cut is not None and self.cut.drop_after < len(data):
            self.wfile.write(data[: self.cut.drop_after])
            self.wfile.flush()
            return self.drop(self.cut.reset)
        self.wfile.write(data)

    def send_file(self, data, kind, headers):
        headers = {"Content-Type": kind, "Accept-Ranges": "bytes", **headers}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            return self.send(200, data, headers)
        start, end = int(wanted[1]), int(wanted[2] or len(data) - 1)
        if start >= len(data):
            return self.send(416, b"", {**headers, "Content-Range": f"bytes */{len(data)}"})
        end = min(end, len(data) - 1)
        self.hub.ranges.append((206, wanted[0]))
        self.send(206, data[start : end + 1], {**headers, "Content-Range": f"bytes {start}-{end}/{len(data)}"})

    # ---- Accounts and repositories ----

    def whoami(self):
        if self.user is None:
            return self.error(401, "Invalid username or password.")
        role = "write" if self.user.write else "read"
        self.reply(
            {
                "type": "user",
                "name": self.user.name,
                "orgs": [{"name": name} for name in self.user.organizations],
                "auth": {"type": "access_token", "accessToken": {"displayName": "test", "role": role}},
            }
        )

    def create_repo(self):
        wanted = json.loads(self.body)
        if self.user is None:
            return self.error(401, "Invalid username or password.")
        owner, kind = wanted.get("organization") or self.user.name, wanted.get("type") or "model"
        if not self.user.write or owner not in (self.user.name, *self.user.organizations):
            return self.error(403, f"You don't have the rights to create a {kind} under the namespace {owner!r}")
        repo_id = f"{owner}/{wanted['name']}"
        prefix = "datasets/" if kind == "dataset" else ""
        answer = {"url": f"{self.hub.url}/{prefix}{repo_id}", "id": repo_id, "name": repo_id}
        if (kind, repo_id) in self.hub.repos:
            return self.reply({"error": "You already created this repo", **answer}, 409)
        private = wanted.get("visibility") == "private" or wanted.get("private") is True
        self.hub.create(repo_id, kind, private)
        self.reply(answer)

    def repo_info(self, repo, revision):
        oid = repo.resolve(revision)
        if oid is None:
            return self.error(404, f"Invalid rev id: {revision}", **{"X-Error-Code": "RevisionNotFound"})
        files = repo.commits[oid]
        card = card_data(files["README.md"].data.decode()) if "README.md" in files else {}
        siblings = [{"rfilename": path, "size": len(b.data), "blobId": b.git_oid} for path, b in sorted(files.items())]
        self.reply(
            {
                "_id": "0",
                "id": repo.id,
                "modelId": repo.id,
                "author": repo.id.split("/")[0],
                "sha": oid,
                "private": repo.private,
                "gated": False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": card.get("tags") or [],
                "pipeline_tag": card.get("pipeline_tag"),
                "library_name": card.get("library_name"),
                "cardData": card,
                "siblings": siblings,
                "lastModified": "2026-01-01T00:00:00.000Z",
                "createdAt": "2026-01-01T00:00:00.000Z",
            }
        )

    def refs(self, repo):
        branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": oid} for n, oid in repo.refs.items()]
        self.reply({"branches": branches, "converts": [], "tags": [], "pullRequests": []})

    def make_ref(self, repo, name):
        if name in repo.refs:
            return self.error(409, f"Reference already exists: {name}")
        wanted = json.loads(self.body or b"{}")
        repo.refs[wanted.get("tag") or name] = repo.resolve(wanted.get("startingPoint") or "main")
        self.reply({})

    def entry(self, path, blob):
        entry = {"type": "file", "path": path, "size": len(blob.data), "oid": blob.git_oid}
        if blob.lfs:
            entry["lfs"] = {"oid": blob.sha256, "size": len(blob.data), "pointerSize": 130}
        return entry

    def tree(self, repo, revision):
        raw = self.route.split("/tree/", 1)[1].split("/", 1)
        folder = unquote(raw[1]).strip("/") + "/" if len(raw) > 1 and raw[1] else ""
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        files = {p: b for p, b in repo.commits[repo.resolve(revision)].items() if p.startswith(folder)}
        if folder and not files:
            return self.error(404, f"{folder} does not exist", **{"X-Error-Code": "EntryNotFound"})
        entries, seen = [], set()
        for path, blob in sorted(files.items()):
            parts = path[len(folder) :].split("/")
            for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                parent = folder + "/".join(parts[:depth])
                if parent not in seen:
                    seen.add(parent)
                    oid = hashlib.sha1(parent.encode()).hexdigest()
                    entries.append({"type": "directory", "path": parent, "size": 0, "oid": oid})
            if recursive or len(parts) == 1:
                entries.append(self.entry(path, blob))
        self.reply(entries)

    def paths_info(self, repo, revision):
        if "json" in (self.headers.get("Content-Type") or ""):
            wanted = json.loads(self.body)["paths"]
        else:
            wanted = parse_qs(self.body.decode()).get("paths", [])
        files, found = repo.commits[repo.resolve(revision)], []
        for path in wanted:
            if path in files:
                found.append(self.entry(path, files[path]))
            elif any(p.startswith(f"{path}/") for p in files):
                found.append({"type": "directory", "path": path, "size": 0, "oid": "0" * 40})
        self.reply(found)

    # ---- Upload ----

    def validate_yaml(self):
        wanted = json.loads(self.body)
        problems = card_problems(wanted["content"], wanted["repoType"])
        self.reply({"errors": [{"message": p} for p in problems], "warnings": []}, 400 if problems else 200)

    def preupload(self, repo, revision):
        present, files = repo.commits[repo.resolve(revision)], []
        for file in json.loads(self.body)["files"]:
            lfs = bool(LFS.search(file["path"])) or file["size"] > 10 << 20
            answer = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if file["path"] in present:
                answer["oid"] = present[file["path"]].etag
            files.append(answer)
        self.reply({"files": files})

    def lfs_batch(self):
        wanted, objects = json.loads(self.body), []
        assert wanted["operation"] == "upload" and wanted["hash_algo"] == "sha256"
        for one in wanted["objects"]:
            oid, size, url = one["oid"], one["size"], f"{self.hub.cdn_url}/lfs/{one['oid']}"
            answer = {"oid": oid, "size": size}
            if oid not in self.hub.objects:
                upload = {"href": url}
                part = self.hub.part_size
                if part is not None and size > part:
                    upload = {"href": f"{url}/complete", "header": {"chunk_size": str(part)}}
                    upload["header"] |= {str(i + 1): f"{url}/{i + 1}" for i in range(-(-size // part))}
                answer["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/lfs/{oid}/verify"}}
            objects.append(answer)
        self.reply({"transfer": "basic", "objects": objects})

    def lfs_content(self, oid, action):
        if self.method == "PUT":
            self.hub.received += len(self.body)
        if action is None or action == "complete":
            data = self.body
            if action == "complete":
                parts = json.loads(self.body)["parts"]
                data = b"".join(self.hub.parts[oid, part["partNumber"]] for part in parts)
            if hashlib.sha256(data).hexdigest() != oid:
                return self.error(400, "the content is not what its hash says")
            self.hub.objects[oid] = data
            return self.reply({"success": True})
        if action == "verify":
            return self.reply({}) if oid in self.hub.objects else self.error(404, "nobody uploaded that")
        self.hub.parts[oid, int(action)] = self.body
        self.send(200, b"", {"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'})

    def commit(self, repo, revision):
        if revision not in repo.refs:
            return self.error(400, "commits go to a branch")
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        files = dict(repo.commits[repo.refs[revision]])
        for operation in operations:
            key, value = operation["key"], operation["value"]
            if key == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    return self.error(400, f"{value['path']}: nobody uploaded {value['oid']}")
                files[value["path"]] = Blob(self.hub.objects[value["oid"]], True)
            elif key in ("deletedFile", "deletedFolder"):
                folder = key == "deletedFolder" and value["path"].rstrip("/") + "/"
                files = {
                    p: b for p, b in files.items() if not (p.startswith(folder) if folder else p == value["path"])
                }
        oid = repo.commit(revision, files, header["value"]["summary"])
        prefix = "datasets/" if repo.type == "dataset" else ""
        url = f"{self.hub.url}/{prefix}{repo.id}/commit/{oid}"
        self.reply({"commitUrl": url, "commitOid": oid, "success": True, "hookOutput": ""})

    # ---- Download ----

    def resolve(self, repo, revision, path):
        oid = repo.resolve(revision)
        if oid is None:
            return self.error(404, f"Invalid rev id: {revision}", **{"X-Error-Code": "RevisionNotFound"})
        headers = {"X-Repo-Commit": oid}
        blob = repo.commits[oid].get(path)
        if blob is None:
            return self.error(404, "Entry not found", **{"X-Error-Code": "EntryNotFound"}, **headers)
        kind = MIME.get(os.path.splitext(path)[1], "application/octet-stream")
        if not blob.lfs:
            return self.send_file(blob.data, kind, {"ETag": f'"{blob.etag}"', **headers})
        headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.data))}
        headers |= {"Location": f"{self.hub.cdn_url}/cdn/{blob.sha256}", "ETag": f'"{blob.git_oid}"'}
        self.send(302, b"", headers)


def card_data(text: str) -> dict:
    """The metadata of a card."""
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    return (yaml.safe_load(match[1]) or {}) if match else {}


def card_problems(text: str, kind: str = "model") -> list[str]:
    """What the Hub would say against a card's metadata."""
    try:
        data = card_data(text)
    except yaml.YAMLError as error:
        return [str(error)]
    problems = []

    def strings(name):
        value = data.get(name)
        value = [value] if isinstance(value, str) else value
        if value is not None and not (isinstance(value, list) and all(isinstance(v, str) and v for v in value)):
            problems.append(f'"{name}" must be a string or a list of strings')
            return []
        return value or []

    strings("tags"), strings("language")
    for one in strings("license"):
        if one not in LICENSES:
            problems.append(f'"license" must be one of {sorted(LICENSES)}, not {one!r}')
    if data.get("license") == "other" and not data.get("license_name"):
        problems.append('"license: other" needs "license_name"')
    for name in ("base_model", "datasets"):
        problems += [f'"{name}" is no repository id: {v!r}' for v in strings(name) if not REPO_ID.fullmatch(v)]
    if kind == "model" and data.get("pipeline_tag") not in (None, *TASKS):
        problems.append(f'"pipeline_tag" is unknown: {data["pipeline_tag"]!r}')
    if data.get("base_model_relation") not in (None, "adapter", "finetune", "merge", "quantized"):
        problems.append('"base_model_relation" is unknown')
    for i, one in enumerate(data.get("widget") or []):
        if not isinstance(one, dict) or not isinstance(one.get("text"), str):
            problems.append(f'"widget[{i}].text" must be a string')
        elif not isinstance((one.get("output") or {}).get("url"), str):
            problems.append(f'"widget[{i}].output.url" must be a string')
    return problems


def connect(hub: Hub, monkeypatch, cache, token: str | None = ME) -> None:
    """Point this process' clients at `hub`. They read the environment once, when they are imported."""
    import huggingface_hub
    import transformers.utils.hub
    from huggingface_hub import constants

    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(cache),
        "HF_TOKEN_PATH": str(cache / "token"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
    if token is None:
        monkeypatch.delenv("HF_TOKEN", raising=False)
    else:
        monkeypatch.setenv("HF_TOKEN", token)


@pytest.fixture
def hub(monkeypatch, tmp_path_factory):
    """A Hub of one's own, to which this process is logged in as `me`."""
    with Hub().running() as server:
        connect(server, monkeypatch, tmp_path_factory.mktemp("hub_cache"))
        yield server
