"""A page in a real Chromium, through its DevTools protocol: what it shows, asks for and complains of."""

import asyncio
import json
import shutil
import subprocess
import time
from base64 import b64decode
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser")
MEASURE = """(() => {
  const texts = [...document.querySelectorAll('svg.chart text')].filter(t => t.textContent.trim());
  const boxes = texts.map(t => [t, t.getBoundingClientRect()]);
  const overlap = [];
  boxes.forEach(([a, p], i) => boxes.slice(i + 1).forEach(([b, q]) => {
    if (a.closest('svg') === b.closest('svg') && p.left < q.right - 1 && q.left < p.right - 1
        && p.top < q.bottom - 3 && q.top < p.bottom - 3)
      overlap.push(`${a.textContent} / ${b.textContent}`);
  }));
  const cut = texts.filter(t => {
    const [inner, outer] = [t, t.closest('svg')].map(e => e.getBoundingClientRect());
    return inner.left < outer.left - 1 || inner.right > outer.right + 1;
  }).map(t => t.textContent);
  const width = e => e.getBoundingClientRect().width;
  const scale = t => width(t.closest('svg')) / t.closest('svg').viewBox.baseVal.width;
  const all = [...document.querySelectorAll('main *')].filter(e => e.childNodes.length
    && [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()));
  const sizes = all.map(e => parseFloat(getComputedStyle(e).fontSize)
    * (e.closest('svg.chart') ? scale(e) : 1));
  const {scrollWidth, clientWidth} = document.documentElement;
  return {wider: scrollWidth - clientWidth, overlap, cut,
    least: Math.min(...sizes), height: document.documentElement.scrollHeight};
})()"""


@dataclass
class Seen:
    """What a page was like at one width."""

    wider: float
    """Pixels by which it is wider than the window."""
    overlap: list[str]
    """Labels of a chart that lie over each other."""
    cut: list[str]
    """Labels that reach out of their chart."""
    least: float
    """The size of the smallest letters, in pixels."""
    height: int
    complaints: list[str] = field(default_factory=list)
    """Errors and warnings of the console."""
    requests: list[str] = field(default_factory=list)
    """Addresses that it asked for, without what the page itself holds."""


def look(page: Path, picture: Path, *, width: int, dark: bool = False) -> Seen:
    """Open a page in a window of a width, and leave a picture of the whole of it."""
    profile = picture.with_suffix(".profile")
    assert PROGRAM is not None
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
    command = [PROGRAM, *flags, f"--user-data-dir={profile}", "about:blank"]
    browser = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        port = _port(profile / "DevToolsActivePort")
        return asyncio.run(_look(port, page, picture, width, dark))
    finally:
        browser.terminate()
        browser.wait()


def _port(file: Path) -> int:
    deadline = time.monotonic() + 60
    while not (file.exists() and file.read_text().strip()):
        assert time.monotonic() < deadline, "Chromium does not start"
        time.sleep(0.1)
    return int(file.read_text().split()[0])


async def _look(port: int, page: Path, picture: Path, width: int, dark: bool) -> Seen:
    events: list[dict[str, Any]] = []
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://127.0.0.1:{port}/json") as answer:
            targets = await answer.json()
        (target,) = (target for target in targets if target["type"] == "page")
        async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            number = 0

            async def ask(method: str, **parameters: Any) -> dict[str, Any]:
                nonlocal number
                number += 1
                await socket.send_json({"id": number, "method": method, "params": parameters})
                while (said := json.loads((await socket.receive()).data)).get("id") != number:
                    events.append(said)
                assert "error" not in said, said
                return said["result"]

            for domain in ("Page", "Network", "Runtime", "Log"):
                await ask(f"{domain}.enable")
            size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
            await ask("Emulation.setDeviceMetricsOverride", **size)
            theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
            await ask("Emulation.setEmulatedMedia", features=[theme])
            await ask("Page.navigate", url=page.absolute().as_uri())
            while not any(event.get("method") == "Page.loadEventFired" for event in events):
                events.append(json.loads((await socket.receive()).data))
            found = await ask("Runtime.evaluate", expression=MEASURE, returnByValue=True)
            seen = Seen(**found["result"]["value"])
            clip = {"x": 0, "y": 0, "width": width, "height": seen.height, "scale": 1}
            shot = await ask("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
            picture.write_bytes(b64decode(shot["data"]))
    for event in events:
        match event.get("method"), event.get("params", {}):
            case "Network.requestWillBeSent", {"request": {"url": url}}:
                seen.requests += [] if url.startswith("data:") else [url]
            case "Log.entryAdded", {"entry": entry}:
                seen.complaints.append(entry["text"])
            case "Runtime.consoleAPICalled" | "Runtime.exceptionThrown", told:
                seen.complaints.append(str(told))
    return seen
