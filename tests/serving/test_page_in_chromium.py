"""The page in a real Chromium: `apt-get install chromium`, or `playwright install chromium`."""

import os
import re
import shutil
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from clips import index_frame, read_index, write_clip
from playwright.sync_api import Page, expect, sync_playwright
from servers import QUESTION, make_server, session

from llamavid_jax.serving import prepare as preparing

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
OTHER = "how many dogs"
expect.set_options(timeout=60_000)  # milliseconds: a slow machine must not fail the page


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        found = next(filter(None, map(shutil.which, NAMES)), own if Path(own).exists() else None)
        if found is None:
            said = "no Chromium is found; apt-get install chromium, or playwright install chromium"
            pytest.fail(said) if os.environ.get("CI") else pytest.skip(said)
        browser = playwright.chromium.launch(executable_path=found)
        yield browser
        browser.close()


class Blocks:
    """Lets an engine run its blocks freely, or only a given number."""

    def __init__(self, engine):
        self.engine, self.decode, self.free, self.left = engine, engine._decode, True, threading.Semaphore(0)

    def __call__(self) -> None:
        if self.engine._running and not self.free:
            self.left.acquire()
        self.decode()

    def go_on(self) -> None:
        self.free = True
        self.left.release()


@pytest.fixture
def blocks(engine, monkeypatch):
    blocks = Blocks(engine)
    monkeypatch.setattr(engine, "_decode", blocks)
    yield blocks
    blocks.go_on()


def listening(server):
    """Serves on a free port until the block ends; yields the address."""
    place = socket.create_server(("127.0.0.1", 0))
    running = uvicorn.Server(uvicorn.Config(server.app, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [place]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{place.getsockname()[1]}"
    running.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def address(server):
    yield from listening(server)


@pytest.fixture
def page(browser, address):
    """An open page; any script or console error fails the test, except those it provokes."""
    page = browser.new_context().new_page()
    wrong = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: message.type == "error" and wrong.append(message.text))
    page.goto(address)
    yield page
    page.context.close()
    meant = "the server responded with a status of 400", "net::ERR_CONNECTION_RESET"
    assert not [text for text in wrong if not any(said in text for said in meant)]


@pytest.fixture(scope="module")
def expected(tiny_model, clip):
    """The answers to both questions, each asked as the first."""
    films = session(tiny_model, videos=[clip], follow_ups=False)
    return {text: films.ask(text, max_new_tokens=48) for text in (QUESTION, OTHER)}


def upload(page: Page, path: Path) -> None:
    page.set_input_files("#file", path)
    expect(page.locator("#state")).to_have_text(path.name)


def ask(page: Page, question: str) -> None:
    page.fill("#question", question)
    page.press("#question", "Enter")


def words(page: Page, number: int = 0):
    return page.locator(".assistant .words").nth(number)


def test_a_conversation_about_a_film(page, clip, blocks, tiny_model, expected):
    """Words appear as they are generated, then the evidence; a click plays the film there; then a second question."""
    whole = session(tiny_model, videos=[clip])
    answers = [whole.ask(question, max_new_tokens=48, evidence=True) for question in (QUESTION, OTHER)]
    upload(page, clip)
    blocks.free = False
    ask(page, QUESTION)
    expect(words(page)).to_have_text("…")
    blocks.left.release()
    expect(words(page)).not_to_have_text("…")
    part = words(page).text_content()
    assert part and answers[0].text.startswith(part) and part != answers[0].text
    expect(page.locator(".frame")).to_have_count(0)
    blocks.go_on()
    expect(words(page)).to_have_text(answers[0].text)
    for place, answer in enumerate(answers):
        if place:
            ask(page, OTHER)
            expect(words(page, 1)).to_have_text(answer.text)
        frames = page.locator(".evidence").nth(place).locator(".frame")
        most = max(frame["weight"] for frame in answer.evidence)
        strong = [frame for frame in answer.evidence if frame["weight"] > most / 10]
        shown = [f"0:{int(frame['second']):02} · {100 * frame['weight']:.1f} %" for frame in strong]
        expect(frames).to_have_text(shown)
    last = page.locator(".evidence").nth(1)
    expect(last.locator("canvas.look").last).to_have_js_property("width", 160)  # the width of a drawn one
    for canvas, frame in zip(last.locator("canvas:not(.look)").all(), strong, strict=True):
        pixels = canvas.evaluate("c => [...c.getContext('2d').getImageData(0, 0, 160, c.height).data]")
        assert read_index(np.array(pixels).reshape(-1, 160, 4)[..., :3]) == round(25 * frame["second"])
    last.locator(".frame").last.click()
    film = page.locator("#preview video")
    page.wait_for_function("s => document.querySelector('#preview video').currentTime > s", arg=strong[-1]["second"])
    box = last.locator("svg").bounding_box()
    film.evaluate("v => { v.pause(); v.currentTime = 0; }")
    last.locator("svg").click(position={"x": 2 * box["width"] / 3, "y": 20})
    page.wait_for_function("() => document.querySelector('#preview video').currentTime >= 1.9")


def test_a_film_that_is_encoded(page, tmp_path, server, monkeypatch):
    """The page shows the progress until words arrive."""
    go_on, vision = threading.Event(), server.preparer._vision

    def slow(pixels):
        if len(chunks) > 1:
            assert go_on.wait(60)
        chunks.append(len(pixels))
        return vision(pixels)

    chunks = []
    monkeypatch.setattr(server.preparer, "_vision", slow)
    monkeypatch.setattr(preparing, "FRAME_CHUNK", 2)
    upload(page, write_clip(tmp_path / "long.mp4", [index_frame(i) for i in range(200, 425)]))
    ask(page, QUESTION)
    expect(words(page)).to_have_text(re.compile(r"^… [24] of 9 frames, \d+ s left$"))
    go_on.set()
    expect(words(page)).not_to_have_text(re.compile("^…"))


def test_a_reload_in_the_middle(page, clip, blocks, expected):
    """A pending question is asked again; a finished answer stays, with its evidence."""
    upload(page, clip)
    blocks.free = False
    ask(page, QUESTION)
    blocks.left.release()
    expect(words(page)).not_to_have_text("…")
    page.reload()
    expect(words(page)).to_have_text("…")
    blocks.go_on()
    for _ in range(2):
        expect(words(page)).to_have_text(expected[QUESTION].text)
        expect(page.locator(".turn")).to_have_count(2)
        expect(page.locator(".evidence canvas").first).to_have_js_property("width", 160)
        page.reload()


def test_an_upload_that_is_cut(page, tmp_path, clip, server, monkeypatch, expected):
    """After a reload, choosing the file again sends the rest; after a network error the upload resumes by itself."""
    film, cut, ranges, cuts = tmp_path / "film.mp4", 150_000, [], []
    reached, go_on = threading.Event(), threading.Event()
    film.write_bytes(clip.read_bytes() + (300_000).to_bytes(4) + b"free" + bytes(299_992))
    put = server.parts.put

    def slow(key, start, block):
        if start + len(block) > cut and not go_on.is_set():
            put(key, start, block[: max(0, cut - start)])
            reached.set()
            assert go_on.wait(60)
        put(key, start, block)

    def cut_once(route):
        if route.request.method == "PUT" and len(cuts) == 0:
            cuts.append(route)
            route.abort("connectionreset")
        else:
            route.continue_()

    monkeypatch.setattr(server.parts, "put", slow)
    page.on("request", lambda sent: sent.method == "PUT" and ranges.append(sent.headers["content-range"]))
    page.set_input_files("#file", film)
    expect(page.locator("#state")).to_have_text(re.compile(r"^uploading film.mp4: \d+ %, \d+ s left$"))
    assert reached.wait(60)
    page.reload()
    expect(page.locator("#state")).to_have_text(re.compile(r"^film.mp4: \d\d % are there; choose it again to go on$"))
    go_on.set()
    page.route("**/v1/uploads/*", cut_once)
    upload(page, film)
    first, *others = (int(re.match(r"bytes (\d+)-", said)[1]) for said in ranges)
    assert first == 0 and len(others) == 2 and min(others) >= cut - (1 << 16)
    ask(page, QUESTION)
    expect(words(page)).to_have_text(expected[QUESTION].text)
    assert server.uploads.path(page.evaluate("film.url")).read_bytes() == film.read_bytes()
    assert page.evaluate("Object.keys(localStorage).length") == 0
    with page.expect_request(lambda sent: sent.method == "PUT"):
        page.set_input_files("#file", film)  # the same file again on the same page


def test_a_link_is_played(browser, tiny_model, engine, tmp_path, clip, expected):
    """A film on another server, here the same one: a click on an evidence frame plays it from there."""
    server = make_server(tiny_model, engine, tmp_path, allow_private=True)
    key = server.uploads.add([clip.read_bytes()], clip.name, "user_data")["id"]
    for address in listening(server):
        page = browser.new_page()
        page.goto(address)
        page.get_by_label("or a link").fill(f"{address}/v1/files/{key}/content")
        page.get_by_role("button", name="Use").click()
        expect(page.locator("#state")).to_have_text("content")
        ask(page, QUESTION)
        expect(words(page)).to_have_text(expected[QUESTION].text)
        expect(page.locator(".evidence canvas").last).to_have_js_property("width", 160)
        page.locator(".frame").last.click()
        page.wait_for_function("() => document.querySelector('#preview video').currentTime > 2")
        page.get_by_label("or a link").fill("http://127.0.0.1:9/nothing.mp4")
        page.get_by_role("button", name="Use").click()
        expect(page.locator("#state.wrong")).to_contain_text("nothing.mp4 cannot be reached")
        page.close()


def test_stop_and_retry(page, clip, blocks, server, expected):
    upload(page, clip)
    blocks.free = False
    ask(page, QUESTION)
    blocks.left.release()
    expect(words(page)).not_to_have_text("…")
    page.get_by_role("button", name="Stop").click()
    expect(words(page)).to_have_text(re.compile(r"\(stopped\)$"))
    blocks.go_on()
    page.get_by_role("button", name="Retry").click()
    expect(words(page)).to_have_text(expected[QUESTION].text)
    expect(page.locator(".turn")).to_have_count(2)
    expect(page.get_by_role("button", name="Retry")).to_be_hidden()


def test_an_error_is_shown(page, tmp_path, clip, expected):
    """The next film can be asked about as usual."""
    (tmp_path / "notes.mp4").write_text("no film")
    upload(page, tmp_path / "notes.mp4")
    ask(page, QUESTION)
    expect(page.locator(".assistant.wrong .words")).to_contain_text("file-")
    expect(page.get_by_role("button", name="Retry")).to_be_visible()
    upload(page, clip)
    expect(page.locator(".turn")).to_have_count(0)
    ask(page, QUESTION)
    expect(words(page)).to_have_text(expected[QUESTION].text)


def test_two_tabs(page, address, clip, expected):
    """Two tabs of one browser, each with its own film: two conversations whose answers are not mixed up."""
    upload(page, clip)
    other = page.context.new_page()
    other.goto(address)
    expect(other.locator(".turn")).to_have_count(0)
    other.get_by_role("button", name=clip.name).click()
    ask(page, QUESTION)
    ask(other, OTHER)
    expect(words(page)).to_have_text(expected[QUESTION].text)
    expect(words(other)).to_have_text(expected[OTHER].text)


def test_keyboard_phone_and_dark(page, clip, expected):
    page.emulate_media(color_scheme="dark")
    page.set_viewport_size({"width": 360, "height": 700})
    upload(page, clip)
    page.keyboard.type(QUESTION)  # the question has the focus
    page.keyboard.press("Enter")
    expect(words(page)).to_have_text(expected[QUESTION].text)
    page.locator(".frame").last.focus()
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.querySelector('#preview video').currentTime > 2")
    for width in (360, 730):  # one column, and the narrowest window with two
        page.set_viewport_size({"width": width, "height": 700})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    colours = [page.evaluate("getComputedStyle(document.body).backgroundColor")]
    page.emulate_media(color_scheme="light")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") not in colours
    for name in ("Ask", re.compile("Play from 0:03")):
        expect(page.get_by_role("button", name=name).first).to_be_visible()


def test_a_key(browser, tiny_model, engine, tmp_path, clip, expected):
    for address in listening(make_server(tiny_model, engine, tmp_path, keys=("secret",))):
        page = browser.new_page()
        page.goto(address)
        page.get_by_label("API key").fill("secret")
        page.keyboard.press("Enter")
        expect(page.locator("#model")).to_have_text("tiny")
        upload(page, clip)
        ask(page, QUESTION)
        expect(words(page)).to_have_text(expected[QUESTION].text)
        expect(page.locator(".evidence canvas").first).to_have_js_property("width", 160)
        page.close()
