"""The loops over a weight's columns in Triton give what those in torch give."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from calibquant.quantization import columns
from calibquant.quantization.columns import BLOCK, WRITTEN, Limits, Loops, loops_for, require_same
from tests.pretend_gpu import CPU, GPU, pretended_gpu

ROOT = Path(__file__).resolve().parents[1]
SHAPES = [(1, 6, 40, True), (2, 5, 16, True), (1, 1, 1, False), (1, 1, BLOCK, False)]
"""Groups, rows and columns, and whether each row has limits of its own."""
KERNELS = {
    "_round_columns": ("block", "share", "errors"),
    "_descend_columns": ("steps", "left", "slope", "second"),
}
POINTERS = ("scale", "low", "high")


def problem(groups: int, rows: int, width: int, per_channel: bool) -> tuple[Tensor, Tensor, Limits]:
    """A wide weight, its inputs' second moments, and limits of 2 bits with a zero-point of its own."""
    generator = torch.Generator().manual_seed(groups + rows + width)
    weight = torch.randn(groups, rows, width + 7, generator=generator)
    inputs = torch.randn(groups, 3 * width, width, generator=generator)
    shape = (groups, rows, 1) if per_channel else (1,)
    scale = 0.2 + 0.5 * torch.rand(shape, generator=generator)
    low = -torch.randint(0, 4, shape, generator=generator).float()
    return weight, inputs.mT @ inputs / len(inputs[0]) + 0.1 * torch.eye(width), Limits(scale, low, low + 3)


def compare(groups: int, rows: int, width: int, per_channel: bool) -> None:
    from calibquant.quantization import columns_triton

    weight, second, limits = problem(groups, rows, width, per_channel)
    share = torch.linalg.cholesky(second).mT
    part = slice(3, 3 + width)  # others must stay as they are
    results = []
    for loops in (WRITTEN, Loops(columns_triton.round_columns, columns_triton.descend_columns)):
        rounded, left, steps = weight.clone(), weight.clone(), torch.zeros_like(weight)
        errors = loops.round_columns(rounded[:, :, part], share, limits)
        slope = left[:, :, part] @ second
        loops.descend_columns(steps[:, :, part], left[:, :, part], slope, second, limits)
        results.append((rounded, errors, steps, left))
    for expected, found in zip(*results, strict=True):
        assert torch.allclose(found, expected, atol=1e-5), (groups, rows, width, per_channel)
    assert torch.equal(steps, steps.round()) and steps.any()


def test_kernels_give_what_the_loops_give():
    """In a process of its own: what Triton makes of kernels is settled when it is imported."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.test_columns"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_compile_for_gpus(kernel, capability):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from calibquant.quantization import columns_triton

    function = getattr(columns_triton, kernel)
    fixed = {"columns": BLOCK, "rows_each": columns_triton.ROWS, "width": BLOCK}
    signature = dict.fromkeys(function.arg_names, "i32") | dict.fromkeys(fixed, "constexpr")
    signature |= dict.fromkeys((*KERNELS[kernel], *POINTERS), "*fp32")
    source = ASTSource(fn=function, signature=signature, constexprs=fixed)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert compiled.asm["cubin"]


def test_loops_are_as_written_where_there_is_no_gpu():
    assert loops_for(CPU) is WRITTEN


@pytest.mark.parametrize("wrong", [False, True])
def test_kernels_that_do_not_work_are_told_and_left(monkeypatch, caplog, wrong):
    pytest.importorskip("triton")
    if wrong:
        from calibquant.quantization import columns_triton

        monkeypatch.setattr(columns_triton, "round_columns", lambda block, share, limits: block + 1)
        monkeypatch.setattr(columns_triton, "descend_columns", columns.descend_columns)
    elif torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pretended_gpu():
        assert loops_for(GPU) is WRITTEN
    (record,) = caplog.records
    assert record.getMessage().startswith("compensation goes column by column, several times slower: ")
    assert ("ArithmeticError" in record.getMessage()) is wrong


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_kernels_are_what_is_used():
    assert loops_for(torch.device("cuda", 0)) is not WRITTEN


if __name__ == "__main__":
    for shape in SHAPES:
        compare(*shape)
    from calibquant.quantization import columns_triton as interpreted

    require_same(Loops(interpreted.round_columns, interpreted.descend_columns), CPU)
