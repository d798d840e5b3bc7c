"""Weights in prompts: the web UI's grammar, token by token, and what they do to an embedding."""

import pytest
import torch

from animatediff.models.prompt_weighting import parse_prompt, weigh_states
from animatediff.models.tokenizer import END, Tokenizer

UP, DOWN = 1.1, 1 / 1.1


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a red fox", [("a red fox", 1)]),
        ("", [("", 1)]),
        ("a (red:1.3) fox", [("a ", 1), ("red", 1.3), (" fox", 1)]),
        ("a (red) [fox]", [("a ", 1), ("red", UP), (" ", 1), ("fox", DOWN)]),
        ("((x))[[y]]", [("x", UP**2), ("y", DOWN**2)]),
        ("(a (b:2) c:0.5)", [("a ", 0.5), ("b", 1), (" c", 0.5)]),
        ("(a:.5)(b:-1)(c: 2 )", [("a", 0.5), ("b", -1), ("c", 2)]),
        (r"a \(b\) \[c\] \\", [(r"a (b) [c] " + "\\", 1)]),
        (r"(\(a\):2)", [("(a)", 2)]),
        ("ratio 16:9, a:b", [("ratio 16:9, a:b", 1)]),
        # unbalanced
        ("a (b [c", [("a ", 1), ("b ", UP), ("c", 1)]),
        ("a) b] c:1.2)", [("a) b] c:1.2)", 1)]),
        ("(a [b) c]", [("a ", UP), ("b", 1), (" c", DOWN)]),
        ("(a:1.2.3)", [("a:1.2.3", UP)]),
    ],
)
def test_grammar(prompt, expected):
    (section,) = parse_prompt(prompt)
    assert [text for text, _ in section] == [text for text, _ in expected]
    assert [weight for _, weight in section] == pytest.approx([weight for _, weight in expected])


def test_break_begins_a_section():
    assert parse_prompt("a BREAK b") == [[("a", 1.0)], [("b", 1.0)]]
    assert parse_prompt("BREAK a BREAK\nBREAK b BREAK") == [[("a", 1.0)], [("b", 1.0)]]
    assert parse_prompt("(a BREAK b:2) BREAKFAST") == [[("a", 2.0)], [("b", 2.0), (" BREAKFAST", 1.0)]]
    assert parse_prompt("BREAK") == [[("", 1.0)]]


def test_every_token_has_its_weight():
    tokenizer = Tokenizer()
    red, running, fox, end = *(tokenizer.tokenize(word)[0] for word in ("red", "running", "fox")), tokenizer.end_id
    ids, weights = tokenizer.weighted([parse_prompt("(red running:1.5) fox BREAK [fox]"), parse_prompt("red")])
    assert ids.shape == weights.shape == (2, 2, 77)
    assert ids[0, :, 1:5].tolist() == [[red, running, fox, end], [fox, end, end, end]]
    assert weights[0, 0, :5].tolist() == [1, 1.5, 1.5, 1, 1] and weights[0, 1, 1] == pytest.approx(DOWN)
    assert (weights[1] == 1).all() and (weights[0, :, 5:] == 1).all()


@pytest.mark.parametrize("prompt", ["", "a red fox", "cat dog, " * 60, f"a {END} b"])
def test_without_weights_nothing_changes(prompt):
    tokenizer = Tokenizer()
    ids, weights = tokenizer.weighted([parse_prompt(prompt)])
    assert torch.equal(ids, tokenizer([prompt])) and (weights == 1).all()
    states = torch.randn(len(ids[0]), 77, 8)
    assert torch.equal(weigh_states(states, weights[0]), states)


def test_weights_scale_tokens_and_keep_the_mean_of_each_row():
    states, weights = torch.randn(2, 5, 8) + 0.5, torch.ones(2, 5)
    weights[0, 2] = 1.5
    weighed = weigh_states(states, weights)
    assert torch.equal(weighed[1], states[1])
    assert torch.allclose(weighed[0].mean(), states[0].mean(), atol=1e-6)
    scale = weighed[0, 0, 0] / states[0, 0, 0]
    factors = torch.tensor([1, 1, 1.5, 1, 1])[:, None]
    assert torch.allclose(weighed[0], states[0] * factors * scale, atol=1e-5)
    half = weigh_states(states.half(), weights)
    assert half.dtype == torch.float16 and torch.allclose(half.float(), weighed, atol=1e-2)
