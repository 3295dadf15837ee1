"""What each unit costs, as a table and as a picture."""

from pathlib import Path

from calibquant.solver.files import write_picture
from calibquant.solver.probe import Bits, Cost, Measurement


def ranking(measurements: list[Measurement]) -> list[str]:
    """Names of units, the costliest at the first of the tried bits first."""
    first = [m for m in measurements if m.bits == measurements[0].bits]
    return [m.unit for m in sorted(first, key=lambda m: -m.cost.kl)]


def table(ranked: list[str], measurements: list[Measurement], uniform: dict[Bits, Cost]) -> list[str]:
    """Lines of the table: a row per unit, then the sum of units and what all cost at once.

    Args:
        uniform: what the whole network costs with every unit at the same bits.
    """
    found = {(m.unit, m.bits): m for m in measurements}
    labelled = any(cost.top1 is not None for cost in uniform.values())
    titles = ["KL", "same %", *(["top-1 %"] if labelled else [])]
    width = max(len(name) for name in [*ranked, "all at once"])

    def line(name: str, weights: str, groups: list[list[str]]) -> str:
        cells = ["  " + "".join(f"{cell:>9}" for cell in group) for group in groups]
        return f"{name:{width}}{weights:>12}{''.join(cells)}".rstrip()

    lines = [
        line("", "", [[str(bits), *("" for _ in titles[1:])] for bits in uniform]),
        line("unit", "weights", [titles for _ in uniform]),
    ]
    for name in ranked:
        costs = [_cells(found[name, bits].cost) for bits in uniform]
        lines.append(line(name, f"{found[name, measurements[0].bits].weights:,}", costs))
    sums = [sum(m.cost.kl for m in measurements if m.bits == bits) for bits in uniform]
    lines.append(line("sum", "", [[f"{kl:.5f}", *("" for _ in titles[1:])] for kl in sums]))
    lines.append(line("all at once", "", [_cells(cost) for cost in uniform.values()]))
    return lines


def _cells(cost: Cost) -> list[str]:
    top1 = [] if cost.top1 is None else [f"{cost.top1:.2f}"]
    return [f"{cost.kl:.5f}", f"{cost.agreement:.2f}", *top1]


def plot_sensitivity(path: Path, ranked: list[str], measurements: list[Measurement], title: str) -> None:
    """Write a PNG or SVG, as the path's suffix says: KL and agreement of each unit, the first on top.

    Raises:
        UserError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.6 + 0.24 * len(ranked)), layout="constrained")
    divergence, agreement = figure.subplots(1, 2, sharey=True)
    rows = {name: -place for place, name in enumerate(ranked)}
    for bits in dict.fromkeys(m.bits for m in measurements):
        of_bits = [m for m in measurements if m.bits == bits]
        heights = [rows[m.unit] for m in of_bits]
        divergence.plot([m.cost.kl for m in of_bits], heights, "o", label=str(bits))
        agreement.plot([m.cost.agreement for m in of_bits], heights, "o", label=str(bits))
    if any(m.cost.kl > 0 for m in measurements):
        divergence.set_xscale("log")  # a unit with nothing to quantize costs 0 and has no dot
    divergence.set_yticks(list(rows.values()), list(rows))
    divergence.set_xlabel("KL(float || quantized), nats")
    agreement.set_xlabel("same class as float, %")
    for axes in (divergence, agreement):
        axes.grid(alpha=0.3)
    agreement.legend()
    figure.suptitle(title)
    write_picture(path, figure)
