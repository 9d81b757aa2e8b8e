"""Loss rules: every spelling of head and cross-entropy, what happens to returned logits, and what is left alone, with
its reason.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import fastft
import fastft.bridges.trl_head  # lets Dynamo keep linear_log_prob as one call
from fastft.autotune import variants
from fastft.compare import assert_bitwise, assert_within, compare, rounding
from fastft.kernels import linear_cross_entropy as loss_op
from fastft.kernels._op import OPS
from fastft.kernels.linear_cross_entropy import linear_log_prob, linear_log_prob_reference
from fastft.lazy_logits import LazyLogits
from fastft.patterns.loss import (
    ignoring_log_prob,
    rows_linear_cross_entropy,
    rows_log_prob,
    rows_log_prob_and_total,
    rows_loss_and_total,
)
from tests.patterns._sites import check_site, exactly, rewritten

B, S, H, V = 2, 6, 8, 19
LABELS = torch.randint(0, V, (B, S), generator=torch.Generator().manual_seed(0))
LABELS[0, 2] = -100
OTHER = int(LABELS[1, 1])  # a label that another loss ignores
ONE = {"linear_cross_entropy": 1}


def operands(dtype=torch.float32, bias=False):
    torch.manual_seed(0)
    shapes = [(B, S, H), (V, H), *([(V,)] if bias else [])]
    return [torch.randn(s).to(dtype).requires_grad_() for s in shapes]


def stock(logits, labels=LABELS, num_items=None, **options):
    """transformers' ForCausalLMLoss."""
    logits = logits.float()
    labels = F.pad(labels, (0, 1), value=-100)
    shift_labels = labels[..., 1:].contiguous()
    logits = logits.view(-1, V)
    shift_labels = shift_labels.view(-1).to(logits.device)
    reduction = "mean" if num_items is None else "sum"
    loss = F.cross_entropy(logits, shift_labels, ignore_index=-100, reduction=reduction, **options)
    return loss if num_items is None else loss / num_items


def own_shift(z):
    return F.cross_entropy(z[..., :-1, :].contiguous().view(-1, V), LABELS[..., 1:].contiguous().view(-1))


def softcap(z, cap=5.0):
    z = z / cap
    z = torch.tanh(z)
    return z * cap


SPELLINGS = {
    "transformers": lambda h, w: stock(F.linear(h, w)),
    "transformers, num_items_in_batch": lambda h, w: stock(F.linear(h, w), num_items=torch.tensor(7)),
    "transformers, whole slice": lambda h, w: stock(F.linear(h[:, slice(0, None), :], w)),
    "transformers, logits_to_keep": lambda h, w: stock(F.linear(h[:, -4:, :], w), LABELS[:, -4:]),
    "own shift": lambda h, w: own_shift(F.linear(h, w)),
    "own shift, fp32": lambda h, w: own_shift(F.linear(h, w).float()),
    "own shift, other axes": lambda h, w: F.cross_entropy(
        F.linear(h, w)[:, :-1].reshape((-1, V)), LABELS[:, 1:].reshape(-1), reduction="sum"
    ),
    "flatten": lambda h, w: F.cross_entropy(F.linear(h, w).flatten(0, 1), LABELS.flatten()),
    "module": lambda h, w: torch.nn.CrossEntropyLoss(ignore_index=OTHER)(
        F.linear(h, w).view(B * S, V), LABELS.view(-1) % V
    ),
    "per token": lambda h, w: F.cross_entropy(F.linear(h, w).view(-1, V), LABELS.view(-1), reduction="none"),
    "hidden states shifted": lambda h, w: F.cross_entropy(
        F.linear(h[:, :-1].flatten(0, 1), w), LABELS[:, 1:].flatten()
    ),
    "one sequence": lambda h, w: F.cross_entropy(F.linear(h, w)[0], LABELS[0]),
    "rows of flat logits": lambda h, w: F.cross_entropy(F.linear(h, w).view(-1, V)[:-1], LABELS.flatten()[1:]),
    "rows of flat rows": lambda h, w: F.cross_entropy(
        F.linear(h, w)[:, 1:].flatten(0, 1)[2:-1].float(), LABELS[:, 1:].flatten()[2:-1]
    ),
    "a view that changes nothing": lambda h, w: F.cross_entropy(
        F.linear(h, w).view(h.shape[0], -1, V).view(-1, V), LABELS.flatten()
    ),
    "two slices": lambda h, w: F.cross_entropy(F.linear(h, w)[1:, :, :][:, 2:-1].view(-1, V), LABELS[1:, 3:].flatten()),
    "softcap (Gemma 2)": lambda h, w: stock(softcap(F.linear(h, w))),
    "softcap, written otherwise": lambda h, w: stock(5.0 * (F.linear(h, w) * 0.2).tanh()),
    "scale (Cohere)": lambda h, w: stock(F.linear(h, w) * 0.0625),
    "scale before": lambda h, w: stock(0.25 * F.linear(h, w)),
    "scaling (Granite)": lambda h, w: stock(F.linear(h, w) / 6.0),
    "scale and softcap": lambda h, w: stock(softcap(F.linear(h, w) * 2)),
    "scale of picked rows": lambda h, w: F.cross_entropy(
        F.linear(h, w)[:, 1:].reshape(-1, V) / 3, LABELS[:, 1:].flatten()
    ),
}


VALID = LABELS.clamp(min=0)


def in_chunks(z, ways=3, dim=1):
    """A loop over pieces of the sequence."""
    total = 0.0
    for part, labels in zip(z.chunk(ways, dim), LABELS.chunk(ways, dim), strict=True):
        total = total + F.cross_entropy(part.reshape(-1, V).float(), labels.reshape(-1), reduction="sum")
    return total


def in_slices(z, size=2):
    return sum(
        F.cross_entropy(z[:, i : i + size].reshape(-1, V), LABELS[:, i : i + size].reshape(-1), reduction="sum")
        for i in range(0, S, size)
    )


def picked(z, labels=VALID):
    return z.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def masked(log_prob, mask=LABELS != -100):
    return (log_prob * mask).sum() / mask.sum()


def of_ignored(z, make_valid, zero, labels=None):
    """Log-probabilities where labels that are ignored were made valid ones, and what comes of them is zero."""
    labels = LABELS if labels is None else labels
    return zero(picked(z, make_valid(labels)), labels)


SPELLINGS |= {
    "label smoothing": lambda h, w: stock(F.linear(h, w), label_smoothing=0.1),
    "label smoothing, softcap": lambda h, w: torch.nn.CrossEntropyLoss(reduction="none", label_smoothing=0.2)(
        softcap(F.linear(h, w)).view(-1, V), LABELS.view(-1)
    ),
    "log_softmax, nll_loss": lambda h, w: F.nll_loss(
        F.log_softmax(F.linear(h, w).float(), dim=-1).view(-1, V), LABELS.flatten()
    ),
    "nll_loss of flat rows": lambda h, w: torch.nn.NLLLoss(reduction="sum")(
        F.linear(h, w)[:, :-1].flatten(0, 1).log_softmax(1, dtype=torch.float32), LABELS[:, 1:].flatten()
    ),
    "log_softmax twice": lambda h, w: F.cross_entropy(
        torch.log_softmax(F.linear(h, w), -1).view(-1, V), LABELS.flatten()
    ),
    "classes second": lambda h, w: F.cross_entropy(F.linear(h, w).transpose(1, 2), LABELS),
    "classes second, shifted": lambda h, w: F.cross_entropy(
        F.linear(h, w)[:, :-1].permute(0, 2, 1), LABELS[:, 1:], reduction="none"
    ),
    "classes second, nll_loss": lambda h, w: F.nll_loss(F.log_softmax(F.linear(h, w), 2).transpose(-1, -2), LABELS),
    "log_softmax, gather": lambda h, w: picked(F.linear(h, w)),
    "log_softmax, gather, a column": lambda h, w: torch.gather(
        F.log_softmax(F.linear(h, w), -1, dtype=torch.float32), 2, VALID[..., None]
    ),
    "log_softmax, gather, no squeeze": lambda h, w: (
        F.linear(h, w).flatten(0, 1).log_softmax(-1).gather(1, VALID.view(-1, 1))[..., 0]
    ),
    "log_softmax, arange": lambda h, w: (
        -F.linear(h, w).view(-1, V).log_softmax(-1)[torch.arange(B * S), VALID.flatten()].mean()
    ),
    "logsumexp - gather": lambda h, w: masked(
        (z := F.linear(h, w).float()).logsumexp(-1) - z.gather(-1, VALID[..., None]).squeeze(-1)
    ),
    "gather - logsumexp": lambda h, w: (
        (z := F.linear(h, w) / 0.7)[:, 1:].gather(-1, VALID[:, 1:, None])
        - torch.logsumexp(z[:, 1:], dim=-1, keepdim=True)
    ),
    "arange - logsumexp": lambda h, w: (
        (z := softcap(F.linear(h, w)).view(-1, V))[torch.arange(B * S), VALID.view(-1)] - z.logsumexp(1)
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings(spelling, dtype):
    graph = check_site(SPELLINGS[spelling], *operands(dtype), counts=ONE)
    left = {n.target for n in graph.graph.nodes}
    assert left & {rows_linear_cross_entropy, rows_log_prob}
    assert not left & {F.cross_entropy, F.nll_loss, torch._C._nn.linear, torch.tanh, "gather", "logsumexp"}


LOOPS = {
    "chunk": (3, lambda h, w: in_chunks(F.linear(h, w))),
    "chunk of the batch": (2, lambda h, w: in_chunks(F.linear(h, w), 2, 0)),
    "chunk of the hidden states": (
        3,
        lambda h, w: sum(
            F.cross_entropy(F.linear(x, w).view(-1, V), y.reshape(-1), reduction="sum")
            for x, y in zip(h.chunk(3, 1), LABELS.chunk(3, 1), strict=True)
        ),
    ),
    "split": (
        2,
        lambda h, w: sum(
            picked(part, labels).sum()
            for part, labels in zip(F.linear(h, w).split(4, dim=1), VALID.split(4, dim=1), strict=True)
        ),
    ),
    "split of flat rows": (
        3,
        lambda h, w: sum(
            F.cross_entropy(part, labels, reduction="sum")
            for part, labels in zip(
                torch.split(F.linear(h, w).view(-1, V), [5, 4, 3]), LABELS.view(-1).split([5, 4, 3]), strict=True
            )
        ),
    ),
    "slices": (3, lambda h, w: in_slices(F.linear(h, w))),
}


@pytest.mark.parametrize("loop", LOOPS)
def test_loops_over_pieces_of_the_logits(loop):
    """Each piece is a site, and nothing of the whole logits is left."""
    pieces, fn = LOOPS[loop]
    graph = check_site(fn, *operands(), counts={"linear_cross_entropy": pieces})
    assert not {n.target for n in graph.graph.nodes} & {F.cross_entropy, torch._C._nn.linear}


Z_LOSS = {
    "transformers": lambda h, w: stock(z := F.linear(h, w)) + 0.1 * z.float().logsumexp(-1).square().mean(),
    "num_items_in_batch": lambda h, w: (
        stock(z := F.linear(h, w), num_items=torch.tensor(7)) + 0.1 * (z.float().logsumexp(-1, keepdim=True) ** 2).sum()
    ),
    "own shift": lambda h, w: (
        F.cross_entropy(z := F.linear(h, w)[:, :-1].reshape(-1, V).float(), LABELS[:, 1:].reshape(-1))
        + 0.1 * z.logsumexp(-1).square().mean()
    ),
    "before the loss": lambda h, w: (
        0.1 * ((z := F.linear(h, w).float()).logsumexp(-1) * (LABELS != -100)).square().mean()
        + F.cross_entropy(z.view(-1, V), LABELS.view(-1))
    ),
    "logsumexp - gather": lambda h, w: (
        masked((lse := (z := F.linear(h, w).float()).logsumexp(-1)) - z.gather(-1, VALID[..., None]).squeeze(-1))
        + 0.1 * lse.square().mean()
    ),
    "softcap, log-probabilities": lambda h, w: (
        (z := softcap(F.linear(h, w))).gather(-1, VALID[..., None]) - (lse := torch.logsumexp(z, -1, True)),
        lse * 2,
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spelling", Z_LOSS)
def test_z_loss(spelling, dtype):
    """The logsumexp that a loss adds comes from the same pass, with its gradient."""
    graph = check_site(Z_LOSS[spelling], *operands(dtype), counts=ONE)
    left = {n.target for n in graph.graph.nodes}
    assert left & {rows_loss_and_total, rows_log_prob_and_total}
    assert not left & {F.cross_entropy, torch._C._nn.linear, "gather", "logsumexp", torch.logsumexp}


IGNORING = {
    "clamp, masked_fill": lambda z: of_ignored(z, lambda y: y.clamp(min=0), lambda p, y: p.masked_fill(y == -100, 0)),
    "clamp, times the mask": lambda z: of_ignored(z, lambda y: y.clamp_min(0), lambda p, y: -p * (y != -100)),
    "masked_fill, times a float mask": lambda z: of_ignored(
        z, lambda y: y.masked_fill(y == -100, 0), lambda p, y: (y != -100).float() * p
    ),
    "where": lambda z: of_ignored(
        z, lambda y: torch.where(y != -100, y, 0), lambda p, y: p.masked_fill(~(y != -100), 0)
    ),
    "shifted twice": lambda z: of_ignored(
        z[:, :-1], lambda y: y[:, 1:].clamp(min=0), lambda p, y: p * (y[:, 1:] != -100)
    ),
    "logsumexp": lambda z: (
        (z.logsumexp(-1) - z.gather(-1, LABELS.clamp(min=0).unsqueeze(-1)).squeeze(-1)) * (LABELS != -100)
    ),
}


@pytest.mark.parametrize("spelling", IGNORING)
def test_ignored_tokens_of_hand_written_losses_are_left_out(spelling, monkeypatch):
    """They never reach the op as labels that count: half of them ignored costs half."""
    seen = []
    prepared = loss_op._prepared

    def noted(h, *rest, **how):
        run = prepared(h, *rest, **how)
        return lambda *told: seen.append(h.shape[0]) or run(*told)

    monkeypatch.setattr(loss_op, "_prepared", noted)
    monkeypatch.setitem(globals(), "LABELS", LABELS.clone())
    LABELS[:, :3] = -100
    fn = IGNORING[spelling]
    check_site(lambda h, w: fn(F.linear(h, w)), *operands(), counts=ONE)
    assert set(seen) == {int((LABELS[:, 1:] if spelling == "shifted twice" else LABELS).ne(-100).sum())}


SCORED_ANYWAY = {
    "not masked": lambda z: picked(z, LABELS.clamp(min=0)),
    "another mask": lambda z: picked(z, LABELS.clamp(min=0)) * (LABELS != OTHER),
    "masked once of twice": lambda z: (p := picked(z, LABELS.clamp(min=0))) * (LABELS != -100) + p,
    "a mask of moved labels": lambda z: picked(z, LABELS.clamp(min=0)) * (LABELS.roll(1, 0) != -100),
    "a valid label is ignored": lambda z: picked(z, LABELS.clamp(min=0)) * (LABELS != 3),
    "filled with one": lambda z: picked(z, LABELS.clamp(min=0)).masked_fill(LABELS == -100, 1),
    "clamped at one": lambda z: picked(z, LABELS.clamp(min=1)) * (LABELS != -100),
}


@pytest.mark.parametrize("spelling", SCORED_ANYWAY)
def test_hand_written_losses_that_use_every_token(spelling):
    fn = SCORED_ANYWAY[spelling]
    graph = check_site(lambda h, w: fn(F.linear(h, w)), *operands(), counts=ONE)
    (node,) = [n for n in graph.graph.nodes if n.target is rows_log_prob]
    assert node.kwargs["ignore_index"] is None


def test_bias():
    check_site(lambda h, w, b: stock(F.linear(h, w, b)), *operands(bias=True), counts=ONE)


def test_autocast():
    def fn(h, w):
        with torch.autocast("cpu", torch.bfloat16):
            return stock(F.linear(h, w))

    check_site(fn, *operands(), counts=ONE)


def test_symbolic_sizes():
    def fn(h, w, labels):
        return own_shift_of(F.linear(h, w), labels)

    def own_shift_of(z, labels):
        return F.cross_entropy(z[:, : z.shape[1] - 1].reshape(-1, V), labels[:, 1:].reshape(-1))

    h, w = operands()
    for t in (h, labels := LABELS.clone()):
        torch._dynamo.mark_dynamic(t, 0)
        torch._dynamo.mark_dynamic(t, 1)
    result, report, graph = rewritten(fn, h, w, labels)
    assert report.counts == ONE and any(
        "sym" in str(n.meta.get("example_value")) or "s" in n.name for n in graph.graph.nodes
    )
    assert_within("loss", result, fn(h, w, labels), exactly(fn, h, w, labels)[0], length=V)


# -- logits that are returned


def compiled(fn):
    torch._dynamo.reset()
    return torch.compile(fn, backend="fastft", options={"residual": "eager", "strict": True}, fullgraph=True)


RETURNS = {
    "logits": lambda z: (stock(z), z),
    "softcapped": lambda z: (stock(zz := softcap(z)), zz),
    "scaled": lambda z: (stock(zz := z / 6.0), zz),
    "before the softcap": lambda z: (stock(softcap(z)), z),
    "accelerate's float()": lambda z: (stock(z), z.float()),
    "both": lambda z: (stock(z), z, z.float()),
    "twice": lambda z: (z, stock(z), z),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("returned", RETURNS)
def test_returned_logits_are_lazy(returned, dtype):
    def fn(h, w):
        # A norm that another table replaces after the loss was: the hidden states that are returned are its result.
        x = h.float()
        x = (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).to(h.dtype)
        return RETURNS[returned](F.linear(x, w))

    h, w = operands(dtype)
    ours, same, exact = compiled(fn)(h, w), fn(h, w), exactly(fn, h, w)[0]
    assert fastft.reports()[-1].counts == {"linear_cross_entropy": 1, "rms_norm": 1}
    for i, (a, s, e) in enumerate(zip(ours, same, exact, strict=True)):
        assert isinstance(a, LazyLogits) is (e.dim() > 0)
        assert a.dtype == s.dtype
        found = compare(f"output {i}", a + 0, s, e, length=V)
        if a.dim() == 0:  # one number, a mean over tokens' losses that each carry a rounding of their logits
            found = found.allowing(rounding(dtype) / math.sqrt(B * S))
        assert found.ok, str(found)

    def gradients(h, w, compute=fn):
        return torch.autograd.grad(sum(x.float().square().mean() for x in compute(h, w)), [h, w])

    read = gradients(h, w, compiled(fn)), gradients(h, w), exactly(gradients, h, w)[0]
    for name, a, s, e in zip("hw", *read, strict=True):
        assert_within(f"d{name}", a, s, e, length=V)


def test_without_gradients_logits_are_real():
    h, w = operands()
    fn = RETURNS["logits"]
    with torch.no_grad():
        ours = compiled(lambda h, w: fn(F.linear(h, w)))(h, w)
    assert type(ours[1]) is torch.Tensor
    (site,) = [s for s in fastft.reports()[-1].sites if s.pattern == "linear_cross_entropy"]
    assert site.status == "missed" and site.reason.startswith("no_grad")


def test_loss_alone_is_fused_without_gradients_too():
    def fn(h, w):
        return stock(F.linear(h, w))

    h, w = operands()
    with torch.no_grad():
        loss = compiled(fn)(h, w)
    assert fastft.reports()[-1].counts == ONE
    assert_within("loss", loss, fn(h, w), exactly(fn, h, w)[0], length=V)


# -- what is left alone

LORA = torch.randn(V, H)
LEFT_ALONE = {
    "class weights": ("class_weight", lambda h, w: stock(F.linear(h, w), weight=torch.ones(V))),
    "adapter": ("adapter", lambda h, w: stock(F.linear(h, w) + F.linear(h, LORA) * 2)),
    "other reader": ("escapes", lambda h, w: stock(z := F.linear(h, w)) + 0.1 * z.float().sin().mean()),
    "z-loss of other rows": (
        "escapes",
        lambda h, w: own_shift(z := F.linear(h, w)) + 0.1 * z.float().logsumexp(-1).square().mean(),
    ),
    "z-loss over the sequence": (
        "escapes",
        lambda h, w: stock(z := F.linear(h, w)) + 0.1 * z.float().logsumexp(1).square().mean(),
    ),
    "z-loss of other logits": (
        "escapes",
        lambda h, w: stock(z := F.linear(h, w)) + 0.1 * (z * 2).logsumexp(-1).square().mean(),
    ),
    "z-loss with label smoothing": (
        "escapes",
        lambda h, w: stock(z := F.linear(h, w), label_smoothing=0.1) + 0.1 * z.logsumexp(-1).square().mean(),
    ),
    "entropy returned": ("escapes", lambda h, w: (stock(z := F.linear(h, w)), z.softmax(-1))),
    "rows returned": (
        "escapes",
        lambda h, w: (F.cross_entropy(z := F.linear(h, w)[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten()), z),
    ),
    "two losses": ("escapes", lambda h, w: stock(z := F.linear(h, w)) + own_shift(z)),
    "scale by a tensor": ("maths", lambda h, w: stock(F.linear(h, w) * h.mean())),
    "tanh alone": ("maths", lambda h, w: stock(torch.tanh(F.linear(h, w)))),
    "two softcaps": ("maths", lambda h, w: stock(softcap(softcap(F.linear(h, w))))),
    "tanh scaled by a negative": ("maths", lambda h, w: stock(-3.0 * torch.tanh(F.linear(h, w)))),
    "part of the vocabulary": (
        "shape",
        lambda h, w: F.cross_entropy(F.linear(h, w)[..., :12].reshape(-1, 12), LABELS.view(-1).clamp(max=11)),
    ),
    "nll_loss of logits": ("maths", lambda h, w: F.nll_loss(F.linear(h, w).view(-1, V), LABELS.view(-1))),
    "log_softmax over the sequence": (
        "maths",
        lambda h, w: F.nll_loss(F.log_softmax(F.linear(h, w), 1).view(-1, V), LABELS.view(-1)),
    ),
    "scaled log-probabilities": (
        "maths",
        lambda h, w: F.cross_entropy(F.log_softmax(F.linear(h, w), -1).view(-1, V) * 2, LABELS.view(-1)),
    ),
    "log-probabilities returned": (
        "escapes",
        lambda h, w: (picked(z := F.linear(h, w)), z.log_softmax(-1))[0] + 0 * z.log_softmax(-1).sum(),
    ),
    "logsumexp of other logits": (
        "maths",
        lambda h, w: (z := F.linear(h, w)).logsumexp(-1) - (z * 2).gather(-1, VALID[..., None]).squeeze(-1),
    ),
    "logsumexp of other rows": (
        "maths",
        lambda h, w: (z := F.linear(h, w))[:, 1:].logsumexp(-1) - z[:, :-1].gather(-1, VALID[:, 1:, None]).squeeze(-1),
    ),
    "logsumexp broadcast": (
        "shape",
        lambda h, w: (z := F.linear(h, w))[:1].logsumexp(-1) - z.gather(-1, VALID[..., None])[..., 0],
    ),
    "class probabilities": (
        "shape",
        lambda h, w: F.cross_entropy(F.linear(h, w).view(-1, V), torch.full((B * S, V), 1 / V)),
    ),
    "rows picked by a tensor": (
        "shape",
        lambda h, w: F.cross_entropy(F.linear(h, w)[torch.arange(B), torch.tensor([3, 1])], LABELS[:, 0] % V),
    ),
    "rounded before the loss": ("dtype", lambda h, w: stock(F.linear(h, w).half())),
    "no linear": ("head", lambda h, w: stock(torch.sin(F.linear(h, w)))),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_left_alone_with_a_reason(name):
    code, fn = LEFT_ALONE[name]
    result, report, _ = rewritten(fn, *operands())
    sites = [s for s in report.sites if s.pattern == "linear_cross_entropy"]
    assert sites and all(s.status == "missed" and s.reason.startswith(code + ":") for s in sites), [
        s.reason for s in sites
    ]
    expected = fn(*operands())
    first, second = (r[0] if isinstance(r, tuple) else r for r in (result, expected))
    assert_bitwise("result", first, second)


def test_a_loss_of_something_else_is_no_site():
    _, report, _ = rewritten(lambda h, w: F.mse_loss(F.linear(h, w), torch.zeros(B, S, V)), *operands())
    assert not report.sites


# -- TRL's head, which scores ignored labels too


def trl_head(h, w, labels, outputs=(0, 1, 2), mask=lambda y: ~(y != -100), floor=0, fill=0, head=linear_log_prob):
    """TRL's fused head after the bridge: every position is scored, ignored ones are filled with 0."""
    found = head(h.reshape(-1, H), w, None, labels.clamp(min=floor).reshape(-1), entropy=True, is_top1=True)
    return tuple(found[i].view(labels.shape).masked_fill(mask(labels), fill) for i in outputs)


@pytest.mark.parametrize("outputs", [(0, 1, 2), (0,), (1, 2)])
@pytest.mark.parametrize("mask", [lambda y: ~(y != -100), lambda y: y == -100, lambda y: torch.logical_not(y != -100)])
def test_ignored_tokens_are_left_out(outputs, mask):
    h, w = operands()
    labels = LABELS.clone()
    labels[:, :3] = -100
    labels[1, 4] = -7  # a negative label that is not ignored counts as 0, as in TRL
    ours, report, graph = rewritten(lambda h, w: trl_head(h, w, labels, outputs, mask), h, w)
    assert report.counts == {"ignored_tokens": 1}
    targets = [n.target for n in graph.graph.nodes]
    assert ignoring_log_prob in targets and linear_log_prob not in targets

    def plain(h, w):
        return trl_head(h, w, labels, outputs, mask, head=linear_log_prob_reference)

    exact, wide = exactly(plain, h, w)
    rows = [(ours, (h, w)), (plain(h, w), (h, w)), (exact, wide)]
    for i, (a, s, e) in enumerate(zip(*(out for out, _ in rows), strict=True)):
        assert a.dtype == s.dtype
        if a.dtype == torch.bool:
            assert torch.equal(a, e)
        else:
            assert_within(f"output {i}", a, s, e, length=V)
    grads = [torch.autograd.grad(sum(o.square().sum() for o in out if o.requires_grad), leaves) for out, leaves in rows]
    for name, a, s, e in zip("hw", *grads, strict=True):
        assert_within(f"d{name}", a, s, e, length=V)


def test_ignored_tokens_look_a_variant_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the op's own arguments: labels in one axis."""
    asked = []
    stock = variants.choose
    monkeypatch.setattr(variants, "choose", lambda op, *rest: asked.append((op.name, *rest)) or stock(op, *rest))
    h, w = operands()
    _, report, _ = rewritten(lambda h, w: trl_head(h, w, LABELS), h, w)
    assert report.counts == {"ignored_tokens": 1}
    ((op, explicit, args, kwargs),) = asked
    assert (op, explicit, kwargs["ignore_index"]) == ("linear_log_prob", None, -100)
    assert [tuple(t.shape) for t in args if t is not None] == [(B * S, H), (V, H), (B * S,)]
    assert OPS[op].supported(*args, **kwargs) is None


SCORED = {
    "no fill": (
        "unmasked",
        lambda h, w: linear_log_prob(h.view(-1, H), w, None, LABELS.clamp(min=0).view(-1))[0].exp(),
    ),
    "other labels": ("mask", lambda h, w: trl_head(h, w, LABELS, mask=lambda y: (y + 1) == -99)),
    "other fill": ("unmasked", lambda h, w: trl_head(h, w, LABELS, fill=1)),
    "two masks": (
        "mask",
        lambda h, w: trl_head(h, w, LABELS, (0,), mask=lambda y: (y == -100) | (y == 3)),
    ),
    "other floor": (None, lambda h, w: trl_head(h, w, LABELS.abs(), floor=1)),
    "no clamp": (None, lambda h, w: linear_log_prob(h.view(-1, H), w, None, LABELS.abs().view(-1) % V)[0]),
}


@pytest.mark.parametrize("name", SCORED)
def test_every_token_is_scored(name):
    code, fn = SCORED[name]
    h, w = operands()
    if name == "other floor":
        w = torch.randn(200, H, requires_grad=True)
    _, report, _ = rewritten(fn, h, w)
    assert [s.reason.split(":")[0] for s in report.missed] == ([code] if code else [])
    assert not report.counts
