"""Mixed precision: bit-widths by the names of units and layers, from the YAML to the saved file."""

from typing import Any

import pytest
import torch

from calibquant.errors import UserError
from calibquant.model.quant_layer import harden, layers
from calibquant.quantization.fake_quant import IntegerWeight
from calibquant.quantization.state import quantizers
from calibquant.solver.checkpoint import checksum, load_checkpoint, require_agreement, save_checkpoint
from calibquant.solver.config import check_config, config_name, load_config, plain
from calibquant.solver.pipeline import float_model_on_meta, quantize_model
from calibquant.solver.resume import identity
from tests.small import calibrated_model, random_float_model, small_config

IMAGES = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(5))


def config(*overrides: dict[str, Any], **changes: Any):
    return small_config(quant__overrides=list(overrides), **changes)


def bits(*overrides: dict[str, Any], **changes: Any) -> dict[str, int]:
    """Bits of every quantizer of the small ResNet-18, by its name."""
    checked = config(*overrides, **changes)
    return {name: q.bits for name, q in quantizers(quantize_model(float_model_on_meta(checked), checked))}


def changed(*overrides: dict[str, Any], **changes: Any) -> dict[str, int]:
    """What overrides change, by quantizer."""
    before, after = bits(**changes), bits(*overrides, **changes)
    return {name: after[name] for name in after if after[name] != before[name]}


def test_a_pattern_reaches_units_with_all_of_theirs_and_single_layers():
    assert changed({"match": "layer1.0", "w_bit": 3}) == {
        "blocks.0.branch.conv1.weight_quantizer": 3,
        "blocks.0.join.last.weight_quantizer": 3,
    }
    assert changed({"match": "layer2.0.shortcut", "w_bit": 2}) == {"blocks.2.shortcut.weight_quantizer": 2}
    assert changed({"match": "layer1.0.join", "w_bit": 2, "a_bit": 5}) == {
        "blocks.0.join.last.weight_quantizer": 2,
        "blocks.0.join.output_quantizer": 5,
    }
    assert set(changed({"match": "layer[12].*", "a_bit": 6})) == {
        f"blocks.{block}.{place}.output_quantizer"
        for block in range(4)
        for place in ("branch.conv1", "join")
    }
    everything = bits({"match": "*", "w_bit": 7, "a_bit": 7})
    assert set(everything.values()) == {7}, "an explicit override wins over the 8 bits of the ends"


def test_the_last_override_that_fits_counts():
    wide, narrow = {"match": "layer1.*", "w_bit": 6}, {"match": "layer1.1", "w_bit": 2}
    assert bits(wide, narrow)["blocks.1.join.last.weight_quantizer"] == 2
    assert bits(narrow, wide)["blocks.1.join.last.weight_quantizer"] == 6


def test_the_ends_keep_their_8_bits_unless_overridden():
    assert bits({"match": "layer4.1", "w_bit": 3})["blocks.7.join.output_quantizer"] == 8
    assert bits({"match": "layer4.1.join", "a_bit": 4})["blocks.7.join.output_quantizer"] == 4


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([{"match": "layer9.*", "w_bit": 4}], r"quant\.overrides: layer9\.\* fits no unit or layer"),
        ([{"match": "layer1", "w_bit": 4}], "layer1 fits no unit or layer; nearest are layer1"),
        ([{"match": "classifier", "a_bit": 4}], "classifier fits classifier, which has no activation"),
        ([{"match": "layer2.0.shortcut", "a_bit": 4}], "which has no activation to quantize"),
        ([{"match": "stem", "w_bit": 9}], r"\(entry 1: {'match': 'stem', 'w_bit': 9}\), allowed is a list"),
        ([{"match": "stem", "w_bit": 4}, {"match": "stem"}], r"\(entry 2: {'match': 'stem'}\), allowed"),
        ([{"w_bit": 4, "a_bit": 4}], "entry 1"),
        ([{"match": "stem", "bit": 4}], "entry 1"),
        ([{"match": "stem", "w_bit": True}], "entry 1"),
        ([{"match": "stem", "w_bit": None}], "entry 1"),
        ([{"match": "", "w_bit": 4}], "entry 1"),
        ([{"match": "a b", "w_bit": 4}], "entry 1"),
        ([{"match": "x" * 101, "w_bit": 4}], "entry 1"),
        ([{"match": 3, "w_bit": 4}], "entry 1"),
        ([["stem", 4]], "entry 1"),
        ({"stem": {"w_bit": 4}}, "allowed is a list of {match: pattern"),
        ("stem", "allowed is a list"),
        (None, "allowed is a list"),
        ([{"match": "stem", "w_bit": 4}] * 1001, "allowed is a list"),
    ],
)
def test_a_bad_override_is_one_line_before_anything_is_computed(overrides, words):
    with pytest.raises(UserError, match=words) as refused:
        small_config(quant__overrides=overrides)
    assert len(str(refused.value).splitlines()) == 1 and len(str(refused.value)) < 400


def test_a_yaml_may_hold_them(tmp_path):
    path = tmp_path / "mixed.yaml"
    path.write_text(
        "model: {type: resnet50}\n"
        "quant:\n"
        "  overrides:\n"
        '    - {match: "layer4.*", w_bit: 8, a_bit: 8}\n'
        "    - {match: layer1.0.conv2, w_bit: 3}\n"
    )
    read = load_config(path)
    assert plain(read)["quant"]["overrides"] == [
        {"match": "layer4.*", "w_bit": 8, "a_bit": 8},
        {"match": "layer1.0.conv2", "w_bit": 3},
    ]
    assert check_config(plain(read)) == read
    assert all(type(entry) is dict for entry in plain(read)["quant"]["overrides"])


MIXED = (
    {"match": "*", "a_bit": 6},
    {"match": "layer1.*", "w_bit": 2},
    {"match": "layer2.0.*", "w_bit": 7, "a_bit": 3},
    {"match": "layer3.1.conv1", "w_bit": 5},
)


def test_a_mixed_network_is_saved_and_read_bit_for_bit_each_weight_packed_at_its_bits(tmp_path):
    mixed = config(*MIXED)
    model = calibrated_model(mixed, IMAGES)
    expected = {name: q.bits for name, q in quantizers(model) if name.endswith("weight_quantizer")}
    assert {2, 4, 5, 7, 8} == set(expected.values())
    harden(model)
    path = save_checkpoint(model, mixed, {"seed": 1}, tmp_path)
    loaded, found, _ = load_checkpoint(path)
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), model(IMAGES))
    assert found == mixed
    saved = torch.load(path, weights_only=True)["layers"]
    for name, layer in layers(loaded):
        assert isinstance(layer.weight_quantizer, IntegerWeight)
        assert layer.weight_quantizer.bits == expected[f"{name}.weight_quantizer"]
        assert saved[name]["weight"].numel() == -(-layer.weight.numel() * saved[name]["bits"] // 8)
    activations = {name: q.bits for name, q in quantizers(model)}
    assert {name: q.bits for name, q in quantizers(loaded)} == activations
    assert {3, 6} == set(activations.values())


def test_a_file_of_other_overrides_is_refused(tmp_path):
    saved = config(*MIXED)
    require_agreement(config(*MIXED), saved, tmp_path)
    for other in (config(), config(*MIXED[:2]), config(*reversed(MIXED))):
        with pytest.raises(UserError, match=r"config says quant\.overrides\[\d\] .*, but quantized model"):
            require_agreement(other, saved, tmp_path)


def test_outputs_of_different_assignments_lie_in_different_folders():
    plain_name = config_name(config())
    assert plain_name == "resnet18_imagenet_w4_a4"
    names = {config_name(config(*MIXED[: count + 1])) for count in range(4)}
    assert len(names) == 4 and all(name.startswith(f"{plain_name}_mixed_") for name in names)
    assert config_name(config(*MIXED)) == config_name(check_config(plain(config(*MIXED))))


def test_an_unfinished_run_of_other_overrides_is_not_continued():
    model, cpu = random_float_model(config()), torch.device("cpu")
    first, second = (identity(config(*some), model, "", [], cpu) for some in (MIXED, MIXED[:1]))
    assert [key for key in first if first[key] != second[key]] == ["config quant.overrides"]


def test_a_file_from_before_there_were_overrides_is_still_read(tmp_path):
    uniform = config()
    model = calibrated_model(uniform, IMAGES)
    harden(model)
    path = save_checkpoint(model, uniform, {}, tmp_path)
    content = torch.load(path, weights_only=True)
    del content["config"]["quant"]["overrides"]
    content["checksum"] = checksum(content)
    torch.save(content, path)
    loaded, found, _ = load_checkpoint(path)
    require_agreement(uniform, found, path)
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), model(IMAGES))
