"""A :class:`~fastft.reporting.Report` as a page: one HTML file that needs no other, no network and no script.

What it shows of a graph: what was replaced and what that costs, the model's layers in order, those that are alike once,
and what was left alone, with the reasons. Numbers are the ops' own cost formulas (:mod:`fastft.costs`).
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TypeVar

import fastft
from fastft.costs import CAVEATS, H100, added, rates_of
from fastft.reporting import MISSED, REPLACED, SKIPPED, Module, Report, Site, Work

LEFT = "left to Inductor"
_T = TypeVar("_T")


def page(report: Report, title: str = "") -> str:
    """The whole page. ``title`` says what the report is of (``"Llama 3.1 8B, LoRA r=16"``)."""
    graphs = _fold(report.each_graph(), _alike)
    colours = _colours(report)
    views = [_View(same[0], colours) for _, same in graphs]
    body = [_head(report, title, views)]
    if len(views) == 1:
        body += [_costs(views[0]), _layers(views[0])]
    else:
        body.append(_section("What was replaced", _counts(report, colours)))
        body += [
            _section(
                f"{_numbered('Graph', [i + 1 for i in numbers])} of {report.graphs}",
                f'<p class="note">{_again(same)}One forward pass of it with {_inputs(view.report)}. '
                f"{_rates(view)}</p>" + _costs(view, inner=True) + _layers(view, inner=True, is_open=numbers[0] == 0),
            )
            for (numbers, same), view in zip(graphs, views, strict=True)
        ]
    body += [_left_alone(report), _run(report), _small_print(views)]
    name = escape(title or "report")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Whatever gets into the page, nothing in it runs and nothing is fetched.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>fastft: {name}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(filter(None, body))
        + "\n</main>\n</body>\n</html>\n"
    )


# -------------------------------------------------------------------------------------------------------- what is shown


@dataclass
class _Part:
    """A pattern's sites in a graph, or a kind of op that was left to Inductor."""

    name: str
    works: list[Work] = field(default_factory=list)

    @property
    def work(self) -> Work:
        return added(self.name, self.works)

    @property
    def known(self) -> list[Work]:
        return [w for w in self.works if not w.problem]


class _View:
    """A graph's report with what the page needs to know of it: rates, parts, and the layers."""

    def __init__(self, report: Report, colours: dict[str, int]) -> None:
        self.report, self.colours = report, colours
        found = rates_of(report.device)
        self.rates, self.own = found or H100, found is not None
        self.parts: dict[str, _Part] = {}
        for site in report.sites:
            part = self.parts.setdefault(site.pattern, _Part(site.pattern))
            part.works += [site.work] if site.work is not None else []
        linear = [m.work for m in report.modules if m.work is not None]
        if linear:
            self.parts[LEFT] = _Part(LEFT, linear)
        self.total = added("total", [w for p in self.parts.values() for w in p.works])
        self.seconds = self.time(w for p in self.parts.values() for w in p.works)
        self.blocks = _blocks(report)

    def time(self, works: Iterable[Work]) -> float:
        return sum(self.rates.seconds(w) for w in works)


@dataclass
class _Row:
    """A module: its path inside its layer, its sites, and what stays with Inductor."""

    path: str
    module: Module
    sites: list[Site] = field(default_factory=list)
    inner: list[str] = field(default_factory=list)  # modules of its own that its sites consist of

    @property
    def works(self) -> list[Work]:
        works = [s.work for s in self.sites if s.work is not None]
        return works if self.module.work is None else [*works, self.module.work]


@dataclass
class _Block:
    """What is in one place of the model: layers that are alike (``layers``: which), or modules outside of layers (no
    ``stack``; that of a Sequential's own is empty).
    """

    stack: str | None
    layers: list[int]
    rows: list[_Row]

    @property
    def first(self) -> str:
        """Path of the first of the layers."""
        return "" if self.stack is None else _layer(self.stack, self.layers[0])

    @property
    def works(self) -> list[Work]:
        return [w for row in self.rows for w in row.works]


def _layer(stack: str, number: int) -> str:
    return f"{stack}.{number}" if stack else str(number)


def _split(path: str) -> tuple[str, int, str] | None:
    """``"model.layers.3.mlp"`` → ``("model.layers", 3, "mlp")``; None outside of layers."""
    words = path.split(".")
    # A wrapper's first argument, through which Dynamo may see the model, is no layer.
    number = next((i for i, word in enumerate(words) if word.isdecimal() and words[:i] != ["args"]), None)
    return None if number is None else (".".join(words[:number]), int(words[number]), ".".join(words[number + 1 :]))


def _blocks(report: Report) -> list[_Block]:
    """A graph's modules in order, layers that are alike together, at the first of them."""
    rows = {m.path: _Row(m.path, m) for m in report.modules}
    for site in report.sites:
        rows.setdefault(site.module, _Row(site.module, Module(site.module))).sites.append(site)
    for path, row in list(rows.items()):
        # A LoRA layer consists of modules of its own: they are said beside it.
        owner = row.module.into.partition(" at ")[2]
        if not (row.sites or row.module.left) and owner in rows and path.startswith(f"{owner}.") and _inside(owner):
            rows[owner].inner.append(path.removeprefix(f"{owner}."))
            del rows[path]
    blocks: list[_Block] = []
    stacks: dict[str, dict[int, list[_Row]]] = {}
    for row in rows.values():
        place = _split(row.path)
        if place is not None:
            stack, number, row.path = place
            if stack not in stacks:
                blocks.append(_Block(stack, [], []))  # where its layers begin
            stacks.setdefault(stack, {}).setdefault(number, []).append(row)
        elif not row.path and not row.sites and not row.module.left:
            continue
        elif blocks and blocks[-1].stack is None:
            blocks[-1].rows.append(row)
        else:
            blocks.append(_Block(None, [], [row]))
    return [b for one in blocks for b in ([one] if one.stack is None else _folded(one.stack, stacks[one.stack]))]


def _inside(path: str) -> bool:
    """Whether a path is of a module inside of a layer, not of a layer or the whole model."""
    place = _split(path)
    return place is not None and bool(place[2])


def _folded(stack: str, layers: dict[int, list[_Row]]) -> list[_Block]:
    def key(number: int) -> Hashable:
        return tuple(_row_key(row, _layer(stack, number)) for row in layers[number])

    return [_Block(stack, same, layers[same[0]]) for _, same in _fold(sorted(layers), key)]


def _row_key(row: _Row, layer: str) -> Hashable:
    """What two layers have in common that are alike. Names of nodes (``add_3``) count without their numbers."""

    def plain(text: str) -> str:
        here = rf"(?<![\w.]){re.escape(layer)}(?!\w)" if layer else "$"
        return re.sub(r"_\d+", "", re.sub(here, "", text))

    sites = tuple(
        (s.pattern, s.status, plain(s.reason), s.rule, s.notes, s.work, plain(s.into)) for s in _in_order(row.sites)
    )
    left = tuple(sorted(row.module.left.items()))
    return row.path, sites, left, row.module.work, plain(row.module.into), tuple(row.inner)


def _in_order(sites: Sequence[Site]) -> list[Site]:
    """A module's sites: what a later rewrite took up comes first, and what is first in the graph (a report has the last
    one first).
    """
    return sorted(reversed(sites), key=lambda s: (not s.into, s.pattern))


def _alike(report: Report) -> Hashable:
    return (
        bool(report.recompiles),
        tuple(report.inputs),
        tuple((b.stack, tuple(b.layers), tuple(_row_key(r, "") for r in b.rows)) for b in _blocks(report)),
    )


def _fold(things: Sequence[_T], key: Callable[[_T], Hashable]) -> list[tuple[list[int], list[_T]]]:
    """Things that are alike together, in the order of the first: their positions, and themselves."""
    found: dict[Hashable, tuple[list[int], list[_T]]] = {}
    for position, thing in enumerate(things):
        positions, same = found.setdefault(key(thing), ([], []))
        positions.append(position)
        same.append(thing)
    return list(found.values())


# ------------------------------------------------------------------------------------------------------------- sections


def _head(report: Report, title: str, views: list[_View]) -> str:
    states = Counter(s.status for s in report.sites)
    tiles = [("sites replaced", f"{states[REPLACED]:,}", "good" if states[REPLACED] else "bad")]
    tiles += [
        (name, f"{number:,}", "bad" if number else "")
        for name, number in (
            ("missed", states[MISSED]),
            ("skipped", states[SKIPPED]),
            ("graph breaks", report.breaks),
            ("recompilations", report.recompiles),
            ("errors", len(report.errors)),
        )
    ]
    tiles.insert(3, ("graphs" if report.graphs != 1 else "graph", f"{report.graphs:,}", ""))
    rows = [tiles]
    if len(views) == 1 and views[0].parts:
        view = views[0]
        rows += [
            [
                ("FLOPs, forward", _amount(view.total.flops), ""),
                ("bytes moved, forward", _bytes(view.total.bytes_moved), ""),
                ("kept for backward, unless recomputed", _bytes(view.total.bytes_kept), ""),
                (f"estimate at {view.rates.name} rates, forward", f"≥ {_time(view.seconds)}", ""),
            ]
        ]
    grids = "".join(
        '<div class="tiles">'
        + "".join(
            f'<div class="tile {kind}"><b>{number}</b><span>{escape(name)}</span></div>' for name, number, kind in row
        )
        + "</div>"
        for row in rows
    )
    what = escape(title) if title else "what was replaced, what it costs, and what was left alone"
    return f'<header><h1>fastft</h1><p class="what">{what}</p></header>\n{grids}'


def _counts(report: Report, colours: dict[str, int]) -> str:
    """Sites of all graphs by pattern, without costs."""
    body = "".join(
        f"<tr{_data(name, report.sites)}><th>{_chip(name, colours)}</th>{_states(name, report.sites)}</tr>"
        for name in dict.fromkeys(s.pattern for s in report.sites)
    )
    return _table(("pattern", REPLACED, MISSED, SKIPPED), body, "facts") if body else _nothing()


def _costs(view: _View, inner: bool = False) -> str:
    """Bars by part, and the table with their numbers."""
    if not view.parts:
        return _section("What was replaced", _nothing(), inner)
    parts = sorted(view.parts.values(), key=lambda p: (p.name == LEFT, -view.time(p.works)))
    sums: list[tuple[str, str, list[float]]] = [
        ("time", f"≥ {_time(view.seconds)}", [view.time(p.works) for p in parts]),
        ("bytes moved", _bytes(view.total.bytes_moved), [p.work.bytes_moved for p in parts]),
        ("bytes kept", _bytes(view.total.bytes_kept), [p.work.bytes_kept for p in parts]),
    ]
    bars = "".join(
        f'<div class="barrow"><span>{name}</span>{_bar(list(zip(parts, values, strict=True)), view)}'
        f"<span>{total}</span></div>"
        for name, total, values in sums
        if sum(values)
    )
    rows = []
    for part in parts:
        sites = [s for s in view.report.sites if s.pattern == part.name]
        taken = sum(bool(s.into) for s in sites)
        known, unknown = part.known, len(part.works) - len(part.known)
        note = f"{taken} counted in a later pattern" if taken else ""
        if part.name == LEFT:
            note = "plain linear layers; other ops have no formula and are listed below"
        elif unknown:
            note = f"{unknown} without numbers" + (f", {note}" if note else "")
        share = view.time(part.works) / view.seconds if view.seconds else 0.0
        rows.append(
            f"<tr{_data(part.name, sites)}{_data_work(part.work)}><th>{_chip(part.name, view.colours)}"
            + (f'<div class="note">{escape(note)}</div>' if note else "")
            + f"</th>{_states(part.name, view.report.sites)}"
            + _numbers(part.works, view)
            + (
                f'<td class="n">{share:.1%}</td><td class="n">{view.rates.bound(part.work)}</td>'
                if known and part.work.bytes_moved
                else "<td></td><td></td>"
            )
            + "</tr>"
        )
    total = (
        f'<tr class="total"{_data_work(view.total)}><th>sum of these</th><td></td><td></td><td></td>'
        + _numbers([w for p in parts for w in p.works], view)
        + "<td></td><td></td></tr>"
    )
    columns = ("pattern", REPLACED, MISSED, SKIPPED, "FLOPs", "moved", "kept", "time", "share", "bound by")
    note = "" if inner else f'<p class="note">One forward pass with {_inputs(view.report)}. {_rates(view)}</p>'
    table = _table(columns, "".join(rows) + total)
    return _section("What was replaced, and what it costs", note + bars + table + _unknown(view), inner)


def _unknown(view: _View) -> str:
    """Ops whose numbers are not known, and what Inductor has beside linear layers: they are in no sum."""
    problems = Counter((s.work.op, s.work.problem) for s in view.report.sites if s.work is not None and s.work.problem)
    lines = [f"<b>{escape(op)}</b> ×{times}: {escape(why)}" for (op, why), times in problems.items()]
    others: Counter[str] = Counter()
    for module in view.report.modules:
        others.update({op: n for op, n in module.left.items() if op != "linear" or module.work is None})
        if module.work is not None and module.work.problem:
            lines.append(f"<b>linear</b> in {escape(module.path)}: {escape(module.work.problem)}")
    if others:
        lines.append(f"left to Inductor: {escape(_ops(dict(others.most_common())))}")
    if not lines:
        return ""
    return (
        '<div class="unknown"><p>No numbers, and in no sum:</p><ul>'
        + "".join(f"<li>{line}</li>" for line in lines)
        + "</ul></div>"
    )


def _layers(view: _View, inner: bool = False, is_open: bool = True) -> str:
    """The model from first to last, a block after the other."""
    if not view.blocks:
        return ""
    most = max((view.time(b.works) * max(1, len(b.layers)) for b in view.blocks), default=0.0)
    few = sum(b.stack is not None for b in view.blocks) <= 3
    shown = 0
    blocks = []
    for block in view.blocks:
        shown += block.stack is not None
        blocks.append(_block(block, view, most, is_open=is_open and (block.stack is None or few or shown == 1)))
    return _section("The model, in order", "".join(blocks), inner)


def _block(block: _Block, view: _View, most: float, is_open: bool) -> str:
    times = max(1, len(block.layers))
    all_sites = [s for row in block.rows for s in row.sites if s.status == REPLACED and not s.into]
    if block.stack is not None:
        name = escape(": ".join(filter(None, (block.stack, _numbered("layer", block.layers)))))
        alike = f'<span class="times">identical ×{times}</span>' if times > 1 else ""
    else:
        name, alike = "outside of layers", ""
    one, work = view.time(block.works), added("", block.works)
    bar = f'<span class="meter"><i style="width:{100 * one * times / most if most else 0:.1f}%"></i></span>'
    each = "each " if times > 1 else ""
    facts = (
        f"{each}{_amount(work.flops)}FLOP · {_bytes(work.bytes_moved)} moved · {_bytes(work.bytes_kept)} kept · "
        f"≥ {_time(one)}" + (f" (≥ {_time(one * times)} together)" if times > 1 else "")
    )
    chips = " ".join(
        f"{_chip(p, view.colours)}<small>×{n}</small>" for p, n in Counter(s.pattern for s in all_sites).items()
    )
    rows = "".join(_module_rows(row, block, view) for row in block.rows)
    columns = ("module", "taken by", "rule", "notes", "FLOPs", "moved", "kept", "time")
    return (
        f'<details class="block" data-layers="{escape(_ranges(block.layers))}" data-times="{times}"'
        f"{_data_work(work)}{' open' if is_open else ''}>"
        f"<summary><b>{name}</b> {alike}{bar}<div class='facts'>{facts if block.works else 'no numbers'}</div>"
        f'<div class="chips">{chips}</div></summary>{_table(columns, rows, "modules")}</details>'
    )


def _module_rows(row: _Row, block: _Block, view: _View) -> str:
    layer = block.first
    path = escape(row.path or ("(the layer itself)" if layer else "(the model itself)")).replace(".", ".<wbr>")
    inner = f'<div class="note">with {escape(_some(row.inner))}</div>' if row.inner else ""
    cells = [_site_cells(s, layer, view) for s in _in_order(row.sites)]
    if row.module.left:
        numbers = _numbers([row.module.work], view) if row.module.work else '<td colspan="4"></td>'
        left = escape(_ops(row.module.left))
        cells.append(f'<td><span class="chip left">Inductor</span></td><td></td><td class="note">{left}</td>{numbers}')
    if not cells:
        into = _within(row.module.into, layer)
        what = f"in {into}" if into else "computes nothing"
        cells.append(f'<td class="note" colspan="7">{escape(what)}</td>')
    full = escape(".".join(filter(None, (layer, row.path))))
    first = f'<th rowspan="{len(cells)}" data-module="{full}" title="{full}">{path}{inner}</th>'
    return "".join(f"<tr>{first if i == 0 else ''}{c}</tr>" for i, c in enumerate(cells))


def _site_cells(site: Site, layer: str, view: _View) -> str:
    chip = _chip(site.pattern, view.colours, "" if site.status == REPLACED else site.status)
    notes = escape(site.notes)
    if site.status != REPLACED:
        notes = f'<b class="bad">{escape(site.status)}</b> {escape(site.reason)}'
    if site.into:
        numbers = f'<td colspan="4" class="note">→ {escape(_within(site.into, layer, site.module))}</td>'
    else:
        numbers = _numbers([site.work], view) if site.work is not None else '<td colspan="4"></td>'
    return f'<td>{chip}</td><td class="rule">{escape(site.rule)}</td><td class="note">{notes}</td>{numbers}'


def _left_alone(report: Report) -> str:
    """Misses and skips, those of one kind together."""
    sites = [s for s in report.sites if s.status != REPLACED]
    if not sites:
        what = "Every site that was recognised was replaced." if report.sites else "No site was recognised."
        return _section("What was left alone", f"<p>{what}</p>")
    rows = []
    for _, same in _fold(sites, lambda s: (s.status != MISSED, s.pattern, re.sub(r"_\d+", "", s.reason), s.rule)):
        site = same[0]
        rows.append(
            f'<tr data-status="{escape(site.status)}" data-sites="{len(same)}"><th>{escape(site.pattern)}</th>'
            f'<td><b class="bad">{escape(site.status)}</b></td><td class="n">{len(same)}</td><td class="text">'
            f'{escape(site.reason)}</td><td class="rule">{escape(site.rule)}</td>'
            f'<td class="text">{_places([s.module for s in same])}</td></tr>'
        )
    return _section(
        "What was left alone", _table(("pattern", "status", "sites", "why", "rule", "where"), "".join(rows), "text")
    )


def _places(modules: list[str]) -> str:
    words = {path: [(len(w), w) if w.isdecimal() else (0, w) for w in path.split(".")] for path in modules}
    paths = [path or "(the model itself)" for path in sorted(words, key=lambda path: words[path])]
    if len(paths) <= 3:
        return escape(", ".join(paths))
    rest = escape(", ".join(paths[2:]))
    return f"{escape(', '.join(paths[:2]))}<details><summary>{len(paths) - 2} more</summary>{rest}</details>"


def _run(report: Report) -> str:
    """Graph breaks, errors, the plan, bridges, timings."""
    parts = []
    if report.errors:
        parts.append(("Errors", _list(f'<b class="bad">{escape(error)}</b>' for error in report.errors)))
    if report.break_reasons:
        lines = (f"×{n}: {escape(reason.strip() or 'no reason given')}" for reason, n in report.break_reasons.items())
        parts.append((f"Graph breaks ({report.breaks})", _list(lines)))
    if report.plan:
        rows = "".join(f"<tr><th>{escape(k)}</th><td>{escape(str(v))}</td></tr>" for k, v in report.plan.items())
        parts.append(("Plan", _table((), rows, "facts")))
    if report.bridges:
        rows = "".join(
            f"<tr><th>{escape(b.name)}</th><td>{escape(b.status)}</td><td>{escape(b.reason)}</td></tr>"
            for b in report.bridges
        )
        parts.append(("Bridges", _table(("bridge", "status", "why"), rows, "facts")))
    if report.timings:
        rows = "".join(f"<tr><th>{escape(k)}</th><td>{v:.2f} s</td></tr>" for k, v in report.timings.items())
        parts.append(("Time spent compiling", _table((), rows, "facts")))
    if not report.break_reasons:
        parts.insert(0, ("Graph breaks", "<p>None.</p>"))
    return _section("The run", "".join(f"<h3>{name}</h3>{what}" for name, what in parts))


def _small_print(views: list[_View]) -> str:
    used = {w.op for view in views for p in view.parts.values() for w in p.works}
    lines = [
        "FLOPs, bytes moved and bytes kept are each op's own cost formula, for the sizes above. They are the forward "
        "pass's where nothing else is said. GB is 10⁹ bytes.",
        "Kept for backward is what ops save when nothing is recomputed. The plan says what is: of a checkpointed layer "
        "only its input stays. The weights, their gradients and the optimizer's state are not in it.",
        "The time is a roofline: an op takes as long as its FLOPs at the device's rate of bf16 products, or as its "
        "bytes at its memory's rate, whichever is longer. It is a lower bound: launches, and what has no numbers, are "
        "not in it, and products in fp32 take longer.",
    ]
    lines += [f"{op}: {CAVEATS[op]}." for op in sorted(used & CAVEATS.keys())]
    if len(views) > 1:
        lines.append(
            "Graphs are not added up: one may run several times in a step (a layer's code, for each layer), or not "
            "again (an earlier batch's sizes)."
        )
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return (
        f"<footer><h2>How to read the numbers</h2><ul>{items}</ul><p>fastft {escape(fastft.__version__)}</p></footer>"
    )


# --------------------------------------------------------------------------------------------------------------- pieces


def _section(title: str, body: str, inner: bool = False) -> str:
    level = 3 if inner else 2
    return f"<section>\n<h{level}>{escape(title)}</h{level}>\n{body}\n</section>"


#: Columns of numbers, which stand below each other.
_NUMBERS = {REPLACED, MISSED, SKIPPED, "FLOPs", "moved", "kept", "time", "share", "bound by", "sites"}


def _table(columns: Sequence[str], body: str, kind: str = "") -> str:
    head = "".join(f'<th class="{"n" if c in _NUMBERS else ""}">{escape(c)}</th>' for c in columns)
    head = f"<thead><tr>{head}</tr></thead>" if columns else ""
    return f'<div class="wide"><table class="{kind}">{head}<tbody>{body}</tbody></table></div>'


def _list(lines: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{line}</li>" for line in lines) + "</ul>"


def _nothing() -> str:
    return "<p>No graph with a known site was compiled.</p>"


def _colours(report: Report) -> dict[str, int]:
    """A colour for each pattern, the same in the whole page and, for the patterns there are, on every page."""
    from fastft.patterns import table_names

    names = [*table_names(), *(s.pattern for s in report.sites)]
    return {name: i % _COLOURS for i, name in enumerate(dict.fromkeys(names))}


def _chip(pattern: str, colours: dict[str, int], status: str = "") -> str:
    if pattern == LEFT:
        return f'<span class="chip left">{LEFT}</span>'
    kind = "off" if status else f"c{colours[pattern]}"
    return f'<span class="chip {kind}">{escape(pattern)}</span>'


def _bar(values: list[tuple[_Part, float]], view: _View) -> str:
    """A bar of a thousand units, each part's share of it."""
    total, at, pieces = sum(v for _, v in values), 0.0, []
    for part, v in values:
        width = 1000 * v / total
        if width <= 0:
            continue
        kind = "cleft" if part.name == LEFT else f"c{view.colours[part.name]}"
        label = ""
        if width > 8 * len(part.name) + 10:  # where the name fits
            label = f'<text x="{at + width / 2:.1f}" y="19">{escape(part.name)}</text>'
        tip = f"{escape(part.name)}: {v / total:.1%}"
        pieces.append(
            f'<g class="{kind}"><title>{tip}</title><rect x="{at:.2f}" y="0" width="{max(width - 1, 0.5):.2f}" '
            f'height="28"></rect>{label}</g>'
        )
        at += width
    return f'<svg viewBox="0 0 1000 28" role="img">{"".join(pieces)}</svg>'


def _states(pattern: str, sites: Iterable[Site]) -> str:
    states = Counter(s.status for s in sites if s.pattern == pattern)
    return "".join(
        f'<td class="n{" bad" if status != REPLACED else ""}">{states[status] or ""}</td>'
        for status in (REPLACED, MISSED, SKIPPED)
    )


def _numbers(works: Sequence[Work], view: _View) -> str:
    """The cells FLOPs, moved, kept and time."""
    known = [w for w in works if not w.problem]
    if not known:
        return f'<td colspan="4" class="note">{"unknown: " + escape(works[0].problem) if works else ""}</td>'
    sums = added("", known)
    cells = (_amount(sums.flops), _bytes(sums.bytes_moved), _bytes(sums.bytes_kept), _time(view.time(known)))
    return "".join(f'<td class="n">{cell}</td>' for cell in cells)


def _data(pattern: str, sites: Iterable[Site]) -> str:
    """What a script would want to read off a row."""
    replaced = sum(s.status == REPLACED and s.pattern == pattern for s in sites)
    return f' data-pattern="{escape(pattern)}" data-replaced="{replaced}"'


def _data_work(work: Work) -> str:
    return f' data-flops="{work.flops}" data-moved="{work.bytes_moved}" data-kept="{work.bytes_kept}"'


def _rates(view: _View) -> str:
    rates, device = view.rates, view.report.device
    numbers = f"{rates.tflops:g} TFLOP/s of bf16 products, {rates.terabytes:g} TB/s of memory"
    if view.own:
        return f"Time is an <b>estimate at the rates of {escape(device)}, not measured</b>: {numbers} ({rates.source})."
    where = f"traced on {escape(device)}, whose rates are not known here" if device else "of an unknown device"
    return f"Time is an <b>estimate at {rates.name} rates, not measured</b>: {numbers} ({rates.source}); {where}."


def _again(same: Sequence[Report]) -> str:
    return "Compiled again, since a guard of an earlier one failed. " if same[0].recompiles else ""


def _inputs(report: Report) -> str:
    return escape(", ".join(report.inputs)) or "inputs of unknown sizes"


def _within(name: str, layer: str, here: str = "") -> str:
    """``"lora at layers.0.attn.q"`` as it is said inside of layer 0, or in that very module (``here``)."""
    pattern, _, path = name.partition(" at ")
    if path == here:
        return pattern
    inside = path.removeprefix(layer).removeprefix(".") if layer and f"{path}.".startswith(f"{layer}.") else path
    return f"{pattern} at {inside or 'the layer itself'}" if path else pattern


def _ops(ops: dict[str, int]) -> str:
    return ", ".join(name + (f" ×{n}" if n > 1 else "") for name, n in ops.items())


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _numbered(what: str, numbers: Sequence[int]) -> str:
    return f"{what}{'s' if len(numbers) > 1 else ''} {_ranges(numbers)}"


def _ranges(numbers: Sequence[int]) -> str:
    """``[0, 1, 2, 4, 6, 8]`` → ``"0–2, 4, 6, 8"``, and ``[0, 2, 4, 6]`` → ``"0, 2, …, 6"``."""
    steps = {b - a for a, b in itertools.pairwise(numbers)}
    if len(numbers) > 3 and len(steps) == 1 and steps != {1}:
        return f"{numbers[0]}, {numbers[1]}, …, {numbers[-1]}"
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}–{r[-1]}" for r in runs)


def _scaled(n: float, units: Sequence[str]) -> str:
    """Three digits and a unit: ``"1.25 G"``."""
    place = 0
    while n >= 999.5 and place < len(units) - 1:
        n, place = n / 1000, place + 1
    return f"{n:.3g} {units[place]}" if n < 999.5 else f"{n:,.0f} {units[place]}"


def _amount(n: float) -> str:
    return _scaled(n, ("", "K", "M", "G", "T", "P"))


def _bytes(n: float) -> str:
    return _scaled(n, ("B", "KB", "MB", "GB", "TB"))


def _time(seconds: float) -> str:
    return _scaled(seconds * 1e9, ("ns", "µs", "ms", "s")) if seconds else "0"


# ---------------------------------------------------------------------------------------------------------------- looks

_COLOURS = 12
_CSS = """
:root { color-scheme: light dark; --ink: #1c2128; --dim: #5d6672; --line: #dfe3e8; --back: #f6f7f9; --card: #fff;
  --good: #14713d; --bad: #b3261e; --left: #8b94a1;
  --c0: #7d4cc2; --c1: #a0478f; --c2: #1f6fc4; --c3: #0b7f87; --c4: #3b7d2a; --c5: #b55a12; --c6: #2e4fae;
  --c7: #5b6b16; --c8: #9a3b3b; --c9: #23637a; --c10: #177a58; --c11: #8a6412; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --dim: #9aa4b2; --line: #333a44; --back: #14171c;
  --card: #1c2027; --good: #5cc689; --bad: #ff8a80; --left: #6a7380; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 14px/1.45 system-ui, "Segoe UI", "Noto Sans",
  "DejaVu Sans", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 20px 24px 40px; }
header { display: flex; gap: 14px; align-items: baseline; flex-wrap: wrap; }
h1 { font-size: 24px; margin: 0; letter-spacing: -.02em; } h2 { font-size: 17px; margin: 0 0 10px; }
h3 { font-size: 14px; margin: 16px 0 6px; } p { margin: 4px 0 10px; } ul { margin: 4px 0; padding-left: 20px; }
.what { color: var(--dim); margin: 0; font-size: 15px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(128px, 1fr)); gap: 10px; margin: 12px 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 9px 12px; }
.tile b { display: block; font-size: 20px; font-weight: 650; } .tile span { color: var(--dim); font-size: 12px; }
.good b, b.good { color: var(--good); } .tile.bad b, .bad { color: var(--bad); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 16px 18px;
  margin: 14px 0; }
section section { border: 0; padding: 0; margin: 14px 0 0; }
.note { color: var(--dim); font-size: 12.5px; overflow-wrap: anywhere; } th .note { font-weight: 400; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 4px 8px; border-top: 1px solid var(--line); vertical-align: top; font-weight: 400; }
th.n, td.n { text-align: right; white-space: nowrap; }
thead th { border-top: 0; color: var(--dim); font-size: 12px; }
.total th, .total td { font-weight: 650; }
table.modules { table-layout: fixed; min-width: 980px; }
.modules th:nth-child(1) { width: 24%; } .modules th:nth-child(2) { width: 15%; }
.modules th:nth-child(3) { width: 14%; } .modules th:nth-child(4) { width: 19%; }
.modules tbody th { font: 12.5px/1.5 ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
.rule { font: 12px/1.6 ui-monospace, "DejaVu Sans Mono", monospace; color: var(--dim); }
td.text { overflow-wrap: anywhere; } table.text .rule { white-space: nowrap; }
table.facts { width: auto; } table.facts td { min-width: 64px; }
.chip { display: inline-block; border-radius: 4px; padding: 0 7px; font-size: 12px; line-height: 19px; color: #fff;
  white-space: nowrap; }
.chip.left { background: none; color: var(--dim); border: 1px solid var(--left); line-height: 17px; }
.chip.off { background: none; color: var(--bad); border: 1px dashed var(--bad); line-height: 17px; }
.barrow { display: grid; grid-template-columns: 92px 1fr 92px; gap: 10px; align-items: center; margin: 5px 0; }
.barrow span { color: var(--dim); font-size: 12.5px; } .barrow span:last-child { text-align: right; color: var(--ink); }
svg { display: block; width: 100%; } svg text { fill: #fff; font-size: 12.5px; text-anchor: middle; }
.barrow + .wide { margin-top: 12px; } .cleft { fill: var(--left); background: var(--left); }
.unknown { margin-top: 10px; font-size: 12.5px; color: var(--dim); } .unknown p { margin: 0; }
details.block { border: 1px solid var(--line); border-radius: 8px; margin: 8px 0; padding: 0 12px; }
details.block > summary { cursor: pointer; padding: 9px 0; } details.block[open] { padding-bottom: 8px; }
.times { background: var(--ink); color: var(--card); border-radius: 9px; padding: 1px 9px; font-size: 12px; }
.facts { color: var(--dim); font-size: 12.5px; margin-top: 2px; } .chips { margin-top: 4px; }
.chips small { color: var(--dim); margin: 0 8px 0 3px; }
.meter { float: right; width: 160px; height: 8px; border-radius: 4px; background: var(--line); margin-top: 6px;
  overflow: hidden; } .meter i { display: block; height: 100%; background: var(--dim); }
footer { color: var(--dim); font-size: 12.5px; margin-top: 18px; } footer h2 { font-size: 13px; margin: 0; }
@media print { details { break-inside: avoid; } }
""" + "".join(f".c{i} {{ fill: var(--c{i}); background: var(--c{i}); }}\n" for i in range(_COLOURS))
