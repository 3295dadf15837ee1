"""The configuration: every key with its default, what is allowed and what it means, checked once.

The names follow the published QDrop files, so that such a YAML runs here. :data:`KEYS` is the whole
truth: the check, the defaults and the README's reference all come from it.
"""

import difflib
import hashlib
import json
import math
import re
import reprlib
import unicodedata
from collections.abc import Callable, Hashable, Mapping
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from easydict import EasyDict

from calibquant.errors import UserError, printable
from calibquant.model.quant_resnet import End
from calibquant.model.resnet import ARCHITECTURES
from calibquant.quantization.fake_quant import QUANTIZERS
from calibquant.quantization.observer import OBSERVERS
from calibquant.quantization.rounding import ROUNDINGS
from calibquant.solver.distil import require_units
from calibquant.solver.equalize import SCOPES, EqualizeSettings
from calibquant.solver.learn import DistilSettings, ReconSettings
from calibquant.solver.pipeline import float_model_on_meta, quantize_model

REQUIRED = object()
"""Marks a key without default."""


@dataclass(frozen=True)
class Kind:
    """A type of value: what it allows, in words, and the conversion, which raises ValueError."""

    allowed: str
    convert: Callable[[Any], Any]


@dataclass(frozen=True)
class Key:
    """One key of the config, by its dotted path."""

    path: str
    default: Any
    kind: Kind
    meaning: str


def integer(low: int, high: int | None = None) -> Kind:
    allowed = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"

    def convert(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError
        if value < low or (high is not None and value > high):
            raise ValueError
        return value

    return Kind(allowed, convert)


def number(low: float, high: float = math.inf, open_low: bool = False) -> Kind:
    above = "above" if open_low else "of at least"
    allowed = f"a number {above} {low:g}" + ("" if high == math.inf else f" and at most {high:g}")

    def convert(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError
        result = float(value)  # YAML 1.1 reads 4e-5, without a dot, as text
        if not math.isfinite(result) or not low <= result <= high or (open_low and result == low):
            raise ValueError
        return result

    return Kind(allowed, convert)


def choice(*values: Any) -> Kind:
    def convert(value: Any) -> Any:
        for allowed in values:
            if type(value) is type(allowed) and value == allowed:
                return value
        raise ValueError

    return Kind("one of " + ", ".join(str(v) for v in values), convert)


_UNWRITABLE = ("Cc", "Cs", "Zl", "Zp")
"""Unicode categories that no name holds: control characters, halves of pairs, separators of lines."""


def text(pattern: str = r"(?s).+", allowed: str = "a text") -> Kind:
    def convert(value: Any) -> str:
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise ValueError
        if any(unicodedata.category(c) in _UNWRITABLE for c in value):
            raise ValueError
        return value

    return Kind(allowed, convert)


def sequence(kind: Kind, allowed: str, length: int | None = None) -> Kind:
    def convert(value: Any) -> list[Any]:
        if not isinstance(value, list) or length not in (None, len(value)):
            raise ValueError
        return [kind.convert(item) for item in value]

    return Kind(allowed, convert)


def optional(kind: Kind) -> Kind:
    return Kind(f"{kind.allowed}, or null", lambda value: None if value is None else kind.convert(value))


class BadEntry(ValueError):
    """One entry of a list is wrong; the message shows it."""


BITS = integer(2, 8)
MOST_OVERRIDES = 1000


def _override(entry: Any) -> dict[str, Any]:
    """One entry of `quant.overrides`, with only the keys that it gives."""
    kinds = {"match": text(r"[\x21-\x7e]{1,100}"), "w_bit": BITS, "a_bit": BITS}
    if not isinstance(entry, dict) or "match" not in entry or not 2 <= len(entry) <= 3:
        raise ValueError
    if not entry.keys() <= kinds.keys():
        raise ValueError
    return {key: kinds[key].convert(value) for key, value in entry.items()}


def _overrides(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or len(value) > MOST_OVERRIDES:
        raise ValueError
    entries = []
    for number, entry in enumerate(value, start=1):
        try:
            entries.append(_override(entry))
        except ValueError:
            raise BadEntry(f" (entry {number}: {shown(entry)})") from None
    return entries


OVERRIDES = Kind(
    "a list of {match: pattern, w_bit: 2 to 8, a_bit: 2 to 8}, one of the bits or both", _overrides
)
BOOLEAN = Kind("true or false", choice(True, False).convert)
ENDS = tuple(end.value for end in End)
NAME = text(r"[A-Za-z0-9][A-Za-z0-9_.-]*", "a name of letters, digits, '_', '.' and '-'")


def _quantizer_keys(
    section: str, quantizers: list[str], observer: str, axes: tuple[int, int], what: str
) -> list[Key]:
    return [
        Key(f"{section}.quantizer", quantizers[0], choice(*quantizers), f"what can be learned of {what}"),
        Key(f"{section}.observer", observer, choice(*OBSERVERS), f"how the range of {what} is found"),
        Key(f"{section}.bit", 4, integer(2, 8), f"bit-width of {what}"),
        Key(f"{section}.symmetric", False, BOOLEAN, "signed grid around zero instead of a zero-point"),
        Key(
            f"{section}.ch_axis",
            axes[0],
            choice(*axes),
            f"-1: one range per tensor; {max(axes)}: one per channel",
        ),
    ]


_WEIGHT_QUANTIZERS = ["AdaRoundFakeQuantize", *(q for q in QUANTIZERS if q != "AdaRoundFakeQuantize")]
_ACTIVATION_QUANTIZERS = ["LSQFakeQuantize", "LSQPlusFakeQuantize", "FixedFakeQuantize"]

RECON = asdict(ReconSettings())
"""Defaults of reconstruction."""
EQUALIZE = asdict(EqualizeSettings())
"""Defaults of equalization."""
DISTIL = asdict(DistilSettings())
"""Defaults of learning by the network's output."""
UNITS = sequence(text(r"[\x21-\x7e]{1,100}"), "a list of names of units")

KEYS: list[Key] = [
    *_quantizer_keys("quant.w_qconfig", _WEIGHT_QUANTIZERS, "MSEObserver", (0, -1), "weights"),
    *_quantizer_keys("quant.a_qconfig", _ACTIVATION_QUANTIZERS, "MSEObserver", (-1, 1), "activations"),
    Key(
        "quant.ends_8bit",
        list(ENDS),
        sequence(choice(*ENDS), "a list of " + ", ".join(ENDS)),
        "what stays at 8 bits at the two ends; QDrop's own code omits `stem_output`",
    ),
    Key(
        "quant.overrides",
        [],
        OVERRIDES,
        "mixed precision: bit-widths of the units and layers whose name fits `match` (`*`, `?`, `[ab]`); "
        "wins over the keys above, the last that fits counts",
    ),
    Key(
        "quant.equalize.shift",
        EQUALIZE["shift"],
        BOOLEAN,
        "take from activations' channels what they never fall below, and give it to the biases behind",
    ),
    Key(
        "quant.equalize.iters",
        EQUALIZE["iters"],
        integer(0, 10**6),
        "steps for each stage in which activations' channels are scaled to serve one step size; 0: none",
    ),
    Key(
        "quant.equalize.lr",
        EQUALIZE["lr"],
        number(0),
        "Adam learning rate of those scales' logarithms, cosine to 0",
    ),
    Key(
        "quant.equalize.scope",
        EQUALIZE["scope"],
        choice(*SCOPES),
        "whose activations are scaled: all, or those that the stem writes",
    ),
    Key("quant.calibrate", 1024, integer(1, 10**9), "calibration images taken from the calibration folder"),
    Key("quant.recon.batch_size", RECON["batch_size"], integer(1, 10**6), "images per optimisation step"),
    Key(
        "quant.recon.scale_lr",
        RECON["scale_lr"],
        number(0),
        "Adam learning rate of step sizes, cosine to 0",
    ),
    Key(
        "quant.recon.round_lr",
        RECON["round_lr"],
        number(0),
        "Adam learning rate of rounding logits, constant; in `straight_through` of weights in steps of "
        "the grid, with 1,024 inputs to an output (as the root of their number), cosine to 0",
    ),
    Key(
        "quant.recon.warm_up",
        RECON["warm_up"],
        number(0, 1),
        "share of the steps before the rounding regulariser acts",
    ),
    Key("quant.recon.weight", RECON["weight"], number(0), "weight of the rounding regulariser in the loss"),
    Key(
        "quant.recon.iters",
        RECON["iters"],
        integer(0, 10**9),
        "steps per unit; with 0 nothing is learned: ranges and rounding are those found before",
    ),
    Key(
        "quant.recon.b_range",
        list(RECON["b_range"]),
        sequence(number(1), "a list of two numbers of at least 1", 2),
        "exponent of the regulariser, from its first value linearly to its second",
    ),
    Key(
        "quant.recon.keep_gpu",
        RECON["keep_gpu"],
        BOOLEAN,
        "cached activations stay on the GPU, else in host memory",
    ),
    Key(
        "quant.recon.round_mode",
        RECON["round_mode"],
        choice(*ROUNDINGS, "nearest"),
        "weights round up or down (AdaRound), or to any grid point (straight-through estimator), as is "
        "learned, or to nearest",
    ),
    Key(
        "quant.recon.drop_prob",
        RECON["drop_prob"],
        number(0, 1),
        "chance that an element stays *quantized* (QDrop's name for it); 1 drops nothing",
    ),
    Key(
        "quant.recon.granularity",
        RECON["granularity"],
        choice("block", "layer"),
        "what is reconstructed at once: a residual block or a single layer",
    ),
    Key(
        "quant.recon.precision",
        RECON["precision"],
        choice("tf32", "fp32", "bf16"),
        "convolutions of the steps: TF32 on a GPU (as published), float32, or bfloat16 where it is faster",
    ),
    Key(
        "quant.recon.cache",
        RECON["cache"],
        choice("fp16", "fp32"),
        "cached activations; those beyond float16's range are float32 anyway",
    ),
    Key(
        "quant.recon.compile",
        RECON["compile"],
        choice("auto", "always", "never"),
        "torch.compile for the steps where it pays, always or never; needs a C++ compiler, on a GPU Triton",
    ),
    Key(
        "quant.recon.compensate",
        RECON["compensate"],
        BOOLEAN,
        "before learning, a unit's weights are rounded to make up for each other's errors (GPTQ), and "
        "step sizes and grid points improved in turn (coordinate descent)",
    ),
    Key(
        "quant.recon.ranges",
        RECON["ranges"],
        choice("float", "quantized"),
        "activation ranges: as in the float network, or set again on a unit's quantized inputs",
    ),
    Key(
        "quant.recon.weight_scale_lr",
        RECON["weight_scale_lr"],
        number(0),
        "Adam learning rate of weights' step sizes over their mean, cosine to 0; 0 keeps them (Genie-M)",
    ),
    Key(
        "quant.recon.merge",
        list(RECON["merge"]),
        UNITS,
        "units that are reconstructed together with the one before them (MRECG)",
    ),
    Key(
        "quant.recon.views",
        RECON["views"],
        integer(1, 64),
        "views of each image to learn from: itself, mirrored, then random crops; each takes its memory",
    ),
    Key(
        "quant.recon.held_out",
        RECON["held_out"],
        number(0, 0.5),
        "share of the images that units do not learn from; their error then decides whether what a unit "
        "learned is kept",
    ),
    Key(
        "quant.distil.after",
        list(DISTIL["after"]),
        UNITS,
        "units after which those finished so far learn on, by the network's output, the rest float "
        "(PD-Quant)",
    ),
    Key("quant.distil.iters", DISTIL["iters"], integer(1, 10**9), "steps of that, each time"),
    Key(
        "quant.distil.lr",
        DISTIL["lr"],
        number(0),
        "Adam learning rate there of step sizes and biases over their mean, cosine to 0",
    ),
    Key(
        "quant.distil.round_lr",
        DISTIL["round_lr"],
        number(0),
        "Adam learning rate there of weights, which learn as in `straight_through`; 0 keeps their integers",
    ),
    Key("model.type", REQUIRED, choice(*ARCHITECTURES), "the network"),
    Key("model.kwargs.num_classes", 1000, integer(1, 100_000), "outputs of the classifier"),
    Key(
        "model.kwargs.stride_in_1x1", False, BOOLEAN, "a stage's stride on its first 1x1 convolution (MSRA)"
    ),
    Key("model.kwargs.small_images", False, BOOLEAN, "3x3 stem of stride 1 without pooling"),
    Key("model.kwargs.base_width", 64, integer(1, 1024), "channels of the stem"),
    Key(
        "model.path",
        None,
        optional(text(allowed="a path")),
        "float state dict; null downloads torchvision's `IMAGENET1K_V1`",
    ),
    Key("data.type", "imagenet", NAME, "name of the data set, used in the names of outputs"),
    Key(
        "data.path",
        "./imagenet",
        text(allowed="a path"),
        "folder that holds `val/` and the calibration folder",
    ),
    Key(
        "data.calibration",
        "sel",
        text(allowed="a path"),
        "calibration folder, inside `data.path` or absolute",
    ),
    Key(
        "data.classes",
        "imagenet",
        text(allowed="imagenet, folders or a path"),
        "class of an image: by ImageNet wnid, by sorted `folders` of val, or by a file that lists folders",
    ),
    Key("data.batch_size", 64, integer(1, 10**6), "images per batch of evaluation and range calibration"),
    Key("data.num_workers", 4, integer(0, 256), "data-loading processes, at most one per core"),
    Key("data.pin_memory", True, BOOLEAN, "page-locked batches, for copies to a GPU"),
    Key("data.input_size", 224, integer(1, 4096), "side of the centre crop in pixels"),
    Key("data.test_resize", 256, integer(1, 8192), "length of the shorter side after resizing, in pixels"),
    Key(
        "data.mean",
        [0.485, 0.456, 0.406],
        sequence(number(-1e6, 1e6), "a list of three numbers from -1e6 to 1e6", 3),
        "subtracted from each channel of an image in [0, 1]",
    ),
    Key(
        "data.std",
        [0.229, 0.224, 0.225],
        sequence(number(0, open_low=True), "a list of three numbers above 0", 3),
        "divides each channel afterwards",
    ),
    Key(
        "data.augment",
        "none",
        choice("none", "crop_flip"),
        "calibration images as for evaluation, or with the published random crop and flip",
    ),
    Key(
        "data.sharpness",
        [1, 1],
        sequence(number(0.01, 100), "a list of two numbers from 0.01 to 100", 2),
        "range of a random factor of each calibration image's sharpness; 1 keeps it",
    ),
    Key("data.skip_unreadable", False, BOOLEAN, "skip and count unreadable images instead of stopping"),
    Key("process.seed", 1005, integer(0, 2**32 - 1), "seed of every random draw"),
    Key(
        "process.deterministic",
        False,
        BOOLEAN,
        "on CUDA, the same result bit for bit each time; a CPU always gives it",
    ),
]


SECTIONS = {key.path.rsplit(".", depth)[0] for key in KEYS for depth in (1, 2)}
"""Dotted paths of what holds keys."""

_MAX_BYTES = 65_536
"""Of a config file; the longest of this repository has 3,000."""


class _StrictLoader(yaml.SafeLoader):
    """YAML in which what it would read otherwise than it looks is an error instead of a silent choice.

    That is a key that stands twice, and a number that is not written in decimal. Aliases and merges are
    bounded: a few nested ones would otherwise stand for billions of nodes. So is the depth, in which the
    reader's time is quadratic.
    """

    MAX_ALIASES, MAX_MERGED, MAX_DEPTH = 100, 1000, 30
    aliases, depth = 0, 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.aliases += self.check_event(yaml.AliasEvent)
        if self.aliases > self.MAX_ALIASES:
            raise yaml.YAMLError(f"more than {self.MAX_ALIASES} aliases")
        self.depth += 1
        if self.depth > self.MAX_DEPTH:
            raise yaml.YAMLError(f"nested deeper than {self.MAX_DEPTH} levels")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > self.MAX_MERGED:
            raise yaml.YAMLError(f"more than {self.MAX_MERGED} merged keys")


def _mapping_without_duplicates(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *anchor`, which may stand twice
            continue
        key = loader.construct_object(key_node, deep=True)
        if isinstance(key, Hashable):
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
    return loader.construct_mapping(node, deep=True)


def _decimal_number(loader: _StrictLoader, node: yaml.ScalarNode) -> float | int:
    kind, text = node.tag.rpartition(":")[2], node.value
    if ":" in text or (kind == "int" and re.match(r"[-+]?0[0-9_bx]", text)):  # 010 would be 8, 1:30 be 90
        words = f"{text[:40]}: allowed are numbers written in decimal"
        raise yaml.constructor.ConstructorError(None, None, words, node.start_mark)
    number: float | int = getattr(loader, f"construct_yaml_{kind}")(node)
    return number


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_duplicates)
for _kind in ("int", "float"):
    _StrictLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", _decimal_number)


def load_config(path: str | Path) -> EasyDict:
    """Read and check a YAML config; afterwards every key of :data:`KEYS` exists and has its type.

    Raises:
        UserError: :func:`read_config` or :func:`check_config` refuses it.
    """
    return check_config(read_config(path), f"config {path}")


def read_config(path: str | Path) -> Any:
    """What a YAML config says, unchecked.

    Raises:
        UserError: the file is missing, empty, too long or no YAML.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise UserError(f"config {path}: is longer than {_MAX_BYTES} bytes, the most that is allowed")
        written = content.decode("utf-8")
    except (OSError, ValueError) as error:
        no_text = isinstance(error, UnicodeDecodeError)
        reason = "it is not UTF-8 text" if no_text else getattr(error, "strerror", None) or str(error)
        raise UserError(f"config {path}: cannot be read: {reason}") from error
    try:
        found = yaml.load(written, Loader=_StrictLoader)
    except Exception as error:  # `!!int ""` or a deep nesting raise more than YAMLError
        reason = printable(str(error), 200) or type(error).__name__
        raise UserError(f"config {path}: is no valid YAML: {reason}") from error
    if found is None:
        raise UserError(f"config {path}: is empty, allowed is a mapping of keys to values")
    return found


def check_config(
    raw: Any, where: str = "config", defaults: Mapping[str, Any] = MappingProxyType({})
) -> EasyDict:
    """Check a nested mapping against :data:`KEYS` and fill in defaults.

    Args:
        defaults: by dotted path, of keys for which the caller knows better than :data:`KEYS`.

    Raises:
        UserError: an unknown or missing key or a bad value; one line names it and what is allowed.
    """
    given: dict[str, Any] = {}
    known = {key.path: key for key in KEYS}
    for path, value in _flatten(raw, where):
        if path not in known:
            name = path if path.isprintable() else ascii(path)
            raise UserError(f"{where}: unknown key {name:.80}; {_suggestion(path[:80])}")
        if path in given:
            raise UserError(f"{where}: the key {path} stands twice, nested and dotted")
        given[path] = value
    config: dict[str, Any] = {}
    for key in KEYS:
        value = given.get(key.path, defaults.get(key.path, key.default))
        if value is REQUIRED:
            raise UserError(f"{where}: {key.path} is missing; allowed is {key.kind.allowed}")
        try:
            value = key.kind.convert(value)
        except (ValueError, OverflowError) as error:
            entry = str(error) if isinstance(error, BadEntry) else ""
            raise UserError(
                f"{where}: {key.path} is {shown(value)}{entry}, allowed is {key.kind.allowed}"
            ) from None
        *sections, name = key.path.split(".")
        target = config
        for section in sections:
            target = target.setdefault(section, {})
        target[name] = value
    checked = EasyDict(config)
    _check_combinations(checked, where)
    return checked


_BRIEF = reprlib.Repr()
_BRIEF.maxlevel, _BRIEF.maxstring, _BRIEF.maxother, _BRIEF.maxlong = 3, 70, 70, 70


def shown(value: Any) -> str:
    """A value on one line of at most 80 characters, however large what it stands for is."""
    try:
        written = _BRIEF.repr(value)
    except ValueError:  # an integer of more than 4300 digits
        written = f"a huge {type(value).__name__}"
    return written if len(written) <= 80 else written[:77] + "..."


def first_difference(one: Any, other: Any, path: str) -> tuple[str, Any, Any]:
    """Where two unequal values first differ, inside of mappings and lists of them, and both there."""
    if isinstance(one, dict) and isinstance(other, dict):
        key = min(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))
        return first_difference(one.get(key), other.get(key), f"{path}.{key}")
    lists = isinstance(one, list) and isinstance(other, list)
    if lists and all(isinstance(entry, dict) for entry in (*one, *other)):
        pairs = enumerate(zip_longest(one, other))
        number, (a, b) = next((place, pair) for place, pair in pairs if pair[0] != pair[1])
        return f"{path}[{number}]", a, b
    return path, one, other


def _suggestion(path: str) -> str:
    """What the user may have meant by an unknown dotted path: a near name, else what stands beside it."""
    names = SECTIONS | {key.path for key in KEYS}
    section, _, last = path.rpartition(".")
    while section and section not in SECTIONS:
        section, _, last = section.rpartition(".")
    beside = {n.rpartition(".")[2]: n for n in sorted(names) if n.rpartition(".")[0] == section}
    elsewhere = [key.path for key in KEYS if key.path.rpartition(".")[2] == path.rpartition(".")[2]]
    close = difflib.get_close_matches(last, beside, n=1, cutoff=0.65)
    close = close or [name for name in beside if name.endswith(f"_{last}")]
    meant = [beside[name] for name in close[:2]] or elsewhere[:2]
    if meant:
        return f"did you mean {' or '.join(meant)}?"
    return f"allowed {f'in {section} ' if section else ''}are {', '.join(beside)}"


def _flatten(raw: Any, where: str, prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted paths and values of a nested mapping; an empty section is as good as a missing one."""
    if not isinstance(raw, dict):
        name = prefix.rstrip(".") or "the file"
        raise UserError(f"{where}: {name} is {shown(raw)}, allowed is a mapping of keys to values")
    flat: list[tuple[str, Any]] = []
    for key, value in raw.items():
        path = f"{prefix}{key if isinstance(key, str) else shown(key)}"
        if path in SECTIONS:
            flat += [] if value is None else _flatten(value, where, path + ".")
        else:
            flat.append((path, value))
    return flat


LONGEST = {
    "model.path": 1000,
    "data.type": 64,
    "data.path": 1000,
    "data.calibration": 1000,
    "data.classes": 1000,
}
"""Characters of texts; the data's type is part of a folder's name."""
SMALLEST_STD = 1e-6
"""Below, normalised images would leave the range of float32."""


def _check_combinations(config: EasyDict, where: str) -> None:
    data, recon, kwargs = config.data, config.quant.recon, config.model.kwargs
    for key, longest in LONGEST.items():
        value = lookup(config, key)
        if value is not None and len(value) > longest:
            raise UserError(f"{where}: {key} has {len(value)} characters, allowed are at most {longest}")
    narrowest = -(-64 // ARCHITECTURES[config.model.type].width_per_group)
    if kwargs.base_width < narrowest:
        raise UserError(
            f"{where}: model.kwargs.base_width is {kwargs.base_width}, allowed is at least {narrowest} "
            f"for {config.model.type}"
        )
    if min(data.std) < SMALLEST_STD:
        raise UserError(
            f"{where}: data.std is {shown(data.std)}, allowed are numbers of at least {SMALLEST_STD:g}"
        )
    if data.input_size > data.test_resize:
        raise UserError(
            f"{where}: data.input_size is {data.input_size}, allowed is at most "
            f"data.test_resize, {data.test_resize}"
        )
    start, end = recon.b_range
    if start < end:
        raise UserError(f"{where}: quant.recon.b_range is [{start:g}, {end:g}], allowed is a falling range")
    low, high = config.data.sharpness
    if low > high:
        raise UserError(f"{where}: data.sharpness is [{low:g}, {high:g}], allowed is a rising range")
    after = config.quant.distil.after
    if config.quant.overrides or recon.merge or after:
        key = "quant.overrides"
        try:  # the structure alone, without memory
            model = quantize_model(float_model_on_meta(config), config)
            key = "quant.recon.merge"
            units = model.units(recon.granularity, recon.merge)
            key = "quant.distil.after"
            require_units(after, units)
        except ValueError as error:
            raise UserError(f"{where}: {key}: {error}") from error


def lookup(config: EasyDict, path: str) -> Any:
    """The value at a dotted path."""
    value: Any = config
    for part in path.split("."):
        value = value[part]
    return value


def plain(config: EasyDict) -> dict[str, Any]:
    """The config as nested plain dicts and lists, for YAML, JSON and checkpoints."""
    return {key: _plain_value(value) for key, value in config.items()}


def _plain_value(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain_value(item) for item in value]
    return plain(value) if isinstance(value, dict) else value


def config_name(config: EasyDict) -> str:
    """Name of the outputs' folders: ``<type>_<data type>_<bits name>``."""
    return f"{config.model.type}_{config.data.type}_{bits_name(config)}"


def bits_name(config: EasyDict) -> str:
    """``w<bits>_a<bits>``, and ``_mixed_<hash of the overrides>`` where there are any."""
    quant = plain(config)["quant"]
    name = f"w{quant['w_qconfig']['bit']}_a{quant['a_qconfig']['bit']}"
    if not quant["overrides"]:
        return name
    written = json.dumps(quant["overrides"], sort_keys=True).encode()
    return f"{name}_mixed_{hashlib.sha256(written).hexdigest()[:6]}"


def reference() -> str:
    """The README's table of every key, its default, what is allowed and what it means."""
    lines = ["| key | default | allowed | meaning |", "|---|---|---|---|"]
    for key in KEYS:
        default = "required" if key.default is REQUIRED else f"`{yaml_value(key.default)}`"
        lines.append(f"| `{key.path}` | {default} | {key.kind.allowed} | {key.meaning} |")
    return "\n".join(lines)


def yaml_value(value: Any) -> str:
    """A default as one would write it in the YAML."""
    dumped: str = yaml.safe_dump(value, default_flow_style=True, width=1000)
    return dumped.removesuffix("\n").removesuffix("\n...")


if __name__ == "__main__":
    print(reference())
