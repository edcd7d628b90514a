"""Pages in a real browser: headless Chromium, driven over a pair of pipes."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1200,900",
    "--remote-debugging-pipe",
]


class Page:
    """One page of 1200 × 900 in Chromium."""

    def __init__(self, commands: IO[bytes], answers: IO[bytes]) -> None:
        self._commands, self._answers = commands, answers
        self._count = 0
        self._session: str | None = None
        target = self._do("Target.createTarget", url="about:blank")
        attached = self._do("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]

    def open(self, url: str, **cookies: str) -> None:
        """Go to ``url`` and wait until it is loaded."""
        for name, value in cookies.items():
            self._do("Network.setCookie", name=name, value=value, url=url)
        failed = self._do("Page.navigate", url=url).get("errorText")
        assert failed is None, f"{url}: {failed}"
        give_up_at = time.monotonic() + 30
        while self.evaluate("document.readyState") != "complete":
            assert time.monotonic() < give_up_at, f"{url} is still loading"
            time.sleep(0.02)

    def resize(self, width: int, height: int = 900) -> None:
        """Make the window as wide as that, for what is opened next."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._do("Emulation.setDeviceMetricsOverride", **size)

    def evaluate(self, expression: str) -> Any:
        """Return the value of some JavaScript."""
        answer = self._do("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """Save what can be seen."""
        image = self._do("Page.captureScreenshot")["data"]
        path.write_bytes(base64.b64decode(image))

    def _do(self, method: str, **params: Any) -> dict[str, Any]:
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        self._commands.write(json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._count:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def _read(self) -> dict[str, Any]:
        text = bytearray()
        while (byte := self._answers.read(1)) != b"\0":
            assert byte, "Chromium has gone away"
            text += byte
        return json.loads(text)


@contextmanager
def chromium() -> Iterator[Page]:
    """Start Chromium, or skip the test where there is none."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("Debian's chromium is not installed")
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    # Chromium reads from descriptor 3 and writes to 4, which the shell can give it.
    pipes = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            ["bash", "-c", pipes, "chromium", program, *_FLAGS, f"--user-data-dir={profile}"],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        try:
            with os.fdopen(ours_in, "rb") as answers, os.fdopen(ours_out, "wb", 0) as commands:
                yield Page(commands, answers)  # closing the pipes ends Chromium
        finally:
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
