"""Clips survive their files: frames, length, settings; palettes do not flicker; a failed write leaves no trace."""

import json
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from animatediff.config.clip_formats import FPS_LIMITS, check_fps
from animatediff.media import video as video_io
from animatediff.media.comments import as_exif, parse_settings, prompt_and_seed
from animatediff.media.mp4 import write_mp4
from animatediff.media.video import (
    FrameStream,
    by_numbers,
    is_complete,
    read_metadata,
    read_video,
    save_video,
    save_videos_grid,
    tile,
    to_uint8,
)
from animatediff.utils import UserError
from tests.disk import nearly_full

ENDINGS = (".gif", ".mp4", ".webp", "")
SETTINGS = {"prompt": 'a "fox" = ; # \\ ü\n', "seed": 18368660165286593270, "text": "long " * 200}


def smooth(frames: int = 8, height: int = 48, width: int = 64) -> torch.Tensor:
    """Slow colour gradients (f, 3, H, W) in [0, 1]: far more than 256 colours."""
    coarse = torch.randn(1, 3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    video = F.interpolate(coarse, (frames, height, width), mode="trilinear", align_corners=True)[0]
    return video.sigmoid().movedim(1, 0)


def psnr(a, b) -> float:
    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    return 10 * np.log10(255**2 / max((difference**2).mean(), 1e-12))


@pytest.mark.parametrize(("ending", "least"), [(".gif", 31), (".mp4", 36), (".webp", 38), ("", 100)])
def test_round_trip(tmp_path, ending, least):
    video = smooth()
    path = save_video(video, tmp_path / f"made/for/it/clip{ending}", fps=12, metadata=SETTINGS)
    frames, fps = read_video(path)
    assert frames.dtype == torch.uint8 and frames.shape == (8, 48, 64, 3) and fps == pytest.approx(12)
    assert psnr(frames, to_uint8(video)) > least
    assert read_metadata(path) == SETTINGS | {"frames": 8, "fps": 12.0}
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("frames", [1, 6])
def test_a_still_clip_keeps_its_frames(tmp_path, ending, frames):
    video = smooth(1).expand(frames, -1, -1, -1)
    assert len(read_video(save_video(video, tmp_path / f"still{ending}"))[0]) == frames


@pytest.mark.parametrize(
    ("ending", "shape"), [(".gif", (33, 47)), (".mp4", (34, 48)), (".webp", (33, 47)), ("", (33, 47))]
)
def test_odd_sizes(tmp_path, ending, shape):
    """Kept as they are; H.264 gets its last row and column twice."""
    frames, _ = read_video(save_video(smooth(3, 33, 47), tmp_path / f"odd{ending}"))
    assert frames.shape == (3, *shape, 3)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_stream_is_the_same_file(tmp_path, ending):
    frames = to_uint8(smooth(5, 33, 47))
    whole = save_video(frames, tmp_path / f"whole{ending}", 12, {"seed": 1})
    stream = save_video(FrameStream(5, iter(frames)), tmp_path / f"stream{ending}", 12, {"seed": 1})
    assert read_metadata(stream) == read_metadata(whole) and read_metadata(whole)["frames"] == 5
    assert torch.equal(read_video(stream)[0], read_video(whole)[0])


def test_a_stream_is_written_as_it_comes(tmp_path):
    """Every frame is on disk before the next is asked for, and a stream that breaks off leaves nothing behind."""

    def frames(count):
        for i in range(4):
            assert len(list(tmp_path.rglob("*.png"))) == i
            if i == count:
                raise KeyboardInterrupt
            yield np.full((8, 8, 3), i, np.uint8)

    for name in ("clip", "clip.mp4"):
        with pytest.raises(KeyboardInterrupt):
            save_video(FrameStream(4, frames(2) if name == "clip" else _broken()), tmp_path / name)
        assert not list(tmp_path.iterdir())
    assert len(list(save_video(FrameStream(4, frames(9)), tmp_path / "clip").iterdir())) == 4


def _broken():
    yield np.zeros((8, 8, 3), np.uint8)
    raise KeyboardInterrupt


def test_uint8_is_rounded_and_clipped():
    video = torch.tensor([-0.3, 0.0, 0.4 / 255, 0.6 / 255, 1.6 / 255, 254.6 / 255, 1.0, 1.7]).reshape(1, 1, 1, 8)
    assert to_uint8(video.expand(1, 3, 1, 8))[0, 0, :, 0].tolist() == [0, 0, 0, 1, 2, 255, 255, 255]


def test_both_layouts_are_the_same_clip():
    video = smooth(2, 5, 7)
    assert np.array_equal(to_uint8(video), to_uint8(video.movedim(1, -1)))
    assert np.array_equal(to_uint8(to_uint8(video)), to_uint8(video.numpy()))
    assert to_uint8(torch.zeros(2, 3, 4, 3)).shape == (2, 4, 3, 3)  # where both fit, the channels come second


def test_frames_as_a_call_gives_them():
    frames = to_uint8(smooth(2, 5, 7))
    assert np.array_equal(to_uint8([Image.fromarray(frame) for frame in frames]), frames)
    for wrong in ("clip.gif", None, [Image.new("RGB", (4, 4)), Image.new("RGB", (4, 5))]):
        with pytest.raises(UserError, match="expected a clip: a tensor, an array or images of one size"):
            to_uint8(wrong)


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (torch.zeros(2, 4, 8, 8), "shape \\(2, 4, 8, 8\\)"),
        (torch.zeros(3, 8, 8), "shape \\(3, 8, 8\\)"),
        (torch.zeros(0, 3, 8, 8), "shape \\(0, 3, 8, 8\\)"),
        (torch.full((1, 3, 8, 8), float("nan")), "not finite"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.int64), "torch.int64"),
    ],
)
def test_refused_videos(tmp_path, video, message):
    with pytest.raises(UserError, match=message):
        save_video(video, tmp_path / "x.gif")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("x.avi", {}, "ending in .gif, .mp4, .webp"),
        ("x.gif", {"fps": 0}, "fps: got 0 for gif, expected 0.002 to 50"),
        ("x.gif", {"fps": 60}, "expected 0.002 to 50: use mp4 or webp"),
        ("x.gif", {"fps": 0.001}, "fps: got 0.001"),
        ("x.mp4", {"fps": 1e-9}, "fps: got 1e-09 for mp4"),
        ("x", {"fps": float("nan")}, "fps: got nan for png"),
        ("x.webp", {"fps": float("inf")}, "fps: got inf for webp"),
        ("x.gif", {"loop": -1}, "loop: got -1"),
        ("x.webp", {"loop": 2**16}, "loop: got 65536"),
        ("x.mp4", {"loop": 1}, "loop: got 1 for mp4"),
    ],
)
def test_refused_files(tmp_path, name, options, message):
    with pytest.raises(UserError, match=message):
        save_video(smooth(2), tmp_path / name, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", FPS_LIMITS)
def test_what_a_format_holds_is_told_before(tmp_path, form):
    """At both ends of the range a clip keeps its frames; beyond, `check_fps` refuses."""
    name = tmp_path / ("clip" if form == "png" else f"clip.{form}")
    for fps in FPS_LIMITS[form]:
        frames, found = read_video(save_video(smooth(3), name, fps=fps))
        assert len(frames) == 3 and found == pytest.approx(fps, rel=0.01)
    least, most = FPS_LIMITS[form]
    for fps in (least / 2, most * 2, 0, -1, float("nan")):
        with pytest.raises(UserError, match=f"fps: got .* for {form}"):
            check_fps(fps, form)


@pytest.mark.parametrize("plays", [0, 1, 2, 5])
def test_how_often_it_is_played(tmp_path, plays):
    """A GIF says how often it is repeated, a WebP how often it is played."""
    gif, webp = (save_video(smooth(3), tmp_path / f"x.{form}", loop=plays) for form in ("gif", "webp"))
    with Image.open(gif) as image:
        assert image.info.get("loop") == {0: 0, 1: None}.get(plays, plays - 1)
    with Image.open(webp) as image:
        assert image.info["loop"] == plays


# ---- GIF


def test_few_colours_are_exact(tmp_path):
    colors = torch.randint(0, 256, (256, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    video = colors[torch.arange(4 * 16 * 16).reshape(4, 16, 16) % 256]
    assert torch.equal(read_video(save_video(video, tmp_path / "few.gif"))[0], video)


def test_what_stands_still_does_not_flicker(tmp_path):
    """A colourful square moves over a gradient; every pixel it never touches is the same in all frames."""
    video = smooth(1).repeat(8, 1, 1, 1)
    for i in range(8):
        video[i, :, 20:30, 6 * i : 6 * i + 8] = torch.rand(3, 10, 8, generator=torch.Generator().manual_seed(i))
    frames, _ = read_video(save_video(video, tmp_path / "moving.gif"))
    assert (frames[:, :20] == frames[:1, :20]).all() and (frames[:, 30:] == frames[:1, 30:]).all()


def test_palette_bands_less_than_median_cut(tmp_path):
    frames = to_uint8(smooth())
    tall = Image.fromarray(frames.reshape(-1, frames.shape[2], 3))
    cut = np.asarray(tall.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).convert("RGB"))
    written = read_video(save_video(frames, tmp_path / "x.gif"))[0]
    assert psnr(written, frames) > psnr(cut.reshape(frames.shape), frames) + 1


def test_one_palette_for_all_frames(tmp_path):
    """A GIF's image descriptors say whether a colour table of the frame's own follows."""
    path = save_video(smooth(4), tmp_path / "x.gif")
    with Image.open(path) as image:
        for frame in range(4):
            image.seek(frame)
            assert image.global_palette.palette == image.palette.palette or image.mode != "P"
    data = path.read_bytes()
    descriptor = b"\0," + bytes(4)  # of the first frame, which covers the whole picture
    assert data[data.index(descriptor) + 10] & 0x80 == 0


@pytest.mark.parametrize("fps", [7, 8, 12, 30, 50])
def test_delays_add_up(tmp_path, fps):
    path = save_video(smooth(16, 8, 8), tmp_path / "timed.gif", fps=fps)
    with Image.open(path) as image:
        delays = []
        for i in range(image.n_frames):
            image.seek(i)
            delays.append(image.info["duration"])
        assert image.info["loop"] == 0
    assert sum(delays) == pytest.approx(16_000 / fps, abs=5) and max(delays) - min(delays) <= 10
    assert min(delays) >= 20


# ---- grids


def test_grid_layout(tmp_path):
    """Five clips in rows of three: cells two pixels apart, black around, as torchvision lays them out."""
    videos = torch.rand(5, 3, 2, 6, 10, generator=torch.Generator().manual_seed(0))
    grid, fps = read_video(save_videos_grid(videos, tmp_path / "grid", n_rows=3, fps=4))
    assert grid.shape == (2, 2 * 8 + 2, 3 * 12 + 2, 3)
    expected = np.zeros((2, 18, 38, 3), np.uint8)
    for i, video in enumerate(videos):
        top, left = 2 + 8 * (i // 3), 2 + 12 * (i % 3)
        expected[:, top : top + 6, left : left + 10] = to_uint8(video.movedim(0, 1))
    assert np.array_equal(grid, expected)


def test_grid_rescale_and_single(tmp_path):
    video = torch.rand(1, 3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    single, _ = read_video(save_videos_grid(video * 2 - 1, tmp_path / "one", rescale=True))
    assert single.shape == (2, 8, 8, 3)
    assert np.abs(single.numpy().astype(int) - to_uint8(video[0].movedim(0, 1))).max() <= 1  # no frame around it
    with pytest.raises(UserError, match="expected \\(b, 3, f, H, W\\)"):
        save_videos_grid(video[0], tmp_path / "x.gif")


def test_unequal_clips_in_one_grid():
    """The smaller clip stands in the middle of a black cell and holds its last frame."""
    large, small = np.full((3, 8, 12, 3), 200, np.uint8), np.full((1, 4, 6, 3), 100, np.uint8)
    grid = tile([large, small])
    assert grid.shape == (3, 12, 30, 3)
    assert (grid[:, 2:10, 2:14] == 200).all()
    assert (grid[:, 4:8, 19:25] == 100).all() and grid.sum() == large.sum() + 3 * small.sum()


# ---- files


@pytest.mark.parametrize("ending", [".gif", ""])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, ending):
    path = save_video(smooth(2), tmp_path / f"clip{ending}")
    before = read_video(path)[0]

    def fails(frames, temporary, *rest, **options):
        (temporary if ending else temporary / "0000.png").parent.mkdir(exist_ok=True)
        (temporary if ending else temporary / "0000.png").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setitem(video_io.WRITERS, ending, fails)
    with pytest.raises(KeyboardInterrupt):
        save_video(smooth(5), path)
    assert torch.equal(read_video(path)[0], before)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("ending", ENDINGS)
def test_overwriting(tmp_path, ending):
    path = tmp_path / f"clip{ending}"
    save_video(smooth(6), path)
    save_video(smooth(2), path)
    assert len(read_video(path)[0]) == 2 and len(list(tmp_path.iterdir())) == 1


def test_foreign_files(tmp_path):
    """A GIF of Pillow's, in which equal frames are one with twice the delay, and no metadata."""
    a, b = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    a.save(tmp_path / "x.gif", save_all=True, append_images=[b, b], duration=100)
    frames, fps = read_video(tmp_path / "x.gif")
    assert len(frames) == 3 and fps == 10 and read_metadata(tmp_path / "x.gif") == {}
    (tmp_path / "no.gif").write_bytes(b"<html>")
    (tmp_path / "no.mp4").write_bytes(b"<html>")
    for name in ("no.gif", "no.mp4", "none.gif", "none.mp4"):
        for reader in (read_video, read_metadata):
            with pytest.raises(UserError, match=name):
                reader(tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty"):
        read_video(tmp_path / "empty")


@pytest.mark.parametrize("size", [(48, 64), (720, 1280)])
@pytest.mark.parametrize("color", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 100, 50), (255, 255, 255), (0, 0, 0)])
def test_colours_of_an_mp4_are_those_of_hd(tmp_path, size, color):
    """BT.709 in video range, and the file says so: by the formulas, and as it is read back."""
    video = np.tile(np.array(color, np.uint8), (1, *size, 1))
    path = save_video(video, tmp_path / "x.mp4")
    with av.open(str(path)) as file:
        frame = next(file.decode(video=0))
        assert (frame.colorspace, frame.color_primaries, frame.color_trc, frame.color_range) == (1, 1, 1, 1)
        y, u, v = (float(np.frombuffer(plane, np.uint8)[0]) for plane in frame.planes)
    assert b"colrnclx\0\1\0\1\0\1" in path.read_bytes()
    luma, blue, red = (y - 16) / 219, (u - 128) / 224, (v - 128) / 224
    r, b = luma + 1.5748 * red, luma + 1.8556 * blue
    g = (luma - 0.2126 * r - 0.0722 * b) / 0.7152
    assert np.abs(np.array([r, g, b]) * 255 - color).max() <= 3
    assert np.abs(read_video(path)[0].numpy()[0, 0, 0].astype(int) - color).max() <= 3


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.99])
def test_a_full_disk(tmp_path, ending, fraction):
    """Wherever the file ends: the clip is named, the old one stays, and nothing else is left."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    old = save_video(smooth(2), tmp_path / f"x{ending}")
    new = save_video(noise, tmp_path / f"y{ending}")
    size = max(file.stat().st_size for file in [new, *new.rglob("*")] if file.is_file())
    before = read_video(old)[0]
    with nearly_full(int(fraction * size)), pytest.raises(UserError, match=f"x{ending} to write to, expected .* room"):
        save_video(noise, old)
    assert torch.equal(read_video(old)[0], before)
    assert sorted(path.name for path in tmp_path.iterdir()) == [old.name, new.name]


# ---- what a file says of itself is a stranger's text


STRANGE = {
    "fps": ["NaN", "Infinity", "-1", "0", "1e7", '"8"', "null", "[8]", "{}", "true", "1" * 5000, "1e400"],
    "frames": ["1000000000000", "null", "[3]", '"3"', "-1", "0", "2.5", "1e9", "true", "1" * 5000],
    "prompt": ["5", "[]", "null", '{"0": 1}', "true"],
    "seed": ["-1", '"0"', "1.5", "1e30", "null"],
}
TEXTS = [f'{{"{key}": {value}}}' for key, values in STRANGE.items() for value in values]
TEXTS += [
    "",
    "null",
    "[1]",
    "text",
    "[" * 100_000,
    '{"a":' * 5000,
    '{"frames": 4, "fps": 8',
    "\x1b[31m",
    '{"fps": 1000}',
]
TEXTS += ['{"frames": 1000000, "fps": 1000}', '{"frames": 3, "fps": 1000}', '{"frames": 900, "fps": 0.01}']


@pytest.mark.parametrize("form", ["gif", "webp", "png", "mp4"])
def test_comments_of_strangers(tmp_path, form):
    """They change neither which frames there are nor how fast, unless the file bears them out."""
    frames = list(to_uint8(smooth(3, 8, 8)))
    for text in TEXTS:
        path = tmp_path / f"x.{form}"
        if form == "mp4":
            write_mp4(frames, path, 8, text)
        else:
            first, *rest = map(Image.fromarray, frames)
            comment = PngInfo()
            comment.add_text("Comment", text)
            options = {"gif": {"comment": text.encode()}, "png": {"pnginfo": comment}, "webp": {"exif": as_exif(text)}}
            first.save(path, save_all=True, append_images=rest, duration=125, **options[form])
        found, fps = read_video(path)
        assert len(found) == 3 and fps == pytest.approx(8, abs=0.4), text[:80]  # a GIF's delay is 120 ms
        settings = read_metadata(path)
        for key in STRANGE:
            assert not settings.get(key) or parse_settings(json.dumps({key: settings[key]})), text[:80]
        assert settings.get("frames", 1) < 2**20 and 0 < settings.get("fps", 8) <= 1000


def test_what_a_clip_was_made_from():
    """Settings in groups, flat ones of earlier versions, and those of others."""
    grouped = {"prompts": {"prompt": ["a fox"]}, "sampling": {"seed": [3], "steps": 9}}
    assert prompt_and_seed(grouped) == prompt_and_seed({"prompt": "a fox", "seed": 3}) == ("a fox", 3)
    assert prompt_and_seed({"prompts": {"prompt": [{"0": "a", "8": "b"}]}})[0] == {"0": "a", "8": "b"}
    for strange in (
        {},
        {"prompts": ["a", "b"]},
        {"prompts": {"prompt": [5]}, "sampling": {"seed": ["x"]}},
        {"prompt": []},
    ):
        assert prompt_and_seed(strange) == (None, None)


@pytest.mark.parametrize("form", ["gif", "webp", "apng"])
def test_a_frame_that_is_shown_for_hours(tmp_path, form):
    """2 frames, one of 10 ms and one of 9 minutes or more: 54,000 frames are told, `most` are read."""
    a, b = (Image.fromarray(np.full((128, 128, 3), value, np.uint8)) for value in (0, 255))
    options = {"format": "PNG"} if form == "apng" else {}
    a.save(path := tmp_path / f"x.{form}", save_all=True, append_images=[b], duration=[10, 540_000], **options)
    with pytest.raises(UserError, match="with more than .* frames, 2 GiB"):
        read_video(path)
    frames, fps = read_video(path, most=5)
    assert fps == 100 and (frames.numpy()[:, 0, 0, 0] > 128).tolist() == [False, True, True, True, True]


def test_frames_of_a_folder_are_ordered_by_their_numbers(tmp_path):
    """As are those whose numbers have leading zeros, whose order, and so their hash, is that of their names."""
    for i in range(12, 0, -1):
        Image.new("L", (4, 4), i).save(tmp_path / f"frame{i}.png")
    assert read_video(tmp_path)[0][:, 0, 0, 0].tolist() == list(range(1, 13))
    padded = [Path(f"{name}{i:02d}.png") for name in ("a", "b") for i in range(12)]
    assert sorted(padded, key=by_numbers) == sorted(padded)


def test_a_still_picture_of_a_folder_is_one_frame(tmp_path):
    folder = save_video(smooth(5), tmp_path / "clip")
    assert len(read_video(folder / "0003.png")[0]) == 1
    (folder / "0004.png").unlink()
    assert len(read_video(folder)[0]) == 4 and not is_complete(folder)


@pytest.mark.parametrize("ending", ENDINGS)
def test_complete_clips(tmp_path, ending):
    path = save_video(smooth(4), tmp_path / f"x{ending}")
    assert is_complete(path) and not is_complete(tmp_path / f"none{ending}")
    file = path if ending else path / "0002.png"
    for content in (file.read_bytes()[:-40], b""):
        file.write_bytes(content)
        assert not is_complete(path)


def test_a_folder_that_is_no_clip(tmp_path):
    with pytest.raises(UserError, match="a folder without PNG frames, expected a clip$"):
        read_metadata(tmp_path)
    made = save_video(np.zeros((1, 8, 8, 3), np.uint8), tmp_path / "sample/0-a.gif")
    with pytest.raises(UserError, match=f"expected a clip, such as {made}"):
        read_metadata(tmp_path)
