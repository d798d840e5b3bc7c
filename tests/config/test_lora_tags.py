"""LoRAs that prompts name."""

import pytest

from animatediff.config.lora_tags import LoRATag, take_tags
from animatediff.utils import UserError


@pytest.mark.parametrize(
    ("text", "plain", "tags"),
    [
        ("a fox", "a fox", []),
        ("a fox <lora:style:0.6>", "a fox", [("style", 0.6)]),
        ("<lora:my style v1.2:-.5>, a fox", ", a fox", [("my style v1.2", -0.5)]),
        ("a <LORA:a:1> fox <lyco:sub/b>", "a  fox", [("a", 1.0), ("sub/b", 1.0)]),
        ("(a fox <lora:a:.5:0.5>:1.2)", "(a fox :1.2)", [("a", 0.5)]),
        ("<lora:a:te=1:unet=1> <lora:a:1>", "", [("a", 1.0)]),
        ("a < b and <b> <lora:> <lora::1> <hypernet:x:1>", "a < b and <b> <lora:> <lora::1> <hypernet:x:1>", []),
    ],
)
def test_tags(text, plain, tags):
    found = take_tags(text)
    assert found[1] == tuple(LoRATag(*tag) for tag in tags)
    assert found[0].split() == plain.split()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<lora:a:much>", "got '<lora:a:much>', expected a number, as in <lora:a:0.8>"),
        ("<lora:a:>", "expected a number"),
        ("<lora:a:nan>", "expected a number"),
        ("<lora:a:1e9>", "expected a number"),
        ("<lora:a:0.5:0.8>", "expected one scale for text encoder and UNet"),
        ("<lora:a:lbw=ALL>", "expected a number"),
        ("<lora:a:0.5> <lora:a:0.8>", "got '<lora:a:0.8>' after another scale of it"),
        ("".join(f"<lora:{i}>" for i in range(101)), "got a prompt with 101 LoRAs"),
    ],
)
def test_what_cannot_be_read_is_an_error(text, message):
    with pytest.raises(UserError, match=message) as error:
        take_tags(text)
    assert "\n" not in str(error.value)


def test_long_texts_take_no_time():
    for text in ("<lora:" * 100_000, "<lora:a" + ":1" * 200_000, "<lora:a:" * 100_000):
        assert take_tags(text)[1] == ()
