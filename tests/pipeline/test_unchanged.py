"""Latents of the bundled model are those that were recorded: bit for bit where that was, else to rounding.

`golden/latents.safetensors` holds the first, the middle and the last frame of each call and of each offline config in
two steps; its metadata says with which torch, on which CPU. It held what version 0.1.0 (commit 9384213) made; when the
bundled model was trained on, the code that still gave the same, bit for bit, recorded it anew:

OMP_NUM_THREADS=1 python -m tests.pipeline.test_unchanged
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

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

RECORD = Path(__file__).parents[1] / "golden/latents.safetensors"
CPU = ("vendor_id", "cpu family", "model", "stepping", "model name", "cache size")  # rounding differs among them


def offline_configs() -> list[Path]:
    """Configs all of whose files are in the repository, but for one whose second pass needs more than two steps."""
    paths = sorted(p for p in (REPOSITORY / "configs/animate").glob("*.yaml") if p.stem != "finish")
    entries = {path: load_config(path).entries for path in paths}
    return [path for path in paths if all(find_file(f.path) for e in entries[path] for f in files(e).values())]


@pytest.fixture(scope="module")
def recorded():
    with safe_open(RECORD, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() == this_machine()  # noqa: SIM118


@pytest.fixture(scope="module")
def shapes():
    return bundled_model()


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_calls(recorded, shapes, name):
    assert_unchanged(recorded, f"call/{name}", latents_of_call(shapes, name))


@pytest.mark.slow
@pytest.mark.parametrize("path", offline_configs(), ids=lambda path: path.stem)
def test_configs(recorded, path):
    for name, latents in latents_of_config(path).items():
        assert_unchanged(recorded, name, latents)


def assert_unchanged(recorded, name, found):
    """Elsewhere than where they were recorded, rounding has grown over the steps."""
    tensors, same_machine = recorded
    if same_machine:
        assert torch.equal(found, tensors[name])
    assert (found - tensors[name]).norm() < 1e-3 * tensors[name].norm()


def this_machine():
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().split("\n\n")[0].splitlines() if cpuinfo.exists() else []
    of_cpu = dict([part.strip() for part in line.split(":", 1)] for line in lines)
    cpu = ", ".join(of_cpu.get(key, "") for key in CPU)
    capability, threads = torch.backends.cpu.get_cpu_capability(), str(torch.get_num_threads())
    return {"torch": str(torch.__version__), "capability": capability, "threads": threads, "cpu": cpu}


def bundled_model():
    return AnimateDiffPipeline.from_config(REPOSITORY / "configs/animate/shapes.yaml", device="cpu")


def latents_of_call(shapes, name):
    arguments = {"prompt": P, **CALL, **CASES[name]}
    return three_frames(shapes(**arguments, generator=seeded(3), output_type="latent").frames)


def latents_of_config(path):
    config = load_config(path, {"steps": 2})
    assembler, found = Assembler(torch.device("cpu"), torch.float32), {}
    for number, checked in enumerate(check_requests(list(config.entries))):
        pipe = AnimateDiffPipeline(assembler.assemble(checked))
        job = plan(replace(config, entries=(checked.request,)), Path("samples"))[0]
        latents = pipe.sample(job.request, generator=seeded(3)).transpose(1, 2)
        found[f"config/{path.stem}/{number}"] = three_frames(latents)
    return found


def three_frames(latents):
    """Of (b, c, f, h, w)."""
    frames = latents.shape[2]
    return latents[:1, :, [0, frames // 2, frames - 1]].contiguous()


if __name__ == "__main__":
    model = bundled_model()
    record = {f"call/{name}": latents_of_call(model, name) for name in CASES}
    for config in offline_configs():
        record |= latents_of_config(config)
    save_file(record, RECORD, this_machine())
