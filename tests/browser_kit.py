"""Headless Chromium for tests of pages, over a pipe: no driver, no port, no package."""

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
# The browser reads commands from descriptor 3 and writes to 4.
_LAUNCH = """
import fcntl, os, sys
ours = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3]]
for theirs, fd in zip((3, 4), ours):
    os.dup2(fd, theirs)
os.execv(sys.argv[3], sys.argv[3:])
"""
_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe",
)  # fmt: skip
_KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowRight": 39}


class Browser:
    """One page. Downloads go to `folder`/downloads; dialogs, errors: those that the page raised."""

    def __init__(self, folder: Path):
        assert CHROMIUM is not None
        self.downloads = folder / "downloads"
        self.errors: list[str] = []
        self.dialogs: list[str] = []
        self._count, self._left, self._events = 0, b"", deque()
        commands, self._write = os.pipe()
        self._read, answers = os.pipe()
        fds = (commands, answers)
        words = [sys.executable, "-c", _LAUNCH, *map(str, fds), CHROMIUM, *_FLAGS]
        self._process = subprocess.Popen(
            [*words, f"--user-data-dir={folder / 'profile'}", "about:blank"],
            pass_fds=fds,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for fd in fds:
            os.close(fd)
        self._session = None
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime"):
            self(f"{domain}.enable")
        self("Page.setDownloadBehavior", behavior="allow", downloadPath=str(self.downloads))

    def close(self) -> None:
        """End the browser."""
        self._process.kill()
        self._process.wait()
        os.close(self._write)
        os.close(self._read)

    def __call__(self, method: str, **params: Any) -> dict[str, Any]:
        """A command of the DevTools protocol."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        return self._until(lambda m: m.get("id") == self._count)

    def _until(self, wanted: Any, seconds: float = 60) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            while b"\0" not in self._left:
                if not select.select([self._read], [], [], 1)[0]:
                    break
                self._left += os.read(self._read, 1 << 20)
            else:
                raw, _, self._left = self._left.partition(b"\0")
                message = json.loads(raw)
                self._note(message)
                if wanted(message):
                    assert "error" not in message, message["error"]
                    return message.get("result", message)
        raise TimeoutError("the browser did not answer")

    def _note(self, message: dict[str, Any]) -> None:
        method, params = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(params["exceptionDetails"])[:500])
        if method == "Page.javascriptDialogOpening":
            self.dialogs.append(params["message"])

    def show(self, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        """Size and colours of the page."""
        self(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, path: Path) -> None:
        """Load a file and wait until the report's tool is ready."""
        self("Page.navigate", url=path.absolute().as_uri())
        self._until(lambda m: m.get("method") == "Page.loadEventFired")
        self.wait("!document.getElementById('tool') || document.querySelector('#chips button')")

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        found = self("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, expression: str, seconds: float = 30) -> None:
        """Until the expression is true."""
        end = time.monotonic() + seconds
        while not self.run(f"!!({expression})"):
            assert time.monotonic() < end, expression
            time.sleep(0.05)

    def key(self, key: str, modifiers: int = 0) -> None:
        """Press and release a key; modifiers: 2 is Ctrl."""
        code = _KEYS.get(key, ord(key[0].upper()))
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 and not modifiers else "")
        values = {"key": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        self("Input.dispatchKeyEvent", type="keyDown", **values, **({"text": text} if text else {}))
        self("Input.dispatchKeyEvent", type="keyUp", **values)

    def type(self, text: str) -> None:
        """Text into the focused field, in place of what it holds."""
        self.run("document.activeElement.select()")
        self("Input.insertText", text=text)

    def downloaded(self, name: str, seconds: float = 30) -> Path:
        """The path of a finished download."""
        end = time.monotonic() + seconds
        while not (self.downloads / name).exists():
            assert time.monotonic() < end, f"{name} was not downloaded"
            time.sleep(0.05)
        return self.downloads / name

    def screenshot(self, path: Path) -> Path:
        """The whole page as a PNG."""
        data = self("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))
        return path
