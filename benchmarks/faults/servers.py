"""A real ``mlflow server``, and a relay before it that does what bad networks and bad servers do. Both on loopback alone."""

from __future__ import annotations

import atexit
import contextlib
import http.client
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

__all__ = ["Relay", "Server"]

HOPS = {"connection", "keep-alive", "transfer-encoding", "content-length", "host"}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A server with a database and artifacts of its own, which can be killed and started again at the same address.

    Args:
        folder: an empty one, with the database ``mlflow.db``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, _free_port()
        self.database, self.uri = folder / "mlflow.db", f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, seconds: float = 180) -> None:
        """Start the server, and wait until it answers.

        Raises:
            RuntimeError: it does not.
        """
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{self.database}", "--workers", "1"]
        command += ["--artifacts-destination", str(self.folder / "artifacts"), "--host", "127.0.0.1", "--port", str(self.port)]
        variables = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, cwd=self.folder, env=os.environ | variables, stdout=log, stderr=log, start_new_session=True
            )
        atexit.register(self.kill)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
                if answer.status == 200:
                    return
            time.sleep(0.2)
        self.kill()
        raise RuntimeError(f"mlflow server does not start: {(self.folder / 'server.log').read_text()[-1000:]}")

    @property
    def alive(self) -> bool:
        """Whether the server runs."""
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """Kill the server and its workers with SIGKILL."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
            atexit.unregister(self.kill)


class Relay:
    """Passes requests on to a server, unless a fault is to happen to them.

    Args:
        port: of the server.

    Attributes:
        fault: says for each request what is to happen: ``""`` nothing, ``slow`` 3 s more, ``error`` an answer 500, ``reset`` a connection
            that is reset in place of the request, ``lost`` the same in place of the answer.
        hit: requests to which something happened.
    """

    SECONDS = 3.0

    def __init__(self, port: int) -> None:
        self.fault: Callable[[], str] = str
        self.target, self.hit = port, 0
        self.port = _free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._lock = threading.Lock()
        self._server: ThreadingHTTPServer | None = None
        self.open()

    def open(self) -> None:
        """Start listening."""
        relay = self

        class Handler(_Handler):
            owner = relay

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def next_fault(self) -> str:
        """Choose the fault of this request."""
        with self._lock:
            found = self.fault()
            self.hit += bool(found)
        return found


class _Handler(BaseHTTPRequestHandler):
    """One connection's requests."""

    protocol_version = "HTTP/1.1"
    owner: Relay

    def log_message(self, format: str, *arguments: Any) -> None:
        """Suppress the log of requests."""

    def _relay(self) -> None:
        body, fault = self.rfile.read(int(self.headers.get("Content-Length") or 0)), self.owner.next_fault()
        if fault == "slow":
            time.sleep(self.owner.SECONDS)
        if fault == "reset":
            return self._reset()
        if fault == "error":
            return self._answer(500, {"Content-Type": "text/plain"}, b"something is wrong here")
        try:
            server = http.client.HTTPConnection("127.0.0.1", self.owner.target, timeout=60)
            with contextlib.closing(server):
                headers = {name: value for name, value in self.headers.items() if name.lower() not in HOPS}
                server.request(self.command, self.path, body, headers)
                answer = server.getresponse()
                content = answer.read()
        except OSError:
            return self._reset()
        if fault == "lost":
            return self._reset()
        return self._answer(answer.status, dict(answer.getheaders()), content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _relay

    def _answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
        with contextlib.suppress(OSError):  # the client does not wait any more
            self._write(status, headers, content)

    def _write(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in HOPS:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _reset(self) -> None:
        """Close without lingering, which sends a reset."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.rfile.close()

    def finish(self) -> None:
        """Flush nothing where the connection was reset."""
        with contextlib.suppress(OSError, ValueError):
            super().finish()
