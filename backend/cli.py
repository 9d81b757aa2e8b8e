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
    # By its path: with the repository on Python's, its folder kernels/ would pass for the Hub's package of that name.
    if "bench" not in sys.modules:
        import importlib.util

        path = folder / "__init__.py"
        spec = importlib.util.spec_from_file_location("bench", path, submodule_search_locations=[str(folder)])
        assert spec is not None and spec.loader is not None
        sys.modules["bench"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["bench"])
    from bench.cli import main as run  # type: ignore[import-not-found]

    if code := run(context.args):
        raise typer.Exit(code)


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


@app.command()
def explain(
    model: Model,
    lora: Lora = 16,
    checkpointing: Checkpointing = False,
    layers: Layers = 2,
    batch: Sequences = 2,
    length: Length = 64,
    dtype: Dtype = "bfloat16",
    html: Html = None,
    as_json: AsJson = False,
) -> None:
    """Say what fastft would replace in a model, and what not, and why.

    The model is built with random weights and run once; nothing is trained or downloaded.
    """
    import fastft

    if html is not None:
        _writable(html)
    network, data = _network(model, lora, checkpointing, layers, batch, length, dtype)
    report = fastft.explain(network, **data)
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
    model: Model,
    lora: Lora = 16,
    checkpointing: Checkpointing = False,
    layers: Layers = 2,
    batch: Sequences = 2,
    length: Length = 64,
    dtype: Dtype = "bfloat16",
    residual: Annotated[str, typer.Option(help="Who compiles what is not replaced: inductor, or eager.")] = "inductor",
    bisect: Annotated[bool, typer.Option(help="When something is wrong, find the first wrong rewrite.")] = True,
    as_json: AsJson = False,
) -> None:
    """Compare a training step compiled by fastft with eager: the loss and every gradient. Exit code 1 if one is wrong.

    The model is built with random weights (norms, biases and adapters too, which start as ones and zeros in training).
    """
    import torch

    import fastft

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
