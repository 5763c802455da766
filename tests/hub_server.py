"""A Hub on loopback, in memory: what huggingface_hub and datasets ask of the Hub for datasets and Spaces.

It answers with the status codes and error headers of the real one, knows private repositories and tokens that only
read, refuses a commit whose parent is not the head, and fails where a test tells it to.
"""

import base64
import dataclasses
import hashlib
import itertools
import json
import os
import re
import threading
import urllib.parse
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TOKENS = {"hf_writer": "write", "hf_reader": "read"}
USER = "ada"
_NUMBERS = itertools.count()  # no two commits have one name, in whatever repository


@dataclasses.dataclass(frozen=True)
class File:
    """A file of a commit. Large ones are pointers in git, so that their git name is that of the pointer."""

    content: bytes
    large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        text = self.content
        if self.large:
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(text)}\n"
            text = pointer.encode()
        return hashlib.sha1(b"blob %d\0" % len(text) + text).hexdigest()

    def entry(self, path: str) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "oid": self.oid, "size": len(self.content)}
        if self.large:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": 130}
        return entry


@dataclasses.dataclass
class Repo:
    """Commits by name, each with all of its files, and branches."""

    private: bool
    commits: dict[str, dict[str, File]] = dataclasses.field(default_factory=dict)
    titles: list[str] = dataclasses.field(default_factory=list)
    branches: dict[str, str] = dataclasses.field(default_factory=dict)

    def commit(self, files: dict[str, File], title: str, branch: str = "main") -> str:
        name = hashlib.sha1(f"commit {next(_NUMBERS)}".encode()).hexdigest()
        self.commits[name] = files
        self.titles.append(title)
        self.branches[branch] = name
        return name

    def find(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)

    @property
    def files(self) -> dict[str, File]:
        """The files of the main branch."""
        return self.commits[self.branches["main"]]


class Hub:
    """The server with its state, for a `with` statement. Tests look at it and meddle with it from outside."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.bytes_sent = 0
        self.rules: list[tuple[str, int, Callable[[], Any]]] = []
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def create(self, name: str, private: bool = False) -> Repo:
        """`name` begins with its kind: `datasets/ada/scores`."""
        self.repos[name] = Repo(private)
        self.repos[name].commit({".gitattributes": File(b"*.parquet filter=lfs\n", large=False)}, "initial commit")
        return self.repos[name]

    def add(self, name: str, path: str, content: bytes) -> None:
        """Commit one file, as somebody does on the web page."""
        repo = self.repos[name]
        repo.commit({**repo.files, path: File(content, large=path.endswith((".parquet", ".arrow")))}, f"Update {path}")

    def on(self, pattern: str, action: Callable[[], Any], times: int = 1) -> None:
        """Do something when a request matches: a status code that `action` returns is the answer, None goes on."""
        self.rules.append((pattern, times, action))

    def answer_of_rules(self, line: str) -> int | None:
        for index, (pattern, times, action) in enumerate(self.rules):
            if re.search(pattern, line):
                self.rules[index : index + 1] = [(pattern, times - 1, action)] if times > 1 else []
                return action()
        return None

    def asked(self, pattern: str) -> list[str]:
        """The requests so far that match."""
        return [line for line in self.requests if re.search(pattern, line)]


def environment(url: str, folder: Path, token: str | None = "hf_writer") -> dict[str, str]:
    """The environment of a process that takes the server for the Hub, with a cache of its own."""
    unset = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "HF_TOKEN")
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    cache = {"HF_HOME": str(folder), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return {**kept, **cache, "HF_ENDPOINT": url, "PYTHONPATH": str(ROOT), **({"HF_TOKEN": token} if token else {})}


class Handler(BaseHTTPRequestHandler):
    """One request: found in a table of routes."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        line = f"{self.command} {urllib.parse.unquote(url.path)}"
        self.query = urllib.parse.parse_qs(url.query)
        self.body = self.read_body()
        with self.hub.lock:
            self.hub.requests.append(line)
            status = self.hub.answer_of_rules(line)
            if status is not None:
                return self.refuse(status, "", f"status {status}, as the test wants")
            for pattern, handle in ROUTES:
                match = re.fullmatch(pattern, url.path)
                if match:
                    return handle(self, *(urllib.parse.unquote(each or "") for each in match.groups()))
        return self.refuse(404, "NotImplemented", f"the server of the tests has no {line}")

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def reply(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.hub.bytes_sent += len(data)
            self.wfile.write(data)

    def refuse(self, status: int, code: str, message: str) -> None:
        self.reply({"error": message}, status, {"X-Error-Code": code, "X-Error-Message": message})

    # Who asks

    def token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def may_write(self) -> bool:
        """Whether the token writes; otherwise the answer is given."""
        if self.token() is None:
            self.refuse(401, "", "Invalid username or password.")
        elif self.token() not in TOKENS:
            self.refuse(401, "", "Invalid credentials in Authorization header")
        elif TOKENS[self.token()] != "write":
            self.refuse(403, "", "You don't have the rights to do this")
        else:
            return True
        return False

    def repo(self, kind: str, name: str) -> Repo | None:
        """A repository that the token sees; otherwise the answer is given."""
        repo = self.hub.repos.get(f"{kind or 'models'}/{name}")
        if self.token() is not None and self.token() not in TOKENS:
            self.refuse(401, "", "Invalid credentials in Authorization header")
        elif repo is not None and (not repo.private or self.token() in TOKENS):
            return repo
        elif self.token() is None:
            self.refuse(401, "", "Invalid username or password.")
        else:
            self.refuse(404, "RepoNotFound", "Repository not found")
        return None

    def commit_of(self, repo: Repo, revision: str) -> str | None:
        commit = repo.find(revision)
        if commit is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    # What is asked

    def who_am_i(self) -> None:
        if self.token() not in TOKENS:
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        access = {"accessToken": {"role": TOKENS[self.token()]}}
        return self.reply({"type": "user", "id": "1", "name": USER, "orgs": [], "auth": access})

    def create_repo(self) -> None:
        if not self.may_write():
            return
        wanted = json.loads(self.body)
        name = f"{wanted.get('type', 'model')}s/{wanted.get('organization') or USER}/{wanted['name']}"
        if wanted.get("organization") not in (None, USER):
            return self.refuse(403, "", f"You don't have the rights to create a {wanted.get('type')} there")
        url = f"{self.hub.url}/{name.removeprefix('models/')}"
        if name in self.hub.repos:
            return self.reply({"error": "You already created this repo", "url": url}, 409)
        self.hub.create(name, wanted.get("visibility") == "private" or bool(wanted.get("private")))
        return self.reply({"url": url, "name": name})

    def validate_yaml(self) -> None:
        self.reply({"errors": [], "warnings": []})

    def large_batch(self, kind: str, name: str) -> None:
        if not self.may_write():
            return
        answers = []
        for asked in json.loads(self.body)["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.objects:
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/objects/{asked['oid']}"}}
            answers.append(answer)
        self.reply({"transfer": "basic", "objects": answers})

    def large_object(self, sha256: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != sha256:
            return self.refuse(422, "", "The content is not what was announced")
        self.hub.objects[sha256] = self.body
        return self.reply(b"")

    def info(self, kind: str, name: str, revision: str) -> None:
        repo = self.repo(kind, name)
        commit = repo and self.commit_of(repo, revision or "main")
        if repo is None or commit is None:
            return
        facts = {"id": name, "author": name.split("/")[0], "sha": commit, "private": repo.private, "tags": []}
        facts |= {"lastModified": "2026-01-01T00:00:00.000Z", "createdAt": "2026-01-01T00:00:00.000Z"}
        siblings = [{"rfilename": path} for path in sorted(repo.commits[commit])]
        self.reply({**facts, "siblings": siblings, "disabled": False, "gated": False, "downloads": 0, "likes": 0})

    def refs(self, kind: str, name: str) -> None:
        repo = self.repo(kind, name)
        if repo is not None:
            branches = [
                {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": commit}
                for branch, commit in repo.branches.items()
            ]
            self.reply({"branches": branches, "tags": [], "converts": []})

    def create_branch(self, kind: str, name: str, branch: str) -> None:
        repo = self.repo(kind, name)
        if repo is None or not self.may_write():
            return
        if branch in repo.branches:
            return self.refuse(409, "", "Reference already exists")
        repo.branches[branch] = repo.branches["main"]
        return self.reply({})

    def tree(self, kind: str, name: str, revision: str, folder: str) -> None:
        repo = self.repo(kind, name)
        commit = repo and self.commit_of(repo, revision)
        if repo is None or commit is None:
            return
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("1", "true")
        start = f"{folder}/" if folder else ""
        entries: dict[str, Any] = {}
        for path, file in sorted(repo.commits[commit].items()):
            if not path.startswith(start):
                continue
            parts = path[len(start) :].split("/")
            for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                above = start + "/".join(parts[:depth])
                entries[above] = {"type": "directory", "path": above, "oid": "0" * 40, "size": 0}
            if recursive or len(parts) == 1:
                entries[path] = file.entry(path)
        if folder and not entries:
            return self.refuse(404, "EntryNotFound", f"{folder} does not exist")
        return self.reply(list(entries.values()))

    def paths_info(self, kind: str, name: str, revision: str) -> None:
        repo = self.repo(kind, name)
        commit = repo and self.commit_of(repo, revision)
        if repo is None or commit is None:
            return
        if "json" in self.headers.get("Content-Type", ""):
            paths = json.loads(self.body)["paths"]
        else:
            paths = urllib.parse.parse_qs(self.body.decode()).get("paths", [])
        files, found = repo.commits[commit], []
        for path in paths:
            if path in files:
                found.append(files[path].entry(path))
            elif any(each.startswith(f"{path}/") for each in files):
                found.append({"type": "directory", "path": path, "oid": "0" * 40, "size": 0})
        self.reply(found)

    def preupload(self, kind: str, name: str, revision: str) -> None:
        repo = self.repo(kind, name)
        if repo is None or not self.may_write():
            return
        present, answers = repo.commits[repo.find(revision)], []
        for asked in json.loads(self.body)["files"]:
            large = asked["path"].endswith((".parquet", ".arrow", ".safetensors", ".bin")) or asked["size"] > 2**20
            mode = "lfs" if large else "regular"
            answer = {"path": asked["path"], "uploadMode": mode, "shouldIgnore": False}
            if asked["path"] in present:
                file = present[asked["path"]]
                answer["oid"] = file.sha256 if file.large else file.oid
            answers.append(answer)
        self.reply({"files": answers})

    def commit(self, kind: str, name: str, branch: str) -> None:
        repo = self.repo(kind, name)
        if repo is None or not self.may_write():
            return
        if branch not in repo.branches:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {branch}")
        files, title = dict(repo.commits[repo.branches[branch]]), ""
        for line in self.body.splitlines():
            what, value = json.loads(line)["key"], json.loads(line)["value"]
            if what == "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, repo.branches[branch]):
                    return self.refuse(412, "", "A commit has happened since. Please refresh and try again.")
            elif what == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), large=False)
            elif what == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    return self.refuse(400, "", f"{value['oid']} was not uploaded")
                files[value["path"]] = File(self.hub.objects[value["oid"]], large=True)
            elif what == "deletedFile":
                del files[value["path"]]
            elif what == "deletedFolder":
                files = {path: file for path, file in files.items() if not path.startswith(value["path"])}
        commit = repo.commit(files, title, branch)
        url = f"{self.hub.url}/{kind}/{name}/commit/{commit}"
        return self.reply({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    def resolve(self, kind: str, name: str, revision: str, path: str) -> None:
        repo = self.repo(kind, name)
        commit = repo and self.commit_of(repo, revision)
        if repo is None or commit is None:
            return
        file = repo.commits[commit].get(path)
        if file is None:
            return self.refuse(404, "EntryNotFound", f"{path} does not exist")
        headers = {"X-Repo-Commit": commit, "ETag": f'"{file.sha256 if file.large else file.oid}"'}
        headers["Accept-Ranges"] = "bytes"
        if file.large:
            headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.content))}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not wanted or self.command == "HEAD":
            return self.reply(file.content, 200, headers)
        size = len(file.content)
        first = int(wanted[1]) if wanted[1] else size - int(wanted[2])
        last = min(int(wanted[2]), size - 1) if wanted[1] and wanted[2] else size - 1
        headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        return self.reply(file.content[first : last + 1], 206, headers)


_KIND, _NAME = r"(models|datasets|spaces)", r"([^/]+/[^/]+)"
ROUTES: list[tuple[str, Callable[..., None]]] = [
    (r"/api/whoami-v2", Handler.who_am_i),
    (r"/api/repos/create", Handler.create_repo),
    (r"/api/validate-yaml", Handler.validate_yaml),
    (rf"/api/{_KIND}/{_NAME}/refs", Handler.refs),
    (rf"/api/{_KIND}/{_NAME}/branch/(.+)", Handler.create_branch),
    (rf"/api/{_KIND}/{_NAME}/tree/([^/]+)/?(.*)", Handler.tree),
    (rf"/api/{_KIND}/{_NAME}/paths-info/(.+)", Handler.paths_info),
    (rf"/api/{_KIND}/{_NAME}/preupload/(.+)", Handler.preupload),
    (rf"/api/{_KIND}/{_NAME}/commit/(.+)", Handler.commit),
    (rf"/api/{_KIND}/{_NAME}(?:/revision/(.+))?", Handler.info),
    (rf"/(?:(datasets|spaces)/)?{_NAME}\.git/info/lfs/objects/batch", Handler.large_batch),
    (r"/objects/([0-9a-f]{64})", Handler.large_object),
    (rf"/(?:(datasets|spaces)/)?{_NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
]
