"""The fast path: the losses and the network of the plain one, and a plain word where it cannot run."""

import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._inductor.utils import fresh_cache
from torch.optim.adam import adam

from calibquant.model.quant_layer import layers
from calibquant.solver import fast, learn
from calibquant.solver.caches import staged_batches
from calibquant.solver.checkpoint import load_checkpoint, save_checkpoint
from calibquant.solver.fast import CompiledAdam, FastEngine, choose_engine
from calibquant.solver.learn import Engine, objective
from calibquant.solver.pipeline import recon_settings
from calibquant.solver.recon import reconstruct
from calibquant.solver.resume import RunState
from tests.small import calibrated_model, small_config

IMAGES = torch.randn(13, 3, 16, 16, generator=torch.Generator().manual_seed(3))
CPU = torch.device("cpu")


class ChosenUnits(FastEngine):
    """Compiles only some units, by their place: compiling takes seconds each."""

    def __init__(self, places):
        super().__init__(always=True)
        self.places, self.seen = places, 0

    def objective(self, problem, work, device):
        self.seen += 1
        chosen = super() if self.seen - 1 in self.places else Engine()
        return chosen.objective(problem, work, device)


def run(engine, **changes):
    config = small_config(
        quant__w_qconfig__bit=2, quant__recon__iters=30, quant__recon__weight=1e-3, **changes
    )
    model = calibrated_model(config, IMAGES)
    return model, list(reconstruct(model, IMAGES, recon_settings(config), seed=7, engine=engine))


def assert_same_road(plain, fast_results, tolerance=1e-3):
    for a, b in zip(plain, fast_results, strict=True):
        assert [p.step for p in a.trace] == [p.step for p in b.trace]
        for p, q in zip(a.trace, b.trace, strict=True):
            assert q.reconstruction == pytest.approx(p.reconstruction, rel=tolerance), (a.name, p.step)
            assert q.rounding == pytest.approx(p.rounding, rel=tolerance), (a.name, p.step)
        assert b.error_after == pytest.approx(a.error_after, rel=5e-2), a.name


@pytest.mark.parametrize(
    ("arch", "width", "places", "quantizer", "round_mode"),
    [
        (
            "resnet18",
            -4,
            [0],
            "LSQFakeQuantize",
            "learned_hard_sigmoid",
        ),  # the usual stem, with its pooling
        # the stem, blocks without and with a projection
        ("resnet18", 4, [0, 1, 3], "LSQFakeQuantize", "learned_hard_sigmoid"),
        ("resnet18", 4, [9], "LSQFakeQuantize", "learned_hard_sigmoid"),  # the classifier
        # a bottleneck, learned zero-points
        ("resnet50", 8, [1], "LSQPlusFakeQuantize", "learned_hard_sigmoid"),
        ("resnet18", 4, [3], "LSQFakeQuantize", "straight_through"),
    ],
)
def test_compiled_steps_follow_the_plain_ones_on_every_type_of_unit(
    tmp_path, caplog, arch, width, places, quantizer, round_mode
):
    changes = {
        "model__type": arch,
        "model__kwargs__base_width": abs(width),
        "model__kwargs__small_images": width > 0,
        "quant__a_qconfig__quantizer": quantizer,
        "quant__recon__round_mode": round_mode,
    }
    model, plain = run(Engine(), **changes)
    engine = ChosenUnits(places)
    compiled_model, compiled = run(engine, **changes)
    assert engine.compiles and "uncompiled" not in caplog.text
    assert_same_road(plain[: places[-1] + 1], compiled[: places[-1] + 1])
    pairs = zip(layers(model)[:4], layers(compiled_model)[:4], strict=True)
    same = [a.weight_quantizer.codes == b.weight_quantizer.codes for (_, a), (_, b) in pairs]
    assert float(torch.cat([s.flatten() for s in same]).float().mean()) > 0.995
    config = small_config(quant__w_qconfig__bit=2, **changes)
    path = save_checkpoint(compiled_model, config, {}, tmp_path)
    loaded, _, _ = load_checkpoint(path)
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), compiled_model(IMAGES))


def compiled_adam(groups):
    """As an engine makes it, but that what cannot be compiled is raised."""
    return CompiledAdam(groups, lambda call: call())


def test_compiled_adam_moves_parameters_as_torchs_own_does():
    start = [
        torch.randn(*size, generator=torch.Generator().manual_seed(1)) for size in ((5, 3, 2, 2), (7,))
    ]
    ends = []
    for kind in (torch.optim.Adam, compiled_adam):
        parameters = [torch.nn.Parameter(x.clone()) for x in start]
        rate = torch.tensor(0.1)
        optimizer = kind([{"params": parameters[:1], "lr": 0.02}, {"params": parameters[1:], "lr": rate}])
        for number in range(20):
            optimizer.zero_grad()
            sum((p**2 + 3 * p).sum() for p in parameters).backward()
            rate.fill_(0.1 / (1 + number))
            optimizer.step()
        ends.append(parameters)
    for ours, theirs, before in zip(ends[1], ends[0], start, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4), (ours - theirs).abs().max()
        assert float((ours - before).detach().abs().mean()) > 0.1


def test_adam_moves_parameters_of_more_shapes_than_the_compilers_limit(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    parameters = [torch.nn.Parameter(torch.ones(2, 3 + number)) for number in range(20)]
    optimizer = compiled_adam([{"params": [parameter], "lr": 0.1} for parameter in parameters])
    sum((p**2).sum() for p in parameters).backward()
    optimizer.step()
    assert all(torch.allclose(p, torch.full_like(p, 0.9), atol=1e-5) for p in parameters)


def test_more_shapes_than_are_compiled_for_are_told_not_raised(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(fast, "MOST_GROUPS", 4)
    torch.compiler.reset()  # what other tests have compiled for
    parameters = [torch.nn.Parameter(torch.ones(2, 3 + number)) for number in range(9)]
    optimizer = compiled_adam([{"params": [parameter], "lr": 0.1} for parameter in parameters])
    sum((p**2).sum() for p in parameters).backward()
    assert isinstance(fast.compile_trouble(optimizer.step), str)


def test_where_an_optimizer_cannot_be_compiled_the_step_before_it_is_not_taken_twice(monkeypatch, caplog):
    """Of several processes those that can compile would otherwise wait for this one's second average."""

    def broken(*_):
        raise OSError("disk full")

    def on_a_cpu(*tensors, **options):
        adam(*tensors, **options | {"foreach": False, "capturable": False})

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    monkeypatch.setattr(fast, "adam", on_a_cpu)
    engine, taken = FastEngine(), []
    engine.compiles = True
    parameters = [torch.nn.Parameter(torch.ones(2, 3 + number)) for number in range(2)]
    groups = [{"params": [parameter], "lr": 0.1} for parameter in parameters]
    optimizer = engine.optimizer(groups, torch.device("cuda"))

    def one_step():
        optimizer.zero_grad()
        sum((p**2).sum() for p in parameters).backward()
        taken.append(len(taken))
        optimizer.step()

    step = engine.step(one_step, torch.Generator())
    for number in range(1, 3):
        step()
        assert len(taken) == number
        expected = 1 - 0.1 * number
        assert all(torch.allclose(p, torch.full_like(p, expected), atol=1e-3) for p in parameters)
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [
        "steps run uncompiled, several times slower: disk full"
    ]


def test_units_of_one_kind_share_what_is_compiled(monkeypatch):
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    engine = FastEngine(always=True)
    engine.compiles = True
    _, results = run(engine, model__type="resnet34")
    # the stem, the first and the other blocks of each stage, the last block (at 8 bits), the classifier
    assert len(results) == 18
    assert len(graphs) == 10


def test_a_unit_learned_in_compiled_steps_is_recalled_after_a_kill(tmp_path):
    results = []
    for _ in range(2):
        config = small_config(quant__recon__iters=10)
        model = calibrated_model(config, IMAGES)
        units = reconstruct(
            model,
            IMAGES,
            recon_settings(config),
            seed=7,
            memory=RunState(tmp_path),
            engine=FastEngine(always=True),
        )
        results.append([next(units), model.stem.state_dict()])
    assert results[0][0] == results[1][0]
    assert all(torch.equal(a, results[1][1][name]) for name, a in results[0][1].items())


def test_staged_caches_take_the_same_road_as_resident_ones(monkeypatch):
    _, resident = run(Engine())
    monkeypatch.setattr(learn, "batches_of", staged_batches)
    _, staged = run(Engine())
    assert [r.trace for r in staged] == [r.trace for r in resident]


def test_without_a_compiler_the_plain_path_runs_and_one_line_says_so(monkeypatch, caplog):
    def broken(*_args, **_kwargs):
        raise RuntimeError("No working C++ compiler found\nand a long story")

    monkeypatch.setattr(torch, "compile", broken)
    with caplog.at_level("WARNING", logger="calibquant"):
        _, results = run(choose_engine("always"))
    assert len(results) == 10
    assert [r.getMessage() for r in caplog.records if r.name == "calibquant"] == [
        "steps run uncompiled, several times slower: No working C++ compiler found"
    ]
    assert type(choose_engine("never")) is Engine


def test_what_a_compilation_killed_on_the_way_left_does_no_harm():
    def new_process(code):
        """What it says, in a process that has no compiled code in memory; its cache is from here."""
        command, root = [sys.executable, "-c", f"import torch, logging; {code}"], Path(__file__).parents[1]
        return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stderr

    with fresh_cache():
        new_process("torch.compile(lambda x: x * 2 + 1, fullgraph=True)(torch.ones(32))")
        written = list(Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).rglob("*.so"))
        for path in written:
            path.write_bytes(b"")
        assert written
        said = new_process(
            "from calibquant.solver.fast import why_not_compile; logging.basicConfig(level='INFO');"
            "assert why_not_compile(torch.device('cpu')) is None"
        )
    assert said.count("into an empty cache") == 1


@pytest.mark.parametrize("another_cache", [True, False])
def test_where_compiling_fails_later_steps_go_on_as_written(monkeypatch, caplog, tmp_path, another_cache):
    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if not another_cache:
        monkeypatch.setattr(fast, "fresh_cache", broken)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    engine = FastEngine(always=True)
    engine.compiles = True
    _, plain = run(Engine(), quant__recon__drop_prob=1.0)
    with caplog.at_level("WARNING", logger="calibquant"):
        _, results = run(engine, quant__recon__drop_prob=1.0)
    assert [r.trace for r in results] == [r.trace for r in plain]
    (record,) = [r for r in caplog.records if r.levelname == "WARNING"]  # torch has nothing to add
    assert "steps run uncompiled" in record.getMessage()
    assert "disk full" in record.getMessage()
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith("torchinductor_")]


def test_small_work_is_not_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda *_a, **_k: pytest.fail("compiled"))
    assert FastEngine().objective(object(), fast.WORTH_COMPILING["cpu"] / 2, CPU) is objective


def test_bfloat16_steps_lower_the_error_where_the_machine_has_them(monkeypatch):
    monkeypatch.setattr(learn, "bfloat16_pays", lambda _device: True)
    _, narrow = run(Engine(), quant__recon__precision="bf16")
    _, wide = run(Engine())
    for a, b in zip(narrow, wide, strict=True):
        assert [p.reconstruction for p in a.trace] != [p.reconstruction for p in b.trace]  # it is narrow
        assert a.error_after <= a.error_before
        assert a.error_after == pytest.approx(b.error_after, rel=0.3), a.name


@pytest.mark.parametrize(("has", "pays"), [("amx_bf16", True), ("avx512_bf16", True), ("avx512_f", False)])
def test_bfloat16_is_taken_up_where_a_cpu_has_instructions_for_it(monkeypatch, has, pays):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {has: True})
    assert learn.bfloat16_pays(CPU) is pays


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("keep_gpu", [True, False])
def test_captured_steps_follow_the_plain_ones(keep_gpu):
    changes = {"quant__recon__precision": "fp32", "quant__recon__keep_gpu": keep_gpu}
    results = []
    for engine in (Engine(), FastEngine(always=True)):
        config = small_config(quant__w_qconfig__bit=2, quant__recon__iters=60, **changes)
        model = calibrated_model(config, IMAGES).cuda()
        results.append(list(reconstruct(model, IMAGES, recon_settings(config), seed=7, engine=engine)))
    plain, captured = results
    assert_same_road(plain[:7], captured[:7], tolerance=1e-2)
    assert_same_road(plain[7:], captured[7:], tolerance=3e-2)  # what comes in has drifted apart by then
