"""Training steps of one implementation in one process, and several implementations beside each other.

    python bench/train.py run --impl fastft --model llama-3.1-8b --quant nf4 --out fastft.json
    python bench/train.py compare --impls eager,inductor,unsloth,fastft --model llama-3.1-8b --quant nf4 --out all.json
    python bench/train.py compare --impls unsloth_xformers unsloth:data=padded fastft --data packed --batch 1 --seq 8192
    python bench/train.py compare --trainer sft --impls eager,fastft --model llama-3.2-1b --quant bf16 --out sft.json

What a row means: an architecture of ``bench/shapes.py`` with random weights, read by every implementation from the same
checkpoint folder. NF4 is bitsandbytes' nf4 with double quantisation and bf16 compute. LoRA sits on every linear of the
decoder layers (alpha 16, dropout 0, PEFT's fp32 adapters). A step is
``loss = model(input_ids=x, labels=x).loss; loss.backward(); optimizer.step()`` on fresh random tokens, with fused AdamW
(``--optimizer adamw8bit``: bitsandbytes', its state in 8 bits) on what is trained and the forward under bf16 autocast
(what ``Trainer(bf16=True)`` does). Checkpointing is
``gradient_checkpointing_enable(use_reentrant=False)``; for Unsloth its own, ``use_gradient_checkpointing="unsloth"``.
``--train full`` trains bf16 weights with bf16 optimizer state.

``--data``: ``full`` rows of tokens; or documents of 512 ± 256 tokens (``--document``; :func:`documents`) that fill as
many tokens, which see nothing of each other, in the form ``packed``, rows of them with ``position_ids`` that begin
again at each, as TRL packs them, or ``padded``, a row for each with an ``attention_mask``. A seed gives the same
documents in both forms and the same real tokens in all three: tokens/s are of real tokens, and losses are comparable.
Shapes stay as they are from step to step: a row's documents come in another order, with fresh tokens.
``--lengths random``: full rows of another length in each step, drawn by the seed from a quarter of ``--seq`` to all of
it; tokens/s are those of all measured steps over their time, and a result says how many graphs there were after each.
``--tokens``: ``uniform``, where there is nothing to learn; ``zipf``, where the n-th id is n times as rare as the first,
and a loss falls.

With ``--trainer sft`` TRL's ``SFTTrainer`` does the steps, by its own loop, loss and defaults (clipped gradients among
them), and an implementation is no more than ``SFTConfig(torch_compile_backend=...)``: ``eager`` is stock TRL. A step's
time goes from the trainer's ``on_step_begin`` to its ``on_step_end``.

Only stock code is driven here: nothing of fastft but ``backend="fastft"`` and its report. Times are wall clock between
device synchronisations; the peak is ``torch.cuda.max_memory_allocated`` over the measured steps (None on a CPU).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Run as a script, Python puts bench/ first on the path, where kernels.py would pass for the Hub's package of that name.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from bench.implementations import GIB, IMPLEMENTATIONS, QUIET, checkpoint, checkpoint_root, say, write_checkpoint
from bench.running import SCHEMA, measured_commit, milliseconds, run, tokens_per_s
from bench.setting import Setup, one_of
from bench.shapes import MODELS

if __name__ == "__main__":
    del sys.path[0]

# -- several beside each other -----------------------------------------------------------------------------------------

#: Seconds that a run has for its report and its end, of those that it was given; and for a step more, looked at.
ENDING, LOOKING = 8.0, 30.0


def run_apart(
    arguments: Sequence[str], impl: str, *, peers: str | None, caches: Path, timeout: float, log: Any
) -> dict[str, Any]:
    """One run in a process and with compiler caches of its own, which begins no step that would end after ``timeout``
    s, and is killed then. A failure is a result.
    """
    out = caches / "result.json"
    out.unlink(missing_ok=True)
    environment = {**os.environ, **QUIET, **{k: str(caches / v) for k, v in CACHES.items()}, "PYTHONUNBUFFERED": "1"}
    # A container's NVIDIA_VISIBLE_DEVICES alone makes Unsloth compile with a single worker.
    environment.setdefault("CUDA_VISIBLE_DEVICES", "0")
    if impl.partition(":")[0] != "fastft":
        environment["FASTFT_AUTOLOAD"] = "0"
    if peers and IMPLEMENTATIONS[impl.partition(":")[0]].peer:
        environment["PYTHONPATH"] = peers
    command = [sys.executable, str(Path(__file__).resolve()), "run", *arguments, "--out", str(out)]
    looks = LOOKING * len({"--profile", "--timeline"} & set(arguments))
    command += ["--seconds", str(timeout - ENDING - looks)]
    failed = {"schema": SCHEMA, "impl": impl, "status": "failed", "argv": command}
    if timeout < 5:
        return {**failed, "error": "not started: the time of this comparison (--budget) is used up"}
    print(f"\n===== {impl} =====", file=log, flush=True)
    # A session of its own, so that compile workers go with it.
    process = subprocess.Popen(
        command, cwd=caches, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        code = process.wait(timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return {**failed, "error": f"timed out after {timeout:.0f} s"}
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    if out.exists():
        return {**json.loads(out.read_text()), "impl": impl}
    return {**failed, "error": f"the process ended with code {code} and wrote no result; its output is in the log"}


#: Caches that a run fills, as environment variable → folder: fresh ones make the first step a cold one.
CACHES = {
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "UNSLOTH_COMPILE_LOCATION": "unsloth",
    "XDG_CACHE_HOME": "xdg",
}


def compare(
    specs: Sequence[str],
    arguments: Sequence[str],
    *,
    model: str,
    root: Path,
    rounds: int = 1,
    baseline: str | None = None,
    peers: str | None = None,
    timeout: float = 300.0,
    budget: float = 3600.0,
    log: Any = sys.stderr,
    save: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:
    """Run ``specs`` (see :func:`chosen`) ``rounds`` times, interleaved; merge each one's rounds.

    The first round of an implementation starts with empty compiler caches, so its first step is a cold one; later
    rounds keep them. ``budget`` seconds hold for all runs together, ``timeout`` for each. ``save`` is called after
    every run with what there is so far: what a comparison that is cut short leaves behind.
    """
    for spec in specs:
        one_of("--impls", spec.partition(":")[0], IMPLEMENTATIONS)
    baseline = baseline or specs[0]
    one_of("--baseline", baseline, specs)
    deadline = time.monotonic() + budget
    checkpoint(model, root)
    results: dict[str, list[dict[str, Any]]] = {spec: [] for spec in specs}
    with tempfile.TemporaryDirectory(prefix="fastft-bench-") as scratch:
        for round_ in range(rounds):
            for i, spec in enumerate(specs):
                caches = Path(scratch) / str(i)
                caches.mkdir(exist_ok=True)
                name, data, options = chosen(spec)
                own = [*(["--data", data] if data else []), *(w for option in options for w in ("--options", option))]
                say(f"round {round_ + 1} of {rounds}: {spec}")
                result = run_apart(
                    ["--impl", name, "--model", model, "--checkpoints", str(root), *arguments, *own],
                    spec,
                    peers=peers,
                    caches=caches,
                    timeout=min(timeout, deadline - time.monotonic()),
                    log=log,
                )
                say(f"{spec}: {_in_short(result)}")
                results[spec].append(result)
                save(compared(results, rounds, baseline))
    return compared(results, rounds, baseline)


def chosen(spec: str) -> tuple[str, str | None, list[str]]:
    """``name`` or ``name:key=value;key=value`` → the name, its own form of the data (``data=padded``) or None for that
    of all, options for ``torch.compile``.
    """
    name, _, words = spec.partition(":")
    options = [word for word in words.split(";") if word]
    data = [word.removeprefix("data=") for word in options if word.startswith("data=")]
    return name, data[-1] if data else None, [word for word in options if not word.startswith("data=")]


def compared(
    results: dict[str, list[dict[str, Any]]], rounds: int, baseline: str, said: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What :func:`compare` returns, of its runs so far. ``said``: a file whose commit and arguments these are."""
    rows = [merge(spec, runs) for spec, runs in results.items() if runs]
    base = next((r for r in rows if r["impl"] == baseline), {})
    for row in rows:
        row["speed_ratio"] = _ratio(row.get("tokens_per_s"), base.get("tokens_per_s"))
        row["peak_ratio"] = _ratio(row.get("peak_bytes"), base.get("peak_bytes"))
    good = [r for r in rows if r["status"] == "ok"]
    said = said or {"schema": SCHEMA, "commit": measured_commit(), "argv": sys.argv}
    return {
        "schema": said["schema"],
        "device": next((run["device"] for r in good for run in r["runs"] if "device" in run), None),
        "commit": said.get("commit"),
        "argv": said.get("argv"),
        "rounds": rounds,
        "baseline": baseline,
        "rows": rows,
    }


def _in_short(result: dict[str, Any]) -> str:
    if result["status"] != "ok":
        return f"failed: {result['error']}"
    speed, peak = f"{result['tokens_per_s']:.0f} tokens/s", f"{gib(result.get('peak_bytes'))} GiB"
    return f"{speed}, {peak}, first step {result['first_step_s']:.1f} s"


def merge(impl: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row from an implementation's rounds: all steps together, the largest peak, the first step cold and warm."""
    good = [r for r in runs if r["status"] == "ok"]
    row: dict[str, Any] = {"impl": impl, "status": "ok" if good else "failed", "runs": list(runs)}
    row["error"] = next((r["error"] for r in runs if r["status"] != "ok"), None)
    row["cut_short"] = next((r["cut_short"] for r in good if "cut_short" in r), None)
    if good:
        setup = good[0]["setup"]
        row["data"] = good[0].get("data")
        row["step_ms"] = milliseconds([t for r in good for t in r["step_ms"]["all"]])
        row["tokens_per_s"] = tokens_per_s(good, setup["batch"] * setup["seq"])
        row["graphs"], row["triton"] = good[0].get("graphs"), good[0].get("triton")
        peaks = [r["peak_bytes"] for r in good if r["peak_bytes"] is not None]
        row["peak_bytes"] = max(peaks) if peaks else None
        row["first_step_s"] = good[0]["first_step_s"]
        row["first_step_warm_s"] = min((r["first_step_s"] for r in good[1:]), default=None)
        row["loss_first"], row["loss_last"] = good[0]["loss"][0], good[0]["loss"][-1]
    return row


def _ratio(value: float | None, base: float | None) -> float | None:
    return round(value / base, 4) if value and base else None


def gib(size: int | None) -> str:
    return f"{size / GIB:.2f}" if size else "–"


def tokens_of(setup: dict[str, Any]) -> str:
    """``4×2048 tokens`` (random lengths: ``4×512 to 2048 tokens``); and of what documents, if any."""
    if setup["data"] == "full":
        least = f"{max(setup['seq'] // 4, 1)} to " if setup["lengths"] == "random" else ""
        return f"{setup['batch']}×{least}{setup['seq']} tokens"
    mean, half = setup["document"], setup["document"] // 2
    return f"{setup['batch']}×{setup['seq']} real tokens in documents of {mean} ± {half}"


def optimizer_of(setup: dict[str, Any]) -> str:
    """``, AdamW in 8 bits``; empty where it is the usual one."""
    return ", AdamW in 8 bits" if setup["optimizer"] == "adamw8bit" else ""


def input_of(row: dict[str, Any]) -> str:
    """``packed 1×8192``: the form and the shape of what an implementation got; empty where rows are full."""
    data = row.get("data")
    if not data or data["form"] == "full":
        return ""
    return f"{data['form']} {'×'.join(map(str, data['shape']))}"


def graphs_of(row: dict[str, Any]) -> str:
    """``2, from step 2 on``: where lengths are random, how many graphs there are in the end and since when, else
    empty.
    """
    found = row.get("graphs") if any("lengths" in run for run in row["runs"]) else None
    return f"{found[-1]}, from step {found.index(found[-1]) + 1} on" if found else ""


def late_of(row: dict[str, Any]) -> str:
    """``4 in 5.0 s``: where lengths are random, what Triton compiled behind the third step, else empty."""
    found = row.get("triton") if any("lengths" in run for run in row["runs"]) else None
    return f"{sum(found['kernels'][3:])} in {sum(found['seconds'][3:]):.1f} s" if found else ""


def table(compared: dict[str, Any], title: str) -> Any:
    """A ``rich`` table of what :func:`compare` returned, with what failed and what was cut short under it."""
    from rich.markup import escape
    from rich.table import Table

    said = ((r["impl"], r[key]) for r in compared["rows"] for key in ("error", "cut_short") if r.get(key))
    errors = [f"{impl}: {' '.join(str(what).split())[:300]}" for impl, what in said]
    told = any(input_of(row) for row in compared["rows"])
    counted = any(graphs_of(row) for row in compared["rows"])
    shown = Table(title=title, title_justify="left", caption=escape("\n".join(errors)) or None, caption_justify="left")
    ratios = (f"speed / {compared['baseline']}", f"peak / {compared['baseline']}")
    for column in (
        "implementation",
        *(["input"] if told else []),
        "tokens/s",
        "step ms",
        "± ms",
        "peak GiB",
        "first step s",
        "loss first",
        "last",
        *(["graphs", "Triton's after step 3"] if counted else []),
        *ratios,
    ):
        shown.add_column(column, justify="left" if column in ("implementation", "input") else "right")
    for row in compared["rows"]:
        if row["status"] != "ok":
            shown.add_row(row["impl"], *([""] if told else []), "failed")
            continue
        ms = row["step_ms"]
        shown.add_row(
            row["impl"],
            *([input_of(row)] if told else []),
            f"{row['tokens_per_s']:,.0f}",
            f"{ms['median']:.1f}",
            f"{(ms['max'] - ms['min']) / 2:.1f}",
            gib(row["peak_bytes"]),
            f"{row['first_step_s']:.1f}",
            f"{row['loss_first']:.4f}",
            f"{row['loss_last']:.4f}",
            *([graphs_of(row), late_of(row)] if counted else []),
            f"{row['speed_ratio']:.3f}" if row["speed_ratio"] else "–",
            f"{row['peak_ratio']:.3f}" if row["peak_ratio"] else "–",
        )
    return shown


# -- command line ------------------------------------------------------------------------------------------------------


def option(text: str) -> tuple[str, Any]:
    """``key=value``; a value that reads as JSON is that (numbers, true, null, {...}), any other is the text itself."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"an option is key=value, not {text!r}")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def write(result: dict[str, Any], out: Path | None) -> None:
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")


def _specs(words: Sequence[str]) -> list[str]:
    """``eager,inductor fastft`` → three; a word with options (``fastft:disable=rotary,attention``) is one."""
    return [name for word in words for name in ([word] if "=" in word else word.split(",")) if name]


def _parser() -> argparse.ArgumentParser:
    setting = argparse.ArgumentParser(add_help=False)
    setting.add_argument("--model", default="llama-3.1-8b", help=f"architecture, random weights: {', '.join(MODELS)}")
    setting.add_argument("--quant", default="nf4", help="nf4 or bf16 (default nf4)")
    setting.add_argument("--train", default="lora", help="lora or full (default lora)")
    setting.add_argument("--trainer", default="loop", help="loop or sft: TRL's SFTTrainer (default loop)")
    setting.add_argument("--rank", type=int, default=16, help="LoRA rank (default 16)")
    setting.add_argument("--batch", type=int, default=4, help="sequences in a step (default 4)")
    setting.add_argument("--seq", type=int, default=2048, help="tokens in a sequence (default 2048)")
    setting.add_argument(
        "--data", default="full", help="full, packed or padded (default full): rows of tokens, or documents, see above"
    )
    setting.add_argument(
        "--document", type=int, default=512, help="tokens in a document, up to half as many more or less (default 512)"
    )
    setting.add_argument("--tokens", default="uniform", help="uniform or zipf (default uniform): what ids are drawn")
    setting.add_argument(
        "--lengths", default="fixed", help="fixed or random (default fixed): rows of --seq tokens, or from a quarter"
    )
    setting.add_argument(
        "--optimizer", default="adamw", help="adamw or adamw8bit: bitsandbytes' (default adamw, fused)"
    )
    setting.add_argument("--lr", type=float, default=1e-4, help="learning rate (default 1e-4)")
    setting.add_argument(
        "--checkpointing", choices=("on", "off"), default="on", help="gradient checkpointing (default on)"
    )
    setting.add_argument("--steps", type=int, default=5, help="measured steps (default 5)")
    setting.add_argument(
        "--warmup", type=int, default=3, help="steps before them, the first of which compiles (default 3)"
    )
    setting.add_argument("--seed", type=int, default=0)
    setting.add_argument(
        "--profile",
        action="store_true",
        help="one more step under the profiler: kernels by time, and idle times, in the JSON",
    )
    setting.add_argument(
        "--timeline", action="store_true", help="one more step's allocated memory over time in the JSON (CUDA)"
    )
    setting.add_argument(
        "--checkpoints", type=Path, default=None, help="folder of checkpoints (default: see checkpoint_root)"
    )
    setting.add_argument("--out", type=Path, default=None, help="JSON file (default: standard output)")

    parser = argparse.ArgumentParser(prog="bench/train.py", description=(__doc__ or "").split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", parents=[setting], help="one implementation in this process")
    one.add_argument("--impl", required=True, help=", ".join(IMPLEMENTATIONS))
    one.add_argument(
        "--options",
        type=option,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="for torch.compile, its argument dynamic too",
    )
    one.add_argument(
        "--seconds", type=float, default=None, help="begin no step that would end later, from the start (default: all)"
    )
    several = commands.add_parser("compare", parents=[setting], help="several beside each other, a process for each")
    several.add_argument(
        "--impls",
        nargs="+",
        default=["eager,fastft"],
        help="names, or name:key=value;key=value; data=padded is this one's own form of the data, others are options",
    )
    several.add_argument("--rounds", type=int, default=1, help="each this many times, interleaved (default 1)")
    several.add_argument("--baseline", default=None, help="whom the ratios refer to (default: the first)")
    several.add_argument("--timeout", type=float, default=300.0, help="seconds for one run (default 300)")
    several.add_argument("--budget", type=float, default=3600.0, help="seconds for all runs together (default 3600)")
    several.add_argument("--peers", default=None, help="PYTHONPATH of liger's and unsloth's runs")
    several.add_argument("--log", type=Path, default=None, help="file for the runs' output (default: standard error)")
    prepare = commands.add_parser("checkpoint", help="write a random-weight checkpoint, if it is not there")
    prepare.add_argument("--model", required=True)
    prepare.add_argument("--checkpoints", type=Path, default=None)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 if a run worked (``compare``: any of them), 1 if none did, 2 for arguments that cannot be."""
    parser = _parser()
    a = parser.parse_args(argv)
    root = a.checkpoints or checkpoint_root()
    if a.command == "checkpoint":
        if a.model not in MODELS:
            parser.error(f"--model is {a.model!r}; it is one of {', '.join(MODELS)}")
        os.environ.update(QUIET)
        if not (root / a.model / "config.json").exists():
            write_checkpoint(a.model, root / a.model)
        return 0
    sizes = ("rank", "batch", "seq", "document", "steps", "warmup", "seed")
    words = ("model", "quant", "train", "trainer", "data", "tokens", "lengths", "optimizer", "lr")
    common = {k: getattr(a, k) for k in (*words, *sizes)}
    if a.trainer == "sft" and (a.profile or a.timeline):
        parser.error("--profile and --timeline are of one step more, which --trainer sft does not take")
    if a.command == "run":
        setup = Setup(impl=a.impl, checkpointing=a.checkpointing == "on", options=dict(a.options), **common)
        try:
            setup.check()
        except ValueError as error:
            parser.error(str(error))
        result = run(setup, root, a.profile, a.timeline, a.seconds)
        ok = result["status"] == "ok"
    else:
        specs = _specs(a.impls)
        try:
            for spec in specs:
                name, data, _ = chosen(spec)
                Setup(**{**common, "impl": name, "data": data or a.data}).check()
            if a.baseline is not None:
                one_of("--baseline", a.baseline, specs)
        except ValueError as error:
            parser.error(str(error))
        del common["model"]
        arguments = [w for k, v in common.items() for w in (f"--{k}", str(v))] + ["--checkpointing", a.checkpointing]
        log = open(a.log, "a") if a.log else sys.stderr  # noqa: SIM115  (the runs write to it, closed at exit)
        result = compare(
            specs,
            [*arguments, *(["--profile"] if a.profile else []), *(["--timeline"] if a.timeline else [])],
            model=a.model,
            root=root,
            rounds=a.rounds,
            baseline=a.baseline,
            peers=a.peers,
            timeout=a.timeout,
            budget=a.budget,
            log=log,
            save=lambda found: write(found, a.out),
        )
        ok = any(r["status"] == "ok" for r in result["rows"])
        checkpointing = "checkpointing" if a.checkpointing == "on" else "no checkpointing"
        adapters = f"LoRA r={a.rank}" if a.train == "lora" else "full"
        device = (result["device"] or {}).get("name", "no device")
        loop = ", SFTTrainer" if a.trainer == "sft" else ""
        setting = f"{a.model}, {a.quant}, {adapters}, {checkpointing}{optimizer_of(common)}{loop}"
        title = f"{setting}, {tokens_of(common)}, {device}"
        from rich.console import Console

        Console(width=150).print(table(result, title))
    write(result, a.out)
    if a.out is None and a.command == "run":
        print(json.dumps(result, indent=1))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
