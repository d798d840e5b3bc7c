"""Seeded mutants of prompt configs and command lines: requests that come back as written, or a mistake's lines.

`python -m tests.config.test_config_fuzz 20000` tries many.
"""

import copy
import random
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml

from animatediff.config.prompt_yaml import RunConfig, dump_config, load_config
from animatediff.config.request import Request
from animatediff.config.spellings import all_options, as_values, flat_names
from animatediff.utils import UserError, printable
from scripts.animate import collect_overrides, parse, read_config

CONFIGS = sorted((Path(__file__).parents[2] / "configs/animate").glob("*.yaml"))
SECONDS = 5
ODD = (
    *(None, True, [], {}, "", " ", "x", "\0", "\ud800", "a\nb", "${x}", "${oc.env:HOME}", "???", "1e3", "0x10", "=1"),
    *(-1, 0, 1, 3, 7, 2**31, 2**63, 2**64, 10**30, -0.5, 0.0, 1e-320, 1e300, float("inf"), float("-inf"), float("nan")),
    *([1], [1, 2, 3], [-1], [[]], [None], ["a", 1], {"a": 1}, {1: 2}, {None: 1}, {"": None}, "9" * 5000, [0] * 1000),
    *({0: "a", 5: "b"}, {-1: "a"}, {"x": "a"}, [[[[[[1]]]]]], "<<", "&a", "*a", "!!python/object:os.system x", b"x"),
)


def options(rng: random.Random) -> str:
    """The name of an option as people write it."""
    return rng.choice(rng.choice([sorted(all_options()), sorted(flat_names())]))


def change_value(rng: random.Random, config: object) -> None:
    """Something odd in place of one value, however deep; or a key more, less, or of another name."""
    while isinstance(config, list) and config:
        config = rng.choice(config)
    if not isinstance(config, dict) or not config:
        return
    key = rng.choice(list(config))
    if isinstance(config[key], dict | list) and rng.random() < 0.7:
        return change_value(rng, config[key])
    how = rng.random()
    if how < 0.1:
        del config[key]
    elif how < 0.2:
        config[rng.choice([f"{key}x", str(key)[::-1], None, True, 3, 2.5, "", "a\nb", options(rng)])] = config[key]
    elif how < 0.5:
        config[options(rng)] = rng.choice(ODD)
    elif how < 0.6 and isinstance(config[key], int | float) and not isinstance(config[key], bool):
        config[key] = config[key] * rng.choice([-1, 2, 1000, 0.5])
    else:
        config[key] = rng.choice(ODD)


def change_text(rng: random.Random, text: bytes) -> bytes:
    """Bytes flipped, cut, doubled or put in."""
    text, at = bytearray(text), rng.randrange(len(text))
    how = rng.randrange(4)
    if how == 0:
        text[at] ^= 1 << rng.randrange(8)
    elif how == 1:
        del text[at : at + rng.randrange(1, 40)]
    elif how == 2:
        text[at:at] = text[at : at + rng.randrange(1, 40)]
    else:
        text[at:at] = rng.choice([b"\t", b": ", b"- ", b"{", b"[" * 2000, b"'", b"\xff", b"&a [*a]", b"!!set ", b"\0"])
    return bytes(text)


def argument(rng: random.Random) -> str:
    value = rng.choice([rng.choice(ODD), rng.choice(ODD), rng.choice([1, 8, 0.5, "a red fox", [1, 2]])])
    text = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n")
    return rng.choice([f"{options(rng)}={text}", f"{options(rng)}={text}", f"--{rng.choice(FLAGS)}={text}", text])


FLAGS = ("prompt", "seed", "steps", "L", "W", "format", "no-such-flag", "guidance-scale")


def request_of(arguments: list[str]) -> RunConfig:
    args = parse(arguments)
    return read_config(args, collect_overrides(args), print)


def attempt(seed: int, folder: Path) -> str:
    """What comes of mutant `seed`: `requests` or the mistake's lines; anything else is raised."""
    rng = random.Random(seed)
    path = folder / f"{seed}.yaml"
    text = rng.choice(CONFIGS).read_bytes()
    what = rng.choice(["value", "value", "values", "text", "arguments"])
    arguments = [argument(rng) for _ in range(rng.randrange(1, 4))] if what == "arguments" else []
    if what.startswith("value"):
        config = copy.deepcopy(yaml.safe_load(text))
        for _ in range(1 if what == "value" else 4):
            change_value(rng, config)
        text = yaml.dump(config, allow_unicode=False).encode()
    elif what == "text":
        text = change_text(rng, text)
    if arguments:
        (folder / f"{seed}.txt").write_text(repr(arguments))
    path.write_bytes(text)
    start = time.process_time()
    try:
        config = request_of(["--config", str(path), *arguments])
    except UserError as error:
        message = printable(str(error))
        assert message and "Traceback" not in message
        assert all(len(line) < 1500 for line in message.splitlines()), message
        assert message.count("\n") <= 20, message
        return message
    finally:
        assert time.process_time() - start < SECONDS
    assert all(isinstance(entry, Request) for entry in config.entries)
    path.write_text(dump_config(config), encoding="utf-8")
    again = load_config(path)
    assert [as_values(e, changed_only=False) for e in again.entries] == [
        as_values(e, changed_only=False) for e in config.entries
    ]
    return "requests"


def attempts(seeds: range, folder: Path) -> list[str]:
    ends = []
    for seed in seeds:
        try:
            ends.append(attempt(seed, folder))
        except BaseException as error:
            written = [file.read_bytes()[:2000] for file in folder.glob(f"{seed}.*")]
            raise AssertionError(f"mutant {seed}: {error!r}\n{written!r}") from error
    return ends


def test_mutants(tmp_path):
    ends = attempts(range(20), tmp_path)
    assert "requests" in ends and len(set(ends)) > 5


@pytest.mark.slow
def test_more_mutants(tmp_path):
    attempts(range(1000, 1300), tmp_path)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        ends = attempts(range(10**6, 10**6 + int(sys.argv[1])), Path(folder))
    print(f"{len(ends)} mutants: {ends.count('requests')} requests, {len(set(ends)) - 1} different mistakes")
