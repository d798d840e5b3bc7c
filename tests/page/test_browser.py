"""What people do on the page, in a real browser."""

import pickle
import time
import urllib.error
import urllib.parse
import urllib.request

import numpy as np
import pytest

from animatediff.media.video import read_metadata, save_video
from animatediff.page.places import ASSETS
from tests.page.browser import Browser, Client, Server, require_browser, until

pytestmark = pytest.mark.web
PROMPT = "a small orange cross bouncing on a beige background"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    require_browser()
    folder = tmp_path_factory.mktemp("page")
    (folder / "models/Motion_Module").mkdir(parents=True)
    (folder / "models/Motion_Module/lora.safetensors").write_bytes(
        (ASSETS / "shapes_neon_lora.safetensors").read_bytes()
    )
    (folder / "secret.txt").write_text("top secret")
    server = Server(folder, "--max-upload-mb", "1")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def chromium(server, tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.driver.quit()


@pytest.fixture
def browser(chromium, server):
    """On a page that was just opened; whatever a test did, it asked for nothing beyond the page's own address."""
    chromium.driver.switch_to.new_window("tab")
    chromium.open(server)
    yield chromium
    others = {a for a in chromium.addresses() if not a.startswith((server.url, "data:", "blob:", "chrome:", "about:"))}
    chromium.driver.close()
    chromium.driver.switch_to.window(chromium.driver.window_handles[0])
    assert not others


def test_the_first_clip(browser, server):
    """One click: steps, time, a preview, then the clip, which is the one in samples/ and says what made it."""
    before = server.clips()
    browser.fill("prompt", PROMPT)
    browser.click("#animate")
    browser.wait_for("#stage", "Step")
    until(lambda: browser.all("#stage img.preview"))
    browser.wait_for("#stage", "s left")
    source = browser.clip()
    (made,) = set(server.clips()) - set(before)
    assert source == server.url + "gradio_api/file=" + urllib.parse.quote(str(made))
    assert read_metadata(made)["prompt"] == PROMPT
    assert (made.parents[1] / "config.yaml").is_file()
    assert browser.driver.execute_script("return document.querySelector('#stage img').naturalWidth") == 64
    until(lambda: browser.all("#gallery img"))
    browser.screenshot("page.png", width=960)


def test_an_example_is_one_click(browser, server):
    browser.click("#examples button:nth-of-type(2)")
    until(lambda: "large red square" in browser.value("prompt"))
    browser.wait_for("#stage", "Step")
    browser.click("#cancel")
    browser.wait_for("#stage", "Cancelled.")
    browser.click("#examples button:last-of-type")  # from a clip that is shipped
    browser.wait_for("#stage", "Step")
    browser.unfold("Video in")
    assert browser.one("#f-inputs-video").text.split()[-1] and browser.all(".note img")
    browser.click("#cancel")
    browser.wait_for("#stage", "Cancelled.")


def test_cancel_stops_within_a_step(browser, server):
    before = set(server.output.glob("page-*"))
    browser.animate(PROMPT, steps=500)
    browser.wait_for("#stage", "Step 2")
    browser.click("#cancel")
    start = time.monotonic()
    browser.wait_for("#stage", "Cancelled.")
    assert time.monotonic() - start < 5
    assert set(server.output.glob("page-*")) == before, "nothing is left of it"
    assert not browser.one("#cancel").is_enabled()


def test_wrong_values_are_told_beside_their_fields(browser, server):
    before = server.clips()
    browser.unfold("Size and length")
    browser.fill("f-size-height", "100")
    browser.fill("f-size-num_frames", "0")
    browser.fill("prompt", "")
    browser.click("#animate")
    browser.wait_for("#f-size-height", "Got 100, expected a multiple of 8: use 96")
    assert "Got 0, expected at least 1" in browser.text("#f-size-num_frames")
    browser.fill("f-size-height", "64")
    browser.fill("f-size-num_frames", "40")
    browser.click("#animate")
    until(lambda: "Got" not in browser.text("#f-size-height"))  # what was corrected is not told again
    assert "Say what to show." in browser.text("#prompt .info-text")
    browser.fill("prompt", "a")
    browser.click("#animate")
    browser.wait_for("#f-size-num_frames", "Got 40 frames, expected at most 32")
    assert browser.text("#message") == "One thing is to be corrected."
    assert server.clips() == before


def test_a_file_that_does_not_fit_is_named_before_the_run(browser):
    browser.unfold("Model")
    browser.click("#f-model-motion_module input")
    option = until(lambda: [o for o in browser.all("[role=option]") if "lora.safetensors" in o.text])[0]
    assert option.text.strip().endswith("✕ lora.safetensors · LoRA of an image model, float16")
    option.click()
    browser.wait_for("#f-model-motion_module", "this is a LoRA of an image model, not a motion module")


def test_gallery_and_its_settings(browser, server):
    browser.animate("a large red star spinning clockwise on a white background", steps=2)
    browser.clip()
    browser.open(server)
    assert browser.value("prompt") != "a large red star spinning clockwise on a white background"
    browser.click("#gallery button.thumbnail-item")
    browser.wait_for("#settings", "a large red star spinning clockwise")
    browser.click("#use")
    until(lambda: browser.value("prompt") == "a large red star spinning clockwise on a white background")
    browser.unfold("Sampling")
    assert browser.value("f-sampling-steps") == "2"
    assert browser.value("f-sampling-seed") == "3"


def test_settings_come_back_from_a_clip_that_is_dropped(browser, server, tmp_path):
    made = tmp_path / "mine.gif"
    browser.animate(PROMPT + ", dropped", steps=2)
    browser.clip()
    made.write_bytes(max(server.clips(), key=lambda clip: clip.stat().st_mtime).read_bytes())
    browser.open(server)
    browser.unfold("Settings from a clip")
    browser.upload("drop", made)
    until(lambda: browser.value("prompt") == PROMPT + ", dropped")
    strange = tmp_path / "strange.gif"
    save_video(np.zeros((2, 8, 8, 3), np.uint8), strange)
    browser.upload("drop", strange)
    browser.wait_for(".note", "got strange.gif, which holds no settings")


def test_hostile_uploads(browser, server, tmp_path):
    """A pickle that calls itself a picture is named; one that is too large never gets in."""

    class Bomb:
        def __reduce__(self):
            return open, (str(tmp_path / "exploded"), "w")

    bomb, large = tmp_path / "bomb.png", tmp_path / "large.png"
    bomb.write_bytes(pickle.dumps(Bomb()))
    large.write_bytes(b"\x89PNG" + bytes(2**21))
    browser.unfold("First and last frame")
    browser.upload("f-inputs-image", bomb)
    browser.wait_for("#options .note", "got bomb.png, expected a picture")
    browser.click("#animate")
    browser.wait_for("#message", "One thing is to be corrected.")
    browser.upload("f-inputs-last_image", large)
    browser.wait_for("body", "maximum allowed size")
    assert not (tmp_path / "exploded").exists()
    assert not [path for path in (server.output / "inputs").iterdir() if path.stat().st_size > 2**20]


def test_no_path_leads_out(browser, server):
    """Neither an address, nor an option, nor a message to Gradio."""
    for path in (
        server.folder / "secret.txt",
        f"{server.output}/../secret.txt",
        f"{server.output}/%2e%2e/secret.txt",
        "/etc/passwd",
        "secret.txt",
        "..%2fsecret.txt",
    ):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{server.url}gradio_api/file={path}", timeout=10)
        assert refused.value.code in (403, 404)
    browser.unfold("More options")
    browser.fill("more", f"video={server.folder}/secret.txt")
    browser.click("#animate")
    browser.wait_for(".section", "expected a file in models or samples: put it there")
    request = urllib.request.Request(server.url, headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=10)
    assert refused.value.code == 400, "no foreign name stands for this machine"


def test_two_tabs_do_not_disturb_each_other(browser, server):
    first = browser.driver.current_window_handle
    browser.animate("a blue circle growing on a beige background, first tab", steps=40)
    browser.wait_for("#stage", "Step")
    browser.driver.switch_to.new_window("tab")
    browser.open(server)
    assert browser.text("#stage") == "Your clip appears here."
    assert not browser.one("#cancel").is_enabled(), "another tab's clip is not this one's to call off"
    browser.animate("second tab", steps=2)
    browser.wait_for("#stage", "Waiting, 1 before it")
    browser.click("#cancel")
    browser.wait_for("#stage", "Cancelled.")
    browser.driver.close()  # a client that goes away
    browser.driver.switch_to.window(first)
    browser.driver.refresh()
    browser.wait_for("#stage", "Step")
    browser.clip()


def test_keyboard_only(browser, server):
    """From the top of the page by Tab: the prompt, the button, a section; nothing that is on the way traps."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    def press(*keys):
        ActionChains(browser.driver).send_keys(*keys).perform()
        time.sleep(0.15)

    def focus():
        return browser.driver.execute_script(
            "const e = document.activeElement; return e.closest('[id]')?.id + ' ' + (e.innerText || e.ariaLabel || '')"
        )

    def tab_to(part):
        for _ in range(40):
            press(Keys.TAB)
            if part in focus():
                return
        raise AssertionError(f"{part} is not reached")

    browser.driver.execute_script("document.activeElement.blur()")
    tab_to("prompt")
    ActionChains(browser.driver).key_down(Keys.CONTROL).send_keys("a").key_up(Keys.CONTROL).perform()
    press("a pink square shrinking on a black background, typed")
    tab_to("animate")
    press(Keys.ENTER)
    browser.wait_for("#stage", "Step")
    tab_to("cancel")
    press(Keys.ENTER)
    browser.wait_for("#stage", "Cancelled.")
    tab_to("Model")
    press(Keys.ENTER)
    until(lambda: any(field.is_displayed() for field in browser.all("#f-model-base")))


def test_a_phone(browser, server):
    """Nothing is wider than the screen; the result comes before the options."""
    size = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        browser.open(server)
        browser.animate("a large cyan triangle rising upwards on a black background", steps=6)
        browser.clip()
        for section in ("Size and length", "Video in", "Prompt travel"):
            browser.unfold(section)
        assert browser.driver.execute_script("return document.documentElement.scrollWidth") <= 390
        tops = [browser.one(f"#{part}").rect["y"] for part in ("ask", "result", "options", "made")]
        assert tops == sorted(tops)
        browser.driver.execute_script("window.scrollTo(0, 0)")
        time.sleep(0.5)
        browser.screenshot("page-phone.png", width=390)
    finally:
        browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_killed_in_the_middle_and_started_again(chromium, tmp_path):
    """What was finished is there, what was not is named, and made when asked for."""
    server = Server(tmp_path)
    try:
        chromium.open(server)
        chromium.animate("finished", steps=2)
        chromium.clip()
        chromium.animate("in the middle", steps=30)
        chromium.wait_for("#stage", "Step 2")
        chromium.animate("not yet begun", steps=2)
        chromium.wait_for("#jobs", "Waiting, 1 before it")
        server.kill()
        server.start()
        chromium.open(server)
        told = chromium.wait_for("#unfinished", "2 clips were not finished")
        assert "in the middle" in told and "not yet begun" in told
        assert [clip.name for clip in server.clips()] == ["0-finished.gif"]
        chromium.click("#resume")
        until(lambda: len(server.clips()) == 3, 90)
        assert {clip.name for clip in server.clips()} == {
            "0-finished.gif",
            "0-in-the-middle.gif",
            "0-not-yet-begun.gif",
        }
        chromium.wait_for("body", "Made so far")
        assert not any(part.is_displayed() for part in chromium.all("#unfinished"))
    finally:
        server.stop()


def test_a_password(tmp_path):
    require_browser()
    server = Server(tmp_path, "--password", "sesame")
    try:
        assert b'"auth_required":true' in urllib.request.urlopen(server.url, timeout=10).read().replace(b" ", b"")
        for path in ("config", "gradio_api/file=samples/page.jsonl"):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(server.url + path, timeout=10)
            assert refused.value.code in (401, 403)
        for password, code in (("open", 400), ("sesame", 200)):
            form = urllib.parse.urlencode({"username": "me", "password": password}).encode()
            try:
                got = urllib.request.urlopen(server.url + "login", form, timeout=10).status
            except urllib.error.HTTPError as error:
                got = error.code
            assert got == code
    finally:
        server.stop()


def test_a_client_that_is_no_browser(server):
    """Whatever is sent in place of a form: no file is read, no clip is made, and the server goes on."""

    secret = str(server.folder / "secret.txt")
    file = {"path": secret, "meta": {"_type": "gradio.FileData"}, "orig_name": "a.png"}
    before = server.clips()
    for number, changes in enumerate((
        {"f-model-base": "/etc/passwd"},
        {"f-inputs-image": file},
        {"f-inputs-image": {**file, "path": f"{server.output}/../secret.txt"}},
        {"f-inputs-image": {**file, "path": None, "url": f"file://{secret}"}},
        {"f-inputs-video": [file]},
        {"f-size-num_frames": "nan"},
        {"f-size-num_frames": 1e300},
        {"f-size-height": {"a": 1}},
        {"travel": {"headers": [], "data": [[{"x": 1}, ["y"]]], "metadata": None}},
        {"prompt": None, "more": "\0"},
        {"more": "video=" + secret},
        {"more": "model.base=" + secret},
    )):  # fmt: skip
        answer = Client(server, f"stranger{number}").press("animate", changes)
        assert "root:" not in answer and "top secret" not in answer, changes
        assert '"success":false' in answer or "to be corrected" in answer or '"error"' in answer, (
            changes,
            answer[:2000],
        )
    assert server.clips() == before
    assert '"success":true' in Client(server, "good").press("animate", {"f-sampling-steps": "1"})
    until(lambda: len(server.clips()) == len(before) + 1)
