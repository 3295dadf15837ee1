"""Cached activations: what a run takes, the place chosen for them, and that the place does not matter."""

import gc
import os
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from calibquant.errors import UserError
from calibquant.model.quant_layer import layers
from calibquant.quantization.rounding import StraightThroughRounding
from calibquant.solver import cache_plan, recon
from calibquant.solver.cache_plan import NUMBERS_OF_A_WEIGHT, Need, Room, choose_store, estimate, room
from calibquant.solver.caches import FileStore, Store, UnitData, batches_of, run_batched, staged_batches
from calibquant.solver.compensate import Given, compensate_layer, layer_sums
from calibquant.solver.fast import FastEngine
from calibquant.solver.files import remove_temporaries
from calibquant.solver.learn import Engine
from calibquant.solver.memory import return_freed_memory
from calibquant.solver.pipeline import recon_settings
from calibquant.solver.recon import reconstruct, store_for
from tests.peak import growth
from tests.small import calibrated_model, small_config

IMAGES = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(3))
CPU, GPU = torch.device("cpu"), torch.device("cuda")
MIB, GIB = 2**20, 2**30


class CountingStore(Store):
    """Knows how many of its tensors are alive, and how many bytes of them were at most."""

    alive = peak = tensors = 0

    def _allocate(self, count, dtype):
        tensor = super()._allocate(count, dtype)
        size = count * dtype.itemsize
        weakref.finalize(tensor.untyped_storage(), self._free, size)
        self.alive += size
        self.tensors += 1
        self.peak = max(self.peak, self.alive)
        return tensor

    def _free(self, size):
        self.alive -= size
        self.tensors -= 1


@pytest.mark.parametrize("granularity", ["block", "layer"])
@pytest.mark.parametrize("cache", ["fp16", "fp32"])
def test_the_estimate_is_what_a_run_takes(granularity, cache):
    config = small_config(quant__recon__granularity=granularity, quant__recon__cache=cache)
    model, settings = calibrated_model(config, IMAGES), recon_settings(config)
    need = estimate(model, IMAGES[:1], len(IMAGES), settings)
    store = CountingStore(CPU, {"fp16": torch.float16, "fp32": torch.float32}[cache])
    list(reconstruct(model, IMAGES, settings, 7, store=store))
    images = IMAGES.numel() * 4
    assert store.peak <= need.caches <= store.peak + images


@pytest.mark.parametrize("engine", [Engine(), FastEngine(always=True)])
def test_what_a_finished_unit_had_is_freed_at_once(engine, monkeypatch):
    """Also what compiled code holds in reference cycles, which may stay until Python happens to look."""
    config = small_config(quant__recon__views=2)
    model, settings = calibrated_model(config, IMAGES), recon_settings(config)
    store, freed = CountingStore(CPU, torch.float16), []

    def watched(name):
        made = getattr(recon, name)

        def make(*given):
            images = made(*given)
            weakref.finalize(images.untyped_storage(), freed.append, name)
            return images

        return make

    for name in ("arrange", "channels_last"):  # the images, then the same as units read them
        monkeypatch.setattr(recon, name, watched(name))
    units = reconstruct(model, IMAGES, settings, 7, store=store, engine=engine)
    gc.disable()
    try:
        for _, result in zip(range(3), units, strict=False):
            assert store.tensors == 2, result.name  # its output in the quantized and in the float network
            assert freed == ["arrange", "channels_last"]
    finally:
        gc.enable()


def small_model(**changes):
    config = small_config(**changes)
    return calibrated_model(config, IMAGES), recon_settings(config)


def test_a_file_store_gives_the_same_network_and_leaves_no_file(tmp_path):
    networks = []
    for store in (Store(CPU, torch.float16), FileStore(torch.float16, tmp_path)):
        model, settings = small_model(quant__recon__iters=20)
        list(reconstruct(model, IMAGES, settings, 7, store=store))
        networks.append(model.state_dict())
        assert list(tmp_path.iterdir()) == []
    assert all(torch.equal(a, networks[1][name]) for name, a in networks[0].items())


@pytest.mark.parametrize(
    ("host", "disk", "kind"), [(10 * GIB, 0, Store), (0.02 * GIB, 10 * GIB, FileStore), (0, 10 * GIB, None)]
)
def test_too_little_memory_leads_to_files_and_then_to_one_clear_line(tmp_path, host, disk, kind):
    model, settings = small_model()

    def free(_device, _folder):
        little = int(need.step + 2 * 4 * many[0].numel() * len(many)) * 1.2
        return Room(device=host, host=little if kind is FileStore else host, disk=disk)

    many = IMAGES[:1].expand(100_000, 3, 16, 16)
    need = estimate(model, many[:1], len(many), settings)
    if kind is Store:
        many = IMAGES
    if kind is None:
        with pytest.raises(UserError, match=r"quant\.recon\.batch_size 8 needs about"):
            choose_store(model, many, settings, tmp_path, free=free)
    else:
        assert type(choose_store(model, many, settings, tmp_path, free=free)) is kind


def test_files_do_not_help_where_the_images_themselves_do_not_fit(tmp_path):
    model, settings = small_model()
    many = IMAGES[:1].expand(1_000_000, 3, 16, 16)  # 3 GB
    with pytest.raises(UserError, match="1000000 images"):
        choose_store(model, many, settings, tmp_path, free=lambda *_: Room(GIB, GIB, 1000 * GIB))


def test_no_room_anywhere_is_one_line_that_names_the_key(tmp_path):
    model, settings = small_model()
    many = IMAGES[:1].expand(1_000_000, 3, 16, 16)
    with pytest.raises(UserError, match=r"1000000 images \(quant\.calibrate x .* lower one of these"):
        choose_store(model, many, settings, tmp_path, free=lambda *_: Room(GIB, GIB, GIB))


def test_what_is_free_is_asked_of_the_machine(tmp_path):
    free = room(CPU, tmp_path)
    assert 2**20 < free.host < 2**50 and free.device == free.host and free.disk > 0


def test_what_torch_keeps_of_freed_gpu_memory_is_free(tmp_path, monkeypatch):
    kept = [3 * GIB]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", kept.clear)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (5 * GIB - sum(kept), 8 * GIB))
    assert room(GPU, tmp_path).device == 2 * GIB
    return_freed_memory()
    assert room(GPU, tmp_path).device == 5 * GIB


@pytest.mark.parametrize(
    ("folder", "limit", "used", "prefix"),
    [(".", "max", "current", ""), ("memory", "limit_in_bytes", "usage_in_bytes", "total_")],
    ids=["cgroup v2", "cgroup v1"],
)
@pytest.mark.parametrize("nested", ["/", "/job/step"])
def test_files_that_a_container_has_read_leave_its_memory_free(
    folder, limit, used, prefix, nested, tmp_path, monkeypatch
):
    """Also where the group is one of a job's own inside the system's, as batch systems make them."""
    controllers = "" if folder == "." else "cpu,memory"
    groups = tmp_path / "groups"
    groups.write_text(f"13:pids:/other\n0:{controllers}:{nested}\n")
    monkeypatch.setattr(cache_plan, "CGROUP", tmp_path)
    monkeypatch.setattr(cache_plan, "GROUPS_OF_THIS_PROCESS", groups)
    group = tmp_path / folder / nested.strip("/")
    group.mkdir(parents=True, exist_ok=True)
    (tmp_path / folder / f"memory.{limit}").write_text("max\n")
    (group / f"memory.{limit}").write_text(f"{20 * MIB}\n")
    (group / f"memory.{used}").write_text(f"{19 * MIB}\n")
    assert room(CPU, tmp_path).host == MIB
    for inactive, free in ((10, 16), (30, 20)):  # never more than the limit
        lines = f"anon 7\n{prefix}inactive_file {inactive * MIB}\n{prefix}active_file {5 * MIB}\n"
        (group / "memory.stat").write_text(lines)
        assert room(CPU, tmp_path).host == free * MIB


NEED = Need(10 * GIB, 4 * GIB, 2 * GIB, 5 * GIB, 3 * GIB)


def chosen(device, room, folder, monkeypatch, need=NEED, **changes):
    """The store for a network on a device that need not be there: caches 10, compensation 5, a step 3."""
    settings = recon_settings(small_config(**changes))
    monkeypatch.setattr(cache_plan, "estimate", lambda *_: need)
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *_: x)
    model = SimpleNamespace(buffers=lambda: iter([SimpleNamespace(device=device)]))
    return choose_store(model, IMAGES, settings, folder, free=lambda *_: room)


@pytest.mark.parametrize(
    ("device", "room", "where"),
    [
        ("cuda", (17, 0, 0), "cuda"),  # 10 + 5: compensation is over when the first step begins
        ("cuda", (16, 16, 0), "cpu"),
        ("cuda", (4, 16, 0), "cpu"),  # a step and moments on the GPU, all else in host memory
        ("cuda", (4, 15, 12), "files"),
        ("cuda", (4, 4, 12), None),  # compensation's rows are in host memory also then
        ("cpu", (17, 17, 0), "cpu"),
        ("cpu", (16, 16, 12), "files"),
    ],
)
def test_a_step_s_memory_is_what_compensation_had_before(device, room, where, tmp_path, monkeypatch):
    room = Room(*(size * GIB for size in room))
    if where is None:
        with pytest.raises(UserError, match=r"need about 4\.0 GiB of host memory"):
            chosen(torch.device(device), room, tmp_path, monkeypatch)
        return
    store = chosen(torch.device(device), room, tmp_path, monkeypatch)
    assert isinstance(store, FileStore) == (where == "files")
    assert store.device.type == ("cpu" if where == "files" else where)


def test_compensation_s_rows_are_estimated_apart_from_the_caches():
    needs = []
    for compensate in (False, True):
        model, settings = small_model(quant__recon__compensate=compensate)
        needs.append(estimate(model, IMAGES[:1], len(IMAGES), settings))
    without, with_them = needs
    assert (with_them.caches, with_them.step) == (without.caches, without.step)
    assert (without.rows, without.moments, without.compensation) == (0, 0, 0)
    assert 0 < max(with_them.rows, with_them.moments) <= with_them.compensation


def test_the_moments_of_a_layer_s_inputs_take_no_more_than_was_estimated():
    """They grow with the square of a layer's fan-in, whatever the images; here 1,152.

    That is enough for a few MiB more to be none of them, which libraries take when they are first used.
    """
    config = {
        "model__kwargs": {"num_classes": 10, "small_images": True, "base_width": 16},
        "quant__recon__compensate": True,
    }
    model, settings = small_model(**config)
    (layer,) = [layer for name, layer in layers(model) if name == "blocks.7.join.last"]
    x = torch.rand(32, 128, 4, 4, generator=torch.Generator().manual_seed(1))
    given = [Given(part, part + 0.01, held_out) for part, held_out in ((x[:24], False), (x[24:], True))]
    taken = growth()
    with torch.no_grad():
        sums = layer_sums(layer, given, 16 * 1152 / 32, 0.5, torch.Generator().manual_seed(2))
        compensate_layer(layer, *sums, StraightThroughRounding)
    # memory that the process already had and freed does not count: it may be less
    assert 1024 * taken() < estimate(model, IMAGES[:1], len(IMAGES), settings).moments


def test_moments_that_a_gpu_has_no_room_for_are_told_before_the_run(tmp_path, monkeypatch):
    need = Need(GIB, GIB, 6 * GIB, 7 * GIB, GIB)
    with pytest.raises(UserError, match=r"compensate needs about 6\.0 GiB .* 5\.0 GiB are free on cuda"):
        chosen(GPU, Room(5 * GIB, 50 * GIB, 0), tmp_path, monkeypatch, need)


@pytest.mark.parametrize("after", [[], ["layer4.1"]])
def test_a_step_s_memory_includes_what_it_learns(after):
    """Of all units up to the one after which they learn on; else of the largest, here the classifier."""
    steps = []
    for batch_size in (1, 2):
        changes = {"quant__recon__batch_size": batch_size, "quant__distil__after": after}
        model, settings = small_model(**changes)
        steps.append(estimate(model, IMAGES[:1], len(IMAGES), settings).step)
    ours = layers(nn.ModuleList([model.stem, *model.blocks]) if after else model.classifier)
    learned = sum(layer.weight.numel() for _, layer in ours)
    assert 2 * steps[0] - steps[1] == 4 * NUMBERS_OF_A_WEIGHT * learned


def test_what_a_kill_leaves_of_a_file_for_activations_is_cleared_up(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: seen.extend(tmp_path.iterdir()))
    FileStore(torch.float32, tmp_path).empty((MIB,), torch.float32)
    (left,) = seen
    left.touch()  # as it is where a kill comes in between
    remove_temporaries(tmp_path)
    assert not left.exists()


def test_a_file_for_activations_has_its_place_on_the_disk_before_it_is_written(tmp_path, monkeypatch):
    """A disk that is full only when the mapping is written would end the process by a signal."""
    seen = []

    def look(name, **_):
        seen.append(Path(name).stat().st_blocks * 512)
        return torch.zeros(MIB)

    monkeypatch.setattr(torch, "from_file", look)
    FileStore(torch.float32, tmp_path).empty((MIB,), torch.float32)
    assert seen[0] >= 4 * MIB


def test_caches_for_a_gpu_are_plain_host_memory(tmp_path, monkeypatch):
    """Page-locked they would take up to twice what was estimated, and no copy would be faster."""
    settings = recon_settings(small_config(quant__recon__keep_gpu=False))
    named = store_for(settings, GPU)
    found = chosen(GPU, Room(8 * GIB, 20 * GIB, 0), tmp_path, monkeypatch, quant__recon__keep_gpu=False)
    assert [(store.device, store.pinned) for store in (named, found)] == [(CPU, False)] * 2


class Copies(TorchDispatchMode):
    """Between which devices and types tensors are copied."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if operation in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[1] if operation is torch.ops.aten.copy_.default else args[0]
            self.seen.append((source.device.type, source.dtype, result.device.type, result.dtype))
        return result


def test_what_goes_to_a_device_is_converted_there_and_what_comes_back_before():
    x = torch.rand(10, 4, 3, 3).half()
    with Copies() as there:  # the device that only knows shapes
        run_batched(lambda t: t, [x], 4, torch.device("meta"), Store(torch.device("meta"), torch.float32))
    assert there.seen[:2] == [
        ("cpu", torch.float16, "meta", torch.float16),
        ("meta", torch.float16, "meta", torch.float32),
    ]
    with Copies() as back:
        result = run_batched(lambda t: t / 3, [x], 10, CPU, Store(CPU, torch.float16))
    assert back.seen[-1] == ("cpu", torch.float16, "cpu", torch.float16)
    assert torch.equal(result, (x.float() / 3).half())


def test_values_beyond_float16_are_kept_in_float32():
    x = torch.rand(10, 4, 3, 3)
    store = Store(CPU, torch.float16)
    modest = run_batched(lambda t: t * 100, [x], 4, CPU, store)
    assert modest.dtype == torch.float16
    x[9] = 1000
    large = run_batched(lambda t: t * 100, [x], 4, CPU, store)
    assert large.dtype == torch.float32
    torch.testing.assert_close(large, x * 100, atol=0.1, rtol=1e-3)


@pytest.mark.parametrize("shared", [False, True])
def test_staged_batches_hold_the_rows_of_each_step(shared):
    x, y, target = (torch.randn(20, 2, 4, 4) for _ in range(3))
    data = UnitData([x], [x if shared else y], target)
    order = torch.randint(0, 20, (7, 5))
    plain, counter = batches_of(data, order, CPU), torch.zeros(1, dtype=torch.int64)
    with staged_batches(data, order, CPU) as staged:
        assert (staged.quantized[0] is staged.full[0]) == shared
        for step in range(7):
            staged.stage(step)
            rows, wanted = staged.rows(counter), plain.rows(counter)
            assert torch.equal(staged.quantized[0][rows], x[wanted])
            assert torch.equal(staged.full[0][rows], (x if shared else y)[wanted])
            assert torch.equal(staged.target[rows], target[wanted])
            counter += 1
