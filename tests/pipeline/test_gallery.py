"""The page of what was made: every clip is on it and plays, and what files say stays text."""

import base64
import hashlib
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest

from animatediff.media.video import save_video
from animatediff.utils import UserError
from scripts.gallery import main
from tests.config.test_infotext import SD15
from tests.media.foreign_files import as_png

HOSTILE = "</pre><script>document.title = 'x'</script><img src=x onerror=alert(1)> & \"q\" 'q' 狐 {{clips}} {{nothing}}"
FRAMES = np.zeros((3, 3, 8, 16), np.uint8)


class Page(HTMLParser):
    """What a browser sees: elements with their attributes, and the text of each kind of element."""

    def __init__(self, path: Path):
        super().__init__()
        self.elements, self.texts, self.open = [], [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag: str) -> list[dict]:
        return [attrs for name, attrs in self.elements if name == tag]

    def text(self, tag: str) -> str:
        return "".join(data for name, data in self.texts if name == tag)


def settings(prompt, seed: int = 7, **groups) -> dict:
    return {"prompts": {"prompt": [prompt]}, "sampling": {"seed": [seed]}, "size": {"height": 8, "width": 16}, **groups}


@pytest.fixture
def samples(tmp_path) -> Path:
    folder = tmp_path / "samples"
    odd = folder / "it's: 100% #1 & <b>"
    model = {"base": "models/plain.safetensors", "personalised": "models/<i>toon.safetensors", "loras": ["x/ink.pt"]}
    save_video(FRAMES, odd / "a?.gif", 8, settings(HOSTILE, model=model))
    save_video(FRAMES, odd / "b.mp4", 8, settings("a fox", seed=2**64 - 1))
    save_video(FRAMES, folder / "run/sample/frames 1", 8, settings({"0": "day", "2": "night"}))
    save_video(FRAMES, folder / "run/sample.gif", 8, {"prompts": ["a", "b"]})  # a grid
    save_video(FRAMES, folder / "elsewhere.webp", 8)
    save_video(FRAMES, folder / ".tmp-x/hidden.gif", 8)
    save_video(FRAMES, tmp_path / "made", 8)
    (folder / "inputs").mkdir()
    shutil.move(tmp_path / "made/0001.png", folder / "inputs/picture.png")
    (folder / "cut.gif").write_bytes(b"GIF89a")
    return folder


def test_the_page(samples, capsys):
    main([str(samples)])
    out, err = capsys.readouterr()
    assert "index.html: 5 clips" in out and "left out" in err and "cut.gif" in err
    page = Page(samples / "index.html")
    played = [unquote(e["src"]) for e in page.all("img") + page.all("video")]
    assert sorted(played) == sorted([
        "it's: 100% #1 & <b>/a?.gif", "it's: 100% #1 & <b>/b.mp4", "run/sample/frames 1/0000.png", "elsewhere.webp",
        "inputs/picture.png",
    ])  # fmt: skip
    flipped = next(e for e in page.all("img") if "data-frames" in e)
    assert flipped["data-fps"] == "8" and flipped["data-frames"].count("frames%201/000") == 3
    for element in page.all("a") + page.all("img") + page.all("video"):
        address = element.get("src") or element["href"]
        assert not re.match(r"[a-z]+:|/", address) and (samples / unquote(address)).exists()
    assert "day" in page.text("p") and "2: night" in page.text("p")
    assert {e["data-seed"] for e in page.all("article")} == {"", "7", str(2**64 - 1)}
    assert "toon" in page.text("li") and "ink" in page.text("li") and "plain" not in page.text("li")
    assert page.text("pre").count("scripts/animate.py --config") == 3, "none where nothing is known"


def test_what_files_say_stays_text(samples):
    main([str(samples)])
    page = Page(samples / "index.html")
    assert len(page.all("script")) == 1 and len(page.all("style")) == 1 and not page.all("i") and not page.all("b")
    assert not any(name.startswith("on") for _, attrs in page.elements for name in attrs)
    assert HOSTILE in page.text("p") and not re.search(r"https?:", page.source)
    (policy,) = (e["content"] for e in page.all("meta") if e.get("http-equiv"))
    for tag in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(page.text(tag).encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy


def test_huge_settings_are_cut(tmp_path):
    save_video(FRAMES, tmp_path / "x.gif", 8, settings("a " * 100_000))
    save_video(FRAMES, tmp_path / "y.gif", 8, {"prompt": [[1]], "sampling": 3, "steps": "</pre>"})  # no request
    save_video(FRAMES, tmp_path / "z.gif", 8, {"prompts": {"prompt": ["a", "b", "c"]}, "sampling": {"seed": [1, 2]}})
    main([str(tmp_path)])
    assert (tmp_path / "index.html").stat().st_size < 60_000
    assert Page(tmp_path / "index.html").text("p").count("no settings in the file") == 2


def test_where_it_is_written(samples, tmp_path):
    main([str(samples)])
    main([str(samples)])  # its own page is written anew
    main([str(samples), "--output", str(tmp_path / "page.html")])
    addresses = [e["src"] for e in Page(tmp_path / "page.html").all("img")]
    assert "samples/elsewhere.webp" in addresses
    (tmp_path / "empty").mkdir()
    (samples / "index.html").write_text("<title>my own page</title>")
    for arguments, message in (
        ([samples], "which is no gallery: choose another by --output"),
        ([tmp_path / "none"], "which is no folder"),
        ([tmp_path / "empty"], "in which there are no clips"),
        ([samples, "--output", tmp_path / "no/where.html"], "expected an existing folder"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            main(list(map(str, arguments)))
    assert (samples / "index.html").read_text() == "<title>my own page</title>"


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs a browser: apt-get install chromium")
def test_in_a_browser(samples, tmp_path):
    """From the disk: the page's own script runs, and nobody else's."""
    main([str(samples)])
    flags = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}")
    command = [shutil.which("chromium"), *flags, "--virtual-time-budget=2000", "--dump-dom"]
    shown = subprocess.run(
        [*command, (samples / "index.html").as_uri()], capture_output=True, text=True, timeout=120, env=os.environ
    ).stdout
    assert "<title>samples · AnimateDiff</title>" in shown
    assert ">5 clips</output>" in shown and 'id="seed"' in shown and 'aria-label="seed" hidden' not in shown


def test_what_other_programs_made_is_shown_with_their_settings(tmp_path):
    as_png(tmp_path / "theirs.png", parameters=SD15)
    main([str(tmp_path)])
    page = Page(tmp_path / "index.html")
    assert page.all("article")[0]["data-seed"] == "4294967295"
    assert "a cat on a (red:1.2) sofa" in page.text("p")
    assert page.text("li").startswith("my style v1") and "dreamshaper_8" in page.text("option")
    assert "program: AUTOMATIC1111" in page.text("pre") and "model.base: dreamshaper_8 879db523c3" in page.text("pre")
