"""The main job from nothing, on any machine: LoRA fine-tuning of a small Llama, through fastft and without.

The model is a Llama from a config, trained for a moment on the source code of the Python installation so that there is
something to fine-tune; the fine-tuning text is that installation's documentation (python_docs.py). The fine-tuning
itself is sft_lora.py, stock code. On a CUDA machine the model has about a billion parameters and is loaded in NF4.
In the output folder: the adapters, the losses of every run (losses.json), their curves (losses.png), and
fastft's report (report.txt).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import python_docs
import torch
from sft_lora import finetune
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback, set_seed


@dataclass(frozen=True)
class Size:
    """A model's shape, and settings with which it learns visibly in a short run."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    pretrain_steps: int
    pretrain_learning_rate: float
    steps: int
    batch: int
    learning_rate: float


SIZES = {
    "5m": Size(
        256, 704, 4, 4, 2, pretrain_steps=40, pretrain_learning_rate=3e-3, steps=50, batch=8, learning_rate=5e-3
    ),
    "1b": Size(
        2048, 8192, 16, 32, 8, pretrain_steps=100, pretrain_learning_rate=3e-4, steps=200, batch=16, learning_rate=5e-4
    ),
}


class Clock(TrainerCallback):
    """Seconds each training step took, the optimizer included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.start = 0.0

    def now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start = self.now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(self.now() - self.start)


def build(folder: Path, size: Size, tokenizer: PreTrainedTokenizerFast) -> int:
    """Save a Llama of ``size``, trained on the standard library's source, and its tokenizer; returns its size."""
    set_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config).to(device)
    batch, length = 8, 128
    text = "".join(source for _, source in python_docs.modules())[: 8 * size.pretrain_steps * batch * length]
    tokens = torch.tensor(tokenizer(text)["input_ids"], device=device)
    rows = tokens[: len(tokens) // length * length].view(-1, length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.pretrain_learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, size.pretrain_learning_rate, total_steps=size.pretrain_steps
    )
    for step in range(1, size.pretrain_steps + 1):
        input_ids = rows[torch.randint(len(rows), (batch,), device=device)]
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = model(input_ids=input_ids, labels=input_ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step in (1, size.pretrain_steps) or step % 20 == 0:
            print(f"  step {step:3d}/{size.pretrain_steps}  loss {loss.item():.3f}", flush=True)
    model.to(torch.bfloat16 if device == "cuda" else torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def train(label: str, seed: int, **settings: Any) -> dict[str, Any]:
    """One fine-tuning run: its losses, seconds a step and peak device memory in bytes (None on a CPU)."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    print(f"\nFine-tuning: {label}, seed {seed}", flush=True)
    clock = Clock()
    trainer = finetune(seed=seed, callbacks=[clock], **settings)
    return {
        "run": label,
        "seed": seed,
        "loss": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "grad_norm": [row["grad_norm"] for row in trainer.state.log_history if "loss" in row],
        "seconds": clock.seconds,
        "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
    }


def compare(runs: list[dict[str, Any]], backend: str) -> dict[str, float]:
    """How far compiled losses are from eager's of the same seed, and eager's of different seeds apart; nats."""
    eager = {run["seed"]: run["loss"] for run in runs if run["run"] == "eager"}
    compiled = {run["seed"]: run["loss"] for run in runs if run["run"] == backend}
    result: dict[str, float] = {}
    both = sorted(eager.keys() & compiled.keys())
    gaps = [abs(a - b) for seed in both for a, b in zip(eager[seed], compiled[seed], strict=True)]
    if gaps:
        result |= {"mean_gap_to_eager": statistics.fmean(gaps), "max_gap_to_eager": max(gaps)}
    if len(eager) > 1:
        spreads = [max(step) - min(step) for step in zip(*eager.values(), strict=True)]
        result |= {"mean_spread_of_eager_seeds": statistics.fmean(spreads), "max_spread_of_eager_seeds": max(spreads)}
    return result


def plot(result: dict[str, Any], path: Path) -> None:
    """Loss by step, and under it what eager's mean over the seeds leaves of it: eager's seeds are a band from lowest to
    highest, the compiled runs are lines.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs, backend = result["runs"], result["settings"]["backend"]
    eager = [run["loss"] for run in runs if run["run"] == "eager"]
    compiled = [run for run in runs if run["run"] == backend]
    steps = range(1, len(runs[0]["loss"]) + 1)
    mean = [statistics.fmean(step) for step in zip(*eager, strict=True)]
    figure, panels = plt.subplots(
        1 + bool(eager), squeeze=False, sharex=True, figsize=(8, 6 if eager else 4.5), layout="constrained"
    )
    for axes, subtracted in zip(panels[:, 0], ([0.0] * len(steps), mean), strict=False):
        rest = [[loss - base for loss, base in zip(run, subtracted, strict=True)] for run in eager]
        if len(eager) == 1:
            axes.plot(steps, rest[0], color="black", linewidth=3, alpha=0.25, label="eager")
        elif eager:
            low, high = zip(*((min(step), max(step)) for step in zip(*rest, strict=True)), strict=True)
            axes.fill_between(
                steps, low, high, color="tab:gray", alpha=0.5, label=f"eager, range of {len(eager)} seeds"
            )
        for run in compiled:
            line = [loss - base for loss, base in zip(run["loss"], subtracted, strict=True)]
            axes.plot(steps, line, linewidth=1, label=f"{backend}, seed {run['seed']}")
        axes.grid(alpha=0.3)
    panels[0, 0].set(ylabel="loss (nats per token)", title=f"{result['title']}, {result['device']}")
    panels[0, 0].legend()
    if eager:
        panels[1, 0].set(ylabel="loss − eager's mean")
    panels[-1, 0].set(xlabel="training step")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="fastft demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    on_gpu = torch.cuda.is_available()
    parser.add_argument(
        "--out", type=Path, default=Path("out/demo"), help="folder for the results (default: %(default)s)"
    )
    parser.add_argument(
        "--params",
        choices=list(SIZES),
        default="1b" if on_gpu else "5m",
        help="size of the model (default here: %(default)s)",
    )
    parser.add_argument("--steps", type=int, help="fine-tuning steps (default: 50 for 5m, 200 for 1b)")
    parser.add_argument("--batch", type=int, help="sequences in a step (default: 8 for 5m, 16 for 1b)")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="one run of each kind for each seed; batches stay the same"
    )
    parser.add_argument(
        "--nf4",
        action=argparse.BooleanOptionalAction,
        default=on_gpu,
        help="load the base in NF4 (default here: %(default)s)",
    )
    parser.add_argument("--backend", default="fastft", help="torch.compile backend to show (default: %(default)s)")
    parser.add_argument("--plot", type=Path, metavar="JSON", help="only draw losses.png beside this losses.json")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--eager-only", action="store_true", help="only the uncompiled run")
    which.add_argument("--no-eager", action="store_true", help="only the compiled run")
    chosen = parser.parse_args(argv)
    for name in ("steps", "batch"):
        if getattr(chosen, name) is None:
            setattr(chosen, name, getattr(SIZES[chosen.params], name))
        elif getattr(chosen, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(chosen, name)}")
    return chosen


def main(argv: list[str] | None = None) -> None:
    chosen = arguments(argv)
    if chosen.plot is not None:
        plot(json.loads(chosen.plot.read_text()), chosen.plot.with_name("losses.png"))
        return
    size, out = SIZES[chosen.params], chosen.out
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()

    print("Reading the Python documentation and training a tokenizer on it", flush=True)
    pairs = python_docs.pairs()
    tokenizer = python_docs.tokenizer(pair["prompt"] + pair["completion"] for pair in pairs)
    data = python_docs.Dataset.from_list(pairs[: max(1000, chosen.steps * chosen.batch)])
    print(f"  {len(pairs)} pairs, {len(data)} of them to train on, {len(tokenizer)} tokens in the vocabulary")

    precision = "NF4" if chosen.nf4 else "bf16" if torch.cuda.is_available() else "fp32"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    # The base model is scratch: in memory where there is a file system with room for it, and gone when the demo ends.
    shm = Path("/dev/shm")
    roomy = shm.is_dir() and shutil.disk_usage(shm).free > 8 * 2**30
    base = Path(tempfile.mkdtemp(prefix="fastft-demo-", dir=shm if roomy else None))
    try:
        print("Building the base model and training it on the standard library's source", flush=True)
        parameters = build(base, size, tokenizer)
        settings = {
            "model": str(base),
            "data": data,
            "steps": chosen.steps,
            "batch": chosen.batch,
            "learning_rate": size.learning_rate,
            "nf4": chosen.nf4,
        }
        runs: list[dict[str, Any]] = []
        result: dict[str, Any] = {
            "title": f"LoRA on a {parameters / 1e6:,.1f}M-parameter Llama, {precision}",
            "device": device,
            "torch": torch.__version__,
            "versions": {name: version(name) for name in ("transformers", "peft", "trl", "accelerate", "fastft")},
            "commit": os.environ.get("FASTFT_COMMIT", ""),
            "parameters": parameters,
            "settings": {key: value for key, value in vars(chosen).items() if key not in ("out", "plot")}
            | {"size": asdict(size)},
            "runs": runs,
        }
        # Eager first: nothing that fastft sets up when torch.compile asks for it can touch the run it is compared with.
        for label in ["eager"] * (not chosen.no_eager) + [chosen.backend] * (not chosen.eager_only):
            for seed in chosen.seeds:
                backend = None if label == "eager" else label
                runs.append(train(label, seed, backend=backend, output=str(out / f"adapter-{label}"), **settings))
                # After every run: a demo that is stopped leaves the curves it has.
                result["comparison"] = compare(runs, chosen.backend)
                (out / "losses.json").write_text(json.dumps(result, indent=1) + "\n")
    finally:
        shutil.rmtree(base, ignore_errors=True)

    try:
        plot(result, out / "losses.png")
    except ImportError:
        print(f"\nmatplotlib is not installed: draw losses.png later with --plot {out / 'losses.json'}")

    print(f"\n{result['title']}, {chosen.steps} steps of {chosen.batch} sequences on {device}")
    for run in runs:
        steady = statistics.median(run["seconds"][len(run["seconds"]) // 2 :])
        peak = "" if run["peak_bytes"] is None else f", peak {run['peak_bytes'] / 2**30:.2f} GiB"
        tail = run["loss"][-max(1, len(run["loss"]) // 10) :]
        print(
            f"  {run['run']:>8}, seed {run['seed']}: loss {run['loss'][0]:.3f} -> {statistics.fmean(tail):.3f}, "
            f"first step {run['seconds'][0]:.1f} s, then {steady:.3f} s a step{peak}"
        )
    for name, value in result["comparison"].items():
        print(f"  {name.replace('_', ' ')}: {value:.4f} nats")
    if chosen.backend == "fastft" and not chosen.eager_only:
        import fastft

        report = str(fastft.report())
        (out / "report.txt").write_text(report + "\n")
        print(f"\n{report}")
    written = ", ".join(sorted(path.name for path in out.iterdir()))
    print(f"\nIn {out}/: {written}   ({time.perf_counter() - started:.0f} s)")


if __name__ == "__main__":
    main()
