"""Tensors of more than 2³¹ elements, where 32-bit offsets wrap around: every op, forward and backward, in bf16.

Rows (sequences, tokens) do not depend on each other, so a few of them, at the beginning, around element 2³¹ and at the
end, are computed a second time alone, and must be the same. Gradients come in for these rows only, so that a weight's,
which is a sum over all rows, must be the same too, and every other row's must be zero.

On a GPU with 60 GiB free. On a CPU the same checks run at 2¹⁴ elements, which shows that they work.
"""

from __future__ import annotations

import gc
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from fastft.compare import assert_bitwise, assert_within
from fastft.kernels import (
    _side_by_side,
    attention,
    glu,
    layer_norm,
    linear_cross_entropy,
    load,
    lora_glu,
    lora_linear,
    lora_mlp,
    lora_stack,
    nf4,
    norm_rotary,
    rms_norm,
    rotary,
)
from fastft.kernels._dense_weights import release_scratch
from tests.kernels._each import tables

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
LIMIT = 2**31 if CUDA else 2**14
#: Size of a row.
N = 4096 if CUDA else 64
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def room() -> Iterator[None]:
    torch.manual_seed(0)
    if CUDA:
        # A failure's traceback, which pytest leaves for debuggers, holds tensors.
        sys.last_exc = sys.last_value = sys.last_traceback = None
        gc.collect()
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0] / 2**30
        if free < 60:
            pytest.skip(f"{free:.0f} GiB are free on the GPU, 60 are needed")
    yield
    release_scratch()
    if CUDA:
        torch.cuda.empty_cache()


def new(*shape: int, scale: float = 1.0, dtype: torch.dtype = BF16) -> torch.Tensor:
    t = torch.empty(shape, dtype=dtype, device=DEVICE).normal_()
    return t.mul_(scale) if scale != 1 else t


def picked(rows: int, of: int) -> torch.Tensor:
    """The rows to look at, of ``rows`` with ``of`` elements each."""
    middle = LIMIT // of
    assert 2 < middle < rows - 1 and rows * of > LIMIT
    return torch.tensor([0, 1, middle - 1, middle, rows - 1], device=DEVICE)


def rounded(name: str, actual: torch.Tensor, same: torch.Tensor, exact: torch.Tensor) -> None:
    """As exact as the op is on a small tensor: cuBLAS and cuDNN sum in another order there."""
    assert_within(name, actual, same, exact, length=N)


def check(
    call: Callable[..., torch.Tensor],
    reference: Callable[..., torch.Tensor],
    large: Sequence[torch.Tensor],
    shared: Sequence[torch.Tensor],
    rows: torch.Tensor,
    *,
    same_bits: bool = True,
) -> None:
    """``call(*large, *shared)`` for ``rows`` of the first axis of ``large``, and all gradients that come from these
    rows alone.
    """

    def leaves(tensors: Sequence[torch.Tensor], dtype: torch.dtype | None = None) -> list[torch.Tensor]:
        return [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]

    few = [t[rows] for t in large]
    large, parts, exact_parts = leaves(large), leaves(few), leaves(few, torch.float64)
    alone, exact_shared = leaves(shared), leaves(shared, torch.float64)
    shared = leaves(shared)
    out, part, exact = call(*large, *shared), call(*parts, *alone), reference(*exact_parts, *exact_shared)
    assert out.numel() > LIMIT or any(t.numel() > LIMIT for t in large)
    seed = torch.randn_like(part)
    seeds = torch.zeros_like(out)
    seeds[rows] = seed
    values = out.detach()[rows]
    grads = torch.autograd.grad(out, [*large, *shared], seeds)
    del out, seeds
    same = [part, *torch.autograd.grad(part, [*parts, *alone], seed)]
    exact = [exact, *torch.autograd.grad(exact, [*exact_parts, *exact_shared], seed.double())]
    found = [values]
    for grad in grads[: len(large)]:
        found.append(grad[rows])
        grad[rows] = 0
        assert not grad.any(), "a gradient reached a row that none came in for"
    for i, (value, s, e) in enumerate(zip([*found, *grads[len(large) :]], same, exact, strict=True)):
        if same_bits and i < len(found):
            assert_bitwise(f"value {i}", value, s)
        else:
            rounded(f"value {i}", value, s, e)


#: Op → a function of the op (or its reference) and of x [rows, N], each row of which is computed by itself: what ops'
#: own tests have in their table ``MANY_ROWS``.
MANY_ROWS: dict[str, Callable[..., torch.Tensor]] = {
    name: of for table in tables("MANY_ROWS").values() for name, of in table.items()
}


def test_every_op_has_a_test():
    """A test of an op names it as ``file.op``; or the op's own tests have it in their table ``MANY_ROWS``."""
    tests = {name: inspect.getsource(t) for name, t in globals().items() if name.startswith("test_")}
    del tests["test_every_op_has_a_test"]
    for op in (op for op in load().values() if op.name not in MANY_ROWS):
        spelled = f"{op.call.__module__.rpartition('.')[2]}.{op.name}"
        assert any(re.search(rf"\b{re.escape(spelled)}\b", text) for text in tests.values()), (
            f"no test here calls {spelled}: give its own tests a table MANY_ROWS, or add a test here, which gives "
            "check() an input of more than LIMIT elements, the op, its reference, and the rows to look at"
        )


# --------------------------------------------------------------------------------- norms, GLUs, activations, rotation


def test_rms_norm():
    count = LIMIT // N + 37
    call, of = lambda x, w: rms_norm.rms_norm(x, w, 1e-6), lambda x, w: rms_norm.reference(x, w, 1e-6)
    check(call, of, [new(count, N)], [new(N)], picked(count, N))


def test_rms_norm_of_heads():
    """Rows of a transposed tensor, several a program."""
    batch, heads, width = LIMIT // (8 * N) + 3, N // 16, 16
    call, of = lambda x, w: rms_norm.rms_norm(x, w, 1e-6), lambda x, w: rms_norm.reference(x, w, 1e-6)
    x = new(batch, 8, heads, width).transpose(1, 2)
    check(call, of, [x], [new(width)], picked(batch, 8 * N))


def test_layer_norm():
    count = LIMIT // N + 37
    call = lambda x, w, b: layer_norm.layer_norm(x, w, b, 1e-5)  # noqa: E731
    of = lambda x, w, b: layer_norm.reference(x, w, b, 1e-5)  # noqa: E731
    check(call, of, [new(count, N)], [new(N), new(N)], picked(count, N))


def test_glu():
    count = LIMIT // N + 37
    call, of = lambda g, u: glu.glu(g, u, "silu"), lambda g, u: glu.reference(g, u, "silu")
    check(call, of, [new(count, N), new(count, N)], [], picked(count, N))


def test_glu_packed():
    count = LIMIT // N + 37
    call, of = lambda gu: glu.glu_packed(gu, "gelu_tanh"), lambda gu: glu.packed_reference(gu, "gelu_tanh")
    check(call, of, [new(count, N)], [], picked(count, N))


@pytest.mark.parametrize("name", MANY_ROWS)
def test_of_rows(name):
    op, of, count = load()[name], MANY_ROWS[name], LIMIT // N + 37
    check(lambda x: of(op.call, x), lambda x: of(op.reference, x), [new(count, N)], [], picked(count, N))


@pytest.mark.parametrize("which", ["q", "k"])
def test_rotary(which):
    """q, or k, with as many elements; the result of the other is small and left aside."""
    seq, width = 64, 128 if CUDA else 16
    batch = LIMIT // (seq * N) + 3
    cos, sin = new(1, seq, width), new(1, seq, width)

    def turned(fn: Any, x: torch.Tensor) -> torch.Tensor:
        other = x[:, :1].detach()
        tables = cos.to(x.dtype), sin.to(x.dtype)
        return fn(x, other, *tables)[0] if which == "q" else fn(other, x, *tables)[1]

    x = new(batch, seq, N // width, width).transpose(1, 2)
    rows = picked(batch, seq * N)
    check(lambda x: turned(rotary.rotary, x), lambda x: turned(rotary.reference, x), [x], [], rows)


@pytest.mark.parametrize("which", ["q", "k"])
def test_norm_rotary(which):
    """As of rotary; the weight's gradient is a sum over all heads of all tokens."""
    seq, width = 64, 128 if CUDA else 16
    batch = LIMIT // (seq * N) + 3
    cos, sin = new(1, seq, width), new(1, seq, width)

    def turned(fn: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        other, tables = x[:, :1].detach(), (cos.to(x.dtype), sin.to(x.dtype))
        heads = (x, other) if which == "q" else (other, x)
        return fn(*heads, w, w, *tables, 1e-6)[which == "k"]

    x, rows = new(batch, seq, N // width, width).transpose(1, 2), picked(batch, seq * N)
    call, of = lambda x, w: turned(norm_rotary.norm_rotary, x, w), lambda x, w: turned(norm_rotary.reference, x, w)
    check(call, of, [x], [new(width)], rows)


# ---------------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("kind", ["causal", "window", "padding"])
def test_attention(kind):
    """q, k, v and the result, all large: Triton's kernels, of plain causal attention too (cuDNN's dq is wrong here)."""
    seq, width = 512 if CUDA else 16, 128 if CUDA else 16
    batch = LIMIT // (seq * N) + 2
    rows = picked(batch, seq * N) if CUDA else torch.tensor([0, batch - 2, batch - 1])
    padding = torch.ones(batch, seq, dtype=torch.bool, device=DEVICE)
    padding[:, : seq // 4] = False

    def seen(fn: Any) -> Callable[..., torch.Tensor]:
        def run(*qkv: torch.Tensor) -> torch.Tensor:
            mask = {"window": {"window": seq // 3}, "padding": {"padding": padding[: qkv[0].shape[0]]}}.get(kind, {})
            return fn(*qkv, causal=True, **mask)

        return run

    qkv = [new(batch, seq, N // width, width).transpose(1, 2) for _ in range(3)]
    # Fewer rows of plain causal attention are cuDNN's.
    own = not CUDA or kind != "causal"
    check(seen(attention.attention), seen(attention.reference), qkv, [], rows, same_bits=own)


# ------------------------------------------------------------------------------------------------------------ linears


def _dequantised(rows: int) -> tuple[tuple[Any, ...], Callable[[int, int], torch.Tensor]]:
    """NF4 weights [rows, N], double quantised: the state, and what gives rows [first, last) of the dense weight."""
    blocks = N // 64
    state = (
        torch.randint(0, 256, (rows * N // 2,), dtype=torch.uint8, device=DEVICE),
        torch.randint(0, 256, (rows * blocks,), dtype=torch.uint8, device=DEVICE),
        torch.rand(256, device=DEVICE),
        torch.tensor(0.01, device=DEVICE),
        torch.rand(-(-rows * blocks // 2), device=DEVICE) * 0.1,
    )

    def part(first: int, last: int) -> torch.Tensor:
        packed, absmax, code, offset, absmax2 = state
        ours = (packed[first * N // 2 : last * N // 2], absmax[first * blocks : last * blocks], code, offset)
        second = absmax2[first * blocks // 2 : -(-last * blocks // 2)]
        return nf4.nf4_dequantize_reference(*ours, second, 64, 2, (last - first, N), BF16)

    return state, part


def test_nf4_dequantize():
    rows = LIMIT // N + 38
    state, part = _dequantised(rows)
    weight = nf4.nf4_dequantize(*state, 64, 2, (rows, N), BF16)
    for first in (0, LIMIT // N - 2, rows - 4):
        assert_bitwise(f"rows from {first} on", weight[first : first + 4], part(first, first + 4))


def test_lora_linear_of_a_large_nf4_weight():
    """A head's size: the dense copy has more than 2³¹ elements, x and y are small."""
    rows = LIMIT // N + 38
    (packed, *quant), part = _dequantised(rows)
    x, seed = new(3, N).requires_grad_(), torch.zeros(3, rows, dtype=BF16, device=DEVICE)
    y = lora_linear.lora_linear(x, packed, quant=quant, shape=(rows, N), blocksize2=2)
    firsts = (0, LIMIT // N - 2, rows - 4)
    for first in firsts:
        dense = part(first, first + 4)
        exact = torch.nn.functional.linear(x.detach().double(), dense.double())
        rounded("y", y[:, first : first + 4], torch.nn.functional.linear(x.detach(), dense), exact)
        seed[:, first : first + 4] = new(3, 4)
    (dx,) = torch.autograd.grad(y, [x], seed)
    dense = torch.cat([part(first, first + 4) for first in firsts])
    g = torch.cat([seed[:, first : first + 4] for first in firsts], 1)
    rounded("dx", dx, g @ dense, g.double() @ dense.double())


@pytest.mark.parametrize("large", ["x", "y"])
def test_lora_linear(large):
    k, n = (N, 96) if large == "x" else (96, N)
    tokens = LIMIT // N + 37
    weight, down, up = new(n, k, scale=k**-0.5), new(16, k, scale=k**-0.5), new(n, 16, scale=0.25)
    call = lambda x, w, a, b: lora_linear.lora_linear(x, w, None, [a], [b], [0.5])  # noqa: E731
    of = lambda x, w, a, b: lora_linear.lora_linear_reference(x, w, None, [a], [b], [0.5])  # noqa: E731
    check(call, of, [new(tokens, k)], [weight, down, up], picked(tokens, N), same_bits=False)


@pytest.mark.parametrize("large", ["x", "y"])
def test_lora_linears(large):
    """Two layers, their results side by side: of y the first one is large."""
    k, widths = (N, (96, 32)) if large == "x" else (96, (N, 32))
    tokens = LIMIT // N + 37
    shared = [new(n, k, scale=k**-0.5) for n in widths]
    shared += [new(16, k, scale=k**-0.5) for _ in widths] + [new(n, 16, scale=0.25) for n in widths]

    def joined(fn: Any) -> Callable[..., torch.Tensor]:
        def run(x: torch.Tensor, *of: torch.Tensor) -> torch.Tensor:
            (w, v), (a, c), (b, d) = of[:2], of[2:4], of[4:]
            return torch.cat(fn(x, [w, v], [], [[a], [c]], [[b], [d]], [[0.5], [2.0]]), -1)

        return run

    call, of = joined(lora_linear.lora_linears), joined(lora_linear.lora_linears_reference)
    check(call, of, [new(tokens, k)], shared, picked(tokens, N), same_bits=False)


def test_lora_glu():
    n, count = N // 2 - 16, LIMIT // N + 37
    call = lambda wide, b, d: lora_glu.lora_glu(wide, [b, d], [2.0, 0.5], "silu")  # noqa: E731
    of = lambda wide, b, d: lora_glu.reference(wide, [b, d], [2.0, 0.5], "silu")  # noqa: E731
    check(
        call, of, [new(count, N)], [new(n, 16, scale=0.25), new(n, 16, scale=0.25)], picked(count, N), same_bits=False
    )


@pytest.mark.parametrize("large", ["x", "wide"])
def test_lora_stack(large):
    k, widths = (N, (48, 24)) if large == "x" else (96, (N // 2 - 16, N // 2 - 16))
    tokens, weight = LIMIT // N + 37, [new(n, k, scale=k**-0.5) for n in widths]
    call = lambda x, a, c: lora_stack.lora_stack(x, weight, [a, c])  # noqa: E731
    of = lambda x, a, c: lora_stack.reference(x, weight, [a, c])  # noqa: E731
    shared = [new(16, k, scale=k**-0.5) for _ in widths]
    check(call, of, [new(tokens, k)], shared, picked(tokens, N), same_bits=False)


@pytest.mark.parametrize("large", ["x", "y"])
def test_lora_mlp(large):
    """Slices of x, or of y, that begin behind element 2³¹."""
    k, n, h = (N, 96, 32) if large == "x" else (32, 96, N)
    tokens = LIMIT // N + 37
    sizes = ((n, k), (n, k), (h, n))
    weight = [new(*size, scale=size[1] ** -0.5) for size in sizes]

    def mlp(fn: Any, **more: Any) -> Callable[..., torch.Tensor]:
        def run(x: torch.Tensor, *thin: torch.Tensor) -> torch.Tensor:
            dense = [w.to(x.dtype) for w in weight]
            return fn(x, "silu", dense, [], [[a] for a in thin[:3]], [[b] for b in thin[3:]], [[0.5]] * 3, **more)

        return run

    shared = [new(16, size[1], scale=size[1] ** -0.5) for size in sizes] + [
        new(size[0], 16, scale=0.25) for size in sizes
    ]
    rows = tokens // 5 + 1
    call, of = mlp(lora_mlp.lora_mlp, rows=rows), mlp(lora_mlp.reference)
    check(call, of, [new(tokens, k)], shared, picked(tokens, N), same_bits=False)


def test_copies_side_by_side():
    """As the backward of q, k and v over NF4 weights makes them."""
    tokens, widths = LIMIT // N + 37, (N // 2, N // 4, N // 4)
    sources = [new(tokens, n) for n in widths]
    out = torch.empty(tokens, N + 8, dtype=BF16, device=DEVICE)
    _side_by_side.side_by_side(out, sources)
    for rows in picked(tokens, N).tolist():
        assert_bitwise(f"row {rows}", out[rows, :N], torch.cat([s[rows] for s in sources]))


# --------------------------------------------------------------------------------------------------------------- loss


def check_loss(
    large: str, frozen: bool, call: Callable[..., torch.Tensor], reference: Callable[..., torch.Tensor]
) -> None:
    """``call(hidden, head, labels)``, a number for each token. Logits never exist whole: their chunks must not count in
    32 bits either.
    """
    hidden, vocab = (N, 320) if large == "hidden states" else (64, 32 * N)
    of = max(hidden, vocab)
    tokens = LIMIT // of + 37
    rows = torch.tensor([0, 1, LIMIT // of - 1, LIMIT // of, tokens - 1], device=DEVICE)
    labels = torch.randint(0, vocab, (tokens,), device=DEVICE)
    weight = new(vocab, hidden, scale=hidden**-0.5)
    x = new(tokens, hidden).requires_grad_()
    head = weight.requires_grad_(not frozen)
    loss = call(x, head, labels)
    part, w = x.detach()[rows].requires_grad_(), weight.detach().requires_grad_()
    same = reference(part, w, labels[rows])
    part64, w64 = part.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    exact = reference(part64, w64, labels[rows])
    rounded("loss", loss.detach()[rows], same, exact)
    seeds = torch.zeros_like(loss)
    seeds[rows] = torch.rand(len(rows), device=DEVICE) + 0.5
    grads = torch.autograd.grad(loss, [x] if frozen else [x, head], seeds)
    sames = torch.autograd.grad(same, [part, w], seeds[rows])
    exacts = torch.autograd.grad(exact, [part64, w64], seeds[rows].double())
    rounded("d hidden", grads[0][rows], sames[0], exacts[0])
    grads[0][rows] = 0
    assert not grads[0].any()
    if not frozen:
        rounded("d weight", grads[1], sames[1], exacts[1])


@pytest.mark.parametrize("way", ["chunks", "fused"])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("large", ["hidden states", "logits"])
def test_linear_cross_entropy(large, frozen, way):
    def of_tokens(fn: Any) -> Callable[..., torch.Tensor]:
        return lambda x, head, labels: fn(x, head, None, labels, reduction="none")

    of = linear_cross_entropy.linear_cross_entropy_reference
    call = linear_cross_entropy.linear_cross_entropy if way == "chunks" else linear_cross_entropy.fused_cross_entropy
    check_loss(large, frozen, of_tokens(call), of_tokens(of))


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("large", ["hidden states", "logits"])
def test_linear_log_prob(large, frozen):
    """With the entropy, which has a gradient too."""

    def of_tokens(fn: Any) -> Callable[..., torch.Tensor]:
        def run(x: torch.Tensor, head: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            out = fn(x, head, None, labels, entropy=True)
            return out.log_prob + out.entropy

        return run

    call, of = linear_cross_entropy.linear_log_prob, linear_cross_entropy.linear_log_prob_reference
    check_loss(large, frozen, of_tokens(call), of_tokens(of))
