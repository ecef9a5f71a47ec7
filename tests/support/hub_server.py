"""A small Hub on loopback, over real sockets: the HTTP API that huggingface_hub speaks, with faults on request.

Large files lie in "storage" on a second host name, to which `resolve` redirects as the Hub does. Nothing here uses the
package. Xet is not offered, so that every byte passes through this server and can be counted.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_right"
LARGE = (".safetensors", ".bin", ".gguf", ".h5")  # kept in storage, as .gitattributes has it on the Hub


@dataclass
class Repo:
    """Commits (revision -> path -> bytes), newest last; who may read and whether it was created by a client."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: bool = False
    gated: bool = False
    messages: list[str] = field(default_factory=list)

    @property
    def head(self) -> str:
        return next(reversed(self.commits))

    def find(self, revision: str) -> str | None:
        return self.head if revision == "main" and self.commits else revision if revision in self.commits else None


@dataclass
class Fault:
    """What happens to the next `times` requests whose `METHOD path` matches `pattern`."""

    pattern: str
    status: int | None = None  # answer this instead
    cut: int | None = None  # close the connection after so many bytes of the body
    no_ranges: bool = False  # send the whole file with 200
    body: bytes | None = None  # answer 200 with this
    headers: dict[str, str] = field(default_factory=dict)
    times: int = 1


@dataclass
class Seen:
    """One request as it was answered; `sent` counts the bytes of the body that went out."""

    method: str
    path: str
    host: str
    range: str | None
    token: str | None
    status: int = 0
    sent: int = 0


class HubServer:
    """Use as a context manager; `url` is what HF_ENDPOINT must be."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.seen: list[Seen] = []
        self.lock = threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), _make_handler(self))
        self.http.daemon_threads = True
        port = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{port}"
        self.storage = f"http://localhost:{port}"  # another host, to which no token may be sent
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> HubServer:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()

    def add(self, repo: str, folder: Path, **options: Any) -> str:
        """Put a folder there as a new commit; the commit."""
        files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        kept = self.repos.setdefault(repo, Repo())
        self.repos[repo] = dataclasses.replace(kept, **options)
        return self.commit(repo, files)

    def commit(self, repo: str, files: dict[str, bytes]) -> str:
        for name, content in files.items():
            if name.endswith(LARGE):
                self.blobs[hashlib.sha256(content).hexdigest()] = content
        commits = self.repos[repo].commits
        revision = hashlib.sha1(f"{repo} {len(commits)}".encode()).hexdigest()
        commits[revision] = files
        return revision

    def fail(self, pattern: str, **how: Any) -> None:
        self.faults.append(Fault(pattern, **how))

    def take_fault(self, line: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, line):
                    fault.times -= 1
                    return fault
        return None

    def count(self, pattern: str) -> int:
        """How many requests matched."""
        return sum(bool(re.search(pattern, f"{seen.method} {seen.path}")) for seen in self.seen)

    def sum_sent(self, content: bytes) -> int:
        """Bytes of one stored file that went out."""
        path = f"/storage/{hashlib.sha256(content).hexdigest()}"
        return sum(seen.sent for seen in self.seen if seen.path == path and seen.method == "GET")


def _make_handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(_Handler):
        server_hub = hub

    return Handler


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each body waits 40 ms for the client to acknowledge its header
    server_hub: HubServer

    def log_message(self, *_: object) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ConnectionError:  # a client that has seen enough goes away
            self.close_connection = True

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        hub = self.server_hub
        self.payload = self.rfile.read(int(self.headers.get("Content-Length") or 0)) or self._read_chunks()
        path = unquote(urlsplit(self.path).path)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.record = Seen(self.command, path, self.headers.get("Host", ""), self.headers.get("Range"), token)
        with hub.lock:
            hub.seen.append(self.record)
        self.fault = hub.take_fault(f"{self.command} {path}")
        if self.fault and self.fault.status:
            self._send(self.fault.status, b"a fault", self.fault.headers)
            return
        if self.fault and self.fault.body is not None:
            self._send(200, self.fault.body, {"Content-Type": "application/json"})
            return
        for pattern, answer in ROUTES:
            match = re.fullmatch(pattern, path)
            if match:
                answer(self, **match.groupdict())
                return
        self._send(404, b"no such page")

    def _read_chunks(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return b""
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.record.status = status
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.fault.cut if self.fault else None
        body = body if cut is None else body[:cut]
        self.wfile.write(body)
        self.record.sent = len(body)
        if cut is not None:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    def send_json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def open_repo(self, name: str) -> Repo | None:
        """A repository that this client may see; else the Hub's own refusals are sent."""
        repo = self.server_hub.repos.get(name)
        if self.record.token not in (None, TOKEN):
            self._send(401, b"", {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif repo is None and self.record.token:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif repo is None or (repo.private and not self.record.token):
            # As the Hub does: who has not logged in is not told whether it exists.
            self._send(401, b"", {"X-Error-Message": "Invalid username or password."})
        else:
            return repo
        return None

    def find_commit(self, repo: Repo, revision: str) -> str | None:
        commit = repo.find(revision)
        if commit is None:
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
        return commit

    # What the Hub answers, one method for each route.

    def answer_info(self, name: str, revision: str | None = None) -> None:
        repo = self.open_repo(name)
        commit = repo and self.find_commit(repo, revision or "main")
        if not repo or not commit:
            return
        files = [{"rfilename": path, **_describe(content, path)} for path, content in repo.commits[commit].items()]
        if "blobs" not in parse_qs(urlsplit(self.path).query):
            files = [{"rfilename": file["rfilename"]} for file in files]
        self.send_json(
            {"_id": "1", "id": name, "modelId": name, "sha": commit, "private": repo.private, "siblings": files,
             "tags": [], "downloads": 0, "gated": repo.gated}
        )  # fmt: skip

    def answer_tree(self, name: str, revision: str) -> None:
        repo = self.open_repo(name)
        commit = repo and self.find_commit(repo, revision)
        if repo and commit:
            files = repo.commits[commit].items()
            self.send_json(
                [{"type": "file", "path": path, "oid": _git_hash(content), **_describe(content, path)}
                 for path, content in files]
            )  # fmt: skip

    def answer_resolve(self, name: str, revision: str, path: str) -> None:
        repo = self.open_repo(name)
        if repo and repo.gated and not (self.record.token and repo.gated == "granted"):
            self._send(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
            return
        commit = repo and self.find_commit(repo, revision)
        if not repo or not commit:
            return
        if path not in repo.commits[commit]:
            headers = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", "X-Repo-Commit": commit}
            self._send(404, b"", headers)
            return
        content = repo.commits[commit][path]
        if not path.endswith(LARGE):
            self._send_ranges(content, {"X-Repo-Commit": commit, "ETag": f'"{_git_hash(content)}"'})
            return
        sha256 = hashlib.sha256(content).hexdigest()
        headers = {"X-Repo-Commit": commit, "X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(content))}
        self._send(302, b"", {**headers, "Location": f"{self.server_hub.storage}/storage/{sha256}?Signature=x"})

    def answer_storage(self, sha256: str) -> None:
        if self.command == "PUT":
            assert hashlib.sha256(self.payload).hexdigest() == sha256
            self.server_hub.blobs[sha256] = self.payload
            self._send(200, b"")
        else:
            self._send_ranges(self.server_hub.blobs[sha256], {"ETag": f'"{sha256}"'})

    def _send_ranges(self, content: bytes, headers: dict[str, str]) -> None:
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.record.range or "")
        headers = {"Accept-Ranges": "bytes", **headers}
        if not match or (self.fault and self.fault.no_ranges):
            self._send(200, content, headers)
            return
        start = int(match[1])
        end = min(int(match[2]) + 1 if match[2] else len(content), len(content))
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
        self._send(206, content[start:end], headers)

    def _refuse_writer(self) -> bool:
        refused = self.record.token != TOKEN
        if refused:
            self._send(401, b"", {"X-Error-Message": "Invalid credentials in Authorization header"})
        return refused

    def answer_whoami(self) -> None:
        if not self._refuse_writer():
            self.send_json({"type": "user", "id": "1", "name": "me", "fullname": "Me", "orgs": []})

    def answer_create(self) -> None:
        if self._refuse_writer():
            return
        asked = json.loads(self.payload)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        url = f"{self.server_hub.url}/{name}"
        if name in self.server_hub.repos:
            self.send_json({"error": "You already created this model repo", "url": url}, 409)
            return
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.server_hub.repos[name] = Repo(private=private)
        self.server_hub.commit(name, {".gitattributes": b"*.safetensors filter=lfs\n"})
        self.send_json({"url": url, "name": name, "id": "1"})

    def answer_validate(self) -> None:
        self.send_json({"errors": [], "warnings": []})

    def answer_preupload(self, name: str, revision: str) -> None:
        if self._refuse_writer() or not (repo := self.open_repo(name)):
            return
        known = repo.commits[repo.head]
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
                "oid": _git_hash(known[file["path"]]) if file["path"] in known else None,
            }
            for file in json.loads(self.payload)["files"]
        ]
        self.send_json({"files": files})

    def answer_batch(self, name: str) -> None:
        if self._refuse_writer():
            return
        objects: list[dict[str, Any]] = []
        for item in json.loads(self.payload)["objects"]:
            objects.append({"oid": item["oid"], "size": item["size"]})
            if item["oid"] not in self.server_hub.blobs:
                href = f"{self.server_hub.storage}/storage/{item['oid']}"
                objects[-1]["actions"] = {"upload": {"href": href, "header": {}}}
        self.send_json({"transfer": "basic", "objects": objects})

    def answer_commit(self, name: str, revision: str) -> None:
        if self._refuse_writer() or not (repo := self.open_repo(name)):
            return
        files = dict(repo.commits[repo.head])
        for line in self.payload.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                repo.messages.append(value["summary"])
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.server_hub.blobs[value["oid"]]
        commit = self.server_hub.commit(name, files)
        url = f"{self.server_hub.url}/{name}/commit/{commit}"
        self.send_json({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})


def _describe(content: bytes, path: str) -> dict[str, Any]:
    described: dict[str, Any] = {"size": len(content), "blobId": _git_hash(content)}
    if path.endswith(LARGE):
        sha256 = hashlib.sha256(content).hexdigest()
        # The listing of one repository says sha256, the tree says oid: both are the Hub's.
        described["lfs"] = {"sha256": sha256, "oid": sha256, "size": len(content), "pointerSize": 134}
    return described


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


_NAME = r"(?P<name>[^/]+/[^/]+)"
Answer = Callable[..., None]
ROUTES: tuple[tuple[str, Answer], ...] = (
    (r"/api/whoami-v2", _Handler.answer_whoami),
    (r"/api/repos/create", _Handler.answer_create),
    (r"/api/validate-yaml", _Handler.answer_validate),
    (rf"/api/models/{_NAME}/preupload/(?P<revision>.+)", _Handler.answer_preupload),
    (rf"/api/models/{_NAME}/commit/(?P<revision>.+)", _Handler.answer_commit),
    (rf"/api/models/{_NAME}/tree/(?P<revision>.+)", _Handler.answer_tree),
    (rf"/api/models/{_NAME}/revision/(?P<revision>.+)", _Handler.answer_info),
    (rf"/api/models/{_NAME}", _Handler.answer_info),
    (rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.answer_batch),
    (rf"/{_NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.answer_resolve),
    (r"/storage/(?P<sha256>[0-9a-f]{64})", _Handler.answer_storage),
)
