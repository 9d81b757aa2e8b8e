"""Which products of cuBLAS leave out terms, and whether ours do: ``python bench/products.py --out products.json``.

The last terms of each sum alone are 1, so a result says how many of them are in it. Sizes are those of an adapter's
gradients (rank x width, summed up over tokens). ``kernels/_products.py`` says what is behind it.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

import torch

from fastft.kernels._products import BLOCK, mm, mm_single

# Run as a script, Python puts bench/ first on the path, where kernels.py would pass for the Hub's package of that name.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from bench import files

RANKS = (16, 32, 64)
WIDTHS = (16, 64, 128, 1024, 4096, 14336)
TOKENS = (1001, 4097, 7913, 8191, 8192, 8193, 10001, 16385, 26222, 32769, 40003, 65537, 98305, 104861, 131073, 262145)
WAYS: dict[str, Any] = {
    "torch.mm": torch.mm,
    "torch.mm, out_dtype=torch.float32": lambda a, b: torch.mm(a, b, out_dtype=torch.float32),
    "torch.addmm": lambda a, b: torch.addmm(a.new_zeros(a.shape[0], b.shape[1]), a, b),
    "fastft, bf16": mm,
    "fastft, fp32": mm_single,
}


def lost(way: Any, rows: int, columns: int, tokens: int, dtype: torch.dtype) -> int:
    """Terms that a sum over ``tokens`` lacks of its last ones."""
    last = tokens % BLOCK or BLOCK
    left = torch.ones(tokens, rows, dtype=dtype, device="cuda")
    right = torch.zeros(tokens, columns, dtype=dtype, device="cuda")
    right[tokens - last :] = 1
    return last - int(way(left.t(), right).min())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench/products.py looks at cuBLAS: it needs a CUDA GPU", file=sys.stderr)
        return 2
    rows = []
    for name, way in WAYS.items():
        sizes = [s for r, w, t in itertools.product(RANKS, WIDTHS, TOKENS) for s in {(r, w, t), (w, r, t)}]
        found = {size: lost(way, *size, torch.bfloat16) for size in sizes}
        wrong = [{"rows": m, "columns": n, "tokens": k, "lost": left} for (m, n, k), left in found.items() if left]
        rows.append({"way": name, "products": len(found), "wrong": wrong})
        shown = "; ".join(f"[{r['rows']}, {r['columns']}] of {r['tokens']:,}: {r['lost']}" for r in wrong[:3])
        print(f"{name}: terms are missing in {len(wrong)} of {len(found)} products{f' ({shown} …)' if shown else ''}")
    if args.out:
        files.write(files.head("products", sys.argv) | {"rows": rows}, args.out)
    return int(any(r["wrong"] for r in rows if r["way"].startswith("fastft")))


if __name__ == "__main__":
    raise SystemExit(main())
