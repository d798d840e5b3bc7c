"""What other programs read in prompts is told, not silently taken as words."""

import pytest

from animatediff.config.prompt_warnings import prompt_warnings
from animatediff.config.request import Prompts


@pytest.mark.parametrize(
    ("prompt", "options", "line"),
    [
        ("a fox <lora:style:0.6>", {}, "<lora:style:0.6> in a prompt is taken as words"),
        ({0: "a fox", 8: "<lyco:x>"}, {}, "<lyco:x> in a prompt"),
        ("0: a fox\n8: a wolf", {}, "lines such as `0: …`"),
        ("a (red:1.2) fox", {}, r"(red:1.2) is taken as text"),
        ("a (red:1.2) fox", {"weighting": True}, None),
        ("a fox (at night): 1 of 2", {}, None),
        ("at 8:30 a fox wakes", {}, None),
    ],
)
def test_warnings(prompt, options, line):
    found = list(prompt_warnings(Prompts(prompt=(prompt,), **options)))
    assert len(found) == (line is not None) and (line is None or found[0].startswith(line))
