"""A page opened in headless Chromium and asked what it drew, over the browser's own protocol on a pipe: nothing to install but the browser.

https://chromedevtools.github.io/devtools-protocol/: messages are JSON, each ended by a zero byte; the browser reads file 3, writes 4."""

import base64
import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading

PATH = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--remote-debugging-pipe",
    "--window-size=1320,1000",
)
PATIENCE = 600.0  # seconds until a browser that does not end is ended
# The browser expects its two ends at 3 and 4; copies first, as either may be in the other's place.
PLACES = """import os, sys
ends = [os.dup2(int(end), 103 + i) for i, end in enumerate(sys.argv[1:3])]
os.dup2(ends[0], 3), os.dup2(ends[1], 4)
os.execv(sys.argv[3], sys.argv[3:])"""
DRAWN = """JSON.stringify([...document.querySelectorAll('img, svg, canvas')].map(e => ({
    name: e.alt || e.id, complete: e.complete !== false, natural: [e.naturalWidth || 0, e.naturalHeight || 0],
    shown: [e.getBoundingClientRect().width, e.getBoundingClientRect().height]})))"""
WIDTHS = "JSON.stringify([document.documentElement.scrollWidth, document.documentElement.clientWidth])"


class Browser:
    """Made by ``browser``."""

    def __init__(self, to, back):
        self._to, self._back, self._number, self.events = to, back, 0, []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    _session = None

    def open(self, path):
        """The page as JSON-like facts: {"images": [{"name", "complete", "natural", "shown"}], "widths", "errors": what the console, the
        page's scripts and failed loads said, "asked": addresses of everything the page loaded}."""
        self.events.clear()
        address = pathlib.Path(path).resolve().as_uri()
        failed = self.ask("Page.navigate", url=address).get("errorText")
        assert not failed, f"{address}: {failed}"
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._read()
        images, widths = self.value(DRAWN), self.value(WIDTHS)
        return {"images": images, "widths": widths, "errors": self._errors(), "asked": self._asked()}

    def value(self, expression):
        """What an expression that gives JSON says in the page."""
        found = self.ask("Runtime.evaluate", expression=expression)
        assert "exceptionDetails" not in found, found
        return json.loads(found["result"]["value"])

    def picture(self, path):
        """The whole page as a PNG, to be looked at."""
        size = self.ask("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        data = self.ask("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"]
        pathlib.Path(path).write_bytes(base64.b64decode(data))

    def ask(self, method, **given):
        self._number += 1
        session = {"sessionId": self._session} if self._session else {}
        self._to.write(json.dumps({"id": self._number, "method": method, "params": given, **session}).encode() + b"\0")
        self._to.flush()
        while (answer := self._read()).get("id") != self._number:
            pass
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def _read(self):
        text = bytearray()
        while (byte := self._back.read(1)) != b"\0":
            assert byte, "the browser has ended"
            text += byte
        message = json.loads(text)
        if "method" in message:
            self.events.append(message)
        return message

    def _errors(self):
        said = []
        for event in self.events:
            kind, given = event["method"], event["params"]
            if kind == "Runtime.exceptionThrown":
                said.append(given["exceptionDetails"]["text"])
            elif kind == "Runtime.consoleAPICalled" and given["type"] in ("error", "warning", "assert"):
                said.append(f"console: {given['args']}")
            elif kind == "Log.entryAdded" and given["entry"]["level"] in ("error", "warning"):
                said.append(f"{given['entry']['text']} {given['entry'].get('url', '')}".strip())
            elif kind == "Network.loadingFailed":
                said.append(f"not loaded: {given['errorText']}")
        return said

    def _asked(self):
        urls = [event["params"]["request"]["url"] for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return [url for url in urls if not url.startswith("data:")]


@contextlib.contextmanager
def browser(home):
    """A Browser that keeps what it writes in the folder ``home``; it is ended on leaving, or when it does not answer."""
    (to_read, to_write), (back_read, back_write) = os.pipe(), os.pipe()

    command = [sys.executable, "-I", "-c", PLACES, str(to_read), str(back_write), PATH, *FLAGS, f"--user-data-dir={home}"]
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, pass_fds=(to_read, back_write), **quiet)
    os.close(to_read), os.close(back_write)
    late = threading.Timer(PATIENCE, process.kill)
    late.start()
    with open(to_write, "wb") as to, open(back_read, "rb") as back:
        try:
            yield Browser(to, back)
            to.write(b'{"id": 0, "method": "Browser.close"}\0')
            to.flush()
            process.wait()
        finally:
            late.cancel()
            process.kill()
            process.wait()
