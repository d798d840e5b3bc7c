"""Several motion modules: each acts as it does alone, in turn, or one after the other."""

import pytest
import torch

from animatediff.config.prompt_yaml import load_config
from animatediff.features.motion_mixture import MotionSet, motion_mixture, motion_sets_added
from animatediff.features.motion_scale import motion
from animatediff.pipeline.assemble import Assembler
from animatediff.pipeline.headers import check_requests
from animatediff.utils import UserError
from tests import sdxl
from tests.checkpoints.synthetic import motion_tensors, write
from tests.features.test_picture_features import CONTEXT, pipeline, predict
from tests.models.test_golden import assert_close, golden
from tests.nano import entry, write_config, write_files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_files(tmp_path_factory.mktemp("nano"))
    write(folder / "mm_untold.safetensors", motion_tensors("v3"))
    write(folder / "mm_sdxl.safetensors", sdxl.motion("sdxl-beta"))
    return folder


def extra(folder, *modules):
    return [{"path": str(folder / f"mm_{version}.safetensors"), **values} for version, values in modules]


@pytest.mark.slow
def test_modules_alone_are_what_they_are(folder, tmp_path):
    """v2, which has a module in the middle block, beside v3: with the other one's effect at 0."""
    pipe = pipeline(folder, tmp_path, extra_motion_modules=extra(folder, ("v2", {"scale": 0})))
    assert_close(predict(pipe, motion, motion_mixture), golden("unet.v3.t481"))
    pipe = pipeline(folder, tmp_path, extra_motion_modules=extra(folder, ("v2", {})), motion_scale=0)
    assert_close(predict(pipe, motion, motion_mixture), golden("unet.v2.t481"))
    assert_close(predict(pipe), golden("unet.v3.t481"))  # nothing stays in the network


@pytest.mark.parametrize(("part", "own", "name"), [({"end": 0.5}, 1, "v3"), ({"start": 0.5}, 0, "v2")])
def test_modules_take_turns(folder, tmp_path, part, own, name):
    """The golden latents are at the second of two steps."""
    turns = {"0%": 1 - own, "100%": own}
    pipe = pipeline(folder, tmp_path, extra_motion_modules=extra(folder, ("v2", part)), motion_scale=turns)
    assert_close(predict(pipe, motion, motion_mixture), golden(f"unet.{name}.t481"))


@pytest.mark.slow
@torch.no_grad()
def test_a_chain_runs_the_last_one_first(folder, tmp_path):
    """Up to the model's own module: v3 at half its effect, then v2."""
    pipe = pipeline(folder, tmp_path, extra_motion_modules=extra(folder, ("v2", {}), ("v3", {"scale": 0.5})))
    v2, v3 = pipe.model.networks["mixture"]
    assert isinstance(v2, MotionSet) and len(v2.places) == len(v3.places) + 1 == 21
    v2.scale, v3.scale = torch.ones(5), torch.full((5,), 0.5)
    module, seen = pipe.unet.down_blocks[0].motion_modules[0], []
    before = module.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with motion_sets_added(pipe.unet, [v3, v2]):
        after = module.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        pipe.unet(golden("input.latents"), torch.tensor([481, 481]), CONTEXT)
    before.remove()
    after.remove()
    plain, chained = seen
    half = plain + 0.5 * (v3.motion_modules[0](plain, 5) - plain)
    assert_close(chained, v2.motion_modules[0](half, 5), 1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"motion_module": ""}, "extra_motion_modules needs a motion_module beside it"),
        ({"extra_motion_modules": {"path": "nano"}}, "image model in one file, not a motion module without a picture"),
        ({"extra_motion_modules": {"path": "mm_v2", "start": 0.5, "end": 0.2}}, "expected the start before the end"),
        ({"extra_motion_modules": {"path": "mm_v2", "scale": [1, 2]}, "L": 3}, "scale: got 2 numbers for 3 frames"),
        (
            {"extra_motion_modules": {"path": "mm_untold"}},
            "version cannot be told .*add `version: v1` or `version: v3` be",
        ),
        (
            {"extra_motion_modules": {"path": "mm_sdxl"}},
            "a motion module for SDXL, but .* is of SD 1.x.*: choose another",
        ),
    ],
)
def test_mistakes_are_named(folder, tmp_path, options, message):
    options = {"extra_motion_modules": {"path": "mm_v2"}} | options
    options["extra_motion_modules"]["path"] = str(folder / f"{options['extra_motion_modules']['path']}.safetensors")
    with pytest.raises(UserError, match=message):
        check_requests(load_config(write_config(tmp_path / "x.yaml", entry(folder, **options))).entries)


def test_clips_longer_than_a_module_was_trained_on(folder, tmp_path):
    long = {"L": 28, "extra_motion_modules": extra(folder, ("v1", {}))}
    (checked,) = check_requests(load_config(write_config(tmp_path / "x.yaml", entry(folder, **long))).entries)
    with pytest.raises(UserError, match="got 28 frames at a time, expected at most 24.*window_length=24"):
        Assembler(torch.device("cpu"), torch.float32).assemble(checked)
