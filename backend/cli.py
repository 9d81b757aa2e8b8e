"""The command ``fastft``, which is ``python -m fastft`` too."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="fastft",
    help="A kernel-first torch.compile backend for fine-tuning stock models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def _fail(message: str) -> typer.Exit:
    """An error that is the user's to mend: said in one line, exit code 2."""
    typer.echo(f"fastft: {message}", err=True)
    return typer.Exit(2)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Check the installation and say what to do. Exit code 1 if something that training needs is broken."""
    from fastft.doctor import OK, WARNING, diagnose, healthy, to_dict

    rows = diagnose()
    if as_json:
        typer.echo(json.dumps(to_dict(rows), indent=1))
    else:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        table = Table(title="fastft doctor", title_justify="left")
        for column in ("check", "", "found; → what to do"):
            table.add_column(column, overflow="fold")
        style = {OK: "green", WARNING: "yellow"}
        for row in rows:
            color = style.get(row.status, "bold red")
            advice = f"\n→ {row.fix}" if row.fix else ""
            table.add_row(escape(row.name), f"[{color}]{row.status}[/]", escape(row.found + advice))
        Console().print(table)
        broken = [row.name for row in rows if row.status not in style]
        typer.echo(
            f"Broken: {', '.join(broken)}." if broken else "Ready: torch.compile(model, backend='fastft') works here."
        )
    if not healthy(rows):
        raise typer.Exit(1)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def demo(context: typer.Context) -> None:
    """Fine-tune a small Llama with LoRA, through fastft and in eager, and compare (options: `fastft demo --help`)."""
    # Beside backend/ in a checkout, which an editable install points to; a wheel has no examples.
    examples = Path(__file__).resolve().parent.parent / "examples"
    if not (examples / "demo.py").is_file():
        raise _fail(
            f"the demo is part of the repository, not of an installed wheel, and there is no {examples / 'demo.py'}. "
            "Clone the repository and run `make demo` in it"
        )
    if not {"-h", "--help"}.intersection(context.args):
        _need("transformers", "peft", "trl", "datasets")
    sys.path.insert(0, str(examples))
    from demo import main as run  # type: ignore[import-not-found]

    run(context.args)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def bench(context: typer.Context) -> None:
    """Measure kernels and training steps, compare result files, make a report (options: `fastft bench --help`)."""
    # Beside backend/ in a checkout, as the demo's examples/ are.
    folder = Path(__file__).resolve().parent.parent / "bench"
    if not (folder / "cli.py").is_file():
        raise _fail(
            f"the benchmarks are part of the repository, not of an installed wheel: there is no {folder / 'cli.py'}. "
            "Clone the repository and run `pip install -e '.[bench]'` in it"
        )
    _need(
        *{"kernels": ("pytest_benchmark",), "report": ("matplotlib",)}.get("".join(context.args[:1]), ()), extra="bench"
    )
    _import_bench(folder)
    from bench.cli import main as run  # type: ignore[import-not-found]

    if code := run(context.args):
        raise typer.Exit(code)


def _import_bench(folder: Path) -> None:
    # By its path: with the repository on Python's, its folder kernels/ would pass for the Hub's package of that name.
    if "bench" not in sys.modules:
        import importlib.util

        path = folder / "__init__.py"
        spec = importlib.util.spec_from_file_location("bench", path, submodule_search_locations=[str(folder)])
        assert spec is not None and spec.loader is not None
        sys.modules["bench"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["bench"])


Model = Annotated[Path, typer.Argument(help="A transformers config.json, or a folder that holds one.")]
Lora = Annotated[int, typer.Option(min=0, help="Rank of LoRA adapters on every linear layer; 0: none.")]
Checkpointing = Annotated[bool, typer.Option(help="With gradient checkpointing.")]
Layers = Annotated[int, typer.Option(min=0, help="Keep only this many layers, which is quicker; 0: all of them.")]
Sequences = Annotated[int, typer.Option("--batch", min=1, help="Sequences.")]
Length = Annotated[int, typer.Option(min=2, help="Tokens in a sequence.")]
Html = Annotated[
    Path | None, typer.Option("--html", metavar="FILE", help="Write the report as a page, to look at in a browser.")
]
Dtype = Annotated[str, typer.Option(help="The weights' dtype: bfloat16, float16 or float32.")]
Import = Annotated[
    list[str] | None,
    typer.Option(
        "--import",
        metavar="MODULE_OR_FILE",
        help="First import this module, or .py file, which registers variants of yours; may be repeated.",
    ),
]


@app.command()
def explain(
    model: Model,
    lora: Lora = 16,
    checkpointing: Checkpointing = False,
    layers: Layers = 2,
    batch: Sequences = 2,
    length: Length = 64,
    dtype: Dtype = "bfloat16",
    memory: Annotated[str, typer.Option(help='Plan memory: "auto", "lean", "fast", "16GiB".')] = "",
    html: Html = None,
    as_json: AsJson = False,
) -> None:
    """Say what fastft would replace in a model, and what not, and why.

    The model is built with random weights and run once; nothing is trained or downloaded.
    """
    import fastft
    from fastft.options import OptionError, Options

    wanted = {"memory": int(memory) if memory.isdigit() else memory} if memory else {}
    try:
        Options.of(wanted)
    except OptionError as error:
        raise _fail(str(error)) from None
    if html is not None:
        _writable(html)
    network, data = _network(model, lora, checkpointing, layers, batch, length, dtype)
    report = fastft.explain(network, **data, options=wanted)
    typer.echo(json.dumps(report.to_dict(), indent=1) if as_json else str(report))
    if html is not None:
        whole = _config(model).get_text_config().num_hidden_layers
        title = _title(network.config.get_text_config(), whole, lora, checkpointing, dtype)
        try:
            html.write_text(report.to_html(title), encoding="utf-8")
        except OSError as error:
            raise _cannot_write(html, error) from None
        typer.echo(f"wrote {html}", err=True)


def _writable(file: Path) -> None:
    """Refuse a file that cannot be written before a model is built for it."""
    if not file.parent.is_dir():
        raise _fail(f"cannot write {file}: there is no folder {file.parent}")
    new = not file.exists()
    try:
        file.open("ab").close()
    except OSError as error:
        raise _cannot_write(file, error) from None
    if new:
        file.unlink()


def _cannot_write(file: Path, error: OSError) -> typer.Exit:
    return _fail(f"cannot write {file}: {error.strerror or error}")


def _title(config: Any, whole: int, lora: int, checkpointing: bool, dtype: str) -> str:
    """What the page is of."""
    kept = config.num_hidden_layers
    layers = f"{kept} of {whole} layers" if kept < whole else f"{kept} layers"
    extras = [f"LoRA r={lora}"] * bool(lora) + ["gradient checkpointing"] * checkpointing
    return ", ".join([config.model_type, layers, f"hidden size {config.hidden_size}", *extras, dtype])


@app.command()
def verify(
    model: Annotated[
        Path | None, typer.Argument(help="A transformers config.json, or a folder that holds one.")
    ] = None,
    lora: Lora = 16,
    checkpointing: Checkpointing = False,
    layers: Layers = 2,
    batch: Sequences = 2,
    length: Length = 64,
    dtype: Dtype = "bfloat16",
    residual: Annotated[str, typer.Option(help="Who compiles what is not replaced: inductor, or eager.")] = "inductor",
    bisect: Annotated[bool, typer.Option(help="When something is wrong, find the first wrong rewrite.")] = True,
    variant: Annotated[str, typer.Option(help="op=name: verify this variant of an op, and no model.")] = "",
    imports: Import = None,
    as_json: AsJson = False,
) -> None:
    """Compare a training step compiled by fastft with eager: the loss and every gradient. Exit code 1 if one is wrong.

    The model is built with random weights (norms, biases and adapters too, which start as ones and zeros in training):
    `fastft verify path/to/config.json --lora 8 --layers 2`

    With --variant and no model, compare a variant of an op with its reference. Only a variant that passed is tuned:
    `fastft verify --import my_kernels.py --variant glu=mine`
    """
    import torch

    import fastft

    if variant and model is not None:
        raise _fail(
            f"verify takes a model or --variant, not both: leave out {model}, or compare a model that is compiled with "
            'this variant by fastft.verify(model, batch, options={"variants": ...})'
        )
    _import_variants(imports)
    if variant:
        _verify_variant(variant, as_json)
        return
    if model is None:
        raise _fail("verify needs a model's config.json, or --variant op=name")
    if residual not in ("inductor", "eager"):
        raise _fail(f"--residual is {residual!r}; it is inductor or eager")
    network, data = _network(model, lora, checkpointing, layers, batch, length, dtype)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.dim() == 1:  # a weight of 1 or 0 would not be missed
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif "lora_B" in name:
                parameter.normal_(std=0.02)
    result = fastft.verify(network, **data, options={"residual": residual}, bisect=bisect)
    typer.echo(json.dumps(result.to_dict(), indent=1) if as_json else str(result))
    if not result.ok:
        raise typer.Exit(1)


def _import_variants(modules: list[str] | None) -> None:
    from fastft.autotune import variants

    for one in modules or ():
        try:
            variants.bring(one)
        except ValueError as error:
            raise _fail(f"--import {one}: {error}") from None


def _verify_variant(asked: str, as_json: bool) -> None:
    """Judge a variant at small sizes, called in every way and dtype, print what was found, and keep the verdict."""
    import torch
    from rich.console import Console
    from rich.progress import track

    from fastft.autotune import database, variants
    from fastft.autotune.judging import examine

    op, _, name = asked.partition("=")
    try:
        found = variants.get(op, name)
    except KeyError as error:
        hint = "one of your own is known by --import MODULE_OR_FILE, or by its package's entry point"
        raise _fail(f"--variant {asked}: {error.args[0]}; {hint}") from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bar = Console(stderr=True)  # a GPU's compiler takes a second for each new kernel
    calls = track(examine(found, device=device), f"calling {asked}", console=bar, transient=True, disable=as_json)
    rows = list(calls)
    wrong = [row for row in rows if row.status in ("wrong", "failed")]
    passed = not wrong and any(row.status == "ok" for row in rows)
    lost = variants.note_verified(found, database.device_kind(), passed)
    if as_json:
        cases = [vars(row) for row in rows]
        body = {"variant": asked, "device": device, "ok": passed, "kept": not lost, "cases": cases}
        typer.echo(json.dumps(body, indent=1))
    else:
        _show_verdict(f"variant {name} of {op} on {device}", rows)
        typer.echo(f"It passed, in {len(rows)} calls." if passed else _not_passed(len(wrong), len(rows)))
    if lost:
        typer.echo(
            f"fastft: the verdict could not be kept, so fastft tune goes by what was known before: {lost}", err=True
        )
    if not passed:
        raise typer.Exit(1)


def _not_passed(wrong: int, calls: int) -> str:
    why = f"{wrong} of {calls} calls are not right" if wrong else f"it refuses all {calls} calls"
    return f"It did not pass: {why}. fastft tune will not offer it."


def _show_verdict(title: str, rows: list[Any]) -> None:
    """A table of what was found: one row for all calls of a case that found the same."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left")
    for column in ("case", "status", "inputs", "found"):
        table.add_column(column, overflow="fold")
    together: dict[tuple[str, ...], list[Any]] = {}
    for row in rows:
        # Of calls that are right only the count and the worst is of interest.
        together.setdefault((row.case, row.status, "" if row.status == "ok" else row.what), []).append(row)
    for (case, status, _), same in together.items():
        dtypes: dict[str, list[str]] = {}
        for row in same:
            dtypes.setdefault(row.inputs, []).append(row.dtype)
        if status == "ok":
            shown = f"{len(dtypes)} ways to call it, {len(same)} calls"
            worst = max(row.ratio for row in same)
            what = f"at most {worst:.2f} times PyTorch's error" if worst else "within rounding"
        else:
            shown = "\n".join(f"{way} ({', '.join(of)})" for way, of in dtypes.items())
            what = same[0].what
        table.add_row(*(Text(cell) for cell in (case, status, shown, what)))
    Console().print(table)


@app.command()
def tune(
    model: Annotated[str, typer.Option(help="A config.json, a folder with one, or a name of bench/shapes.py.")] = "",
    ops: Annotated[str, typer.Option(help="Only these ops: rms_norm,glu.")] = "",
    batch: Sequences = 4,
    seq: Annotated[int, typer.Option(min=1, help="Tokens in a sequence.")] = 2048,
    dtype: Dtype = "bfloat16",
    budget: Annotated[float, typer.Option(min=0, help="Begin nothing after so many seconds; 0: no limit.")] = 0.0,
    again: Annotated[bool, typer.Option(help="Also what was tuned before.")] = False,
    listing: Annotated[bool, typer.Option("--list", help="Show what is tuned, and stop.")] = False,
    export: Annotated[Path | None, typer.Option(help="Write what is tuned for --device to a file, and stop.")] = None,
    device: Annotated[str, typer.Option(help="Kind of device for --list and --export; this one's by default.")] = "",
    imports: Import = None,
) -> None:
    """Find the fastest launch configurations for a model's sizes on this GPU. Training takes them from then on.

    What is found is kept at once: stop with Ctrl-C whenever you like, and start again to go on.

    Example: fastft tune --model path/to/config.json --batch 4 --seq 2048 --budget 600
    """
    from fastft.autotune import database

    _import_variants(imports)
    if listing or export is not None:
        _show_tuned(device or database.device_kind(), export)
        return
    if not model:
        raise _fail("tune needs --model: a config.json, a folder with one, or a name of bench/shapes.py")
    if dtype not in ("bfloat16", "float16", "float32"):
        raise _fail(f"--dtype is {dtype!r}; it is bfloat16, float16 or float32")
    from fastft.autotune.cases import cases as cases_of
    from fastft.options import nearest

    cases = cases_of(_fields(model), batch, seq)
    known = dict.fromkeys(case.op for case in cases)
    wanted = [name.strip() for name in ops.split(",") if name.strip()]
    for name in wanted:
        if name not in known:
            raise _fail(f"--ops names {name!r}{nearest(name, known)}; this model has {', '.join(known)}")
    machine = _tuned_device(dtype)
    _tune([case for case in cases if not wanted or case.op in wanted], machine, budget or float("inf"), again)


def _tuned_device(dtype: str) -> Any:
    """The GPU of this machine."""
    import torch

    from fastft.autotune.tuning import GPU

    try:
        return GPU(getattr(torch, dtype))
    except RuntimeError as error:
        raise _fail(str(error)) from None


def _tune(cases: list[Any], machine: Any, budget: float, again: bool) -> None:
    """Tune with a progress bar. SIGTERM ends it as Ctrl-C does: what is done is kept."""
    import signal

    from rich.console import Console
    from rich.progress import Progress, TimeElapsedColumn

    from fastft.autotune.tuning import tune as run
    from fastft.kernels._config import shown

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    counts = {"tuned": 0, "known": 0, "failed": 0}
    try:
        with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=Console(stderr=True)) as bar:
            task = bar.add_task("looking at what is launched", total=len(cases))
            for done in run(
                cases, machine, budget=budget, again=again, reached=lambda n: bar.update(task, completed=n)
            ):
                kernel = done.job.title
                bar.update(task, description=kernel)
                if done.error:
                    counts["failed"] += 1
                    bar.console.print(f"{kernel}: {done.error}", markup=False, soft_wrap=True)
                elif done.record is None:
                    counts["known"] += 1
                else:
                    counts["tuned"] += 1
                    found = done.record
                    best = shown(found["config"]) or found["variant"] or "the heuristic"
                    line = f"{kernel} ({done.job.case.name}): {best}, {found['us']:.1f} µs"
                    line += f"; heuristic {found['heuristic_us']:.1f} µs, noise {100 * found['noise']:.1f} %"
                    typer.echo(f"{line}; {_counted(found)}")
    except KeyboardInterrupt:
        typer.echo(f"Stopped. {counts['tuned']} tuned and kept; the same command goes on from here.", err=True)
        raise typer.Exit(130) from None
    finally:
        signal.signal(signal.SIGTERM, before)
    typer.echo(f"{counts['tuned']} tuned, {counts['known']} known before, {counts['failed']} failed.")
    if counts["failed"]:
        raise typer.Exit(1)


def _counted(found: dict[str, Any]) -> str:
    """What became of a kernel's candidates: how many were timed, failed, and were not tried for which reason."""
    from fastft.autotune.search import SKIPPED

    skipped = [f"{n} {SKIPPED.get(why, why)}" for why, n in found.get("skipped", {}).items()]
    failed = found.get("failed", len(found["failures"]))
    return ", ".join([f"{found['tried']} timed", *([f"{failed} failed"] if failed else []), *skipped])


def _show_tuned(kind: str, export: Path | None) -> None:
    """This user's records, on paper or in a file that can be shipped."""
    from fastft.autotune import database
    from fastft.kernels._config import shown

    if export is not None and not kind:
        raise _fail("--export needs --device (h100, say): there is no GPU here to ask")
    records = {key: r for key, r in database.user_store().items().items() if not kind or key.startswith(f"{kind}/")}
    if export is not None:
        every = len(records)
        records = {key: r for key, r in records.items() if not database.void(key)}
        void = every - len(records)
        left_out = f"; {void} are left out: their kernels were edited since" if void else ""
        if not records:
            raise _fail(f"nothing is tuned for {kind}{left_out}: run `fastft tune --model ...` on one first")
        _writable(export)
        try:
            database.write_file(export, kind, records)
        except OSError as error:
            raise _cannot_write(export, error) from None
        typer.echo(f"{len(records)} records of {kind} are in {export}{left_out}")
        return
    for key, found in sorted(records.items()):
        best = shown(found["config"]) or found["variant"] or "the heuristic"
        typer.echo(f"{key}: {best}, {found['us']:.1f} µs (heuristic {found['heuristic_us']:.1f})")
    typer.echo(f"{len(records)} tuned in {database.user_store().folder}")


def _fields(model: str) -> dict[str, Any]:
    """A model's sizes: of a config.json, or of a name in the repository's list."""
    from fastft.options import nearest

    path = Path(model)
    if path.suffix == ".json" or path.exists():
        file = path / "config.json" if path.is_dir() else path
        try:
            fields = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise _fail(f"{file}: {error.strerror}") from None
        except ValueError as error:
            raise _fail(f"{file} is not JSON: {error}") from None
        fields = fields.get("text_config") or fields
        if missing := [n for n in ("hidden_size", "num_attention_heads", "vocab_size") if n not in fields]:
            raise _fail(f"{file} has no {', '.join(missing)}, so it is no transformers config of a language model")
        return dict(fields)
    folder = Path(__file__).resolve().parent.parent / "bench"
    if not (folder / "shapes.py").is_file():
        raise _fail(
            f"--model {model}: no such file, and names are known in a checkout of the repository only; give a "
            "config.json"
        )
    _import_bench(folder)
    from bench.shapes import MODELS  # type: ignore[import-not-found]

    if model not in MODELS:
        raise _fail(
            f"--model {model}: no such file, and bench/shapes.py has no model {model!r}{nearest(model, MODELS)}; "
            f"it has {', '.join(MODELS)}"
        )
    return dict(MODELS[model])


def _network(
    model: Path, lora: int, checkpointing: bool, layers: int, batch: int, length: int, dtype: str
) -> tuple[Any, dict[str, Any]]:
    """A model in train mode, random weights, as the options of a command ask, and a batch of random tokens."""
    _need("transformers", *(["peft"] if lora else []))
    import torch

    if dtype not in ("bfloat16", "float16", "float32"):
        raise _fail(f"--dtype is {dtype!r}; it is bfloat16, float16 or float32")
    network = _build(_config(model), layers, getattr(torch, dtype))
    if lora:
        from peft import LoraConfig, get_peft_model

        network = get_peft_model(network, LoraConfig(r=lora, target_modules="all-linear", task_type="CAUSAL_LM"))
    if checkpointing:
        network.enable_input_require_grads()
        network.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(network.config.get_text_config().vocab_size, (batch, length), device=network.device)
    return network.train(), {"input_ids": ids, "labels": ids}


def _config(path: Path) -> Any:
    """The transformers config in a folder or a JSON file."""
    from transformers import AutoConfig

    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise _fail(
            f"there is no {file}. Give a config.json or a folder with one; a model's name on a hub is not looked up"
        )
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        return AutoConfig.for_model(fields.pop("model_type"), **fields)
    except json.JSONDecodeError as error:
        raise _fail(f"{file} is not JSON: {error}") from None
    except (KeyError, AttributeError, TypeError):
        raise _fail(f"{file} has no model_type, so it is no transformers config") from None
    except ValueError as error:
        raise _fail(f"this transformers cannot read {file}: {str(error).splitlines()[0]}") from None


def _build(config: Any, layers: int, dtype: Any) -> Any:
    """The causal language model of ``config``, random weights, cut to ``layers`` layers (0: all), on a GPU if any."""
    import torch
    from transformers import AutoModelForCausalLM

    text = config.get_text_config()
    whole = text.num_hidden_layers
    if layers and layers < whole:
        for key, value in list(vars(text).items()):  # one entry for each layer: layer_types and its like
            if isinstance(value, list) and len(value) == whole:
                setattr(text, key, value[:layers])
        text.num_hidden_layers = layers
        typer.echo(f"{layers} of {whole} layers (--layers 0: all)", err=True)
    text.use_cache = False  # as trainers do
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        try:
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
        except ValueError as error:
            raise _fail(str(error).splitlines()[0]) from None


def _need(*libraries: str, extra: str = "train") -> None:
    import importlib.util

    missing = [name for name in libraries if importlib.util.find_spec(name) is None]
    if missing:
        raise _fail(f"this needs {', '.join(missing)}: pip install 'fastft[{extra}]'")


def main() -> None:
    """Entry point of the console script."""
    app()
