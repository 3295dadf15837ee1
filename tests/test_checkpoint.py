"""The saved file: bit-equal logits, small, safe to load, and refused when it is not what it claims."""

import os
import pickle
import time

import pytest
import torch

from calibquant.errors import UserError
from calibquant.model.quant_layer import harden
from calibquant.solver.checkpoint import (
    checksum,
    find_checkpoint,
    load_checkpoint,
    require_agreement,
    save_checkpoint,
)
from calibquant.solver.config import check_config
from calibquant.solver.pipeline import float_model_on_meta, quantize_model
from tests.small import calibrated_model, small_config

IMAGES = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(5))


def saved(tmp_path, **changes):
    config = small_config(**changes)
    model = calibrated_model(config, IMAGES)
    harden(model)
    return model, config, save_checkpoint(model, config, {"seed": 1005}, tmp_path)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_logits_of_the_reloaded_network_are_bit_equal(tmp_path, bits, symmetric):
    model, config, path = saved(
        tmp_path,
        quant__w_qconfig__bit=bits,
        quant__w_qconfig__symmetric=symmetric,
        quant__a_qconfig__bit=10 - bits,
        quant__a_qconfig__symmetric=symmetric,
    )
    loaded, found, metadata = load_checkpoint(path)
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), model(IMAGES))
    assert found == config and metadata["seed"] == 1005


@pytest.mark.parametrize("changes", [
    {"quant__w_qconfig__ch_axis": -1, "quant__a_qconfig__ch_axis": 1},
    {"quant__a_qconfig__quantizer": "LSQPlusFakeQuantize", "quant__ends_8bit": []},
])  # fmt: skip
def test_every_granularity_and_quantizer_survives_saving(tmp_path, changes):
    model, _, path = saved(tmp_path, **changes)
    with torch.no_grad():
        assert torch.equal(load_checkpoint(path)[0](IMAGES), model(IMAGES))


def test_the_file_is_tensors_and_plain_values_only(tmp_path):
    _, _, path = saved(tmp_path)
    content = torch.load(path, weights_only=True)
    assert content["format"] == "calibquant"
    assert content["layers"]["stem.conv1"]["bits"] == 8
    assert content["layers"]["blocks.0.join.last"]["weight"].dtype == torch.uint8


@pytest.mark.parametrize(("bits", "limit_mb"), [(4, 26), (2, 16)])
def test_resnet101_is_as_small_as_its_bits(tmp_path, bits, limit_mb):
    config = check_config({"model": {"type": "resnet101"}, "quant": {"w_qconfig": {"bit": bits}}})
    model = quantize_model(float_model_on_meta(config), config).to_empty(device="cpu")
    for buffer in model.buffers():
        buffer.fill_(1.0)
    harden(model)
    path = save_checkpoint(model, config, {}, tmp_path)
    assert path.parent.name == f"resnet101_imagenet_w{bits}_a4"
    assert path.stat().st_size / 1e6 < limit_mb


def test_names_never_collide_and_no_half_written_file_is_left(tmp_path, monkeypatch):
    config = small_config()
    model = calibrated_model(config, IMAGES)
    harden(model)
    draws = iter([7, 7, 7, 8])
    monkeypatch.setattr("calibquant.solver.checkpoint.secrets.randbelow", lambda _: next(draws))
    first = save_checkpoint(model, config, {}, tmp_path)
    before = first.read_bytes()
    second = save_checkpoint(model, config, {}, tmp_path)
    assert first != second and first.read_bytes() == before
    monkeypatch.setattr("calibquant.solver.checkpoint.secrets.randbelow", lambda _: 9)
    monkeypatch.setattr(torch, "save", _fails_half_way)
    with pytest.raises(UserError, match="cannot be written: No space left"):
        save_checkpoint(model, config, {}, tmp_path)
    assert sorted(p.name for p in first.parent.iterdir()) == sorted([first.name, second.name])


def _fails_half_way(content, file):
    file.write(b"half")
    raise OSError(28, "No space left on device")


def test_truncated_foreign_and_damaged_files_are_refused_in_one_line(tmp_path):
    _, _, path = saved(tmp_path)
    whole = path.read_bytes()
    broken = tmp_path / "broken.pth"
    for size in (0, 10, len(whole) // 2, len(whole) - 100):
        broken.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"broken\.pth"):
            load_checkpoint(broken)
    broken.write_bytes(b"not a checkpoint at all")
    with pytest.raises(UserError, match="quantized model"):
        load_checkpoint(broken)
    torch.save({"state_dict": {}}, broken)
    with pytest.raises(UserError, match="no CalibQuant file"):
        load_checkpoint(broken)
    content = torch.load(path, weights_only=True)
    content["layers"]["stem.conv1"]["bias"][0] += 1
    torch.save(content, broken)
    with pytest.raises(UserError, match="checksum"):
        load_checkpoint(broken)


def test_a_file_whose_tensors_say_that_they_take_gradients_gives_a_network_that_takes_none(tmp_path):
    _, _, path = saved(tmp_path)
    _edit(path, lambda c: [c["layers"]["stem.conv1"][key].requires_grad_() for key in ("bias", "scale")])
    model, _, _ = load_checkpoint(path)
    assert not any(value.requires_grad for value in (*model.buffers(), *model.parameters()))


class _Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


def test_code_in_a_pickle_is_not_run(tmp_path):
    witness, path = tmp_path / "ran", tmp_path / "evil.pth"
    torch.save({"format": "calibquant", "x": _Touch(witness)}, path)
    with pytest.raises(UserError, match="refused"):
        load_checkpoint(path)
    path.write_bytes(pickle.dumps(_Touch(witness)))
    with pytest.raises(UserError, match="evil"):
        load_checkpoint(path)
    assert not witness.exists()


def _edit(path, change):
    content = torch.load(path, weights_only=True)
    change(content)
    content["checksum"] = checksum(content)
    torch.save(content, path)


@pytest.mark.parametrize("change", [
    lambda c: c["layers"].pop("stem.conv1"),
    lambda c: c["layers"]["stem.conv1"].update(shape=[10**9, 10**9, 3, 3]),
    lambda c: c["layers"]["stem.conv1"].update(weight=torch.zeros(3, dtype=torch.uint8)),
    lambda c: c["layers"]["stem.conv1"]["scale"].fill_(torch.nan),
    lambda c: c["layers"]["stem.conv1"]["scale"].fill_(0),
    lambda c: c["layers"]["stem.conv1"]["zero_point"].fill_(999),
    lambda c: c["layers"]["stem.conv1"].update(bias=torch.zeros(1)),
    lambda c: c["layers"]["stem.conv1"].update(bits=4),
    lambda c: c["activations"].pop("stem.output_quantizer"),
    lambda c: c["activations"].update(extra={}),
    lambda c: c["config"]["model"]["kwargs"].update(num_classes=100_000),
    lambda c: c["config"]["model"].update(type="resnet50"),
    lambda c: c["config"].update(surprise=1),
    lambda c: c.update(layers=7),
    lambda c: c.update(config=None),
    lambda c: c.pop("metadata"),
    lambda c: c["metadata"].update(seed=torch.zeros(1)),
])  # fmt: skip
def test_a_file_that_is_not_what_it_claims_is_refused_quickly(tmp_path, change):
    _, _, path = saved(tmp_path)
    _edit(path, change)
    started = time.process_time()
    with pytest.raises(UserError, match="quantized model"):
        load_checkpoint(path)
    assert time.process_time() - started < 5


def test_another_format_version_is_named(tmp_path):
    _, _, path = saved(tmp_path)
    _edit(path, lambda c: c.update(version=99))
    with pytest.raises(UserError, match="format version 99, allowed is 1"):
        load_checkpoint(path)


def test_a_bare_name_is_found_in_the_configs_folder(tmp_path):
    _, config, path = saved(tmp_path)
    assert find_checkpoint(path.name, config, tmp_path) == path
    assert find_checkpoint(str(path), config, tmp_path) == path
    inside = path.relative_to(path.parents[1])
    for name, words in {
        "missing.pth": rf"missing\.pth: no such file, neither as a path nor as .*{inside.parent}/missing",
        "sub/missing.pth": r"sub/missing\.pth: no such file$",  # looked for nowhere else
        str(tmp_path): "is a folder$",
    }.items():
        with pytest.raises(UserError, match=words):
            find_checkpoint(name, config, tmp_path)


@pytest.mark.parametrize(("changes", "key"), [
    ({"quant__w_qconfig__bit": 2}, "quant.w_qconfig.bit"),
    ({"quant__a_qconfig__bit": 8}, "quant.a_qconfig.bit"),
    ({"model__type": "resnet34"}, "model.type"),
    ({"model__kwargs__base_width": 8}, r"model\.kwargs\.base_width 8, but .* has 4$"),
    ({"quant__ends_8bit": []}, "quant.ends_8bit"),
    ({"quant__overrides": [{"match": "stem", "w_bit": 5}]}, r"overrides\[0\] {.*5.*}, but .* has None$"),
])  # fmt: skip
def test_a_config_that_contradicts_the_file_is_an_error_that_names_the_key(tmp_path, changes, key):
    saved_config = small_config()
    with pytest.raises(UserError, match=key):
        require_agreement(small_config(**changes), saved_config, tmp_path)
    require_agreement(small_config(quant__recon__iters=1, data__batch_size=3), saved_config, tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("mean", [0.5, 0.5, 0.5]), ("std", [0.5, 0.5, 0.5]), ("input_size", 12), ("test_resize", 20)],
)
def test_a_config_that_reads_images_otherwise_than_the_file_is_named(tmp_path, caplog, key, value):
    saved = small_config()
    require_agreement(small_config(**{f"data__{key}": value}), saved, tmp_path / "file.pth")
    (line,) = caplog.messages
    assert line.startswith(f"data.{key} is {value}, quantized model ") and str(saved.data[key]) in line
