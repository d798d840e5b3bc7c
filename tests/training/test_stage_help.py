"""Help on training configs: the page is current, and `train.py --help STAGE` tells every key that the YAML may have."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from animatediff.lab.stage_help import explain_stage, training_options
from animatediff.lab.stage_table import STAGES, build_stage
from animatediff.utils import UserError
from scripts.train import run

PAGE = Path(__file__).parents[2] / "docs/training-options.md"


def test_the_page_is_current():
    assert PAGE.read_text(encoding="utf-8") == training_options(), "run python -m animatediff.lab.stage_help"


@pytest.mark.parametrize("stage", STAGES)
def test_help_lists_the_keys_of_a_stage(stage, capsys):
    with pytest.raises(SystemExit) as ended:
        run(["--help", stage], print)
    assert not ended.value.code
    keys = re.findall(r"^  (\S+) ", capsys.readouterr().out, re.MULTILINE)
    assert [key for key in keys if "." not in key] == [field.name for field in fields(STAGES[stage])]
    assert len(keys) == len(set(keys)) and any(key.endswith(".weight_decay") for key in keys)
    needed = re.findall(r"^  (\w+) .*; needed\)$", explain_stage(stage), re.MULTILINE)
    with pytest.raises(UserError) as missing:
        build_stage({"stage": stage}, where="")
    assert sorted(needed) == sorted(re.findall(r"^(\w+) is missing", str(missing.value), re.MULTILINE))


def test_keys_within_keys_have_defaults():
    text = explain_stage("motion_module")
    for key, default in (("loop.weight_decay", "0.01"), ("loop.max_grad_norm", "1.0"), ("loop.warmup_steps", "100"),
                         ("loop.ema_decay", "0.999"), ("zero_init", "true"), ("world.style", "plain"),
                         ("motion.resolutions", "[1, 2, 4, 8]"), ("samples.fps", "8.0")):  # fmt: skip
        assert re.search(rf"^  {re.escape(key)} .*; {re.escape(default)}\)$", text, re.MULTILINE)


def test_help_names_the_stages(capsys):
    with pytest.raises(SystemExit):
        run(["--help"], print)
    printed = capsys.readouterr().out
    assert all(re.search(rf"^  {name} ", printed, re.MULTILINE) for name in STAGES)
    with pytest.raises(UserError, match=f"got stage 'motion', expected one of {', '.join(STAGES)}$"):
        run(["--help", "motion"], print)
