"""``fastft bench``: kernels, training steps, the longest context, the gates (two result files; one and its targets),
the report.

    fastft bench kernels --shapes-tag real --out kernels.json
    fastft bench train compare --impls eager,unsloth,fastft --out all.json
    fastft bench context --tokens 400000 --host 110GiB --out context.json
    fastft bench compare old.json new.json
    fastft bench targets kernels.json
    fastft bench report kernels.json all.json --html report.html

``python bench/cli.py`` is the same, for a checkout that is not installed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Run as a script, Python puts bench/ first on the path, where kernels.py would pass for the Hub's package of that name.
if __name__ == "__main__":
    sys.path[0] = str(ROOT)
from bench import files, gate  # noqa: E402
from bench.tables import Grid  # noqa: E402

if __name__ == "__main__":
    del sys.path[0]

WIDTH = 170
#: pytest's exit statuses, as a command has them: 0, 1 for a test that failed, 2 for what the user can mend.
PYTEST = {0: 0, 1: 1, 4: 2, 5: 2}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastft bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    kernels = commands.add_parser(
        "kernels", help="times of every op beside others'", epilog="Other arguments go to pytest."
    )
    kernels.add_argument("-k", default=None, metavar="EXPRESSION", help="only cases whose name fits, as pytest's -k")
    kernels.add_argument(
        "--shapes-tag",
        default=None,
        help="primary (default on a GPU), real, long, attention, loss, slices, test (on a CPU)",
    )
    kernels.add_argument("--budget", type=float, default=None, help="seconds: no case begins after them")
    kernels.add_argument("--rounds", type=int, default=None, help="samples of each, at least (default 7)")
    kernels.add_argument("--profile", action="store_true", help="what ran in one more sample of each, kernel by kernel")
    kernels.add_argument("--empty-caches", action="store_true", help="first calls compile everything")
    kernels.add_argument("--out", type=Path, default=None, help="JSON file, written anew after every case")
    commands.add_parser("train", help="training steps: bench/train.py run | compare | checkpoint", add_help=False)
    commands.add_parser("context", help="the longest context that trains: bench/context.py", add_help=False)
    compare = commands.add_parser("compare", help="exit status 1 if anything of ours got slower or larger, or is gone")
    compare.add_argument("old", type=Path)
    compare.add_argument("new", type=Path)
    compare.add_argument("--band", type=float, default=0.05, help="least noise band of times (default 0.05: 5 %%)")
    compare.add_argument(
        "--memory-band", type=float, default=files.LEAST, help=f"least one of peak memory (default {files.LEAST})"
    )
    compare.add_argument("--any-device", action="store_true", help="compare files of different devices")
    compare.add_argument("--all", action="store_true", help="show what did not change too")
    targets = commands.add_parser(
        "targets", help="exit status 1 if a kernel misses a target: Inductor's time, a copy's rate, the losses' own"
    )
    targets.add_argument("files", nargs="+", type=Path, metavar="FILE")
    report = commands.add_parser("report", help="tables of result files; with --html, a page with plots")
    report.add_argument("files", nargs="+", type=Path, metavar="FILE")
    report.add_argument("--html", type=Path, default=None, help="write one self-contained page")
    report.add_argument("--png", type=Path, default=None, metavar="FOLDER", help="write its plots there too")
    return parser


def kernels(a: argparse.Namespace, more: Sequence[str]) -> int:
    """pytest on bench/kernels.py, in a process of its own: it imports this package by another way."""
    command = [sys.executable, "-m", "pytest", str(ROOT / "bench" / "kernels.py"), "-p", "no:cacheprovider"]
    command += ["--no-header", "--tb=short", "-rfEs", "--benchmark-quiet", *more]
    options = {"-k": a.k, "--shapes-tag": a.shapes_tag, "--budget": a.budget, "--rounds": a.rounds, "--result": a.out}
    for option, value in options.items():
        if value is not None:
            command += [option, str(value.resolve() if isinstance(value, Path) else value)]
    for option in ("--profile", "--empty-caches"):
        if getattr(a, option[2:].replace("-", "_")):
            command.append(option)
    # Or Python puts the current folder on the path: in the repository, the one that holds kernels/.
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    status = PYTEST.get(code := subprocess.run(command, env=environment).returncode, code)
    if code == 5:
        print("fastft bench: no case has that name", file=sys.stderr)
    return status


def compare(a: argparse.Namespace) -> int:
    for option, band in (("--band", a.band), ("--memory-band", a.memory_band)):
        if not 0 <= band < 1:
            raise gate.NotComparable(f"{option} is {band}; it is a fraction, 0.05 for 5 %")
    old, new = files.load(a.old), files.load(a.new)
    found = gate.changes(old, new, a.band, a.memory_band, a.any_device)
    grid = gate.table(found, a.all)
    if grid.rows:
        _print(grid.trimmed())
    else:
        print(grid.title)
    bad = [c for c in found if c.bad]
    ours = [c for c in found if c.ours]
    if bad:
        counts = [f"{sum(c.verdict == v for c in bad)} {v}" for v in (gate.SLOWER, gate.MORE, gate.GONE)]
        print(f"Regressed: of {len(ours)} figures of fastft, {', '.join(counts)}.")
        return 1
    print(f"Nothing of fastft got slower or larger by more than its noise band or is gone ({len(ours)} figures).")
    return 0


def targets(a: argparse.Namespace) -> int:
    judged = [gate.judge(files.load(path)) for path in a.files]
    for each in judged:
        for grid in gate.target_tables(each):
            _print(grid)
        for line in each.notes:
            print(f"Note: {line}")
        for line in each.failed:
            print(f"Failed: {line}")
        for line, shapes in Counter(each.unknown).items():
            print(f"Not judged: {line} ({shapes} shape{'s' * (shapes > 1)})")
        print(each.sentence())
    met = all(each.met for each in judged)
    print("Every target is met." if met else "Missed: a target above is not met, or was not measured.")
    return 0 if met else 1


def report(a: argparse.Namespace) -> int:
    from bench import report

    results = [files.load(path) for path in a.files]
    if a.html is not None:  # before the plots are drawn, which takes a while
        _writable(a.html)
    if a.png is not None:
        with _writing(a.png):
            a.png.mkdir(parents=True, exist_ok=True)
    if a.html is None:
        for grid in (grid for result in results for grid in report.tables(result)):
            _print(grid)
    figures: list[Any] = list(report.figures(results)) if a.html or a.png else []
    if a.html is not None:
        with _writing(a.html):
            a.html.write_text(report.page(results, figures), encoding="utf-8")
        print(f"{a.html}: {a.html.stat().st_size / 1024:,.0f} KiB, {len(figures)} plots")
    if a.png is not None:
        for figure in figures:
            file = a.png / f"{figure.name}.png"
            with _writing(file):
                file.write_bytes(figure.png)
        print(f"{a.png}: {len(figures)} plots")
    return 0


class CannotWrite(Exception):
    """The message names the file and says why."""


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        why = "it is no folder" if isinstance(error, FileExistsError) else error.strerror or error  # mkdir's
        raise CannotWrite(f"cannot write {path}: {why}") from None


def _writable(file: Path) -> None:
    with _writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        new = not file.exists()
        file.open("ab").close()
        if new:
            file.unlink()


def _print(grid: Grid) -> None:
    from rich.console import Console

    Console(width=WIDTH).print(grid.rich())


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 (a kernel failed, no run worked, a regression, a missed target), 2 for what a user can mend."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] in (["train"], ["context"]):
        from bench import context, train

        return {"train": train, "context": context}[argv[0]].main(argv[1:])
    parser = _parser()
    a, more = parser.parse_known_args(argv)
    if a.command == "kernels":
        return kernels(a, more)
    if more:
        parser.error(f"unknown arguments: {' '.join(more)}")
    try:
        return {"compare": compare, "targets": targets, "report": report}[a.command](a)
    except (files.NotAResult, gate.NotComparable, CannotWrite) as error:
        print(f"fastft bench: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
