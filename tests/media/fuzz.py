"""Damages media files at random and reads them: python -m tests.media.fuzz SEED COUNT [FORMAT …]

Every mutant is read by all readers. Each has to give frames and settings that can be, or the one-line error that users
see, within 10 s and 2 GiB; anything else ends the process with a message. The outcome is printed as JSON.
"""

import faulthandler
import json
import math
import random
import struct
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from animatediff.media.comments import KNOWN, as_exif
from animatediff.media.mp4 import write_mp4
from animatediff.media.pictures import fit_pictures, read_mask, read_picture
from animatediff.media.seek import MAX_BYTES, UnusableVideo, probe, read_frames
from animatediff.media.video import is_complete, read_metadata, read_video
from animatediff.utils import UserError
from tests.media.videos import numbered

SECONDS, BYTES = 10, 2**31  # that one mutant may take
NUMBERS = [0, 1, 2, 127, 128, 255, 256, 32767, 65535, 2**31 - 1, 2**31, 2**32 - 1]
VALUES = ["0", "-1", "1e7", "1e400", "NaN", "null", "true", '"8"', "[8]", "{}", "9" * 5000, "[" * 2000, "1000000000000"]
KEYS = ["frames", "fps", "prompt", "seed", "negative_prompt", "prompts", "duration"]


def write_seed(path: Path, comment: str) -> None:
    """A small clip or picture in the format that its name ends in."""
    frames = numbered(5)[:, ::2, ::2].copy()
    frames[:, 4:8, 4:20] = np.random.default_rng(0).integers(0, 256, (5, 4, 16, 3), dtype=np.uint8)
    first, *rest = map(Image.fromarray, frames)
    text = PngInfo()
    text.add_text("Comment", comment)
    match path.suffix:
        case ".mp4":
            write_mp4(frames, path, 8, comment)
        case ".png":
            first.save(path, pnginfo=text)
        case ".apng":
            first.save(path, "PNG", pnginfo=text, save_all=True, append_images=rest, duration=125)
        case ".gif":
            first.save(path, comment=comment.encode(), save_all=True, append_images=rest, duration=120)
        case ".webp":
            first.save(path, exif=as_exif(comment), save_all=True, append_images=rest, duration=125)
        case ".jpg":
            first.save(path, comment=comment.encode(), exif=as_exif(comment))


FORMATS = (".png", ".apng", ".gif", ".webp", ".jpg", ".mp4")


def strange_comment(rng: random.Random) -> str:
    pairs = [f'"{rng.choice(KEYS)}": {rng.choice(VALUES)}' for _ in range(rng.randint(1, 4))]
    return rng.choice(["{" + ", ".join(pairs) + "}", "[" * 3000, "\x1b[2J", '{"frames": 5'])


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Some damage: bits, bytes, numbers, pieces cut out, doubled, moved or exchanged, the end cut off."""
    damaged = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        at = rng.randrange(max(len(damaged), 1))
        if rng.random() < 0.5:
            at = rng.randrange(max(min(len(damaged), 400), 1))  # where headers are
        piece = bytes(damaged[at : at + rng.choice([1, 4, 16, 64, 256])])
        match rng.randrange(7):
            case 0:
                damaged[at : at + 1] = bytes([(damaged[at] if damaged else 0) ^ 1 << rng.randrange(8)])
            case 1:
                damaged[at : at + 1] = bytes([rng.randrange(256)])
            case 2:
                damaged[at : at + 4] = struct.pack(rng.choice("<>") + "I", rng.choice(NUMBERS))
            case 3:
                damaged[at : at + 2] = struct.pack(rng.choice("<>") + "H", rng.choice(NUMBERS) & 0xFFFF)
            case 4:
                del damaged[at : at + len(piece)]
            case 5:
                there = rng.randrange(len(damaged) + 1)
                damaged[there:there] = piece
            case 6:
                if rng.random() < 0.3:
                    del damaged[at:]
    return bytes(damaged)


def with_checksums(data: bytes) -> bytes:
    """A PNG whose chunks have right checksums again, as far as their lengths go: damage that is not noticed at once."""
    fixed, at = bytearray(data), 8
    while at + 12 <= len(fixed):
        end = at + 8 + int.from_bytes(fixed[at : at + 4], "big")
        if end + 4 > len(fixed):
            break
        fixed[end : end + 4] = struct.pack(">I", zlib.crc32(fixed[at + 4 : end]))
        at = end + 4
    return bytes(fixed)


def read_all(path: Path) -> Counter:
    """What comes of a file, by reader; raises anything but the errors that are meant for users."""
    readers: dict[str, Callable[[], object]] = {
        "video": lambda: check_clip(*read_video(path)),
        "video at another speed": lambda: check_clip(*read_video(path, most=3, start=1, fps=5)),
        "settings": lambda: check_settings(read_metadata(path)),
        "complete": lambda: is_complete(path),
    }
    if path.suffix == ".mp4":
        readers["header"] = lambda: probe(path)
        readers["training"] = lambda: read_frames(path, start=1, stride=2, count=2, cover=(16, 16))
    else:
        readers["picture"] = lambda: check_clip(read_picture(path)[None], 1)
        readers["fitted"] = lambda: fit_pictures([path], 8, 8)
        readers["mask"] = lambda: read_mask(path, height=24, width=32)
    outcome: Counter = Counter()
    for name, read in readers.items():
        try:
            read()
        except (UserError, UnusableVideo) as error:
            assert "\n" not in str(error), (name, str(error))
            outcome[f"{name}: refused"] += 1
        else:
            outcome[f"{name}: read"] += 1
    return outcome


def check_clip(frames, fps: float) -> None:
    assert frames.ndim == 4 and frames.shape[-1] == 3 and len(frames) and np.asarray(frames).dtype == np.uint8
    assert np.asarray(frames).nbytes <= MAX_BYTES and 0 < fps < math.inf


def check_settings(settings: dict) -> None:
    assert all(KNOWN[key](value) for key, value in settings.items() if key in KNOWN)


def limit_memory() -> None:
    """Let the system refuse more than 2 GiB beyond what is held by now, where it can."""
    try:
        import resource
    except ImportError:
        return
    held = (
        int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if Path("/proc").exists() else 0
    )
    if held:
        resource.setrlimit(resource.RLIMIT_AS, (held + BYTES, resource.RLIM_INFINITY))


def main(seed: int, count: int, formats: tuple[str, ...]) -> None:
    totals = {}
    with tempfile.TemporaryDirectory() as folder:
        for form in formats:
            path, comment = Path(folder) / f"x{form}", json.dumps({"prompt": "a fox", "frames": 5, "fps": 8})
            write_seed(path, comment)
            original, frames = path.read_bytes(), read_video(path)[0]
            limit_memory()
            outcome: Counter = Counter()
            for number in range(count):
                rng = random.Random(f"{seed} {form} {number}")
                faulthandler.dump_traceback_later(SECONDS, exit=True)
                try:
                    if number % 5 == 4:  # a whole file with somebody's comment: the same frames
                        write_seed(path, strange_comment(rng))
                        assert np.array_equal(read_video(path)[0], frames), "other frames"
                    else:
                        damaged = mutate(original, rng)
                        path.write_bytes(with_checksums(damaged) if "png" in form and number % 2 else damaged)
                    outcome += read_all(path)
                except BaseException:
                    print(f"mutant {number} of {form}, seed {seed}", file=sys.stderr)
                    raise
                finally:
                    faulthandler.cancel_dump_traceback_later()
            totals[form] = dict(sorted(outcome.items()))
    print(json.dumps(totals, indent=1))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), tuple(sys.argv[3:]) or FORMATS)
