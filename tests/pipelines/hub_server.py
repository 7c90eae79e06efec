"""A fake Hugging Face Hub: the part of its HTTP interface that huggingface_hub uses here."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_fake"


class Repo:
    """Commits, each a dictionary of files by path; branches by name."""

    def __init__(self, private: bool = False) -> None:
        self.private = private
        self.gated = False
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, str] = {}
        self.commit({".gitattributes": b""})

    def commit(self, files: dict[str, bytes | None], branch: str = "main") -> str:
        """Add files, or remove those that are None; returns the commit's id."""
        content = {**self.commits.get(self.branches.get(branch, ""), {}), **files}
        sha = hashlib.sha1(f"{len(self.commits)}".encode()).hexdigest()
        self.commits[sha] = {path: data for path, data in content.items() if data is not None}
        self.branches[branch] = sha
        return sha

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.branches["main"]]


class HubServer:
    """The server in a thread, on a free local port, while the context is open.

    Attributes:
        url: the value of HF_ENDPOINT.
        repos: by "user/name".
        requests: (method, path) of all requests.
        status: HTTP status of every answer, if not None.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str]] = []
        self.status: int | None = None
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    def create(self, repo_id: str, files: dict[str, bytes] | None = None, private: bool = False) -> Repo:
        repo = self.repos[repo_id] = Repo(private)
        repo.commit(files or {})
        return repo

    def fetched(self) -> set[str]:
        """Return the paths of downloaded files."""
        paths = [re.search(r"/resolve/[^/]+/(.*)", path) for method, path in self.requests if method == "GET"]
        return {unquote(path[1]) for path in paths if path}


class Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    ROUTES = [
        ("POST", r"/api/repos/create", "create_repo"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", r"/api/models/([^/]+/[^/]+)/preupload/(.+)", "preupload"),
        ("POST", r"/api/models/([^/]+/[^/]+)/commit/(.+)", "commit"),
        ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", "tree"),
        ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", "info"),
        ("GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
    ]

    def log_message(self, *_) -> None:
        pass

    def dispatch(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append((self.command, path))
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.hub.status is not None:
            return self.reply(self.hub.status)
        for method, pattern, name in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if method == self.command.replace("HEAD", "GET") and match:
                return getattr(self, name)(*[group and unquote(group) for group in match.groups()])
        self.reply(501, {"error": f"the fake Hub has no {self.command} {path}"})

    do_GET = do_HEAD = do_POST = dispatch

    def reply(self, status: int, body: bytes | dict | list = b"", **headers: str) -> None:
        """Send an answer; names of headers have underscores."""
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def open_repo(self, repo_id: str, revision: str | None) -> tuple[Repo, str] | None:
        """Return the repository and the commit, or reply that there is none."""
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            return self.reply(401, X_Error_Code="RepoNotFound")
        if repo.gated:
            return self.reply(403, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted.")
        sha = repo.branches.get(revision or "main", revision)
        if sha not in repo.commits:
            return self.reply(404, X_Error_Code="RevisionNotFound", X_Error_Message=f"Invalid rev id: {revision}")
        return repo, sha

    def info(self, repo_id: str, revision: str | None) -> None:
        if opened := self.open_repo(repo_id, revision):
            repo, sha = opened
            siblings = [{"rfilename": path} for path in repo.commits[sha]]
            self.reply(200, {"id": repo_id, "sha": sha, "private": repo.private, "tags": [], "siblings": siblings})

    def tree(self, repo_id: str, revision: str) -> None:
        if opened := self.open_repo(repo_id, revision):
            files = opened[0].commits[opened[1]]
            self.reply(200, [{"type": "file", "path": p, "size": len(d), "oid": etag(d)} for p, d in files.items()])

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        if opened := self.open_repo(repo_id, revision):
            repo, sha = opened
            data = repo.commits[sha].get(path)
            if data is None:
                self.reply(404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found", X_Repo_Commit=sha)
            else:
                self.reply(200, data, ETag=f'"{etag(data)}"', X_Repo_Commit=sha)

    def create_repo(self) -> None:
        request = json.loads(self.body)
        repo_id = f"{request.get('organization') or 'user'}/{request['name']}"
        exists = repo_id in self.hub.repos
        if not exists:
            self.hub.create(repo_id)
        self.reply(409 if exists else 200, {"url": f"{self.hub.url}/{repo_id}", "name": repo_id})

    def validate_yaml(self) -> None:
        self.reply(200, {"errors": [], "warnings": []})

    def preupload(self, repo_id: str, _revision: str) -> None:
        paths = [file["path"] for file in json.loads(self.body)["files"]]
        self.reply(200, {"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]})

    def commit(self, repo_id: str, revision: str) -> None:
        items = [json.loads(line) for line in self.body.splitlines()]
        files = {i["value"]["path"]: base64.b64decode(i["value"]["content"]) for i in items if i["key"] == "file"}
        sha = self.hub.repos[repo_id].commit(files, branch=revision)
        self.reply(200, {"commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}", "commitOid": sha})


def etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
