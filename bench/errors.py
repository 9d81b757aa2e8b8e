"""How exact fastft is, measured: errors of gradients in whole models, and of every op alone, beside PyTorch's own.

    python bench/errors.py model --out errors.json      LoRA, NF4 LoRA and full fine-tuning; fastft and Inductor
    python bench/errors.py ops --out ops.json           every op, each dtype

An error is ``‖value − exact‖ / ‖exact‖``, and what is reported is its ratio to the error that eager PyTorch makes in
the same dtype on the same inputs: below 1, closer to the truth than eager.

``model``: a Llama (4 layers, 2048 wide, by default) with random weights, loaded by stock code as ``bench/train.py``
loads it, without checkpointing; norm weights are drawn around 1, and LoRA's B is random, since at its usual zero A has
no gradient. The forward runs under bf16 autocast. Each seed draws these and the tokens anew. The exact step is the
model's own code in fp32 (``fastft.verifying``). A ratio is taken for every gradient tensor and seed, and none is left
out. ``pooled`` is the same ratio of errors in root mean square over the seeds, which leaves less of it to chance.

``ops``: the op, and its reference's formula in the op's own dtype by eager PyTorch, both against the reference in fp64
(fp32 where NF4 has no other), at the sizes of Llama-3.1-8B.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Run as a script, Python puts bench/ first on the path, where kernels.py would pass for the Hub's package of that name.
if __name__ == "__main__":
    sys.path[0] = str(ROOT)
from bench.implementations import QUIET, load_stock, say  # noqa: E402
from bench.running import device_info, measured_commit, package_versions  # noqa: E402
from bench.setting import Setup, one_of  # noqa: E402
from bench.shapes import MODELS  # noqa: E402
from bench.train import option, write  # noqa: E402

if __name__ == "__main__":
    del sys.path[0]

SCHEMA = 1
#: name → ``--quant`` and ``--train`` of ``bench/train.py``.
SETTINGS = {"lora": ("bf16", "lora"), "nf4": ("nf4", "lora"), "full": ("bf16", "full")}
IMPLS = ("fastft", "inductor")
#: The architecture whose layers these are; sizes come from the command line.
MODEL = "llama-1b"


# -- whole models ------------------------------------------------------------------------------------------------------


def config_of(layers: int, hidden: int, vocab: int) -> dict[str, Any]:
    """The fields of a Llama config of these sizes: heads of 64 (at least four heads), four query heads a key head."""
    heads = max(4, hidden // 64)
    return {
        **MODELS[MODEL],
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": hidden * 11 // 4,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 4,
        "head_dim": hidden // heads,
        "vocab_size": vocab,
    }


def load(setting: str, fields: dict[str, Any]) -> Any:
    """A model with random bf16 weights, saved and loaded again as stock code does it for ``setting``."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    quant, trained = SETTINGS[setting]
    fields = dict(fields)
    config = AutoConfig.for_model(
        fields.pop("model_type"), **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None, **fields}
    )
    torch.manual_seed(0)
    setup = Setup(impl="eager", model=MODEL, quant=quant, train=trained, checkpointing=False)
    with tempfile.TemporaryDirectory() as folder:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        return load_stock(setup, Path(folder))


def draw(model: Any, seed: int, batch: int, seq: int) -> dict[str, Any]:
    """Random norm weights and adapters into ``model``; a batch of random tokens."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = (
                torch.randn(parameter.shape, generator=generator) if parameter.dim() == 1 or "lora_" in name else None
            )
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.1 * noise)
            elif noise is not None:  # x Aᵀ keeps x's scale; the adapter adds about a tenth of what its layer gives
                parameter.copy_(noise * (parameter.shape[1] ** -0.5 if "lora_A" in name else 0.02))
    ids = torch.randint(4, model.config.vocab_size, (batch, seq), generator=generator).to(model.device)
    return {"input_ids": ids, "labels": ids}


def kind_of(name: str) -> str:
    """``…layers.3.self_attn.q_proj.lora_A.default.weight`` → ``q_proj.lora_A``."""
    words = [w for w in name.split(".") if w not in ("weight", "default")]
    return ".".join(words[-2:]) if words[-1].startswith("lora_") else words[-1]


def error_of(found: Any, exact: Any) -> float:
    """``fastft.compare.relative_error`` where the tensors are: a head's gradient is long in coming to the CPU."""
    e = exact.double()
    norm, size = float(e.norm()), float((found.double() - e).norm())
    return size / norm if norm else 0.0 if size == 0.0 else float("inf")


def compiled(model: Any, impl: str, options: dict[str, Any]) -> Callable[..., Any]:
    import torch

    if impl == "inductor":
        return torch.compile(model)
    return torch.compile(model, backend="fastft", options=options or None)


def measure(setting: str, a: argparse.Namespace, result: dict[str, Any]) -> None:
    """Errors of every gradient for each seed, into ``result`` as they come."""
    import torch

    from fastft import reporting
    from fastft.verifying import TrainingStep

    model = load(setting, config_of(a.layers, a.hidden, a.vocab))
    device = model.device.type
    calls = {"eager": model, **{impl: compiled(model, impl, dict(a.options)) for impl in a.impls}}
    result["loss"] = {name: [] for name in calls}
    errors: dict[str, dict[str, list[float]]] = {}
    for seed in range(a.seeds):
        one = TrainingStep(model, kwargs=draw(model, seed, a.batch, a.seq))
        exact = one.exact()
        for name, call in calls.items():
            start = time.perf_counter()

            def autocast(call: Callable[..., Any] = call, **batch: Any) -> Any:
                with torch.autocast(device, dtype=torch.bfloat16):
                    return call(**batch)

            found = one.run(autocast)
            for value, tensor in found.items():
                error = error_of(tensor, exact[value])
                if value == "loss":
                    result["loss"][name].append(error)
                else:
                    errors.setdefault(value, {}).setdefault(name, []).append(error)
            del found
            say(f"{setting}, seed {seed}, {name}: {time.perf_counter() - start:.1f} s")
    result["trained"] = {"tensors": len(one.trained), "parameters": sum(p.numel() for p in one.trained.values())}
    result["exact"] = str(one.wide).removeprefix("torch.")
    result["replaced"] = {k: v for report in reporting.reports() for k, v in report.counts.items()}
    result["gradients"] = [
        {"name": name, "elements": one.trained[name].numel(), "errors": each} for name, each in errors.items()
    ]
    result["ratios"] = {impl: summary(errors, impl) for impl in a.impls}


def summary(errors: dict[str, dict[str, list[float]]], impl: str) -> dict[str, Any]:
    """Median and worst ratio of ``impl``'s errors to eager's, over all gradients and by kind of parameter."""

    def figures(names: Sequence[str]) -> dict[str, Any]:
        each = {n: [_ratio(f, e) for f, e in zip(errors[n][impl], errors[n]["eager"], strict=True)] for n in names}
        pooled = [_ratio(_rms(errors[n][impl]), _rms(errors[n]["eager"])) for n in names]
        worst = max(each, key=lambda n: max(each[n]))
        return {
            "count": sum(map(len, each.values())),
            "median": statistics.median(r for ratios in each.values() for r in ratios),
            "worst": max(each[worst]),
            "worst_of": worst,
            "over_1.05": sum(r > 1.05 for ratios in each.values() for r in ratios),
            "pooled_median": statistics.median(pooled),
            "pooled_worst": max(pooled),
            "eager_error": statistics.median(e for n in names for e in errors[n]["eager"]),
        }

    kinds: dict[str, list[str]] = {}
    for name in errors:
        kinds.setdefault(kind_of(name), []).append(name)
    return {**figures(list(errors)), "kinds": {kind: figures(names) for kind, names in kinds.items()}}


def _ratio(error: float, eager: float) -> float:
    return error / eager if eager else 1.0 if error == 0.0 else float("inf")


def _rms(values: Sequence[float]) -> float:
    return statistics.fmean(v * v for v in values) ** 0.5


def run_models(a: argparse.Namespace) -> dict[str, Any]:
    """All settings: a process each, side by side, since most of their time is compiling. What has ended is in ``--out``
    at once, so that a time limit costs no more than what has not.
    """
    if len(a.settings) == 1:
        return {**_head("model", a), "rows": [run_setting(a.settings[0], a)]}
    with tempfile.TemporaryDirectory() as folder:
        files = {setting: Path(folder) / f"{setting}.json" for setting in a.settings}
        script = str(Path(__file__).resolve())
        processes = {
            setting: subprocess.Popen(
                [sys.executable, script, *_again(a, setting), "--out", str(file)], stdout=sys.stderr
            )
            for setting, file in files.items()
        }
        rows = {setting: {"setting": setting, "status": "failed", "error": "stopped"} for setting in a.settings}
        result = {**_head("model", a), "rows": list(rows.values())}
        while processes:
            for setting, process in list(processes.items()):
                if (code := process.poll()) is None:
                    continue
                del processes[setting]
                rows[setting]["error"] = f"the process ended with code {code}"
                if files[setting].exists():
                    rows[setting] = json.loads(files[setting].read_text())["rows"][0]
                result["rows"] = list(rows.values())
                write(result, a.out)
            time.sleep(0.2)
    return result


def run_setting(setting: str, a: argparse.Namespace) -> dict[str, Any]:
    """One setting in this process. A failure is a result too: ``status`` ``failed``, and ``error``."""
    result: dict[str, Any] = {"setting": setting, "status": "failed", "error": None}
    try:
        measure(setting, a, result)
        result["status"] = "ok"
    except Exception as error:
        import traceback

        result["error"] = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    return result


def _again(a: argparse.Namespace, setting: str) -> list[str]:
    """The command line that runs one setting of this one."""
    sizes = [w for k in ("layers", "hidden", "vocab", "batch", "seq", "seeds") for w in (f"--{k}", str(getattr(a, k)))]
    options = [w for k, v in a.options for w in ("--options", f"{k}={v}")]
    return ["model", "--settings", setting, "--impls", ",".join(a.impls), *sizes, *options, "--device", a.device]


def _head(command: str, a: argparse.Namespace) -> dict[str, Any]:
    setup = {k: v for k, v in vars(a).items() if k not in ("command", "out")}
    return {
        "schema": SCHEMA,
        "command": command,
        "setup": setup,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": measured_commit(),
        "device": device_info(),
        "versions": package_versions(),
    }


def model_tables(result: dict[str, Any]) -> list[Any]:
    """``rich`` tables: all kinds of parameter, then a short one with a row for each setting and implementation."""
    from rich.table import Table

    a = result["setup"]
    sizes = f"{a['layers']} layers of {a['hidden']}, {a['batch']}×{a['seq']} tokens, {a['seeds']} seeds"
    title = f"gradient errors over eager's: {sizes}, {result['device']['name']}"
    figures = ("median", "worst", "pooled_worst")
    kinds = Table(title=title, title_justify="left")
    short = Table(title=title, title_justify="left")
    for column in ("setting", "gradients", "count", "eager's error"):
        kinds.add_column(column)
    for impl in a["impls"]:
        for figure in figures:
            kinds.add_column(f"{impl} {figure.replace('_', ' ')}", justify="right")
    for column in (
        "setting",
        "of",
        "median",
        "worst",
        "gradient",
        "over 1.05",
        "pooled worst",
        "loss error",
        "eager's",
    ):
        short.add_column(column)
    for row in result["rows"]:
        if row["status"] != "ok":
            short.add_row(row["setting"], f"failed: {row['error']}")
            continue
        each = [row["ratios"][impl] for impl in a["impls"]]
        for kind in each[0]["kinds"]:
            of = [r["kinds"][kind] for r in each]
            cells = [f"{r[figure]:.3f}" for r in of for figure in figures]
            kinds.add_row(row["setting"], kind, str(of[0]["count"]), f"{of[0]['eager_error']:.1e}", *cells)
        kinds.add_section()
        for impl, r in row["ratios"].items():
            over = f"{r['over_1.05']} of {r['count']}"
            losses = [f"{max(row['loss'][name]):.1e}" for name in (impl, "eager")]
            ratios = (f"{r['median']:.3f}", f"{r['worst']:.3f}", r["worst_of"].removesuffix(".weight"), over)
            short.add_row(row["setting"], impl, *ratios, f"{r['pooled_worst']:.3f}", *losses)
    return [kinds, short]


# -- ops ---------------------------------------------------------------------------------------------------------------


#: Arguments that are no one's to train, in any setting.
CONSTANT = {"cos", "sin", "dense", "packed", "absmax", "absmax_code", "absmax_offset", "absmax2"}


def op_values(fn: Callable[..., Any], arguments: dict[str, Any], trained: Sequence[bool]) -> list[Any]:
    """What ``fn`` returns, and the gradients of those of the arguments' leaves that are ``trained``, from the same
    random gradients of the outputs at every call.
    """
    import torch
    from torch.utils._pytree import tree_flatten, tree_unflatten

    flat, tree = tree_flatten(arguments)
    flat = [x.detach().requires_grad_() if t else x for x, t in zip(flat, trained, strict=True)]
    out = fn(**tree_unflatten(flat, tree))
    outs = [o for o in (out if isinstance(out, tuple) else (out,)) if o.numel() and o.is_floating_point()]
    ends = [o for o in outs if o.requires_grad]
    generator = torch.Generator(outs[0].device).manual_seed(1)
    # Rounded to bf16, so that they are the same numbers in every dtype; and laid out as the output is, as a model's are
    # (with other strides than the output's cuDNN's gradients were wrong, torch 2.11).
    normal = [torch.randn(o.shape, generator=generator, device=o.device).bfloat16() for o in ends]
    seeds = [torch.empty_like(o).copy_(values) for o, values in zip(ends, normal, strict=True)]
    wanted = [x for x, t in zip(flat, trained, strict=True) if t]
    return [*(o.detach() for o in outs), *(torch.autograd.grad(ends, wanted, seeds) if wanted else ())]


def op_cases(a: argparse.Namespace) -> Iterator[tuple[str, Any, Any]]:
    """(op, its maker, shape) of Llama-3.1-8B, at ``--seq`` tokens; of another model where that has none; on a CPU the
    tests' small ones.
    """
    import torch

    from bench import kernels

    for name, op in kernels.OPS.items():
        for maker in kernels.makers(op).values():
            if getattr(maker, "__name__", "").endswith("_nf4"):  # on what nf4_dequantize gives: both are here
                continue
            shapes = functools.partial(kernels.shapes_of, op)
            if torch.cuda.is_available():
                found = shapes(model="llama-3.1-8b", tag="primary") or shapes(tag="primary")[:1]
                sizes = {"batch": 1, "seq": a.seq}
                found = [
                    dataclasses.replace(s, dims={k: sizes.get(k, v) for k, v in s.dims.items()})
                    for s in found[: a.shapes]
                ]
            else:
                found = [s for s in shapes(tag="test") if s.get("activation", "silu") == "silu"][: a.shapes]
            yield from ((name, maker, shape) for shape in found)


def op_rows(name: str, case: Any, dtype: Any) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(what is trained, every output's and gradient's errors) of one call: as LoRA trains, then with all weights."""
    import inspect

    import torch
    from torch.utils._pytree import tree_flatten_with_path, tree_map

    from bench import kernels

    op = kernels.OPS[name]
    arguments = inspect.signature(op.call).bind(*case.args, **case.kwargs).arguments
    quantised = name == "nf4_dequantize"  # its scales are fp32 by definition; what it gives has a dtype

    def cast(*to: torch.dtype) -> dict[str, Any]:
        def one(x: Any) -> Any:
            if isinstance(x, torch.Tensor) and x.is_floating_point() and not quantised:
                for dtype in to:
                    x = x.detach().to(dtype)
            return to[-1] if isinstance(x, torch.dtype) else x

        return tree_map(one, dict(arguments))

    leaves = [(path[0].key, x) for path, x in tree_flatten_with_path(dict(arguments))[0]]
    wanted = {id(t) for t in case.wanted}
    frozen = [id(x) in wanted for _, x in leaves]
    constant = CONSTANT | ({"weight"} if name == "lora_stack" else set())  # whose weights are frozen
    everything = [isinstance(x, torch.Tensor) and x.is_floating_point() and key not in constant for key, x in leaves]
    settings = {"weights frozen" if frozen != everything else "": frozen, "weights trained": everything}
    for what, trained in list(settings.items())[: 1 if frozen == everything else 2]:
        ours = op_values(op.call, cast(dtype), trained)
        theirs = op_values(op.stock or op.reference, cast(dtype), trained)
        exact = op_values(op.reference, cast(dtype, torch.float32 if quantised else torch.float64), trained)
        labels = [f"output {i}" for i in range(len(ours) - sum(trained))]
        labels += [f"d {key}" for (key, _), t in zip(leaves, trained, strict=True) if t]
        values = []
        for label, f, e, x in zip(labels, ours, theirs, exact, strict=True):
            error, eager = error_of(f, x), error_of(e, x)
            values.append({"value": label, "error": error, "eager": eager, "ratio": _ratio(error, eager)})
        yield what, values


def run_ops(a: argparse.Namespace) -> dict[str, Any]:
    """Rows of (op, dtype, what is trained): the ratio of every output and gradient, over the op's shapes."""
    import torch

    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for name, maker, shape in op_cases(a):
        torch.manual_seed(0)
        case = maker(shape)
        for dtype in a.dtypes:
            start = time.perf_counter()
            for what, values in op_rows(name, case, getattr(torch, dtype)):
                found.setdefault((name, dtype, what), []).extend({"shape": str(shape), **v} for v in values)
            say(f"{name}, {shape}, {dtype}: {time.perf_counter() - start:.1f} s")
    rows = []
    for (name, dtype, what), values in found.items():
        worst = max(values, key=lambda v: v["ratio"])
        median = statistics.median(v["ratio"] for v in values)
        figures = {"count": len(values), "median": median, "worst": worst["ratio"], "worst_of": worst["value"]}
        rows.append({"op": name, "dtype": dtype, "trained": what, **figures, "values": values})
    return {**_head("ops", a), "rows": rows}


def ops_table(result: dict[str, Any]) -> Any:
    """A ``rich`` table, one row for each op, dtype and what is trained."""
    from rich.table import Table

    shown = Table(title=f"errors of ops over PyTorch's, {result['device']['name']}", title_justify="left")
    for column in ("op", "dtype", "trained", "values", "PyTorch's error", "median", "worst", "of"):
        shown.add_column(column, justify="left" if column in ("op", "dtype", "trained", "of") else "right")
    for r in result["rows"]:
        eager = statistics.median(v["eager"] for v in r["values"])
        figures = (str(r["count"]), f"{eager:.1e}", f"{r['median']:.3f}", f"{r['worst']:.3f}", r["worst_of"])
        shown.add_row(r["op"], r["dtype"], r["trained"], *figures)
    return shown


# -- command line ------------------------------------------------------------------------------------------------------


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench/errors.py", description=(__doc__ or "").split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    model = commands.add_parser("model", help="gradients of whole models")
    model.add_argument("--settings", type=_words, default=list(SETTINGS), help=f"of {','.join(SETTINGS)} (default all)")
    model.add_argument("--impls", type=_words, default=list(IMPLS), help=f"of {','.join(IMPLS)} (default both)")
    sizes = {"layers": 4, "hidden": 2048, "vocab": 32000, "batch": 2, "seq": 512, "seeds": 16}
    for name, default in sizes.items():
        model.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    model.add_argument("--options", type=option, action="append", default=[], metavar="KEY=VALUE", help="for fastft")
    ops = commands.add_parser("ops", help="outputs and gradients of every op")
    ops.add_argument("--dtypes", type=_words, default=["bfloat16", "float16"], help="default bfloat16,float16")
    ops.add_argument("--seq", type=int, default=1024, help="tokens on a GPU (default 1024)")
    ops.add_argument("--shapes", type=int, default=2, help="most shapes of an op (default 2)")
    for command in (model, ops):
        command.add_argument("--device", default="", help="cpu: leave the GPU alone (default: a GPU if there is one)")
        command.add_argument("--out", type=Path, default=None, help="JSON file")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 if all was measured, 1 if something failed, 2 for arguments that cannot be."""
    parser = _parser()
    a = parser.parse_args(argv)
    try:
        if a.device not in ("", "cpu", "cuda"):
            raise ValueError(f"--device is {a.device!r}; it is cpu or cuda")
        for name, known in (("settings", SETTINGS), ("impls", IMPLS)) if a.command == "model" else ():
            for word in getattr(a, name):
                one_of(f"--{name}", word, known)
        for word in a.dtypes if a.command == "ops" else ():
            one_of("--dtypes", word, ("bfloat16", "float16", "float32"))
    except ValueError as error:
        parser.error(str(error))
    os.environ.update(QUIET)
    if a.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    result = run_models(a) if a.command == "model" else run_ops(a)
    write(result, a.out)
    from rich.console import Console

    console = Console(width=150)
    for table in model_tables(result) if a.command == "model" else [ops_table(result)]:
        console.print(table)
    return 0 if all(row.get("status", "ok") == "ok" for row in result["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
