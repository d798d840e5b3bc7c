"""Latents of the bundled model are those that were recorded: bit for bit where that was, else to rounding.

`golden/latents.safetensors` holds the first, the middle and the last frame of each call and of each offline config in
two steps; its metadata says with which torch, on which kind of CPU. It held what version 0.1.0 (commit 9384213) made;
when the bundled model was trained on, the code that still gave the same, bit for bit, recorded it anew.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from animatediff import FreeInit, FreeU, Travel, Windows
from animatediff.checkpoints.known_files import REPOSITORY, find_file
from animatediff.config.prompt_yaml import load_config
from animatediff.config.spellings import files
from animatediff.features.noise import seeded
from animatediff.pipeline.assemble import Assembler
from animatediff.pipeline.headers import check_requests
from animatediff.pipeline.pipeline import AnimateDiffPipeline
from animatediff.pipeline.run import plan

P = "a red circle moving left on a black background"
CALL = {"num_frames": 8, "height": 64, "width": 64, "num_inference_steps": 3, "guidance_scale": 3.0}
VIDEO = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
MASK = torch.zeros(8, 1, 64, 64)
MASK[..., :32] = 1
CASES = {
    "plain": {},
    "unguided": {"guidance_scale": 1.0},
    "dpmpp_2m karras": {"sampler": "dpmpp_2m", "timestep_spacing": "karras"},
    "euler_ancestral": {"sampler": "euler_ancestral"},
    "pndm": {"sampler": "pndm"},
    "lcm": {"sampler": "lcm"},
    "eta": {"eta": 0.7},
    "timesteps": {"timesteps": (999, 500, 20.5)},
    "windows": {"windows": Windows("open", 4, 1)},
    "windows closed": {"windows": Windows("closed", 4, 1, "flat")},
    "windows uniform": {"windows": Windows("uniform", 4, 1, "gaussian", 2)},
    "travel": {"prompt": {0: P, 7: "a blue star"}},
    "travel slerp": {"prompt": {0: P, 5: "a blue star"}, "travel": Travel("slerp", True, 0.2)},
    "two prompts": {"prompt": [P, "a blue star"], "negative_prompt": ["", "a red circle"]},
    "weighting": {"prompt": "a (red:1.3) [circle] BREAK moving left", "prompt_weighting": True, "clip_skip": 2},
    "freeinit": {"freeinit": FreeInit(iterations=2, fast=True)},
    "motion_scale": {"motion_scale": {0: 1, 7: 0.2}},
    "pag": {"pag_scale": 1.0, "guidance_rescale": 0.5},
    "guidance schedule": {"guidance_schedule": {"0%": 1, "100%": 0.5}},
    "freeu": {"freeu": FreeU()},
    "stretch": {"pe_stretch": 1.5},
    "rotate": {"loop": "rotate"},
    "pingpong": {"loop": "pingpong"},
    "shuffle": {"noise_type": "shuffle", "num_frames": 20, "windows": Windows("open", 8, 2)},
    "repeat": {"noise_type": "repeat"},
    "vid2vid": {"video": VIDEO},
    "strength .5": {"video": VIDEO, "strength": 0.5},
    "inpaint": {"video": VIDEO, "mask": MASK},
    "image": {"image": VIDEO[0], "last_image": VIDEO[1]},
    "image ramp": {"image": VIDEO[0], "strength": 0.7, "image_ramp": 4.0},
    "inversion": {"video": VIDEO, "inversion": True, "inversion_prompt": P, "strength": 0.7},
    "extend": {"video": VIDEO[:4], "extend": 2, "num_frames": 20},
    "everything": {
        "motion_scale": 0.8, "guidance_schedule": {"0%": 1, "100%": 0.5}, "pag_scale": 1.0, "guidance_rescale": 0.5,
        "freeu": FreeU(), "pe_stretch": 1.5, "noise_type": "shuffle", "freeinit": FreeInit(2, fast=True),
        "windows": Windows("open", 4, 1), "sampler": "dpmpp_2m",
    },
}  # fmt: skip
QUICK = ("plain", "windows", "travel", "pag", "vid2vid", "image")


@pytest.fixture(scope="module")
def recorded():
    with safe_open(Path(__file__).parents[1] / "golden/latents.safetensors", "pt") as file:
        here = {"torch": str(torch.__version__), "capability": torch.backends.cpu.get_cpu_capability(), "threads": "1"}
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() == here  # noqa: SIM118


@pytest.fixture(scope="module")
def shapes():
    return AnimateDiffPipeline.from_config(REPOSITORY / "configs/animate/shapes.yaml", device="cpu")


def assert_unchanged(recorded, name, latents):
    """Latents (b, c, f, h, w). Elsewhere than where they were recorded, rounding has grown over the steps."""
    tensors, same_machine = recorded
    frames = latents.shape[2]
    found, expected = latents[:1, :, [0, frames // 2, frames - 1]], tensors[name]
    if same_machine and torch.get_num_threads() == 1:
        assert torch.equal(found, expected)
    assert (found - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_calls(recorded, shapes, name):
    arguments = {"prompt": P, **CALL, **CASES[name]}
    latents = shapes(**arguments, generator=seeded(3), output_type="latent").frames
    assert_unchanged(recorded, f"call/{name}", latents)


def offline_configs() -> list[Path]:
    """Configs all of whose files are in the repository."""
    paths = sorted((REPOSITORY / "configs/animate").glob("*.yaml"))
    entries = {path: load_config(path).entries for path in paths}
    return [path for path in paths if all(find_file(f.path) for e in entries[path] for f in files(e).values())]


@pytest.mark.slow
@pytest.mark.parametrize("path", offline_configs(), ids=lambda path: path.stem)
def test_configs(recorded, path):
    config = load_config(path, {"steps": 2})
    names = {f"config/{path.stem}/{number}": entry for number, entry in enumerate(config.entries)}
    names = {name: entry for name, entry in names.items() if name in recorded[0]}
    if not names:
        pytest.skip("newer than what was recorded")
    assembler = Assembler(torch.device("cpu"), torch.float32)
    for name, checked in zip(names, check_requests(list(names.values())), strict=True):
        pipe = AnimateDiffPipeline(assembler.assemble(checked))
        job = plan(replace(config, entries=(checked.request,)), Path("samples"))[0]
        assert_unchanged(recorded, name, pipe.sample(job.request, generator=seeded(3)).transpose(1, 2))
