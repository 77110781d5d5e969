"""
A small hub on localhost for the real huggingface_hub and datasets clients, which find it through HF_ENDPOINT.

It knows datasets and models: create, info, refs, tree, preupload, LFS batch and upload, commit, tag, resolve
with redirects and ranges, which is what those clients ask for today. Blobs and commits are in memory; a
commit is a dict of paths. `faults` is a list of Fault, each of which hits the next `times` requests that
match. It does not know Xet, so the clients need HF_HUB_DISABLE_XET=1 (see env()).
"""

import base64
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_localtoken"
PAGE = 7  # entries of a tree per page: small, so that there are several
REPO = r"(?:/datasets|/models)?/([^/]+/[^/]+?)"


@dataclass
class Fault:
    method: str
    pattern: str  # searched for in the path
    kind: object  # an HTTP status, or "cut": the connection ends in the middle of the body
    times: int = 1

    def hits(self, method, path):
        return self.method == method and re.search(self.pattern, path)


@dataclass
class Repo:
    private: bool
    commits: dict = field(default_factory=dict)  # id -> {path: sha256 of the blob}
    branches: dict = field(default_factory=dict)
    tags: dict = field(default_factory=dict)

    def add(self, files):
        content = f"{sorted(files.items())}{len(self.commits)}"
        commit = self.branches["main"] = hashlib.sha1(content.encode()).hexdigest()
        self.commits[commit] = files
        return commit

    def find(self, revision):
        known = {**{commit: commit for commit in self.commits}, **self.tags, **self.branches}
        if revision not in known:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return known[revision]


class Refusal(Exception):
    """An answer that is no success: status, text, X-Error-Code."""


class LocalHub:
    def __init__(self):
        self.repos, self.blobs, self.lfs, self.faults, self.log = {}, {}, set(), [], []
        self.lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = lambda http: self.handle(http)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.store = self.url.replace("127.0.0.1", "localhost")  # another host than the hub's, as in truth
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def env(self, home, token=TOKEN):
        """Environment for a process that is to talk to this hub alone, with its caches under `home`."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        extra = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_ETAG_TIMEOUT": "5",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }
        return {**clean, **extra, **({"HF_TOKEN": token} if token else {})}

    # what is in it

    def blob(self, content, lfs=False):
        digest = hashlib.sha256(content).hexdigest()
        self.blobs[digest] = content
        if lfs:
            self.lfs.add(digest)
        return digest

    def put(self, repo, files):
        """Commit {path: bytes} without a client. -> commit id"""
        entry = self.repos.setdefault(repo, Repo(private=False))
        before = entry.commits.get(entry.branches.get("main"), {})
        return entry.add({**before, **{path: self.blob(b, len(b) > 1000) for path, b in files.items()}})

    def files(self, repo, revision="main"):
        entry = self.repos[repo]
        return {path: self.blobs[digest] for path, digest in entry.commits[entry.find(revision)].items()}

    # the protocol

    def handle(self, http):
        url = urlsplit(http.path)
        path, query = unquote(url.path), parse_qs(url.query, keep_blank_values=True)
        body = http.rfile.read(int(http.headers.get("Content-Length") or 0))
        with self.lock:
            self.log.append((http.command, path))
            hits = [f for f in self.faults if f.times and f.hits(http.command, path)]
            if hits:
                hits[0].times -= 1
        try:
            if hits and hits[0].kind != "cut":
                raise Refusal(hits[0].kind, "as the test asked", "")
            status, content, headers = self.route(http, path, query, body)
        except Refusal as e:
            status, text, code = e.args
            content, headers = {"error": text}, {"X-Error-Code": code} if code else {"Retry-After": "0"}
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        http.send_response(status)
        headers = {"Content-Length": str(len(raw)), "Content-Type": "application/json", **headers}
        for name, value in headers.items():
            http.send_header(name, value)
        http.end_headers()
        if http.command == "HEAD":
            return
        if hits and hits[0].kind == "cut":
            http.wfile.write(raw[: len(raw) // 2])
            http.close_connection = True
        else:
            http.wfile.write(raw)

    def repo(self, http, name):
        """The repository, for those who may see it."""
        entry, known = self.repos.get(name), http.headers.get("Authorization") == f"Bearer {TOKEN}"
        if entry is None or entry.private and not known:
            raise Refusal(404 if known else 401, "Repository not found", "RepoNotFound")
        return entry

    def route(self, http, path, query, body):
        """-> status, content, headers"""
        known = http.headers.get("Authorization") == f"Bearer {TOKEN}"
        if path == "/api/validate-yaml":  # of cards
            return 200, {"errors": [], "warnings": []}, {}
        if path == "/api/repos/create":
            if not known:
                raise Refusal(401, "Invalid username or password.", "")
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'ada'}/{asked['name']}"
            if name in self.repos:
                return 409, {"error": "You already created this repo", "url": f"{self.url}/{name}"}, {}
            self.repos[name] = Repo(asked.get("private", False) or asked.get("visibility") == "private")
            self.repos[name].add({".gitattributes": self.blob(b"*.bin filter=lfs\n")})
            return 200, {"url": f"{self.url}/datasets/{name}", "name": name}, {}
        if found := re.fullmatch(rf"{REPO}\.git/info/lfs/objects/batch", path):
            self.repo(http, found[1])
            objects = [{"oid": o["oid"], "size": o["size"]} for o in json.loads(body)["objects"]]
            for o in objects:
                if o["oid"] not in self.blobs:
                    o["actions"] = {"upload": {"href": f"{self.url}/lfs/{o['oid']}"}}
            return 200, {"transfer": "basic", "objects": objects}, {}
        if found := re.fullmatch(r"/lfs/([0-9a-f]{64})", path):
            if http.command != "PUT":
                return self.content(http, found[1], {"ETag": f'"{found[1]}"'})
            assert self.blob(body, lfs=True) == found[1]
            return 200, {}, {}
        if found := re.fullmatch(rf"{REPO}/resolve/([^/]+)/(.+)", path):
            return self.resolve(http, *found.groups())
        if found := re.fullmatch(rf"/api{REPO}(?:/(\w[\w-]*)(?:/([^/]+)(?:/(.+))?)?)?", path):
            return self.api(http, *found.groups(), query, body)
        raise Refusal(404, f"this hub does not know {path}", "")

    def api(self, http, name, what, revision, rest, query, body):
        entry = self.repo(http, name)
        if what == "refs":
            kinds = {"branches": ("heads", entry.branches), "tags": ("tags", entry.tags)}
            refs = {
                kind: [{"name": n, "ref": f"refs/{folder}/{n}", "targetCommit": c} for n, c in of.items()]
                for kind, (folder, of) in kinds.items()
            }
            return 200, {**refs, "converts": []}, {}
        commit = entry.find(revision or "main")
        files = entry.commits[commit]
        if what == "tag":
            entry.tags[json.loads(body)["tag"]] = commit
            return 200, {}, {}
        if what in (None, "revision"):
            siblings = [{"rfilename": path} for path in sorted(files)]
            about = {"private": entry.private, "gated": False, "disabled": False, "tags": []}
            return 200, {"_id": name, "id": name, "sha": commit, "siblings": siblings, **about}, {}
        if what == "tree":
            return self.tree(http, files, rest, query)
        if what == "preupload":
            out = []
            for path in [file["path"] for file in json.loads(body)["files"]]:
                mode = "lfs" if path.endswith((".bin", ".idx", ".pt", ".safetensors")) else "regular"
                out.append({"path": path, "uploadMode": mode, "shouldIgnore": False})
            return 200, {"files": out}, {}
        if what == "commit":
            files = dict(files)
            for item in map(json.loads, body.splitlines()):
                value = item["value"]
                if item["key"] == "file":
                    files[value["path"]] = self.blob(base64.b64decode(value["content"]))
                elif item["key"] == "lfsFile":
                    files[value["path"]] = value["oid"]
                elif item["key"] == "deletedFile":
                    del files[value["path"]]
            commit = entry.add(files)
            url = f"{self.url}/{name}/commit/{commit}"
            return 200, {"success": True, "commitOid": commit, "commitUrl": url}, {}
        raise Refusal(404, f"no API {what}", "")

    def entry_of(self, path, digest):
        content = self.blobs[digest]
        git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        found = {"type": "file", "path": path, "size": len(content), "oid": git}
        if digest in self.lfs:
            found["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
        return found

    def tree(self, http, files, folder, query):
        below = f"{folder.rstrip('/')}/" if folder else ""
        if not any(path.startswith(below) for path in files):
            raise Refusal(404, "no such folder", "EntryNotFound")
        recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries, folders = [], set()
        for path in sorted(path for path in files if path.startswith(below)):
            parts = path[len(below) :].split("/")
            depth = len(parts) if recursive else min(len(parts), 2)
            folders |= {below + "/".join(parts[:i]) for i in range(1, depth)}
            if recursive or len(parts) == 1:
                entries.append(self.entry_of(path, files[path]))
        entries += [{"type": "directory", "path": p, "oid": "0" * 40, "size": 0} for p in sorted(folders)]
        start = int(query.get("cursor", ["0"])[0])
        headers = {}
        if start + PAGE < len(entries):
            following = f"{self.url}{urlsplit(http.path).path}?recursive={recursive}&cursor={start + PAGE}"
            headers["Link"] = f'<{following}>; rel="next"'
        return 200, entries[start : start + PAGE], headers

    def resolve(self, http, name, revision, path):
        entry = self.repo(http, name)
        commit = entry.find(revision)
        if path not in entry.commits[commit]:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        digest = entry.commits[commit][path]
        about = self.entry_of(path, digest)
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes", "ETag": f'"{about["oid"]}"'}
        if digest not in self.lfs:
            return self.content(http, digest, headers)
        # as the hub: on to the store, which knows no repositories
        headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(about["size"])}
        return 302, b"", {**headers, "ETag": f'"{digest}"', "Location": f"{self.store}/lfs/{digest}"}

    def content(self, http, digest, headers):
        content = self.blobs[digest]
        headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", http.headers.get("Range", ""))
        if not wanted:
            return 200, content, headers
        start, end = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        return 206, content[start : end + 1], headers
