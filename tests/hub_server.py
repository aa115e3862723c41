"""A Hub on 127.0.0.1, as much of its HTTP interface as pushing and loading models needs; nothing leaves the machine.

Repositories are lists of commits, a commit is a map from paths to bytes. Files that the Hub keeps in LFS (weights) are
uploaded by their hash first, as there. What it does not know it answers with 404, and remembers in `unknown`.
"""

import base64
import hashlib
import json
import os
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

USER = "someone"
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


@dataclass
class Commit:
    oid: str
    message: str
    files: dict[str, bytes]


@dataclass
class Hub:
    url: str = ""
    repositories: dict[str, list[Commit]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # of LFS, by their SHA-256
    unknown: list[str] = field(default_factory=list)

    def commit(self, repository: str, message: str, changes: dict[str, bytes | None]) -> Commit:
        """A further commit; None deletes a file."""
        commits = self.repositories.setdefault(repository, [])
        files = (commits[-1].files if commits else {}) | changes
        files = {path: data for path, data in files.items() if data is not None}
        oid = hashlib.sha1(f"{repository} {len(commits)}".encode()).hexdigest()
        commits.append(Commit(oid, message, files))
        return commits[-1]

    def upload(self, repository: str, folder: Path, **changes: bytes | None) -> Commit:
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        return self.commit(repository, "a folder", files | changes)

    def files(self, repository: str) -> dict[str, bytes]:
        return self.repositories[repository][-1].files

    def environment(self, home: Path) -> dict[str, str]:
        """Variables under which a process knows this Hub and no other, with a cache of its own."""
        names = {name for name in os.environ if name.startswith(("HF_", "HUGGINGFACE", "TRANSFORMERS_"))}
        kept = {name: value for name, value in os.environ.items() if name not in names}
        return kept | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": "hf_of_the_tests",
            "HF_HUB_DISABLE_XET": "1",  # the other protocol, which needs servers of its own
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        pass

    def answer(self, status: int, body: bytes | dict | list = b"", **headers: str):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, code: str, message: str):
        self.answer(404, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    def route(self):
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = [unquote(part) for part in urlsplit(self.path).path.split("/")[1:]]
        match (self.command, path):
            case ("POST", ["api", "repos", "create"]):
                self.create(json.loads(sent))
            case ("POST", [*_, "info", "lfs", "objects", "batch"]):
                self.answer(200, self.lfs_batch(json.loads(sent)))
            case ("PUT", ["lfs", oid]):
                assert hashlib.sha256(sent).hexdigest() == oid
                self.hub.objects[oid] = sent
                self.answer(200)
            case ("POST", ["api", "models", user, name, "preupload", _]):
                self.answer(200, self.preupload(json.loads(sent)))
            case ("POST", ["api", "models", user, name, "commit", _]):
                self.receive(f"{user}/{name}", [json.loads(line) for line in sent.splitlines()])
            case ("POST", ["api", "validate-yaml"]):
                self.answer(200, {"errors": [], "warnings": []})
            case ("GET", ["api", "models", user, name, *rest]):
                self.inform(f"{user}/{name}", rest)
            case ("HEAD" | "GET", [user, name, "resolve", revision, *file]):
                self.resolve(f"{user}/{name}", revision, "/".join(file))
            case _:
                self.hub.unknown.append(f"{self.command} {self.path}")
                self.answer(404)

    do_GET = do_HEAD = do_POST = do_PUT = route

    def create(self, wanted: dict):
        name = f"{wanted.get('organization') or USER}/{wanted['name']}"
        status = 409 if name in self.hub.repositories else 200
        if status == 200:
            self.hub.commit(name, "initial commit", {".gitattributes": b""})
        self.answer(status, {"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def lfs_batch(self, wanted: dict) -> dict:
        def action(thing: dict) -> dict:
            known = thing["oid"] in self.hub.objects
            return thing if known else thing | {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{thing['oid']}"}}}

        return {"transfer": "basic", "objects": [action(thing) for thing in wanted["objects"]]}

    def preupload(self, wanted: dict) -> dict:
        def mode(path: str) -> dict:
            kind = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            return {"path": path, "uploadMode": kind, "shouldIgnore": False}

        return {"files": [mode(file["path"]) for file in wanted["files"]]}

    def receive(self, repository: str, lines: list[dict]):
        summary, changes = "", {}
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "header":
                    summary = value["summary"]
                case "file":
                    changes[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    changes[value["path"]] = self.hub.objects[value["oid"]]
                case "deletedFile":
                    changes[value["path"]] = None
        commit = self.hub.commit(repository, summary, changes)
        self.answer(200, {"commitUrl": f"{self.hub.url}/{repository}/commit/{commit.oid}", "commitOid": commit.oid})

    def find(self, repository: str, revision: str) -> Commit | None:
        """The commit, or None after an answer that there is none."""
        if repository not in self.hub.repositories:
            return self.refuse("RepoNotFound", "Repository not found")
        commits = self.hub.repositories[repository]
        found = [commit for commit in commits if commit.oid == revision] or commits[-1:] * (revision == "main")
        return found[0] if found else self.refuse("RevisionNotFound", f"Invalid rev id: {revision}")

    def inform(self, repository: str, rest: list[str]):
        revision = rest[1] if len(rest) > 1 else "main"
        commit = self.find(repository, revision)
        if commit is None:
            return
        if rest[:1] == ["tree"]:
            folder = "/".join(rest[2:])
            prefix = f"{folder}/" if folder else ""
            inside = {path: data for path, data in commit.files.items() if path.startswith(prefix)}
            if not inside:
                return self.refuse("EntryNotFound", f"{folder} does not exist")
            entries = [{"type": "file", "path": p, "size": len(d), "oid": git_oid(d)} for p, d in inside.items()]
            return self.answer(200, entries)
        names = [{"rfilename": path} for path in commit.files]
        self.answer(200, {"id": repository, "modelId": repository, "sha": commit.oid, "siblings": names, "tags": []})

    def resolve(self, repository: str, revision: str, file: str):
        commit = self.find(repository, revision)
        if commit is None:
            return
        if file not in commit.files:
            return self.answer(
                404, b"", X_Error_Code="EntryNotFound", X_Error_Message="Entry not found", X_Repo_Commit=commit.oid
            )
        data = commit.files[file]
        lfs = file.endswith(LFS_SUFFIXES)
        etag = hashlib.sha256(data).hexdigest() if lfs else git_oid(data)
        linked = {"X_Linked_Etag": f'"{etag}"', "X_Linked_Size": str(len(data))} if lfs else {}
        self.answer(200, data, ETag=f'"{etag}"', X_Repo_Commit=commit.oid, **linked)


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def serving():
    """A Hub that answers until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
