"""Every kernel of these ops compiles for an H100 at real sizes: bf16, wide loads, whole rows in registers. No GPU
needed."""

from __future__ import annotations

import re

import pytest
import torch

from fastft.kernels import (
    add_rms_norm,
    attention,
    glu,
    layer_norm,
    linear_cross_entropy,
    lora_glu,
    norm_rotary,
    rms_norm,
    rotary,
)
from fastft.kernels._op import INTERPRET
from fastft.kernels._triton import HAS_TRITON

pytestmark = pytest.mark.skipif(
    INTERPRET or not HAS_TRITON or torch.cuda.is_available(), reason="Triton's compiler, in place of a GPU"
)
BF16 = torch.bfloat16
ops = torch.ops.fastft


def random(*shape):
    return torch.randn(shape, dtype=BF16)


def run_rms_norm(n, stream=True):
    x, w = random(4, n), random(n)
    _, r = ops.rms_norm(x, w, 1e-6, 0.0, None)
    ops.rms_norm_backward(x, x, w, r, x if stream else None, 0.0, True, True)
    return rms_norm


def run_layer_norm(n, stream=True):
    x, w = random(4, n), random(n)
    _, m, r = ops.layer_norm(x, w, w, 1e-6, None)
    ops.layer_norm_backward(x, x, w, m, r, x if stream else None, True, True, True)
    return layer_norm


def run_layer_norm_in_two_pieces(n, stream=True):
    with layer_norm.FORWARD.using({"PIECES": 2}), layer_norm.BACKWARD.using({"PIECES": 2}):
        return run_layer_norm(n, stream)


def run_glu(kind):
    both = random(4, 2 * 14336)
    ops.glu_packed(both, kind, True)
    ops.glu_packed_backward(random(4, 14336), both, kind, True)
    return glu


def run_lora_glu(rank):
    wide, b = random(4, 2 * 14336 + 2 * rank), [torch.randn(14336, rank)] * 2
    y = ops.lora_glu(wide, b, [2.0, 2.0], "silu")
    ops.lora_glu_backward(y, wide, b, [2.0, 2.0], "silu", True, [False, False])
    return lora_glu


def run_rotary(style):
    q, k = (random(2, 4, heads, 128).transpose(1, 2) for heads in (32, 8))
    table = random(2, 4, 128)
    ops.rotary(q, k, table, table, style, None, 128, 2)
    ops.rotary_backward(q, k, table, table, style, BF16, 128, 2)
    return rotary


def run_norm_rotary(style):
    q, k = (random(2, 4, heads, 128).transpose(1, 2) for heads in (32, 8))
    w, table = random(128), random(2, 4, 128)
    args = (q, k, w, w, table, table)
    _, _, qr, kr = ops.norm_rotary(*args, 1e-6, 0.0, style, None, 128, 2)
    ops.norm_rotary_backward(q, k, *args, qr, kr, 0.0, style, 128, 2, True, True)
    return norm_rotary


@pytest.mark.parametrize(
    "module, run, argument",
    [
        *[(rms_norm, run_rms_norm, n) for n in (128, 4096, 8192)],
        *[(layer_norm, run_layer_norm, n) for n in (768, 8192)],
        (layer_norm, run_layer_norm_in_two_pieces, 4608),
        *[(glu, run_glu, kind) for kind in glu.KINDS],
        *[(lora_glu, run_lora_glu, rank) for rank in (16, 64)],
        *[(rotary, run_rotary, style) for style in rotary.STYLES],
        *[(norm_rotary, run_norm_rotary, style) for style in rotary.STYLES],
    ],
    ids=lambda v: v.__name__.rsplit(".")[-1] if hasattr(v, "__name__") else str(v),
)
def test_compiles_for_an_h100(module, run, argument):
    from tests.kernels._hopper import compiling

    with compiling(module) as kernels:
        run(argument)
    assert len(kernels) == 2 + (module is lora_glu), (
        "one kernel forward, one backward; lora_glu's adds up sums in a third"
    )
    for kernel in kernels:
        assert "cubin" in kernel.asm
        # 16 bytes a thread and load, where a row is contiguous and aligned.
        assert "ld.global.v4.b32" in kernel.asm["ptx"] and "st.global.v4.b32" in kernel.asm["ptx"]


@pytest.mark.parametrize("n", [128, 4096, 8192])
def test_the_norm_of_a_sum_compiles_for_an_h100(n):
    from tests.kernels._hopper import compiling, stack_bytes

    x, w = random(4, n), random(n)
    with compiling(add_rms_norm) as kernels:
        ops.add_rms_norm(x, x, w, 1e-6, 0.0, None)
    (kernel,) = kernels
    assert stack_bytes(kernel) == 0
    assert kernel.asm["ptx"].count("ld.global.v4.b32") >= 2 and "st.global.v4.b32" in kernel.asm["ptx"]


@pytest.mark.parametrize("rank", [16, 64])
def test_the_warps_of_lora_glu_share_the_work(rank):
    """Two products in a row make warps stand below each other; where the tile has fewer rows than they, some compute
    what others do.
    """
    from tests.kernels._hopper import compiling

    with compiling(lora_glu) as kernels:
        run_lora_glu(rank)
    each = [k for k in kernels if k.metadata.name != "_sum_kernel"]
    for space, kernel in zip((lora_glu.FORWARD, lora_glu.BACKWARD), each, strict=True):
        tile = space.chosen(torch.device("cpu"), BF16, 4, 14336, rank, "silu")
        elements = tile["BLOCK_M"] * tile["BLOCK_N"] // (32 * tile["num_warps"])
        assert kernel.asm["ptx"].count("ex2.approx") == elements, "one exponential for each"
        assert "st.local" not in kernel.asm["ptx"]


@pytest.mark.parametrize("run", ["forward", "backward"])
def test_lora_glu_asks_for_a_tile_before_it_computes(run):
    """Products wait for all threads, and loads do not pass that."""
    from tests.kernels._hopper import compiling

    with compiling(lora_glu) as kernels, lora_glu.BACKWARD.using({"FUSED": 0, "BLOCK_N": 128, "num_warps": 8}):
        run_lora_glu(16)
    kernel = kernels[run == "backward"]
    order = re.findall(r"ld\.global\.v[24]|bar\.sync", kernel.asm["ptx"])
    loads = [at for at, what in enumerate(order) if what != "bar.sync"]
    # e of gate and up, of the backward dy too; B, h.
    assert len(loads) >= (12 if run == "forward" else 16)
    assert sum(at > order.index("bar.sync") for at in loads) <= 2, "loads that stand behind a barrier"


def run_attention(n):
    q, k, v = (random(1, 40, 2, n).transpose(1, 2).requires_grad_() for _ in range(3))
    attention.attention(q, k, v, causal=True).sum().backward()
    return attention


def contracted(ptx):
    """Multiply-adds that add to what a thread got from another one."""
    shuffled = set(re.findall(r"shfl\.sync\.bfly\.b32\s+(%\w+)", ptx))
    shuffled |= {to for to, source in re.findall(r"mov\.b32\s+(%\w+), (%\w+);", ptx) if source in shuffled}
    return [line for line in re.findall(r"fma\.rn\.f32.*", ptx) if set(re.findall(r"%\w+", line)) & shuffled]


@pytest.mark.parametrize(
    "run, n",
    [
        *((run, n) for run in (run_rms_norm, run_layer_norm) for n in (4, 5, 65, 128, 4096)),
        *((run_layer_norm_in_two_pieces, n) for n in (65, 300, 4608)),
        (run_attention, 5),
    ],
)
def test_all_threads_of_a_row_have_the_same_sum(run, n):
    """Else which thread's value of a row is stored would be a race, and the last bit a matter of luck:
    compute-sanitizer found it in layer_norm.
    """
    from tests.kernels._hopper import compiling

    with compiling(rms_norm, layer_norm, attention) as kernels:
        run(n)
        if run is not run_attention:
            run(n, stream=False)
    of_rows = [k for k in kernels if run is not run_attention or k.metadata.name == "_delta_kernel"]
    assert of_rows
    for kernel in of_rows:
        assert "shfl.sync.bfly" in kernel.asm["ptx"]
        assert contracted(kernel.asm["ptx"]) == []


@pytest.mark.parametrize("vocab", [5000, 32000])
def test_the_labels_logit_is_read_before_it_is_overwritten(vocab):
    """A warp that is late, or was paused, would else read the gradient that another one wrote there: in 2 of 48 steps
    on a busy H100 one token's loss was, and racecheck sees shared memory only.
    """
    from tests.kernels._hopper import compiling

    hidden, weight = random(7, 64).requires_grad_(), random(vocab, 64)
    with compiling(linear_cross_entropy) as kernels:
        linear_cross_entropy.linear_cross_entropy(hidden, weight, None, torch.arange(7))
    (kernel,) = kernels
    assert kernel.metadata.num_warps > 1
    found = re.findall(r"(ld\.global\.b16)|(st\.global\S*\.v4)|(st\.global\.b16)|(bar\.sync)", kernel.asm["ptx"])
    accesses = [("load", "store", "last", "barrier")[next(i for i, word in enumerate(of) if word)] for of in found]
    label = accesses.index("load")  # one logit, the others are read by eights
    assert "store" in accesses[label:]
    assert "barrier" in accesses[label : label + accesses[label:].index("store")]
    # Its own gradient is written over what its column got, for the same reason.
    stored = len(accesses) - accesses[::-1].index("store")
    assert accesses.count("last") == 1 and accesses[stored:] == ["barrier", "last"]


@pytest.mark.parametrize("frozen", [True, False])
def test_the_losss_softcap_is_the_gpus_own_tanh_for_bf16(frozen):
    """Once for each reading of a logit, and no division beside it: of arithmetic there was more than of bytes."""
    from tests.kernels._hopper import compiling

    for dtype in (BF16, torch.float32):
        hidden, weight = (random(n, 64).to(dtype).requires_grad_(grad) for n, grad in ((7, True), (5000, not frozen)))
        with compiling(linear_cross_entropy) as kernels:
            call = linear_cross_entropy.linear_cross_entropy
            # With a bias that is trained too, a backward computes logits again.
            bias = None if frozen else random(5000).to(dtype).requires_grad_()
            call(hidden, weight, bias, torch.arange(7), softcap=30.0, reduction="none").sum().backward()
        kernels = [k for k in kernels if not k.metadata.name.startswith("_scale_")]
        each = [k.metadata.num_warps * 32 for k in kernels]
        assert len(kernels) == (1 if frozen else 2)
        for kernel, threads in zip(kernels, each, strict=True):
            ptx = kernel.asm["ptx"]
            logits = 8192 // threads * (2 if kernel.metadata.name == "_forward_kernel" and frozen else 1)
            extra = 1 if kernel.metadata.name == "_forward_kernel" else 0  # the label's
            assert ptx.count("tanh.approx") == (logits + extra if dtype == BF16 else 0)
            assert (ptx.count("div.full.f32") > logits) == (dtype != BF16)


@pytest.mark.parametrize("length, most", [(320, 168), (300, 232)])
def test_dk_and_dv_keep_little_in_memory(length, most, monkeypatch):
    """Of a causal head of 128: 152 and 232 bytes by Triton 3.6, 168 and 176 by 3.7, where 16 divides the length and
    where not. Tiles on the diagonal that look at the sequence's end took 168 and 296, 200 and 216.
    """
    from tests.kernels._hopper import compiling, stack_bytes

    monkeypatch.setattr(attention, "_roomy", lambda device: True)
    q, k, v = (random(1, length, heads, 128).transpose(1, 2).requires_grad_() for heads in (4, 1, 1))
    with compiling(attention) as kernels:
        attention.attention(q, k, v, causal=True).sum().backward()
    found = {kernel.metadata.name: stack_bytes(kernel) for kernel in kernels}
    assert found.pop("_dkdv_kernel") <= most and len(found) == 3 and not any(found.values()), found
