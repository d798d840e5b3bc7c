"""The bundled encoder of Shapes, the toy data set, on held-out scenes, and what its numbers see and do not see."""

from pathlib import Path

import pytest

from animatediff.metrics.clip_metrics import measure_clip
from animatediff.metrics.fvd import EncoderFeatures, frechet_distance
from animatediff.utils import UserError
from animatediff.world.encoder import BUNDLED, WorldEncoder, retrieval
from animatediff.world.evaluate import shuffle_frames
from animatediff.world.shapes import make_scene, render

FILE = Path(__file__).parents[2] / "animatediff" / BUNDLED
pytestmark = pytest.mark.skipif(not FILE.exists(), reason="no encoder is bundled: train stage shapes_encoder")


@pytest.fixture(scope="module")
def encoder() -> WorldEncoder:
    return WorldEncoder.from_file()


def test_its_file_is_small():
    assert FILE.stat().st_size <= 600_000


def test_frames_and_captions_of_held_out_scenes(encoder):
    found = retrieval(encoder, count=100)
    assert min(found["color"], found["background"], found["motion"]) >= 97 and found["shape"] >= 90
    assert min(found["caption"], found["frame"]) >= 80


def test_a_wrong_word_lowers_the_text_alignment(encoder):
    scene = {"index": 5, "seed": 1, "shape": "star", "color": "red", "background": "white", "motion": "right"}
    clip = render([make_scene(**scene)])[0]

    def alignment(**wrong) -> float:
        return measure_clip(clip, encoder, prompt=make_scene(**scene | wrong).caption).text_alignment

    right = alignment()
    for wrong in ({"color": "blue"}, {"shape": "circle"}, {"background": "black"}, {"motion": "up"}):
        assert alignment(**wrong) < right - 5


@pytest.mark.slow
def test_the_order_of_frames_is_seen_by_consistency_and_distance_alone(encoder):
    scenes = [make_scene(i, seed=1) for i in range(200)]
    clips = render(scenes)
    mixed = shuffle_frames(clips)
    ordered, shuffled = (measure_clip(video[0], encoder, prompt=scenes[0].caption) for video in (clips, mixed))
    assert ordered.text_alignment == pytest.approx(shuffled.text_alignment, abs=1e-3)
    features = EncoderFeatures(encoder)
    here, there, wrong = features(clips[:100]), features(clips[100:]), features(mixed[100:])
    assert frechet_distance(here, here) == pytest.approx(0, abs=1e-4)
    assert frechet_distance(here, wrong) > 1.2 * frechet_distance(here, there)
    with pytest.raises(UserError, match="got a clip of 1 frame, expected at least two"):
        features(clips[:1, :1])
