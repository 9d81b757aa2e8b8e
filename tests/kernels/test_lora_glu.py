"""Gated MLPs with adapters on gate and up: kernels against fp64, layouts, raw ops, the formulas themselves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from fastft.autotune.search import MOST, nearest_first
from fastft.kernels import lora_glu as module
from fastft.kernels._op import use_triton
from fastft.kernels.glu import KINDS, glu
from fastft.kernels.lora_glu import OP, lora_glu
from fastft.kernels.lora_linear import lora_linears
from fastft.kernels.lora_stack import lora_stack
from tests.kernels._check import check_op
from tests.kernels._derivations import BOTH, Array, Derivation
from tests.kernels._expressions import ACTIVATIONS, ratio, unary
from tests.kernels._fuzz import SIZES, WIDTHS, Draw
from tests.kernels._samples import Named, New, Sample
from tests.kernels.test_lora_stack import layers
from tests.mutation._mutant import Mutant

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
F32, BF16 = torch.float32, torch.bfloat16


def flat(scaling=(2.0, 0.7), kind="silu"):
    """The op on tensors, and its reference, as :func:`check_op` takes one."""

    def of(fn):
        return lambda wide, gate, up: fn(wide, [gate, up], scaling, kind)

    return SimpleNamespace(name="lora_glu", call=of(lora_glu), reference=of(OP.reference))


def tensors(lead, n, ranks=(4, 4), dtype=F32, adapter=None, device="cpu", spare=0):
    """wide, and both B; ``spare``: columns behind those of h."""
    wide = torch.randn(*lead, 2 * n + sum(ranks) + spare, device=device) * 2
    b = [torch.randn(n, r, device=device) * r**-0.5 for r in ranks]
    return [wide.to(dtype).requires_grad_(), *(t.to(adapter or dtype).requires_grad_() for t in b)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lead, n, ranks", [((2, 5), 48, (4, 4)), ((3,), 135, (16, 3)), ((67,), 8, (1, 33))])
def test_matches_reference(lead, n, ranks, kind, dtype, device):
    check_op(flat(kind=kind), tensors(lead, n, ranks, dtype, device=device), length=max(n, 67))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fp32_adapters(dtype, device):
    """As PEFT keeps them under autocast: rounded where they are used, with gradients that are not."""
    check_op(flat(), tensors((2, 5), 48, (8, 8), dtype, adapter=F32, device=device), length=48)


LAYOUTS = {
    "columns of a wider matrix": lambda t: torch.cat((t, t), -1)[..., : t.shape[-1]],
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "rows not contiguous": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "empty": lambda t: t[:0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strided_grads", [False, True])
def test_layouts(layout, strided_grads, device):
    wide, *b = tensors((2, 5), 12, (3, 2), spare=3, device=device)
    wide = LAYOUTS[layout](wide.detach()).requires_grad_()
    check_op(flat(), [wide, *b], length=12, strided_grads=strided_grads)


def test_what_is_behind_h_is_not_read(device):
    """Its gradient is zero, whatever stands there."""
    wide, *b = tensors((3,), 10, (2, 3), spare=3, device=device)
    with torch.no_grad():
        wide[:, -3:] = torch.nan
    y = lora_glu(wide, b, (1.0, 1.0), "silu")
    (dwide,) = torch.autograd.grad(y.sum(), wide)
    assert y.isfinite().all() and dwide.isfinite().all() and not dwide[:, -3:].any()


@pytest.mark.parametrize("splits", [1, 4])
def test_several_programs_share_a_row(splits, monkeypatch, device):
    """Columns that are no whole number of tiles, and tiles that are no whole number of programs."""
    monkeypatch.setattr(module, "SPLITS", splits)
    monkeypatch.setattr(module, "SPLIT_N", 32)  # 16 in fp32
    monkeypatch.setattr(module, "BLOCK_M", 16)
    check_op(flat(), tensors((41,), 149, (4, 3), spare=1, device=device), length=149)


@pytest.mark.parametrize("dtype, adapter", [(F32, F32), (BF16, F32), (BF16, BF16)], ids=str)
def test_products_after_the_pass(dtype, adapter, device):
    """What tuning may choose in place of sums in the pass; one program for each tile."""
    launched = {}

    class Kernel:
        def __getitem__(self, grid):
            def launch(*args, **options):
                launched.update(grid=grid, **options)
                return kernel[grid](*args, **options)

            return launch

    kernel = module._backward_kernel
    with module.BACKWARD.using({"FUSED": 0, "BLOCK_N": 32}), pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_backward_kernel", Kernel())
        wide, *b = tensors((2, 41), 149, (4, 3), dtype, adapter, spare=1, device=device)
        check_op(flat(), [wide, *b], length=149)
        (dwide,) = torch.autograd.grad(flat().call(wide, *b).sum(), wide)
    assert not dwide[..., -1].any()
    if use_triton(wide):
        assert launched["grid"] == (2 * 5,) and launched["SPLITS"] == 5 and not launched["WANT_H"]


def test_no_kernel_is_compiled_for_a_scale(monkeypatch):
    """A constant scale of 1 made the backward take 1.6 times as long: what it is added to was not loaded ahead."""
    seen: list[tuple[Any, dict[str, Any]]] = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **constants: seen.append((args[-2:], constants))

    for kernel in ("_forward_kernel", "_backward_kernel", "_sum_kernel"):
        monkeypatch.setattr(module, kernel, Kernel())
    monkeypatch.setattr(module, "use_triton", lambda x: True)
    wide, *b = tensors((4,), 32, (16, 16), BF16)
    for scaling in ((1.0, 1), (2, 0.5)):
        module._forward(wide, b, scaling, "silu")
        module._backward_into(torch.empty_like(wide), wide[:, :32].contiguous(), wide, b, scaling, "silu", False)
    scales, constants = zip(*seen, strict=True)
    assert scales == ((1.0, 1.0), (1.0, 1.0), (2.0, 0.5), (2.0, 0.5)) and constants[:2] == constants[2:]


def test_what_is_tuned():
    """The choices that the notes speak of are in reach of a search, and none is there twice."""
    key = (torch.device("cpu"), BF16, 8192, 14336, 16, "silu")
    found, _ = module.BACKWARD.candidates(*key)
    tiles = {fused: {(c["BLOCK_M"], c["BLOCK_N"], c["num_warps"]) for c in found if c["FUSED"] == fused}
             for fused in (0, 1)}  # fmt: skip
    assert {(64, 32, 4), (64, 64, 4), (32, 64, 2), (128, 64, 8)} <= tiles[1] and (64, 64, 8) not in tiles[1]
    assert {(64, 64, 4), (64, 128, 8)} <= tiles[0]
    assert sum(c["FUSED"] == 0 for c in found) == len(tiles[0])
    nearest = nearest_first(module.BACKWARD, key, found)[:MOST]
    assert any(c["FUSED"] == 0 for c in nearest)
    for tile in ((64, 32, 4), (32, 64, 2), (128, 64, 8)):
        assert any((c["BLOCK_M"], c["BLOCK_N"], c["num_warps"]) == tile and c["FUSED"] for c in nearest)


def test_narrower_tiles_where_registers_are_few_and_fewer_parts_where_they_are_wide():
    tiles = [
        module.BACKWARD.chosen(torch.device("cpu"), dtype, 8192, 14336, rank, "silu")
        for rank, dtype in ((16, BF16), (32, BF16), (33, BF16), (64, BF16), (16, F32))
    ]
    assert [tile["BLOCK_N"] for tile in tiles] == [64, 64, 32, 32, 32]
    assert [tile["SPLITS"] for tile in tiles] == [16, 16, 8, 8, 16]


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_only_what_is_asked_for(wanted, device):
    given = tensors((2, 5), 12, (3, 2), device=device)
    call = flat().call
    expected = torch.autograd.grad(call(*given).sum(), [given[i] for i in wanted])
    given = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(given)]
    found = torch.autograd.grad(call(*given).sum(), [given[i] for i in wanted])
    assert all(torch.equal(a, e) for a, e in zip(found, expected, strict=True))


def test_gate_and_up_are_rounded_once(device):
    """In bf16, beside layers that give gate and up in bf16 to an activation: not further from the truth."""
    torch.manual_seed(0)
    wide, *b = (t.detach() for t in tensors((256,), 64, (8, 8), BF16, device=device))
    exact = OP.reference(wide.double(), [t.double() for t in b], (2.0, 0.7), "silu")
    e_gate, e_up, h_gate, h_up = module._pieces(wide, 64, (8, 8))
    layers = [(e.float() + s * h.float() @ t.float().t()).bfloat16()
              for e, h, t, s in zip((e_gate, e_up), (h_gate, h_up), b, (2.0, 0.7), strict=True)]  # fmt: skip

    def off(y):
        return float((y.double() - exact).norm() / exact.norm())

    once = off(exact.bfloat16())
    assert off(lora_glu(wide, b, (2.0, 0.7), "silu")) <= 1.02 * once < 1.2 * once < off(glu(*layers, "silu"))


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    given = [t.detach().double().requires_grad_() for t in tensors((3,), 4, (2, 1), spare=2)]
    assert torch.autograd.gradcheck(flat(kind=kind).call, given)
    assert torch.autograd.gradcheck(flat(kind=kind).reference, given)


@pytest.mark.parametrize("quant", [None, "double"])
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
def test_together_they_are_the_layers_and_the_activation(kind, quant, device):
    """Values and every gradient, beside ``lora_linears`` and ``glu``."""
    (x, weight, a), more, leaves = layers((24, 24), ranks=(3, 5), quant=quant, device=device)
    b = [torch.randn(24, r, device=device).requires_grad_() for r in (3, 5)]
    scaling = [2.0, 0.7]
    ours = lora_glu(lora_stack(x, weight, a, **more), b, scaling, kind)
    gate, up = lora_linears(x, weight, [], [[t] for t in a], [[t] for t in b], [[s] for s in scaling], **more)
    theirs = glu(gate, up, kind)
    torch.testing.assert_close(ours, theirs)
    dy = torch.randn_like(ours)
    for found, expected in zip(*(torch.autograd.grad(y, [*leaves, *b], dy) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles(backend, device):
    (x, weight, a), more, leaves = layers((24, 24), ranks=(3, 5), quant="double", device=device)
    b = [torch.randn(24, r, device=device).requires_grad_() for r in (3, 5)]

    def mlp(x, a0, a1, b0, b1):
        return lora_glu(lora_stack(x, weight, [a0, a1], **more), [b0, b1], [2.0, 2.0], "silu")

    torch._dynamo.mark_dynamic(x, 0)
    compiled = torch.compile(mlp, backend=backend, fullgraph=True)
    ours, eager = (torch.autograd.grad(fn(x, *a, *b).square().sum(), [*leaves, *b]) for fn in (compiled, mlp))
    torch.testing.assert_close(ours, eager)


def test_supported():
    def code(n=8, ranks=(2, 2), spare=0, kind="silu", dtype=F32, scaling=(1.0, 1.0), count=2):
        wide, *b = tensors((3,), n, ranks, dtype, spare=spare)
        reason = OP.supported(wide, b[:count], scaling, kind)
        if reason is not None:
            with pytest.raises(ValueError, match="lora_glu: "):
                lora_glu(wide, b[:count], scaling, kind)
        return reason and reason.code

    assert code() is None and code(spare=4) is None and code(ranks=(64, 1)) is None
    assert code(kind="relu") == "activation"
    assert code(ranks=(65, 1)) == "rank"
    assert code(dtype=torch.float8_e4m3fn) == "dtype"
    assert code(spare=-1) == "shape" and code(count=1) == "shape" and code(scaling=(1.0,)) == "shape"
    wide, gate, up = tensors((3,), 8)
    assert OP.supported(wide, [gate, up[:4]], (1.0, 1.0), "silu").code == "shape"


def test_cost():
    wide, b = torch.empty(8192, 28704, dtype=BF16), [torch.empty(14336, 16)] * 2
    cost = OP.cost(wide, b, (1.0, 1.0), "silu")
    assert int(cost.bytes_kept) == 2 * 8192 * 28704
    assert int(cost.bytes_moved) == 2 * 8192 * (28704 + 14336)


# ----------------------------------------------------------------------------------- for the tests that go over all ops


def _samples(new: New, n: int) -> Named:
    for kind in KINDS:
        b = [new(5, 2, scale=0.5), new(5, 3, scale=0.5)]
        yield kind, (new(2, n, 16, scale=2.0), b, [2.0, 0.7], kind), {}


SAMPLES = {"lora_glu": _samples}

RANKS = st.sampled_from((1, 2, 3, 8, 17))


def _case(d: Draw) -> Sample:
    n, ranks = d(WIDTHS), (d(RANKS), d(RANKS))
    wide = d.tensor(d(SIZES), d(SIZES), 2 * n + sum(ranks) + d(st.integers(0, 5)))
    b = [d.tensor(n, r, scale=r**-0.5) for r in ranks]
    scaling = [d(st.sampled_from((1.0, 2.0, 0.7071))) for _ in range(2)]
    return Sample("", (wide, b, scaling, d(st.sampled_from(KINDS))), {})


FUZZ = {"lora_glu": _case}
ROWWISE = ("lora_glu",)


def _derivations() -> list[Derivation]:
    def formula(wide: Array, b_gate: Array, b_up: Array, kind: str) -> list[Array]:
        n = b_gate.shape[0]
        e_gate, e_up, h_gate, h_up = wide[:, :n], wide[:, n : 2 * n], wide[:, 2 * n : 2 * n + 2], wide[:, 2 * n + 2 :]
        gate, up = e_gate + 2 * h_gate @ b_gate.T, e_up + ratio("0.7") * h_up @ b_up.T
        return [unary(ACTIVATIONS[kind])(gate) * up]

    return [
        Derivation(
            kind,
            {"wide": (2, 9), "b_gate": (3, 2), "b_up": (3, 1)},
            lambda fn, wide, b_gate, b_up, kind=kind: fn(wide, [b_gate, b_up], [2.0, 0.7], kind),
            lambda wide, b_gate, b_up, kind=kind: formula(wide, b_gate, b_up, kind),
            simplify=BOTH if kind == "silu" else (),
        )
        for kind in KINDS
    ]


DERIVATIONS = {"lora_glu": _derivations}

SMALL_TILES = {"BLOCK_M": 1, "BLOCK_N": 2, "LEAST_RANK": 1, "SPLIT_N": 2, "SPLITS": 2, "SUM_ROWS": 1}

MUTANTS = (
    Mutant(
        "lora_glu: no adapter",
        "kernels/lora_glu.py",
        "return e.to(tl.float32) + scale * tl.dot(",
        "return e.to(tl.float32) + 0.0 * tl.dot(",
        "tests/kernels/test_lora_glu.py -k matches_reference",
        interpret=True,
    ),
    Mutant(
        "lora_glu: gate's scale for up",
        "kernels/lora_glu.py",
        "u = _adapted(e_up, h_up, b_up, scale_up, PRECISION)\n    f, _",
        "u = _adapted(e_up, h_up, b_up, scale_gate, PRECISION)\n    f, _",
        "tests/kernels/test_lora_glu.py -k matches_reference",
        interpret=True,
    ),
    Mutant(
        "lora_glu: more columns of h than the rank",
        "kernels/lora_glu.py",
        "there = (row < rows)[:, None] & (r < RANK)[None, :]",
        "there = (row < rows)[:, None] & (r < BLOCK_R)[None, :]",
        "tests/kernels/test_lora_glu.py -k is_not_read",
        interpret=True,
    ),
    Mutant(
        "lora_glu: gradients swapped",
        "kernels/lora_glu.py",
        "dg = (dy * u * slope)",
        "dg = (dy * f * slope)",
        "tests/kernels/test_lora_glu.py -k matches_reference",
        interpret=True,
    ),
    Mutant(
        "lora_glu: h without its scale",
        "kernels/lora_glu.py",
        "tl.store(part, scale_gate * dh_gate,",
        "tl.store(part, dh_gate,",
        "tests/kernels/test_lora_glu.py -k matches_reference",
        interpret=True,
    ),
    Mutant(
        "lora_glu: h without its scale, in PyTorch",
        "kernels/lora_glu.py",
        "at.copy_(scale * (grad.to(compute) @ up))",
        "at.copy_(grad.to(compute) @ up)",
        "tests/kernels/test_lora_glu.py -k matches_reference",
    ),
    Mutant(
        "lora_glu: the first part of the sums only",
        "kernels/lora_glu.py",
        "part = parts_ptr + (row.to(tl.int64) + split * rows)[:, None]",
        "part = parts_ptr + (row.to(tl.int64) + 0 * rows)[:, None]",
        "tests/kernels/test_lora_glu.py::test_several_programs_share_a_row[4]",
        interpret=True,
    ),
    Mutant(
        "lora_glu: the last columns belong to nobody",
        "kernels/lora_glu.py",
        "range(split * BLOCK_N, n, SPLITS * BLOCK_N)",
        "range(split * BLOCK_N, n - BLOCK_N, SPLITS * BLOCK_N)",
        "tests/kernels/test_lora_glu.py -k several_programs",
        interpret=True,
    ),
    Mutant(
        "lora_glu: products after the pass without their scale",
        "kernels/lora_glu.py",
        "at.addmm_(grad, up, beta=0, alpha=scale)",
        "at.addmm_(grad, up, beta=0)",
        "tests/kernels/test_lora_glu.py -k products_after",
        interpret=True,
    ),
    Mutant(
        "lora_glu: products after the pass, columns that nobody wrote",
        "kernels/lora_glu.py",
        "at.addmm_(grad, up, beta=0, alpha=scale)\n            dwide[..., 2 * n + sum(ranks) :].zero_()\n",
        "at.addmm_(grad, up, beta=0, alpha=scale)\n            dwide[..., 2 * n + sum(ranks) :].fill_(1.0)\n",
        "tests/kernels/test_lora_glu.py -k products_after",
        interpret=True,
    ),
    Mutant(
        "lora_glu: products after the pass, one tile of several",
        "kernels/lora_glu.py",
        'tile["SPLITS"], tile["num_stages"] = blocks, 1',
        'tile["num_stages"] = 1',
        "tests/kernels/test_lora_glu.py -k products_after",
        interpret=True,
    ),
    Mutant(
        "lora_glu: more warps than rows of products",
        "kernels/lora_glu.py",
        '"FUSED": 1, "num_warps": 4,',
        '"FUSED": 1, "num_warps": 8,',
        "tests/kernels/test_hopper.py -k warps_of_lora_glu",
    ),
    Mutant(
        "lora_glu: wide tiles where they spill",
        "kernels/lora_glu.py",
        "high = rank > MIDDLE_RANK",
        "high = rank > 2 * MIDDLE_RANK",
        "tests/kernels/test_lora_glu.py -k narrower_tiles",
    ),
    Mutant(
        "lora_glu: warps that compute what others do",
        "kernels/lora_glu.py",
        'if config["BLOCK_M"] < WARP_ROWS * config["num_warps"]',
        'if config["BLOCK_M"] < config["num_warps"]',
        "tests/kernels/test_lora_glu.py -k what_is_tuned",
    ),
    Mutant(
        "lora_glu: dB of what is written over h",
        "kernels/lora_glu.py",
        "    dbs = [wide.new_empty(0) for _ in b]\n",
        "    dbs = [wide.new_empty(0) for _ in b]\n    behind()\n",
        "tests/kernels/test_lora_mlp.py -k matches_reference",
    ),
    Mutant(
        "lora_glu: dB without its scale",
        "kernels/lora_glu.py",
        "dbs[i] = times(scale, db).to(up.dtype)",
        "dbs[i] = db.to(up.dtype)",
        "tests/kernels/test_lora_glu.py -k matches_reference",
    ),
    Mutant(
        "lora_glu: what is behind h has a gradient",
        "kernels/lora_glu.py",
        "@ up))\n            dwide[..., 2 * n + sum(ranks) :].zero_()\n",
        "@ up))\n            dwide[..., 2 * n + sum(ranks) :].fill_(1.0)\n",
        "tests/kernels/test_lora_glu.py -k is_not_read",
    ),
    Mutant(
        "lora_glu: gate is rounded before the activation",
        "kernels/lora_glu.py",
        "return glu_reference(gate, up, kind).to(wide.dtype)",
        "return glu_reference(gate.to(wide.dtype), up.to(wide.dtype), kind)",
        "tests/kernels/test_lora_glu.py -k rounded_once",
    ),
)
