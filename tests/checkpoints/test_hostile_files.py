"""Files that lie or are broken, one test for each kind of lie: named in one line, nothing executed, nothing endless."""

import io
import json
import os
import pickle
import zipfile
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F

from animatediff.checkpoints.files import file_sha256, read_json, read_state_dict, write_state_dict
from animatediff.checkpoints.identify import identify
from animatediff.checkpoints.load import load_base, load_motion_module, load_personalised
from animatediff.checkpoints.lora_files import read_lora
from animatediff.checkpoints.parts import read_image_parts
from animatediff.utils import UserError, printable
from tests.checkpoints.synthetic import METADATA, ldm_tensors, lora_tensors, motion_tensors, with_positional, write

GOOD = {"a.weight": torch.ones(4, 4)}
KEY = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"


def saved(path, content) -> object:
    torch.save(content, path)
    return path


def refused(path, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        read_state_dict(path)
    assert str(path) in str(error.value) and len(str(error.value)) < 1000


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int64, torch.uint8, torch.bool, torch.complex64])
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_weights_that_are_no_floating_point_numbers(tmp_path, dtype, suffix):
    if dtype.is_complex and suffix == ".safetensors":
        pytest.skip("our writer has no name for it")
    path = write_state_dict(tmp_path / f"x{suffix}", GOOD | {"b.weight": torch.ones(4, 4).to(dtype)})
    refused(path, f"got {str(dtype)[6:]} numbers in b.weight, expected floating-point weights")


def test_whole_numbers_beside_the_weights_are_fine(tmp_path):
    more = {
        "text_model.embeddings.position_ids": torch.arange(77)[None],
        "x.alpha": torch.tensor(4),
        "v_pred": torch.zeros(0),
    }
    assert len(read_state_dict(write_state_dict(tmp_path / "x.safetensors", GOOD | more)).tensors) == 4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named_when_they_are_loaded(tmp_path, base, value):
    key = "down_blocks.1.motion_modules.0.temporal_transformer.proj_in.weight"
    tensors = with_positional(motion_tensors("v3"), 32)
    spoilt = tensors | {key: tensors[key].clone().index_fill_(0, torch.tensor([3]), value)}
    path = write(tmp_path / "mm.safetensors", spoilt)
    assert identify(path).kind == "motion-module"  # its header is fine
    with pytest.raises(UserError, match=f"mm.safetensors with numbers in {key} that are not finite"):
        load_motion_module(base.unet, path)
    lora = dict(lora_tensors("kohya_lora"))
    first = next(iter(lora))
    path = write(tmp_path / "lora.safetensors", lora | {first: torch.full_like(lora[first], value)})
    with pytest.raises(UserError, match="lora.safetensors with numbers in .* that are not finite"):
        read_lora(path)


def test_large_finite_weights_are_no_infinities(tmp_path):
    lora = {k: t * 0 + 3e38 if k.endswith("down.weight") else t for k, t in lora_tensors("kohya_lora").items()}
    assert read_lora(write(tmp_path / "x.safetensors", lora)).entries  # their sum is infinite in float32


@pytest.mark.parametrize(
    "key",
    [
        "input_blocks.99999999999999999999.weight",
        "down.99999999.weight",
        "transformer_blocks.99999.weight",
        "7" * 5000 + ".weight",
        "a\x1b[31m.weight",
        "a\n.weight",
        "a\u202e.weight",
        "x" * 1000,
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_names_that_no_software_writes(tmp_path, key, suffix):
    path = write_state_dict(tmp_path / f"x{suffix}", GOOD | {key: torch.ones(2)})
    with pytest.raises(UserError) as error:
        read_state_dict(path)
    assert "expected" in str(error.value) and str(error.value).isprintable() and len(str(error.value)) < 700


LAYOUT = [
    {KEY.replace("1.0", "900.0"): torch.ones(4, 4, 3, 3)},
    {KEY.replace("1.0.in_layers.2", "0.0.op"): torch.ones(4, 4, 3, 3)},
    {KEY.replace("input_blocks.1.0", "input_blocks.x"): torch.ones(4, 4, 3, 3)},
    {KEY.replace("input_blocks.1.0", "input_blocks.²"): torch.ones(4, 4, 3, 3)},
    {"first_stage_model.encoder.down.900.block.0.norm1.weight": torch.ones(4)},
    {"first_stage_model.encoder.down.x.block.0.norm1.weight": torch.ones(4)},
    {"first_stage_model.encoder.conv_in.weight": torch.ones(4)},
    {"first_stage_model.decoder.conv_in.weight": torch.ones(4)},
    {"model.diffusion_model.out.2.weight": torch.ones(4)},
    {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(4)},
    {"model.diffusion_model.input_blocks.1.0.in_layers.2.weight": torch.ones(4)},
    {"cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": torch.ones(4)},
    {"cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight": torch.ones(4)},
    {"cond_stage_model.transformer.text_model.encoder.layers.x.mlp.fc1.weight": torch.ones(4)},
    {"cond_stage_model.transformer.text_model.embeddings.position_embedding.weight": torch.ones(4)},
]


@pytest.mark.parametrize("change", LAYOUT, ids=lambda change: next(iter(change)))
def test_shapes_and_numbers_of_another_network(tmp_path, change):
    path = write(tmp_path / "x.safetensors", ldm_tensors() | change, **METADATA)
    with pytest.raises(UserError, match="expected"):
        load_base(path)


@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (4, 0)])
def test_weights_without_numbers(tmp_path, shape):
    refused(
        write_state_dict(tmp_path / "x.safetensors", GOOD | {"b.weight": torch.ones(shape)}), "of b.weight, expected"
    )


def test_an_extra_positional_encoding(tmp_path):
    for shape in ((), (4,), (1, 2), (1, 16, 32)):
        path = write(tmp_path / "x.safetensors", motion_tensors("v3") | {"x.pos_encoder.pe": torch.ones(shape)})
        assert identify(path).positional_length == (16 if len(shape) == 3 else None)


@pytest.mark.parametrize("rows", [16, 64])
def test_a_positional_encoding_of_another_length_is_told(tmp_path, base, rows):
    path = write(tmp_path / "x.safetensors", with_positional(motion_tensors("v3"), rows))
    assert identify(path).evidence == f"its positional encoding has {rows} frames, v1's has 24 and v3's 32"
    with pytest.raises(UserError, match=f"its positional encoding has {rows} frames"):
        load_motion_module(base.unet, path)


METADATA_LIES = {
    "num_heads": ["0", "-4", "7", "1" * 30, "x", "٣"],
    "vae_scaling_factor": ["1e-320", "1e300", "nan", "inf", "-1", "x"],
    "prediction_type": ["noise", "x" * 100_000],
    "text_num_heads": ["9" * 5000],
    "rescale_betas_zero_snr": ["maybe"],
}


@pytest.mark.parametrize("name", METADATA_LIES)
def test_metadata_are_typed_and_bounded(tmp_path, name):
    for value in METADATA_LIES[name]:
        path = write(tmp_path / "x.safetensors", ldm_tensors(), **(METADATA | {name: value}))
        with pytest.raises(UserError, match=f"{name}") as error:
            load_base(path)
        assert len(str(error.value)) < 500


class Evil:
    def __reduce__(self):
        return bytearray, (10**10,)


class Shadowed:
    """Comes back as an OrderedDict with numbers in the place of its methods."""

    def __reduce__(self):
        return OrderedDict, (), {"items": 3, "get": 3, "values": 3, "keys": 3}, None, iter(GOOD.items())


def itself() -> dict:
    content: dict = {}
    content["state_dict"] = content
    return content


def nested(depth: int) -> object:
    content: object = GOOD
    for _ in range(depth):
        content = {"state_dict": content}
    return content


PICKLES = {
    "sparse": {"a.weight": torch.eye(4).to_sparse()},
    "meta": {"a.weight": torch.ones(4, 4, device="meta")},
    "quantised": {"a.weight": torch.quantize_per_tensor(torch.ones(4, 4), 0.1, 0, torch.qint8)},
    "nested": {"a.weight": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])},
    "expanded": {"a.weight": torch.ones(1).expand(1 << 40)},
    "10 GB of zeros": {"a.weight": torch.ones(2), "b": Evil()},
    "itself": itself(),
    "a deep wrapper": nested(50),
    "a list": [torch.ones(2)],
    "nothing": {},
    "parameters without state": {"string_to_param": torch.nn.ParameterDict.__new__(torch.nn.ParameterDict)},
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("what", PICKLES)
def test_pickles_of_anything_but_plain_tensors(tmp_path, what, zipped):
    path = tmp_path / "x.ckpt"
    try:
        torch.save(PICKLES[what], path, _use_new_zipfile_serialization=zipped)
    except (RuntimeError, NotImplementedError, AttributeError):
        pytest.skip("torch does not write it so")
    with pytest.raises(UserError):
        read_state_dict(path)


def test_a_mapping_whose_methods_are_shadowed(tmp_path):
    assert read_state_dict(saved(tmp_path / "x.ckpt", {"state_dict": Shadowed()})).tensors.keys() == GOOD.keys()


def test_archives_that_lie(tmp_path):
    good = saved(tmp_path / "good.ckpt", GOOD).read_bytes()
    packed = tmp_path / "packed.ckpt"
    with zipfile.ZipFile(io.BytesIO(good)) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    refused(packed, "packed or damaged")
    for i in range(len(good) - 100, len(good) - 4, 3):  # its directory
        path = tmp_path / "x.ckpt"
        path.write_bytes(good[:i] + bytes([good[i] ^ 0xFF]) + good[i + 1 :])
        try:
            read_state_dict(path)
        except UserError as error:
            assert str(path) in str(error)


@pytest.mark.parametrize("name", ["x.safetensors", "x.ckpt", "x.bin"])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_the_content_decides_whatever_the_name_says(tmp_path, name, protocol):
    for zipped in (True, False):
        torch.save(GOOD, tmp_path / name, _use_new_zipfile_serialization=zipped)
        assert read_state_dict(tmp_path / name).tensors.keys() == GOOD.keys()
    (tmp_path / name).write_bytes(pickle.dumps({"a": 1}, protocol=protocol))
    refused(tmp_path / name, "damaged or of another kind")
    write_state_dict(tmp_path / "good.safetensors", GOOD).rename(tmp_path / name)
    assert read_state_dict(tmp_path / name).tensors.keys() == GOOD.keys()


def test_a_named_pipe_is_never_opened(tmp_path):
    for path in (tmp_path / "x.safetensors", tmp_path / "model.safetensors.index.json", tmp_path / "config.json"):
        os.mkfifo(path)
    refused(tmp_path / "x.safetensors", "it is a pipe or a device")
    refused(tmp_path / "model.safetensors.index.json", "it is a pipe or a device")
    with pytest.raises(UserError, match="config.json, no file"):
        read_json(tmp_path / "config.json")
    with pytest.raises(UserError, match="with no model_index.json"):  # nor as one of a folder's weights
        os.mkfifo(tmp_path / "diffusion_pytorch_model.safetensors")
        identify(tmp_path)


JSONS = ["{", "[]", "3", "null", '{"a": ' * 100_000, "[" * 100_000, '{"a": ' + "9" * 5000 + "}", '"\ud800"', ""]


@pytest.mark.parametrize("text", JSONS, ids=lambda text: text[:10])
def test_json_that_is_broken(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match="config.json") as error:
        read_json(path)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("weight_map", [3, {}, {"a": 1}, {"a": None}, {"a": {}}, {"a": "x.index.json"}, {"a": "../x"}])
def test_a_shard_index_that_lies(tmp_path, weight_map):
    path = tmp_path / "x.index.json"
    path.write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    refused(path, "index")


def test_many_entries_are_read_in_seconds(tmp_path):
    """Nothing is quadratic in the number of names (a file of 100,000 took seconds for every pattern)."""
    path = write_state_dict(tmp_path / "x.safetensors", {f"a.{i % 900}.{i}.weight": torch.ones(1) for i in range(900)})
    assert identify(path).kind == "unknown"


def test_scales_of_8_bit_floats(tmp_path):
    weight, scale = torch.randn(6, 4), torch.tensor(0.01)
    small = (weight / scale).to(torch.float8_e4m3fn)
    rows = torch.rand(6)
    path = write_state_dict(
        tmp_path / "x.safetensors",
        {
            "scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn),
            "model.diffusion_model.scaled_fp8": torch.zeros(0).to(torch.float8_e4m3fn),
            "a.weight": small,
            "a.scale_weight": scale,
            "a.scale_input": torch.tensor(1.0),
            "b.weight": small,
            "b.weight_scale": rows[:, None],
            "c.weight": small,
            "d.bias": rows,
        },
    )
    file = read_state_dict(path)
    assert file.tensors.keys() == {"a.weight", "b.weight", "c.weight", "d.bias"}
    assert torch.equal(file.tensors["a.weight"], small.float() * scale)
    assert torch.equal(file.tensors["b.weight"], small.float() * rows[:, None])
    assert file.tensors["c.weight"].dtype == torch.float8_e4m3fn  # without a scale: as it is
    assert F.mse_loss(file.tensors["a.weight"], weight) < 1e-2 and "multiplied by their scales" in str(file.notes)
    wrong = {"a.weight": small, "a.scale_weight": torch.ones(5)}
    refused(write_state_dict(tmp_path / "y.safetensors", wrong), "5 scales for a.weight, expected 1 or 6")


def test_the_same_weights_have_the_same_hash(tmp_path):
    metadata = {str(i): str(i) for i in range(20)}
    for suffix in (".safetensors", ".ckpt"):
        hashes = set()
        for order in (list(metadata), sorted(metadata, reverse=True)):
            folder = tmp_path / f"{order[0]}{suffix}"
            folder.mkdir()
            path = write_state_dict(folder / f"x{suffix}", GOOD, metadata={key: metadata[key] for key in order})
            hashes.add(file_sha256(path))
        assert len(hashes) == 1 or suffix == ".ckpt"  # a pickle keeps the order of its metadata


@pytest.mark.parametrize(
    ("marks", "metadata", "expected"),
    [
        ({"v_pred": torch.zeros(0)}, {}, {"prediction_type": "v_prediction"}),
        (
            {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)},
            {},
            {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        ),
        ({}, {"modelspec.prediction_type": "v"}, {"prediction_type": "v_prediction"}),
        ({}, {"modelspec.prediction_type": "epsilon"}, {"prediction_type": "epsilon"}),
        ({"v_pred": torch.zeros(0)}, {"prediction_type": "epsilon"}, {"prediction_type": "epsilon"}),
        ({}, {}, {}),
    ],
)
def test_what_a_file_says_of_its_prediction(tmp_path, marks, metadata, expected):
    path = write(tmp_path / "x.safetensors", ldm_tensors() | marks, **METADATA, **metadata)
    assert identify(path).schedule == expected
    schedule = load_base(path).schedule
    assert (schedule is None) == (not expected)
    assert all(getattr(schedule, name) == value for name, value in expected.items())


def folder_of(tmp_path, convert, ldm_file) -> object:
    return convert(ldm_file, tmp_path / "model")


UNET_SETTINGS = {"act_fn": "gelu", "norm_eps": 1e-6, "freq_shift": 1, "flip_sin_to_cos": False, "class_embed_type": "x"}


def edit(path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from animatediff.checkpoints.export import write_diffusers
    from tests.checkpoints.synthetic import METADATA, ldm_tensors

    path = tmp_path_factory.mktemp("folder")
    parts = read_image_parts(write(path / "x.safetensors", ldm_tensors(), **METADATA))
    try:
        return write_diffusers(parts, path / "model")
    except UserError:
        pytest.skip("the small network has no CLIP vocabulary")


@pytest.mark.parametrize("name", UNET_SETTINGS)
def test_settings_of_another_network_are_refused(folder, name):
    config = folder / "unet/config.json"
    before = config.read_text(encoding="utf-8")
    try:
        edit(config, **{name: UNET_SETTINGS[name]})
        for place in (folder, folder / "unet"):
            with pytest.raises(UserError, match=f"unet/config.json: got {name} .*, expected"):
                read_image_parts(place)
    finally:
        config.write_text(before, encoding="utf-8")


def test_a_broken_config_does_not_count_as_absent(folder):
    config = folder / "unet/config.json"
    before = config.read_text(encoding="utf-8")
    try:
        for text in ("{}", "{", "[]", '{"attention_head_dim": [0, 1]}', '{"attention_head_dim": "x"}'):
            config.write_text(text, encoding="utf-8")
            with pytest.raises(UserError, match="expected"):
                load_base(folder)
    finally:
        config.write_text(before, encoding="utf-8")


def test_the_schedulers_file_is_read(folder):
    config = folder / "scheduler/scheduler_config.json"
    before = config.read_text(encoding="utf-8")
    said = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    try:
        edit(config, **said)
        assert identify(folder).schedule == said
        schedule = load_base(folder).schedule
        assert schedule and all(getattr(schedule, name) == value for name, value in said.items())
    finally:
        config.write_text(before, encoding="utf-8")


def test_a_unet_alone_takes_the_rest_from_the_base(tmp_path, base):
    """As the official image_finetune writes it: diffusers' names, the prefix of distributed training."""
    tensors = {f"module.{key}": t.half() for key, t in base.unet.state_dict().items()}
    path = saved(tmp_path / "unet.ckpt", {"epoch": 1, "state_dict": tensors})
    assert identify(path).kind == "sd1-unet" and identify(path).config_line == f"dreambooth_path: {path}"
    model = load_personalised(path, base)
    assert model.text_encoder is base.text_encoder and model.vae is base.vae
    assert torch.equal(model.unet.conv_in.weight, base.unet.conv_in.weight.half().float())
    with pytest.raises(UserError, match="without a text encoder"):
        load_base(path)


def test_the_console_gets_no_control_characters():
    assert printable("a\x1b[31m\r\x00\u202eb\ud800\nü狐") == "a\\x1b[31m\\r\\x00\\u202eb\\ud800\nü狐"
    assert len(printable("x" * 10**6)) < 10_000
