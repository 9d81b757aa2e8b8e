"""What every way to compute the loss is told of a call: its constants and the outputs that are asked for, which of its
labels count, how z is made of the head's output, and what each token multiplies its gradients by.
``linear_cross_entropy.py`` has the maths.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

# ---------------------------------------------------------------------------------------------------- what is asked for


class Maths(NamedTuple):
    """The constants of one call, as the raw ops take them; ``dtype`` is what the head multiplies in."""

    ignore_index: int
    softcap: float | None
    logit_scale: float
    temperature: float
    label_smoothing: float
    z_loss: float
    dtype: torch.dtype
    way: str


#: Ways to compute it: in chunks of logits; in tiles, without any; in tiles, without the small gradients.
WAYS = ("chunks", "fused", "filtered")


class Wanted(NamedTuple):
    """Which of the forward's outputs are asked for. ``mean``: unit gradients are those of minus the scores' mean, or of
    their sum, and what these are to be multiplied by is asked for as well.
    """

    entropy: bool
    is_top1: bool
    mean_logits: bool
    log_sum_sq_probs: bool
    unit_gradient: bool = False
    unit_weight: bool = False
    unit_bias: bool = False
    mean: bool = False

    @property
    def gradient(self) -> bool:
        """Whether any unit gradient is."""
        return self.unit_gradient or self.unit_weight or self.unit_bias

    def flags(self) -> dict[str, bool]:
        """Constants of the kernels."""
        return {name.upper(): wanted for name, wanted in zip(self._fields[:4], self, strict=False)}


# ---------------------------------------------------------------------------------------------------- labels that count


def capturing(x: torch.Tensor) -> bool:
    """Whether a CUDA graph is being recorded: nothing may wait for the GPU then."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


class Scored:
    """How many labels count. Asked of a GPU when this is made, and waited for when it is wanted, which costs far less
    than a GEMM over padding and prompts: what is to be done on the CPU comes between. While a CUDA graph is recorded
    nobody can wait: all labels count then.
    """

    #: Of this process's last answers, how many in a row were that nothing can be left out.
    streak = 0

    def __init__(self, labels: torch.Tensor, ignore_index: int) -> None:
        self.counts = labels != ignore_index
        # Whether all do: known after :meth:`positions`, and not where nobody can wait.
        self.all = False
        #: How many do: None where nobody can wait, and until then.
        self.number: int | None = None
        self.asked: torch.Tensor | None = None
        self.event: torch.cuda.Event | None = None
        if not capturing(labels):
            self.asked = torch.empty((), dtype=torch.int64, pin_memory=labels.is_cuda)
            self.asked.copy_(self.counts.sum(), non_blocking=True)
            self.event = torch.cuda.current_stream(labels.device).record_event() if labels.is_cuda else None

    def foreseen(self) -> bool:
        """Whether a GPU may begin with all labels before the answer is there, which is as it was twice before. It has
        nothing else to do while the host waits, and on a busy host longer. Beginning in vain costs a chunk's product.
        """
        return self.event is not None and Scored.streak > 1

    def positions(self) -> torch.Tensor | None:
        """:func:`positions`, after the wait."""
        if self.asked is None:
            return None
        if self.event is not None:
            self.event.synchronize()
        self.number = int(self.asked)
        self.all = self.number == self.counts.shape[0]
        found = positions(self.counts, self.number)
        Scored.streak = Scored.streak + 1 if found is None else 0
        return found


def positions(counts: torch.Tensor, number: int) -> torch.Tensor | None:
    """Those of the labels that count, ``number`` of them, when enough others (1 in 16) can be left out of every GEMM;
    else None. Waits for no GPU.
    """
    if 16 * number > 15 * counts.shape[0]:
        return None
    return (~counts).sort(stable=True).indices[:number]


# -------------------------------------------------------------------------------------------------- operands and logits


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the maths after the GEMM runs in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def of_logits(maths: Maths) -> dict[str, Any]:
    """Constants of the kernels: how z is made of a raw logit."""
    return {
        "SCALE": float(maths.logit_scale),
        "SOFTCAP": float(maths.softcap or 1.0),
        "HAS_SOFTCAP": maths.softcap is not None,
        "INV_TEMPERATURE": 1.0 / maths.temperature,
    }


def cast_operands(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """In the dtype that the head multiplies in."""
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def transform(
    raw: torch.Tensor, softcap: float | None, logit_scale: float, temperature: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``(z, tanh)`` of raw logits that are already in the wide dtype; tanh is None without a softcap."""
    z = raw * logit_scale if logit_scale != 1.0 else raw
    tanh = None
    if softcap is not None:
        tanh = torch.tanh(z / softcap)
        z = tanh * softcap
    return (z / temperature if temperature != 1.0 else z), tanh


# ------------------------------------------------------------------------------------------------------------ gradients


class Coefficients(NamedTuple):
    """What each token multiplies the parts of its logits' gradients by, [tokens] each; None: that part is nobody's."""

    label: torch.Tensor | None
    p: torch.Tensor | None
    mean: torch.Tensor | None
    entropy: torch.Tensor | None

    def of(self, chunk: slice) -> Coefficients:
        return Coefficients(*(None if g is None else g[chunk] for g in self))

    def least(self, maths: Maths) -> torch.Tensor | None:
        """Up to where a gradient of a logit is small beside its token's coefficients: 2^-12 of the largest in bf16, a
        32nd of the dtype's spacing. None: filter nothing.
        """
        sizes = [g for g in (self.label, self.p, self.entropy) if g is not None]
        if maths.way != "filtered" or not sizes:
            return None
        largest = torch.stack(sizes).abs().amax(0)
        return largest * (abs(maths.logit_scale / maths.temperature) * torch.finfo(maths.dtype).eps / 32)


def coefficients(
    grads: tuple[torch.Tensor | None, ...], top: torch.Tensor, log_sum: torch.Tensor, vocab: int, maths: Maths
) -> Coefficients:
    """Out of the gradients of score, entropy, mean and lse."""
    wide = wide_dtype(maths.dtype)
    g_score, g_entropy, g_mean, g_lse = (None if g is None else g.to(wide).contiguous() for g in grads)
    label = p = g_score
    if g_score is not None and maths.z_loss:
        p = g_score * (1 + 2 * maths.z_loss * (top + log_sum))
    if g_score is not None and maths.label_smoothing:
        label, smooth = g_score * (1 - maths.label_smoothing), g_score * maths.label_smoothing
        g_mean = smooth if g_mean is None else g_mean + smooth
    if g_lse is not None:
        p = -g_lse if p is None else p - g_lse
    return Coefficients(label, p, None if g_mean is None else g_mean / vocab, g_entropy)
