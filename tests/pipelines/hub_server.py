"""A small stand-in for the Hub, with as much of its HTTP interface as huggingface_hub asks for."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_stand_in"


class Repo:
    """Commits, each all files by path; branches and tags by name."""

    def __init__(self, private: bool = False) -> None:
        self.private = private
        self.gated = False
        self.commits: dict[str, dict[str, bytes]] = {}
        self.refs: dict[str, str] = {}
        self.commit({".gitattributes": b"*.safetensors filter=lfs\n"})

    def commit(self, files: dict[str, bytes | None], branch: str = "main") -> str:
        """Add files, or with None remove them; returns the commit's id."""
        content = {**self.commits.get(self.refs.get(branch, ""), {}), **files}
        content = {path: data for path, data in content.items() if data is not None}
        listing = [[path, hashlib.sha1(data).hexdigest()] for path, data in sorted(content.items())]
        sha = hashlib.sha1(json.dumps([len(self.commits), listing]).encode()).hexdigest()
        self.commits[sha] = content
        self.refs[branch] = sha
        return sha

    def sha(self, revision: str) -> str | None:
        return self.refs.get(revision, revision if revision in self.commits else None)

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.refs["main"]]


class HubServer:
    """The server on a free port of this machine, in a thread, as long as the context lasts.

    Attributes:
        url: what HF_ENDPOINT must be.
        repos: by "user/name".
        requests: (method, path) of all requests, in their order.
        status: what every request is answered with, if not None.
        on_file: called with the path of every file that is about to be sent.
        cuts: how often the connection still breaks in the middle of a file, by its path in the repository.
        ranges: the Range headers that were obeyed.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str]] = []
        self.cuts: dict[str, int] = {}
        self.ranges: list[str] = []
        self.status: int | None = None
        self.on_file: Callable[[str], None] = lambda path: None
        self.uploads: dict[str, bytes] = {}
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

    def fetched(self) -> list[str]:
        """Paths of files that were asked for, in their order, without repetition."""
        paths = [re.search(r"/resolve/[^/]+/(.*)", path) for _, path in self.requests]
        return list(dict.fromkeys(unquote(path[1]) for path in paths if path))


class Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    ROUTES = [
        ("POST", r"/api/repos/create", "create_repo"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", r"/api/models/([^/]+/[^/]+)/preupload/(.+)", "preupload"),
        ("POST", r"/api/models/([^/]+/[^/]+)/commit/(.+)", "commit"),
        ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/([0-9a-f]+)", "lfs_upload"),
        ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", "tree"),
        ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", "info"),
        ("GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
        ("GET", r"/cdn/([^/]+/[^/]+)/([0-9a-f]+)/(.+)", "cdn"),
    ]

    def log_message(self, *_) -> None:
        pass

    def dispatch(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append((self.command, path))
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.hub.status is not None:
            return self.reply(self.hub.status)
        asked = "GET" if self.command == "HEAD" else self.command  # `reply` leaves out the body
        for method, pattern, name in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if method == asked and match:
                groups = [group and unquote(group) for group in match.groups()]
                return getattr(self, name)(*groups)
        self.reply(501, {"error": f"the stand-in has no {self.command} {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = dispatch

    def reply(self, status: int, body: bytes | dict | list = b"", **headers: str) -> None:
        """Headers are named with underscores."""
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def may_write(self) -> bool:
        if not self.authorized():
            self.reply(401, {"error": "Invalid username or password."})
        return self.authorized()

    def open_repo(self, repo_id: str, revision: str | None) -> tuple[Repo, str] | None:
        """The repository and the commit; None once it has been said that there is none."""
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and not self.authorized()):
            self.reply(401, {"error": "Invalid username or password."}, X_Error_Code="RepoNotFound")
            return None
        if repo.gated:
            self.reply(403, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted.")
            return None
        sha = repo.sha(revision or "main")
        if sha is None:
            self.reply(404, X_Error_Code="RevisionNotFound", X_Error_Message=f"Invalid rev id: {revision}")
            return None
        return repo, sha

    # --- reading ---------------------------------------------------------------------------------------------------

    def info(self, repo_id: str, revision: str | None) -> None:
        if opened := self.open_repo(repo_id, revision):
            repo, sha = opened
            siblings = [{"rfilename": path} for path in repo.commits[sha]]
            self.reply(200, {"id": repo_id, "sha": sha, "private": repo.private, "tags": [], "siblings": siblings})

    def tree(self, repo_id: str, revision: str) -> None:
        if opened := self.open_repo(repo_id, revision):
            repo, sha = opened
            entries = []
            for path, data in repo.commits[sha].items():
                entry = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                if is_lfs(path):
                    entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
                entries.append(entry)
            self.reply(200, entries)

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        opened = self.open_repo(repo_id, revision)
        if opened is None:
            return
        repo, sha = opened
        data = repo.commits[sha].get(path)
        if data is None:
            self.reply(404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found", X_Repo_Commit=sha)
        elif is_lfs(path):
            etag = hashlib.sha256(data).hexdigest()
            self.reply(
                302,
                Location=f"{self.hub.url}/cdn/{repo_id}/{sha}/{path}",
                X_Repo_Commit=sha,
                X_Linked_Etag=f'"{etag}"',
                X_Linked_Size=str(len(data)),
            )
        else:
            self.send_file(path, data, sha)

    def cdn(self, repo_id: str, sha: str, path: str) -> None:
        self.send_file(path, self.hub.repos[repo_id].commits[sha][path], sha)

    def send_file(self, path: str, data: bytes, sha: str) -> None:
        start, status, headers = 0, 200, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X_Repo_Commit": sha}
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked:
            start, status = int(asked[1]), 206
            headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self.hub.ranges.append(self.headers["Range"])
        body = data[start:]
        self.hub.on_file(path)
        if self.command == "GET" and self.hub.cuts.get(path, 0) > 0:
            self.hub.cuts[path] -= 1
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.close_connection = True
            return
        if self.command == "HEAD":
            headers["Content_Length"] = str(len(body))
        self.reply(status, body, **headers)

    # --- writing ---------------------------------------------------------------------------------------------------

    def create_repo(self) -> None:
        if not self.may_write():
            return
        asked = json.loads(self.body)
        repo_id = f"{asked.get('organization') or 'user'}/{asked['name']}"
        exists = repo_id in self.hub.repos
        if not exists:
            self.hub.create(repo_id, private=asked.get("visibility") == "private" or bool(asked.get("private")))
        self.reply(409 if exists else 200, {"url": f"{self.hub.url}/{repo_id}", "name": repo_id})

    def validate_yaml(self) -> None:
        has_header = json.loads(self.body)["content"].startswith("---\n")
        self.reply(200, {"errors": [], "warnings": [] if has_header else [{"message": "empty or missing metadata"}]})

    def preupload(self, repo_id: str, _revision: str) -> None:
        if self.may_write():
            files = [
                {"path": f["path"], "uploadMode": "lfs" if is_lfs(f["path"]) else "regular", "shouldIgnore": False}
                for f in json.loads(self.body)["files"]
            ]
            self.reply(200, {"files": files})

    def lfs_batch(self, _repo_id: str) -> None:
        if self.may_write():
            objects = [
                {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": f"{self.hub.url}/lfs/{o['oid']}"}}}
                for o in json.loads(self.body)["objects"]
            ]
            self.reply(200, {"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.uploads[oid] = self.body
        self.reply(200)

    def commit(self, repo_id: str, revision: str) -> None:
        if not self.may_write():
            return
        files = {}
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploads[value["oid"]]
        sha = self.hub.repos[repo_id].commit(files, branch=revision)
        self.reply(200, {"commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}", "commitOid": sha})


def is_lfs(path: str) -> bool:
    return path.endswith((".safetensors", ".bin"))
