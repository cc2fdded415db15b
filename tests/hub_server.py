"""A local server that speaks the Hub's protocol for model and dataset repositories, as far as pushing and loading go."""

import base64
import contextlib
import fnmatch
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

TOKEN, READS = "hf_writes", "hf_reads"  # any other token is none
LARGE = (".parquet", ".safetensors", ".bin", ".pt")  # kept in the large file store


@contextlib.contextmanager
def running_hub():
    with HubServer() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield hub
        hub.shutdown()


@contextlib.contextmanager
def asked_by_this_process(monkeypatch):
    """Yield a running server that the Hub client of this process asks, whatever it was told of proxies or being offline."""
    # not above: the client reads HF_ENDPOINT when it is imported, and others set that to the address of a running server
    from huggingface_hub import constants

    from training import hub_push

    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setattr(hub_push, "PAUSES", (0.01, 0.01))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with running_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        files = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        yield hub


class HubServer(ThreadingHTTPServer):
    """`repos[id].commits` is a list of (sha, path -> bytes) of main, `.branches` and `.tags` hold the others by name. `faults` is
    a list of (method, pattern of the path, what) to be used up, the first that fits; what: a status, "drop" for no answer,
    "half" of one, or a function of the hub that returns one of these or None. `bodies` is all that clients have sent, `ranges`
    what parts of files they have asked for."""

    daemon_threads = True
    request_queue_size = 64  # the client sends several files at once

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repos, self.uploaded, self.faults, self.requests, self.bodies, self.ranges = {}, {}, [], [], [], []
        self.lock = threading.Lock()

    def add_repo(self, repo_id, private=False):
        main = []
        self.repos[repo_id] = SimpleNamespace(private=private, commits=main, branches={"main": main}, tags={})
        self.commit(repo_id, {".gitattributes": b"*.parquet filter=lfs diff=lfs merge=lfs -text\n"})

    def commit(self, repo_id, files, branch="main"):
        commits = self.repos[repo_id].branches[branch]
        commits.append((_sha1(f"{repo_id} {branch} {len(commits)}".encode()), files))

    def files(self, repo_id, branch="main"):
        files = self.repos[repo_id].branches[branch][-1][1]
        return {path: content for path, content in files.items() if path != ".gitattributes"}

    def asked(self, method, pattern):
        return [path for each, path in self.requests if each == method and re.search(pattern, path)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    is_cut = False  # half of the answer is sent, then the connection breaks
    disable_nagle_algorithm = True  # or each answer waits 40 ms for its second half

    def log_message(self, *_):
        pass

    def _handle(self):
        hub, path = self.server, unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with hub.lock:
            hub.requests.append((self.command, path))
            hub.bodies.append(body)
            fault = next((each for each in hub.faults if each[0] == self.command and re.search(each[1], path)), None)
            if fault:
                hub.faults.remove(fault)
            status = fault[2](hub) if fault and callable(fault[2]) else fault and fault[2]
            if status == "drop":
                self.close_connection = True
                return None
            self.is_cut = status == "half"
            if status and not self.is_cut:
                return self._answer(status, b"<html>trouble</html>", {"X-Error-Message": "not for you"})
            for method, pattern, answer in ROUTES:
                if method == self.command and (match := re.fullmatch(pattern, path)):
                    return answer(self, body, *match.groups())
            return self._error(404, "EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _answer(self, status, content, headers=None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if self.is_cut else content)
        self.close_connection = self.close_connection or self.is_cut

    def _json(self, value, status=200):
        self._answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status, code):
        self._answer(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def _token(self):
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def _may_write(self):
        if self._token() == TOKEN:
            return True
        self._error(403, "Forbidden")
        return False

    def _repo(self, repo_id):
        """Return a repository, None after an answer that says there is none: the Hub tells nobody else of a private one."""
        repo = self.server.repos.get(repo_id)
        if self._token() not in ("", TOKEN, READS):
            return self._answer(401, b"", {"X-Error-Message": "Invalid credentials in Authorization header"})
        if repo is None or (repo.private and not self._token()):
            return self._error(404 if self._token() else 401, "RepoNotFound")
        return repo

    def _state(self, repo_id, revision):
        """Return (sha, files) of a revision, None after an answer that says there is none."""
        if repo := self._repo(repo_id):
            states = {commit[0]: commit for commits in repo.branches.values() for commit in commits} | repo.tags
            states |= {branch: commits[-1] for branch, commits in repo.branches.items()}
            if revision not in states:
                self._error(404, "RevisionNotFound")
            return states.get(revision)

    # What pushing needs

    def create(self, body):
        asked = json.loads(body)
        repo_id = f"{asked['organization']}/{asked['name']}"
        if not self._may_write():
            return
        is_new = repo_id not in self.server.repos
        if is_new:
            self.server.add_repo(repo_id, asked.get("visibility") == "private" or bool(asked.get("private")))
        self._json({"url": f"{self.server.url}/{_folder(asked.get('type'))}{repo_id}"}, 200 if is_new else 409)

    def branch(self, body, kind, repo_id, branch):
        if self._may_write():
            branches = self.server.repos[repo_id].branches
            is_new = branch not in branches
            branches.setdefault(branch, list(branches["main"]))
            self._json({}, 200 if is_new else 409)

    def tag(self, body, kind, repo_id, revision):
        if (state := self._state(repo_id, revision)) and self._may_write():
            tags, name = self.server.repos[repo_id].tags, json.loads(body)["tag"]
            is_new = name not in tags
            tags.setdefault(name, state)
            self._json({}, 200 if is_new else 409)

    def refs(self, body, kind, repo_id):
        if repo := self._repo(repo_id):
            branches = {name: commits[-1] for name, commits in repo.branches.items()}
            refs = {"branches": ("heads", branches), "tags": ("tags", repo.tags)}
            self._json({
                key: [{"name": name, "ref": f"refs/{below}/{name}", "targetCommit": state[0]} for name, state in states.items()]
                for key, (below, states) in refs.items()
            } | {"converts": []})  # fmt: skip

    def validate(self, body):
        self._json({"errors": [], "warnings": []})

    def preupload(self, body, kind, repo_id, revision):
        if not (state := self._state(repo_id, revision)):
            return
        files, asked, answers = state[1], json.loads(body), []
        ignored = asked.get("gitIgnore") or files.get(".gitignore", b"").decode()
        for path in (each["path"] for each in asked["files"]):
            mode = "lfs" if path.endswith(LARGE) else "regular"
            old = _oid(files[path], mode) if path in files else None
            is_ignored = any(fnmatch.fnmatch(path.rpartition("/")[2], line) for line in ignored.splitlines())
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": is_ignored, "oid": old})
        self._json({"files": answers})

    def batch(self, body, kind, repo_id):
        if not self._may_write():
            return
        objects = []
        for each in json.loads(body)["objects"]:
            href = {"upload": {"href": f"{self.server.url}/lfs/{each['oid']}"}}
            objects.append(each if each["oid"] in self.server.uploaded else each | {"actions": href})
        self._json({"transfer": "basic", "objects": objects})

    def put(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            return self._error(400, "BadRequest")
        self.server.uploaded[oid] = body
        self._answer(200, b"")

    def commit(self, body, kind, repo_id, revision):
        sha, files = self._state(repo_id, revision)
        header, *operations = (json.loads(line) for line in body.splitlines())
        if not self._may_write():
            return
        if header["value"].get("parentCommit") not in (None, sha):
            return self._error(412, "PreconditionFailed")
        files = dict(files)
        for key, value in ((each["key"], each["value"]) for each in operations):
            if key == "deletedFile":
                del files[value["path"]]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                files[value["path"]] = self.server.uploaded[value["oid"]]
        self.server.commit(repo_id, files, revision)
        sha = self.server.repos[repo_id].branches[revision][-1][0]
        self._json({"commitUrl": f"{self.server.url}/{_folder(kind)}{repo_id}/commit/{sha}", "commitOid": sha})

    # What loading needs

    def info(self, body, kind, repo_id, revision=None):
        if state := self._state(repo_id, revision or "main"):
            siblings = [{"rfilename": path} for path in state[1]]
            private = self.server.repos[repo_id].private
            self._json({"id": repo_id, "sha": state[0], "private": private, "tags": [], "siblings": siblings})

    def tree(self, body, kind, repo_id, revision, below):
        if state := self._state(repo_id, revision):
            entries = {}
            for path, content in state[1].items():
                if path.startswith(f"{below}/" if below else ""):
                    for parent in (path.rsplit("/", depth)[0] for depth in range(1, path.count("/") + 1)):
                        entries[parent] = {"type": "directory", "path": parent, "oid": _sha1(parent.encode())}
                    entries[path] = _entry(path, content)
            depth = below.count("/") + 1 if below else 0
            is_recursive = "recursive=true" in self.path.lower()
            entries = {path: each for path, each in entries.items() if len(path) > len(below)}
            self._json([each for path, each in entries.items() if is_recursive or path.count("/") == depth])

    def paths_info(self, body, kind, repo_id, revision):
        if state := self._state(repo_id, revision):
            paths = _asked_paths(body, self.headers.get("Content-Type", ""))
            self._json([_entry(path, state[1][path]) for path in paths if path in state[1]])

    def resolve(self, body, kind, repo_id, revision, path):
        if not (state := self._state(repo_id, revision)):
            return None
        if path not in state[1]:
            return self._error(404, "EntryNotFound")
        content, headers = state[1][path], {"ETag": f'"{_sha1(state[1][path])}"', "X-Repo-Commit": state[0]}
        headers |= {"Accept-Ranges": "bytes"}
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
            self.server.ranges.append(self.headers["Range"])
            headers |= {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
            return self._answer(206, content[first : last + 1], headers)
        return self._answer(200, content, headers)


_API = r"/api/(models|datasets)/([\w.-]+/[\w.-]+)"
_FILES = r"(/datasets)?/([\w.-]+/[\w.-]+)"
ROUTES = [
    ("POST", r"/api/repos/create", Handler.create),
    ("POST", rf"{_API}/branch/([^/]+)", Handler.branch),
    ("POST", rf"{_API}/tag/([^/]+)", Handler.tag),
    ("POST", r"/api/validate-yaml", Handler.validate),
    ("POST", rf"{_API}/preupload/([^/]+)", Handler.preupload),
    ("POST", rf"{_FILES}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", r"/lfs/(\w+)", Handler.put),
    ("POST", rf"{_API}/commit/([^/]+)", Handler.commit),
    ("GET", _API, Handler.info),
    ("GET", rf"{_API}/refs", Handler.refs),
    ("GET", rf"{_API}/revision/([^/]+)", Handler.info),
    ("GET", rf"{_API}/tree/([^/]+)/?(.*)", Handler.tree),
    ("POST", rf"{_API}/paths-info/([^/]+)", Handler.paths_info),
    ("GET", rf"{_FILES}/resolve/([^/]+)/(.+)", Handler.resolve),
    ("HEAD", rf"{_FILES}/resolve/([^/]+)/(.+)", Handler.resolve),
]


def _folder(kind):
    return "datasets/" if kind in ("dataset", "datasets") else ""


def _sha1(content):
    return hashlib.sha1(content).hexdigest()


def _oid(content, mode):
    """Return what the Hub calls the content: git's own hash, or SHA-256 where it lies in the large file store."""
    if mode == "lfs":
        return hashlib.sha256(content).hexdigest()
    return _sha1(f"blob {len(content)}\0".encode() + content)


def _entry(path, content):
    entry = {"type": "file", "path": path, "size": len(content), "oid": _oid(content, "regular")}
    if path.endswith(LARGE):
        entry["lfs"] = {"oid": _oid(content, "lfs"), "size": len(content), "pointerSize": 130}
    return entry


def _asked_paths(body, content_type):
    if "json" in content_type:
        return json.loads(body)["paths"]
    return [
        unquote(each.split("=", 1)[1].replace("+", " ")) for each in body.decode().split("&") if each[:6] == "paths="
    ]
