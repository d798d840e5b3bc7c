"""Damaged and hostile settings of other programs are read as far as they go, or are none; nothing else happens."""

import copy
import json
import random

import pytest

from animatediff.config.comfy_prompt import read_prompt
from animatediff.config.foreign_settings import LONGEST_REMARK, SAMPLERS, SPACINGS
from animatediff.config.infotext import read_infotext
from animatediff.config.spellings import all_options, build_request
from tests.config.test_comfy_prompt import clip, picture
from tests.config.test_infotext import CLIP, SD15

TEXTS = [
    "", "\0", "\ud800", "狐", '"', "\\", "{", "}", "[", "]", ":", ",", "\n", "<lora:", ">", "nan", "1e999", "-1",
    "9" * 30, "null", "Steps: ", 'AnimateDiff: "', "Hashes: {", "Size: 0x0", "Negative prompt:", " AND ", "\n0: ",
    "Hires upscale: ", "Denoising strength: 0, ",
]  # fmt: skip
VALUES = [
    None, True, -1, 0, 1e308, float("nan"), "", "x" * 2000, [], ["3", 0], ["6", 0], ["99", 0], [None, None], {},
    {"a": 1}, 10**30, "\ud800", "lcm", [["a"], 0],
]  # fmt: skip


def damaged_text(text: str, rng: random.Random) -> str:
    for _ in range(rng.randint(1, 6)):
        at, to = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        text = rng.choice((
            text[:at] + rng.choice(TEXTS) + text[at:],
            text[:at] + text[at + rng.randint(1, 20) :],
            text[:at] + text[at:to][:200] + text[at:],
        ))  # fmt: skip
    return text


def damaged_graph(graph: dict, rng: random.Random) -> dict:
    graph = copy.deepcopy(graph)
    for _ in range(rng.randint(1, 5)):
        name, value = rng.choice(list(graph)), copy.deepcopy(rng.choice(VALUES))
        node = graph[name]
        inputs = node.get("inputs") if isinstance(node, dict) else None
        if isinstance(inputs, dict) and inputs and rng.random() < 0.7:
            inputs[rng.choice(list(inputs))] = value
        elif isinstance(node, dict):
            node[rng.choice(("class_type", "inputs"))] = rng.choice((value, "KSampler", "Reroute"))
        else:
            graph[name] = value
    return graph


@pytest.mark.parametrize("seed", range(3))
def test_mutants(seed):
    """What is taken over, the options can hold, all of it together; what is not fits a line."""
    rng, read = random.Random(seed), 0
    for _ in range(60):
        graphs = (json.dumps(damaged_graph(clip(), rng)), json.dumps(damaged_graph(picture(), rng)))
        texts = [(read_infotext, damaged_text(text, rng)) for text in (SD15, CLIP)]
        texts += [(read_prompt, text) for text in (*graphs, damaged_text(json.dumps(clip()), rng))]
        for reader, text in texts:
            if (found := reader(text)) is not None:
                read += 1
                build_request(found.values, where="", check=False)
                assert all(len(line) <= LONGEST_REMARK and "\n" not in line for line in found.without)
                assert any(wanted.option == "model.base" for wanted in found.wanted)
    assert read > 100


def test_every_name_stands_for_one_of_ours():
    """And every sampler of ours is known to them."""
    ours = {
        option: set(all_options()[f"sampling.{option}"].hint.__args__) for option in ("sampler", "timestep_spacing")
    }
    assert {name for name, _ in SAMPLERS.values()} == ours["sampler"] - {""}
    assert {name for name, _ in SPACINGS.values()} <= ours["timestep_spacing"] - {""}
