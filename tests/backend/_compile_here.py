"""Trains one step in a new process, with the cache folders that it is told: ``python _compile_here.py``.

torch is imported once; each line of its input, JSON ``{"env": {...}, "result": path, "room": bytes}``, is a process
forked from there. It prints the process's id, and the process writes its result, or what it raised.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch
import torch._inductor.async_compile
import torch._inductor.codegen.cpp
import torch._inductor.compile_fx
from torch._dynamo.utils import counters

import fastft
import fastft.compiler
from fastft import caches


class Block(torch.nn.Module):
    """Ops and products only: of anything else Inductor would write C++, which takes it ten seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(0.5, 1.5, 64))
        self.linear = torch.nn.Linear(64, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
        return self.linear(self.weight * (x * torch.rsqrt(variance + 1e-6)))


def train() -> dict[str, Any]:
    tempfile.tempdir = None
    with contextlib.suppress(OSError):
        caches.secure()  # as when the backend is looked up
    torch.manual_seed(0)
    block, x = Block(), torch.randn(8, 64)

    def gradients(call: Any) -> torch.Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(call(x).square().mean(), list(block.parameters()))])

    found, wanted = gradients(torch.compile(block, backend="fastft")), gradients(block)
    return {
        "error": float((found - wanted).norm() / wanted.norm()),
        "found": found.tolist(),
        "counts": fastft.report().counts,
        "errors": fastft.report().errors,
        "plan": fastft.report().plan,
        "hits": counters["aot_autograd"].get("autograd_cache_hit", 0),
        "folder": str(caches.INDUCTOR.folder),
    }


def main() -> None:
    for line in sys.stdin:
        asked = json.loads(line)
        if child := os.fork():
            print(child, flush=True)
            continue
        with contextlib.suppress(BaseException):
            os.environ.update(asked["env"])
            caches.ROOM = asked["room"]
            try:
                result = train()
            except BaseException:
                result = {"raised": traceback.format_exc()}
            beside = Path(asked["result"] + ".part")
            beside.write_text(json.dumps(result))
            beside.rename(asked["result"])
        os._exit(0)


if __name__ == "__main__":
    main()
