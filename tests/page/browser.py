"""The page for tests: a server of its own, what people do on it in a headless Chromium, and a client that is none."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


def require_browser() -> None:
    pytest.importorskip("gradio", reason='the page needs: pip install -e ".[web]"')
    pytest.importorskip("selenium", reason="the browser is driven by: pip install selenium")
    if not CHROMIUM or not DRIVER:
        pytest.skip("needs a browser: apt-get install chromium chromium-driver")


class Server:
    """scripts/app.py, or another script that serves the page, in a process of its own."""

    def __init__(self, folder: Path, *options: str, script: str = "scripts/app.py"):
        self.folder, self.options, self.script = folder, options, script
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        self.output = folder / "samples"
        self.start()

    def start(self) -> None:
        arguments = ["--port", str(self.port), "--device", "cpu", *self.options]
        environment = os.environ | {
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{ROOT}:{ROOT}/kernels",
        }
        environment.pop("GRADIO_TEMP_DIR", None)
        self.log = (self.folder / "log.txt").open("a")
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / self.script), *arguments],
            cwd=self.folder, env=environment, stdout=self.log, stderr=self.log,
        )  # fmt: skip
        until(lambda: self._answers() or self.process.poll() is not None, 90)
        assert self.process.poll() is None, (self.folder / "log.txt").read_text()

    def _answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.kill()
        self.log.close()

    def clips(self) -> list[Path]:
        return sorted(self.output.glob("*/sample/[!.]*"))


def until(condition, seconds: float = 30):
    """What a condition comes to, once it is true."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.05)
    return value


class Client:
    """A program that talks to the page as a browser does, and says what it likes."""

    def __init__(self, server: Server, session: str):
        self.server, self.session = server, session
        self.config = json.load(urllib.request.urlopen(server.url + "config", timeout=10))
        self.parts = {part["id"]: part["props"] for part in self.config["components"]}

    def press(self, button: str, changes: dict[str, object] | None = None) -> str:
        """Press a button, with these values in fields in place of what stands there; what the page answers."""
        pressed = next(i for i, props in self.parts.items() if props.get("elem_id") == button)
        event = next(d for d in self.config["dependencies"] if [pressed, "click"] in d["targets"])
        names = [(i, self.parts[i].get("elem_id", "")) for i in event["inputs"]]
        data = [(changes or {}).get(name, self.parts[i].get("value")) for i, name in names]
        said = {"data": data, "fn_index": event["id"], "session_hash": self.session, "event_data": None}
        body, head = json.dumps(said).encode(), {"Content-Type": "application/json"}
        api = self.server.url + "gradio_api/queue/"
        urllib.request.urlopen(urllib.request.Request(api + "join", body, head), timeout=10).close()
        with urllib.request.urlopen(f"{api}data?session_hash={self.session}", timeout=60) as lines:
            return next(text for line in lines if "process_completed" in (text := line.decode()))


class Browser:
    """A Chromium that a person sits before."""

    def __init__(self, profile: Path):
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        for flag in (
            "headless",
            "no-sandbox",
            "disable-gpu",
            "no-first-run",
            "disable-background-networking",
            "disable-component-update",
            "disable-sync",
            f"user-data-dir={profile}",
            "window-size=1280,900",
        ):
            options.add_argument(f"--{flag}")  # fmt: skip
        options.binary_location = CHROMIUM
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(DRIVER))
        self.driver.get_log("performance")  # of the empty page it begins with

    def open(self, server: Server) -> None:
        self.driver.get(server.url)
        until(lambda: self.all("#animate"))
        time.sleep(1.5)  # Gradio's events are bound after its components are there

    def all(self, css: str) -> list:
        return self.driver.find_elements("css selector", css)

    def one(self, css: str):
        return until(lambda: self.all(css))[0]

    def text(self, css: str) -> str:
        """What stands there; "" where it is redrawn just now."""
        read = "return [...document.querySelectorAll(arguments[0])].map(e => e.innerText).join('\\n')"
        return self.driver.execute_script(read, css)

    def unfold(self, section: str) -> None:
        button = next(b for b in self.all(".section button") if b.text.strip().startswith(section))
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
        button.click()
        time.sleep(0.4)

    def fill(self, element: str, value: str) -> None:
        from selenium.webdriver.common.keys import Keys

        field = self.one(f"#{element} :is(input, textarea)")
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(Keys.DELETE)
        field.send_keys(value, Keys.TAB)

    def value(self, element: str) -> str:
        return self.one(f"#{element} :is(input, textarea)").get_attribute("value")

    def upload(self, element: str, path: Path) -> None:
        self.one(f"#{element} input[type=file]").send_keys(str(path))

    def click(self, css: str) -> None:
        button = self.one(css)
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
        button.click()

    def wait_for(self, css: str, text: str, seconds: float = 30) -> str:
        """The text there, once it holds `text`."""
        return until(lambda: text in (found := self.text(css)) and found, seconds)

    def animate(self, prompt: str, steps: int = 3) -> None:
        self.fill("prompt", prompt)
        if not self.all("#f-sampling-steps"):
            self.unfold("Sampling")
        self.fill("f-sampling-steps", str(steps))
        self.click("#animate")

    def clip(self, seconds: float = 60) -> str:
        """The address of the clip on the stage, once it is made."""
        done = "#stage .stage:not(.busy) :is(img, video)"
        return until(lambda: self.all(done), seconds)[0].get_attribute("src")

    def addresses(self) -> set[str]:
        """Whatever was asked for since the last call."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}

    def screenshot(self, name: str, *, width: int) -> None:
        """A small PNG in docs/, where ANIMATEDIFF_SCREENSHOTS is set."""
        if "ANIMATEDIFF_SCREENSHOTS" not in os.environ:
            return
        import io

        from PIL import Image

        picture = Image.open(io.BytesIO(self.driver.get_screenshot_as_png())).convert("RGB")
        picture = picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)
        picture.quantize(128).save(ROOT / "docs" / name, optimize=True)
