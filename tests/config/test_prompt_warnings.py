"""What other programs read in prompts is told, not silently taken as words."""

import pytest

from animatediff.config.prompt_warnings import prompt_warnings
from animatediff.config.request import Prompts


@pytest.mark.parametrize(
    ("prompt", "options", "line"),
    [
        ("a fox <lora:style:0.6>", {}, "<lora:style:0.6> in a prompt is taken as words"),
        ({0: "a fox", 8: "<lyco:x>"}, {}, "<lyco:x> in a prompt"),
        ("0: a fox\n8: a wolf", {}, "keyframes such as `0: …` in one text are taken as words"),
        ("{0: a fox, 8: a wolf}", {}, "keyframes such as `0: …` in one text are taken as words"),
        ("a [red:blue:0.5] fox", {"weighting": True}, "[red:blue:0.5] in a prompt is taken as words: there is no"),
        ("a [red|blue] fox", {}, "[red|blue] in a prompt is taken as words"),
        ("a [red] fox", {"weighting": True}, None),
        ("a fox AND a wolf", {}, "AND between prompts is taken as a word"),
        ("a HAND and SAND", {}, None),
        ("a __color__ fox", {}, "__color__ in a prompt is taken as words: there are no wildcards"),
        ("a {red|blue} fox", {}, "{red|blue} in a prompt is taken as words"),
        ("a {red} fox_cub _____", {}, None),
        ("\n" * 20_000, {}, None),  # at once
        ("a (red:1.2) fox", {}, r"(red:1.2) is taken as text"),
        ("a (red:1.2) fox", {"weighting": True}, None),
        ("a fox (at night): 1 of 2", {}, None),
        ("at 8:30 a fox wakes", {}, None),
    ],
)
def test_warnings(prompt, options, line):
    found = list(prompt_warnings(Prompts(prompt=(prompt,), **options)))
    assert len(found) == (line is not None) and (line is None or found[0].startswith(line))
