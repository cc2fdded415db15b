"""A local file server that drops, cuts, corrupts, refuses and waits as a test asks it to."""

import contextlib
import hashlib
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote


@contextlib.contextmanager
def running_server(monkeypatch):
    """Yield a `Server` that answers on this machine, asked without a proxy."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield server
        server.shutdown()


class Server(ThreadingHTTPServer):
    """Serves `files`; `faults[path]` is a list of what to do with the next GET requests for it, one after the other."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.requests = {}, {}, []
        self.bytes_per_second, self.serves_ranges = None, True
        self.at_once, self.most_at_once, self.counting = 0, 0, threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/"

    def handle_error(self, request, client_address):
        """Clients that go away are part of these tests."""

    @property
    def sums(self):
        return {path: hashlib.sha256(content).hexdigest() for path, content in self.files.items()}

    def gets(self, path):
        return [range_ for method, asked, range_ in self.requests if (method, asked) == ("GET", path)]


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_HEAD(self):
        path = unquote(self.path[1:])
        self.server.requests.append(("HEAD", path, None))
        known = path in self.server.files
        self.send_response(200 if known else 404)
        self.send_header("Content-Length", str(len(self.server.files.get(path, b""))))
        self.end_headers()

    def do_GET(self):
        with self.server.counting:
            self.server.at_once += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.at_once)
        try:
            self._get(unquote(self.path[1:]))
        finally:
            with self.server.counting:
                self.server.at_once -= 1

    def _get(self, path):
        self.server.requests.append(("GET", path, self.headers.get("Range")))
        fault = self.server.faults[path].pop(0) if self.server.faults.get(path) else {}
        if "status" in fault or path not in self.server.files:
            self.send_response(fault.get("status", 404))
            for name, value in fault.get("headers", {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body, start = fault.get("body", self.server.files[path]), 0
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and self.server.serves_ranges:
            start = int(asked[1]) + fault.get("shift", 0)
            if start >= len(body):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        if fault.get("length", True):
            self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self._send(body[start : fault.get("drop_at", len(body))], hang=fault.get("hang", 0))

    def _send(self, body, hang):
        step = 1 << 14
        for begin in range(0, len(body), step):
            self.wfile.write(body[begin : begin + step])
            if self.server.bytes_per_second:
                time.sleep(step / self.server.bytes_per_second)
        self.wfile.flush()
        time.sleep(hang)
        self.close_connection = True
