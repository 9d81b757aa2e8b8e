"""Calls of every op at a model's sizes: what is tuned, and what a variant is verified on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import fastft.kernels
from fastft import compare
from fastft.kernels._inputs import Inputs, Model, New
from fastft.kernels._op import Op

#: At most so many elements of a result are compared.
SAMPLED = 2**20


@dataclass(frozen=True)
class Case:
    """One call of ``op``; ``make(new)`` makes its arguments."""

    op: str
    name: str
    make: Callable[[New], Inputs]


def cases(config: Mapping[str, Any], batch: int, seq: int) -> list[Case]:
    """The calls that training a model makes, from the fields of its transformers config."""
    model = Model.of(config, batch, seq)
    return [_case(op, sizes) for op in fastft.kernels.load().values() for sizes in op.sizes(model)]


def _case(op: Op, sizes: dict[str, Any]) -> Case:
    shown = (name if v is True else str(v).replace(" ", "") for name, v in sizes.items() if v)
    return Case(op.name, f"{op.name} {' x '.join(shown)}", lambda new: op.inputs(new, **sizes))


#: Small and odd sizes, and every op: what a variant is verified on. (model's fields, batch, seq)
SMALL: tuple[tuple[dict[str, Any], int, int], ...] = tuple(
    (
        {
            "model_type": family,
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": d,
            "vocab_size": vocab,
            norm: 1e-6,
        },
        batch,
        seq,
    )
    for family, hidden, intermediate, heads, kv_heads, d, vocab, norm, batch, seq in (
        ("llama", 64, 176, 4, 2, 16, 97, "rms_norm_eps", 2, 17),
        ("gemma2", 192, 320, 3, 1, 64, 300, "rms_norm_eps", 1, 65),
        ("phi3", 128, 256, 2, 2, 64, 512, "layer_norm_eps", 3, 32),
        ("qwen3", 96, 128, 3, 1, 40, 131, "rms_norm_eps", 2, 19),
        ("gemma3_text", 64, 96, 4, 2, 128, 100, "rms_norm_eps", 1, 33),
        ("nemotron", 48, 100, 2, 1, 24, 65, "norm_eps", 2, 9),
        ("llama", 1024, 2816, 8, 2, 128, 1000, "rms_norm_eps", 1, 128),
    )
)


def small_cases(op: str) -> list[Case]:
    return [case for config, batch, seq in SMALL for case in cases(config, batch, seq) if case.op == op]


# ---------------------------------------------------------------------------------------------------------- the results


def outputs(call: Callable[..., Any], inputs: Inputs) -> list[torch.Tensor]:
    found = call(*inputs.args, **inputs.kwargs)
    parts = (found,) if isinstance(found, torch.Tensor) else tuple(found)
    return [t for t in parts if isinstance(t, torch.Tensor) and t.numel()]


def gradients_for(found: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Gradients of a call's results, the same values whatever computed them."""
    made = []
    for i, t in enumerate(t for t in found if t.requires_grad):
        generator = torch.Generator(t.device).manual_seed(i + 1)
        values = torch.randn(t.shape, device=t.device, generator=generator)
        made.append((values.to(torch.bfloat16) if t.dim() else torch.ones_like(values)).to(t.dtype))
    return made


def results(call: Callable[..., Any], inputs: Inputs, backward: bool = True) -> dict[str, torch.Tensor]:
    """What a call gives and, with ``backward``, the gradients of what is wanted, by name; of large ones some elements,
    evenly spread.
    """
    found = outputs(call, inputs)
    named = {f"result {i}": t for i, t in enumerate(found) if t.is_floating_point()}
    able = [t for t in found if t.requires_grad]
    if backward and able and inputs.wanted:
        grads = torch.autograd.grad(able, list(inputs.wanted), gradients_for(found), allow_unused=True)
        named |= {f"gradient {i}": g for i, g in enumerate(grads) if g is not None}
    return {name: _some(t.detach()) for name, t in named.items()}


def _some(t: torch.Tensor) -> torch.Tensor:
    if t.numel() <= SAMPLED:
        return t.cpu()
    return t.reshape(-1)[:: -(-t.numel() // SAMPLED) | 1].cpu()


class Truth:
    """What a call must give: the reference in fp64 (``exact``) and in the call's own dtype."""

    def __init__(self, op: Op, inputs: Inputs, dtype: torch.dtype, wide: torch.dtype = torch.float64) -> None:
        self.same = results(op.reference, inputs.copy())
        # NF4's scales have no other form than fp32; its reference is exact in the dtype it gives.
        plain = op.name == "nf4_dequantize"
        self.exact = self.same if plain else results(op.reference, inputs.in_dtype(dtype, wide))
        longest = max((n for t in inputs.tensors() for n in t.shape), default=1)
        self.length = min(longest, 2**20)

    def compare(self, found: Mapping[str, torch.Tensor]) -> list[compare.Comparison]:
        """The error rule for each of these results."""
        return [
            compare.compare(name, t, self.same[name], self.exact[name], length=self.length) for name, t in found.items()
        ]
