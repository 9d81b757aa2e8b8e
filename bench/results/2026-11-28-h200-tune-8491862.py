"""`autotune/databases/h200.json` out of the lines that `fastft tune` printed, beside this file: the call that measured
them ended before they were exported.

    python bench/results/2026-11-28-h200-tune-8491862.py OUT.json [PRINTED.txt DEVICE]

Out of an H100's lines (2026-11-27-h100-tune-69f47c4.txt h100) it makes the records of `h100.json`, but for what was
measured again since. Records get the hash of a kernel's source as it is now.
"""

from __future__ import annotations

import collections
import re
import sys
from pathlib import Path
from typing import Any

from fastft.autotune import database
from fastft.autotune.search import SKIPPED
from fastft.kernels import load
from fastft.kernels._config import SPACES

LINE = re.compile(r"(\S+) \(\S+ ([^()]*)\): (.*?), ([\d.]+) µs; heuristic ([\d.]+) µs, noise ([\d.]+) %; (.*)")
REASONS = {said: why for why, said in SKIPPED.items()}
HEADS = "q_heads={} k_heads={} head_dim={} rotary_dim={} style=half"


def sizes(kernel: str, words: list[str], earlier: int) -> str:
    """What a launch's key says of its sizes; rotary is launched forward, then backward."""
    if kernel == "nf4.dequantize":
        return f"size={int(words[0]) * int(words[1])} blocksize=64 double={int(words[-1] == 'double')}"
    tokens, more = int(words[0]) * int(words[1]), words[2:]
    if kernel == "rotary.turn":
        return f"tokens={tokens} {HEADS.format(*more)} transpose={earlier % 2}"
    if kernel.startswith("norm_rotary."):
        return f"tokens={tokens} {HEADS.format(*more)} weighted=1"
    if kernel.startswith("lora_glu."):
        return f"rows={tokens} n={more[0]} rank={more[2]} kind={more[1]}"
    return f"rows={tokens} n={more[0]}" + (f" kind={more[1]}" if kernel.startswith("glu.") else "")


def records(lines: list[str], device: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    seen: collections.Counter[tuple[str, str]] = collections.Counter()
    for match in filter(None, map(LINE.fullmatch, lines)):
        kernel, words, best, us, heuristic, noise, rest = match.groups()
        of = sizes(kernel, words.split(" x "), seen[kernel, words])
        seen[kernel, words] += 1
        counts = {what: int(n) for n, what in (part.split(" ", 1) for part in rest.split(", "))}
        key = f"{device}/{kernel}/bfloat16/{of}/torch 2.11, triton 3.6/{SPACES[kernel].source[:12]}"
        config = {} if best == "the heuristic" else dict(pair.split("=") for pair in best.split())
        value = {"config": {name: int(n) for name, n in config.items()}, "variant": "", "source": ""}
        value |= {"us": float(us), "heuristic_us": float(heuristic), "noise": round(float(noise) / 100, 4)}
        value |= {"tried": counts.pop("timed"), "failures": {}, "failed": counts.pop("failed", 0)}
        found.setdefault(key, value | {"skipped": {REASONS[said]: n for said, n in counts.items()}})
    return found


if __name__ == "__main__":
    out, *given = sys.argv[1:]
    printed, device = given or (Path(__file__).with_suffix(".txt"), "h200")
    load()
    database.write_file(Path(out), device, records(Path(printed).read_text(encoding="utf-8").splitlines(), device))
