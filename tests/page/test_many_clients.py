"""Fifty clips of two people through the real server, which is killed in the middle."""

import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from animatediff.media.video import read_metadata
from tests.page.browser import Client, Server, until

pytestmark = pytest.mark.web
pytest.importorskip("gradio", reason='the page needs: pip install -e ".[web]"')
CLIPS, BEFORE = 50, 20  # in all, and before the server is killed


def titles(server: Server) -> list[str]:
    return sorted(read_metadata(clip)["prompt"] for clip in server.clips())


def test_fifty_clips_of_two_people_and_a_server_that_is_killed(tmp_path):
    """Nothing that was finished is lost; the one in the middle and those behind it are named, and made once."""
    (tmp_path / "hold").write_text(str(BEFORE))
    server = Server(tmp_path, script="tests/page/drawn_page.py")

    def queue(person: int) -> None:  # and goes away: nobody listens when the clips are made
        client = Client(server, f"person{person}")
        for n in range(person, CLIPS, 2):
            answer = client.press("animate", {"prompt": f"clip {n}"})
            assert '"success":true' in answer and "to be corrected" not in answer

    try:
        with ThreadPoolExecutor(2) as people:
            list(people.map(queue, range(2)))
        until(lambda: len(server.clips()) == BEFORE)
        server.kill()
        finished = {clip: clip.read_bytes() for clip in server.clips()}
        done = titles(server)
        (tmp_path / "hold").unlink()
        server.start()
        client = Client(server, "somebody")
        (told,) = [text for part in client.parts.values() if "last stopped" in (text := str(part.get("value")))]
        named = re.findall(r"<li>(clip \d+)</li>", told)
        assert f"{CLIPS - BEFORE} clips were not finished" in told and len(named) == 8
        assert f"and {CLIPS - BEFORE - 8} more" in told and not set(named) & set(done)
        client.press("resume")
        until(lambda: len(server.clips()) == CLIPS)
        assert titles(server) == sorted(f"clip {n}" for n in range(CLIPS))
        assert all(clip.read_bytes() == content for clip, content in finished.items())
    finally:
        server.stop()
