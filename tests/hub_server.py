"""A server that speaks the part of the Hugging Face Hub's API that publishing uses, in memory, with faults to switch on."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_a-secret"
Tree = dict[str, bytes]


class Hub(ThreadingHTTPServer):
    """One repository: commits by id, refs, pull requests, and large files by their SHA-256."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.exists = False
        self.commits: dict[str, Tree] = {}
        self.refs: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.pulls: list[dict[str, Any]] = []
        self.large: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.faults: list[tuple[str, Callable[[Handler], bool]]] = []
        """A pattern of `METHOD path`, and what happens there: it returns whether the request was answered."""
        self._log: list[str] = []

    def commit(self, tree: Tree, ref: str) -> str:
        self._log.append(ref)
        oid = hashlib.sha1(repr((len(self._log), sorted(tree))).encode()).hexdigest()
        self.commits[oid], self.refs[ref] = dict(tree), oid
        return oid

    def tree(self, revision: str) -> Tree | None:
        oid = self.refs.get(revision) or self.tags.get(revision) or revision
        return self.commits.get(oid)

    def fault(self, pattern: str, act: Callable[["Handler"], bool], times: int = 1) -> None:
        """Let something happen at the next requests that match."""
        self.faults += [(pattern, act)] * times


def answers(status: int, **headers: str) -> Callable[["Handler"], bool]:
    def act(handler: "Handler") -> bool:
        handler.body()
        handler.reply({"error": "a fault"}, status, **headers)
        return True

    return act


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            found = b""
            while size := int(self.rfile.readline(), 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return found
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def reply(self, value: Any, status: int = 200, **headers: str) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def handle_any(self) -> None:
        parts = urlsplit(self.path)
        path, asked = unquote(parts.path), f"{self.command} {unquote(parts.path)}"
        self.server.asked.append(asked)
        for number, (pattern, act) in enumerate(self.server.faults):
            if re.search(pattern, asked):
                del self.server.faults[number]
                if act(self):
                    return
                break
        if not path.startswith("/lfs/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.body()
            self.reply({"error": "Invalid credentials"}, 401)
            return
        for pattern, method in ROUTES:
            if found := re.fullmatch(pattern, asked):
                method(self, *found.groups())
                return
        self.body()
        self.reply({"error": f"no route: {asked}"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any  # noqa: N815

    def missing(self, code: str, status: int = 404) -> None:
        self.reply({"error": code}, status, X_Error_Code=code)

    # Repositories and their content.

    def create(self) -> None:
        name = json.loads(self.body())
        if self.server.exists:
            self.reply({"error": "exists", "url": f"{self.server.url}/{name['organization']}/{name['name']}"}, 409)
            return
        self.server.exists = True
        self.server.commit({".gitattributes": b""}, "main")
        self.reply({"url": f"{self.server.url}/{name['organization']}/{name['name']}"})

    def whoami(self) -> None:
        self.reply({"name": "someone", "type": "user", "orgs": [], "auth": {}})

    def info(self, _: str, revision: str | None = None) -> None:
        if not self.server.exists:
            self.missing("RepoNotFound")
            return
        revision = (revision or "/revision/main").removeprefix("/revision/")
        oid = self.server.refs.get(revision) or self.server.tags.get(revision, revision)
        files = [{"rfilename": name, "size": len(content)} for name, content in self.server.commits[oid].items()]
        self.reply({"id": "owner/name", "sha": oid, "siblings": files, "tags": [], "private": True, "downloads": 0})

    def all_refs(self, _: str) -> None:
        if not self.server.exists:
            self.missing("RepoNotFound")
            return
        tags = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": oid} for n, oid in self.server.tags.items()]
        main = {"name": "main", "ref": "refs/heads/main", "targetCommit": self.server.refs["main"]}
        self.reply({"branches": [main], "converts": [], "tags": tags})

    def resolve(self, _: str, path: str) -> None:
        revisions = [*self.server.refs, *self.server.tags, *self.server.commits]
        revision = next(
            (each for each in sorted(revisions, key=len, reverse=True) if path.startswith(f"{each}/")), None
        )
        if revision is None:
            self.missing("RevisionNotFound")
            return
        content = (self.server.tree(revision) or {}).get(path.removeprefix(f"{revision}/"))
        if content is None:
            self.missing("EntryNotFound")
        else:
            self.reply(content)

    def paths(self, _: str, revision: str) -> None:
        found, tree = [], self.server.tree(revision) or {}
        for path in parse_qs(self.body().decode())["paths"]:
            if path in tree:
                oid = hashlib.sha256(tree[path]).hexdigest()
                lfs = {"oid": oid, "size": len(tree[path]), "pointerSize": 1} if oid in self.server.large else None
                entry = {"type": "file", "path": path, "size": len(tree[path]), "oid": oid}
                found.append(entry | ({"lfs": lfs} if lfs else {}))
        self.reply(found)

    # Uploads.

    def preupload(self, _: str, revision: str) -> None:
        files = json.loads(self.body())["files"]
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in files
        ]
        self.reply({"files": modes})

    def batch(self, _: str) -> None:
        objects = []
        for each in json.loads(self.body())["objects"]:
            known = each["oid"] in self.server.large
            upload = {"href": f"{self.server.url}/lfs/{each['oid']}", "header": {}}
            objects.append(each if known else {**each, "actions": {"upload": upload}})
        self.reply({"objects": objects, "transfer": "basic"})

    def store(self, oid: str) -> None:
        self.server.large[oid] = self.body()
        self.reply({})

    def validate(self) -> None:
        self.body()
        self.reply({"errors": [], "warnings": []})

    def add_commit(self, _: str, revision: str) -> None:
        lines = [json.loads(line) for line in self.body().splitlines() if line]
        header, hub = lines[0]["value"], self.server
        if header.get("parentCommit") not in (None, hub.refs[revision]):
            self.reply({"error": "A commit has happened since"}, 412)
            return
        tree = dict(hub.tree(revision) or {})
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                tree[value["path"]] = hub.large[value["oid"]]
            else:
                del tree[value["path"]]
        as_pull = "create_pr=1" in self.path
        ref = f"refs/pr/{len(hub.pulls) + 1}" if as_pull else revision
        oid = hub.commit(tree, ref)
        answer = {"commitUrl": f"{hub.url}/owner/name/commit/{oid}", "commitOid": oid}
        if as_pull:
            hub.pulls.append({"title": header["summary"], "status": "open"})
            answer["pullRequestUrl"] = f"{hub.url}/owner/name/discussions/{len(hub.pulls)}"
        self.reply(answer)

    # Pull requests and tags.

    def discussions(self, _: str) -> None:
        found = [
            {
                "num": number,
                "title": pull["title"],
                "status": pull["status"],
                "createdAt": "2026-01-01T00:00:00.000Z",
                "repo": {"name": "owner/name", "type": "model"},
                "isPullRequest": True,
            }
            for number, pull in enumerate(self.server.pulls, start=1)
            if pull["status"] == "open"
        ]
        self.reply({"count": len(found), "start": 0, "discussions": found})

    def merge(self, _: str, number: str) -> None:
        self.body()
        self.server.pulls[int(number) - 1]["status"] = "merged"
        self.server.commit(self.server.tree(f"refs/pr/{number}") or {}, "main")
        self.reply({})

    def status(self, _: str, number: str) -> None:
        self.server.pulls[int(number) - 1]["status"] = json.loads(self.body())["status"]
        event = {"id": "1", "type": "status-change", "createdAt": "2026-01-01T00:00:00.000Z", "author": {"name": "x"}}
        self.reply({"newStatus": event | {"data": {"status": "closed"}}})

    def tag(self, _: str, revision: str) -> None:
        name = json.loads(self.body())["tag"]
        if name in self.server.tags:
            self.reply({"error": "Tag already exists"}, 409)
            return
        self.server.tags[name] = self.server.refs.get(revision, revision)
        self.reply({})


REPOSITORY = r"([\w.-]+/[\w.-]+)"
API = rf"/api/models/{REPOSITORY}"
ROUTES: list[tuple[str, Callable[..., None]]] = [
    ("POST /api/repos/create", Handler.create),
    ("GET /api/whoami-v2", Handler.whoami),
    ("POST /api/validate-yaml", Handler.validate),
    (f"GET {API}/refs", Handler.all_refs),
    (f"GET {API}(/revision/.+)?", Handler.info),
    (f"POST {API}/preupload/(.+)", Handler.preupload),
    (f"POST {API}/commit/(.+)", Handler.add_commit),
    (f"POST {API}/paths-info/(.+)", Handler.paths),
    (f"POST {API}/tag/(.+)", Handler.tag),
    (f"GET {API}/discussions", Handler.discussions),
    (rf"POST {API}/discussions/(\d+)/merge", Handler.merge),
    (rf"POST {API}/discussions/(\d+)/status", Handler.status),
    (rf"POST /{REPOSITORY}\.git/info/lfs/objects/batch", Handler.batch),
    (r"PUT /lfs/(\w+)", Handler.store),
    (f"(?:GET|HEAD) /{REPOSITORY}/resolve/(.+)", Handler.resolve),
]


def serve() -> Hub:
    hub = Hub()
    threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    return hub
