"""Switches of memory that choose themselves: what fits, in which order, and what is said of it."""

import re
from dataclasses import replace
from functools import partial

import pytest
import torch

from animatediff.config.memory_options import Memory
from animatediff.config.networks import MOTION_VERSIONS, UNetConfig, VAEConfig
from animatediff.config.prompt_yaml import load_config
from animatediff.config.spellings import build_request
from animatediff.pipeline import fit as fitting
from animatediff.pipeline.device import pick_device
from animatediff.pipeline.fit import CHANGES, as_begun, choose, fit, plan_request, recorded, sizes_of
from animatediff.pipeline.headers import check_requests
from animatediff.pipeline.plan import MemoryPlan, Sizes
from animatediff.pipeline.run import animate
from animatediff.pipeline.timings import Stopwatch, estimate, remember
from animatediff.utils import UserError
from scripts.animate import main
from tests.nano import entry, write_config

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SD15 = Sizes(UNetConfig().with_motion(MOTION_VERSIONS["v3"]), VAEConfig(), texts=123_060_480)
SDXL = Sizes(
    UNetConfig(
        block_out_channels=(320, 640, 1280),
        attention_levels=(False, True, True),
        num_transformer_blocks=(1, 2, 10),
        context_dim=2048,
        head_dim=64,
        added_channels=2816,
        linear_projection=True,
        motion=MOTION_VERSIONS["sdxl-beta"],
    ),
    VAEConfig(scaling_factor=0.13025),
    texts=817_000_000,
    decodes_in_float32=True,
)


def request(**values):
    made = build_request(
        {"prompt": "a fox", "pretrained_model_path": "x", "motion_module": "y", "guidance_scale": 7.5} | values,
        where="",
    )
    size = replace(made.size, height=made.size.height or 512, width=made.size.width or 512)
    return replace(made, size=size)


def toy_plan(request):
    """As plans are, of round numbers: how many MB the switches leave."""
    m = request.memory
    step = 400 // (1 + m.split_guidance) // (2 if m.chunk_tokens else 1)
    step = step // 2 if request.windows else step
    decode = 50 * m.vae_frames // (4 if m.vae_tile else 1)
    unet = {"blocks": 10}.get(m.offload, {"": 200, "float16": 100, "float8": 50}[m.weights])
    others = 100 if m.offload == "none" else 0
    mb = 10**6
    return MemoryPlan({"UNet": unet * mb, "others": others * mb}, {"a step": step * mb, "decoding": decode * mb}, 0)


@pytest.mark.parametrize(
    ("device", "budget", "switches"),
    [
        (CPU, 700, []),
        (CPU, 500, ["chunk_tokens", "vae_frames"]),
        (CUDA, 600, ["offload"]),
        (CUDA, 450, ["chunk_tokens", "offload", "vae_frames"]),
        (CUDA, 120, ["chunk_tokens", "offload", "split_guidance", "vae_frames"]),
        (CPU, 305, ["chunk_tokens", "split_guidance", "vae_frames", "weights"]),
        (CPU, 205, ["chunk_tokens", "split_guidance", "vae_frames", "weights", "windows"]),
    ],
    ids=str,
)
def test_what_is_needed_is_chosen_and_no_more(device, budget, switches):
    found = choose(request(), budget * 10**6, toy_plan, device)
    assert found.plan.peak <= budget * 10**6 and found.plan == toy_plan(found.request)
    assert sorted(found.chosen) == switches
    assert len(found.switches()) == len(switches) and all("; chosen" in line for line in found.switches())


def test_what_was_set_by_hand_stays():
    found = choose(request(vae_frames=8, vae_tile=0, offload="none"), 700 * 10**6, toy_plan, CUDA)
    assert found.request.memory == Memory()
    with pytest.raises(
        UserError, match="^got 10 MB of memory for 16 frames of 512x512, expected at least 700 MB: raise"
    ):
        choose(request(vae_frames=8, vae_tile=0, offload="none"), 10 * 10**6, toy_plan, CUDA)


def test_all_that_is_chosen_says_what_it_changes():
    assert CHANGES.keys() - {"windows"} == vars(Memory()).keys() - {"max"}
    lossy = {name for name, change in CHANGES.items() if not change.startswith(("exact", "equal"))}
    assert lossy == {"weights", "vae_tile", "windows"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "side", "budget"),
    [(SD15, 512, 6e9), (SDXL, 1024, 12e9)],
    ids=["SD 1.5 in 6 GB", "SDXL in 12 GB"],
)
def test_real_models_fit_without_loss(sizes, side, budget):
    """16 frames in the memory of a GPU that is not here: counted on tensors without contents."""
    plan = partial(plan_request, sizes=sizes, device=CUDA, dtype=torch.float16)
    found = choose(request(H=side, W=side), int(budget), plan, CUDA)
    print(found.plan, found.switches(), sep="\n")
    assert found.plan.peak <= budget
    assert not {"weights", "vae_tile", "windows"} & set(found.chosen)


# ---- files and command line -------------------------------------------------------------------------------------


def test_sizes_are_read_off_headers(nano, pipeline, make_entry):
    (checked,) = check_requests([make_entry()])
    sizes = sizes_of(checked)
    assert sizes.unet == pipeline.unet.config and sizes.vae == pipeline.vae.config
    assert sizes.texts == sum(p.numel() for p in pipeline.text_encoder.parameters()) and not sizes.others


@pytest.fixture
def toy_plans(monkeypatch):
    monkeypatch.setattr(fitting, "plan_request", lambda request, **_: toy_plan(request))


@pytest.mark.slow
def test_a_run_within_a_budget(nano, tmp_path, toy_plans, capsys):
    config = load_config(write_config(tmp_path / "run.yaml", entry(nano, max_memory="500MB")))
    folder = animate(config, output_dir=tmp_path / "out", device="cpu")
    said = capsys.readouterr().err
    assert "entry 1, to fit into memory: vae_frames=1 (exact; chosen)" in said
    text = (folder / "config.yaml").read_text()
    assert "max: 500MB" in text and "vae_frames: 1" not in text, "what is exact is not part of what was made"
    animate(config, output_dir=folder, device="cpu")  # and is taken up with any other choice
    assert "1 of 1 prompts are there already" in capsys.readouterr().err


def test_what_is_written_down_are_switches_that_change_clips():
    before = request()
    after = replace(
        before, memory=replace(before.memory, vae_frames=1, offload="idle", vae_tile=512, weights="float16")
    )
    memory = recorded(before, after).memory
    assert (memory.vae_frames, memory.offload, memory.vae_tile, memory.weights) == (8, "none", 512, "float16")


def test_a_run_that_is_taken_up_keeps_what_changes_its_clips(make_entry):
    (checked,) = check_requests([make_entry(vae_frames=2)])
    begun = replace(checked.request, memory=Memory(weights="float16", vae_tile=64))
    assert as_begun(checked, begun).request.memory == Memory(vae_frames=2, weights="float16", vae_tile=64)


def test_what_cannot_fit_is_one_line(nano, tmp_path, toy_plans):
    path = write_config(tmp_path / "run.yaml", entry(nano, L=4, H=64, W=64))
    with pytest.raises(UserError) as error:
        animate(load_config(path, {"max_memory": "1MB"}), output_dir=tmp_path / "never", device="cpu")
    assert re.fullmatch(
        r"got 1 MB of memory for 4 frames of 64x64, expected at least \d+ MB: raise max_memory, or choose smaller L, "
        r"H or W",
        str(error.value),
    )
    assert not (tmp_path / "never").exists()


def test_the_plan_of_a_config(nano, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = write_config(tmp_path / "run.yaml", entry(nano), entry(nano, prompt=["a", "b"], steps=3))
    arguments = ["--config", str(path), "--device", "cpu"]
    main([*arguments, "--plan", "--max-memory", "9GB"])
    out = capsys.readouterr().out
    assert "entry 1: 1 clip of 2 frames of 16x16, 2 steps, cpu float32" in out
    assert "entry 2: 2 clips of 2 frames of 16x16, 3 steps" in out
    assert out.count("peak") == 2 and out.count("may be used                    9,000 MB") == 2
    assert "time: unknown, as no clip of these networks was made here yet" in out
    animate(load_config(path), output_dir=tmp_path / "out", device="cpu")
    main([*arguments, "--plan"])
    assert re.search(r"time: about \d+ s a clip, \d+ s in all, as measured here", capsys.readouterr().out)


def test_the_budget_of_a_gpu_is_what_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * 10**9, 8 * 10**9))
    assert fitting.budget_of(Memory(), CUDA) == 5_300_000_000
    assert fitting.budget_of(Memory(max="3 GiB"), CUDA) == 3 * 2**30 and fitting.budget_of(Memory(), CPU) is None


def test_nothing_is_planned_where_there_is_plenty(make_entry, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 * 10**9,) * 2)
    monkeypatch.setattr(fitting, "choose", lambda *_: pytest.fail("a plan takes seconds"))
    (checked,) = check_requests([make_entry()])
    assert fit(checked, CUDA, torch.float16) is None and fit(checked, pick_device("cpu"), torch.float32) is None


def test_batches_shrink_first():
    """Also those that were set by hand: they say how many at most."""
    asked, takes = request(prompt=["a", "b", "c", "d", "e"], batch_size=8), {1: 400, 2: 800, 5: 2000}

    def plan(request):
        return MemoryPlan({"weights": 0}, {"a step": takes[fitting.clips_together(request)]}, 0)

    found = choose(asked, 1000, plan, CUDA)
    assert found.chosen == ("batch_size",) and found.request.memory.batch_size == 2
    assert recorded(asked, found.request) == asked
    assert "batch_size=2 (equal but for rounding; chosen)" in found.switches()
    assert choose(asked, 2000, plan, CUDA).request == asked


# ---- time -------------------------------------------------------------------------------------------------------


def test_times_are_remembered_and_scaled(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    watch, small = Stopwatch(CPU), request(L=8, H=64, W=64)
    for seconds in (10, 12, 14, 19):
        watch.times.append(watch.began + seconds)
    monkeypatch.setattr("time.perf_counter", lambda: watch.times[-1] + 4)
    assert estimate(small, 10, CPU, torch.float32) is None
    remember(small, watch, torch.float32)
    assert estimate(small, 10, CPU, torch.float32) == (pytest.approx(10 * 2 + 4), True)
    larger = request(L=8, H=128, W=64)
    assert estimate(larger, 10, CPU, torch.float32) == (pytest.approx(2 * (10 * 2 + 4)), False)
    two = request(L=8, H=64, W=64, prompt=["a", "b"], batch_size=2)
    assert estimate(two, 10, CPU, torch.float32) == (pytest.approx(10 * 2 + 4), False), "a clip of two"
    assert estimate(small, 10, CPU, torch.bfloat16) is None, "another type is another class"
    assert estimate(request(L=8, H=64, W=64, split_guidance=True), 10, CPU, torch.float32) is None


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"a": {"x": 1}}', '{"a": {"0": {}}}', '{"a": {"1": {"step": "1"}}}']
)
def test_a_damaged_memory_of_times_is_none(tmp_path, monkeypatch, content):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "animatediff").mkdir()
    (tmp_path / "animatediff/timings.json").write_text(content)
    assert estimate(request(), 10, CPU, torch.float32) is None
    watch = Stopwatch(CPU)
    watch.step()
    remember(request(), watch, torch.float32)
    assert estimate(request(), 10, CPU, torch.float32)
