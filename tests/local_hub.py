"""
A small hub on localhost, for the real huggingface_hub and datasets clients to talk to through HF_ENDPOINT.

Speaks the part of the protocol that those clients use for datasets and models: who am I, create, info, refs, tree (in pages), paths-info,
preupload, LFS batch and upload, commit, tag, resolve with redirects and ranges. Blobs and commits are kept in memory; a commit is a dict
of paths. `faults` makes it misbehave: a list of Fault, each of which hits the next `times` requests that match.

    python tests/local_hub.py       serves until interrupted, and prints what to set

What it does not speak is Xet, so the clients need HF_HUB_DISABLE_XET=1 (see env()).
"""

import base64
import hashlib
import json
import os
import re
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_localtoken"
PAGE = 7  # entries of a tree per page: small, so that paging is exercised


@dataclass
class Fault:
    method: str
    pattern: str  # searched for in the path
    kind: object  # an HTTP status, or "cut": the connection ends in the middle of the body
    times: int = 1


@dataclass
class Repo:
    private: bool
    commits: dict = field(default_factory=dict)  # id -> {path: sha256 of the blob}
    branches: dict = field(default_factory=dict)
    tags: dict = field(default_factory=dict)

    def add(self, files, branch="main"):
        parent = self.branches.get(branch, "")
        digest = hashlib.sha1(f"{parent}{sorted(files.items())}{len(self.commits)}".encode()).hexdigest()
        self.commits[digest] = files
        self.branches[branch] = digest
        return digest

    def find(self, revision):
        return (
            self.branches.get(revision)
            or self.tags.get(revision)
            or (revision if revision in self.commits else None)
        )


class LocalHub:
    def __init__(self):
        self.repos, self.blobs, self.lfs, self.faults, self.log = {}, {}, set(), [], []
        self.lock = threading.Lock()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def handle_any(self):
                hub.handle(self)

            do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.store = self.url.replace(
            "127.0.0.1", "localhost"
        )  # another host than the hub's, as for the real one
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def env(self, home, token=TOKEN):
        """Environment for a process that is to talk to this hub and to nothing else, with its caches under `home`."""
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

    def put(self, repo, files, private=False):
        """Commit {path: bytes} to a dataset, without a client. -> commit id"""
        entry = self.repos.setdefault(repo, Repo(private))
        before = entry.commits.get(entry.branches.get("main"), {})
        return entry.add(
            {**before, **{path: self.blob(content, len(content) > 1000) for path, content in files.items()}}
        )

    def files(self, repo, revision="main"):
        entry = self.repos[repo]
        return {path: self.blobs[digest] for path, digest in entry.commits[entry.find(revision)].items()}

    # the protocol

    def handle(self, http):
        url = urlsplit(http.path)
        path, query = unquote(url.path), parse_qs(url.query, keep_blank_values=True)
        chunked = "chunked" in http.headers.get("Transfer-Encoding", "")
        body = (
            self.read_chunks(http.rfile)
            if chunked
            else http.rfile.read(int(http.headers.get("Content-Length") or 0))
        )
        with self.lock:
            self.log.append((http.command, path))
            fault = next(
                (
                    f
                    for f in self.faults
                    if f.times and f.method == http.command and re.search(f.pattern, path)
                ),
                None,
            )
            if fault:
                fault.times -= 1
        if fault and fault.kind != "cut":
            return self.answer(
                http,
                fault.kind,
                {"error": "as the test asked"},
                {"Retry-After": "0"} if fault.kind == 429 else {},
            )
        self.cut = bool(fault)
        try:
            self.route(http, path, query, body)
        except KeyError as e:
            self.answer(http, 404, {"error": f"no {e}"}, {"X-Error-Code": "EntryNotFound"})

    @staticmethod
    def read_chunks(f):
        parts = []
        while size := int(f.readline().split(b";")[0], 16):
            parts.append(f.read(size))
            f.readline()
        f.readline()
        return b"".join(parts)

    def answer(self, http, status, content=b"", headers=None, length=None):
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        http.send_response(status)
        for k, v in {"Content-Type": "application/json", **(headers or {})}.items():
            http.send_header(k, v)
        http.send_header("Content-Length", str(len(raw) if length is None else length))
        http.end_headers()
        if http.command == "HEAD":
            return
        if getattr(self, "cut", False) and status in (200, 206) and len(raw) > 1:
            self.cut = False
            http.wfile.write(raw[: len(raw) // 2])
            http.wfile.flush()
            http.close_connection = True
            http.connection.close()
            return
        http.wfile.write(raw)

    def authorised(self, http):
        return http.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repo(self, http, name, write=False):
        """The repository, or None after an answer was given, as the hub gives it to those who may not see it."""
        entry = self.repos.get(name)
        if write and not self.authorised(http):
            return self.answer(http, 401, {"error": "Invalid username or password."})
        if entry is None or entry.private and not self.authorised(http):
            status = 404 if self.authorised(http) else 401
            return self.answer(
                http, status, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
            )
        return entry

    def commit_of(self, http, entry, revision):
        commit = entry.find(revision)
        if commit is None:
            self.answer(
                http, 404, {"error": f"Invalid rev id: {revision}"}, {"X-Error-Code": "RevisionNotFound"}
            )
        return commit

    def entry_of(self, path, digest):
        content = self.blobs[digest]
        git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        found = {"type": "file", "path": path, "size": len(content), "oid": git}
        if digest in self.lfs:
            found["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
        return found

    def route(self, http, path, query, body):
        method = http.command
        if path == "/api/whoami-v2":
            ok = self.authorised(http)
            return self.answer(
                http,
                200 if ok else 401,
                {"type": "user", "name": "ada", "orgs": []} if ok else {"error": "Unauthorized"},
            )
        if path == "/api/validate-yaml":  # of dataset cards
            return self.answer(http, 200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'ada'}/{asked['name']}"
            if not self.authorised(http):
                return self.answer(http, 401, {"error": "Invalid username or password."})
            if name in self.repos:
                return self.answer(
                    http,
                    409,
                    {"error": "You already created this dataset repo", "url": f"{self.url}/datasets/{name}"},
                )
            self.repos[name] = Repo(asked.get("private", False) or asked.get("visibility") == "private")
            self.repos[name].add({".gitattributes": self.blob(b"*.bin filter=lfs\n")})
            return self.answer(http, 200, {"url": f"{self.url}/datasets/{name}", "name": name})
        if found := re.fullmatch(r"(?:/datasets)?/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            if self.repo(http, found[1], write=True) is None:
                return None
            objects = []
            for thing in json.loads(body)["objects"]:
                entry = {"oid": thing["oid"], "size": thing["size"]}
                if thing["oid"] not in self.blobs:
                    entry["actions"] = {"upload": {"href": f"{self.url}/lfs/{thing['oid']}"}}
                objects.append(entry)
            return self.answer(http, 200, {"transfer": "basic", "objects": objects})
        if found := re.fullmatch(r"/lfs/([0-9a-f]{64})", path):
            if method == "PUT":
                if hashlib.sha256(body).hexdigest() != found[1]:
                    return self.answer(http, 400, {"error": "not what was announced"})
                self.blob(body, lfs=True)
                return self.answer(http, 200)
            return self.content(http, found[1], {"ETag": f'"{found[1]}"'})
        if found := re.fullmatch(r"(?:/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.resolve(http, *found.groups())
        if found := re.fullmatch(
            r"/api/(?:datasets|models)/([^/]+/[^/]+)(?:/(\w[\w-]*)(?:/([^/]+)(?:/(.+))?)?)?", path
        ):
            return self.api(http, *found.groups(), query, body)
        return self.answer(http, 404, {"error": f"this hub does not know {method} {path}"})

    def api(self, http, name, what, revision, rest, query, body):
        write = what in ("preupload", "commit", "tag")
        entry = self.repo(http, name, write)
        if entry is None:
            return None
        if what == "refs":

            def refs(kind, all_of):
                return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": c} for n, c in all_of.items()]

            return self.answer(
                http,
                200,
                {"branches": refs("heads", entry.branches), "tags": refs("tags", entry.tags), "converts": []},
            )
        if what == "tag" and http.command == "POST":
            commit = self.commit_of(http, entry, revision)
            tag = json.loads(body)["tag"]
            if commit and tag in entry.tags:
                return self.answer(http, 409, {"error": "Tag already exists"})
            if commit:
                entry.tags[tag] = commit
                self.answer(http, 200)
            return None
        commit = self.commit_of(http, entry, revision or "main")
        if commit is None:
            return None
        files = entry.commits[commit]
        if what in (None, "revision"):
            siblings = [{"rfilename": path} for path in sorted(files)]
            date = "2026-01-01T00:00:00.000Z"
            return self.answer(
                http,
                200,
                {
                    "_id": name,
                    "id": name,
                    "sha": commit,
                    "private": entry.private,
                    "gated": False,
                    "disabled": False,
                    "downloads": 0,
                    "likes": 0,
                    "tags": [],
                    "author": name.split("/")[0],
                    "siblings": siblings,
                    "lastModified": date,
                    "createdAt": date,
                },
            )
        if what == "tree":
            return self.tree(http, name, files, revision, rest, query)
        if what == "paths-info":
            form = json.loads(body) if body[:1] == b"{" else parse_qs(body.decode())
            paths = form["paths"] if isinstance(form["paths"], list) else [form["paths"]]
            out = [self.entry_of(p, files[p]) for p in paths if p in files]
            folders = [p for p in paths if any(f.startswith(p.rstrip("/") + "/") for f in files)]
            return self.answer(
                http,
                200,
                out + [{"type": "directory", "path": p, "oid": "0" * 40, "size": 0} for p in folders],
            )
        if what == "preupload":

            def mode(file):
                large = (
                    file["path"].endswith((".bin", ".pt"))
                    or file["size"] > 1000
                    and file["path"].endswith(".idx")
                )
                return "lfs" if large else "regular"

            out = [
                {"path": f["path"], "uploadMode": mode(f), "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            return self.answer(http, 200, {"files": out})
        if what == "commit":
            files = dict(files)
            for line in body.splitlines():
                item = json.loads(line)
                value = item["value"]
                if item["key"] == "file":
                    files[value["path"]] = self.blob(base64.b64decode(value["content"]))
                elif item["key"] == "lfsFile":
                    if value["oid"] not in self.blobs:
                        return self.answer(
                            http, 400, {"error": f"LFS object {value['oid']} was not uploaded"}
                        )
                    files[value["path"]] = value["oid"]
                elif item["key"] == "deletedFile":
                    del files[value["path"]]
            commit = entry.add(files, revision)
            return self.answer(
                http,
                200,
                {"success": True, "commitOid": commit, "commitUrl": f"{self.url}/{name}/commit/{commit}"},
            )
        return self.answer(http, 404, {"error": f"no API {what}"})

    def tree(self, http, name, files, revision, folder, query):
        below = f"{folder.rstrip('/')}/" if folder else ""
        if folder and not any(f.startswith(below) for f in files):
            return self.answer(http, 404, {"error": "no such folder"}, {"X-Error-Code": "EntryNotFound"})
        recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries, folders = [], set()
        for path in sorted(f for f in files if f.startswith(below)):
            parts = path[len(below) :].split("/")
            folders |= {
                below + "/".join(parts[:i]) for i in range(1, len(parts) if recursive else min(len(parts), 2))
            }
            if recursive or len(parts) == 1:
                entries.append(self.entry_of(path, files[path]))
        entries += [{"type": "directory", "path": f, "oid": "0" * 40, "size": 0} for f in sorted(folders)]
        start = int(query.get("cursor", ["0"])[0])
        headers = {}
        if start + PAGE < len(entries):
            headers["Link"] = (
                f'<{self.url}{urlsplit(http.path).path}?recursive={recursive}&cursor={start + PAGE}>; rel="next"'
            )
        return self.answer(http, 200, entries[start : start + PAGE], headers)

    def resolve(self, http, name, revision, path):
        entry = self.repo(http, name)
        if entry is None:
            return None
        commit = self.commit_of(http, entry, revision)
        if commit is None:
            return None
        if path not in entry.commits[commit]:
            return self.answer(
                http,
                404,
                {"error": "Entry not found"},
                {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit},
            )
        digest = entry.commits[commit][path]
        content = self.blobs[digest]
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if digest in self.lfs:  # as the hub: on to the store, which knows no repositories
            headers |= {
                "X-Linked-Etag": f'"{digest}"',
                "X-Linked-Size": str(len(content)),
                "ETag": f'"{digest}"',
            }
            return self.answer(http, 302, b"", {**headers, "Location": f"{self.store}/lfs/{digest}"})
        return self.content(http, digest, {**headers, "ETag": f'"{self.entry_of(path, digest)["oid"]}"'})

    def content(self, http, digest, headers):
        content = self.blobs[digest]
        headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", http.headers.get("Range", ""))
        if not wanted:
            return self.answer(http, 200, content, headers)
        start = int(wanted[1])
        if start >= len(content):
            return self.answer(http, 416, b"", {"Content-Range": f"bytes */{len(content)}"})
        end = min(int(wanted[2] or len(content)), len(content) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        return self.answer(http, 206, content[start : end + 1], headers)


if __name__ == "__main__":
    hub = LocalHub()
    print(f"export HF_ENDPOINT={hub.url} HF_TOKEN={TOKEN} HF_HUB_DISABLE_XET=1", flush=True)
    try:
        hub.thread.join()
    except KeyboardInterrupt:
        sys.exit()
