"""``fastft bench report``: result files as tables, and as one HTML page with plots that needs nothing else.

Plots are matplotlib's, embedded as PNG: for kernels, bandwidth or arithmetic rate against size; for training steps,
speed and peak memory, a step's device time by part (files with ``--profile``), memory over a step (``--timeline``), and
losses (files of :data:`CURVE` steps or more).
"""

from __future__ import annotations

import base64
import html
import io
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.files import Result, relative_spread, spread
from bench.tables import OURS, Grid, best_other, by_op, implementations, kernel_tables, time_of
from bench.train import graphs_of, input_of, optimizer_of, tokens_of

GIB = 2**30
#: What the legend calls the times of ``copy_us``.
COPY = "a copy of as\nmany bytes"
#: Steps from which on losses are a curve.
CURVE = 50
#: One colour for an implementation everywhere; any other gets one of :data:`MORE`.
COLORS = {
    OURS: "#c8385a",
    "eager": "#8c96a8",
    "inductor": "#2f6db5",
    "inductor_layers": "#7fb0de",
    "unsloth": "#2a9d8f",
    "liger": "#e8a33d",
    "Liger": "#e8a33d",
    "liger_inductor_layers": "#b77a1c",
    "quack": "#7b5ea7",
    "F.rms_norm": "#59a14f",
    "cut-cross-entropy": "#4a7c59",
    "bitsandbytes": "#a8765a",
    "FlexAttention": "#59a14f",
    "SDPA cuDNN": "#17becf",
    "SDPA flash": "#e377c2",
    "varlen flash": "#5c4d7d",
    "TRL": "#bcbd22",
}
MORE = ("#17becf", "#bcbd22", "#e377c2", "#5c4d7d", "#9c755f", "#59a14f")


@dataclass(frozen=True)
class Plot:
    """``name``: the file's, without ``.png``."""

    name: str
    caption: str
    png: bytes


def color_of(name: str) -> str:
    base = name.partition(":")[0]
    return COLORS.get(base) or MORE[sum(map(ord, base)) % len(MORE)]


# -- parts of a step ---------------------------------------------------------------------------------------------------

#: Part → what the names of its kernels have in them (regular expressions, any case), the first that fits. Two of ours
#: share their names between ops (``_forward_kernel``, ``_backward_kernel``): norms, rotary and gated MLPs.
PARTS: dict[str, str] = {
    "dequantise": r"dequant",
    "attention": r"flash|sdpa|fmha|attention|attn|compute_dot_do_o|convert_dq|^_(dq|dkdv|delta)_kernel|flex",
    "loss": r"cross_entropy|nll|log_softmax|softmax|log_prob|logsumexp|^_?cce|_lse",
    "optimizer": r"multi_tensor|adam",
    "GEMM": r"gemm|nvjet|cutlass|cublas|splitk|xmma|gemv|::(mm|addmm|bmm|baddbmm|linear)\b|^ampere_|^sm\d+_",
    "norm": r"rms_?norm|layer_?norm|native_layer|rms_layernorm",
    "norm, rotary, GLU": r"^_(forward_|backward_)?kernel$|rope|rotary|swiglu|geglu|silu|gelu|^_fg_kernel|dwf_dw",
    "copies": r"mem(cpy|set)|copy|catarray|::(cat|clone|contiguous|to)\b|fill",
    "elementwise": r"elementwise|^triton_|reduce|functor|scatter|index|embedding|arange|cub::|::\w+",
}
OTHER = "other"
PART_COLORS = dict(
    zip(
        (*PARTS, OTHER),
        ("#b07aa1", "#4e79a7", "#edc948", "#59a14f", "#9aa5b1", "#f28e2b", "#e15759", "#76b7b2", "#bab0ac", "#d7d7d7"),
        strict=True,
    )
)


def part_of(kernel: str) -> str:
    """The part of a step that a kernel's time belongs to, by its name."""
    return next((part for part, names in PARTS.items() if re.search(names, kernel, re.IGNORECASE)), OTHER)


def parts(kernels: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Part → milliseconds, of a run's ``kernels``; parts without time are left out."""
    found = dict.fromkeys((*PARTS, OTHER), 0.0)
    for kernel in kernels:
        found[part_of(kernel["name"])] += kernel["ms"]
    return {part: round(ms, 3) for part, ms in found.items() if ms}


# -- tables ------------------------------------------------------------------------------------------------------------


def title_of(result: Result) -> str:
    if result.kind == "kernels":
        return f"Kernels, {result.device}"
    s = result.setup
    if not s:
        return f"Training steps, {result.device}"
    trained = f"LoRA r={s['rank']}" if s["train"] == "lora" else "all weights trained"
    checkpointing = "checkpointing" if s["checkpointing"] else "no checkpointing"
    loop = ", SFTTrainer" if s.get("trainer") == "sft" else ""
    setting = f"{s['model']}, {s['quant']}, {trained}, {checkpointing}{optimizer_of(s)}{loop}"
    return f"{setting}, {tokens_of(s)}, {result.device}"


def tables(result: Result) -> Iterator[Grid]:
    if result.kind == "kernels":
        yield from kernel_tables(result.data)
        return
    yield step_table(result)
    if grid := parts_table(result):
        yield grid
    if grid := losses_table(result):
        yield grid


def step_table(result: Result) -> Grid:
    baseline = result.data["baseline"]
    columns = ["implementation", "input", "tokens/s", "step ms", "± %", "peak GiB", "first step s"]
    columns += ["loss first", "last", "graphs", f"speed / {baseline}", f"peak / {baseline}"]
    grid = Grid(f"Beside {baseline}", columns, [], left=frozenset({"implementation", "input"}))
    notes = []
    for row in result.rows:
        if row["impl"].partition(":")[0] == OURS:
            grid.strong.add(len(grid.rows))
        if row.get("error"):
            notes.append(f"{row['impl']}: {' '.join(str(row['error']).split())[:300]}")
        if row["status"] != "ok":
            grid.rows.append([row["impl"], "", "failed", *[""] * (len(columns) - 3)])
            continue
        figure = spread(row["step_ms"]["all"])
        grid.rows.append([
            row["impl"],
            input_of(row),
            f"{row['tokens_per_s']:,.0f}",
            f"{figure['median']:,.1f}",
            f"{50 * relative_spread(figure):.1f}",
            f"{row['peak_bytes'] / GIB:.2f}" if row.get("peak_bytes") else "",
            f"{row['first_step_s']:.1f}",
            f"{row['loss_first']:.4f}",
            f"{row['loss_last']:.4f}",
            graphs_of(row),
            *(f"{row[k]:.3f}" if row.get(k) else "" for k in ("speed_ratio", "peak_ratio")),
        ])  # fmt: skip
    grid.notes = notes
    return grid.trimmed()


def _profiled(result: Result) -> dict[str, dict[str, float]]:
    """Implementation → parts, where a run was profiled."""
    return {impl: parts(run["kernels"]) for impl, run in _profiles(result).items()}


def _profiles(result: Result) -> dict[str, Any]:
    """Implementation → the first run of it that was profiled."""
    runs = {row["impl"]: next((r for r in row["runs"] if r.get("kernels")), None) for row in result.rows}
    return {impl: run for impl, run in runs.items() if run}


def parts_table(result: Result) -> Grid | None:
    found = _profiled(result)
    if not found:
        return None
    names = [p for p in (*PARTS, OTHER) if any(p in each for each in found.values())]
    idle = {impl: run["idle"] for impl, run in _profiles(result).items() if run.get("idle")}
    rows: list[Sequence[str]] = [
        [
            impl,
            *(f"{each[p]:.1f}" if p in each else "" for p in names),
            f"{sum(each.values()):.1f}",
            f"{idle[impl]['outside_ms'] + idle[impl]['gaps_ms']:.1f}" if impl in idle else "",
        ]
        for impl, each in found.items()
    ]
    what = "device" if result.device != "cpu" else "operators'"
    title = f"One step's {what} time by part, ms (the 60 longest kernels of a profiled step)"
    return Grid(
        title, ["implementation", *names, "sum", "GPU idle"], rows, left=frozenset({"implementation"})
    ).trimmed()


def _losses(result: Result) -> dict[str, list[float]]:
    """Implementation → its losses, step by step: the first's, and those that saw the same tokens."""
    found = {row["impl"]: row["runs"][0]["loss"] for row in result.rows if row["status"] == "ok"}
    steps = len(next(iter(found.values()), []))
    return {impl: losses for impl, losses in found.items() if len(losses) == steps} if steps >= CURVE else {}


def losses_table(result: Result) -> Grid | None:
    """How far each curve is from the first: without a bias the mean difference is within a few of its standard errors
    (of 10 means of as many steps each, since what differs at one step differs at the next).
    """
    found = _losses(result)
    if len(found) < 2:
        return None
    (first, base), *others = found.items()
    rows = []
    for impl, losses in others:
        apart = [a - b for a, b in zip(losses, base, strict=True)]
        size = len(apart) // 10
        means = [statistics.fmean(apart[i : i + size]) for i in range(0, 10 * size, size)]
        error = statistics.stdev(means) / len(means) ** 0.5
        mean, most = statistics.fmean(apart), max(map(abs, apart))
        rows.append([impl, f"{losses[0]:.4f}", f"{losses[-1]:.4f}", f"{1e3 * mean:+.3f}", f"{1e3 * error:.3f}",
                     f"{1e3 * statistics.fmean(map(abs, apart)):.3f}", f"{1e3 * most:.3f}"])  # fmt: skip
    left = {row["impl"]: len(row["runs"][0]["loss"]) for row in result.rows if row["status"] == "ok"}
    notes = [f"{impl} has {count} losses: not compared" for impl, count in left.items() if impl not in found]
    columns = ["implementation", "first", "last", "mean difference", "± its error", "mean size", "largest"]
    title = f"Losses of {len(base)} steps beside {first}'s ({base[0]:.4f} to {base[-1]:.4f}); differences in 0.001 nats"
    return Grid(title, columns, rows, left=frozenset({"implementation"}), notes=notes)


# -- plots -------------------------------------------------------------------------------------------------------------


def figures(results: Sequence[Result]) -> Iterator[Plot]:
    """Every plot that ``results`` have data for."""
    for i, result in enumerate(results):
        for plot in (_kernel_plots if result.kind == "kernels" else _step_plots)(result):
            yield Plot(f"{i + 1}-{plot.name}", plot.caption, plot.png)


def _axes(width: float, height: float, columns: int = 1) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(True, color="#e4e7ec", linewidth=0.8)
        axis.set_axisbelow(True)
    return figure, list(axes)


def _png(figure: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110, metadata={"Software": None})
    return out.getvalue()


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _kernel_plots(result: Result) -> Iterator[Plot]:
    if ratios := _ratio_plot(result):
        yield ratios
    for op, rows in by_op(result.rows).items() if result.data.get("ceilings") else ():
        if plot := _rate_plot(op, rows, result):
            yield plot


def _ratio_plot(result: Result) -> Plot | None:
    """A dot for each shape: how many times as long the best other takes."""
    found = {op: [b for row in rows if (b := best_other(row))] for op, rows in by_op(result.rows).items()}
    found = {op: best for op, best in found.items() if best}
    if not found:
        return None
    figure, (axis,) = _axes(8.5, 0.9 + 0.34 * len(found))
    for i, best in enumerate(found.values()):
        for name, ratio in best:
            axis.plot(ratio, i, "o", color=color_of(name), markersize=7, alpha=0.85)
    axis.axvline(1, color="#333", linewidth=1)
    ratios = [ratio for best in found.values() for _, ratio in best]
    if max(ratios) > 4 * min(ratios):
        _log_scale(axis)
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}×")
    axis.set_yticks(range(len(found)), list(found))
    axis.set_ylim(len(found) - 0.5, -0.5)
    axis.set_xlabel("time of the best other / fastft's (right of 1: fastft is faster)")
    _legend(axis, sorted({name for best in found.values() for name, _ in best}))
    caption = "Each dot is one shape, in the colour of the fastest implementation that is not fastft."
    return Plot("best-other", caption, _png(figure))


def _log_scale(axis: Any) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_minor_locator(NullLocator())


def _legend(axis: Any, names: Sequence[str], loc: str = "center left", y: float = 0.5) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color="#333", linewidth=1.4, label=n)
        if n == COPY
        else Line2D([], [], marker="o", linestyle="", color=color_of(n), label=n)
        for n in names
    ]
    axis.legend(handles=handles, loc=loc, bbox_to_anchor=(1.01, y), frameon=False, fontsize=9)


def _rate_plot(op: str, rows: Sequence[Mapping[str, Any]], result: Result) -> Plot | None:
    """What binds the op, over forward and backward: a column for each shape, in order of size. Points without lines:
    shapes of nearly one size may be other computations (other activations, many short rows).
    """
    from matplotlib.ticker import EngFormatter

    compute = rows[0]["bound"] == "compute"
    kind, per, unit = ("flops", 1e6, "TFLOP/s") if compute else ("bytes", 1e3, "GB/s")

    def amount(row: Mapping[str, Any], *phases: str) -> float:
        return sum(row.get(f"{phase}_{kind}", 0.0) for phase in phases or ("forward", "backward"))

    rows = sorted(rows, key=amount)
    points: dict[str, list[tuple[int, float]]] = {}
    for name in implementations(rows):
        for i, row in enumerate(rows):
            figures = row["implementations"].get(name, {})
            phases = ("forward", "backward") if "full_us" in figures else ("forward",)
            if name.startswith("(") or not (time := time_of(figures)) or not (size := amount(row, *phases)):
                continue
            points.setdefault(name, []).append((i, size / time["median"] / per))
    if not points:
        return None
    figure, (axis,) = _axes(max(9.5, 3 + 0.42 * len(rows)), 3.8)
    for k, (name, of) in enumerate(points.items()):
        aside = 0.12 * (k - (len(points) - 1) / 2)  # equal rates stand beside each other
        style: dict[str, Any] = dict(markersize=8, zorder=3) if name == OURS else dict(markersize=6)
        axis.plot([i + aside for i, _ in of], [rate for _, rate in of], "o", color=color_of(name), **style)
    copied = {i: c.get("full", c["forward"]) for i, row in enumerate(rows) if not compute and (c := row.get("copy_us"))}
    copies = [(i, amount(rows[i]) / us / per) for i, us in copied.items()]
    for i, rate in copies:
        axis.hlines(rate, i - 0.4, i + 0.4, color="#333", linewidth=1.4, zorder=1)
    top = result.data["ceilings"]["matmul_TFLOPps" if compute else "copy_GBps"]
    axis.axhline(top, color="#333", linewidth=1, linestyle="--", zorder=1)
    what = "a large matrix product" if compute else "a large copy"
    label = f"{what}:\n{top:,.0f} {unit}"
    axis.annotate(label, (1.01, top), xycoords=("axes fraction", "data"), va="center", size=9, annotation_clip=False)
    size_of = EngFormatter("FLOP" if compute else "B", places=1)
    names = [f"{row['model']}\n{size_of(amount(row))}" for row in rows]
    axis.set_xticks(range(len(rows)), names, fontsize=8, rotation=90 if len(rows) > 8 else 0)
    axis.set_xlim(-0.6, len(rows) - 0.4)
    axis.grid(False, axis="x")
    most = 1.08 * max(top, *(rate for of in (*points.values(), copies) for _, rate in of))
    axis.set_ylim(0, most)
    axis.set_ylabel(unit)
    phases = "forward and backward" if "backward_bytes" in rows[0] else "the forward"
    least = "operations" if compute else "bytes"
    axis.set_xlabel(f"model, least {least} of {phases}")
    axis.set_title(f"{op}, {rows[0]['dtype']}", loc="left", fontsize=11)
    # Beside the ceiling's label, on its larger side.
    loc, aside = ("upper left", -0.08) if top > most / 2 else ("lower left", 0.08)
    _legend(axis, [*points, *[COPY] * bool(copies)], loc, top / most + aside)
    caption = f"{op}: the least {least} over the time taken; a column for each shape, in order of size."
    return Plot(_slug(op), caption, _png(figure))


def _step_plots(result: Result) -> Iterator[Plot]:
    good = [row for row in result.rows if row["status"] == "ok"]
    if len(good) > 1:
        yield _speed_plot(result, good)
    if found := _profiled(result):
        yield _parts_plot(result, found)
    lines = {row["impl"]: next((r["timeline"] for r in row["runs"] if r.get("timeline")), None) for row in good}
    if any(lines.values()):
        yield _timeline_plot(result, {impl: line for impl, line in lines.items() if line})
    if len(losses := _losses(result)) > 1:
        yield _losses_plot(result, losses)


def _speed_plot(result: Result, rows: Sequence[Mapping[str, Any]]) -> Plot:
    names = [row["impl"] for row in rows]
    peaks = [(row.get("peak_bytes") or 0) / GIB for row in rows]
    panels = 2 if any(peaks) else 1
    figure, axes = _axes(5.2 * panels, 0.9 + 0.42 * len(rows), panels)
    quartiles = [
        spread([row["tokens_per_s"] * row["step_ms"]["median"] / ms for ms in row["step_ms"]["all"]]) for row in rows
    ]
    speeds = [row["tokens_per_s"] for row in rows]
    error = [[max(s - q["q1"], 0) for s, q in zip(speeds, quartiles, strict=True)]]
    error += [[max(q["q3"] - s, 0) for s, q in zip(speeds, quartiles, strict=True)]]
    _bars(axes[0], names, speeds, "tokens/s", "{:,.0f}", error)
    if panels == 2:
        _bars(axes[1], names, peaks, "peak GiB", "{:.2f}")
        axes[1].set_yticklabels([])
    caption = f"{title_of(result)}: speed (whiskers: quartiles of the steps) and peak of allocated memory."
    return Plot("speed", caption, _png(figure))


def _bars(axis: Any, names: Sequence[str], values: Sequence[float], label: str, text: str, error: Any = None) -> None:
    bars = axis.barh(names, values, color=[color_of(n) for n in names], height=0.62, xerr=error, ecolor="#444")
    axis.bar_label(bars, [text.format(v) for v in values], padding=5, fontsize=9)
    axis.set_xlim(0, 1.18 * max(values))
    axis.locator_params(axis="x", nbins=6)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.grid(False, axis="y")
    axis.set_xlabel(label)


def _parts_plot(result: Result, found: Mapping[str, Mapping[str, float]]) -> Plot:
    figure, (axis,) = _axes(10.4, 1.7 + 0.45 * len(found))
    for part, color in PART_COLORS.items():
        widths = [each.get(part, 0.0) for each in found.values()]
        if not any(widths):
            continue
        starts = [sum(ms for p, ms in each.items() if _before(p, part)) for each in found.values()]
        bars = axis.barh(list(found), widths, left=starts, color=color, height=0.62, label=part)
        wide = [f"{w:.0f}" if w > 0.03 * max(sum(e.values()) for e in found.values()) else "" for w in widths]
        axis.bar_label(bars, wide, label_type="center", fontsize=8)
    axis.set_ylim(len(found) - 0.5, -0.5)
    axis.grid(False, axis="y")
    axis.set_xlabel("ms of one step on the device" if result.device != "cpu" else "ms of one step")
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    caption = f"{title_of(result)}: one profiled step's device time by part, from its 60 longest kernels."
    return Plot("parts", caption, _png(figure))


def _before(part: str, other: str) -> bool:
    order = list(PART_COLORS)
    return order.index(part) < order.index(other)


def _timeline_plot(result: Result, lines: Mapping[str, Mapping[str, Any]]) -> Plot:
    figure, (axis,) = _axes(10.4, 3.8)
    for impl, line in lines.items():
        xs, ys = zip(*line["points"], strict=True)
        axis.plot(xs, [y / GIB for y in ys], color=color_of(impl), linewidth=1.6, drawstyle="steps-post")
        if begins := line.get("phases_ms", {}).get("backward"):
            axis.axvline(begins, color=color_of(impl), linewidth=1, linestyle=":")
    axis.set_ylim(bottom=0)
    axis.set_xlim(left=0)
    axis.set_xlabel("ms of the host's time (dotted: the backward begins)")
    axis.set_ylabel("allocated GiB")
    _legend(axis, list(lines))
    caption = f"{title_of(result)}: allocated memory over one step, from the allocator's history."
    return Plot("timeline", caption, _png(figure))


def _losses_plot(result: Result, found: Mapping[str, Sequence[float]]) -> Plot:
    figure, axes = _axes(10.4, 3.8, 2)
    (first, base), *others = found.items()
    for i, (impl, losses) in enumerate(found.items()):
        axes[0].plot(range(1, len(losses) + 1), losses, color=_line(i), linewidth=1.2, label=impl)
    for i, (_, losses) in enumerate(others, 1):
        apart = [a - b for a, b in zip(losses, base, strict=True)]
        axes[1].plot(range(1, len(losses) + 1), apart, color=_line(i), linewidth=1)
    axes[0].set_ylabel("loss, nats a token")
    axes[1].set_ylabel(f"loss − {first}'s")
    for axis in axes:
        axis.set_xlabel("step")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    caption = f"{title_of(result)}: losses, and how far each is from the first one's."
    return Plot("losses", caption, _png(figure))


def _line(i: int) -> str:
    """A colour for each of several curves of one implementation."""
    return ("#1c2330", "#c8385a", "#2f6db5", "#e8a33d", *MORE)[i % (4 + len(MORE))]


# -- the page ----------------------------------------------------------------------------------------------------------

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2330; max-width: 1180px; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.2rem; margin-top: 2.6rem; }
.meta, .note, figcaption { color: #5b6676; font-size: .86rem; } .note { margin: .3rem 0; }
code { font-size: .82rem; overflow-wrap: anywhere; }
figure { margin: 1.2rem 0; } img { max-width: 100%; }
table { border-collapse: collapse; margin: 1rem 0; font-size: .86rem; display: block; overflow-x: auto; }
caption { text-align: left; font-weight: 600; padding-bottom: .3rem; white-space: nowrap; }
th, td { padding: .22rem .6rem; text-align: right; border-bottom: 1px solid #e4e7ec; }
td { font-variant-numeric: tabular-nums; }
th { vertical-align: bottom; color: #5b6676; font-weight: 600; }
th.left, td.left { text-align: left; }
tr.strong td { font-weight: 650; background: #fdf3f5; } tr.block td { border-top: 2px solid #cfd5de; }
details { margin: .6rem 0; } summary { cursor: pointer; color: #2f6db5; }
"""


def page(results: Sequence[Result], plots: Sequence[Plot]) -> str:
    """One HTML page without references to anything outside it."""
    text: Callable[[Any], str] = lambda value: html.escape(str(value))  # noqa: E731
    body = ["<h1>fastft: measured</h1>"]
    how = "docs/measuring.md says how. Times are medians; ± is half of what lies between the quartiles."
    body.append(f'<p class="meta">{how}</p>')
    for i, result in enumerate(results):
        body.append(f"<section><h2>{text(title_of(result))}</h2>")
        versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
        commit = (result.data.get("commit") or "unknown")[:12]
        body.append(f'<p class="meta">{text(result.path.name)}; commit {text(commit)}; {text(versions)}</p>')
        if argv := result.data.get("argv"):
            body.append(f"<details><summary>command</summary><code>{text(' '.join(map(str, argv)))}</code></details>")
        own = [plot for plot in plots if plot.name.startswith(f"{i + 1}-")]
        grids = list(tables(result))
        if result.kind == "kernels":
            body += [grids[-1].html(), *map(_figure, own)]
            ops = len(by_op(result.rows))
            body += [grid.html() for grid in grids[ops:-1]]
            body.append("<details><summary>every figure</summary>")
            body += [grid.html() for grid in grids[:ops]]
            body.append("</details>")
        else:
            body += [grids[0].html(), *map(_figure, own), *(grid.html() for grid in grids[1:])]
        body.append("</section>")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>fastft: measured</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>\n<body>\n'
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _figure(plot: Plot) -> str:
    data = base64.b64encode(plot.png).decode()
    return (
        f'<figure><img alt="{html.escape(plot.caption)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{html.escape(plot.caption)}</figcaption></figure>"
    )
