"""The longest context that trains: one step after another, of more and more tokens, until memory is out.

    fastft bench context --tokens 400000 --host 110GiB --out context.json
    fastft bench context --cap 24GiB --tokens 65536,98304,131072,262144 --bisect 2 --out context-24.json
    fastft bench context --impl unsloth --cap 8GiB --tokens 2048,4096 --out unsloth-8.json

The model, its adapters and a step are those of ``bench/train.py``: NF4, random weights, gradient checkpointing, one
sequence of random tokens, forward, backward and optimizer. The first step at a length compiles; it is the one that has
to fit, and with ``--steps 1`` (the default) the only one: at 400,000 tokens, attention alone takes minutes.

``--cap`` limits PyTorch's allocator (``torch.cuda.set_per_process_memory_fraction``), once the model is loaded. What
is not PyTorch's, CUDA's own context and cuBLAS's handles of about half a GiB, comes on top. ``--host`` is what
offloading may take; fastft gets it as ``host_memory``. For each length: seconds, loss, the peaks of the device
(allocated and reserved) and of the host (resident, of the process since it began), and fastft's plan.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Run as a script, Python puts bench/ first on the path, where kernels.py would pass for the Hub's package of that name.
if __name__ == "__main__":
    sys.path[0] = str(ROOT)
from bench.implementations import IMPLEMENTATIONS, checkpoint, checkpoint_root, say  # noqa: E402
from bench.running import SCHEMA, device_info, measured_commit, package_versions, timed  # noqa: E402
from bench.setting import Setup  # noqa: E402
from bench.shapes import MODELS  # noqa: E402
from bench.train import gib, option, write  # noqa: E402

if __name__ == "__main__":
    del sys.path[0]

#: Two lengths that are nearer than this many tokens are one.
NEAR = 1024


def lengths(asked: Sequence[int], bisect: int, fits: Callable[[int], bool]) -> int | None:
    """The longest of the lengths that fit: ``asked`` in order until one does not, then ``bisect`` more in between."""
    best, over = None, None
    for tokens in sorted(asked):
        if not fits(tokens):
            over = tokens
            break
        best = tokens
    for _ in range(bisect if over is not None else 0):
        low = best or 0
        middle = (low + over) // 2 // NEAR * NEAR  # type: ignore[operator]
        if not low < middle < over:  # type: ignore[operator]
            break
        best, over = (middle, over) if fits(middle) else (best, middle)
    return best


class Context:
    """A model that is loaded once, and steps of any length. ``result`` gets the rows as they come."""

    def __init__(self, setup: Setup, root: Path, cap: int | None, result: dict[str, Any]) -> None:
        self.implementation = IMPLEMENTATIONS[setup.impl]
        if self.implementation.first is not None:
            self.implementation.first()
        import torch

        self.setup, self.result = setup, result
        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda" if self.cuda else "cpu")
        result |= {"device": device_info(), "versions": package_versions()}
        torch.manual_seed(setup.seed)
        with timed(result, "load_s"):
            self.model = self.implementation.load(setup, checkpoint(setup.model, root))
        self.free()
        if cap is not None and self.cuda:
            torch.cuda.set_per_process_memory_fraction(min(1.0, cap / torch.cuda.mem_get_info()[1]))
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=setup.lr, weight_decay=0.0, fused=True)
        result["weights_bytes"] = torch.cuda.memory_allocated() if self.cuda else None

    def free(self) -> None:
        import torch

        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def fits(self, tokens: int) -> bool:
        """Whether ``steps`` steps of so many tokens run; with a row of what they took."""
        import torch

        row: dict[str, Any] = {"tokens": tokens, "status": "ok", "step_s": [], "loss": []}
        self.result["rows"].append(row)
        torch._dynamo.reset()  # a plan for this length, not for one that was there before
        before = self._reports()
        if self.implementation.compile is not None:
            self.implementation.compile(self.model, self.setup.options)
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        try:
            for loss, seconds in self._steps(tokens):
                row["loss"].append(round(loss, 6))
                row["step_s"].append(round(seconds, 3))
        except torch.OutOfMemoryError as error:
            row |= {"status": "out of memory", "error": str(error).splitlines()[0]}
        row["peak_bytes"] = torch.cuda.max_memory_allocated() if self.cuda else None
        row["peak_reserved_bytes"] = torch.cuda.max_memory_reserved() if self.cuda else None
        row["host_peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        row["plans"] = [
            {"said": report.plan.get("memory"), "memory": report.memory, "errors": report.errors}
            for report in self._reports()[len(before) :]
        ]
        self.optimizer.zero_grad(set_to_none=True)
        self.free()
        say(f"{tokens:,} tokens: {row['status']}, {row['step_s']} s, peak {gib(row['peak_bytes'])} GiB")
        return bool(row["status"] == "ok")

    def _reports(self) -> list[Any]:
        if self.setup.impl != "fastft":
            return []
        import fastft

        return fastft.reports()

    def _steps(self, tokens: int) -> Iterator[tuple[float, float]]:
        import torch

        generator = torch.Generator().manual_seed(self.setup.seed + 1)
        vocabulary = MODELS[self.setup.model]["vocab_size"]
        for _ in range(self.setup.steps):
            # Ids 0 to 3 are the tokenizer's special tokens.
            x = torch.randint(4, vocabulary, (1, tokens), generator=generator).to(self.device)
            start = time.perf_counter()
            with torch.autocast(self.device.type, dtype=torch.bfloat16):
                loss = self.model(input_ids=x, labels=x).loss
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            found = float(loss.detach())  # waits for the device
            del loss
            if self.cuda:
                torch.cuda.synchronize()
            yield found, time.perf_counter() - start


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastft bench context", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--impl", default="fastft", help=", ".join(IMPLEMENTATIONS))
    parser.add_argument("--model", default="llama-3.1-8b", help=f"one of {', '.join(MODELS)}")
    parser.add_argument("--quant", default="nf4", help="nf4 or bf16 (default nf4)")
    parser.add_argument("--rank", type=int, default=32, help="LoRA rank, on all linears (default 32)")
    parser.add_argument("--tokens", required=True, help="lengths to try, shortest first: 131072,262144,400000")
    parser.add_argument("--bisect", type=int, default=0, help="lengths between the longest that fits and the next one")
    parser.add_argument("--steps", type=int, default=1, help="steps at each length (default 1; the first compiles)")
    parser.add_argument("--cap", default=None, help="bytes that PyTorch's allocator may take: 24GiB, 24GB")
    parser.add_argument("--host", default=None, help="bytes of host memory for offloading (fastft)")
    parser.add_argument("--memory", default="lean", help='fastft\'s option: "lean" (default), "auto", "16GiB"')
    parser.add_argument("--options", type=option, action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--checkpoints", type=Path, default=None, help="folder of checkpoints")
    parser.add_argument("--out", type=Path, default=None, help="JSON file, written anew after every length")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 if a length fits, 1 if none does, 2 for arguments that cannot be."""
    from fastft.options import OptionError, bytes_of

    parser = _parser()
    a = parser.parse_args(argv)
    try:
        asked = [int(n) for n in a.tokens.split(",")]
        cap = None if a.cap is None else bytes_of("cap", a.cap)
        options = dict(a.options)
        if a.impl == "fastft":
            options = {"memory": a.memory, **({} if a.host is None else {"host_memory": a.host}), **options}
        setup = Setup(
            impl=a.impl, model=a.model, quant=a.quant, rank=a.rank, batch=1, seq=max(asked), steps=a.steps,
            warmup=1, options=options,
        )  # fmt: skip
        setup.check()
        if min(asked) < 2:
            raise ValueError(f"--tokens is {a.tokens!r}; a sequence has 2 tokens or more")
    except (ValueError, OptionError) as error:
        parser.error(str(error))
    result: dict[str, Any] = {
        "schema": SCHEMA, "kind": "context", "impl": a.impl, "model": a.model, "quant": a.quant, "rank": a.rank,
        "cap_bytes": cap, "options": options, "commit": measured_commit(), "argv": sys.argv, "rows": [],
    }  # fmt: skip
    context = Context(setup, a.checkpoints or checkpoint_root(), cap, result)

    def fits(tokens: int) -> bool:
        found = context.fits(tokens)
        write(result, a.out)
        return found

    result["longest"] = lengths(asked, a.bisect, fits)
    write(result, a.out)
    if a.out is None:
        print(json.dumps(result, indent=1))
    return 0 if result["longest"] else 1


if __name__ == "__main__":
    sys.exit(main())
