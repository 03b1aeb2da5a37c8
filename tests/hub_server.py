"""A small Hub on loopback: what huggingface_hub's client calls to publish and to load a model, and all that it sent.

    with HubServer() as hub:
        HfApi(endpoint=hub.url, token=TOKEN).create_repo("org/name")

Revisions are kept in memory. `hub.fail(method, pattern, status)` makes matching requests fail; `hub.received` holds
all that came in: bodies, paths and headers.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

USER, TOKEN = "org", "hf_loopback"
LFS_SUFFIXES = (".safetensors", ".png")
REPO = r"([^/]+/[^/]+)"


@dataclass
class Repo:
    """A repository: files of each commit, and where branches and pull requests point."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(f"{len(self.commits)} {ref}".encode()).hexdigest()
        self.commits[sha] = files
        self.refs[ref] = sha
        return sha

    def sha(self, revision: str) -> str | None:
        return self.refs.get(revision) or (revision if revision in self.commits else None)


@dataclass(frozen=True)
class Failure:
    method: str
    pattern: str
    status: int


class Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = ""):
        self.status, self.code, self.message = status, code, message


class HubServer:
    """The server, on a free port, from `with` to its end."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.datasets: dict[str, bool] = {}  # of those that there are, whether they are private
        self.jobs: list[dict[str, Any]] = []  # that were scheduled
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.bodies: list[bytes] = []
        self.headers: list[str] = []
        self.failures: list[Failure] = []
        handler = type("Bound", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def received(self) -> bytes:
        """Every byte that came in, and once more decoded where it was sent as base64."""
        return b"\n".join([*self.bodies, *map(_decoded, self.bodies), *(h.encode() for h in self.headers)])

    def fail(self, method: str, pattern: str, status: int) -> None:
        """Answer requests with this method, whose path the pattern is found in, with an error."""
        self.failures.append(Failure(method, pattern, status))

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a revision, without .gitattributes, which every repository starts with."""
        repo = self.repos[repo_id]
        return {
            name: content for name, content in repo.commits[repo.sha(revision)].items() if name != ".gitattributes"
        }


class Handler(BaseHTTPRequestHandler):
    """Routes requests to the methods below by method and path."""

    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._route()

    do_HEAD = do_POST = do_PUT = do_GET

    def _route(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else self._chunks()
        parts = urlsplit(self.path)
        path, query = parts.path, parse_qs(parts.query)
        self.hub.requests.append((self.command, path))
        self.hub.bodies.append(body)
        self.hub.headers.append(f"{self.path} {self.headers}")
        try:
            for failure in self.hub.failures:
                if failure.method == self.command and re.search(failure.pattern, path):
                    raise Refused(failure.status, message="injected")
            for methods, pattern, answer in ROUTES:
                found = re.fullmatch(pattern, path)
                if self.command in methods and found:
                    answer(self, body, query, *map(unquote, found.groups()))
                    return
            raise Refused(404, "EntryNotFound", f"no route {self.command} {path}")
        except Refused as refused:
            headers = {"X-Error-Code": refused.code} if refused.code else {}
            self._send({"error": refused.message}, refused.status, headers | {"X-Error-Message": refused.message})

    def _chunks(self) -> bytes:
        body = b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        return body

    def _send(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _signed_in(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repo(self, repo_id: str, write: bool = False) -> Repo:
        repo = self.hub.repos.get(repo_id)
        if repo is None or ((repo.private or write) and not self._signed_in()):
            raise Refused(404 if self._signed_in() else 401, "RepoNotFound", "Repository not found")
        return repo

    def _files(self, repo_id: str, revision: str) -> tuple[str, dict[str, bytes]]:
        repo = self._repo(repo_id)
        sha = repo.sha(revision)
        if sha is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha, repo.commits[sha]

    # Repositories

    def whoami(self, body: bytes, query: dict) -> None:
        if not self._signed_in():
            raise Refused(401, message="Invalid credentials in Authorization header")
        self._send({"type": "user", "name": USER, "orgs": []})

    def create(self, body: bytes, query: dict) -> None:
        if not self._signed_in():
            raise Refused(401, message="Invalid credentials in Authorization header")
        asked = json.loads(body)
        repo_id = f"{asked.get('organization') or USER}/{asked['name']}"
        if repo_id in self.hub.repos:
            self._send({"error": "You already created this model repo", "url": f"{self.hub.url}/{repo_id}"}, 409)
            return
        visibility = asked.get("visibility") or ("private" if asked.get("private") else "public")
        repo = self.hub.repos[repo_id] = Repo(private=visibility == "private")
        repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self._send({"url": f"{self.hub.url}/{repo_id}", "name": repo_id})

    def info(self, body: bytes, query: dict, repo_id: str, revision: str = "main") -> None:
        sha, files = self._files(repo_id, revision)
        siblings = [{"rfilename": name} for name in files]
        private = self.hub.repos[repo_id].private
        found = {"id": repo_id, "sha": sha, "private": private, "siblings": siblings, "tags": [], "downloads": 0}
        if "evalResults" in query.get("expand", []):
            names = [name for name in files if name.startswith(".eval_results/")]
            entries = [(name, entry) for name in names for entry in yaml.safe_load(files[name])]
            found["evalResults"] = [{"filename": name, "data": entry} for name, entry in entries]
        self._send(found)

    def dataset(self, body: bytes, query: dict, repo_id: str) -> None:
        private = self.hub.datasets.get(repo_id)
        if private is None or (private and not self._signed_in()):
            raise Refused(404 if self._signed_in() else 401, "RepoNotFound", "Repository not found")
        self._send({"id": repo_id, "sha": "0" * 40, "private": private, "siblings": [], "tags": [], "downloads": 0})

    def refs(self, body: bytes, query: dict, repo_id: str) -> None:
        refs = self._repo(repo_id).refs.items()
        rows = [{"name": n, "ref": n if n[:5] == "refs/" else f"refs/heads/{n}", "targetCommit": s} for n, s in refs]
        pulls = [row for row in rows if row["ref"].startswith("refs/pr/")]
        self._send(
            {"branches": [r for r in rows if r not in pulls], "tags": [], "converts": [], "pullRequests": pulls}
        )

    def branch(self, body: bytes, query: dict, repo_id: str, name: str) -> None:
        repo = self._repo(repo_id, write=True)
        if name in repo.refs:
            raise Refused(409, message="Reference already exists")
        repo.refs[name] = repo.refs["main"]
        self._send({})

    def schedule(self, body: bytes, query: dict, namespace: str) -> None:
        if not self._signed_in():
            raise Refused(401, message="Invalid credentials in Authorization header")
        asked = json.loads(body)
        self.hub.jobs.append(asked)
        owner = {"id": "0", "name": namespace, "type": "user"}
        self._send({"id": f"job{len(self.hub.jobs)}", "owner": owner, "schedule": asked["schedule"]})

    # Uploads

    def validate(self, body: bytes, query: dict) -> None:
        self._send({"errors": [], "warnings": []})

    def preupload(self, body: bytes, query: dict, repo_id: str, revision: str) -> None:
        self._repo(repo_id, write=True)
        names = [file["path"] for file in json.loads(body)["files"]]
        modes = {True: "lfs", False: "regular"}
        self._send(
            {
                "files": [
                    {"path": n, "uploadMode": modes[n.endswith(LFS_SUFFIXES)], "shouldIgnore": False} for n in names
                ]
            }
        )

    def lfs_batch(self, body: bytes, query: dict, repo_id: str) -> None:
        self._repo(repo_id, write=True)
        objects = []
        for item in json.loads(body)["objects"]:
            actions = {
                "upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"},
                "verify": {"href": f"{self.hub.url}/lfs-verify"},
            }
            objects.append(item | ({} if item["oid"] in self.hub.blobs else {"actions": actions}))
        self._send({"transfer": "basic", "objects": objects})

    def lfs_put(self, body: bytes, query: dict, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, message="wrong content")
        self.hub.blobs[oid] = body
        self._send({})

    def lfs_verify(self, body: bytes, query: dict) -> None:
        asked = json.loads(body)
        if len(self.hub.blobs.get(asked["oid"], b"")) != asked["size"]:
            raise Refused(404, message="not uploaded")
        self._send({})

    def commit(self, body: bytes, query: dict, repo_id: str, revision: str) -> None:
        repo = self._repo(repo_id, write=True)
        sha = repo.sha(revision)
        if sha is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = dict(repo.commits[sha])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        pull = None
        if query.get("create_pr") == ["1"]:
            number = sum(ref.startswith("refs/pr/") for ref in repo.refs) + 1
            revision, pull = f"refs/pr/{number}", f"{self.hub.url}/{repo_id}/discussions/{number}"
        oid = repo.commit(revision, files)
        url = f"{self.hub.url}/{repo_id}/commit/{oid}"
        self._send({"success": True, "commitOid": oid, "commitUrl": url, "pullRequestUrl": pull})

    # Downloads

    def tree(self, body: bytes, query: dict, repo_id: str, revision: str, folder: str = "") -> None:
        _, files = self._files(repo_id, revision)
        inside = {name: content for name, content in files.items() if name.startswith(f"{folder}/" if folder else "")}
        if folder and not inside:
            raise Refused(404, "EntryNotFound", f"{folder} does not exist")
        self._send(
            [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in inside.items()
            ]
        )

    def resolve(self, body: bytes, query: dict, repo_id: str, revision: str, name: str) -> None:
        sha, files = self._files(repo_id, revision)
        if name not in files:
            raise Refused(404, "EntryNotFound", f"{name} does not exist")
        content = files[name]
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        start = re.match(r"bytes=(\d+)-", self.headers.get("Range") or "")
        headers = {"ETag": etag, "X-Repo-Commit": sha, "Content-Type": "application/octet-stream"}
        self._send(content[int(start[1]) :] if start else content, 206 if start else 200, headers)


ROUTES = [
    ("GET", r"/api/whoami-v2", Handler.whoami),
    ("POST", r"/api/repos/create", Handler.create),
    ("POST", r"/api/validate-yaml", Handler.validate),
    ("POST", rf"/api/models/{REPO}/preupload/([^/]+)", Handler.preupload),
    ("POST", rf"/api/models/{REPO}/commit/([^/]+)", Handler.commit),
    ("POST", rf"/api/models/{REPO}/branch/([^/]+)", Handler.branch),
    ("GET", rf"/api/models/{REPO}/refs", Handler.refs),
    ("GET", rf"/api/models/{REPO}/tree/([^/]+)", Handler.tree),
    ("GET", rf"/api/models/{REPO}/tree/([^/]+)/(.+)", Handler.tree),
    ("GET", rf"/api/models/{REPO}/revision/([^/]+)", Handler.info),
    ("GET", rf"/api/models/{REPO}", Handler.info),
    ("GET", rf"/api/datasets/{REPO}", Handler.dataset),
    ("POST", r"/api/scheduled-jobs/([^/]+)", Handler.schedule),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", r"/lfs/([0-9a-f]+)", Handler.lfs_put),
    ("POST", r"/lfs-verify", Handler.lfs_verify),
    (("GET", "HEAD"), rf"/{REPO}/resolve/([^/]+)/(.+)", Handler.resolve),
]


def _decoded(body: bytes) -> bytes:
    """The contents of the files in a commit's body."""
    if not body.startswith(b'{"key"'):
        return b""
    lines = [json.loads(line)["value"] for line in body.splitlines()]
    return b"\n".join(base64.b64decode(value["content"]) for value in lines if "content" in value)
