"""The page of the demo: what it serves, in a browser without a window, and how it ends."""

import re
import shutil
import signal
import socket
import time
import urllib.request

import numpy as np
import pytest
from PIL import Image

from rear_jax.demo import page
from rear_jax.demo.studio import Studio
from rear_jax.errors import RearError
from rear_jax.runtime.mesh import make_mesh
from tests import toy
from tests.test_painter import networks_of

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WAIT = 120_000  # milliseconds, for programs to compile


def studio_of(config):
    return Studio(config, *networks_of(config), None, make_mesh(config.mesh))


@pytest.fixture(scope="module")
def address():
    """Of a page with toy networks."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    config = toy.config(demo__port=0, demo__max_upload_megabytes=1)
    with page.served(studio_of(config), config.demo) as found:
        yield found


@pytest.fixture(scope="module")
def browser():
    """Chromium, driven by Playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip("there is no browser: install chromium")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def tab(browser, address):
    """A fresh tab with the page open, and the addresses that it has asked for."""
    opened = browser.new_page(viewport={"width": 1280, "height": 1000})
    asked = []
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(address)
    opened.get_by_role("button", name="Draw", exact=True).wait_for(timeout=WAIT)
    yield opened, asked
    opened.close()


def text_file(folder):
    file = folder / "notes.txt"
    file.write_text("no image")
    return file


def image_file(folder):
    file = folder / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)).save(file)
    return file


def test_a_port_that_is_taken_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            RearError, match=rf"config\.demo\.port = {port}: the page cannot be there \(Address already"
        ):
            page.free_port("127.0.0.1", port)
    assert page.free_port("127.0.0.1", 0) > 0
    with pytest.raises(RearError, match="'no host'"):
        page.free_port("no host", 0)


@pytest.mark.slow
def test_the_page_names_no_other_site(address):
    with urllib.request.urlopen(address) as answer:
        text, policy = answer.read().decode(), answer.headers["content-security-policy"]
    others = {
        found for found in re.findall(r"https?://[^\s\"'<>\\]+", text) if not found.startswith(address.rstrip("/"))
    }
    assert others == set()
    assert "default-src 'self'" in policy
    assert address.startswith("http://127.0.0.1:")


@pytest.mark.slow
def test_a_browser_draws_and_changes_guidance(tab, address):
    opened, asked = tab
    opened.get_by_label("Classes").fill("Sandal, 3")
    opened.get_by_role("button", name="Draw", exact=True).click()
    status = opened.locator("#draw_status")
    status.get_by_text("4 of 4 images").wait_for(timeout=WAIT)
    pictures = opened.locator("#drawn .grid-container img")
    assert pictures.count() == 4
    first = [one.get_attribute("src") for one in pictures.all()]
    opened.get_by_role("spinbutton", name=re.compile("Guidance scale")).fill("7")
    opened.keyboard.press("Tab")
    opened.get_by_role("button", name="Draw", exact=True).click()
    deadline = time.monotonic() + WAIT / 1000
    while [one.get_attribute("src") for one in pictures.all()] == first and time.monotonic() < deadline:
        opened.wait_for_timeout(200)
    status.get_by_text("4 of 4 images").wait_for(timeout=WAIT)
    assert [one.get_attribute("src") for one in pictures.all()] != first
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []


@pytest.mark.slow
def test_a_browser_reads_an_image_and_changes_a_code(tab, tmp_path):
    opened, _ = tab
    opened.get_by_role("tab", name="Tokenizer").click()
    opened.locator("#tokenizer_file input[type=file]").set_input_files(image_file(tmp_path))
    status = opened.locator("#tokenizer_status")
    status.get_by_text("16 codes of 16").wait_for(timeout=WAIT)
    codes = opened.locator("#codes img")
    codes.wait_for(timeout=WAIT)
    codes.click(position={"x": 80, "y": 80})  # the picture has a margin
    status.get_by_text(re.compile(r"Code \d+ \(row \d, column \d\) was \d+ and is 0 now")).wait_for(timeout=WAIT)


@pytest.mark.slow
def test_a_browser_continues_an_image(tab, tmp_path):
    opened, _ = tab
    opened.get_by_role("tab", name="Exposure bias").click()
    opened.locator("#exposure_file input[type=file]").set_input_files(image_file(tmp_path))
    opened.get_by_role("button", name="Draw the rest").click()
    opened.locator("#exposure_status").get_by_text("3 of 3 images").wait_for(timeout=WAIT)
    assert opened.locator("#continued .grid-container img").count() == 4


@pytest.mark.slow
def test_a_text_file_is_refused_with_a_sentence(tab, tmp_path):
    opened, _ = tab
    opened.get_by_role("tab", name="Tokenizer").click()
    opened.locator("#tokenizer_file input[type=file]").set_input_files(text_file(tmp_path))
    opened.get_by_text(re.compile(r"notes\.txt is not a readable image")).wait_for(timeout=WAIT)


@pytest.mark.slow
def test_a_file_that_is_too_large_is_refused(tab, tmp_path):
    opened, _ = tab
    (tmp_path / "large.png").write_bytes(bytes(2 * 2**20))
    opened.get_by_role("tab", name="Tokenizer").click()
    opened.locator("#tokenizer_file input[type=file]").set_input_files(tmp_path / "large.png")
    opened.get_by_text(re.compile("exceed the maximum", re.IGNORECASE)).first.wait_for(timeout=WAIT)


@pytest.mark.slow
def test_a_second_user_waits(browser, address):
    """Two draw at once: both get their images."""
    users = [browser.new_page() for _ in range(2)]
    for user in users:
        user.goto(address)
        user.get_by_role("button", name="Draw", exact=True).wait_for(timeout=WAIT)
    for user in users:
        user.get_by_role("button", name="Draw", exact=True).click()
    for user in users:
        user.locator("#draw_status").get_by_text("8 of 8 images").wait_for(timeout=WAIT)
        user.close()


@pytest.mark.slow
def test_ctrl_c_ends_it_cleanly(trained, tmp_path):
    pytest.importorskip("gradio", reason="gradio is not installed")
    for name in ("tokenizer", "generator"):
        (tmp_path / name).symlink_to(trained / name)
    process = toy.start(tmp_path, "--job=demo", "--config.demo.port=0")
    address, deadline = None, time.monotonic() + 300
    while not address and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
        log = tmp_path / "log.txt"
        address = log.exists() and re.search(r"open (http://127\.0\.0\.1:\d+)", log.read_text())
    assert address
    with urllib.request.urlopen(address[1]) as answer:
        assert answer.status == 200
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "demo: ended" in (tmp_path / "log.txt").read_text()
    assert "Traceback" not in errors
