"""Help on options is true: the pages are current, flat names are those that are known, and values are as it says."""

import re
from pathlib import Path

import pytest

from animatediff.config import help
from animatediff.config.help import OPTIONS_HEAD, call_options_source, described, explain_options, options_table
from animatediff.config.spellings import build_request, group_classes, nest
from animatediff.utils import UserError

ROOT = Path(__file__).parents[2]
REMAKE = "run python -m animatediff.config.help"


def rows() -> list[tuple[str, str, list[str]]]:
    """(group, option, flat names) of docs/options.md."""
    found, group, flat = [], "", False
    for line in (ROOT / "docs/options.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            group = line.lstrip("# ")
        elif line.startswith("| option"):
            flat = line.endswith("flat names |")
        elif flat and (name := re.match(r"\| \[?`(\w+)`", line)):
            found.append((group, name[1], re.findall(r"`([^`]+)`", line.split(" | ")[-1])))
    return found


def reached(name: str) -> str | None:
    """The option that a flat name sets."""
    on = {} if name in ("windows", "window_schedule") else {"window_schedule": "open"}
    try:
        _, spelled = nest({name: "open", **on})
    except UserError as error:
        assert f"unknown key {name!r}" in str(error) or f"{name}: got 'open', expected keys with values" in str(error)
        return None
    return next(dotted for dotted, typed in spelled.items() if typed == name)


def test_generated_files_are_current():
    assert (ROOT / "docs/options.md").read_text(encoding="utf-8") == OPTIONS_HEAD + options_table(), REMAKE
    source = (ROOT / "animatediff/config/call_options.py").read_text(encoding="utf-8")
    assert source == call_options_source(), REMAKE


def test_flat_names_are_those_that_are_accepted():
    found = rows()
    assert len(found) == sum(len(described(cls)) for cls in group_classes().values())
    for group, option, flat in found:
        assert [reached(name) for name in flat] == [f"{group}.{option}"] * len(flat)
        assert option in flat or reached(option) != f"{group}.{option}"
    assert {group for group, _, flat in found if not flat} == {"pia", "i2v", "camera", "freeu", "freeinit", "finish"}


def test_takes_says_what_is_taken():
    text = options_table() + explain_options()
    assert "see the text" not in text and "keys with values" not in text and "| None" not in text
    assert all(field.takes and field.help for cls in group_classes().values() for field in described(cls))


@pytest.mark.parametrize(
    "option, words, accepted, refused",
    [
        ("prompts.prompt", "text or {frame: text}, or a list of them", ["a", {0: "a"}, ["a", {"8": "b"}]], [1, {}]),
        ("inputs.video", "file or folder of pictures", ["a.gif"], [1, {0: "a.png"}]),
        ("sparsectrl.images", "picture, or a list of them", ["a.png", ["a.png", "b.png"]], [{0: "a.png"}]),
        ("sampling.seed", "whole number, or a list of them", [3, [3, -1]], [0.5, "a"]),
        ("model.vae", "path", ["a.ckpt"], [1]),
        ("model.loras", "path or {path: …, scale: …}, or a list of them", ["a", {"path": "a"}, ["a", {"path": "b"}]],
         [1]),
        ("controlnets.nets", "{path: …, images: …, …}, or a list of them", [{"path": "a"}, [{"path": "a"}]], ["a"]),
        ("micro_conditioning.crop", "[whole number, whole number]", [[0, 8]], [0, [0], [0, 0, 0]]),
        ("motion.scale", "number, one per frame, {frame: number} or {part%: number}",
         [0.5, [1, 0.5], {0: 1}, {"50%": 1}], ["a", []]),
        ("loras.schedule", "{part%: number}", [{"50%": 1}], [0.5, [1, 0.5], {0: 1}]),
        ("camera.move", None, ["zoom_in", ["zoom_in", "roll_clockwise"]], ["forward"]),
    ],
)  # fmt: skip
def test_values_are_as_help_says(option, words, accepted, refused):
    group, _, name = option.partition(".")
    takes = next(field.takes for field in described(group_classes()[group]) if field.name == name)
    assert words in (None, takes)
    for value in accepted:
        build_request({option: value}, where="", check=False)
    for value in refused:
        with pytest.raises(UserError):
            build_request({option: value}, where="", check=False)


@pytest.mark.parametrize(
    "name, fields",
    [
        ("controlnet", "path images preprocessor settings scale start end guess_mode"),
        ("controlnets.nets", "preprocessor"),
        ("ip_adapter", "path images scale layers masks start end fit"),
        ("ip_adapters", "ip_adapter image_encoder path layers masks"),
        ("loras", "lora_schedule path scale"),
        ("lora_path", "path scale"),
        ("motion_module_lora_configs", "path scale"),
        ("mixture", "extra_motion_modules path scale start end version"),
    ],
)
def test_help_of_an_entry_lists_its_keys(name, fields):
    text = explain_options(name)
    assert all(re.search(rf"^  {field} ", text, re.MULTILINE) for field in fields.split())
    assert re.search(r"^  path .*\(path; needed\)$", text, re.MULTILINE) or name == "controlnets.nets"


def test_help_tells_options_of_one_name_apart():
    assert explain_options("steps").startswith("sampling.steps: ") and "\n\nfinish.steps: " in explain_options("steps")
    assert explain_options("finish.steps").count("; default") == 1
    with pytest.raises(UserError, match="unknown option 'stepz', the nearest known one is 'steps'"):
        explain_options("stepz")


def test_links_lead_to_headings():
    for page in ("options.md", "training-options.md"):
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        headings = {help.anchor(line.lstrip("# ")) for line in text.splitlines() if line.startswith("#")}
        assert set(re.findall(r"\]\((#[^)]*)\)", text)) <= headings
