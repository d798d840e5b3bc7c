"""Damaged weight files, configs and tokenizers: read rightly or refused in a line, within 10 s and 2 GB."""

import pytest

from tests.checkpoints.mutants import FORMATS, OUTCOMES, Mutant, make_folder, outcome, try_mutants

FEW = [f for f in FORMATS if f != "families"]  # which are many to be made


def test_an_undamaged_folder_is_read(tmp_path):
    """So that what is refused is refused for its damage."""
    assert outcome(make_folder(tmp_path / "model", None)) == "read"
    assert outcome(tmp_path / "model/tokenizer") == "read"


def wrong(found: dict[Mutant, str]) -> dict[Mutant, str]:
    return {mutant: result for mutant, result in found.items() if result not in OUTCOMES}


def test_a_few_mutants():
    found = try_mutants(FEW, 0, 20)
    assert len(found) == 20 * len(FEW) and not wrong(found)


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_many_mutants(format):
    found = try_mutants([format], 1000, 300)
    assert len(found) == 300 and not wrong(found)
