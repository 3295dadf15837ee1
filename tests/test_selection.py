"""Selection and ranking by activations: against batch norm, every choice there is, and random draws."""

import itertools
import json
import logging
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from calibquant.errors import UserError
from calibquant.model.quant_layer import calibrate_weights
from calibquant.solver import select_calibration as module
from calibquant.solver.activation_statistics import (
    batch_norms,
    channel_weights,
    deviation_features,
    gram_matrix,
    image_features,
    image_moments,
    statistics_distance,
)
from calibquant.solver.calibration_score import float_reference, ranges_cost, statistics_distances
from calibquant.solver.checkpoint import checksum
from calibquant.solver.imagenet_util import load_calibration
from calibquant.solver.pipeline import calibrate, float_model, quantize_model
from calibquant.solver.probe import Reference
from calibquant.solver.rank_sets import find_set
from calibquant.solver.script import run_script
from calibquant.solver.select_calibration import select_calibration
from calibquant.solver.selection import (
    POOL_STRATEGIES,
    Pool,
    choose_random,
    exchange,
    nearest_images,
    principal_components,
)
from calibquant.solver.train_folder import PoolReader
from tests.small import random_float_model, small_config, some_wnids
from tests.test_end_to_end import write_config

WNIDS = some_wnids(5)
QUICK = {f"quant__{side}_qconfig__observer": "MinMaxObserver" for side in "wa"}
CPU = torch.device("cpu")
EACH_POOL_STRATEGY = pytest.mark.parametrize("strategy", POOL_STRATEGIES)


def varied_images(count: int, seed: int = 0) -> torch.Tensor:
    """Images of different brightness and contrast, ``[count, 3, 16, 16]``."""
    draw = torch.Generator().manual_seed(seed)
    contrast, brightness = (torch.rand(2, count, 1, 1, 1, generator=draw) * 2).unbind()
    return torch.randn(count, 3, 16, 16, generator=draw) * contrast + brightness - 1


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A network whose running statistics are those of many varied images."""
    model = random_float_model(small_config())
    for norm in batch_norms(model):
        norm.momentum = None  # the average of all batches
        norm.reset_running_stats()
    images = varied_images(512, seed=1)
    for norm in batch_norms(model):  # in order, each behind those that are settled
        norm.train()
        with torch.no_grad():
            model(images)
        norm.eval()
    return model.eval()


@pytest.fixture(scope="module")
def pool(model) -> Pool:
    moments = image_moments(model, varied_images(120))
    return Pool([f"c{i % 7}/{i}" for i in range(120)], moments, channel_weights(model))


def distance(model: nn.Module, images: torch.Tensor) -> float:
    return statistics_distance(image_moments(model, images).mean(0), channel_weights(model))


# Statistics


def test_a_sets_statistics_are_those_that_batch_norm_finds_in_training(model):
    images = varied_images(24)
    seen: dict[nn.Module, torch.Tensor] = {}
    hooks = [
        n.register_forward_pre_hook(lambda n, x: seen.__setitem__(n, x[0])) for n in batch_norms(model)
    ]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    mean, second = image_moments(model, images).double().mean(0)
    sizes = [norm.num_features for norm in batch_norms(model)]
    assert len(seen) == len(sizes) == 20 and mean.shape == (sum(sizes),)
    means, seconds = mean.split(sizes), second.split(sizes)
    for norm, first, square in zip(batch_norms(model), means, seconds, strict=True):
        fresh = nn.BatchNorm2d(norm.num_features, momentum=1.0).double()
        x = seen[norm].double()
        fresh(x)
        count = x[:, 0].numel()
        scale = (norm.running_var.double() + norm.eps).sqrt()
        torch.testing.assert_close(
            first * scale + norm.running_mean, fresh.running_mean, rtol=1e-4, atol=1e-5
        )
        variance = (square - first**2) * scale**2 - norm.eps
        torch.testing.assert_close(variance, fresh.running_var * (count - 1) / count, rtol=1e-3, atol=1e-5)


def test_the_distance_is_the_divergence_of_gaussians_that_torch_knows(model):
    mean, second = image_moments(model, varied_images(9)).double().mean(0)
    variance = second - mean**2
    found = torch.distributions.Normal(mean, variance.sqrt())
    divergence = torch.distributions.kl_divergence(found, torch.distributions.Normal(0.0, 1.0))
    sizes = [norm.num_features for norm in batch_norms(model)]
    expected = torch.stack([layer.mean() for layer in divergence.split(sizes)]).mean()
    assert distance(model, varied_images(9)) == pytest.approx(float(expected), rel=1e-5)


def test_the_images_that_made_the_running_statistics_are_at_no_distance(model):
    assert distance(model, varied_images(512, seed=1)) == pytest.approx(0, abs=1e-6)
    assert distance(model, varied_images(512, seed=2)) < 0.2 * distance(model, varied_images(8))


def test_a_channel_that_never_varied_does_not_hide_the_others(model):
    dead = random_float_model(small_config())
    dead.conv1.weight.data[0] = 0
    dead.bn1.running_mean[0], dead.bn1.running_var[0] = 0, 0
    first, second = image_moments(dead, varied_images(4))[:, :, 0].T
    assert torch.equal(first, torch.zeros(4))
    torch.testing.assert_close(second, torch.ones(4))


def test_a_single_flat_image_is_far_but_not_infinitely(model):
    assert 1 < distance(model, torch.zeros(1, 3, 16, 16)) < 20


def test_near_the_running_statistics_the_mean_features_norm_is_the_distance(model):
    moments, weights = image_moments(model, varied_images(512, seed=2)), channel_weights(model)
    squared_norm = deviation_features(moments, weights).mean(0).square().sum()
    assert float(squared_norm) == pytest.approx(statistics_distance(moments.mean(0), weights), rel=0.1)


@pytest.mark.parametrize("features", [deviation_features, image_features])
def test_the_gram_matrix_holds_all_inner_products_in_blocks_of_any_size(pool, features, monkeypatch):
    monkeypatch.setattr("calibquant.solver.activation_statistics.BLOCK", 37)
    whole = features(pool.moments, pool.weights).double()
    gram = gram_matrix(pool.moments, pool.weights, features)
    torch.testing.assert_close(gram, whole @ whole.T, rtol=1e-4, atol=1e-6)


# Strategies


def test_matching_is_nearer_than_any_of_a_hundred_random_draws_by_far(pool):
    by_class, draws = pool.by_class(), [random.Random(seed) for seed in range(100)]
    drawn = [pool.distance(choose_random(by_class, 30, draw)) for draw in draws]
    chosen = pool.distance(POOL_STRATEGIES["bn_statistics"](pool, 30, random.Random(0), True))
    assert chosen < min(drawn) and chosen < 0.6 * np.mean(drawn)


def test_clusters_are_all_in_the_set_and_a_random_draw_misses_some():
    centres = torch.randn(10, 2, 40, generator=torch.Generator().manual_seed(0))
    moments = centres.repeat_interleave(12, dim=0)
    moments += 0.01 * torch.randn(moments.shape, generator=torch.Generator().manual_seed(1))
    moments[:, 1] = moments[:, 1].exp() + moments[:, 0].square()
    pool = Pool([f"c/{i}" for i in range(120)], moments, torch.full((40,), 1 / 40, dtype=torch.float64))

    def clusters(files: list[str]) -> int:
        return len({int(file[2:]) // 12 for file in files})

    found = [clusters(POOL_STRATEGIES["clustering"](pool, 30, random.Random(s), False)) for s in range(5)]
    drawn = [clusters(choose_random(pool.by_class(), 30, random.Random(s), False)) for s in range(5)]
    assert min(found) == 10 > min(drawn)


@EACH_POOL_STRATEGY
@pytest.mark.parametrize(("num", "cover"), [(7, True), (20, True), (120, True), (3, False), (20, False)])
def test_a_strategy_chooses_num_different_images_and_covers_classes(pool, strategy, num, cover):
    chosen = POOL_STRATEGIES[strategy](pool, num, random.Random(0), cover)
    assert len(chosen) == len(set(chosen)) == num and set(chosen) <= set(pool.files)
    assert not cover or {file[:2] for file in chosen} == {f"c{i}" for i in range(7)}
    assert chosen == POOL_STRATEGIES[strategy](pool, num, random.Random(0), cover)


def test_exchanges_end_where_no_single_exchange_helps_and_every_class_stays():
    draw = np.random.default_rng(0)
    points, classes = draw.normal(size=(24, 5)) + 0.3, np.arange(24) % 6
    start = list(range(8))
    for demand in (None, classes):
        chosen = exchange(points @ points.T, start, demand)

        def norm(members: list[int], demand=demand) -> float:
            if demand is not None and len(set(classes[members])) < 6:
                return np.inf
            return float(np.square(points[members].mean(axis=0)).sum())

        assert norm(chosen) < norm(start)
        for place, new in itertools.product(range(8), set(range(24)) - set(chosen)):
            assert norm([*chosen[:place], new, *chosen[place + 1 :]]) >= norm(chosen) - 1e-9


def test_what_is_not_a_number_is_no_improvement():
    gram = np.eye(4)
    gram[3] = gram[:, 3] = np.nan
    assert exchange(gram, [0, 1]) == [0, 1]


def test_images_for_centres_are_those_of_the_least_sum_of_distances():
    distances = np.random.default_rng(0).random((4, 6))
    classes = np.array([0, 0, 1, 1, 2, 2])
    every = list(itertools.permutations(range(6), 4))

    def total(images) -> float:
        return distances[range(4), list(images)].sum()

    found = nearest_images(distances)
    assert sorted(found) == sorted(min(every, key=total))
    assert set(classes[nearest_images(distances, classes)]) == {0, 1, 2}


def test_principal_components_keep_the_distances_of_points_that_have_no_more_dimensions():
    points = np.random.default_rng(0).normal(size=(20, 3)) + 5
    found = principal_components(points @ points.T, 3)
    assert found.shape == (20, 3)
    for i, j in itertools.combinations(range(20), 2):
        assert np.linalg.norm(found[i] - found[j]) == pytest.approx(np.linalg.norm(points[i] - points[j]))


# Scores


def test_scores_of_sets_that_share_images_are_those_of_each_alone(model):
    images = varied_images(20)
    members = torch.zeros(3, 20, dtype=torch.bool)
    members[0, :12] = members[1, 5:] = members[2, 3] = True
    batches = zip(images.split(8), members.split(8, dim=1), strict=True)
    found = statistics_distances(model, batches)
    assert found == pytest.approx([distance(model, images[some]) for some in members], rel=1e-4)


def test_ranges_cost_is_that_of_the_calibrated_network_whatever_was_scored_before():
    config = small_config(**QUICK)
    images, other = varied_images(12).split(8), varied_images(12, seed=3)
    float_network = random_float_model(config)
    scored = quantize_model(float_network, config)
    calibrate_weights(scored)
    reference = float_reference(scored, images)
    ranges_cost(scored, [other * 9], images, reference)
    found = ranges_cost(scored, other.split(8), images, reference)
    calibrated = quantize_model(float_network, config)
    calibrate(calibrated, other, config)
    with torch.no_grad():
        outputs, expected = ([m(batch) for batch in images] for m in (calibrated, float_network))
    assert found.kl == pytest.approx(Reference(expected).compare(outputs).kl, rel=1e-4)


# The script


def write_varied(root: Path, classes: list[str], per_class: int) -> None:
    """JPEGs of different brightness and contrast in an ImageFolder tree."""
    images = (varied_images(len(classes) * per_class) * 40 + 128).clamp(0, 255).byte()
    for number, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        path = root / classes[number // per_class] / f"{number}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).resize((20, 20)).save(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory, model) -> Path:
    folder = tmp_path_factory.mktemp("selection")
    write_varied(folder / "imagenet" / "train", WNIDS, 8)
    torch.save(model.state_dict(), folder / "float.pth")
    write_config(folder, **QUICK)
    return folder


@pytest.fixture
def run(place, monkeypatch, capsys, caplog):
    """Runs the script in the place's folder, on the CPU; returns exit code, logged lines and errors."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(place)

    def call(*arguments: object) -> tuple[int, list[str], str]:
        caplog.clear()
        monkeypatch.setattr(sys, "argv", ["select_calibration.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            run_script(module.main)
        return stopped.value.code, list(caplog.messages), capsys.readouterr().err

    return call


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


@EACH_POOL_STRATEGY
def test_a_set_chosen_by_activations_keeps_the_contract(place, run, strategy, tmp_path):
    def make(seed: int, out: str, *more: object) -> dict:
        options = ["--train", "imagenet/train", "--config", "config0.yaml", "--strategy", strategy]
        code, _, errors = run(*options, "--num", 12, "--seed", seed, "--out", tmp_path / out, *more)
        assert code == 0, errors
        return manifest_of(tmp_path / out)

    first, again, other = make(1, "first"), make(1, "again"), make(2, "other", "--candidates", 20)
    assert first == again
    assert (first["strategy"], first["candidates"], other["candidates"]) == (strategy, 40, 20)
    assert {entry["file"].split("/")[0] for entry in first["files"]} == set(WNIDS)
    assert len(list((tmp_path / "first").rglob("*.JPEG"))) == len(first["files"]) == first["num"] == 12
    few = make(1, "few", "--num", 3, "--no-cover_classes")
    assert len(few["files"]) == 3 and few["classes"] <= 3


def test_the_set_chosen_by_statistics_ranks_first_and_the_manifest_has_its_score(place, run, tmp_path):
    options = ["--train", "imagenet/train", "--num", 10, "--config", "config0.yaml"]
    sets = {name: tmp_path / name for name in ("bn_statistics", "random", "class_balanced")}
    for name, folder in sets.items():
        assert run(*options, "--strategy", name, "--out", folder)[0] == 0
    listed = tmp_path / "flattest.txt"
    files = sorted(
        (place / "imagenet" / "train").rglob("*.JPEG"), key=lambda p: np.asarray(Image.open(p)).std()
    )
    listed.write_text("".join(f"{p.relative_to(place / 'imagenet' / 'train')}\n" for p in files[:10]))
    written = tmp_path / "scores.json"
    code, lines, _ = run("--score", *sets.values(), listed, "--config", "config0.yaml", "--json", written)
    assert code == 0
    ranked = [line.split()[0] for line in lines[-4:]]
    assert ranked[0] == str(sets["bn_statistics"]) and ranked[-1] == str(listed)
    scores = json.loads(written.read_text())["sets"]
    assert [entry["set"] for entry in scores] == ranked
    assert scores == sorted(scores, key=lambda entry: entry["statistics"])
    measured = manifest_of(sets["bn_statistics"])["statistics_distance"]
    assert scores[0]["statistics"] == pytest.approx(measured, rel=1e-4)


def test_a_list_a_folder_and_a_run_agree_on_a_sets_hash_and_both_scores_can_be_had(place, run, tmp_path):
    folder = tmp_path / "set"
    select_calibration(place / "imagenet" / "train", folder, num=6)
    names = [entry["file"] for entry in manifest_of(folder)["files"]]
    (tmp_path / "list.txt").write_text("\n".join(reversed(names)))
    written = tmp_path / "scores.json"
    options = ["--by", "ranges", "statistics", "--reference", "imagenet/train", "--json", written]
    code, lines, _ = run("--score", folder, tmp_path / "list.txt", "--config", "config0.yaml", *options)
    assert code == 0 and lines[-3].split() == ["set", "images", "statistics", "KL", "same", "%", "sha256"]
    one, two = json.loads(written.read_text())["sets"]
    assert one | {"set": ""} == two | {"set": ""}
    config = small_config(data__calibration=str(folder), quant__calibrate=6)
    assert one["sha256"] == load_calibration(config).sha256
    assert one["images"] == 6 and one["ranges"]["kl"] > 0 and 0 <= one["ranges"]["agreement"] <= 100


def test_an_image_that_a_set_links_twice_counts_as_its_copy_would(place, run, tmp_path):
    files = sorted((place / "imagenet" / "train" / WNIDS[0]).iterdir())
    for name, make in (("links", Path.symlink_to), ("copies", lambda path, file: shutil.copy(file, path))):
        (tmp_path / name / WNIDS[0]).mkdir(parents=True)
        for number, file in enumerate([files[0], files[0], files[1]]):
            make(tmp_path / name / WNIDS[0] / f"{number}.JPEG", file)
    written = tmp_path / "scores.json"
    sets = [tmp_path / "links", tmp_path / "copies"]
    assert run("--score", *sets, "--config", "config0.yaml", "--json", written)[0] == 0
    one, two = json.loads(written.read_text())["sets"]
    assert one["sha256"] == two["sha256"] and one["images"] == two["images"] == 3
    assert one["statistics"] == pytest.approx(two["statistics"], rel=1e-6)


@EACH_POOL_STRATEGY
def test_unreadable_candidates_give_way_to_others_of_their_class(place, strategy, tmp_path, caplog):
    train = tmp_path / "train"
    shutil.copytree(place / "imagenet" / "train", train)
    images = sorted((train / WNIDS[0]).iterdir())
    for path in images[:-1]:
        path.write_bytes(b"no image")
    config = small_config(model__path=str(place / "float.pth"))
    reader = PoolReader(config, CPU, 10)
    folder = select_calibration(train, tmp_path / "sel", 8, strategy=strategy, pool_reader=reader)
    files = [entry["file"] for entry in manifest_of(folder)["files"]]
    assert [file for file in files if file.startswith(WNIDS[0])] == [f"{WNIDS[0]}/{images[-1].name}"]
    assert len(files) == 8 and any("replaced by" in message for message in caplog.messages)
    images[-1].write_bytes(b"no image")
    out, everything = tmp_path / "none", PoolReader(config, CPU, 40)
    with pytest.raises(UserError, match=f"no image of class folder {WNIDS[0]} can be read"):
        select_calibration(train, out, 8, strategy=strategy, pool_reader=reader)
    with pytest.raises(UserError, match="--num is 33, but only 32 images of"):
        select_calibration(train, out, 33, strategy=strategy, cover=False, pool_reader=everything)
    assert not out.exists()


def test_activations_that_overflow_are_one_line(place, tmp_path, model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["conv1.weight"] *= 1e38
    torch.save(state, tmp_path / "float.pth")
    reader = PoolReader(small_config(model__path=str(tmp_path / "float.pth")), CPU)
    with pytest.raises(UserError, match="hold NaN or infinity"):
        select_calibration(
            place / "imagenet" / "train", tmp_path / "sel", 8, strategy="clustering", pool_reader=reader
        )


def test_activations_whose_products_overflow_are_one_line(place, run, tmp_path, model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["conv1.weight"] *= 1e12
    torch.save(state, place / "large.pth")
    config = write_config(place, **QUICK, model__path=str(place / "large.pth"))
    options = ["--config", config, "--strategy", "bn_statistics"]
    code, _, errors = run(*TRAIN, *options, "--num", 8, "--out", tmp_path / "sel")
    assert code == 2 and errors.startswith("error: activations of the float network are too large"), errors
    assert errors.count("\n") == 1 and not (tmp_path / "sel").exists()


@EACH_POOL_STRATEGY
def test_the_manifest_names_the_network_that_chose(place, strategy, tmp_path, model):
    def make(weights: str) -> dict:
        reader = PoolReader(small_config(model__path=str(place / weights)), CPU)
        train, out = place / "imagenet" / "train", tmp_path / weights
        return manifest_of(select_calibration(train, out, 8, strategy=strategy, pool_reader=reader))

    torch.save({name: value * 1.01 for name, value in model.state_dict().items()}, place / "other.pth")
    one, two = make("float.pth"), make("other.pth")
    assert one["model"] == two["model"] == small_config().model.type
    loaded = float_model(small_config(model__path=str(place / "float.pth")))
    assert one["float_weights"] == checksum(dict(loaded.state_dict())) != two["float_weights"]


CONFIG = ["--config", "config0.yaml"]
TRAIN = ["--train", "imagenet/train"]
BY_STATISTICS = [*TRAIN, *CONFIG, "--strategy", "bn_statistics"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--train is missing"),
        ([*TRAIN, "--strategy", "clustering"], "--config is missing, --strategy clustering needs it"),
        ([*BY_STATISTICS, "--num", 3], "--num is 3, allowed is at least one image for each of 5 classes"),
        ([*TRAIN, "--num", 0, "--no-cover_classes"], "--num is 0, allowed is an integer of at least 1"),
        ([*BY_STATISTICS, "--num", 9, "--candidates", 8], "--candidates is 8, allowed is"),
        ([*TRAIN, "--config", "absent.yaml", "--num", 8], "config absent.yaml"),
        (["--score", "absent"], "--config is missing, --score needs it"),
        (["--score", "absent", *CONFIG, "--num", "96"], "--num is 96, allowed is none with --score"),
        (["--score", "absent", *CONFIG, "--out", "set"], "--out is set, allowed is none with --score"),
        ([*TRAIN, "--json", "scores.json"], "--json is scores.json, allowed is only with --score"),
        (
            [*TRAIN, "--candidates", 9],
            "--candidates is 9, allowed is only with --strategy bn_statistics or",
        ),
        ([*TRAIN, "--by", "ranges"], "--by is ranges, allowed is only with --score"),
        (["--score", "x" * 300, *CONFIG], "--score: calibration folder xxx"),
        ([*TRAIN, "--num", 8, "--out", f"{'x' * 300}/set"], "/"),
        (["--score", "long.txt", *CONFIG], "--score long.txt: xxx"),
        (["--score", "absent", *CONFIG], "--score: calibration folder absent: No such file"),
        (["--score", "imagenet/train", *CONFIG, "--reference", "x"], "--reference does nothing without"),
        (
            ["--score", "imagenet/train", *CONFIG, "--by", "ranges", "--reference", "x"],
            "--reference: calibration folder x",
        ),
        (["--score", "imagenet/train", *CONFIG, "--json", "."], "--json .: is a folder"),
        (
            ["--score", "imagenet/train", *CONFIG, "--json", "config0.yaml"],
            "--json is config0.yaml, allowed",
        ),
        (["--score", "empty.txt", *CONFIG], "--score empty.txt: cannot be read as a list of images: it is"),
        (["--score", "binary.txt", *CONFIG], "--score binary.txt: cannot be read as a list of images"),
        (["--score", "wrong.txt", *CONFIG], "--score wrong.txt: a/b.JPEG is no file in"),
        (["--score", "twice.txt", *CONFIG], "--score twice.txt: "),
        (["--score", "spoiled", *CONFIG], "image "),
        (["--score", "nothing", *CONFIG], "--score: calibration folder nothing: holds no image"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_is_one_line_and_code_2(place, run, arguments, words):
    name = next((place / "imagenet" / "train").rglob("*.JPEG")).relative_to(place / "imagenet" / "train")
    for file, content in (("empty", b" \n"), ("binary", b"\xff\xd8\xff"), ("wrong", b"a/b.JPEG\n")):
        (place / f"{file}.txt").write_bytes(content)
    (place / "long.txt").write_text("x" * 300)
    (place / "twice.txt").write_text(f"{name}\n{name}\n")
    (place / "nothing").mkdir(exist_ok=True)
    (place / "spoiled").mkdir(exist_ok=True)
    (place / "spoiled" / "1.JPEG").write_bytes(b"no image")
    code, _, errors = run(*arguments)
    assert code == 2 and errors.startswith(f"error: {words}") and errors.count("\n") == 1, errors


def test_a_list_may_begin_with_a_byte_order_mark(place, tmp_path):
    train = place / "imagenet" / "train"
    name = str(next(train.rglob("*.JPEG")).relative_to(train))
    (tmp_path / "list.txt").write_text(f"{name}\n", encoding="utf-8-sig")
    assert find_set(tmp_path / "list.txt", train).names == [name]


@pytest.mark.parametrize("respell", ["./{}", "../train/{}", "{train}/{}", "link"])
def test_a_list_names_no_image_twice_however_it_is_spelled(place, tmp_path, respell):
    train = place / "imagenet" / "train"
    name = next(train.rglob("*.JPEG")).relative_to(train)
    (tmp_path / "link").symlink_to(train / name)
    other = tmp_path / "link" if respell == "link" else respell.format(name, train=train)
    (tmp_path / "list.txt").write_text(f"{name}\n{other}\n")
    with pytest.raises(UserError, match="is listed twice"):
        find_set(tmp_path / "list.txt", train)


def test_a_link_that_loops_is_an_unreadable_image(place, run, tmp_path):
    config = write_config(place, **QUICK, data__skip_unreadable=True)
    shutil.copytree(place / "imagenet" / "train" / WNIDS[0], tmp_path / "set" / WNIDS[0])
    (tmp_path / "set" / WNIDS[0] / "a.JPEG").symlink_to("b.JPEG")
    (tmp_path / "set" / WNIDS[0] / "b.JPEG").symlink_to("a.JPEG")
    code, lines, errors = run("--score", tmp_path / "set", "--config", config)
    assert code == 0, errors
    assert lines[-1].split()[:2] == [str(tmp_path / "set"), "8"]


def test_a_set_of_which_nothing_can_be_read_is_named(place, run):
    config = write_config(place, **QUICK, data__skip_unreadable=True)
    (place / "dark").mkdir()
    (place / "dark" / "1.JPEG").write_bytes(b"no image")
    for by in ("statistics", "ranges"):
        code, _, errors = run("--score", "imagenet/train", "dark", "--config", config, "--by", by)
        assert code == 2 and errors.startswith("error: --score dark: no image of it can be read")


def test_a_config_that_is_not_needed_is_said_to_be(place, run, tmp_path):
    code, lines, _ = run(*TRAIN, *CONFIG, "--num", 5, "--out", tmp_path / "sel")
    assert code == 0 and lines[0] == "--config: not needed, --strategy random runs no network"


def test_random_may_leave_classes_out(place, tmp_path):
    folder = select_calibration(place / "imagenet" / "train", tmp_path / "sel", 3, cover=False)
    assert manifest_of(folder)["classes"] <= 3
    select_calibration(place / "imagenet" / "train", num=3, cover=False)
    assert (place / "imagenet" / "sel_3").is_dir()
