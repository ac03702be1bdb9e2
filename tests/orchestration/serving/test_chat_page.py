"""The page for people, in a real browser: several images, rounds, two models side by side, by keyboard."""

import asyncio
import base64
import json
import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dsvl.answers import Piece, Question
from dsvl.data.images import ImageProcessor
from orchestration.serving.gate import Limits, Model, page
from tests.orchestration.hosting import TOKEN, digits, hosted


@pytest.fixture
def page_address() -> Iterator[str]:
    """Two models that say what they see and are asked, word by word; `wait` they answer without end."""

    async def parrot(question: Question) -> AsyncIterator[Piece]:
        asked = question.turns[-1].content[-1].text
        words = [f"{len(question.images)} images,", f"{len(question.turns)} turns:", *asked.split()]
        while asked == "wait":
            yield Piece("wait ", 10, 1)
            await asyncio.sleep(0.05)
        for number, word in enumerate(words, start=1):
            end = "stop" if number == len(words) else None
            yield Piece(f"{word} ", 100 * len(question.turns), number, end)

    processor = ImageProcessor(8, (0.5,) * 3, (0.5,) * 3)  # type: ignore
    model = Model(processor, 4096, 10**6, parrot)  # type: ignore
    with hosted({"step-230": model, "step-920": model}, limits=Limits()) as address:
        yield address


def test_the_page_names_no_other_host_and_runs_nothing_but_its_own_script():
    html, policy = page()
    assert "//" not in "".join(line.split("  // ")[0] for line in html.splitlines()
                               if not line.startswith("//"))  # fmt: skip
    assert " style=" not in html
    assert " onclick=" not in html
    assert "unsafe" not in policy
    assert "default-src 'none'" in policy


@pytest.mark.slow
def test_a_person_shows_three_images_asks_across_them_stops_exports_and_clears(
    page_address, browser, tmp_path
):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    def until(what: Callable[[], Any]) -> Any:
        return WebDriverWait(browser, 60).until(lambda _: what())

    def find(selector: str) -> list[Any]:
        return browser.find_elements(By.CSS_SELECTOR, selector)

    def keys(*typed: str) -> None:
        browser.switch_to.active_element.send_keys(*typed)

    shots = Path(os.environ.get("DSVL_SCREENSHOTS", tmp_path))
    browser.get(page_address)
    until(lambda: find("dialog[open]"))
    keys("not the token", Keys.ENTER)
    until(lambda: find("#denied:not([hidden])"))
    keys(TOKEN, Keys.ENTER)
    until(lambda: not find("dialog[open]") and find("#model option"))
    files = []
    for number, data in enumerate(digits(tmp_path / "digits"), start=1):
        files.append(tmp_path / f"digit-{number}.png")
        files[-1].write_bytes(data)
    find("#files")[0].send_keys("\n".join(map(str, files)))
    until(lambda: len(find("#waiting li")) == 3)
    find("#question")[0].click()
    keys("Which digit is larger, image 1 or image 3?", Keys.ENTER)
    until(lambda: len(find(".answer")) == 2 and not find(".writing"))
    keys("What digit is in image 2?", Keys.ENTER)
    until(lambda: len(find(".answer")) == 4 and not find(".writing"))
    assert len(find(".round img")) == 3
    for width, name in ((1400, "wide"), (390, "narrow")):
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500},
        )
        assert browser.execute_script(
            "return document.documentElement.scrollWidth <= innerWidth"
        ), f"nothing is cut off at {width} pixels"
        shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})
        (shots / f"{name}.png").write_bytes(base64.b64decode(shot["data"]))
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    find("#export")[0].click()
    until(lambda: (tmp_path / "conversation.json").exists())
    exported = json.loads((tmp_path / "conversation.json").read_text())
    assert [len(each["messages"]) for each in exported["conversations"]] == [4, 4]
    assert exported["conversations"][0]["messages"][0]["content"][2]["type"] == "image_url"
    find("#clear")[0].click()
    assert not find(".round")
    keys("wait", Keys.ENTER)  # as `page_address` does, which goes on for ever
    until(lambda: find("#stop:not([hidden])") and find(".answer p")[0].text)
    keys(Keys.ESCAPE)
    until(lambda: not find(".writing"))
    assert "(stopped)" in find(".answer")[0].text
    faults = [
        entry["message"]
        for entry in browser.get_log("browser")
        if entry["level"] in ("WARNING", "SEVERE") and "401" not in entry["message"]
    ]
    assert not faults
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = {
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    }
    assert f"{page_address}/v1/chat/completions" in urls
    ours = (page_address, "data:", "blob:")
    browsers = ("chrome://", "chrome-untrusted://")  # the tab that it opens with
    assert not [url for url in urls if not url.startswith(ours + browsers)]
