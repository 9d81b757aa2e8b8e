"""Compile kernels for an H100 on a machine without a GPU: what the interpreter cannot see (types, layouts, registers,
shared memory).

Under :func:`compiling`, ops take their Triton path for CPU tensors; a launch compiles the kernel for sm_90 as it would
be there, down to a cubin, and stops short of running it. Results are therefore uninitialised.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any
from unittest import mock

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastft.kernels._config import forget
from tests.kernels._each import parts


class H100:
    """A driver that knows what it would compile for and can do nothing else."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"kernels are compiled here, not run: the driver was asked for {name}")


def stack_bytes(kernel: Any) -> int:
    """Bytes of registers that each thread of a compiled kernel keeps in memory, for want of room."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        used = subprocess.run(tool, check=True, capture_output=True, text=True).stdout
    return int(re.findall(r" STACK:(\d+) ", used)[-1])


@contextlib.contextmanager
def compiling(*modules: Any) -> Iterator[list[Any]]:
    """Within, launches by these kernel files and their parts compile only; the list fills with the compiled kernels
    (``.metadata``, ``.asm``)."""
    compiled: list[Any] = []
    run = JITFunction.run

    def warm_up(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        return compiled[-1]

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(driver, "_active", H100()))
        stack.enter_context(mock.patch.object(JITFunction, "run", warm_up))
        for part in (part for module in modules for part in parts(module.__name__.rpartition(".")[2])):
            if hasattr(part, "use_triton"):
                stack.enter_context(mock.patch.object(part, "use_triton", lambda x: True))
        stack.callback(forget)
        forget()  # what heuristics say of another device
        yield compiled
