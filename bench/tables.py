"""Tables of results: once as data, shown in a terminal by ``rich`` or in a report as HTML."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.files import noise_band, relative_spread

OURS, INDUCTOR = "fastft", "inductor"
#: Inductor where it keeps inputs alone, as ours does by design in the rows that have it: what ours is judged by there.
RECOMPUTED = "inductor, checkpointed"
PHASES = ("forward", "backward", "full")
#: No competitors: the products of a loss alone; ours with a label for every token, beside a row that ignores some.
PRODUCTS, EVERY = "(its GEMMs)", "(none ignored)"
#: What an op that memory binds is to reach of the rate of a copy of as many bytes.
COPY_TARGET = 0.9
#: What the losses tagged ``loss`` are to keep: times of their products, bytes beside inputs and results under a frozen
#: head, times as fast with half of the labels; and to be faster than whoever takes fewer than so many bytes.
PRODUCTS_TARGET, EXTRA_TARGET, IGNORED_TARGET, LEAN = 1.25, 0.6 * 2**30, 1.7, 4 * 2**30


@dataclass
class Grid:
    """A table of text. ``left``: columns of words; the others hold numbers. ``strong``: rows to stand out."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]]
    notes: Sequence[str] = ()
    left: frozenset[str] = frozenset()
    strong: set[int] = field(default_factory=set)
    #: Rows that begin a new block.
    blocks: set[int] = field(default_factory=set)

    def trimmed(self) -> Grid:
        """Without the columns that nothing is in."""
        keep = [i for i, _ in enumerate(self.columns) if any(row[i] for row in self.rows)]
        rows: list[Sequence[str]] = [[row[i] for i in keep] for row in self.rows]
        return Grid(self.title, [self.columns[i] for i in keep], rows, self.notes, self.left, self.strong, self.blocks)

    def rich(self) -> Any:
        from rich.markup import escape
        from rich.table import Table

        notes = escape("\n".join(self.notes)) or None
        table = Table(title=escape(self.title), title_justify="left", caption=notes, caption_justify="left")
        for column in self.columns:
            table.add_column(escape(column), justify="left" if column in self.left else "right", overflow="fold")
        for i, row in enumerate(self.rows):
            if i in self.blocks and i:
                table.add_section()
            table.add_row(*map(escape, row), style="bold" if i in self.strong else None)
        return table

    def html(self) -> str:
        def cell(tag: str, text: str, column: str) -> str:
            return f"<{tag}{' class=left' if column in self.left else ''}>{html.escape(text)}</{tag}>"

        lines = [f"<table><caption>{html.escape(self.title)}</caption><thead><tr>"]
        lines += [cell("th", c, c) for c in self.columns]
        lines.append("</tr></thead><tbody>")
        for i, row in enumerate(self.rows):
            classes = " ".join(name for name, of in (("strong", self.strong), ("block", self.blocks)) if i in of)
            lines.append(f'<tr class="{classes}">' if classes else "<tr>")
            lines += [cell("td", text, column) for text, column in zip(row, self.columns, strict=True)]
            lines.append("</tr>")
        lines.append("</tbody></table>")
        lines += [f'<p class="note">{html.escape(note)}</p>' for note in self.notes]
        return "\n".join(lines)


# -- figures of a row of kernels ---------------------------------------------------------------------------------------


def time_of(figures: Mapping[str, Any]) -> Mapping[str, float] | None:
    """Forward and backward together, or the forward where there is no backward; None where it failed."""
    return figures.get("full_us") or figures.get("forward_us")


def competitors(row: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    """name → time, of those that compute what we compute, and did."""
    times = {
        name: time_of(f) for name, f in row["implementations"].items() if name != OURS and not name.startswith("(")
    }
    return {name: t for name, t in times.items() if t}


def best_other(row: Mapping[str, Any]) -> tuple[str, float] | None:
    """The fastest implementation that is not ours, and its time over ours: above 1, ours is faster."""
    ours, others = time_of(row["implementations"].get(OURS, {})), competitors(row)
    if not ours or not others:
        return None
    name = min(others, key=lambda n: others[n]["median"])
    return name, others[name]["median"] / ours["median"]


def inductor_of(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Inductor's figures: of the program that keeps as little as ours, where there is one."""
    found = row["implementations"]
    return found.get(RECOMPUTED) or found.get(INDUCTOR, {})


def beside_inductor(row: Mapping[str, Any], phase: str = "") -> tuple[float, float] | None:
    """Our time of a phase over Inductor's (:func:`inductor_of`), and the noise band of the two; None where either has
    none. Without a phase, forward and backward together, as :func:`time_of` has it.
    """
    both = row["implementations"].get(OURS, {}), inductor_of(row)
    ours, theirs = (f.get(f"{phase}_us") if phase else time_of(f) for f in both)
    if not ours or not theirs:
        return None
    return ours["median"] / theirs["median"], noise_band(ours, theirs)


def slower_than_inductor(row: Mapping[str, Any]) -> bool | None:
    """By more than the noise band; None where it cannot be said."""
    found = beside_inductor(row)
    return None if found is None else found[0] > 1 + found[1]


def bound_by_memory(row: Mapping[str, Any]) -> bool:
    """On a device whose ceilings are known; the kernels are not for a CPU."""
    return row["bound"] == "memory" and bool(row["floor_us"])


def of_copy(row: Mapping[str, Any], figures: Mapping[str, Any], phase: str = "") -> float | None:
    """The time of copying as many bytes over this one's, of a phase or (without one) as :func:`time_of` has it; None
    where no copy was timed (bound by arithmetic, a CPU, an older file).
    """
    phase = phase or ("full" if "full_us" in figures else "forward")
    copy, us = row.get("copy_us", {}).get(phase), figures.get(f"{phase}_us")
    return float(copy / us["median"]) if copy and us else None


def beside(row: Mapping[str, Any], figures: Mapping[str, Any], name: str) -> float | None:
    """A time over that of the implementation ``name`` of the same row; None where either has none."""
    ours, theirs = time_of(figures), time_of(row["implementations"].get(name, {}))
    return ours["median"] / theirs["median"] if ours and theirs else None


@dataclass(frozen=True)
class Miss:
    """A target of the losses that a row misses. ``found`` and ``target`` are words for a table."""

    what: str
    found: str
    target: str


def loss_misses(row: Mapping[str, Any]) -> tuple[list[Miss], list[str]]:
    """Of a row that is tagged ``loss``: what it misses; and what was not measured, by name."""
    ours = row["implementations"][OURS]
    missed, unknown = [], []
    if (ratio := beside(row, ours, PRODUCTS)) is None:
        unknown.append("no time of its GEMMs alone")
    elif ratio > PRODUCTS_TARGET:
        missed.append(Miss("time / its GEMMs", f"{ratio:.3f}", f"≤ {PRODUCTS_TARGET}"))
    if not row["dims"].get("trained"):
        if (extra := ours.get("extra_bytes")) is None:
            unknown.append("no peak of memory")
        elif extra > EXTRA_TARGET:
            missed.append(Miss("extra MiB", _mib(extra), f"≤ {_mib(EXTRA_TARGET)}"))
    if row["dims"].get("ignored"):
        if (ratio := beside(row, ours, EVERY)) is None:
            unknown.append("no time with every label")
        elif 1 / ratio < IGNORED_TARGET:
            missed.append(Miss("none ignored / half ignored", f"{1 / ratio:.3f}", f"≥ {IGNORED_TARGET}"))
    for name in competitors(row):
        figures = row["implementations"][name]
        ratio = beside(row, ours, name)
        if figures.get("extra_bytes", 0) < LEAN and ratio is not None and ratio >= 1:
            missed.append(Miss(f"time / {name}'s, of {_mib(figures.get('extra_bytes'))} MiB", f"{ratio:.3f}", "< 1"))
    return missed, unknown


def by_op(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["op"], []).append(row)
    return found


def implementations(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names in ``rows``: eager, inductor, the others, ours, and what is no competitor."""
    names = dict.fromkeys(name for row in rows for name in row["implementations"])
    order = {"eager": 0, "inductor": 1, OURS: 3}
    return sorted(names, key=lambda n: (order.get(n, 4 if n.startswith("(") else 2), n))


# -- kernels -----------------------------------------------------------------------------------------------------------

#: One line of the long table: heading → what stands there for a row and one of its implementations.
DETAILS: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any]], str]] = {
    "forward µs": lambda row, f: _us(f.get("forward_us")),
    "backward µs": lambda row, f: _us(f.get("backward_us")),
    "full µs": lambda row, f: _us(f.get("full_us")),
    "± %": lambda row, f: f"{50 * relative_spread(t):.1f}" if (t := time_of(f)) else "",
    "forward at": lambda row, f: _rate(row, f, "forward"),
    "backward at": lambda row, f: _rate(row, f, "backward"),
    "% of roofline": lambda row, f: _roofline(f),
    "% of a copy": lambda row, f: _percent(of_copy(row, f)),
    "moved MiB": lambda row, f: _mib(row.get("forward_bytes")) if time_of(f) else "",
    "kept MiB": lambda row, f: _mib(f.get("kept_bytes")),
    "extra MiB": lambda row, f: _mib(f.get("extra_bytes")),
    "/ its GEMMs": lambda row, f: _ratio(beside(row, f, PRODUCTS)),
    "/ none ignored": lambda row, f: _ratio(beside(row, f, EVERY)),
    "first call s": lambda row, f: f"{f['first_call_s']:.2f}" if "first_call_s" in f else "",
    "timed by": lambda row, f: f.get("timed", ""),
}


def kernel_tables(result: Mapping[str, Any]) -> Iterator[Grid]:
    """For each op one table with everything, then one with a line for each shape."""
    for op, rows in by_op(result["rows"]).items():
        yield details(op, rows, result)
    for op, rows in by_op(result["rows"]).items():
        yield overview(op, rows)
    for row in result["rows"]:
        if any("kernels" in figures for figures in row["implementations"].values()):
            yield profile(row)
    notes = notes_of(result)
    yield summary(result["rows"], notes)


def notes_of(result: Mapping[str, Any]) -> list[str]:
    notes = []
    if ceilings := result.get("ceilings"):
        notes.append(
            f"{result['device']['name']}: copies {ceilings['copy_GBps']:,.0f} GB/s, "
            f"multiplies {ceilings['matmul_TFLOPps']:,.0f} TFLOP/s (bf16); both measured in this run."
        )
    if missing := result.get("missing"):
        notes.append("Not here: " + "; ".join(f"{name} ({reason})" for name, reason in missing.items()) + ".")
    return notes


def details(op: str, rows: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> Grid:
    """All figures, a line for each shape and implementation."""
    grid = Grid(f"{op}, {rows[0]['dtype']}, {result['device']['name']}", ["shape", "", *DETAILS], [])
    grid.left = frozenset({"shape", "", "timed by"})
    errors = []
    for row in rows:
        grid.blocks.add(len(grid.rows))
        if not row.get("checked", True):
            errors.append(f"{row['shape']}: results not compared, the reference does not fit the device")
        for i, name in enumerate(n for n in implementations(rows) if n in row["implementations"]):
            figures = row["implementations"][name]
            if "error" in figures:
                errors.append(f"{name}, {row['shape']}: {figures['error']}")
                cells = ["failed", *[""] * (len(DETAILS) - 1)]
            else:
                cells = [show(row, figures) for show in DETAILS.values()]
            if name == OURS:
                grid.strong.add(len(grid.rows))
            grid.rows.append([row["shape"] if i == 0 else "", name, *cells])
    grid.notes = list(dict.fromkeys(errors))
    return grid.trimmed()


#: Kernels of an implementation in a table of :func:`profile`: the longest.
LONGEST = 12


def profile(row: Mapping[str, Any]) -> Grid:
    """What ran in one sample (``--profile``): the longest kernels of each implementation, a name's calls together."""
    grid = Grid(f"{row['op']}, {row['shape']}: one sample's kernels", ["", "phase", "kernel", "runs", "µs"], [])
    grid.left = frozenset({"", "phase", "kernel"})
    for impl, figures in row["implementations"].items():
        if "kernels" not in figures:
            continue
        grid.blocks.add(len(grid.rows))
        together: dict[tuple[str, str], list[float]] = {}
        for kernel in figures["kernels"]:
            together.setdefault((kernel["phase"], kernel["name"]), []).append(kernel["us"])
        ordered = sorted(together.items(), key=lambda of: -sum(of[1]))
        busy, gaps = (sum(k[what] for k in figures["kernels"]) for what in ("us", "after_us"))
        runs = f"{len(figures['kernels'])}"
        grid.rows.append([impl, "", "all, and between them", runs, f"{busy:,.0f} + {gaps:,.0f}"])
        for (phase, name), times in ordered[:LONGEST]:
            grid.rows.append(["", phase, name[:90], f"{len(times)}", f"{sum(times):,.1f}"])
    return grid


#: The last columns of :func:`overview`.
BEST = ("best other", "its time / ours")


def overview(op: str, rows: Sequence[Mapping[str, Any]]) -> Grid:
    """A line for each shape, a column for each implementation; the times of what failed are its error's kind."""
    names = implementations(rows)
    backward = any("full_us" in f for row in rows for f in row["implementations"].values())
    what = "forward and backward" if backward else "forward"
    columns = ["shape", *names, "ours / its GEMMs", "% of roofline", "% of a copy", *BEST]
    grid = Grid(f"{op}: µs, {what}", columns, [])
    grid.left = frozenset({"shape", "best other"})
    for row in rows:
        cells = []
        for name in names:
            figures = row["implementations"].get(name)
            failed = figures is not None and "error" in figures
            cells.append(figures["error"].split(":")[0] if failed else _us(time_of(figures or {})))
        best = best_other(row)
        ours = row["implementations"].get(OURS, {})
        grid.rows.append(
            [row["shape"], *cells, _ratio(beside(row, ours, PRODUCTS)), _roofline(ours), _percent(of_copy(row, ours)),
             best[0] if best else "", f"{best[1]:.2f}" if best else ""]
        )  # fmt: skip
    return grid.trimmed()


def summary(rows: Sequence[Mapping[str, Any]], notes: Sequence[str] = ()) -> Grid:
    """A line for each op: over its shapes, how ours stands to the best other, to Inductor (slower: by more than the
    noise band) and to the ceilings.
    """
    import statistics

    columns = [
        "op",
        "shapes",
        "faster than the best other",
        "its time / ours, median",
        "least",
        "most",
        "slower than Inductor",
        "% of roofline",
        "% of a copy",
        f"< {100 * COPY_TARGET:.0f} % of a copy",
    ]
    grid = Grid("fastft beside the best other of each shape", columns, [], notes, frozenset({"op"}))
    for op, of in by_op(rows).items():
        ratios = [best[1] for row in of if (best := best_other(row))]
        reached = [f["roofline"] for row in of if "roofline" in (f := row["implementations"].get(OURS, {}))]
        shares = [100 * r.get("full", r["forward"]) for r in reached]
        judged = [s for row in of if (s := slower_than_inductor(row)) is not None]
        copied = [100 * s for row in of if (s := of_copy(row, row["implementations"].get(OURS, {})))]
        below = f"{sum(s < 100 * COPY_TARGET for s in copied)} of {len(copied)}"
        grid.rows.append([
            op,
            str(len(of)),
            f"{sum(r > 1 for r in ratios)} of {len(ratios)}" if ratios else "",
            *(f"{f(ratios):.2f}" if ratios else "" for f in (statistics.median, min, max)),
            f"{sum(judged)} of {len(judged)}" if judged else "",
            *(f"{min(of_all):.0f}–{max(of_all):.0f}" if of_all else "" for of_all in (shares, copied)),
            below if copied else "not measured" if any(map(bound_by_memory, of)) else "",
        ])  # fmt: skip
    return grid.trimmed()


def _us(figure: Mapping[str, float] | None) -> str:
    if not figure:
        return ""
    value = figure["median"]
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


def _rate(row: Mapping[str, Any], figures: Mapping[str, Any], phase: str) -> str:
    """In what binds the op: TFLOP/s, or GB/s. Nothing for a CPU, which the kernels are not for."""
    if not row["floor_us"]:
        return ""
    if row["bound"] == "compute" and f"{phase}_TFLOPps" in figures:
        return f"{figures[f'{phase}_TFLOPps']:.0f} TFLOP/s"
    return f"{figures[f'{phase}_GBps']:,.0f} GB/s" if f"{phase}_GBps" in figures else ""


def _roofline(figures: Mapping[str, Any]) -> str:
    reached = figures.get("roofline")
    return f"{100 * reached.get('full', reached['forward']):.0f}" if reached else ""


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _mib(size: float | None) -> str:
    return "" if size is None else f"{size / 2**20:,.1f}"
