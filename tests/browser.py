"""A real browser for tests: Chromium driven over WebDriver, with the standard library only.

Pages are opened from disk. Knows nothing of what is on them.
"""

import base64
import json
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

ARGUMENTS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars"
).split()
_SECONDS = 120  # that one command may take on a busy machine


def programs() -> tuple[str | None, str | None]:
    """The paths of Chromium and of its driver; None for one that is not here."""
    return shutil.which("chromium"), shutil.which("chromedriver")


class Browser:
    """One browser with one page. `requests` are the addresses that the page asked for, `messages` what it
    wrote to the console, since the last `open`."""

    def __init__(self, profile: Path) -> None:
        chromium, driver = programs()
        assert chromium and driver
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.process = subprocess.Popen(
            [driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.base = f"http://127.0.0.1:{port}"
        self._wait()
        options = {"binary": chromium, "args": [*ARGUMENTS, f"--user-data-dir={profile}"]}
        options["perfLoggingPrefs"] = {"enableNetwork": True}
        always = {"browserName": "chrome", "goog:chromeOptions": options}
        always["goog:loggingPrefs"] = {"browser": "ALL", "performance": "ALL"}
        session = self._send("POST", "/session", {"capabilities": {"alwaysMatch": always}})
        self.base += f"/session/{session['sessionId']}"

    def _wait(self) -> None:
        for _ in range(10 * _SECONDS):
            try:
                if self._send("GET", "/status")["ready"]:
                    return
            except URLError:
                time.sleep(0.1)
        raise TimeoutError("the browser's driver does not start")

    def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = Request(self.base + path, data, {"Content-Type": "application/json"}, method=method)
        with urlopen(request, timeout=_SECONDS) as answer:
            return json.load(answer)["value"]

    def tell(self, command: str, **parameters: Any) -> Any:
        """Sends a command of the DevTools protocol."""
        return self._send("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def size(self, width: int, height: int = 900, dark: bool = False) -> None:
        """Makes the page this wide, and its reader one who prefers dark or light."""
        self.tell(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.tell("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, path: Path) -> None:
        self.log("browser"), self.log("performance")
        self._send("POST", "/url", {"url": path.resolve().as_uri()})

    def run(self, script: str, *arguments: Any) -> Any:
        """What the body of a function returns that runs in the page."""
        return self._send("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def run_async(self, script: str) -> Any:
        """What a script in the page passes to its last argument, a function."""
        return self._send("POST", "/execute/async", {"script": script, "args": []})

    def press(self, *keys: str) -> None:
        """Presses keys, by their names in the DevTools protocol (Tab, ArrowDown, Enter)."""
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowRight": 39, "ArrowDown": 40}
        for key in keys:
            which = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key]}
            self.tell("Input.dispatchKeyEvent", type="keyDown", **which)
            self.tell("Input.dispatchKeyEvent", type="keyUp", **which)

    def log(self, kind: str) -> list[dict[str, Any]]:
        """The entries of a log since it was last read."""
        return self._send("POST", "/se/log", {"type": kind})

    @property
    def messages(self) -> list[str]:
        return [entry["message"] for entry in self.log("browser")]

    @property
    def requests(self) -> list[str]:
        events = [json.loads(entry["message"])["message"] for entry in self.log("performance")]
        return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]

    def picture(self, path: Path, clip: dict[str, float] | None = None) -> None:
        """Writes a PNG of the whole page, or of a part of it (x, y, width, height)."""
        if clip is None:
            actual = self.tell("Page.getLayoutMetrics")["cssContentSize"]
            clip = {"x": 0, "y": 0, "width": actual["width"], "height": actual["height"]}
        shot = self.tell("Page.captureScreenshot", captureBeyondViewport=True, clip=clip | {"scale": 1})
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        try:
            self._send("DELETE", "")
        except (URLError, OSError):
            pass
        self.process.terminate()
        self.process.wait(timeout=_SECONDS)


def axe_source() -> str | None:
    """The script of axe-core, where AXE_CORE names its file."""
    path = os.environ.get("AXE_CORE")
    return Path(path).read_text(encoding="utf-8") if path and Path(path).is_file() else None
