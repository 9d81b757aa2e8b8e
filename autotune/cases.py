"""Calls of every op at a model's sizes: what is tuned, and what a variant is verified on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastft import compare
from fastft.kernels._op import OPS, Op

#: At most so many elements of a result are compared.
SAMPLED = 2**20


@dataclass
class Inputs:
    """Arguments of one call, and those of its tensors whose gradients are wanted."""

    args: Sequence[Any]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    wanted: Sequence[torch.Tensor] = ()

    def mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Inputs:
        """With every tensor changed; one that occurs twice once."""
        made: dict[int, torch.Tensor] = {}

        def one(x: Any) -> Any:
            if isinstance(x, (list, tuple)):
                return type(x)(map(one, x))
            if not isinstance(x, torch.Tensor):
                return x
            if id(x) not in made:
                made[id(x)] = change(x.detach()).requires_grad_(x.requires_grad)
            return made[id(x)]

        return Inputs(one(list(self.args)), {k: one(v) for k, v in self.kwargs.items()}, [one(x) for x in self.wanted])

    def copy(self) -> Inputs:
        """The same values and strides at other addresses."""
        return self.mapped(lambda x: x.clone(memory_format=torch.preserve_format))

    def in_dtype(self, old: torch.dtype, new: torch.dtype) -> Inputs:
        """With the tensors of one dtype in another."""
        return self.mapped(lambda x: x.to(new) if x.dtype == old else x.clone())

    def tensors(self) -> list[torch.Tensor]:
        found: dict[int, torch.Tensor] = {}

        def note(x: torch.Tensor) -> torch.Tensor:
            found[x.data_ptr()] = x
            return x

        self.mapped(note)
        return list(found.values())


@dataclass(frozen=True)
class Case:
    """One call of ``op``; ``make(new)`` makes its arguments."""

    op: str
    name: str
    make: Callable[[New], Inputs]


class New:
    """Makes the tensors of a call: random, in one dtype, on one device."""

    def __init__(self, dtype: torch.dtype, device: str, seed: int = 0) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, *shape: int, grad: bool = False, scale: float = 1.0) -> torch.Tensor:
        made = torch.randn(shape, device=self.device, generator=self.generator) * scale
        return made.to(self.dtype).requires_grad_(grad)

    def integers(self, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, device=self.device, generator=self.generator)

    def nf4(self, n: int, k: int) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Packed weight [n, k] and its double quantised scales."""
        blocks = -(-n * k // 64)
        packed = self.integers(256, (n * k + 1) // 2, 1).to(torch.uint8)
        code = torch.linspace(-1, 1, 256, device=self.device)
        second = torch.rand(-(-blocks // 256), device=self.device, generator=self.generator) * 0.02
        offset = torch.tensor(0.03, device=self.device)
        return packed, (self.integers(256, blocks).to(torch.uint8), code, offset, second)


def cases(config: Mapping[str, Any], batch: int, seq: int) -> list[Case]:
    """The calls that training a model makes, from the fields of its transformers config."""
    hidden, intermediate = config["hidden_size"], config.get("intermediate_size") or 0
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    d = config.get("head_dim") or hidden // heads
    family, vocab = str(config.get("model_type", "")), config["vocab_size"]
    kind = "gelu_tanh" if "gelu" in str(config.get("hidden_act", "")) or family.startswith("gemma") else "silu"
    gated = family not in ("starcoder2", "phi", "nemotron")
    rope = config.get("rope_parameters") or {}
    fraction = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    turned = int(d * fraction) // 2 * 2
    options = {"causal": True, "window": config.get("sliding_window") or 0}
    options["softcap"] = float(config.get("attn_logit_softcapping") or 0.0)
    linears = {
        "phi3": [((heads + 2 * kv_heads) * d, hidden), (2 * intermediate, hidden)],
    }.get(family, [(heads * d, hidden), (kv_heads * d, hidden), (intermediate, hidden)])
    linears = list(dict.fromkeys([*linears, (hidden, heads * d), (hidden, intermediate)]))

    def rms_norm(new: New, rows: int = seq, n: int = hidden) -> Inputs:
        x, w = new(batch, rows, n, grad=True), new(n)
        return Inputs((x, w, 1e-6, 1.0 if family.startswith("gemma") else 0.0), {}, [x])

    def layer_norm(new: New) -> Inputs:
        x, w, b = new(batch, seq, hidden, grad=True), new(hidden), new(hidden)
        return Inputs((x, w, b, 1e-5), {}, [x])

    def glu(new: New) -> Inputs:
        g, u = (new(batch, seq, intermediate, grad=True) for _ in range(2))
        return Inputs((g, u, kind), {}, [g, u])

    def glu_packed(new: New) -> Inputs:
        both = new(batch, seq, 2 * intermediate, grad=True)
        return Inputs((both, kind), {}, [both])

    def heads_of(new: New, *counts: int) -> list[torch.Tensor]:  # views of the projections' results
        return [new(batch, seq, n, d).transpose(1, 2).requires_grad_() for n in counts]

    def rotary(new: New) -> Inputs:
        q, k = heads_of(new, heads, kv_heads)
        angle = torch.rand(1, seq, turned // 2, device=new.device, generator=new.generator).repeat(1, 1, 2)
        tables = angle.cos().to(new.dtype), angle.sin().to(new.dtype)
        return Inputs((q, k, *tables), {"rotary_dim": turned}, [q, k])

    def attention(new: New) -> Inputs:
        q, k, v = heads_of(new, heads, kv_heads, kv_heads)
        return Inputs((q, k, v), options, [q, k, v])

    def nf4(n: int, k: int) -> Callable[[New], Inputs]:
        def make(new: New) -> Inputs:
            packed, scales = new.nf4(n, k)
            return Inputs((packed, *scales, 64, 256, (n, k), new.dtype))

        return make

    def lora(new: New, n: int, k: int, x: torch.Tensor) -> tuple[Any, ...]:
        return new(n, k, scale=k**-0.5), [new(16, k, grad=True, scale=k**-0.5)], [new(n, 16, grad=True, scale=0.25)]

    def lora_linear(new: New) -> Inputs:
        x = new(batch, seq, hidden, grad=True)
        w, a, b = lora(new, heads * d, hidden, x)
        return Inputs((x, w, None, a, b, [2.0]), {}, [x, *a, *b])

    def lora_linears(new: New) -> Inputs:
        x = new(batch, seq, hidden, grad=True)
        w, a, b = map(list, zip(*(lora(new, n * d, hidden, x) for n in (heads, kv_heads)), strict=True))
        return Inputs((x, w, (), a, b, [[2.0], [2.0]]), {}, [x, *(t for pair in (*a, *b) for t in pair)])

    def head(new: New) -> Inputs:
        h, w = new(batch * seq, hidden, grad=True), new(vocab, hidden, scale=hidden**-0.5)
        softcap = config.get("final_logit_softcapping")
        return Inputs((h, w, None, new.integers(vocab, batch * seq)), {"softcap": softcap}, [h])

    norm = "rms_norm" if "rms_norm_eps" in config else "layer_norm"
    found = [Case(norm, f"{norm} {hidden}", rms_norm if norm == "rms_norm" else layer_norm)]
    if family.startswith("qwen3"):
        found.append(Case("rms_norm", f"rms_norm of heads {d}", lambda new: rms_norm(new, seq * heads, d)))
    if gated and intermediate:
        packed = family == "phi3"
        name = "glu_packed" if packed else "glu"
        found.append(Case(name, f"{name} {kind} {intermediate}", glu_packed if packed else glu))
    found.append(Case("rotary", f"rotary {heads}+{kv_heads} x {d}", rotary))
    found.append(Case("attention", f"attention {heads}/{kv_heads} x {d}", attention))
    found += [Case("nf4_dequantize", f"nf4 {n} x {k}", nf4(n, k)) for n, k in linears if n and k]
    found.append(Case("lora_linear", f"lora_linear {heads * d} x {hidden}", lora_linear))
    found.append(Case("lora_linears", f"lora_linears on {hidden}", lora_linears))
    found += [Case(op, f"{op} {vocab}", head) for op in ("linear_cross_entropy", "linear_log_prob")]
    return found


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


def judge(call: Callable[..., Any], case: Case, dtype: torch.dtype, device: str) -> list[compare.Comparison]:
    """``call`` in the place of a case's op, by the error rule: results and gradients against the reference in fp64,
    beside PyTorch in the same dtype."""
    inputs = case.make(New(dtype, device))
    truth = Truth(OPS[case.op], inputs, dtype)
    found = results(call, inputs.copy())
    missing = truth.same.keys() - found.keys()
    judged = truth.compare({name: t for name, t in found.items() if name in truth.same})
    return [*judged, *(compare.Comparison(name, math.inf, 0.0, 0.0) for name in sorted(missing))]
