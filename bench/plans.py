"""What a size of attention costs that cuDNN has no plan for: ``python bench/plans.py --out plans.json``.

Plain causal attention in bf16, forward and backward: ms of the plan (a size's first call beside its later ones), ms by
cuDNN and by our kernel, and what ours takes longer for each FLOP of the forward and direction. The constants of
``Plans`` in ``kernels/_attention_routes.py`` are these. By itself a plan takes less than in a step of training.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fastft.kernels import _attention_routes as routes
from fastft.kernels.attention import attention, attention_kernels

# Run as a script, Python puts bench/ first on the path, where kernels.py would pass for the Hub's package of that name.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from bench import files

HEADS, KEY_HEADS, D = 32, 8, 128
#: Batch and length. The first pays for what a process does once, and is not in the result.
SIZES = ((4, 519), (4, 513), (4, 1001), (4, 1290), (4, 1990), (1, 3001), (1, 7777))


def once(way: Callable[..., torch.Tensor], batch: int, length: int) -> Callable[[], None]:
    """A forward and a backward of this size."""

    def new(heads: int) -> torch.Tensor:
        return torch.randn(batch, length, heads, D, device="cuda", dtype=torch.bfloat16).transpose(1, 2)

    leaves = [new(heads).requires_grad_() for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    do = new(HEADS)
    return lambda: torch.autograd.backward(way(*leaves, causal=True), do, inputs=leaves)


def milliseconds(call: Callable[[], None], calls: int = 1) -> float:
    """A call's, of so many one after another: the host is ahead of the GPU behind the first, as in a step."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start) / calls


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="ten calls of each, in turns (default 15)")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench/plans.py looks at cuDNN: it needs a CUDA GPU", file=sys.stderr)
        return 2
    rows = []
    for batch, length in SIZES:
        routes.PLANS = routes.Plans()  # so that cuDNN computes every size
        cudnn, ours = (once(way, batch, length) for way in (attention, attention_kernels))
        first = milliseconds(cudnn)
        for _ in range(3):
            cudnn(), ours()
        times = [(milliseconds(cudnn, 10), milliseconds(ours, 10)) for _ in range(args.rounds)]
        by_cudnn, by_ours = map(statistics.median, zip(*times, strict=True))
        flops = 2 * batch * HEADS * length * length / 2 * 2 * D
        row = {
            "batch": batch, "length": length, "plan_ms": round(first - by_cudnn, 2), "cudnn_ms": round(by_cudnn, 4),
            "ours_ms": round(by_ours, 4), "lost_s_per_flop": (by_ours - by_cudnn) / 2e3 / flops,
        }  # fmt: skip
        rows.append(row)
        print(", ".join(f"{name} {value:.3g}" for name, value in row.items()), flush=True)
    if args.out:
        files.write(files.head("plans", sys.argv) | {"rows": rows[1:]}, args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
