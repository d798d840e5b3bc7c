"""Seeded mutants of a training's config and of what it reads: a training, or one line; never a traceback or a hang."""

import copy
import multiprocessing
import os
import random
import resource
import shutil
import signal
import traceback
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import yaml
from PIL import Image

from animatediff.training.lora_stages import Algorithm
from animatediff.utils import UserError, told
from scripts import train
from tests.nano import write_files

FORK = multiprocessing.get_context("fork")
SECONDS, BYTES = 60, 3 << 30  # of CPU time, and of memory beyond what the tests themselves take
LOOP = {
    "steps": 2,
    "batch_size": 2,
    "learning_rate": 1e-3,
    "warmup_steps": 1,
    "checkpoint_every": 1,
    "micro_batches": 2,
}
DEEP = "<two thousand brackets>"
ENCODER = str(Path(__file__).parents[2] / "animatediff/assets/shapes_encoder.safetensors")
STAGES = (
    {"stage": "image_lora", "rank": 2, "alpha": 2, "algorithm": "lora", "train_text_encoder": True},
    {"stage": "image_finetune", "loss": {"min_snr_gamma": 5.0, "noise_offset": 0.1}, "cache": True},
    {"stage": "motion_lora", "rank": 2, "version": "v2", "algorithm": "lora", "high_noise_fraction": 0.5},
    {"stage": "motion_module", "motion": {"version": "v2", "num_heads": 2, "resolutions": [2]}, "zero_init": False},
    {"stage": "controlnet", "samples": {"every": 2, "prompt": "a", "L": 1, "controlnet_images": "a.png"}},
    {"stage": "ip_adapter", "image_encoder": ENCODER, "variant": "base", "tokens": 2},
)
ALGORITHMS = get_args(Algorithm)
ODD = (
    *(None, True, [], {}, "", "x", "\0", "~nosuchuser/x", "\ud800", "a\nb", "${x}", "/proc/self/mem", "1e3", "=1"),
    *(-1, 0, 1, 3, 7, 2**31, 2**63, 2**64, 10**30, 10**400, -0.5, 0.0, 1e-320, 1e300, float("inf"), float("nan")),
    *([1], [1, 2, 3], [-1], [[]], [None], ["a", 1], {"a": 1}, {1: 2}, {"": None}, "9" * 5000, [0] * 1000),
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """The golden network's files, two pictures with captions, and lists of videos that are not there."""
    import torch._dynamo  # noqa: F401 (optimisers do: once here instead of in every fork)

    folder = write_files(tmp_path_factory.mktemp("fuzz"))
    rng = np.random.default_rng(0)
    for name in "ab":
        Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a picture {name}")
    (folder / "list.csv").write_text("path,caption\na.mp4,one\nb.mp4,two\n")
    (folder / "list.jsonl").write_text('{"path": "a.mp4", "caption": "one"}\n')
    return folder


def base_config(rng: random.Random, inputs: Path, output: Path) -> dict:
    config = {
        **copy.deepcopy(rng.choice(STAGES)),
        "output_dir": str(output),
        "loop": dict(LOOP),
        "num_workers": 0,
        "seed": 1,
    }
    config["pretrained_model_path"] = str(inputs / "nano.safetensors")
    if "algorithm" in config:
        config["algorithm"] = rng.choice(ALGORITHMS)
    if config["stage"] == "motion_lora":
        config["motion_module"] = str(inputs / "mm_v2.safetensors")
    if config["stage"].startswith("motion"):
        file = rng.choice(["list.csv", "list.jsonl"])
        source = {
            "train_data": {"csv_path": str(output / file), "sample_size": 16, "sample_n_frames": 2, "crop": "center"}
        }
        return config | rng.choice([source, {"world": {"clips": 2, "style": "plain", "motions": ["left"], "seed": 0}}])
    return config | {"image_data": {"image_folder": str(output), "sample_size": [16, 16], "flip": True, "caption": "a"}}


def change_value(rng: random.Random, config: dict) -> None:
    """Something else in place of one value, however deep; or a key more, less, or of another name."""
    inner, key = config, rng.choice(list(config))
    while isinstance(inner[key], dict) and inner[key] and rng.random() < 0.8:
        inner = inner[key]
        key = rng.choice(list(inner))
    how = rng.random()
    if how < 0.1:
        del inner[key]
    elif how < 0.2:
        inner[rng.choice([f"{key}x", key[:-1], "", "x" * 5000, "\ud800"])] = inner.pop(key)
    elif how < 0.25:
        inner[key] = DEEP
    else:
        inner[key] = rng.choice([odd for odd in ODD if key != "steps" or odd in (None, "x", -1, 0, 3)])


def change_bytes(rng: random.Random, path: Path) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 4, 32])):
        where = rng.randrange(len(data) + 1)
        match rng.randrange(4):
            case 0:
                del data[where:]
            case 1:
                data[where:where] = rng.choice(
                    [b"\0", b"\xff\xfe", b"\xed\xa0\x80", b'"', b"[" * 5000, b"\n", b"${", b","]
                )
            case 2 if data:
                data[min(where, len(data) - 1)] ^= 1 << rng.randrange(8)
            case _:
                data[where:where] = bytes(rng.randrange(256) for _ in range(rng.randrange(40)))
    path.write_bytes(data)


def attempt(config: Path) -> str:
    """What a training ends in: "done", "error: …", or a traceback."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
    signal.signal(signal.SIGXCPU, lambda *_: (_ for _ in ()).throw(TimeoutError("too long")))
    os.chdir(config.parent)  # in which any relative output_dir is
    try:
        train.main(["--config", str(config), "--device", "cpu"])
        return "done"
    except TimeoutError:
        return traceback.format_exc()
    except (UserError, OSError) as error:
        return f"error: {told(error)}"  # as run_main prints it
    except BaseException:
        return traceback.format_exc()


def in_child(config: Path) -> str:
    receiver, sender = FORK.Pipe(duplex=False)
    child = FORK.Process(target=lambda: sender.send(attempt(config)))
    child.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        return "Traceback: the process ended without a word"
    finally:
        child.join()


def mutant(rng: random.Random, inputs: Path, output: Path) -> Path:
    for file in [*inputs.glob("*.png"), *inputs.glob("*.txt"), *inputs.glob("list.*")]:
        shutil.copy(file, output)
    config = base_config(rng, inputs, output)
    what = rng.choice(["value", "value", "value", "values", "text", "input", "input"])
    for _ in range({"value": 1, "values": 4}.get(what, 0)):
        change_value(rng, config)
    path = output / "config.yaml"
    text = yaml.dump(config, allow_unicode=False).replace(DEEP, "[" * 2000 + "]" * 2000)
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    if what == "text":
        change_bytes(rng, path)
    elif what == "input":
        change_bytes(rng, rng.choice([*output.glob("*.png"), *output.glob("*.txt"), *output.glob("list.*")]))
    return path


def check(seed: int, inputs: Path, output: Path) -> str:
    end = in_child(mutant(random.Random(seed), inputs, output))
    assert "Traceback" not in end, f"mutant {seed}: {end}\n{(output / 'config.yaml').read_bytes()[:3000]!r}"
    if end.startswith("error: "):
        lines = end.splitlines()
        assert len(lines) <= 11 and all(line.isprintable() and len(line) < 1000 for line in lines), (
            f"mutant {seed}: {end}"
        )
    return end


def test_mutants(inputs, tmp_path):
    ends = []
    for seed in range(20):
        (tmp_path / str(seed)).mkdir()
        ends.append(check(seed, inputs, tmp_path / str(seed)))
    assert "done" in ends and len(set(ends)) > 5


@pytest.mark.slow
@pytest.mark.parametrize("first", range(100, 400, 50))
def test_more_mutants(inputs, tmp_path, first):
    for seed in range(first, first + 50):
        (tmp_path / str(seed)).mkdir()
        check(seed, inputs, tmp_path / str(seed))
