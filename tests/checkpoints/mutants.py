"""Damaged copies of weight files, drawn from a seed, and a process of its own that reads them.

`python -m tests.checkpoints.mutants --count 2000 [--seed 0]` tries many and says what came of them.
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import os
import random
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from animatediff.checkpoints.file_kinds import KINDS
from animatediff.checkpoints.files import read_state_dict, write_state_dict
from animatediff.utils import UserError
from tests.checkpoints.synthetic import (
    METADATA,
    ldm_tensors,
    lora_tensors,
    motion_tensors,
    sparsectrl_tensors,
    with_positional,
    write,
)

FORMATS = ("safetensors", "ckpt", "families", "folder", "tokenizer")
SECONDS, BYTES = 10, 2 << 30  # that one file may take
OUTCOMES = ("read", "refused")
Mutant = tuple[str, int]  # a format and a seed


# --- good files ------------------------------------------------------------------------------------------------------


def good_tensors(rng: random.Random) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Some kind of weight file and its metadata."""
    kind = rng.choice(("ldm", "motion", "kohya", "motion_lora", "domain_adapter", "embedding"))
    if kind == "ldm":
        return ldm_tensors(), METADATA
    if kind == "motion":
        return with_positional(motion_tensors(rng.choice(("v1", "v2", "v3"))), rng.choice((16, 24, 32))), {}
    if kind == "embedding":
        return {"emb_params": torch.randn(2, 768)}, {}
    return lora_tensors({"kohya": "kohya_lora"}.get(kind, kind)), {"ss_base_model_version": "sd_v1"}


def family_tensors(rng: random.Random) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The file of something beside an image model and a motion module, and its metadata."""
    from tests import control, families, sdxl
    from tests.models.test_lora_algorithms import FILES
    from tests.models.test_lora_algorithms import lora_tensors as algorithm_tensors

    algorithm = rng.choice(list(FILES))
    made: list[Callable[[], dict[str, torch.Tensor]]] = [
        control.controlnet_tensors,
        control.controlnet_diffusers_tensors,
        lambda: control.ip_adapter_tensors(rng.choice(("base", "plus", "full"))),
        control.clip_vision_tensors,
        lambda: sparsectrl_tensors(rng.choice(("rgb", "scribble"))),
        lambda: families.conditioned_motion_tensors(rng.choice(("pia", "animatelcm_i2v"))),
        families.cameractrl_tensors,
        lambda: sdxl.motion(rng.choice(sdxl.MOTION)),
        sdxl.checkpoint,
        lambda: algorithm_tensors(algorithm),
    ]
    chosen = rng.choice(made)
    metadata = sdxl.METADATA if chosen is sdxl.checkpoint else FILES[algorithm].get("metadata") or {}
    return chosen(), metadata


ODD_NUMBERS = ("x", "²", "", "-1", "99999999", "9" * 5000, "0", "7", "\x1b[2J", "1e400", "nan", "true", "null")


def odd_key(key: str, rng: random.Random) -> str:
    parts = key.split(".")
    i = rng.randrange(len(parts))
    choice = rng.randrange(4)
    if choice == 0:
        parts[i] = rng.choice(ODD_NUMBERS)
    elif choice == 1:
        del parts[i]
    elif choice == 2:
        parts.insert(i, parts[i])
    else:
        parts[i] = parts[i][::-1]
    return ".".join(parts)


def odd_tensor(t: torch.Tensor, rng: random.Random) -> torch.Tensor:
    changes: list[Callable[[], torch.Tensor]] = [
        lambda: t.flatten(),
        lambda: t.flatten()[:0],
        lambda: t.flatten()[0].clone() if t.numel() else t,
        lambda: t[None],
        lambda: torch.cat([t, t]) if t.dim() else t,
        lambda: t.mT.contiguous() if t.dim() > 1 else t,
        lambda: t.to(
            rng.choice((torch.int8, torch.int16, torch.bool, torch.float64, torch.float8_e5m2, torch.bfloat16))
        ),
        lambda: t * float("nan"),
        lambda: t * 1e38 * 1e38,
        lambda: t[..., :-1] if t.dim() else t,
    ]
    return rng.choice(changes)()


def mutated_tensors(
    rng: random.Random, good: tuple[dict[str, torch.Tensor], dict[str, str]]
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    tensors, metadata = good
    tensors, metadata = dict(tensors), dict(metadata)
    for _ in range(rng.choice((0, 1, 1, 2, 5))):
        key = rng.choice(list(tensors))
        choice = rng.randrange(4)
        if choice == 0:
            tensors[odd_key(key, rng)] = tensors.pop(key)
        elif choice == 1:
            tensors[key] = odd_tensor(tensors[key], rng)
        elif choice == 2:
            tensors.pop(key)
        else:
            name = rng.choice(
                (
                    "num_heads",
                    "version",
                    "vae_scaling_factor",
                    "prediction_type",
                    "max_frames",
                    "x",
                    "lora_adapter_metadata",
                    "norm_num_groups",
                    "text_num_heads",
                    "ss_base_model_version",
                )
            )
            metadata[name] = rng.choice((*ODD_NUMBERS, "v1", "{", "[" * 5000, '{"lora_alpha": []}', "8", "1e-320"))
        if not tensors:
            tensors["a"] = torch.ones(1)
    return tensors, metadata


def mutated_bytes(data: bytes, rng: random.Random, *, front: int = 4000) -> bytes:
    """Bits, bytes and pieces changed, most of them where the structure is: in front and at the end."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        size = len(out)
        if not size:
            break
        place = rng.choice(
            (rng.randrange(min(size, front)), max(0, size - 1 - rng.randrange(min(size, front))), rng.randrange(size))
        )
        choice = rng.randrange(6)
        if choice == 0:
            out[place] ^= 1 << rng.randrange(8)
        elif choice == 1:
            out[place] = rng.choice((0, 0x7F, 0x80, 0xFF, ord("9"), ord("{"), ord("["), ord(".")))
        elif choice == 2:
            del out[place : place + rng.choice((1, 2, 8, 100))]
        elif choice == 3:
            out[place:place] = bytes(rng.randrange(256) for _ in range(rng.choice((1, 4, 8))))
        elif choice == 4:
            del out[place:]
        else:
            out[place : place + 8] = struct.pack("<Q", rng.choice((0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)))
    return bytes(out)


def mutated_json(content: object, rng: random.Random) -> object:
    """One value anywhere replaced."""
    if isinstance(content, dict) and content and rng.random() < 0.9:
        key = rng.choice(list(content))
        if rng.random() < 0.1:
            return {name: value for name, value in content.items() if name != key}
        return content | {key: mutated_json(content[key], rng)}
    if isinstance(content, list) and content and rng.random() < 0.7:
        i = rng.randrange(len(content))
        return [mutated_json(value, rng) if j == i else value for j, value in enumerate(content)]
    return rng.choice(
        (None, True, False, 0, -1, 7, 10**30, 1e308, 1e-320, "", "x", "\x1b[2J", [], {}, [0], [1, "a"], {"a": {}})
    )


# --- one mutant ------------------------------------------------------------------------------------------------------


def make_mutant(format: str, seed: int, folder: Path) -> Path:
    """Write the damaged file (or folder) of a seed, and say where."""
    rng = random.Random(f"{format} {seed}")
    if format == "families":
        from tests.control import CONFIG

        tensors, metadata = mutated_tensors(rng, family_tensors(rng))
        beside = mutated_json(CONFIG["clip"], rng) if rng.random() < 0.3 else CONFIG["clip"]
        (folder / "config.json").write_text(json.dumps(beside), encoding="utf-8")  # which the image encoder needs
        return write_state_dict(folder / "x.safetensors", tensors, metadata=metadata)
    if format in ("safetensors", "ckpt"):
        path = folder / f"x.{format}"
        tensors, metadata = mutated_tensors(rng, good_tensors(rng))
        if format == "ckpt" and rng.random() < 0.3:
            torch.save({"state_dict": tensors, "epoch": 1}, path, _use_new_zipfile_serialization=False)
        else:
            write_state_dict(path, tensors, metadata=metadata)
        if rng.random() < 0.6:
            path.write_bytes(mutated_bytes(path.read_bytes(), rng))
        return path
    if format == "tokenizer":
        return write_texts(folder / "tokenizer", TOKENIZER, rng)
    return make_folder(folder / "model", rng)


TOKENIZER: dict[str, object] = {
    "vocab.json": {"a": 0, "b</w>": 1, "ab</w>": 2, "<|startoftext|>": 3, "<|endoftext|>": 4},
    "tokenizer_config.json": {"model_max_length": 77, "bos_token": "<|startoftext|>"},
    "special_tokens_map.json": {"pad_token": "<|endoftext|>"},
    "merges.txt": "#version: 0.2\na b</w>\n",
}


def write_texts(folder: Path, texts: dict[str, object], rng: random.Random | None) -> Path:
    """Write JSON and other texts, one of them damaged; without `rng` none is."""
    victim = rng and rng.choice(list(texts))
    for name, content in texts.items():
        data = (content if isinstance(content, str) else json.dumps(content)).encode()
        if rng and name == victim:
            broken = not isinstance(content, str) and rng.random() < 0.7
            data = json.dumps(mutated_json(content, rng)).encode() if broken else mutated_bytes(data, rng)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def make_folder(folder: Path, rng: random.Random | None) -> Path:
    """A diffusers folder of which one config is damaged; without `rng` none is."""
    weights, configs = good_folder()
    shutil.copytree(weights.name, folder, copy_function=os.link)
    return write_texts(folder, configs, rng)


@functools.cache
def good_folder() -> tuple[tempfile.TemporaryDirectory, dict[str, object]]:
    """A diffusers folder without its configs, and these."""
    from animatediff.checkpoints import diffusers_json as dj
    from animatediff.checkpoints.parts import read_image_parts
    from animatediff.checkpoints.sizes import text_config, unet_config, vae_config
    from animatediff.config.networks import ScheduleConfig

    folder = tempfile.TemporaryDirectory()
    path = write(Path(folder.name) / "good.safetensors", ldm_tensors(), **METADATA)
    parts = read_image_parts(path)
    path.unlink()
    stem = {"text_encoder": dj.TEXT_STEMS[0]}
    for name, tensors in (("unet", parts.unet), ("vae", parts.vae), ("text_encoder", parts.text)):
        (path.parent / name).mkdir()
        write_state_dict(path.parent / name / f"{stem.get(name, dj.UNET_STEM)}.safetensors", tensors or {})
    write_texts(path.parent / "tokenizer", TOKENIZER, None)
    return folder, {
        "unet/config.json": dj.unet_json(unet_config(parts.unet, parts.metadata)),
        "vae/config.json": dj.vae_json(vae_config(parts.vae or {}, parts.metadata)),
        "text_encoder/config.json": dj.text_json(text_config(parts.text or {}, parts.metadata)),
        "scheduler/scheduler_config.json": dj.scheduler_json(ScheduleConfig()),
        "model_index.json": dj.model_index_json(),
    }


def load(path: Path) -> None:
    """As a person's run would: say what it is, then load it as that."""
    from animatediff.checkpoints.cameractrl_files import load_cameractrl
    from animatediff.checkpoints.controlnet_files import load_controlnet
    from animatediff.checkpoints.identify import identify
    from animatediff.checkpoints.image_encoder_files import load_image_encoder
    from animatediff.checkpoints.ip_adapter_files import load_ip_adapter
    from animatediff.checkpoints.load import load_base, load_motion_module
    from animatediff.checkpoints.lora_files import read_lora
    from animatediff.checkpoints.motion_condition_files import load_motion_condition
    from animatediff.checkpoints.sparsectrl_files import load_sparsectrl
    from animatediff.models.lora import LoRAStack
    from animatediff.models.tokenizer import Tokenizer

    if path.name == "tokenizer":
        Tokenizer.from_folder(path)(["a b ab"])
        return
    info = identify(path)
    assert info.kind in KINDS and info.config_line
    beside = {
        "controlnet": load_controlnet,
        "sparsectrl": load_sparsectrl,
        "ip-adapter": lambda path, unet, vae: load_ip_adapter(path, unet),
        "cameractrl": lambda path, unet, vae: load_cameractrl(
            path, load_motion_module(unet, os.environ["MUTANTS_MOTION"])[0]
        ),
        "image-encoder": lambda path, unet, vae: load_image_encoder(path),
    }
    if info.kind in ("sd1-checkpoint", "diffusers-folder", "sdxl-checkpoint"):
        load_base(path)
    elif info.kind in beside:
        base = load_base(os.environ["MUTANTS_BASE"])
        beside[info.kind](path, base.unet, base.vae)
    elif info.kind in ("pia", "animatelcm-i2v"):
        base = load_base(os.environ["MUTANTS_BASE"])
        load_motion_condition(path, load_motion_module(base.unet, path)[0])
    elif info.kind in ("motion-module", "motion-adapter", "motion-lora", "lora", "domain-adapter"):
        base = load_base(os.environ["MUTANTS_BASE"])
        if "lora" in info.kind or info.kind == "domain-adapter":
            stack = LoRAStack(base.unet, base.text_encoder)
            stack.add(read_lora(path))
            stack.merge()
        else:
            load_motion_module(base.unet, path)
    elif info.kind == "textual-inversion":
        read_state_dict(path)
    if path.is_dir() and (path / "tokenizer").is_dir():
        Tokenizer.from_folder(path / "tokenizer")(["a b ab"])


def outcome(path: Path) -> str:
    """What came of loading a file: one of OUTCOMES, else what went wrong."""
    try:
        load(path)
    except UserError as error:
        text = str(error)
        clear = len(text) < 2000 and text.isprintable()
        return "refused" if clear else f"a poor message: {text[:200]!r}"
    except Exception as error:  # noqa: BLE001 (that is what the test is about)
        import traceback

        return f"{type(error).__name__}: {traceback.format_exc()[-900:]}"
    return "read"


def worker(mutants: list[Mutant]) -> None:
    """Try some mutants, each within SECONDS and BYTES; a line of JSON for each."""
    import signal

    torch.set_num_threads(1)
    limit = resource.getrlimit(resource.RLIMIT_AS)[1]
    with tempfile.TemporaryDirectory() as name:
        os.environ["MUTANTS_BASE"] = str(write(Path(name) / "base.safetensors", ldm_tensors(), **METADATA))
        motion = write(Path(name) / "motion.safetensors", motion_tensors("v3"), version="v3")
        os.environ["MUTANTS_MOTION"] = str(motion)
        for format, seed in mutants:
            with tempfile.TemporaryDirectory(dir=name) as folder:
                path = make_mutant(format, seed, Path(folder))
                used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, limit))
                print(json.dumps([format, seed, "started"]), flush=True)
                signal.setitimer(
                    signal.ITIMER_PROF, SECONDS + 1
                )  # of the processor; ends the process, a hang in foreign code too
                signal.alarm(12 * SECONDS)  # of the clock: a busy machine is no hang, waiting for a pipe is
                start = time.process_time()
                result = outcome(path)
                spent = time.process_time() - start
                signal.setitimer(signal.ITIMER_PROF, 0)
                signal.alarm(0)
                resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
                result = f"took {spent:.0f} s" if spent > SECONDS else result
                print(json.dumps([format, seed, result]), flush=True)


def try_mutants(formats: Sequence[str], first: int, count: int) -> dict[Mutant, str]:
    """What came of `count` mutants of each format, in processes that may crash: the next goes on where one did."""
    found: dict[Mutant, str] = {}
    while left := [(f, seed) for f in formats for seed in range(first, first + count) if (f, seed) not in found]:
        done = subprocess.run(
            [sys.executable, "-m", "tests.checkpoints.mutants", "--worker"],
            input=json.dumps(left),
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[2],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        found |= {(format, seed): outcome for format, seed, outcome in rows}
        if done.returncode:
            if not rows or rows[-1][2] != "started":
                raise AssertionError(f"the worker failed: {done.stderr[-2000:]}")
            ended = f"the process ended with {done.returncode} (-27: more than {SECONDS} s): {done.stderr[-300:]}"
            found[tuple(rows[-1][:2])] = ended
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Read damaged weight files and say what came of it.")
    parser.add_argument("--count", type=int, default=500, help="mutants of every format")
    parser.add_argument("--seed", type=int, default=0, help="of the first")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)  # which mutants, comes on stdin
    args = parser.parse_args()
    if args.worker:
        return worker(json.load(sys.stdin))
    for format in FORMATS:
        found = try_mutants([format], args.seed, args.count)
        bad = {seed: result for (_, seed), result in found.items() if result not in OUTCOMES}
        print(format, dict(collections.Counter(r if r in OUTCOMES else "WRONG" for r in found.values())), flush=True)
        for seed, result in bad.items():
            print(f"  {format} {seed}: {result}", flush=True)


if __name__ == "__main__":
    main()
