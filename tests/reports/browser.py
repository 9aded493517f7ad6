"""A browser without a window, driven by its DevTools protocol over a pipe."""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time

import pytest

PROGRAM = shutil.which("chromium") or shutil.which("google-chrome")
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-pipe",
)  # fmt: skip
_PATIENCE = 60  # seconds for an answer


class Browser:
    """One tab, which shows a page at a time."""

    def __init__(self, reading, writing):
        self._reading, self._writing = reading, writing
        self._number, self._rest, self._session, self._events = 0, b"", None, []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self("Page.enable")
        self("Runtime.enable")
        self("Log.enable")

    def __call__(self, method, **params):
        """What the browser answers to a command of the protocol."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._writing, json.dumps(message).encode() + b"\0")
        found = self._until(lambda message: message.get("id") == self._number)
        assert "error" not in found, (method, found)
        return found["result"]

    def _until(self, wanted):
        """The first message that is wanted; others are kept in `_events`."""
        end = time.monotonic() + _PATIENCE
        while True:
            *messages, self._rest = self._rest.split(b"\0")
            for place, text in enumerate(messages):
                message = json.loads(text)
                if wanted(message):
                    self._rest = b"\0".join([*messages[place + 1 :], self._rest])
                    return message
                self._events.append(message)
            ready, _, _ = select.select([self._reading], [], [], max(0, end - time.monotonic()))
            data = os.read(self._reading, 1 << 20) if ready else b""
            if not data:
                raise TimeoutError(f"{PROGRAM} does not answer; the last it said: {self._events[-3:]}")
            self._rest += data

    def show(self, path, width=1280, height=900, *, dark=False, still=False, touch=False):
        """Opens a page in a window of this size; returns when it is loaded."""
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=touch)
        self("Emulation.setTouchEmulationEnabled", enabled=touch)
        features = {"prefers-color-scheme": "dark" if dark else "light"}
        features["prefers-reduced-motion"] = "reduce" if still else "no-preference"
        self("Emulation.setEmulatedMedia", features=[{"name": n, "value": v} for n, v in features.items()])
        self._events.clear()
        self("Page.navigate", url=path.resolve().as_uri())
        if not any(event.get("method") == "Page.loadEventFired" for event in self._events):
            self._until(lambda message: message.get("method") == "Page.loadEventFired")
        self.js("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    @property
    def complaints(self):
        """What the page's scripts have raised or written to the console, and what was refused to them."""
        methods = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [event["params"] for event in self._events if event.get("method") in methods]

    def js(self, expression):
        """The value of an expression in the page; of a promise, what it becomes."""
        found = self("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def press(self, key, code, text=""):
        """Presses a key: its name, its Windows key code, the text that it writes."""
        names = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self("Input.dispatchKeyEvent", type="keyDown", text=text, **names)
        self("Input.dispatchKeyEvent", type="keyUp", **names)

    def shot(self):
        """A PNG of the window."""
        return base64.b64decode(self("Page.captureScreenshot", format="png")["data"])


@contextlib.contextmanager
def open_browser(folder):
    """A `Browser` with a fresh profile in the folder; skips the test where there is none or it does not start."""
    if PROGRAM is None:
        pytest.skip("neither chromium nor google-chrome is installed")
    to_browser, writing = os.pipe()
    reading, from_browser = os.pipe()

    def connect():  # the browser reads commands from file 3 and answers in file 4
        a, b = os.dup(to_browser), os.dup(from_browser)
        os.dup2(a, 3)
        os.dup2(b, 4)

    with (folder / "browser.log").open("wb") as log:
        process = subprocess.Popen(
            [PROGRAM, *_FLAGS, f"--user-data-dir={folder / 'profile'}", "about:blank"],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, close_fds=False, preexec_fn=connect,
        )  # fmt: skip
    os.close(to_browser)
    os.close(from_browser)
    try:
        try:
            browser = Browser(reading, writing)
        except (TimeoutError, BrokenPipeError) as error:
            pytest.skip(f"{PROGRAM} does not start here: {error} {(folder / 'browser.log').read_bytes()[-300:]!r}")
        yield browser
    finally:
        process.kill()
        process.wait()
        os.close(reading)
        os.close(writing)
