"""Headless Chromium through the DevTools protocol, over its pipe: no driver, no websocket, no
port."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAM = next(
    (
        path
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (path := shutil.which(name))
    ),
    None,
)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--remote-debugging-pipe",
)  # fmt: skip
PATIENCE = 90.0  # seconds for one answer, on a loaded machine
KEYS = {"ArrowLeft": 37, "ArrowRight": 39, "0": 48, "1": 49, "2": 50, "3": 51}


class Browser:
    """One page. `errors`: exceptions and console errors; `requests`: what was asked for, with data:
    and blob: left out."""

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write = read, write
        self._buffer = b""
        self._count = 0
        self._session = ""
        self.events: list[dict[str, Any]] = []

    def open(self, path: Path) -> None:
        """A fresh tab on the file, loaded."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri())
        self._wait("Page.loadEventFired")

    def reload(self) -> None:
        self.events = [event for event in self.events if event["method"] != "Page.loadEventFired"]
        self.call("Page.reload")
        self._wait("Page.loadEventFired")

    def _wait(self, method: str) -> None:
        while not any(event["method"] == method for event in self.events):
            self.events.append(self._receive())

    def send(self, method: str, **parameters: Any) -> None:
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session and not method.startswith(("Target.", "Browser.")):
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.send(method, **parameters)
        while True:
            answer = self._receive()
            if answer.get("id") == self._count:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            if "method" in answer:
                self.events.append(answer)

    def _receive(self) -> dict[str, Any]:
        end = time.monotonic() + PATIENCE
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"Chromium did not answer in {PATIENCE:.0f} s"
            piece = os.read(self._read, 2**16)
            assert piece, "Chromium has gone"
            self._buffer += piece
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def value(self, expression: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str, **more: Any) -> None:
        """A real key press, down and up."""
        code = KEYS[key]
        text = {"text": key} if len(key) == 1 else {}
        self.call(
            "Input.dispatchKeyEvent",
            type="keyDown",
            key=key,
            windowsVirtualKeyCode=code,
            **text,
            **more,
        )
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def look(
        self, *, width: int = 1200, height: int = 800, dark: bool = False, whole: bool = False
    ) -> bytes:
        """A screenshot (PNG)."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        return base64.b64decode(
            self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        )

    @property
    def errors(self) -> list[str]:
        self.value("1")  # whatever was said before has arrived
        bad = []
        for event in self.events:
            p = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                bad.append(json.dumps(p["exceptionDetails"]))
            elif event["method"] == "Runtime.consoleAPICalled" and p["type"] in (
                "error",
                "warning",
                "assert",
            ):
                bad.append(json.dumps(p["args"]))
            elif event["method"] == "Log.entryAdded" and p["entry"]["level"] in (
                "error",
                "warning",
            ):
                bad.append(p["entry"]["text"])
        return bad

    @property
    def requests(self) -> list[str]:
        self.value("1")
        urls = [
            event["params"]["request"]["url"]
            for event in self.events
            if event["method"] == "Network.requestWillBeSent"
        ]
        return [url for url in urls if not url.startswith(("data:", "blob:"))]


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """Chromium with a profile of its own in `folder`; ended at the end."""
    assert PROGRAM is not None
    to_read, to_write = os.pipe()  # we write, it reads on 3
    from_read, from_write = os.pipe()
    command = 'exec "$0" "$@" 3<&' + str(to_read) + " 4>&" + str(from_write)
    arguments = [*FLAGS, f"--user-data-dir={folder / 'profile'}"]
    process = subprocess.Popen(
        ["bash", "-c", command, PROGRAM, *arguments],
        pass_fds=(to_read, from_write),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(to_read)
    os.close(from_write)
    try:
        page = Browser(from_read, to_write)
        yield page
        page.send("Browser.close")  # it may be gone before it answers
    finally:
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        os.close(to_write)
        os.close(from_read)
