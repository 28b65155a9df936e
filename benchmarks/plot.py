"""Figures and tables of the README, from the results files.

    python benchmarks/plot.py               draws docs/attention.svg and the losses' figures
    python benchmarks/plot.py --markdown    prints the tables instead

Of each case the latest run counts that compares jaxkern with another provider, so all of its bars
were measured together.
"""

from __future__ import annotations

import argparse
import csv
import functools
import math
import pathlib
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attention
import rms_norm

from jaxkern import benchmarking

ROOT = pathlib.Path(__file__).parents[1]
FILE = ROOT / "benchmarks" / "results" / "nvidia-h200.csv"

# Legible on white and on a dark page alike.
INK = "#7d8590"
COLORS = {
    "jaxkern": "#e8590c",
    "jax.nn cudnn": "#3b82c4",
    "torch cudnn": "#76a9d8",
    "torch flash2": "#5a9e6f",
    "jax.nn xla": "#9a9fa6",
    "jaxkern xla": "#c4a35a",
    "jaxkern fp8-row": "#3b82c4",
    "jaxkern fp8-block": "#5a9e6f",
    "jaxkern fp8-tensor": "#9b6fc4",
}
LOSSES = ("train_loss", "fp8_loss")  # what train.py --losses leaves
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "jaxkern",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}

Figures = Mapping[str, Mapping[str, float]]  # case -> provider -> value


def latest(
    rows: Iterable[benchmarking.Row], family: str, metric: str, subject: str = "jaxkern"
) -> Figures:
    """The figures of each case from the last run with the subject and another provider."""
    runs: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in rows:
        if (row.family, row.metric) == (family, metric):
            runs.setdefault((row.case, row.date, row.commit), {})[row.provider] = row.value
    figures: dict[str, dict[str, float]] = {}
    dates: dict[str, str] = {}
    for (case, date, _), values in runs.items():
        if subject in values and len(values) > 1 and date >= dates.get(case, ""):
            dates[case], figures[case] = date, values
    return figures


def attention_figures(figures: Figures, masked: bool) -> Figures:
    """Those with a window or documents, or those without."""
    return {c: v for c, v in figures.items() if attention.Shape.parse(c)[1].masked == masked}


def conditions(rows: Iterable[benchmarking.Row], family: str) -> str:
    """GPU, commit and versions of the last run of a family, for below a figure."""
    row = max((r for r in rows if r.family == family), key=lambda r: r.date)
    return f"{row.gpu}, {row.versions}, commit {row.commit}, {row.date[:10]}"


def _length(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def attention_label(shape: attention.Shape) -> str:
    heads = f"{shape.heads}/{shape.kv_heads}" if shape.heads != shape.kv_heads else shape.heads
    return f"{_length(shape.query_length)}\nB{shape.batch} N{heads}\nH{shape.head_dim}"


def draw_attention(figures: Figures, note: str, path: pathlib.Path) -> None:
    """Bars of TFLOP/s by provider: one panel for each direction and mask."""
    from matplotlib import pyplot

    parsed = {case: attention.Shape.parse(case) for case in figures}
    providers = [name for name in COLORS if any(name in values for values in figures.values())]
    with pyplot.rc_context(STYLE):
        figure, panels = pyplot.subplots(2, 2, figsize=(13, 7), sharey="row")
        for line, direction in zip(panels, ("fwd", "bwd"), strict=True):
            for panel, causal in zip(line, (False, True), strict=True):
                cases = [c for c, (d, s) in parsed.items() if (d, s.causal) == (direction, causal)]
                cases.sort(key=lambda case: _order(attention.SHAPES, parsed[case][1]))
                labels = [attention_label(parsed[case][1]) for case in cases]
                _bars(panel, labels, [figures[case] for case in cases], providers)
                name = {"fwd": "Forward", "bwd": "Backward"}[direction]
                panel.set_title(f"{name}, {'causal' if causal else 'no mask'}")
            line[0].set_ylabel("TFLOP/s")
        handles, names = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, names, loc="upper center", ncols=len(names))
        figure.text(0.5, 0.005, note, ha="center", fontsize=7)
        figure.tight_layout(rect=(0, 0.02, 1, 0.955))
        _save(figure, path)


def _bars(panel: Any, labels: Sequence[str], groups: Sequence, providers: Sequence[str]) -> None:
    width = 0.82 / max(1, len(providers))
    for i, name in enumerate(providers):
        at = [g + (i - (len(providers) - 1) / 2) * width for g in range(len(groups))]
        heights = [values.get(name, 0) for values in groups]
        panel.bar(at, heights, width * 0.92, label=name, color=COLORS[name])
    panel.set_xticks(range(len(labels)), labels, fontsize=7)
    panel.tick_params(length=0)
    panel.spines["left"].set_visible(False)
    panel.grid(axis="y")


Losses = Mapping[tuple[str, int, int], Mapping[int, float]]  # provider, seed, run -> step -> loss


def read_losses(source: pathlib.Path, column: str) -> Losses:
    """The runs of a CSV of provider, seed, run, step, train, held_out."""
    runs: dict[tuple[str, int, int], dict[int, float]] = {}
    with source.open(newline="") as file:
        for row in csv.DictReader(file):
            if row[column]:
                key = (row["provider"], int(row["seed"]), int(row["run"]))
                runs.setdefault(key, {})[int(row["step"])] = float(row[column])
    return runs


def drift(losses: Losses, window: int = 10) -> Losses:
    """Each run's distance from the mean of the runs of its seed, which see the same batches.

    Averaged over the last `window` steps.
    """
    runs: dict[tuple[str, int, int], dict[int, float]] = {}
    for key, points in losses.items():
        same = [other for (_, seed, _), other in losses.items() if seed == key[1]]
        steps = sorted(set(points).intersection(*same))
        distance = [points[s] - statistics.fmean(other[s] for other in same) for s in steps]
        runs[key] = {
            steps[i]: statistics.fmean(distance[i - window + 1 : i + 1])
            for i in range(window - 1, len(steps))
        }
    return runs


def thinned(points: Mapping[int, float], most: int = 400) -> Mapping[int, float]:
    """At most so many points: means over equally many steps, each at the last of them."""
    steps = sorted(points)
    size = -(-len(steps) // most)
    groups = (steps[i : i + size] for i in range(0, len(steps), size or 1))
    return {group[-1]: statistics.fmean(points[step] for step in group) for group in groups}


def draw_losses(source: pathlib.Path, path: pathlib.Path) -> None:
    """Training and held-out loss of each run, and how far the runs of a seed drift apart."""
    from matplotlib import pyplot

    train, held_out = (read_losses(source, column) for column in ("train", "held_out"))
    with pyplot.rc_context(STYLE):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
        for axes, runs in ((left, train), (right, drift(train))):
            for (name, seed, _), points in runs.items():
                style = {
                    "color": COLORS.get(name, INK),
                    "linewidth": 0.9,
                    "linestyle": ["-", "--"][seed % 2],
                }
                axes.plot(*zip(*thinned(points).items(), strict=True), **style)
        for name in dict.fromkeys(name for name, _, _ in train):
            left.plot([], [], color=COLORS.get(name, INK), label=name)
        for (name, _, _), points in held_out.items():
            left.plot(
                *zip(*points.items(), strict=True), "o", color=COLORS.get(name, INK), markersize=4
            )
        left.set(xlabel="step", ylabel="loss (nats/byte); dots: held out")
        right.set(xlabel="step", ylabel="distance from the mean run of the seed, 10 steps' mean")
        for axes in (left, right):
            axes.grid()
        left.legend()
        _save(figure, path)


def _save(figure: Any, path: pathlib.Path) -> None:
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, transparent=True, metadata={"Date": None})
    pyplot.close(figure)


def _order(shapes: Sequence, shape: Any) -> int:
    """The place of a shape in the family's own list, the last for one that is not there."""
    return shapes.index(shape) if shape in shapes else len(shapes)


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines))


def attention_table(figures: Figures) -> str:
    """Forward / backward TFLOP/s by provider, and jaxkern's over those of jax.nn's cuDNN."""
    known = (*COLORS, *attention.OWN_PROVIDERS)
    shapes: dict[attention.Shape, dict[str, Mapping[str, float]]] = {}
    for case, values in figures.items():
        direction, shape = attention.Shape.parse(case)
        shapes.setdefault(shape, {})[direction] = values
    providers = [name for name in known if any(name in values for values in figures.values())]
    lines, ratios = [], {"fwd": [], "bwd": []}
    for shape in sorted(shapes, key=lambda s: _order(attention.SHAPES + attention.MASKED, s)):
        both = [shapes[shape].get(direction, {}) for direction in ratios]
        for direction, values in zip(ratios, both, strict=True):
            if {"jaxkern", "jax.nn cudnn"} <= values.keys():
                ratios[direction].append(values["jaxkern"] / values["jax.nn cudnn"])
        cells = [" / ".join(_whole(values.get(name)) for values in both) for name in providers]
        quotients = [_quotient(v.get("jaxkern"), v.get("jax.nn cudnn")) for v in both]
        name = shape.case("")[1:].replace(" causal", "")
        lines.append([name, "yes" if shape.causal else "no", *cells, " / ".join(quotients)])
    means = [f"{_geometric_mean(r):.2f}" if r else "-" for r in ratios.values()]
    lines.append(["geometric mean", "", *[""] * len(providers), " / ".join(means)])
    return markdown_table(
        ["TFLOP/s, forward / backward", "causal", *providers, "jaxkern / jax.nn cudnn"], lines
    )


def rms_norm_table(figures: Figures) -> str:
    """GB/s by provider."""
    cases = sorted(figures, key=lambda c: _order(rms_norm.SHAPES, rms_norm.Shape.parse(c)[1]))
    lines = [
        [case, *(_whole(figures[case].get(name)) for name in rms_norm.PROVIDERS)] for case in cases
    ]
    return markdown_table(["case", *rms_norm.PROVIDERS], lines)


def train_table(figures: Figures) -> str:
    """Tokens per second by provider."""
    providers = [name for name in COLORS if any(name in values for values in figures.values())]
    lines = [
        [case, *(f"{values[name]:,.0f}" if name in values else "-" for name in providers)]
        for case, values in figures.items()
    ]
    return markdown_table(["tokens/s", *providers], lines)


def rates_table(figures: Figures, unit: str) -> str:
    """A unit's figures by provider, in the order in which they were measured."""
    providers = list(dict.fromkeys(name for values in figures.values() for name in values))
    lines = [
        [case, *(_whole(values.get(name)) for name in providers)]
        for case, values in figures.items()
    ]
    return markdown_table([unit, *providers], lines)


def of_fp8(rows: Iterable[benchmarking.Row], *, wanted: bool) -> list[benchmarking.Row]:
    """The rows of runs that have an FP8 provider, or of those that have none."""
    rows = list(rows)
    runs = {(row.date, row.commit) for row in rows if "fp8" in row.provider}
    return [row for row in rows if ((row.date, row.commit) in runs) == wanted]


def _whole(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _quotient(ours: float | None, theirs: float | None) -> str:
    return "-" if ours is None or theirs is None else f"{ours / theirs:.2f}"


def _geometric_mean(values: Iterable[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Figures and tables from a results file.")
    parser.add_argument("--results", type=pathlib.Path, default=FILE, metavar="FILE")
    parser.add_argument("--markdown", action="store_true", help="print the tables, draw nothing")
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "docs", metavar="FOLDER")
    chosen = parser.parse_args(argv)
    rows = benchmarking.read_rows(chosen.results)
    tflops = latest(rows, "attention", "tflops")
    if chosen.markdown:
        plain, fp8 = (of_fp8(rows, wanted=wanted) for wanted in (False, True))
        gbps, linears = (functools.partial(rates_table, unit=u) for u in ("GB/s", "TFLOP/s"))
        tables = (
            (rows, "attention", attention_figures(tflops, masked=False), attention_table),
            (rows, "attention", attention_figures(tflops, masked=True), attention_table),
            (rows, "rms_norm", latest(rows, "rms_norm", "gbps"), rms_norm_table),
            (plain, "train", latest(plain, "train", "tokens_per_s"), train_table),
            (fp8, "train", latest(fp8, "train", "tokens_per_s"), train_table),
            (rows, "quantize", latest(rows, "quantize", "gbps"), gbps),
            (rows, "fp8_linear", latest(rows, "fp8_linear", "tflops", "jaxkern row"), linears),
        )
        for source, family, figures, table in tables:
            if figures:
                print(f"{table(figures)}\n\n{conditions(source, family)}\n")
        return 0
    plain = attention_figures(tflops, masked=False)
    if not plain:
        parser.error(f"{chosen.results} has no attention case with jaxkern and another provider")
    draw_attention(plain, conditions(rows, "attention"), chosen.output / "attention.svg")
    for name in LOSSES:
        losses = chosen.results.parent / f"{name}.csv"
        if losses.exists():
            draw_losses(losses, chosen.output / f"{name}.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
