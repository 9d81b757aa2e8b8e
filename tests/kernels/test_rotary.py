"""Rotary: every style against transformers' own spellings and fp64, layouts, raw ops, the formula itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from fastft.compare import assert_within
from fastft.judging import Wide
from fastft.kernels._op import OPS
from fastft.kernels.rotary import CONFIG, STYLES, reference, rotary, supported
from tests.kernels._check import check_op
from tests.kernels._derivations import BOTH, Array, Derivation
from tests.kernels._fuzz import Draw, flags
from tests.kernels._samples import Named, New, Sample
from tests.mutation._mutant import Mutant

OP = OPS["rotary"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def heads(batch, n, seq, dim, dtype=torch.float32, device="cpu"):
    """As a projection gives them: ``[batch, n, seq, dim]``, a transposed view."""
    x = torch.randn(batch, seq, n * dim, dtype=dtype, device=device).view(batch, seq, n, dim).transpose(1, 2)
    return x.requires_grad_()


def tables(batch, seq, width, dtype=torch.float32, device="cpu"):
    """Unrelated numbers: halves that disagree, and no cos² + sin² = 1, show what the formula itself does."""
    return [torch.randn(batch, seq, width, device=device).to(dtype) for _ in range(2)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("width, rotary_dim", [(32, None), (16, None), (12, 12), (6, 12)])
def test_matches_reference(width, rotary_dim, style, dtype, device):
    q, k = heads(2, 4, 5, 32, dtype, device), heads(2, 2, 5, 32, dtype, device)
    check_op(OP, (q, k, *tables(2, 5, width, dtype, device)), style, None, rotary_dim)


@pytest.mark.parametrize("style", STYLES)
def test_heads_that_fill_no_tile(style, device):
    q, k = heads(1, 7, 3, 80, device=device), heads(1, 1, 3, 80, device=device)
    check_op(OP, (q, k, *tables(1, 3, 80, device=device)), style)


def test_more_heads_than_a_tile(device):
    q, k = heads(1, 37, 2, 128, device=device), heads(1, 3, 2, 128, device=device)
    check_op(OP, (q, k, *tables(1, 2, 128, device=device)), "half")


@pytest.mark.parametrize("style", STYLES)
def test_several_tiles_of_q_and_of_k(style, device):
    q, k = heads(1, 9, 3, 136, device=device), heads(1, 6, 3, 136, device=device)
    with CONFIG.using({"TILE": 512}):  # four heads
        check_op(OP, (q, k, *tables(1, 3, 128, device=device)), style, None, 128)


def test_heuristic_gives_each_thread_enough_to_load():
    """(q heads, k heads, head size, rotated). Gemma 3 1B has four heads, Phi-2 rotates 32 of 80 elements."""
    found = [
        [*CONFIG.heuristic(torch.device("cuda"), torch.bfloat16, 8192, *key, "half", False).values()]
        for key in [(32, 8, 128, 128), (16, 8, 256, 256), (32, 8, 64, 64), (4, 1, 256, 256), (32, 32, 80, 32)]
    ]
    assert found == [[2048, 4], [2048, 8], [1024, 4], [1024, 1], [512, 4]]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("out_dtype", DTYPES)
def test_wider_result_and_shared_tables(out_dtype, batch, device):
    q, k = (heads(3, n, 4, 16, torch.float16, device) for n in (4, 1))
    check_op(OP, (q, k, *tables(batch, 4, 16, torch.float32, device)), "half", out_dtype)


LAYOUTS = {
    "contiguous": lambda d: [torch.randn(2, n, 5, 16, device=d) for n in (4, 2)],
    "slices of a fused projection": lambda d: [
        t.view(2, 5, -1, 16).transpose(1, 2) for t in torch.randn(2, 5, 128, device=d).split([64, 32, 32], -1)[:2]
    ],
    "part of a head": lambda d: [torch.randn(2, n, 5, 24, device=d)[..., 8:] for n in (4, 1)],
    "rows not contiguous": lambda d: [torch.randn(2, n, 16, 5, device=d).transpose(2, 3) for n in (4, 2)],
    "empty": lambda d: [torch.randn(0, n, 5, 16, device=d) for n in (4, 2)],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strided_grads", [False, True])
def test_layouts(layout, strided_grads, device):
    q, k = (t.requires_grad_() for t in LAYOUTS[layout](device))
    check_op(OP, (q, k, *tables(1, 5, 16, device=device)), "half", strided_grads=strided_grads)


@pytest.mark.parametrize("strided_grads", [False, True])
def test_sequence_before_heads(strided_grads, device):
    q, k = (torch.randn(2, 5, n, 16, device=device, requires_grad=True) for n in (4, 2))
    cos, sin = tables(2, 5, 8, device=device)
    check_op(OP, (q, k, cos, sin), "interleaved", None, None, 1, strided_grads=strided_grads)


def test_strided_tables(device):
    q, k = heads(2, 4, 5, 16, device=device), heads(2, 2, 5, 16, device=device)
    polar = torch.view_as_real(torch.randn(2, 5, 8, dtype=torch.complex64, device=device))
    check_op(OP, (q, k, polar[..., 0], polar[..., 1]), "interleaved")


def test_complex_table(device):
    q, k = heads(2, 4, 5, 16, device=device), heads(2, 2, 5, 16, device=device)
    polar = torch.randn(2, 5, 8, dtype=torch.complex64, device=device)
    expected = rotary(q, k, polar.real, polar.imag, "interleaved")
    for table in (polar, polar[:, None]):
        for a, b in zip(rotary(q, k, table, None, "interleaved"), expected, strict=True):
            assert torch.equal(a, b)


def test_tables_with_an_axis_for_the_heads(device):
    q, k = heads(2, 4, 5, 16, device=device), heads(2, 2, 5, 16, device=device)
    cos, sin = tables(2, 5, 16, device=device)
    for a, b in zip(rotary(q, k, cos[:, None], sin[:, None]), rotary(q, k, cos, sin), strict=True):
        assert torch.equal(a, b)


def test_q_alone(device):
    q, k = heads(2, 4, 5, 16, device=device), heads(2, 2, 5, 16, device=device)
    cos, sin = tables(1, 5, 16, device=device)
    check_op(OP, (q, None, cos, sin), "half")
    assert torch.equal(rotary(q, None, cos, sin), rotary(q, k, cos, sin)[0])


def test_only_what_is_asked_for(device):
    q, k = heads(2, 4, 5, 16, device=device), heads(2, 2, 5, 16, device=device)
    cos, sin = tables(1, 5, 16, device=device)
    both = torch.autograd.grad([y.square().sum() for y in rotary(q, k, cos, sin)], (q, k))
    (dq,) = torch.autograd.grad([y.square().sum() for y in rotary(q, k.detach(), cos, sin)][:1], q)
    (dk,) = torch.autograd.grad([y.square().sum() for y in rotary(q.detach(), k, cos, sin)][1:], k)
    assert torch.equal(dq, both[0]) and torch.equal(dk, both[1])


def spellings():
    """transformers' own functions beside the arguments that say the same here."""
    from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as cohere
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave as deepseek
    from transformers.models.gpt_oss.modeling_gpt_oss import apply_rotary_pos_emb as gpt_oss
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama
    from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as phi3

    return [
        (llama, 16, dict(style="half")),
        (phi3, 12, dict(style="half", rotary_dim=12)),
        (gpt_oss, 8, dict(style="half")),
        (cohere, 16, dict(style="interleaved")),
        (deepseek, 16, dict(style="interleaved_to_half")),
    ]


@pytest.mark.parametrize("i", range(5))
def test_transformers_spellings(i, device):
    pytest.importorskip("transformers")
    fn, width, kwargs = spellings()[i]
    q, k = heads(2, 4, 5, 16, device=device), heads(2, 2, 5, 16, device=device)
    # transformers' own tables repeat each angle once (DeepSeek reads one half of them only).
    angle = torch.randn(2, 5, width if fn.__module__.endswith("gpt_oss") else width // 2, device=device)
    if fn.__module__.endswith("cohere"):
        angle = angle.repeat_interleave(2, dim=-1)
    elif not fn.__module__.endswith("gpt_oss"):
        angle = torch.cat((angle, angle), dim=-1)
    operands = [q, k, angle.cos(), angle.sin()]
    with Wide(torch.float64, torch.float32):  # some cast to fp32 and back
        exact = fn(*(t.double() for t in operands))
    for name, a, s, e in zip("qk", rotary(*operands, **kwargs), fn(*operands), exact, strict=True):
        assert_within(name, a, s, e)


def test_complex_spelling(device):
    pytest.importorskip("transformers")
    from transformers.models.llama4.modeling_llama4 import apply_rotary_emb

    q, k = (torch.randn(2, 5, n, 16, device=device) for n in (4, 2))
    angle = torch.randn(2, 5, 8, device=device)
    cos, sin = angle.cos(), angle.sin()
    same = apply_rotary_emb(q, k, torch.complex(cos, sin))
    with Wide(torch.float64, torch.float32):  # it casts to fp32 and back
        exact = apply_rotary_emb(q.double(), k.double(), torch.complex(cos.double(), sin.double()))
    for name, a, s, e in zip("qk", rotary(q, k, cos, sin, "interleaved", seq_dim=1), same, exact, strict=True):
        assert_within(name, a, s, e)


@pytest.mark.parametrize(
    "layout, style",
    [("contiguous", "half"), ("slices of a fused projection", "interleaved_to_half"), ("empty", "interleaved")],
)
def test_raw_ops(layout, style, device):
    q, k = LAYOUTS[layout](device)
    cos, sin = tables(1, 5, 8, device=device)
    for second in (k, None):
        torch.library.opcheck(torch.ops.fastft.rotary.default, (q, second, cos, sin, style, None, 16, 2))
    for grads in ((q, k), (q, None), (None, k)):
        args = (*grads, cos, sin, style, torch.float16, 16, 2)
        torch.library.opcheck(torch.ops.fastft.rotary_backward.default, args)


@pytest.mark.parametrize("fn", [rotary, reference])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("width", [6, 3])
def test_gradcheck(fn, style, width):
    q, k = (torch.randn(2, n, 3, 8, dtype=torch.float64, requires_grad=True) for n in (2, 1))
    cos, sin = (torch.randn(1, 3, width, dtype=torch.float64) for _ in range(2))
    assert torch.autograd.gradcheck(lambda q, k: fn(q, k, cos, sin, style, None, 6), (q, k))


def test_compiles(device):
    q, k = heads(2, 4, 5, 16, device=device), heads(2, 2, 5, 16, device=device)
    cos, sin = tables(1, 5, 16, device=device)
    compiled = torch.compile(lambda q, k: rotary(q, k, cos, sin), backend="aot_eager", fullgraph=True)
    ours = torch.autograd.grad([y.square().sum() for y in compiled(q, k)], (q, k))
    eager = torch.autograd.grad([y.square().sum() for y in rotary(q, k, cos, sin)], (q, k))
    assert all(torch.equal(a, b) for a, b in zip(ours, eager, strict=True))


def test_tables_that_require_a_gradient_are_refused(device):
    q, k = heads(1, 2, 3, 8, device=device), heads(1, 2, 3, 8, device=device)
    cos, sin = tables(1, 3, 8, device=device)
    with pytest.raises(ValueError, match="gradients of cos and sin"):
        rotary(q, k, cos.requires_grad_(), sin)


def empty(*shape, dtype=torch.float32, grad=False):
    return torch.empty(shape, dtype=dtype, requires_grad=grad)


@pytest.mark.parametrize(
    "args, code",
    [
        ((empty(2, 4, 5, 16), empty(2, 1, 5, 16), empty(1, 5, 16), empty(1, 5, 16)), None),
        ((empty(2, 4, 5, 16), None, empty(2, 5, 8), empty(2, 5, 8), "interleaved"), None),
        ((empty(2, 4, 5, 16), None, empty(2, 5, 4), empty(2, 5, 4), "half", None, 8), None),
        ((empty(2, 4, 5, 16), None, empty(2, 5, 8), empty(2, 5, 8), "spiral"), "style"),
        ((empty(2, 4, 5, 16, dtype=torch.int64), None, empty(2, 5, 8), empty(2, 5, 8)), "dtype"),
        ((empty(2, 4, 5, 16), None, empty(2, 5, 8), empty(2, 5, 8), "half", torch.int32), "dtype"),
        ((empty(2, 4, 5, 16), empty(2, 4, 5, 16, dtype=torch.half), empty(2, 5, 8), empty(2, 5, 8)), "dtype"),
        ((empty(2, 4, 5, 16), None, empty(2, 5, 8, grad=True), empty(2, 5, 8)), "gradient"),
        ((empty(2, 4, 16), None, empty(2, 5, 8), empty(2, 5, 8)), "shape"),
        ((empty(2, 4, 5, 16), empty(2, 4, 6, 16), empty(2, 5, 8), empty(2, 5, 8)), "shape"),
        ((empty(2, 4, 5, 16), None, empty(2, 6, 8), empty(2, 6, 8)), "shape"),
        ((empty(2, 4, 5, 16), None, empty(2, 5, 4), empty(2, 5, 4)), "shape"),
        ((empty(2, 4, 5, 16), None, empty(2, 1, 5, 16), empty(2, 1, 5, 16)), None),
        ((empty(2, 4, 5, 16), None, empty(2, 4, 5, 16), empty(2, 4, 5, 16)), "shape"),
        ((empty(2, 4, 5, 16), None, empty(2, 5, 8, dtype=torch.complex64), None, "interleaved"), None),
        ((empty(2, 4, 5, 16), None, empty(2, 5, 8), None), "shape"),
        ((empty(2, 4, 5, 15), None, empty(2, 5, 15), empty(2, 5, 15)), "shape"),
        ((empty(2, 4, 5, 2048), None, empty(2, 5, 2048), empty(2, 5, 2048)), "size"),
    ],
)
def test_supported(args, code):
    reason = supported(*args)
    assert (reason and reason.code) == code


# ----------------------------------------------------------------------------------- for the tests that go over all ops


def _rotary_samples(new: New, n: int) -> Named:
    for style in STYLES:
        q, k = new(1, 3 * n, 2, 6).transpose(1, 2), new(1, 3 * n, 1, 6).transpose(1, 2)
        yield style, (q, k, new(1, 3 * n, 3, grad=False), new(1, 3 * n, 3, grad=False), style), {}
    tables = new(2, n, 4, grad=False), new(2, n, 4, grad=False)
    yield "part of a head, q alone", (new(2, 2, n, 6), None, *tables, "half", None, 4), {}
    yield "sequence first", (new(2, n, 2, 4), new(2, n, 1, 4), *tables), {"seq_dim": 1}


SAMPLES = {"rotary": _rotary_samples}


def _rotary_case(d: Draw) -> Sample:
    batch, seq, half = d(st.integers(1, 3)), d(st.integers(1, 9)), d(st.sampled_from((1, 3, 8, 16, 20)))
    width = 2 * half + d(st.sampled_from((0, 0, 2, 6)))
    style, seq_dim = d(st.sampled_from(tuple(STYLES))), d(st.sampled_from((1, 2)))

    def heads(count: int) -> torch.Tensor:
        x = d.tensor(batch, seq, count, width, grad=True)
        return x if seq_dim == 1 else x.detach().transpose(1, 2).requires_grad_()

    angle = torch.randn(d(st.sampled_from((1, batch))), seq, half, generator=d.generator).to(d.device)
    if d(flags):
        angle = angle.repeat_interleave(2, -1) if style == "interleaved" else torch.cat((angle, angle), -1)
    k = d.maybe(lambda: heads(d(st.integers(1, 3))))
    tables = angle.cos().to(d.dtype), angle.sin().to(d.dtype)
    return Sample("", (heads(d(st.integers(1, 5))), k, *tables, style, None, 2 * half, seq_dim), {})


FUZZ = {"rotary": _rotary_case}
ROWWISE = ("rotary",)


def _rotated(x: Array, cos: Array, sin: Array, style: str) -> Array:
    """As transformers spells the styles, with tables [batch or 1, seq, R or R/2] of which it has the whole rows."""
    width, half = x.shape[-1], x.shape[-1] // 2

    def whole(t: Array) -> Array:
        if t.shape[-1] < width:
            t = np.repeat(t, 2, axis=-1) if style == "interleaved" else np.concatenate((t, t), axis=-1)
        return t[:, None]

    if style == "interleaved":
        turned = np.stack((-x[..., 1::2], x[..., ::2]), axis=-1).reshape(x.shape)
    else:
        if style == "interleaved_to_half":
            x = np.concatenate((x[..., ::2], x[..., 1::2]), axis=-1)
        turned = np.concatenate((-x[..., half:], x[..., :half]), axis=-1)
    return x * whole(cos) + turned * whole(sin)


def _rotary_derivations() -> list[Derivation]:
    def two(style: str, width: int) -> Derivation:
        def formula(q: Array, k: Array, cos: Array, sin: Array) -> list[Array]:
            return [_rotated(q, cos, sin, style), _rotated(k, cos, sin, style)]

        return Derivation(
            f"{style}, tables of {width}",
            {"q": (1, 3, 2, 4), "k": (1, 1, 2, 4), "cos": (1, 2, width), "sin": (1, 2, width)},
            lambda fn, q, k, cos, sin: fn(q, k, cos, sin, style),
            formula,
            frozen=("cos", "sin"),
            outputs=2,
            simplify=BOTH,
        )

    def part(q: Array, cos: Array, sin: Array) -> list[Array]:
        return [np.concatenate((_rotated(q[..., :4], cos, sin, "half"), q[..., 4:]), axis=-1)]

    shapes = {"q": (2, 1, 2, 6), "cos": (2, 2, 4), "sin": (2, 2, 4)}
    alone = Derivation(
        "part of a head, q alone",
        shapes,
        lambda fn, q, cos, sin: fn(q, None, cos, sin, "half", None, 4),
        part,
        frozen=("cos", "sin"),
    )
    return [two(style, width) for style in STYLES for width in (4, 2)] + [alone]


DERIVATIONS = {"rotary": _rotary_derivations}

SMALL_TILES = {"MOST": 4}

MUTANTS = (
    Mutant(
        "rotary: rotates the other way",
        "kernels/rotary.py",
        "turned_first = first * c1[None, :] - second * s1[None, :]",
        "turned_first = first * c1[None, :] + second * s1[None, :]",
        'tests/kernels/test_rotary.py -k "matches_reference"',
        interpret=True,
    ),
    Mutant(
        "rotary: backward is the forward",
        "kernels/rotary.py",
        "    if TRANSPOSE:\n"
        "        turned_first = first * c1[None, :] + second * s2[None, :]\n"
        "        turned_second = second * c2[None, :] - first * s1[None, :]",
        "    if TRANSPOSE:\n"
        "        turned_first = first * c1[None, :] - second * s2[None, :]\n"
        "        turned_second = second * c2[None, :] + first * s1[None, :]",
        'tests/kernels/test_rotary.py -k "matches_reference"',
        interpret=True,
    ),
    Mutant(
        "rotary: PyTorch backward is the forward",
        "kernels/rotary.py",
        "    if transpose:\n        turned = _put(first * c1 + second * s2, second * c2 - first * s1, x_pairs)",
        "    if transpose:\n        turned = _put(first * c1 - second * s2, second * c2 + first * s1, x_pairs)",
        'tests/kernels/test_rotary.py -k "matches_reference"',
    ),
    Mutant(
        "rotary: the passed part is lost",
        "kernels/rotary.py",
        "tl.store(y_ptr + at[:, None] + col[None, :], rest.to(y_ptr.dtype.element_ty), mask=both)",
        "tl.store(y_ptr + at[:, None] + col[None, :], (0.0 * rest).to(y_ptr.dtype.element_ty), mask=both)",
        "tests/kernels/test_rotary.py::test_matches_reference[12-12-half-dtype0]",
        interpret=True,
    ),
    Mutant(
        "rotary: every tile of k is its first",
        "kernels/rotary.py",
        "_load_heads(k_ptr, start, k_h",
        "_load_heads(k_ptr, 0, k_h",
        "tests/kernels/test_rotary.py -k several_tiles",
        interpret=True,
    ),
    Mutant(
        "rotary: tables of the first sequence for all",
        "kernels/rotary.py",
        "return (t.stride(0) if t.shape[0] > 1 else 0), t.stride(1), t.stride(2)",
        "return 0, t.stride(1), t.stride(2)",
        "tests/kernels/test_rotary.py",
        interpret=True,
    ),
)
