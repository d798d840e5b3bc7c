"""Damaged weight files, configs and tokenizers: read rightly or refused in a line, within 10 s and 2 GB."""

import random

import pytest

from tests.checkpoints.mutants import FORMATS, OUTCOMES, make_folder, outcome, try_mutants


def test_an_undamaged_folder_is_read(tmp_path):
    """So that what is refused is refused for its damage."""
    assert outcome(make_folder(tmp_path / "model", random.Random(0), tokenizer=None)) == "read"


@pytest.mark.parametrize("format", [f for f in FORMATS if f != "families"])  # which are many to be made
def test_a_few_mutants(format):
    found = try_mutants(format, 0, 20)
    assert len(found) == 20 and not {seed: result for seed, result in found.items() if result not in OUTCOMES}


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_many_mutants(format):
    found = try_mutants(format, 1000, 300)
    assert len(found) == 300 and not {seed: result for seed, result in found.items() if result not in OUTCOMES}
