"""The page of a run that goes on, served to this machine alone."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stabkit.errors import ReportError
from stabkit.monitor.page import run_page
from stabkit.monitor.reading import is_run, read_findings, read_records

_LOOPBACK = "127.0.0.1"
_NAMES = (_LOOPBACK, "localhost")


class RunServer(http.server.ThreadingHTTPServer):
    """Serves the page of one run on the loopback; it is drawn anew when the files of the run have changed.

    Args:
        run: the directory of a monitor, or its file of records.
        port: 0 for one that is free.
    """

    daemon_threads = True

    def __init__(self, run: Path, port: int) -> None:
        super().__init__((_LOOPBACK, port), _Handler)
        self.run = run
        self._lock = threading.Lock()
        self._drawn: tuple[str, str] | None = None

    @property
    def address(self) -> str:
        """Where the page is."""
        return f"http://{_LOOPBACK}:{self.server_address[1]}/"

    @property
    def stamp(self) -> str:
        """What changes when the run writes: sizes and times of its files."""
        files = sorted(self.run.glob("records*")) if self.run.is_dir() else [self.run]
        states = [path.stat() for path in files if path.is_file()]
        return " ".join(f"{state.st_size}-{state.st_mtime_ns}" for state in states)

    def page(self) -> str:
        """The run as it is now."""
        with self._lock:
            stamp = self.stamp
            if self._drawn is None or self._drawn[0] != stamp:
                self._drawn = stamp, self._page()
            return self._drawn[1]

    def _page(self) -> str:
        known = is_run(self.run) and (self.run.is_dir() or self.run.is_file())
        try:
            records = read_records(self.run) if known else []
        except ReportError as error:
            if "no record yet" not in str(error):
                raise
            records = []
        return run_page(records, read_findings(self.run) if known else [], self.run.name or str(self.run))


class _Handler(http.server.BaseHTTPRequestHandler):
    server: RunServer

    def do_GET(self) -> None:
        """The page, or the stamp by which it knows that there is news."""
        # a page of elsewhere whose name was made to lead here must not read the run
        if self.headers.get("Host", "").rpartition(":")[0] not in _NAMES:
            self.send_error(403)
        elif self.path == "/":
            self._send("text/html; charset=utf-8", self._made())
        elif self.path == "/stamp":
            self._send("text/plain; charset=utf-8", self.server.stamp)
        else:
            self.send_error(404)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the page asks every two seconds."""

    def _made(self) -> str:
        try:
            return self.server.page()
        except ReportError as error:  # written by something else, or damaged
            return run_page([], [], str(error))

    def _send(self, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def serving(run: Path, port: int) -> Iterator[RunServer]:
    """A server of the page of a run, which is closed at the end.

    Raises:
        ReportError: the port is taken, or out of range.
    """
    try:
        server = RunServer(run, port)
    except (OSError, OverflowError) as error:
        raise ReportError(f"--port {port}: {error}; --port 0 takes one that is free") from error
    try:
        yield server
    finally:
        server.server_close()
