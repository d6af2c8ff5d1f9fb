"""The page in a real browser, with a file as its microphone: it hears, answers, plays, and stops at a barge-in."""

from __future__ import annotations

import re
import shutil
import time
from importlib import resources

import numpy as np
import pytest

import minmo
from minmo.conversation.budget import Budget
from minmo.conversation.scheduler import Scheduler

pytest.importorskip("starlette", reason="the server needs pip install 'minmo[serve]'")
playwright = pytest.importorskip("playwright.sync_api", reason="driving a browser needs pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here: apt install chromium")

SUM = minmo.load_audio(str(resources.files("minmo") / "assets" / "sum.wav"))
WAIT_MS = 300_000
"""How long a test waits for what must come: machines may be slow."""


def silence(seconds):
    return np.zeros(round(16_000 * seconds), np.float32)


@pytest.fixture
def browse(tmp_path):
    """browse(url, *sounds) -> a page whose microphone plays the sounds, in a loop. It may not fail or go elsewhere."""
    with playwright.sync_playwright() as driver:
        pages = []

        def start(url, *sounds):
            file = tmp_path / "microphone.wav"
            minmo.save_audio(file, np.concatenate(sounds), 16_000)
            browser = driver.chromium.launch(
                executable_path=CHROMIUM,
                args=[
                    "--no-sandbox",
                    "--use-fake-ui-for-media-stream",
                    "--use-fake-device-for-media-stream",
                    f"--use-file-for-fake-audio-capture={file}",
                    "--autoplay-policy=no-user-gesture-required",
                ],
            )
            page = browser.new_page(viewport={"width": 1100, "height": 720})
            page.set_default_timeout(WAIT_MS)
            page.problems = []
            page.on("pageerror", lambda error: page.problems.append(str(error)))
            page.on("console", lambda said: page.problems.append(said.text) if said.type == "error" else None)
            page.on("request", lambda request: request.url.startswith(url) or page.problems.append(request.url))
            page.goto(url)
            pages.append((browser, page))
            return page

        yield start
        for browser, page in pages:
            assert not page.problems
            browser.close()


def wait_for(page, condition, *arguments):
    """Until a JavaScript function says so, asked from outside: the page's own policy lets it evaluate nothing."""
    until = time.monotonic() + WAIT_MS / 1e3
    while not page.evaluate(condition, *arguments):
        assert time.monotonic() < until, f"{condition} {arguments} did not come about; {page.inner_text('body')}"
        page.wait_for_timeout(30)


def wait_for_text(page, selector, pattern):
    found = "([at, pattern]) => [...document.querySelectorAll(at)].some(e => new RegExp(pattern).test(e.textContent))"
    wait_for(page, found, [selector, pattern])


def wait_for_level(page, whose):
    wait_for(page, "whose => Number(document.getElementById(whose).getAttribute('aria-valuenow')) > 30", whose)


def test_a_conversation_with_a_barge_in(serve, scripted, browse, tmp_path):
    """By keyboard alone. What was heard of the cut reply is what the page has played."""
    running = serve(scripted(reply_s=30))
    page = browse(running.url, silence(1), SUM, silence(4))
    page.screenshot(path=tmp_path / "before.png")
    page.keyboard.press("Tab")
    while page.evaluate("document.activeElement.id") != "talk":
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    wait_for_text(page, "#state", "Listening")
    wait_for_text(page, ".user", "what is it")
    wait_for_text(page, ".assistant", "three and four")
    wait_for_text(page, "#state", "Speaking")
    wait_for_level(page, "minmo")
    wait_for_level(page, "you")
    page.screenshot(path=tmp_path / "speaking.png")
    wait_for_text(page, ".assistant", "interrupted")
    wait_for_text(page, "#stop", r"\d ms")
    wait_for_text(page, "#answer", r"\d ms")
    assert page.text_content(".assistant del") == "four"
    line = running.scheduler.opened[0]
    acknowledged = [ms for reply, ms in line.conversation.acknowledged if reply == 0]
    assert acknowledged == sorted(acknowledged) and acknowledged[-1] > 100
    page.screenshot(path=tmp_path / "interrupted.png")
    # Escape cuts the next reply, before any voice does.
    wait_for_text(page, "#state", "Speaking")
    page.keyboard.press("Escape")
    wait_for(page, "() => document.querySelectorAll('.assistant small').length > 1")
    page.get_by_role("radio", name="Low").press("Space")
    for _ in range(3000):
        (session,) = running.server.hall.live
        if session.settings.turn_detection.eagerness == "low":
            break
        page.wait_for_timeout(20)
    assert session.settings.turn_detection.eagerness == "low"
    page.get_by_role("button", name="Stop", exact=True).press("Enter")
    wait_for_text(page, "#state", "Not connected")
    for _ in range(3000):
        if not running.scheduler.lines:
            break
        page.wait_for_timeout(20)
    assert not running.scheduler.lines


def test_a_dropped_connection_comes_back(serve, scripted, browse):
    running = serve(scripted(reply_s=1))
    page = browse(running.url, silence(1), SUM, silence(4))
    page.get_by_role("button", name="Talk").click()
    wait_for_text(page, ".assistant", "three and four")
    for connection in list(running.uvicorn.server_state.connections):
        running.uvicorn._loop.call_soon_threadsafe(connection.transport.abort)
    wait_for(page, "() => document.querySelectorAll('.assistant').length > 1")
    assert len(running.scheduler.opened) == 2
    assert len(running.scheduler.opened[1].conversation.history.exchanges) >= 2
    page.problems.clear()  # the browser says that the connection broke


def test_what_a_person_is_told(serve, scripted, browse):
    """A server that asks for a key, and one that has no room."""
    from minmo.serving.guard import Guard

    running = serve(scripted(rooms=0), guard=Guard(["k" * 32]))
    page = browse(running.url, silence(1))
    page.get_by_role("button", name="Talk").click()
    wait_for_text(page, "[role=alert]", "API key")
    page.get_by_text("API key", exact=True).click()
    page.get_by_label(re.compile("Only where this server asks")).fill("k" * 32)
    page.get_by_role("button", name="Talk").click()
    wait_for_text(page, "[role=alert]", "time for no more")
    page.problems.clear()  # the browser says that it was denied


def test_nano_answers(serve, browse, tmp_path):
    engine = minmo.FastMinMo.from_pretrained("nano", "cpu", rows=3, max_positions=600, max_voice_positions=1200)
    with Scheduler(engine, budget=Budget(*[{1: 1.0}] * 7)) as scheduler:
        drawing = minmo.Settings(temperature=0.0, max_text_tokens=16)
        page = browse(serve(scheduler, drawing=drawing).url, silence(1), SUM, silence(12))
        page.get_by_role("button", name="Talk").click()
        wait_for_text(page, ".assistant", "five plus three is eight")
        wait_for_level(page, "minmo")
        wait_for_text(page, ".user", "[a-z]")
        page.screenshot(path=tmp_path / "nano.png")
        page.get_by_role("button", name="Stop", exact=True).click()
        wait_for_text(page, "#state", "Not connected")
