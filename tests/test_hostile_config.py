"""However a config is broken, it ends in a config that works or in one line, in bounded time and memory."""

import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from calibquant.errors import UserError
from calibquant.model.quant_layer import harden
from calibquant.solver.config import KEYS, LONGEST, check_config, load_config, plain
from tests.figures import record
from tests.small import calibrated_model, small_config
from tests.test_end_to_end import script

BASE = b"""\
quant:
  w_qconfig: &w {quantizer: AdaRoundFakeQuantize, observer: MSEObserver, bit: 4, ch_axis: 0}
  a_qconfig: {quantizer: LSQFakeQuantize, observer: MSEObserver, bit: 4, symmetric: False}
  ends_8bit: [stem_weight, stem_output]
  calibrate: 1024
  recon:
    scale_lr: 4.0e-5
    b_range: [20, 2]
    round_mode: learned_hard_sigmoid
    iters: 20000
model:
  type: resnet18
  kwargs: {num_classes: 1000, base_width: 64}
  path: "./weights.pth"  # a float state dict
data:
  path: ./imagenet
  mean: [0.485, 0.456, 0.406]
  input_size: 224
process: {seed: 1005}
"""
FRAGMENTS = [
    *(b"\0", b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\xc2\x85", b"\xe2\x80\xa8", b"\x1b[31m", b"\t"),
    *(b"\r\n", b"\n", b"---\n", b"...\n", b"%YAML 9.9\n", b": ", b"? ", b"- ", b"# ", b"|\n", b">-\n"),
    *(b"[", b"]", b"{", b"}", b"'", b'"', b"&a ", b"*a", b"*w", b"<<: *w", b"<<: [*w, *w]", b"!!", b"!"),
    *(b"!!int ", b"!!float ", b"!!binary ", b"!!set ", b"!!omap ", b"!!timestamp ", b"!!null ", b"!!map "),
    b"!!python/object/apply:os.system ['touch executed']",
    b"!<tag:" + b"x" * 500 + b"> ",
    *(
        b"1e400",
        b"-1e-400",
        b".nan",
        b".inf",
        b"0x" + b"f" * 5000,
        b"9" * 5000,
        b"1:1:1:1:1",
        b"0o7",
        b"-0",
    ),
    *(b"2024-13-45", b"=", b"~", b"yes", b'"\\ud800"', b'"\\x1b\\u2028"', b"a" * 3000, b"[" * 400),
    *(
        b"{a: " * 300,
        b"quant: {recon: ",
        b"resnext50_32x4d",
        b"base_width: 1",
        b"data.type: a",
        b"\xf0\x9f",
    ),
]
SEEN = {"accepted": 0, "refused in one line": 0, "other exceptions": 0}


def is_config_or_one_line(read: Any) -> bool:
    """Whether it is a config; that a refusal is one clear line is asserted."""
    SEEN["other exceptions"] += 1  # until it turns out otherwise
    try:
        config = read()
    except UserError as error:
        message = str(error)
        assert message.isprintable() and len(message) < 400, message
        ended = "refused in one line"
    else:
        assert check_config(plain(config)) == config
        ended = "accepted"
    SEEN["other exceptions"] -= 1
    SEEN[ended] += 1
    return ended == "accepted"


# Texts

PLACES = st.integers(0, len(BASE) - 1)
EDITS = st.one_of(
    st.tuples(st.just("flip"), PLACES, st.integers(0, 7)),
    st.tuples(st.just("delete"), PLACES, st.integers(1, 40)),
    st.tuples(st.just("repeat"), PLACES, st.integers(1, 80)),
    st.tuples(st.just("move"), PLACES, PLACES),
    st.tuples(st.just("splice"), PLACES, st.sampled_from(FRAGMENTS)),
    st.tuples(st.just("splice"), PLACES, st.binary(min_size=1, max_size=4)),
)


def edited(content: bytes, kind: str, place: int, what: Any) -> bytes:
    place %= len(content) or 1
    before, after = content[:place], content[place:]
    if kind == "flip":
        return before + bytes([byte ^ (1 << what) for byte in after[:1]]) + after[1:]
    if kind == "delete":
        return before + after[what:]
    if kind == "repeat":
        return before + after[:what] + after
    if kind == "move":
        return content[:what] + after[:30] + content[what:]
    return before + what + after


@settings(
    max_examples=1400,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(edits=st.lists(EDITS, min_size=1, max_size=4))
def test_a_mutated_text_is_a_config_or_one_line(tmp_path: Path, edits: list[Any]) -> None:
    content = BASE
    for edit in edits:
        content = edited(content, *edit)
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    is_config_or_one_line(lambda: load_config(path))


# Structures

NAMES = sorted({name for key in KEYS for name in key.path.split(".")} | {key.path for key in KEYS})
ODD: list[Any] = [
    *(None, True, 0, -1, 1, 2**31, 2**64, 10**400, 1e308, -1e308, 5e-324, float("nan"), float("inf")),
    *(
        "",
        " ",
        "a\nb",
        "\x1b[31m",
        "\ud800",
        "x" * 70_000,
        "../..",
        "~",
        "${HOME}",
        "4e-5",
        "resnext50_32x4d",
    ),
    *([], {}, [[]], [[[[[]]]]], [1e-320] * 3, [0, 0, 0], (1, 2), {1, 2}, b"x", object(), 3 + 4j),
]
VALUES = st.sampled_from(ODD) | st.integers() | st.floats() | st.text(max_size=5)


def walk(tree: Any) -> list[tuple[dict[Any, Any], Any]]:
    """Every mapping in a tree with each of its keys."""
    pairs = [(tree, key) for key in tree] if isinstance(tree, dict) else []
    return pairs + [pair for value in list(tree.values()) for pair in walk(value)] if pairs else []


@settings(max_examples=700, deadline=None, derandomize=True)
@given(data=st.data(), count=st.integers(1, 4))
def test_a_mutated_structure_is_a_config_or_one_line(data: st.DataObject, count: int) -> None:
    tree = plain(check_config(yaml.safe_load(BASE)))
    for _ in range(count):
        mapping, key = data.draw(st.sampled_from(walk(tree) or [(tree, "quant")]))
        kind = data.draw(st.sampled_from(["value", "value", "delete", "rename", "nest", "cycle"]))
        old = mapping.pop(key, None) if kind in ("delete", "rename") else mapping.get(key)
        if kind == "rename":
            mapping[data.draw(st.sampled_from([*NAMES, None, 0, 10**5000, (1, 2), "\n", "x" * 9000]))] = old
        elif kind != "delete":
            mapping[key] = {"value": data.draw(VALUES), "nest": {key: old}, "cycle": tree}[kind]
        if kind == "cycle":
            break  # such a tree cannot be walked again
    is_config_or_one_line(lambda: check_config(tree))


# Bombs


def laughs(levels: int, lead: str, joined: str, end: str) -> str:
    """The billion laughs: each line names the one before nine times."""
    lines = [f"{lead.format(i)}{joined.join([f'*a{i - 1}'] * 9)}{end}" for i in range(1, levels)]
    return "\n".join(["a0: &a0 {x: 1}", *lines])


BOMBS = {
    "laughs": laughs(10, "a{0}: &a{0} [", ", ", "]"),
    "laughs in a value": laughs(10, "a{0}: &a{0} [", ", ", "]") + "\nprocess: {seed: *a9}",
    "many laughs": laughs(1000, "a{0}: &a{0} [", ", ", "]"),
    "merges": laughs(10, "a{0}: &a{0} {{<<: [", ", ", "], y: 1}"),
    "merges of different keys": laughs(9, "a{0}: &a{0} {{k{0}: 1, <<: [", ", ", "]}"),
    "merge of itself": "a: &a {<<: *a}",
    "nested lists": "a: " + "[" * 60_000,
    "nested keys": "".join(f"{' ' * i}a:\n" for i in range(350)),
    "complex keys": "? " * 30_000,
    "many keys": "".join(f"k{i}: 1\n" for i in range(7_000)),
    "one long line": "a: " + "b " * 32_000,
    "many anchors": "".join(f"- &a{i} 1\n" for i in range(5_000)),
    "too long": "#" * 10**7,
    "long number": "process: {seed: " + "9" * 60_000 + "}",
    "base sixty": "process: {seed: 1" + ":59" * 20_000 + "}",
    "long key": "a" * 60_000 + ": 1",
    "long hexadecimal key": "0x" + "f" * 6_000 + ": 1",
    "long tag": "a: !" + "t" * 60_000 + " 1",
    "long path": f"model: {{type: resnet18, path: {'p/' * 10_000}}}",
    "long name": f"model: {{type: resnet18}}\ndata: {{type: {'n' * 300}}}",
    "escapes": 'model: {type: "\\x1b[2J\\e[31m"}',
    "half a pair": 'model: {type: resnet18, path: "\\ud800"}',
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_one_line_in_bounded_time_and_memory(tmp_path: Path, name: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(BOMBS[name])
    tracemalloc.start()
    started = time.process_time()
    try:
        assert not is_config_or_one_line(lambda: load_config(path))
        assert time.process_time() - started < 20, "traced, which is several times slower"
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()


# What passes, works


@pytest.mark.parametrize(
    ("name", "least"), [("resnext50_32x4d", 16), ("resnext101_32x8d", 8), ("resnet50", 1), ("resnet18", 1)]
)
def test_a_network_too_narrow_for_its_groups_is_refused(name: str, least: int) -> None:
    small_config(model__type=name, model__kwargs__base_width=least)
    with pytest.raises(UserError, match=f"base_width is {least - 1}, allowed is "):
        small_config(model__type=name, model__kwargs__base_width=least - 1)


@pytest.mark.parametrize("std", [5e-324, 1e-44, 1e-7])
def test_a_division_that_leaves_float32_is_refused(std: float) -> None:
    with pytest.raises(UserError, match=r"data\.std is \[.*allowed are numbers of at least 1e-06"):
        small_config(data__std=[1, 1, std])


@pytest.mark.parametrize("key", LONGEST)
def test_a_text_too_long_for_a_file_system_is_refused(key: str) -> None:
    with pytest.raises(UserError, match=f"{key} has 1001 characters, allowed are at most "):
        small_config(**{key.replace(".", "__"): "x" * 1001})


OPTIONS = st.fixed_dictionaries(
    {
        "model__kwargs__base_width": st.integers(1, 3),
        "model__kwargs__num_classes": st.integers(1, 3),
        "model__kwargs__small_images": st.booleans(),
        "data__input_size": st.integers(1, 9),
        **{
            f"quant__{section}__{key.path.rpartition('.')[2]}": st.sampled_from([2, 3, 8])
            if key.path.endswith(".bit")
            else st.sampled_from(key.kind.allowed.removeprefix("one of ").split(", ")).map(yaml.safe_load)
            for section in ("w_qconfig", "a_qconfig")
            for key in KEYS
            if key.path.startswith(f"quant.{section}.") and not key.path.endswith("symmetric")
        },
        "quant__w_qconfig__symmetric": st.booleans(),
        "quant__a_qconfig__symmetric": st.booleans(),
    }
)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(OPTIONS)
def test_what_passes_makes_a_network_that_runs(options: dict[str, Any]) -> None:
    config = small_config(**options)
    size = config.data.input_size
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    model = calibrated_model(config, images)
    harden(model)
    with torch.no_grad():
        logits = model(images)
    assert logits.shape == (3, config.model.kwargs.num_classes) and torch.isfinite(logits).all()


# The real script


@pytest.mark.parametrize(
    "content",
    [
        BASE.replace(b"resnet18", b"!!python/object/apply:os.system ['touch executed']"),
        BOMBS["laughs in a value"].encode(),
    ],
)
def test_the_script_ends_with_one_line_and_code_2(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "c.yaml").write_bytes(content)
    done = script("main_imagenet", "--config", "c.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: config c.yaml: ") and done.stderr.count("\n") == 1
    assert done.stdout == "" and [path.name for path in tmp_path.iterdir()] == ["c.yaml"]


def test_figures() -> None:
    counts = ", ".join(f"{count} {ended}" for ended, count in SEEN.items())
    record(f"hostile configs: {sum(SEEN.values())} mutations tried, {counts}")
