"""An encoder's file that is damaged in any way is one line, or an encoder."""

import json

import pytest
import torch

from animatediff.checkpoints.files import read_state_dict, write_state_dict
from animatediff.utils import UserError
from animatediff.world.encoder import CONFIG_KEY, load_encoder

FILE = read_state_dict("animatediff/assets/shapes_encoder.safetensors")
SIZES = json.loads(FILE.metadata[CONFIG_KEY])
BAD = [0, -1, 7, 10**9, 10**400, 0.5, "4", None, True, [], {}]
WEIGHT = "text_projection.weight"


def use(path, tensors, config) -> None:
    write_state_dict(path, tensors, metadata=FILE.metadata | {CONFIG_KEY: config})
    encoder = load_encoder(str(path))
    assert encoder.encode_images(torch.zeros(1, 3, 64, 64)).isfinite().all()
    assert encoder.encode_texts(["a star"]).isfinite().all()


@pytest.mark.parametrize("key", SIZES)
def test_sizes(tmp_path, key):
    for number, value in enumerate(BAD):
        for values in (value, [value]):
            try:
                use(tmp_path / f"{number}.safetensors", FILE.tensors, json.dumps(SIZES | {key: values}))
            except UserError as error:
                assert "\n" not in str(error)


@pytest.mark.parametrize("config", ["{", "[]", "5", "{}", "[" * 100_000, "1" * 5000, json.dumps(SIZES | {"x": 1})])
def test_metadata(tmp_path, config):
    with pytest.raises(UserError, match=r"^[^\n]+$"):
        use(tmp_path / "x.safetensors", FILE.tensors, config)


@pytest.mark.parametrize(
    "change",
    [
        {WEIGHT: None},
        {"tokens": None},
        {WEIGHT: torch.zeros(0)},
        {WEIGHT: torch.full_like(FILE.tensors[WEIGHT], torch.nan)},
        {WEIGHT: FILE.tensors[WEIGHT].flatten()},
        {"tokens": torch.zeros(0, dtype=torch.long)},
        {"tokens": torch.zeros(())},
        {"more": torch.zeros(1)},
    ],
    ids=str,
)
def test_tensors(tmp_path, change):
    tensors = {key: t for key, t in (FILE.tensors | change).items() if t is not None}
    with pytest.raises(UserError, match=r"^[^\n]+$"):
        use(tmp_path / "x.safetensors", tensors, json.dumps(SIZES))
