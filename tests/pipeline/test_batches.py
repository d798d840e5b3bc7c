"""Clips of one entry that are sampled together: the files of clips made one by one, but for rounding."""

from dataclasses import replace
from pathlib import Path

import pytest

from animatediff.config.prompt_yaml import load_config
from animatediff.media.video import read_metadata, read_video
from animatediff.pipeline import run
from animatediff.pipeline.pipeline import AnimateDiffPipeline
from animatediff.pipeline.run import animate
from animatediff.utils import UserError
from tests.nano import entry, flat, write_config

PROMPTS = ["a fox", "very long " * 40, {0: "day", 1: "night"}]


@pytest.fixture(scope="module")
def config(nano, tmp_path_factory):
    """A short prompt, a long one and one that travels, each with a seed and a negative prompt; and another entry."""
    values = {"H": 32, "W": 32, "format": "png", "sampler": "euler_ancestral"}
    first = entry(nano, prompt=PROMPTS, seed=[1, 2, 3], n_prompt=["bad", "worse", ""], **values)
    second = entry(nano, prompt=["tall"], L=1, format="png")
    return load_config(write_config(tmp_path_factory.mktemp("config") / "many.yaml", first, second))


@pytest.fixture(scope="module")
def one_by_one(config, tmp_path_factory) -> Path:
    return animate(config, output_dir=tmp_path_factory.mktemp("run") / "out", device="cpu")


def in_batches(config, size: int):
    entries = (replace(e, memory=replace(e.memory, batch_size=size)) for e in config.entries)
    return replace(config, entries=tuple(entries))


@pytest.fixture
def sizes(monkeypatch) -> list[int]:
    """Of the batches that are sampled."""
    seen, sample = [], AnimateDiffPipeline.sample

    def watched(self, request, **rest):
        seen.append(len(request.prompts.prompt))
        return sample(self, request, **rest)

    monkeypatch.setattr(AnimateDiffPipeline, "sample", watched)
    return seen


def test_the_files_of_clips_made_one_by_one(config, one_by_one, sizes, tmp_path):
    """A clip that is missing is made again in another batch, and is the same."""
    folder, steps = tmp_path / "out", []

    class Watch(run.Follower):
        def stepped(self, done, total):
            steps.append((done, total))

        def estimated(self, latents):
            assert latents.shape[0] == 1

    config = in_batches(config, 2)
    animate(config, output_dir=folder, device="cpu", follower=Watch())
    assert sizes == [2, 1, 1] and steps == [(n, 8) for n in (2, 4, 5, 6, 7, 8)]
    clips = sorted((one_by_one / "sample").iterdir())
    assert [path.name for path in sorted((folder / "sample").iterdir())] == [path.name for path in clips]
    for clip in clips[1:3]:
        (folder / "sample" / clip.name / "0001.png").write_bytes(b"")
    animate(config, output_dir=folder, device="cpu")
    assert sizes[3:] == [2]
    for path in clips:
        alone, together = (read_video(parent / "sample" / path.name)[0].int() for parent in (one_by_one, folder))
        assert (alone - together).abs().max() <= 1 and alone.float().std() > 1
        one, other = (flat(read_metadata(parent / "sample" / path.name)) for parent in (one_by_one, folder))
        assert {key for key in one | other if one.get(key) != other.get(key)} == {"batch_size"}


@pytest.mark.slow
def test_a_clip_does_not_end_because_of_its_batch_mates(config, sizes, tmp_path, monkeypatch):
    """A run that is killed while a batch is written goes on with the clips of it that are missing."""
    save, written = run.save_video, []

    def killed(clip, path, *rest, **more):
        if len(written) == 1:
            raise KeyboardInterrupt
        written.append(path)
        return save(clip, path, *rest, **more)

    monkeypatch.setattr(run, "save_video", killed)
    with pytest.raises(KeyboardInterrupt):
        animate(in_batches(config, 3), output_dir=tmp_path / "out", device="cpu")
    monkeypatch.setattr(run, "save_video", save)
    animate(in_batches(config, 3), output_dir=tmp_path / "out", device="cpu")
    assert sizes == [3, 2, 1]


def test_a_call_makes_all_its_prompts_together(nano, tmp_path):
    pipe = AnimateDiffPipeline.from_config(write_config(tmp_path / "x.yaml", entry(nano)), device="cpu")
    with pytest.raises(UserError, match="batch_size is of runs: a call samples all its prompts together"):
        pipe(["a", "b"], batch_size=1)
