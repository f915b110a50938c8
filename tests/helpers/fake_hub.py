"""A hub in this process: as much of the protocol as making, writing and reading a repository of a model needs."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse

LARGE = (".safetensors", ".bin", ".pt")  # what the hub keeps in LFS, as its .gitattributes say
TOKEN = "hf_a-token-that-nobody-may-see"


@dataclass
class Repository:
    private: bool | None
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)  # their messages
    branches: set[str] = field(default_factory=lambda: {"main"})

    @property
    def sha(self) -> str:
        return hashlib.sha1(repr((sorted(self.files.items()), self.commits)).encode()).hexdigest()


@dataclass
class Hub:
    """`repositories` by name, `objects` of LFS by their digests, and every request as "METHOD /path"."""

    address: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    refuse: dict[str, int] = field(default_factory=dict)  # part of a path: the status to answer with


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, status: int, content: Any = None, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content or {}).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _handle(self) -> None:
        path = unquote(urlparse(self.path).path)
        body = self._body()
        self.hub.requests.append(f"{self.command} {path}")
        if refused := next((status for part, status in self.hub.refuse.items() if part in path), None):
            return self._answer(refused, {"error": "refused"}, {"X-Error-Message": "refused by the test"})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and self.command != "PUT":
            return self._answer(401, {"error": "no token"})
        for pattern, answer in ROUTES.items():
            if found := re.fullmatch(pattern, f"{self.command} {path}"):
                return answer(self, body, *found.groups())
        return self._answer(404, {"error": f"no such route: {path}"}, {"X-Error-Code": "EntryNotFound"})

    do_GET = do_POST = do_PUT = do_HEAD = _handle

    def _repository(self, name: str) -> Repository | None:
        found = self.hub.repositories.get(name)
        if found is None:
            self._answer(404, {"error": "no repository"}, {"X-Error-Code": "RepoNotFound"})
        return found

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if name in self.hub.repositories:
            return self._answer(409, {"url": f"{self.hub.address}/{name}", "error": "exists"})
        private = asked.get("private", asked.get("visibility") == "private")
        self.hub.repositories[name] = Repository(private)
        return self._answer(200, {"url": f"{self.hub.address}/{name}", "name": name})

    def validate(self, body: bytes) -> None:
        self._answer(200, {"errors": [], "warnings": []})

    def branch(self, body: bytes, name: str, branch: str) -> None:
        repository = self._repository(name)
        if repository:
            there = branch in repository.branches
            repository.branches.add(branch)
            self._answer(409 if there else 200, {"error": "exists"} if there else {})

    def _has(self, repository: Repository, revision: str) -> bool:
        known = revision in repository.branches or revision == repository.sha
        if not known:
            self._answer(404, {"error": "no revision"}, {"X-Error-Code": "RevisionNotFound"})
        return known

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        files = json.loads(body)["files"]
        modes = [
            {
                "path": f["path"],
                "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
            }
            for f in files
        ]
        repository = self._repository(name)
        if repository and self._has(repository, revision):
            self._answer(200, {"files": modes})

    def batch(self, body: bytes, name: str) -> None:
        objects = [
            {**o, "actions": {"upload": {"href": f"{self.hub.address}/objects/{o['oid']}"}}}
            for o in json.loads(body)["objects"]
        ]
        self._answer(200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"})

    def put(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.objects[oid] = body
        self._answer(200)

    def commit(self, body: bytes, name: str, revision: str) -> None:
        repository = self._repository(name)
        if repository is None or not self._has(repository, revision):
            return None
        if "create_pr=1" in urlparse(self.path).query:  # whose files are not on the branch
            url = f"{self.hub.address}/{name}/commit/{repository.sha}"
            pull_request = f"{self.hub.address}/{name}/discussions/1"
            answer = {"commitUrl": url, "commitOid": repository.sha, "pullRequestUrl": pull_request}
            return self._answer(200, answer)
        for line in body.decode().splitlines():
            part = json.loads(line)
            value = part["value"]
            if part["key"] == "header":
                repository.commits.append(value["summary"])
            elif part["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif part["key"] == "lfsFile":
                repository.files[value["path"]] = self.hub.objects[value["oid"]]
        url = f"{self.hub.address}/{name}/commit/{repository.sha}"
        return self._answer(200, {"commitUrl": url, "commitOid": repository.sha, "pullRequestUrl": None})

    def info(self, body: bytes, name: str, revision: str = "main") -> None:
        repository = self._repository(name)
        if repository and self._has(repository, revision):
            siblings = [{"rfilename": path} for path in repository.files]
            self._answer(200, {"id": name, "modelId": name, "sha": repository.sha, "siblings": siblings})

    def tree(self, body: bytes, name: str, revision: str) -> None:
        repository = self._repository(name)
        if repository:
            entries = [
                {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for path, data in repository.files.items()
            ]
            self._answer(200, entries)

    def resolve(self, body: bytes, name: str, revision: str, path: str) -> None:
        repository = self._repository(name)
        if repository is None:
            return None
        headers = {"X-Repo-Commit": repository.sha}
        if path not in repository.files:
            return self._answer(404, {"error": "no file"}, headers | {"X-Error-Code": "EntryNotFound"})
        data = repository.files[path]
        return self._answer(200, data, headers | {"ETag": f'"{hashlib.sha1(data).hexdigest()}"'})


_NAME = r"([\w.-]+/[\w.-]+)"
ROUTES: dict[str, Any] = {
    "POST /api/repos/create": _Handler.create,
    "POST /api/validate-yaml": _Handler.validate,
    rf"POST /api/models/{_NAME}/branch/(.+)": _Handler.branch,
    rf"POST /api/models/{_NAME}/preupload/(.+)": _Handler.preupload,
    rf"POST /{_NAME}\.git/info/lfs/objects/batch": _Handler.batch,
    r"PUT /objects/(\w+)": _Handler.put,
    rf"POST /api/models/{_NAME}/commit/(.+)": _Handler.commit,
    rf"GET /api/models/{_NAME}": _Handler.info,
    rf"GET /api/models/{_NAME}/revision/(.+)": _Handler.info,
    rf"GET /api/models/{_NAME}/tree/(\w+)": _Handler.tree,
    rf"(?:GET|HEAD) /{_NAME}/resolve/([\w.-]+)/(.+)": _Handler.resolve,
}


@contextmanager
def fake_hub() -> Iterator[Hub]:
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
