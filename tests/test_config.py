"""A config is complete and of the right types after the door, or one line says what is wrong with it."""

import datetime
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from easydict import EasyDict
from hypothesis import given, settings
from hypothesis import strategies as st

from calibquant.errors import UserError
from calibquant.solver.config import (
    KEYS,
    REQUIRED,
    check_config,
    config_name,
    load_config,
    plain,
    reference,
    yaml_value,
)
from calibquant.solver.script import run_script

ROOT = Path(__file__).resolve().parents[1]
BY_PATH = {key.path: key for key in KEYS}
EVERY_KEY = pytest.mark.parametrize("path", BY_PATH)

QDROP_LAYOUT = """
quant:
  a_qconfig:
    quantizer: LSQFakeQuantize
    observer: AvgMSEFastObserver
    bit: 4
    symmetric: False
    ch_axis: -1
  w_qconfig:
    quantizer: AdaRoundFakeQuantize
    observer: MSEObserver
    bit: 2
    symmetric: False
    ch_axis: 0
  calibrate: 512
  recon:
    batch_size: 16
    scale_lr: 4.0e-5
    warm_up: 0.1
    weight: 0.02
    iters: 5000
    b_range: [20, 2]
    keep_gpu: False
    round_mode: learned_hard_sigmoid
    drop_prob: 0.7
model:
  type: resnet50
  kwargs:
    num_classes: 1000
  path: /weights/resnet50.pth.tar
data:
  path: /datasets/imagenet
  batch_size: 32
  num_workers: 8
  pin_memory: True
  input_size: 224
  test_resize: 256
process:
  seed: 7
"""


def nested(path: str, value: Any) -> dict[str, Any]:
    """A mapping that holds one value at a dotted path."""
    for name in reversed(path.split(".")):
        value = {name: value}
    return value


def with_value(path: str, value: Any) -> dict[str, Any]:
    """The smallest config, plus one value."""
    smallest = {"model": {"type": "resnet18"}}
    section, _, rest = path.partition(".")
    inside = nested(rest, value) if rest else value
    return smallest | {section: smallest.get(section, {}) | inside if isinstance(inside, dict) else inside}


def get(config: EasyDict, path: str) -> Any:
    value: Any = config
    for name in path.split("."):
        value = value[name]
    return value


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        flat |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def refusal(raw: Any) -> str:
    """The message of the UserError that a config gives, one line for sure."""
    with pytest.raises(UserError) as caught:
        check_config(raw)
    message = str(caught.value)
    assert message.startswith("config: ") and len(message.splitlines()) == 1
    return message


def load_text(folder: Path, content: str | bytes) -> EasyDict:
    path = folder / "config.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_config(path)


# Defaults


def test_every_key_is_there_with_its_default() -> None:
    config = check_config({"model": {"type": "resnet101"}})
    expected = {key.path: key.default for key in KEYS} | {"model.type": "resnet101"}
    assert leaves(plain(config)) == expected
    assert config.quant.recon.iters == 20000 and config.process.seed == 1005


def test_defaults_are_allowed_values_and_stay_as_they_are() -> None:
    for key in KEYS:
        if key.default is not REQUIRED:
            assert key.kind.convert(key.default) == key.default, key.path
    first = check_config({"model": {"type": "resnet18"}})
    first.quant.ends_8bit.clear()
    first.data.mean[0] = 9.0
    second = check_config({"model": {"type": "resnet18"}})
    assert second.quant.ends_8bit and second.data.mean[0] == 0.485, "no config shares a list"


def test_a_checked_config_passes_again_unchanged() -> None:
    config = check_config(yaml.safe_load(QDROP_LAYOUT))
    assert check_config(plain(config)) == config
    assert check_config(yaml.safe_load(yaml.safe_dump(plain(config)))) == config


def test_plain_holds_no_easydict() -> None:
    def types(tree: Any) -> set[type]:
        inside = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else []
        return {type(tree)}.union(*map(types, inside))

    assert EasyDict not in types(plain(check_config({"model": {"type": "resnet18"}})))


@EVERY_KEY
def test_the_reference_tells_each_key_its_default_and_what_is_allowed(path: str) -> None:
    key = BY_PATH[path]
    (line,) = [line for line in reference().splitlines() if line.startswith(f"| `{path}` |")]
    assert line.count(" | ") == 3, "no value breaks the table"
    assert key.kind.allowed in line and key.meaning in line
    if key.default is REQUIRED:
        assert "required" in line
    else:
        assert yaml.safe_load(yaml_value(key.default)) == key.default


def test_outputs_are_named_by_network_data_and_bits() -> None:
    raw = with_value("quant.w_qconfig.bit", 2)
    assert config_name(check_config(raw)) == "resnet18_imagenet_w2_a4"


# Good values


def test_a_published_qdrop_file_runs(tmp_path: Path) -> None:
    config = load_text(tmp_path, QDROP_LAYOUT)
    for path, value in leaves(yaml.safe_load(QDROP_LAYOUT)).items():
        assert get(config, path) == value, path


@pytest.mark.parametrize("path", sorted(ROOT.glob("exp/**/*.yaml")), ids=lambda path: str(path.parent.name))
def test_every_config_of_this_repository_passes(path: Path) -> None:
    assert load_config(path).model.type


@pytest.mark.parametrize("written", ["4e-5", "4.0e-5", "4E-5", "0.00004", "'4e-5'"])
def test_a_number_without_dot_is_a_number(tmp_path: Path, written: str) -> None:
    text = f"model: {{type: resnet18}}\nquant: {{recon: {{scale_lr: {written}}}}}\n"
    value = load_text(tmp_path, text).quant.recon.scale_lr
    assert value == 4e-5 and isinstance(value, float)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("quant.w_qconfig.bit", 8),
        ("quant.a_qconfig.bit", 2),
        ("quant.ends_8bit", []),
        ("quant.recon.iters", 0),
        ("quant.recon.drop_prob", 0),
        ("quant.recon.drop_prob", 1),
        ("quant.recon.b_range", [2, 2]),
        ("quant.recon.round_mode", "nearest"),
        ("quant.recon.granularity", "layer"),
        ("model.path", None),
        ("model.kwargs.num_classes", 10),
        ("data.augment", "crop_flip"),
        ("data.sharpness", [0.5, 4]),
        ("data.mean", [0, 0.5, -1]),
        ("process.seed", 2**32 - 1),
    ],
)
def test_values_at_the_edge_are_allowed(path: str, value: Any) -> None:
    assert get(check_config(with_value(path, value)), path) == value


@pytest.mark.parametrize("section", ["quant", "quant.recon", "data", "process", "model.kwargs"])
def test_an_empty_section_is_as_good_as_none(section: str) -> None:
    assert check_config(with_value(section, None)) == check_config({"model": {"type": "resnet18"}})


def test_merge_keys_of_yaml_work(tmp_path: Path) -> None:
    text = """
        quant:
          w_qconfig: &four {bit: 3, observer: MinMaxObserver}
          a_qconfig: {<<: *four, bit: 4}
        model: {type: resnet18}
    """
    quant = load_text(tmp_path, text).quant
    assert (quant.a_qconfig.bit, quant.a_qconfig.observer) == (4, "MinMaxObserver")


# Unknown keys


@pytest.mark.parametrize(
    ("path", "suggestion"),
    [
        ("quant.recon.warmup", "did you mean quant.recon.warm_up?"),
        ("quant.bit", "did you mean quant.w_qconfig.bit or quant.a_qconfig.bit?"),
        ("quant.batch_size", "did you mean quant.recon.batch_size or data.batch_size?"),
        ("data.root", "allowed in data are augment, batch_size, calibration, "),
        ("quant.recon.lr", "did you mean quant.recon.round_lr or quant.recon.scale_lr?"),
        ("quant.recon.epochs", "allowed in quant.recon are "),
        ("model.pretrained", "allowed in model are kwargs, path, type"),
        ("model.kwargs.pretrained", "allowed in model.kwargs are "),
        ("epochs", "allowed are data, model, process, quant"),
        ("quant.recon.iter", "did you mean quant.recon.iters?"),
        ("quant.w_qconfg", "did you mean quant.w_qconfig?"),
        ("quant.w_qconfig.bits", "did you mean quant.w_qconfig.bit?"),
        ("model.kwarg", "did you mean model.kwargs?"),
        ("proces", "did you mean process?"),
        ("data.zzzzzz", "allowed in data are augment, batch_size, calibration, "),
        ("zzzzzz", "allowed are data, model, process, quant"),
    ],
)
def test_an_unknown_key_is_named_with_a_suggestion(path: str, suggestion: str) -> None:
    message = refusal(with_value(path, 1))
    assert f"unknown key {path}; {suggestion}" in message


def test_a_dotted_key_of_no_section_is_named_with_a_suggestion() -> None:
    message = refusal({"model": {"type": "resnet18"}, "zz.zz": 1})
    assert "unknown key zz.zz" in message and "allowed are data, model, process, quant" in message


@pytest.mark.parametrize("key", [1, None, True, 2.5, "", "line\nbreak", "quant\u2028", "x" * 5000])
def test_odd_keys_are_one_line(key: Any) -> None:
    assert "unknown key" in refusal({"model": {"type": "resnet18"}, key: 1})
    assert "unknown key quant." in refusal({"model": {"type": "resnet18"}, "quant": {key: 1}}).replace(
        "'", ""
    )


def test_a_missing_key_without_default_is_named() -> None:
    for raw in ({}, {"model": None}, {"model": {"path": "x"}}):
        message = refusal(raw)
        assert "model.type is missing; allowed is one of resnet18, " in message


# Bad values


@EVERY_KEY
@pytest.mark.parametrize("value", [{"a": 1}, [["a"]], datetime.date(2024, 1, 1), b"bytes", math.nan])
def test_a_wrongly_typed_value_names_key_value_and_what_is_allowed(path: str, value: Any) -> None:
    message = refusal(with_value(path, value))
    assert f"{path} is {value!r}"[:70] in message
    assert message.endswith(f"allowed is {BY_PATH[path].kind.allowed}")


@pytest.mark.parametrize(
    ("path", "values"),
    [
        ("quant.w_qconfig.quantizer", ["LSQ", "adaroundfakequantize", None, 1]),
        ("quant.a_qconfig.quantizer", ["AdaRoundFakeQuantize", ""]),
        ("quant.w_qconfig.observer", ["Observer", "minmax", None]),
        ("quant.w_qconfig.bit", [1, 9, 0, -4, 4.0, "4", True, None, [4]]),
        ("quant.a_qconfig.symmetric", [0, 1, "true", "yes", None]),
        ("quant.w_qconfig.ch_axis", [1, 2, "0", 0.0, False]),
        ("quant.a_qconfig.ch_axis", [0, True, -1.0]),
        ("quant.ends_8bit", ["stem_output", ["stem"], [[]], None, True]),
        ("quant.calibrate", [0, -1, 1.5, "1024", None]),
        ("quant.recon.batch_size", [0, 32.0, "32"]),
        ("quant.recon.scale_lr", [-1e-9, math.inf, -math.inf, "inf", "nan", "fast", "", True, None]),
        ("quant.recon.warm_up", [-0.1, 1.1, "1.1"]),
        ("quant.recon.b_range", [[20], [20, 2, 1], [20, 0], [20, 0.5], [20, -2], 20, "20, 2", [True, 2]]),
        ("data.sharpness", [[1], [0, 1], [1, 101], 2, "1, 2"]),
        ("quant.recon.keep_gpu", [1, "False"]),
        ("quant.recon.round_mode", ["learned", None]),
        ("quant.recon.drop_prob", [-0.01, 1.01, 2, None]),
        ("quant.recon.granularity", ["unit", None]),
        ("model.type", ["ResNet101", "resnet", 101]),
        ("model.kwargs.num_classes", [0, 10.0]),
        ("model.path", ["", "nul\0", 1, False]),
        ("data.type", ["a/b", "", ".hidden", "-x", "a b", None]),
        ("data.path", ["", None, 1]),
        ("data.num_workers", [-1, 2.0, 257]),
        ("data.mean", [[0, 0], [0, 0, "x"], 0.5]),
        ("data.std", [[1, 1, 0], [1, 1, -1], [1, 1, math.inf]]),
        ("process.seed", [-1, 2**32, 1.0, None]),
    ],
)
def test_a_bad_value_is_refused(path: str, values: list[Any]) -> None:
    for value in values:
        message = refusal(with_value(path, value))
        assert f"{path} is {value!r}, allowed is {BY_PATH[path].kind.allowed}" in message


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            with_value("data.input_size", 300),
            "data.input_size is 300, allowed is at most data.test_resize, 256",
        ),
        (with_value("quant.recon.b_range", [2, 20]), "b_range is [2, 20], allowed is a falling range"),
        (with_value("data.sharpness", [2, 1]), "data.sharpness is [2, 1], allowed is a rising range"),
        (None, "the file is None, allowed is a mapping"),
        ([1, 2], "the file is [1, 2], allowed is a mapping"),
        ({"quant": 4}, "quant is 4, allowed is a mapping"),
        ({"quant": {"recon": [1]}}, "quant.recon is [1], allowed is a mapping"),
        (with_value("model.kwargs", "x"), "model.kwargs is 'x', allowed is a mapping"),
    ],
)
def test_values_that_do_not_go_together_or_no_sections(raw: Any, message: str) -> None:
    assert message in refusal(raw)


def test_a_huge_number_is_one_line(tmp_path: Path) -> None:
    text = f"model: {{type: resnet18}}\nquant: {{recon: {{weight: {'9' * 4000}}}}}\n"
    with pytest.raises(UserError, match=r"quant\.recon\.weight is "):
        load_text(tmp_path, text)


# Files


@pytest.mark.parametrize(
    "text",
    [
        "model: {type: resnet18}\nmodel: {path: x}\n",
        "model: {type: resnet18, type: resnet34}\n",
        "model: {type: resnet18}\nquant:\n  recon:\n    iters: 1\n    weight: 1\n    iters: 2\n",
        "model: {type: resnet18}\nquant: {calibrate: 5}\nquant.calibrate: 7\n",
    ],
)
def test_a_key_that_stands_twice_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match="stands twice"):
        load_text(tmp_path, text)


@pytest.mark.parametrize("number", ["010", "-1_0:30", "1:30", "0x10", "0b1", "1:30.5", "0x" + "f" * 5000])
def test_a_number_that_yaml_reads_otherwise_than_it_looks_is_refused(tmp_path: Path, number: str) -> None:
    text = f"model: {{type: resnet18}}\nprocess: {{seed: {number}}}\n"
    with pytest.raises(UserError, match=rf"{number[:40]}: allowed are numbers written in decimal"):
        load_text(tmp_path, text)


@pytest.mark.parametrize(
    "content",
    [
        "model: [",
        "model: {type: resnet18\n",
        "a: &a [*a]\n",
        "a: *nowhere\n",
        "[" * 500,
        "? [1, 2]\n: 3\n",
        "one: 1\n---\ntwo: 2\n",
        "model: {type: !!python/object/apply:os.getcwd []}\n",
        "x: !!int ''\n",
        "x: !!bool maybe\n",
        "x: !!timestamp tomorrow\n",
        "x: 2024-13-45\n",
        b"\xff\xfe\xfa",
        "\x07",
    ],
)
def test_what_is_no_yaml_is_one_line(tmp_path: Path, content: str | bytes) -> None:
    with pytest.raises(UserError, match=r"config .*config\.yaml: ") as caught:
        load_text(tmp_path, content)
    assert len(str(caught.value).splitlines()) == 1


def test_a_missing_file_or_a_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml: cannot be read: No such file or directory"):
        load_config(tmp_path / "nowhere.yaml")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        load_config(tmp_path)


def test_a_script_ends_with_one_line_and_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_code:
        run_script(lambda: load_text(tmp_path, "quantize: 1\n"))
    assert exit_code.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: config ") and error.count("\n") == 1


# Anything

NAMES = sorted({name for key in KEYS for name in key.path.split(".")})
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=5)
    | st.dates()
    | st.sampled_from([10**400, "resnet18", "4e-5", "MinMaxObserver", "inf", 2**64])
)
ODD_KEYS = st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.dates()
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from([*NAMES, *BY_PATH]) | ODD_KEYS, inner, max_size=4)
    ),
    max_leaves=12,
)


def is_config_or_one_line(raw: Any) -> None:
    try:
        config = check_config(raw)
    except UserError as error:
        assert len(str(error).splitlines()) == 1
        assert len(str(error)) < 2000
    else:
        assert leaves(plain(config)).keys() == BY_PATH.keys()
        assert check_config(plain(config)) == config


@settings(max_examples=150, deadline=None)
@given(VALUES)
def test_any_value_gives_a_config_or_one_line(raw: Any) -> None:
    is_config_or_one_line(raw)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(BY_PATH)), VALUES, max_size=3))
def test_any_value_in_its_place_gives_a_config_or_one_line(values: dict[str, Any]) -> None:
    is_config_or_one_line({"model": {"type": "resnet18"}} | values)


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="!&*{}[]<:-?|>#%@'\" \n0fx.~abmodeltypresnt18", max_size=60))
def test_any_text_gives_a_config_or_one_line(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    try:
        load_text(tmp_path_factory.getbasetemp(), text)
    except UserError as error:
        assert len(str(error).splitlines()) == 1
