"""Pictures and video in, by a config: files are read, recorded and checked before anything is loaded."""

import numpy as np
import pytest
import torch
from PIL import Image

from animatediff.checkpoints.files import file_sha256
from animatediff.config.prompt_yaml import load_config
from animatediff.config.spellings import build_request
from animatediff.features.controlnet import read_hints
from animatediff.features.inputs import other_speed, prepare_inputs
from animatediff.features.noise import seeded
from animatediff.media.video import read_metadata, read_video, save_video
from animatediff.pipeline.finish import second_pass
from animatediff.pipeline.headers import check_requests
from animatediff.pipeline.run import animate
from animatediff.utils import UserError
from tests.media.videos import write
from tests.nano import entry, flat, write_config


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """clip.gif of 5 frames and 24x16 pixels, a folder of masks, and a picture."""
    folder = tmp_path_factory.mktemp("inputs")
    pixels = np.random.default_rng(0).integers(0, 256, (5, 16, 24, 3), dtype=np.uint8) // 64 * 64
    save_video(pixels, folder / "clip.gif")
    (folder / "masks").mkdir()
    for i in range(5):
        Image.new("L", (24, 16), 255 * (i > 0)).save(folder / f"masks/{i}.png")
    Image.fromarray(pixels[0]).save(folder / "first.png")
    return folder


def test_a_run(nano, inputs, tmp_path, pipeline, capsys):
    values = {"video": str(inputs / "clip.gif"), "format": "png", "steps": 4, "L": 4}
    mask = {"mask": str(inputs / "masks"), "strength": 0.5}
    path = write_config(tmp_path / "c.yaml", entry(nano, **values), entry(nano, **values, **mask))
    folder = animate(load_config(path), output_dir=tmp_path / "out", device="cpu")
    assert " 5/5 " in capsys.readouterr().err, "int(4 * 0.8) and int(4 * 0.5) steps"

    config = load_config(folder / "config.yaml")
    assert [e.inputs.strength for e in config.entries] == [0.8, 0.5]
    first, second = sorted((folder / "sample").iterdir())
    settings = flat(read_metadata(second))
    assert settings["strength"] == 0.5 and "inversion" not in settings
    assert settings["video"] == {"path": values["video"], "sha256": file_sha256(inputs / "clip.gif")}
    assert len(settings["mask"]["sha256"]) == 64 and "mask" not in flat(read_metadata(first))

    frames = [Image.fromarray(frame) for frame in read_video(inputs / "clip.gif")[0].numpy()]
    call = {"num_frames": 4, "height": 16, "width": 16, "num_inference_steps": 4, "generator": seeded(42)}
    expected = pipeline("a red fox", video=frames, output_type="pil", **call).frames[0]
    assert torch.equal(read_video(first)[0], torch.from_numpy(np.stack(expected)))
    kept = pipeline("a red fox", video=frames, strength=0.0, output_type="pil", **call).frames[0]
    assert np.array_equal(read_video(second)[0][0].numpy(), np.asarray(kept[0])), "the first mask is black"


@pytest.mark.parametrize(
    ("chosen", "frames"),
    [({}, [0, 1]), ({"video_start": 2}, [2, 3]), ({"video_stride": 2}, [0, 2]), ({"video_fps": 4}, [0, 2])],
)
def test_masks_and_hints_are_read_at_the_frames_of_their_video(tmp_path, chosen, frames):
    """In the second pass, too; a mask that is one picture holds for all of them."""
    shown = np.zeros((5, 8, 8, 3), np.uint8)
    shown[range(5), range(5)] = 255  # frame i is white in row i
    save_video(shown, tmp_path / "clip")
    Image.fromarray(shown[1]).save(tmp_path / "one.png")
    size = {"num_frames": 2, "height": 8, "width": 8}

    def rows(name):
        values = {"prompt": "a fox", "video": str(tmp_path / "clip"), "mask": str(tmp_path / name), **chosen}
        request = build_request({**values, **size, "finish": {"strength": 0.5}}, where="")
        read = prepare_inputs(request.inputs, frames=2, height=8, width=8, window=16)
        again = second_pass(request, torch.zeros(1, 2, 3, 8, 8, dtype=torch.uint8))
        masks = (read.mask, prepare_inputs(again.inputs, frames=2, height=8, width=8, window=16).mask)
        return [clip[0, :, 0, :, 0].float().argmax(dim=-1).tolist() for clip in (read.video[:, :, :1], *masks)]

    assert rows("clip") == [frames] * 3
    assert rows("one.png") == [frames, [1], [1]]

    net = {"path": "net.safetensors", "images": [str(tmp_path / "clip")]}
    values = {"prompt": "a fox", "video": str(tmp_path / "clip"), "controlnet": net, **chosen}
    request = build_request({**values, **size}, where="")
    hints, _ = read_hints(request.controlnets.nets[0], request)
    assert hints[:, 0, :, 0].argmax(dim=-1).tolist() == frames


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"video": "a.mp4"}, "video: 25 of its frames are a second, 8 of the clip's: video_fps=8 keeps its speed"),
        (
            {"video": "a.mp4", "video_stride": 2},
            "video: 12.5 of its frames are a second, 8 of the clip's: video_fps=16",
        ),
        ({"video": "a.mp4", "video_fps": 8}, None),
        ({"video": "a.mp4", "fps": 25}, None),
        ({"video": "a.mp4", "video_stride": 3}, None),
        ({"video": "folder"}, None),
        ({"video": "still.gif", "fps": 16}, None),
        ({}, None),
    ],
)
def test_another_speed_is_told(tmp_path, monkeypatch, values, told):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.mp4", frames=8)
    save_video(np.zeros((4, 8, 8, 3), np.uint8), tmp_path / "folder")
    save_video(np.zeros((1, 8, 8, 3), np.uint8), tmp_path / "still.gif")
    line = other_speed(build_request({"prompt": "a fox", **values}, where=""))
    assert line is None if told is None else line.startswith(told)


def test_a_chain_counts_its_steps(nano, inputs, make_entry):
    (checked,) = check_requests([make_entry(video=str(inputs / "clip.gif"), extend=2, L=33, steps=3)])
    assert checked.steps == 6 and checked.request.inputs.strength == 1
    (checked,) = check_requests([make_entry(image=str(inputs / "first.png"), steps=30)])
    assert checked.steps == 27
    assert check_requests([make_entry(steps=3)])[0].steps == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"video": "{}/none.mp4"}, "entry test: video: there is no .*none.mp4"),
        ({"video": "{}/clip.gif", "L": 6}, "entry test: video: got 5 frames, expected at least 6"),
        ({"video": "{}/clip.gif", "strength": 2}, "strength: got 2, expected at most 1"),
        ({"strength": 0.5}, "strength needs something to start from"),
        ({"mask": "{}/masks"}, "mask needs a video"),
        ({"video": "{}/clip.gif", "mask": "{}/small.png"}, "mask: got 8x8 pixels for a video of 24x16"),
        ({"video": "{}/clip.gif", "L": 5, "mask": "{}/masks3"}, "mask: got 3 frames for a video of 5"),
        ({"image": "{}/clip.gif"}, "entry test: image: got 2 pictures, expected one"),
        ({"video": "{}/clip.gif", "extend": 4, "L": 5}, "got 5 frames in all, expected more than the 5"),
        ({"extend": 4, "L": 50}, "extend needs a video"),
        ({"video": "{}/clip.gif", "inversion": True, "sampler": "euler_ancestral"}, "inversion: got the sampler"),
    ],
)
def test_mistakes_are_named(make_entry, inputs, tmp_path, values, message):
    Image.new("L", (8, 8)).save(inputs / "small.png")
    (inputs / "masks3").mkdir(exist_ok=True)
    for i in range(3):
        Image.new("L", (24, 16)).save(inputs / f"masks3/{i}.png")
    values = {key: value.format(inputs) if isinstance(value, str) else value for key, value in values.items()}
    with pytest.raises(UserError, match=message) as error:
        check_requests([make_entry(name="test", **values)])
    assert "\n" not in str(error.value)
