"""The page in a headless Chromium, with a recorded file as the microphone.

Not run where there is no Chromium (``apt-get install chromium``).
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import uvicorn

from nemo_emmett.models.inputs import is_recording
from nemo_emmett.prompts.answers import Answer
from nemo_emmett.serving.server import Server, bind

from .serving import TRAINED, Served, StubModel, encoded, served, tone

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")

SHOWN = "#result:not([hidden]) #translation"


class Listener(StubModel):
    """Names the pitch of a recording, as transcript and translation."""

    def answer_inputs(self, inputs, sources, targets, **options) -> list[Answer]:
        answers = []
        for item, source, target in zip(inputs, sources, targets, strict=True):
            if not is_recording(item):
                answers.append(Answer(f"{source} to {target}: {item.upper()}"))
                continue
            spectrum = np.abs(np.fft.rfft(item.samples * np.hanning(len(item.samples))))
            pitch = np.argmax(spectrum) * item.sampling_rate / len(item.samples)
            answers.append(Answer(f"{target}: {round(pitch, -1):.0f} Hz", f"{source}: a tone"))
        return answers


@contextmanager
def listening(server: Served) -> Iterator[str]:
    """The address of an application that listens."""
    socket = bind("127.0.0.1", 0)
    process = Server(uvicorn.Config(server.app, log_level="warning"), server.traffic)
    thread = threading.Thread(target=process.run, kwargs={"sockets": [socket]})
    thread.start()
    while not process.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{socket.getsockname()[1]}"
    finally:
        process.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def microphone(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("microphone") / "tone.wav"
    path.write_bytes(encoded(tone(10.0, 1000.0, 48000), 48000))
    return path


@pytest.fixture(scope="module")
def browser(microphone) -> Iterator:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        made = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox",
                "--use-fake-ui-for-media-stream",
                "--use-fake-device-for-media-stream",
                f"--use-file-for-fake-audio-capture={microphone}",
                "--autoplay-policy=no-user-gesture-required",
            ],
        )
        yield made
        made.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(Listener(), TRAINED, audio_seconds=20.0, upload_bytes=2 * 2**20) as made:
        yield made


@pytest.fixture(scope="module")
def url(server) -> Iterator[str]:
    with listening(server) as address:
        yield address


@contextmanager
def opened(browser, url: str, width: int, height: int) -> Iterator:
    """The page, of which nothing is asked of another server and in which no script fails."""
    context = browser.new_context(viewport={"width": width, "height": height}, permissions=["microphone"])
    page, asked, faults = context.new_page(), [], []
    page.on("request", lambda one: asked.append(one.url))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if "Security Policy" in message.text else None)
    page.goto(url)
    page.wait_for_selector("#model:has-text('tiny')")
    yield page
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "it scrolls sideways"
    assert [one for one in asked if not one.startswith((url, "blob:", "data:"))] == []
    assert faults == []
    context.close()


@pytest.fixture
def page(browser, url) -> Iterator:
    """On a phone."""
    with opened(browser, url, 360, 740) as made:
        yield made


def played_seconds(page) -> float:
    """How long the recording is that can be heard."""
    seconds = "new Promise((loaded) => { const p = document.querySelector('#player'); "
    seconds += "p.readyState ? loaded(p.duration) : p.addEventListener('loadedmetadata', () => loaded(p.duration)); })"
    return page.evaluate(seconds)


@pytest.mark.parametrize(("width", "height"), [(320, 568), (360, 740), (1280, 800)])
def test_text(browser, url, width: int, height: int) -> None:
    with opened(browser, url, width, height) as page:
        page.select_option("#target", "de")
        page.fill("#text", "one red house")
        page.click("#translate-text")
        assert page.text_content(SHOWN) == "en to de: ONE RED HOUSE"
        assert not page.is_visible("#transcript-part")


def test_the_keyboard_alone(page) -> None:
    page.keyboard.press("Tab")
    seen = []
    for _ in range(9):
        seen.append(page.evaluate("document.activeElement.id"))
        outline = page.evaluate(
            "[document.activeElement, document.querySelector('#choose')].some("
            "(e) => getComputedStyle(e).outlineStyle === 'solid')"
        )
        assert outline, f"the focus on {seen[-1]} cannot be seen"
        if seen[-1] == "text":
            break
        page.keyboard.press("Tab")
    assert seen == ["source", "target", "record", "file", "text"]
    page.keyboard.type("six")
    page.keyboard.press("Control+Enter")
    assert page.text_content(SHOWN).endswith("to en: SIX")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "translate-text"


def test_a_recording_of_the_microphone(page) -> None:
    page.select_option("#target", "de")
    page.click("#record")
    page.wait_for_selector("#record:has-text('Stop (1')")
    assert page.get_attribute("#record", "aria-pressed") == "true"
    page.click("#record")
    assert page.text_content(SHOWN) == "de: 1000 Hz"
    assert page.text_content("#transcript") == "en: a tone"
    assert page.is_visible("#transcript")
    assert played_seconds(page) > 0.9
    assert page.text_content("#record") == "Record"


@pytest.mark.parametrize(("how", "kind"), [("choose", "WAV"), ("choose", "MP3"), ("drop", "FLAC")])
def test_a_file(page, how: str, kind: str) -> None:
    audio = encoded(tone(0.8, 500.0), kind=kind)
    page.select_option("#target", "de")
    if how == "choose":
        file = {"name": f"a.{kind.lower()}", "mimeType": "audio/x", "buffer": audio}
        page.set_input_files("#file", [file])
    else:
        page.evaluate(
            """([name, bytes]) => {
                const data = new DataTransfer();
                data.items.add(new File([new Uint8Array(bytes)], name));
                document.querySelector("#drop").dispatchEvent(
                    new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true}));
            }""",
            [f"a.{kind.lower()}", list(audio)],
        )
    page.click("#translate-speech")
    assert page.text_content(SHOWN) == "de: 500 Hz"
    assert played_seconds(page) == pytest.approx(0.8, abs=0.1)


def test_a_recording_in_its_own_language_is_transcribed(page, server) -> None:
    page.select_option("#target", "en")
    page.select_option("#source", "en")
    page.set_input_files("#file", [{"name": "a.wav", "mimeType": "audio/wav", "buffer": encoded(tone(0.5))}])
    page.click("#translate-speech")
    assert page.text_content(SHOWN) == "en: 440 Hz"
    assert 'path="/v1/audio/transcriptions",status="200"' in server.metrics.text().decode()


@pytest.mark.parametrize(
    ("name", "audio", "sentence"),
    [
        ("empty.wav", b"", "empty.wav is empty."),
        ("broken.wav", encoded(tone(1.0))[:9000], "file: the recording breaks off before its end"),
        ("long.flac", encoded(tone(21.0), kind="FLAC"), "lasts 21 s, more than the 20 s that are allowed"),
        ("large.wav", bytes(3 * 2**20), "large.wav is larger than the 2 MiB that the server takes."),
        ("notes.txt", b"some notes", "notes.txt is no recording that can be read."),
    ],
)
def test_what_is_wrong_is_said(page, name: str, audio: bytes, sentence: str) -> None:
    page.set_input_files("#file", [{"name": name, "mimeType": "audio/x", "buffer": audio}])
    if page.is_visible("#recording"):
        page.click("#translate-speech")
    page.wait_for_selector("#error:not([hidden])")
    assert sentence in page.text_content("#error")
    page.fill("#text", "six")
    page.click("#translate-text")
    assert page.text_content(SHOWN).endswith("SIX")
    assert not page.is_visible("#error")


def test_nothing_typed_is_said_too(page) -> None:
    page.click("#translate-text")
    assert page.text_content("#error") == "Type a text first."
    assert page.evaluate("document.activeElement.id") == "text"


def test_a_server_with_a_key_asks_for_it(browser) -> None:
    with served(Listener(), TRAINED, api_key="s3cret") as server, listening(server) as url:
        page = browser.new_page()
        page.goto(url)
        page.wait_for_selector("#key-form:not([hidden])")
        page.fill("#key", "wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("#error:not([hidden])")
        page.fill("#key", "s3cret")
        page.keyboard.press("Enter")
        page.wait_for_selector("#model:has-text('tiny')")
        assert not page.is_visible("#key-form")
        page.fill("#text", "six")
        page.click("#translate-text")
        assert page.text_content(SHOWN).endswith("SIX")
        page.close()


def test_a_model_without_speech_and_a_server_that_is_gone(browser) -> None:
    model = Listener()
    model.perception = None
    with served(model, TRAINED) as server:
        with listening(server) as url:
            page = browser.new_page()
            page.goto(url)
            page.wait_for_selector("#model:has-text('tiny')")
            assert not page.is_visible("#record")
        page.fill("#text", "six")
        page.click("#translate-text")
        page.wait_for_selector("#error:not([hidden])")
        assert page.text_content("#error") == "The server does not answer. Is it running?"
        page.close()
