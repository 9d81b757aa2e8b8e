"""Lazy logits: every way of reading them gives what real logits give, values and gradients; unread or reduced by rows
they never exist.
"""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastft.compare import relative_error
from fastft.kernels import _linear_cross_entropy_chunks as chunks
from fastft.lazy_logits import LazyLogits, lazy_logits

B, S, H, V = 2, 7, 8, 53
LABELS = torch.randint(0, V, (B, S), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Five rows a chunk."""
    torch.manual_seed(0)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 5 * V * 4)
    monkeypatch.setattr(chunks, "TRAINED_SHARE", 0.0)


def stock_loss(z, labels=LABELS):
    shifted = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
    return F.cross_entropy(z.float().view(-1, V), shifted.view(-1), ignore_index=-100, reduction="sum") / 3


def selective_log_softmax(z):
    """As TRL has it."""
    picked = torch.gather(z, dim=-1, index=LABELS.unsqueeze(-1)).squeeze(-1)
    return (picked - torch.stack([torch.logsumexp(row, dim=-1) for row in z])).sum()


def entropy(z):
    """As TRL has it."""
    flat = z.reshape(-1, z.shape[-1])
    return torch.cat([torch.logsumexp(c, -1) - (F.softmax(c, -1) * c).sum(-1) for c in flat.split(4)]).sum()


def label_smoother(z):
    """As transformers' Trainer has it."""
    losses = -F.log_softmax(z[..., :-1, :].contiguous(), dim=-1)
    labels = LABELS[..., 1:].contiguous().masked_fill(LABELS[..., 1:] < 5, -100).unsqueeze(-1)
    ignored = labels.eq(-100)
    nll = losses.gather(dim=-1, index=labels.clamp(min=0))
    smooth = losses.sum(dim=-1, keepdim=True, dtype=torch.float32)
    nll.masked_fill_(ignored, 0.0)
    smooth.masked_fill_(ignored, 0.0)
    return 0.9 * nll.sum() / 9 + 0.1 * smooth.sum() / (9 * losses.shape[-1])


#: Operations that stay lazy: nothing as large as the logits may appear, forward or backward.
LAZY = {
    "stock loss": stock_loss,
    "own shift": lambda z: F.cross_entropy(z[..., :-1, :].contiguous().view(-1, V), LABELS[..., 1:].reshape(-1)),
    "nn.CrossEntropyLoss": lambda z: torch.nn.CrossEntropyLoss()(z.flatten(0, 1), LABELS.flatten()),
    "log_softmax, gather": lambda z: (z / 1.3).log_softmax(-1).gather(-1, LABELS[..., None]).sum(),
    "F.log_softmax to fp32": lambda z: (
        F.log_softmax(2 * z, dim=2, dtype=torch.float32).gather(2, LABELS[..., None]).mean()
    ),
    "selective_log_softmax": selective_log_softmax,
    "entropy": entropy,
    "mask": lambda z: z[LABELS > 20].float().logsumexp(-1).sum(),
    "rows": lambda z: z[1, [0, 3][1]].logsumexp(-1) + z[:, -1].amax(-1).sum() + z[..., 2:4, :].logsumexp(-1).sum(),
    "split": lambda z: sum(part.logsumexp(-1, keepdim=True).sum() for part in z.split(3, dim=1)),
    "chunk, unbind": lambda z: sum(p.logsumexp(-1).sum() for c in z.chunk(2) for p in c.unbind(1)),
    "squeeze": lambda z: z.unsqueeze(0).squeeze(0).view_as(z).logsumexp(2).sum(),
    "label smoother": label_smoother,
    "label smoothing": lambda z: F.cross_entropy(z.view(-1, V), LABELS.view(-1), label_smoothing=0.1),
    "label smoothing, ignored": lambda z: F.cross_entropy(
        z.view(-1, V), LABELS.view(-1), label_smoothing=0.1, ignore_index=int(LABELS[0, 0])
    ),
    "label smoothing of log-probabilities": lambda z: F.cross_entropy(
        z.log_softmax(-1).view(-1, V), LABELS.view(-1), label_smoothing=0.1
    ),
    "cross entropy of tempered logits": lambda z: F.cross_entropy(
        (z / 0.7).view(-1, V), LABELS.view(-1), reduction="none", ignore_index=int(LABELS[0, 0])
    ).sum(),
    "nll_loss": lambda z: F.nll_loss(F.log_softmax(z, -1).view(-1, V), LABELS.view(-1), reduction="sum"),
    "entropy by product": lambda z: -((log_p := z.float().log_softmax(-1)).exp() * log_p).sum(-1).mean(),
    "entropy by product of bf16 and fp32": lambda z: (F.softmax(z, -1) * F.log_softmax(z.float(), -1)).sum(-1).sum(),
    "mean, max": lambda z: (z.mean(-1) - 3 * z.max(-1).values + z.max(dim=-1, keepdim=True)[0].squeeze(-1)).sum(),
    "topk": lambda z: z.softmax(-1).topk(3).values.sum() + z.topk(k=2, dim=-1, sorted=False)[0].sum(),
    "scaled log-probabilities": lambda z: (2 * z.float().log_softmax(-1)).exp().gather(-1, LABELS[..., None]).sum(),
    "several of a row": lambda z: z.log_softmax(-1).gather(-1, LABELS.view(B, S, 1).repeat(1, 1, 3)).sum(),
    "clone, to": lambda z: z.clone().to(torch.float64).to("cpu").type_as(z).logsumexp(-1).sum(),
}
#: Operations that need all the logits.
WHOLE = {
    "power": lambda z: (z.float() ** 2).mean(),
    "mean": lambda z: (z - z.mean(-1, keepdim=True)).abs().sum(),
    "scale in place": lambda z: z.mul_(2).float().sum(),
    "assignment": lambda z: (z.__setitem__((slice(None), 0), 0.0), z.float().square().sum())[1],
    "column": lambda z: z[..., 3].sum() + z[..., :10].sum() + z[0, 0, 0],
    "matmul": lambda z: (z @ torch.ones(V, 3, dtype=z.dtype)).sum(),
    "transpose": lambda z: F.cross_entropy(z.transpose(1, 2), LABELS),
    "max, smallest": lambda z: z.max() + z.topk(3, largest=False).values.sum() + z.max(1).values.sum(),
    "product of different rows": lambda z: (z[:, 1:].softmax(-1) * z[:, :-1].log_softmax(-1)).sum(),
    "cat": lambda z: torch.cat([z, z]).sum(),
    "kl_div": lambda z: F.kl_div(z.log_softmax(-1), torch.full((B, S, V), 1 / V), reduction="batchmean"),
    "class weights": lambda z: F.cross_entropy(z.view(-1, V), LABELS.view(-1), weight=torch.arange(V).to(z.dtype)),
    "hook": lambda z: (z.register_hook(lambda g: g * 2), z.float().logsumexp(-1).sum())[1],
    "out": lambda z: torch.add(z, 1).sum(),
    "twice": lambda z: z.sum() + z.logsumexp(-1).sum(),
}
HEADS = {
    "plain": dict(bias=False),
    "bias, softcap": dict(bias=True, softcap=5.0, scale=0.5),
    "divisor": dict(bias=False, divisor=6.0),
}


def head(dtype=torch.float32, bias=False, grad=True, **maths):
    h = torch.randn(B, S, H).to(dtype).requires_grad_(grad)
    w = torch.nn.Parameter(torch.randn(V, H).to(dtype), requires_grad=grad)
    b = torch.nn.Parameter(torch.randn(V).to(dtype), requires_grad=grad) if bias else None
    return h, w, b, maths


def real_logits(h, w, b, *, softcap=None, scale=1.0, divisor=1.0, dtype=None):
    z = F.linear(h, w, b)
    z = z * scale if scale != 1.0 else z
    z = z / divisor if divisor != 1.0 else z
    z = torch.tanh(z / softcap) * softcap if softcap else z
    return z.to(dtype or z.dtype)


def value_and_gradients(make, read, h, w, b, maths):
    leaves = [t.detach().clone().requires_grad_() if t is not None else None for t in (h, w, b)]
    # As in training, hidden states are no leaf.
    out = read(make(leaves[0] * 1, *leaves[1:], **maths))
    return [out, *torch.autograd.grad(out, [t for t in leaves if t is not None])]


class Largest(TorchDispatchMode):
    """Elements of the largest floating-point tensor that any operation gives; lazy ones have no memory."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            counts = isinstance(x, torch.Tensor) and not isinstance(x, LazyLogits) and not x.is_meta
            if counts and x.is_floating_point():
                self.numel = max(self.numel, x.numel())
        return out


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1.5e-2)])
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("read", [*LAZY, *WHOLE])
def test_as_real_logits(read, kind, dtype, tolerance):
    operands = head(dtype, **HEADS[kind])
    fn = {**LAZY, **WHOLE}[read]
    ours = value_and_gradients(lazy_logits, fn, *operands)
    theirs = value_and_gradients(real_logits, fn, *operands)
    for a, e in zip(ours, theirs, strict=True):
        assert a.shape == e.shape and relative_error(a, e) < tolerance


@pytest.mark.parametrize("read", LAZY)
def test_rows_are_reduced_without_the_logits(read):
    operands = head(bias=True, softcap=5.0)
    with Largest() as seen:
        value_and_gradients(lazy_logits, LAZY[read], *operands)
    assert seen.numel < B * S * V
    with Largest() as seen:
        value_and_gradients(real_logits, LAZY[read], *operands)
    assert seen.numel >= B * S * V  # the assertion above can fail


def test_unread_logits_cost_nothing():
    h, w, b, _ = head()
    with Largest() as seen:
        z = lazy_logits(h * 1, w, b)
        assert z.shape == (B, S, V) and z.dtype == torch.float32 and z.requires_grad and z.is_contiguous()
        assert len(z) == B and z.device == h.device and isinstance(z, torch.Tensor)
    assert seen.numel == h.numel()


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reading_gives_the_bits_of_the_model(kind, dtype):
    h, w, b, maths = head(dtype, **HEADS[kind])
    assert torch.equal(lazy_logits(h, w, b, **maths) + 0, real_logits(h, w, b, **maths))
    assert torch.equal(lazy_logits(h, w, b, **maths).argmax(-1), real_logits(h, w, b, **maths).argmax(-1))
    wide = lazy_logits(h, w, b, dtype=torch.float32, **maths)
    assert wide.dtype == torch.float32 and torch.equal(wide + 0, real_logits(h, w, b, **maths).float())


def test_head_in_autocasts_dtype():
    h, w, _, _ = head()
    with torch.autocast("cpu", torch.bfloat16):
        expected = F.linear(h, w).float()
    z = lazy_logits(h, w, None, head_dtype=torch.bfloat16, dtype=torch.float32)
    with torch.autocast("cpu", torch.float16):  # what is on when they are read does not matter
        assert torch.equal(z + 0, expected)
    grads = torch.autograd.grad(z.logsumexp(-1).sum(), [h, w])
    assert [g.dtype for g in grads] == [torch.float32] * 2


def test_python_sees_numbers():
    h, w, b, _ = head()
    expected = real_logits(h, w, b).detach()

    def z():
        return lazy_logits(h, w, b).detach()

    assert not z().requires_grad and isinstance(z(), LazyLogits)
    assert (z().numpy() == expected.numpy()).all() and (np.asarray(z()) == expected.numpy()).all()
    assert z().tolist() == expected.tolist() and z()[0, 0, 0].item() == expected[0, 0, 0].item()
    assert z().data_ptr() != 0 and torch.equal(z().cpu(), expected) and torch.equal(z().data + 0, expected)
    assert repr(z()) == repr(expected) and str(z()[0]) == str(expected[0])
    assert torch.equal(copy.deepcopy(z()), expected) and torch.equal(pickle.loads(pickle.dumps(z())), expected)
    with pytest.raises(RuntimeError, match="requires grad"):
        lazy_logits(h, w, b).numpy()
    file = io.BytesIO()
    torch.save({"logits": lazy_logits(h, w, b)}, file)
    file.seek(0)
    assert torch.equal(torch.load(file)["logits"].detach(), expected)


def test_accelerate_and_transformers_helpers():
    operations = pytest.importorskip("accelerate.utils.operations")
    trainer_utils = pytest.importorskip("transformers.trainer_pt_utils")
    h, w, b, _ = head(torch.bfloat16)
    out = operations.convert_to_fp32({"logits": lazy_logits(h, w, b)})
    assert isinstance(out["logits"], LazyLogits) and out["logits"].dtype == torch.float32
    detached = trainer_utils.nested_detach(out)
    assert isinstance(detached["logits"], LazyLogits) and not detached["logits"].requires_grad
    assert (trainer_utils.nested_numpify(detached)["logits"] == real_logits(h, w, b).detach().float().numpy()).all()


def test_weight_changed_before_reading():
    h, w, b, _ = head()
    read, unread, derived = lazy_logits(h, w, b), lazy_logits(h, w, b), lazy_logits(h, w, b)[:, 1:].float()
    expected = read + 0
    with torch.no_grad():
        w += 1
    assert torch.equal(read.detach() + 0, expected)  # computed before
    for z in (unread, unread.detach(), derived):
        for use in (lambda z: z + 0, lambda z: z.logsumexp(-1), lambda z: z[:, :1]):
            with pytest.raises(RuntimeError, match="before the head's weight or the hidden states changed"):
                use(z)
    w2 = torch.nn.Parameter(torch.randn(V, H))
    z = lazy_logits(h, w2, None)
    w2.data = torch.randn(V, H)
    with pytest.raises(RuntimeError, match="before the head's weight"):
        z.sum()


def test_writes_through_a_view_are_refused():
    h, w, b, _ = head()
    z = lazy_logits(h, w, b)
    view, other, copied = z[:, 1:], z.view(-1, V), z.float().clone()
    view.mul_(2)
    assert torch.equal(view + 0, real_logits(h, w, b)[:, 1:] * 2)
    for stale in (z, other):
        with pytest.raises(RuntimeError, match="written to in place through a view"):
            stale.sum()
        with pytest.raises(RuntimeError, match="written to in place through a view"):
            stale.logsumexp(-1)
    assert torch.equal(copied + 0, real_logits(h, w, b))
    z = lazy_logits(h, w, b).detach()
    view = z[0]
    z[0, 0] = 0.0
    assert not z[0, 0].any()
    with pytest.raises(RuntimeError, match="written to in place"):
        view.sum()


def test_gradient_through_another_functions_output():
    """DDP's sink clones outputs inside an autograd.Function: what it does with the gradient must not be passed by."""

    class Sink(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * 3

    h, w, b, _ = head()
    ours = torch.autograd.grad(stock_loss(Sink.apply(lazy_logits(h, w, b))), [h, w])
    theirs = torch.autograd.grad(stock_loss(Sink.apply(real_logits(h, w, b))), [h, w])
    for a, e in zip(ours, theirs, strict=True):
        assert relative_error(a, e) < 1e-5


def test_gradient_of_the_logits_themselves():
    h, w, b, _ = head()
    z, real = lazy_logits(h, w, b), real_logits(h, w, b)
    for x in (z, real):
        x.retain_grad()
        x.logsumexp(-1).sum().backward()
    assert relative_error(z.grad, real.grad) < 1e-6
    leaf = lazy_logits(h, w, b).detach().requires_grad_()
    leaf.logsumexp(-1).sum().backward()
    assert relative_error(leaf.grad, real.grad) < 1e-6


def test_only_what_requires_a_gradient():
    h, w, b, _ = head(bias=True)
    frozen = lazy_logits(h, w.detach(), b.detach())
    (grad,) = torch.autograd.grad(stock_loss(frozen), h)
    (expected,) = torch.autograd.grad(stock_loss(real_logits(h, w, b)), h)
    assert relative_error(grad, expected) < 1e-5
    assert not lazy_logits(h.detach(), w.detach(), None).requires_grad
    with torch.no_grad():
        z = lazy_logits(h, w, b)
        assert not z.requires_grad and not z.float().logsumexp(-1).requires_grad
    # Read once without gradients, then used with them.
    z = lazy_logits(h, w, b)
    with torch.no_grad():
        z.argmax(-1), z.float().max(), z.sum()
    (grad,) = torch.autograd.grad(stock_loss(z), h)
    assert relative_error(grad, expected) < 1e-5


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("read", ["stock loss", "selective_log_softmax", "power"])
def test_compiled_consumer(backend, read):
    torch._dynamo.reset()
    fn = {**LAZY, **WHOLE}[read]
    operands = head()
    ours = value_and_gradients(lazy_logits, torch.compile(fn, backend=backend), *operands)
    theirs = value_and_gradients(real_logits, fn, *operands)
    for a, e in zip(ours, theirs, strict=True):
        assert relative_error(a, e) < 1e-5


def test_no_rows():
    h, w = torch.randn(0, S, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    z = lazy_logits(h, w, None)
    assert z.argmax(-1).shape == (0, S) and z.sum() == 0
    grads = torch.autograd.grad(z.logsumexp(-1).sum(), [h, w])
    assert grads[0].shape == h.shape and not grads[1].any()


def test_wrong_shapes():
    with pytest.raises(ValueError, match=r"hidden \(2, 5\) does not fit a head of \[vocab, hidden\] = \(7, 6\)"):
        lazy_logits(torch.empty(2, 5), torch.empty(7, 6), None)
    h, w, b, _ = head()
    with pytest.raises(IndexError):
        lazy_logits(h, w, b)[0, 0, 0, 0]
    with pytest.raises(RuntimeError, match="invalid"):
        lazy_logits(h, w, b).view(3, -1, V)
    with pytest.raises(IndexError):
        lazy_logits(h, w, b).logsumexp(5)
