"""A Chromium without a window that opens a page from a file, driven over its DevTools pipe."""

import contextlib
import fcntl
import json
import os
import pathlib
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

NAMES = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chrome",
    "microsoft-edge",
)
ON_MACS = ("Google Chrome", "Chromium", "Microsoft Edge")
FLAGS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",  # a container has little of it
    "--hide-scrollbars",
)
SECONDS = 120.0  # for an answer; a large network on a slow machine takes some of it
# Chromium reads commands from its file 3 and writes answers to its file 4.
START = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class BrowserError(Exception):
    """Chromium did not start, did not answer, or an expression failed in it."""


def find_chromium() -> str | None:
    """Return the path of an installed Chromium, Chrome or Edge, None if there is none."""
    macs = (f"/Applications/{name}.app/Contents/MacOS/{name}" for name in ON_MACS)
    return next(filter(None, map(shutil.which, (*NAMES, *macs))), None)


class Chromium:
    """A browser with one page.

    Attributes:
        version: such as "Chrome/130.0.6723.58".
        events: what it reported while answers were awaited, such as `Network.requestWillBeSent`.
    """

    def __init__(self, commands: int, answers: int):
        self._commands, self._answers = commands, answers
        self._number, self._session, self._rest = 0, "", b""
        self.events: list[dict[str, Any]] = []
        self.version = str(self.send("Browser.getVersion")["product"]).removeprefix("Headless")
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.send("Page.enable")

    def open(self, file: pathlib.Path) -> None:
        """Open a page from a file, as a double click does; return before its scripts have ended."""
        self.send("Page.navigate", url=file.resolve().as_uri())
        self.evaluate(
            "new Promise(go => document.readyState === 'complete' ? go() : addEventListener('load', () => go()))"
        )

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression in the page, awaited if it is a promise.

        Raises:
            BrowserError: it fails, or takes too long.
        """
        answer = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            said = details.get("exception", {}).get("description") or details.get("text", "no message")
            raise BrowserError(str(said).splitlines()[0])
        return answer["result"].get("value")

    def send(self, method: str, **parameters: Any) -> Any:
        """Send a command of the DevTools protocol and return its result.

        Raises:
            BrowserError: it fails, or takes too long.
        """
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        try:
            content = memoryview(json.dumps(message).encode() + b"\0")
            while content:
                content = content[os.write(self._commands, content) :]
            while (answer := self._next()).get("id") != self._number:
                self.events.append(answer)
        except OSError as error:
            raise BrowserError(f"it has ended ({error.strerror})") from error
        if "error" in answer:
            raise BrowserError(f"{method}: {answer['error'].get('message')}")
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        """Return the next message from the browser."""
        until = time.monotonic() + SECONDS
        while b"\0" not in self._rest:
            if not select.select([self._answers], [], [], max(0.0, until - time.monotonic()))[0]:
                raise BrowserError(f"it did not answer within {SECONDS:.0f} seconds")
            read = os.read(self._answers, 1 << 20)
            if not read:
                raise BrowserError("it has ended")
            self._rest += read
        message, _, self._rest = self._rest.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        return answer


@contextlib.contextmanager
def chromium(path: str) -> Iterator[Chromium]:
    """Start a browser with a new profile, and end it at the end.

    Args:
        path: of the program, as `find_chromium` returns it.

    Raises:
        BrowserError: it does not start.
    """
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
        contextlib.ExitStack() as files,
    ):
        ours_in, theirs_out = map(_moved, os.pipe())
        theirs_in, ours_out = map(_moved, os.pipe())
        for file in (ours_in, ours_out):
            files.callback(os.close, file)
        flags = [*FLAGS, f"--user-data-dir={profile}", *["--no-sandbox"] * (os.geteuid() == 0)]
        log = files.enter_context((pathlib.Path(profile) / "log").open("w+b"))
        process = subprocess.Popen(
            [sys.executable, "-S", "-c", START, str(theirs_in), str(theirs_out), path, *flags],
            pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C is for us, and its helpers end with it
        )
        os.close(theirs_in)
        os.close(theirs_out)
        try:
            yield Chromium(ours_out, ours_in)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait()


def _moved(file: int) -> int:
    """Return a file descriptor above 9, out of the way of the browser's 3 and 4."""
    moved = fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(file)
    return moved
