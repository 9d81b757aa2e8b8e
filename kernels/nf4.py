"""NF4 weights: dequantise to a dense [N, K] matrix in one launch, double quantisation included.

QLoRA (Dettmers et al., 2023, arXiv:2305.14314) stores a weight as 4-bit indices into a table of 16 levels, ``NF4``, and
one scale for each block of ``blocksize`` consecutive weights of the flattened [N, K] matrix::

    w[i] = NF4[q[i]] · absmax[i // blocksize]                         (in fp32, then one rounding to ``dtype``)

Two indices share a byte: weight 2i is its high nibble, weight 2i + 1 its low one. With double quantisation the scales
are 8-bit indices themselves::

    absmax[j] = absmax_code[absmax8[j]] · absmax2[j // blocksize2] + absmax_offset

in fp32, product and sum rounded separately. These are bitsandbytes' formulas in bitsandbytes' order of roundings: the
result equals ``bitsandbytes.functional.dequantize_4bit`` on CUDA bit for bit.

The op is memory bound: it reads half a byte and writes ``dtype.itemsize`` bytes a weight. The weight is frozen by
construction, so there is no backward.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import sympy
import torch

from fastft.kernels._config import Config, Space, crowded
from fastft.kernels._inputs import Inputs, Model, New
from fastft.kernels._op import Cost, Op, Reason, Recompute, raw_op, register, use_triton
from fastft.kernels._triton import cdiv, jit, tl

#: The 16 levels (QLoRA's appendix E): quantiles of a standard normal, scaled to [-1, 1], with an exact zero.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@functools.cache
def _levels(device: torch.device) -> torch.Tensor:
    return torch.tensor(NF4, dtype=torch.float32, device=device)


# ---------------------------------------------------------------------------------------------------------- reference


def nf4_absmax(
    absmax: torch.Tensor,
    absmax_code: torch.Tensor | None = None,
    absmax_offset: torch.Tensor | None = None,
    absmax2: torch.Tensor | None = None,
    blocksize2: int = 256,
) -> torch.Tensor:
    """The fp32 scale of each block, [blocks]: ``absmax`` itself, or decoded from its 8-bit form."""
    if absmax_code is None or absmax2 is None or absmax_offset is None:
        return absmax
    scale2 = absmax2.repeat_interleave(blocksize2)[: absmax.numel()]
    return absmax_code[absmax.long()] * scale2 + absmax_offset


def nf4_dequantize_reference(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    absmax_code: torch.Tensor | None,
    absmax_offset: torch.Tensor | None,
    absmax2: torch.Tensor | None,
    blocksize: int,
    blocksize2: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """:func:`nf4_dequantize` in plain PyTorch."""
    size = math.prod(shape)
    levels = torch.tensor(NF4, dtype=torch.float32, device=packed.device)  # of its own: a trace makes a fake one
    data = packed.reshape(-1).view(torch.uint8)[: (size + 1) // 2]
    weight = torch.stack((levels[(data >> 4).long()], levels[(data & 15).long()]), -1).view(-1)[:size]
    scale = nf4_absmax(absmax, absmax_code, absmax_offset, absmax2, blocksize2).repeat_interleave(blocksize)[:size]
    return (weight * scale).to(dtype).view(*shape)


# ------------------------------------------------------------------------------------------------------------- kernel

#: A program's tile is GROUPS × 4 bytes: 8 weights a thread and step, so that each thread stores 16 bytes of bf16 at
#: once, neighbours side by side.
GROUPS = 512


def _groups(device: torch.device, dtype: torch.dtype, size: int, blocksize: int, double: bool) -> Config:
    return {"GROUPS": GROUPS, "num_warps": 4}


def _legal(
    config: Config, device: torch.device, dtype: torch.dtype, size: int, blocksize: int, double: bool
) -> str | None:
    # The kernel counts on tiles that begin with a block.
    if config["GROUPS"] * 8 % blocksize:
        return f"a tile of {config['GROUPS'] * 8} weights is no number of blocks of {blocksize}"
    return crowded(config["GROUPS"] * 16, config["num_warps"])


CONFIG = Space(
    "nf4.dequantize",
    {"GROUPS": (64, 128, 256, 512, 1024, 2048), "num_warps": (1, 2, 4, 8)},
    _groups,
    sizes=("size", "blocksize", "double"),
    legal=_legal,
)


@jit
def _dequantize_tile(
    out_ptr, packed_ptr, levels_ptr, absmax_ptr, code_ptr, offset_ptr, absmax2_ptr, size, first,
    BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr, DOUBLE: tl.constexpr, WHOLE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """A weight's groups of 8 from ``first`` on, a 64-bit scalar; all arithmetic on vectors is in 32 bits."""
    group = tl.arange(0, GROUPS)
    left = tl.minimum(size - first * 8, GROUPS * 8).to(tl.int32)
    live = group * 8 < left
    byte = group[:, None] * 4 + tl.arange(0, 4)[None, :]
    # A mask for each group of 8, not for each weight, keeps loads and stores whole: 4 and 16 bytes.
    there = live[:, None] & (tl.full((1, 4), 1, tl.int1) if WHOLE else byte * 2 < left)
    data = tl.load(packed_ptr + first * 4 + byte, mask=there, other=0).to(tl.int32)

    # 8 consecutive weights never straddle a block, and tiles begin with one: blocksizes are powers of two, 32 to 4096.
    block = (first * 8 // BLOCKSIZE).to(tl.int32) + group * 8 // BLOCKSIZE
    if DOUBLE:
        code = tl.load(code_ptr + tl.load(absmax_ptr + block, mask=live, other=0).to(tl.int32))
        scale = code * tl.load(absmax2_ptr + block // BLOCKSIZE2, mask=live, other=0.0) + tl.load(offset_ptr)
    else:
        scale = tl.load(absmax_ptr + block, mask=live, other=0.0)

    high = tl.load(levels_ptr + (data >> 4)) * scale[:, None]
    low = tl.load(levels_ptr + (data & 15)) * scale[:, None]
    weight = tl.interleave(high, low)
    index = group[:, None] * 8 + tl.arange(0, 8)[None, :]
    there = live[:, None] & (tl.full((1, 8), 1, tl.int1) if WHOLE else index < left)
    tl.store(out_ptr + first * 8 + index, weight.to(out_ptr.dtype.element_ty), mask=there)


@jit
def _nf4_dequantize_kernel(
    out_ptr, packed, levels_ptr, absmax, code, offset, absmax2, sizes,
    BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr, DOUBLE: tl.constexpr, WHOLE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Weights that lie behind each other in ``out``; of each its packed numbers, its scales and its size."""
    tile = tl.program_id(0)
    for i in tl.static_range(len(packed)):
        tiles = tl.cdiv(sizes[i], GROUPS * 8)
        if (tile >= 0) & (tile < tiles):
            _dequantize_tile(
                out_ptr, packed[i], levels_ptr, absmax[i], code[i], offset[i], absmax2[i], sizes[i],
                tile.to(tl.int64) * GROUPS, BLOCKSIZE, BLOCKSIZE2, DOUBLE, WHOLE, GROUPS,
            )  # fmt: skip
        tile -= tiles
        out_ptr += sizes[i]


# ---------------------------------------------------------------------------------------------------- launcher and op


#: A weight's scales: absmax, its code, its offset, its own scales.
Scales = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def dequantize_into(
    outs: Sequence[torch.Tensor],
    packed: Sequence[torch.Tensor],
    scales: Sequence[Scales],
    blocksizes: Sequence[int],
) -> None:
    """Write dequantised weights to ``outs``, contiguous tensors of the wanted shapes and of one dtype that lie behind
    each other in memory. ``blocksizes``: blocksize and blocksize2 of each weight, all in a row.

    One launch for all, where they are of one kind. For bodies of ops only: it writes to its arguments.
    """
    own = zip(scales, blocksizes[::2], blocksizes[1::2], strict=True)
    kinds = {(code is None, *blocks) for (_, code, *_), *blocks in own}
    sizes = tuple(out.numel() for out in outs)
    if not use_triton(packed[0]):
        for i, (out, weight) in enumerate(zip(outs, packed, strict=True)):
            blocks = blocksizes[2 * i], blocksizes[2 * i + 1]
            out.copy_(nf4_dequantize_reference(weight, *scales[i], *blocks, out.shape, out.dtype))
    elif len(outs) > 1 and (len(kinds) > 1 or any(size % 8 for size in sizes)):
        for i in range(len(outs)):
            dequantize_into([outs[i]], [packed[i]], [scales[i]], blocksizes[2 * i : 2 * i + 2])
    elif sum(sizes):
        absmax, code, offset, absmax2 = zip(*scales, strict=True)
        device, double = packed[0].device, code[0] is not None
        tile = CONFIG(device, outs[0].dtype, max(sizes), blocksizes[0], double)  # tuned for each weight by itself
        _nf4_dequantize_kernel[(sum(cdiv(size, tile["GROUPS"] * 8) for size in sizes),)](
            outs[0],
            tuple(weight.view(torch.uint8) for weight in packed),
            _levels(device),
            absmax,
            *((code, offset, absmax2) if double else 3 * (absmax,)),
            sizes,
            BLOCKSIZE=blocksizes[0],
            BLOCKSIZE2=blocksizes[1],
            DOUBLE=double,
            WHOLE=sizes[0] % 8 == 0,
            **tile,
            # A fused multiply-add would skip the rounding between product and offset, and with it bit equality.
            enable_fp_fusion=False,
        )


def _nf4_dequantize(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    absmax_code: torch.Tensor | None,
    absmax_offset: torch.Tensor | None,
    absmax2: torch.Tensor | None,
    blocksize: int,
    blocksize2: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    reason = supported(packed, absmax, absmax_code, absmax_offset, absmax2, blocksize, blocksize2, shape, dtype)
    if reason is not None:
        raise ValueError(f"nf4_dequantize: {reason}")
    out = torch.empty(tuple(shape), dtype=dtype, device=packed.device)
    scales = (absmax, absmax_code, absmax_offset, absmax2)
    dequantize_into([out], [packed.contiguous()], [scales], (blocksize, blocksize2))
    return out


_raw = raw_op(
    "nf4_dequantize(Tensor packed, Tensor absmax, Tensor? absmax_code, Tensor? absmax_offset, Tensor? absmax2, "
    "int blocksize, int blocksize2, SymInt[] shape, ScalarType dtype) -> Tensor",
    _nf4_dequantize,
    lambda packed, *rest: packed.new_empty(rest[-2], dtype=rest[-1]),
)


def nf4_dequantize(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    absmax_code: torch.Tensor | None,
    absmax_offset: torch.Tensor | None,
    absmax2: torch.Tensor | None,
    blocksize: int,
    blocksize2: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """The dense weight, [N, K] in ``dtype`` (fp32, fp16, bf16), of an NF4 weight as bitsandbytes stores it.

    ``packed``: ⌈N·K / 2⌉ bytes in any shape and storage dtype. ``absmax``: [blocks] fp32, or uint8 when double
    quantised; then ``absmax_code`` [256], ``absmax_offset`` [] and ``absmax2`` [⌈blocks / blocksize2⌉], all fp32,
    decode it. ``blocksize``: weights for each scale, a power of two; ``blocksize2``: scales for each second-level
    scale. Not differentiable: the weight is frozen.

    Raises ValueError for another dtype, blocksize, or sizes that do not belong together.
    """
    return _raw(packed, absmax, absmax_code, absmax_offset, absmax2, blocksize, blocksize2, shape, dtype)


def supported(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    absmax_code: torch.Tensor | None,
    absmax_offset: torch.Tensor | None,
    absmax2: torch.Tensor | None,
    blocksize: int,
    blocksize2: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Reason | None:
    """None, or why the op cannot run on these arguments."""
    # The levels times an fp32 scale are rounded once, to one of these.
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return Reason("dtype", f"an NF4 weight is dequantised to float32, float16 or bfloat16, not {dtype}")
    # In the kernel 8 consecutive weights share a scale, and a tile of 4096 begins with a block.
    if not 32 <= blocksize <= 4096 or blocksize & (blocksize - 1) or blocksize2 < 1:
        return Reason(
            "blocksize", f"blocksizes {blocksize}, {blocksize2}: a power of two in 32..4096, then one above 0"
        )
    size = math.prod(shape)
    stored = packed.numel() * packed.element_size()
    if stored < (size + 1) // 2:
        return Reason("shape", f"{stored} packed bytes are too few for a weight of shape {tuple(shape)}")
    blocks = -(-size // blocksize)
    if absmax.numel() < blocks:
        return Reason("shape", f"{absmax.numel()} scales are too few for {blocks} blocks of {blocksize}")
    double = (absmax_code is not None, absmax_offset is not None, absmax2 is not None)
    if any(double) != all(double):
        return Reason("quantization", "double quantisation needs absmax_code, absmax_offset and absmax2 together")
    wanted = torch.uint8 if all(double) else torch.float32
    if absmax.dtype != wanted:
        kind = "double" if all(double) else "single"
        return Reason("dtype", f"the scales are {absmax.dtype}; {kind} quantisation has {wanted}")
    if absmax_code is not None and absmax_offset is not None and absmax2 is not None:
        if absmax_code.numel() != 256 or absmax2.numel() < -(-blocks // blocksize2):
            found = f"absmax_code has {absmax_code.numel()} levels, absmax2 {absmax2.numel()} scales"
            return Reason("shape", f"{found}; 256 and at least {-(-blocks // blocksize2)} are needed")
        if {absmax_code.dtype, absmax_offset.dtype, absmax2.dtype} != {torch.float32}:
            return Reason("dtype", "absmax_code, absmax_offset and absmax2 must be float32")
    return None


def cost(N: sympy.Expr, K: sympy.Expr, blocksize: int = 64, itemsize: int = 2) -> Cost:
    """For an [N, K] weight, double quantised (a byte of scale each block), written in ``itemsize`` bytes an element."""
    size = sympy.sympify(N) * K
    moved = size / 2 + size / sympy.Integer(blocksize) + itemsize * size
    return Cost(flops=size, bytes_moved=moved, bytes_kept=sympy.Integer(0))


# --------------------------------------------------------------------------------------------------------------- calls


def sizes(model: Model) -> Iterator[dict[str, Any]]:
    """The weights of a layer, with the scales quantised too and without (bitsandbytes' default)."""
    for out_features, in_features in model.linears:
        for double in (True, False):
            yield {"out_features": out_features, "in_features": in_features, "double": double}


def inputs(new: New, *, out_features: int, in_features: int, double: bool = True) -> Inputs:
    """A packed weight [out_features, in_features] and its scales."""
    packed, *scales = packed_weight(new, out_features, in_features, double)
    scales += [None] * (4 - len(scales))
    return Inputs((packed, *scales, 64, 256, (out_features, in_features), new.dtype))


def packed_weight(new: New, out_features: int, in_features: int, double: bool = True) -> list[Any]:
    """Packed bytes, and what decodes them: one tensor, or four of double quantisation. Random."""
    n = out_features * in_features
    blocks = -(-n // 64)
    packed = new.integers(256, (n + 1) // 2, 1).to(torch.uint8)
    if not double:
        return [packed, new.uniform(blocks) * 0.02]
    code, offset = torch.linspace(-1, 1, 256, device=new.device), torch.tensor(0.03, device=new.device)
    return [packed, new.integers(256, blocks).to(torch.uint8), code, offset, new.uniform(-(-blocks // 256)) * 0.02]


OP = register(
    Op(
        name="nf4_dequantize",
        call=nf4_dequantize,
        reference=nf4_dequantize_reference,
        supported=supported,
        raw=("nf4_dequantize",),
        recompute=Recompute.CHEAP,
        cost=cost,
        sizes=sizes,
        inputs=inputs,
    )
)
