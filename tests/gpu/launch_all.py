"""Launch every Triton kernel of fastft, forward and backward, at small sizes: what ``sanitize.sh`` runs under
compute-sanitizer, where a launch takes 10 to 100 times as long.

    python tests/gpu/launch_all.py [--part I/N] [--dtypes bfloat16,float16]    a share of the launches
        [--plain-products]    no product of cuBLAS from half precision to fp32
    python tests/gpu/launch_all.py --planted out-of-bounds | race              a kernel with that mistake
    python tests/gpu/launch_all.py --list                                      the names of all kernels

Inputs are those of the tests (``SAMPLES`` in ``tests/kernels/test_*.py``) and a few at the head sizes and row lengths
of models, where the kernels leave masks out. The last line says how many calls were made and which kernels were
launched.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import fastft.kernels
from fastft.kernels import _products, layer_norm
from fastft.kernels._config import Space
from fastft.kernels._op import Op
from fastft.kernels._triton import jit, tl, triton

ROOT = Path(__file__).resolve().parents[2]


def _package(name: str) -> None:
    """Lets one of the repository's folders be imported from: with the repository on Python's path, its folder kernels/
    would pass for the Hub's package of that name.
    """
    spec = importlib.util.spec_from_file_location(
        name, ROOT / name / "__init__.py", submodule_search_locations=[str(ROOT / name)]
    )
    assert spec is not None and spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


for package in ("bench", "tests"):  # the tests read bench/shapes.py
    _package(package)
SAMPLES = importlib.import_module("tests.kernels._samples")

# ------------------------------------------------------------------------------------------------ planted mistakes


@jit
def _planted_write_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), 1.0)  # no mask: past the end where x has fewer than BLOCK elements


@jit
def _planted_race_kernel(x_ptr, BLOCK: tl.constexpr):
    # Triton puts barriers around its own use of shared memory; PTX has none. All threads write to one word.
    at = tl.arange(0, BLOCK)
    found = tl.inline_asm_elementwise(
        "{ .shared .align 4 .b32 planted; .reg .u32 at; mov.u32 at, planted; "
        "st.shared.u32 [at], $1; ld.shared.u32 $0, [at]; }",
        "=r,r", [at], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    tl.store(x_ptr + at, found)


def plant(mistake: str) -> None:
    """Launch a kernel that does what the sanitizer must find."""
    if mistake == "race":
        x = torch.zeros(128, dtype=torch.int32, device="cuda")
        _planted_race_kernel[(1,)](x, BLOCK=128, num_warps=4)
    else:
        x = torch.zeros(100, dtype=torch.float32, device="cuda")
        _planted_write_kernel[(1,)](x, BLOCK=128, num_warps=4)


# ----------------------------------------------------------------------------------------------------- every kernel


def _wide(name: str, new: Any) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments at the sizes of models: heads of 64 and 128, rows of 4096 and more, several blocks a row."""
    if name == "rms_norm":
        yield (new(5, 4096), new(4096), 1e-6), {}
    if name == "add_rms_norm":
        yield (new(5, 4096), new(5, 4096), new(4096), 1e-6), {}
    if name == "layer_norm":
        yield (new(5, 4608), new(4608), new(4608), 1e-5), {}
    if name == "glu":
        yield (new(3, 2500), new(3, 2500), "silu"), {}
    if name == "glu_packed":
        yield (new(3, 5000), "gelu_tanh"), {}
    if name == "rotary":
        q, k = new(1, 5, 32, 128).transpose(1, 2), new(1, 5, 8, 128).transpose(1, 2)
        yield (q, k, new(1, 5, 128, grad=False), new(1, 5, 128, grad=False)), {}
    if name == "norm_rotary":
        q, k = new(1, 5, 32, 128).transpose(1, 2), new(1, 5, 8, 128).transpose(1, 2)
        tables = new(1, 5, 128, grad=False), new(1, 5, 128, grad=False)
        yield (q, k, new(128), new(128), *tables, 1e-6), {}
    if name in ("linear_log_prob", "linear_cross_entropy"):
        labels = new.integers(9001, 17)
        labels[3] = -100
        yield (new(17, 64), new(9001, 64, grad=False), None, labels), {}
        yield (new(17, 64), new(9001, 64), None, labels), {}
    if name == "attention":
        padding = torch.ones(2, 150, dtype=torch.int64, device=new.device)
        padding[1, :40] = 0
        positions = torch.cat([torch.arange(70), torch.arange(80)]).expand(2, 150).to(new.device)
        for d, mask in ((64, {"window": 50}), (128, {"padding": padding}), (128, {"positions": positions})):
            q, k, v = (new(2, 150, heads, d).transpose(1, 2) for heads in (2, 1, 1))
            yield (q, k, v), {"causal": True, **mask}
        q, k, v = (new(1, 70, 1, 256).transpose(1, 2) for _ in range(3))
        yield (q, k, v), {"causal": True, "softcap": 30.0}
        q, k, v = (new(2, 150, heads, 64).transpose(1, 2) for heads in (2, 1, 1))
        seed = torch.tensor([2**40 + 1], device=new.device)
        yield (q, k, v), {"causal": True, "window": 50, "sinks": new(2), "dropout_p": 0.1, "seed": seed}


def calls(dtypes: Sequence[torch.dtype], device: str, sizes: Sequence[int] = (1, 13)) -> Iterator[tuple[Op, Any]]:
    """(op, sample) of every launch."""
    for dtype in dtypes:
        for name, op in sorted(fastft.kernels.load().items()):
            for n in sizes:
                yield from ((op, sample) for sample in SAMPLES.samples(op, dtype, device, n))
                for variant in VARIANTS.get(name, ()):
                    for sample in SAMPLES.samples(op, dtype, device, n):
                        yield op, SAMPLES.Sample(f"variant {variant}", sample.args, sample.kwargs)
            for args, kwargs in _wide(name, SAMPLES.New(dtype, device)):
                yield op, SAMPLES.Sample("wide", args, kwargs)
                for variant in VARIANTS.get(name, ()):
                    yield op, SAMPLES.Sample(f"variant {variant}", args, kwargs)
                if name in OTHERWISE:
                    yield op, SAMPLES.Sample(OTHER, args, kwargs)


#: Op → its variants with kernels of their own.
VARIANTS = {"linear_log_prob": ("fused", "filtered")}

#: Op → spaces and a configuration with which its kernels are other programs than with the heuristic's.
OTHERWISE: dict[str, tuple[Sequence[Space], dict[str, int]]] = {
    "layer_norm": ((layer_norm.FORWARD, layer_norm.BACKWARD), {"PIECES": 2}),
}
OTHER = "wide, another configuration"


def call(op: Op, sample: Any) -> None:
    """Forward and backward, with random gradients of all outputs."""
    with contextlib.ExitStack() as stack:
        if sample.name == OTHER:
            spaces, config = OTHERWISE[op.name]
            for space in spaces:
                stack.enter_context(space.using(config))
        variant = op.variants.get(sample.name.removeprefix("variant "))
        outs = [o for o in sample.outputs(op.call if variant is None else variant[0]) if o.requires_grad]
        if outs:
            torch.autograd.grad(outs, sample.leaves(), [torch.randn_like(o) for o in outs], allow_unused=True)


def launched() -> tuple[Any, set[str]]:
    """A patch under which every kernel that Triton launches enters the set, as ``file.kernel``."""
    names: set[str] = set()
    run = triton.runtime.jit.JITFunction.run

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        names.add(f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__}")
        return run(self, *args, **kwargs)

    return mock.patch.object(triton.runtime.jit.JITFunction, "run", noted), names


def kernels() -> set[str]:
    """Every kernel in fastft's kernel files, as ``file.kernel``: the functions of Triton's that are named so."""
    fastft.kernels.load()
    return {
        f"{name.rpartition('.')[2]}.{key}"
        for name, module in list(sys.modules.items())
        if name.startswith("fastft.kernels.")
        for key, value in vars(module).items()
        if key.endswith("_kernel") and isinstance(value, triton.runtime.jit.JITFunction)
        and value.fn.__module__ == name
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 if all calls were made, and, when they were not shared out, launched every kernel."""
    parser = argparse.ArgumentParser(prog="tests/gpu/launch_all.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--part", default="0/1", help="I/N: every Nth call from the Ith on")
    parser.add_argument("--dtypes", default="bfloat16,float16")
    # Under racecheck these (nvjet_…_splitK) break off with an illegal access of their own; memcheck sees nothing there.
    parser.add_argument("--plain-products", action="store_true", help="no product from half precision to fp32")
    parser.add_argument("--planted", choices=("out-of-bounds", "race"), default=None)
    parser.add_argument("--list", action="store_true")
    a = parser.parse_args(argv)
    if a.list:
        print("\n".join(sorted(kernels())))
        return 0
    if not torch.cuda.is_available():
        parser.error("there is no GPU")
    if a.planted:
        plant(a.planted)
        torch.cuda.synchronize()
        return 0
    part, parts = map(int, a.part.split("/"))
    torch.manual_seed(0)
    count = 0
    patch, names = launched()
    plain = mock.patch.object(_products, "_single", lambda left, right: torch.mm(left.float(), right.float()))
    with patch, plain if a.plain_products else contextlib.nullcontext():
        for i, (op, sample) in enumerate(calls([getattr(torch, d) for d in a.dtypes.split(",")], "cuda")):
            if i % parts == part:
                print(f"at {op.name}, {sample.name}, {sample.args[0].dtype}", flush=True)
                call(op, sample)
                torch.cuda.synchronize()
                count += 1
    missing = kernels() - names if parts == 1 else set()
    print(f"{count} calls; kernels: {' '.join(sorted(names))}")
    if missing:
        print(f"never launched: {' '.join(sorted(missing))}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
