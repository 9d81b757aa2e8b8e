"""Small networks made of the spellings that people write, as data: for the graph fuzzing of test_graph_fuzz.py.

A :class:`Case` is a list of blocks with the sizes, dtypes and seed that make it one computation. Its ``repr`` builds it
again. A block's ``twist`` is what somebody may do around a site, or a near miss: something that looks like a site
and is another computation. Nothing here says what must be replaced: whatever is, must compute the same.

A block has ``weights(s)``, a tree of :class:`Weight`, and is called with x ``[batch, seq, width]``, the module that
holds its weights, the network's :class:`Inputs`, and a list to which it may append what the network returns besides.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

BF16, F32 = torch.bfloat16, torch.float32


Choices = dict[str, tuple[str, ...]]


class Spelling:
    """``repr``: what is not as by default, as code that builds it again. ``CHOICES``: of the fields that are words."""

    CHOICES: ClassVar[Choices] = {}

    def __repr__(self) -> str:
        said = [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default]  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in said)})"


@dataclass(frozen=True)
class Weight:
    """Normal numbers around ``mean``. ``fp32``: in any model. ``shared``: one for all of this shape."""

    shape: tuple[int, ...]
    std: float
    mean: float = 0.0
    fp32: bool = False
    shared: bool = False


@dataclass(frozen=True, repr=False)
class Sizes(Spelling):
    """``heads`` and ``head`` are of attention, independent of ``width``; ``window`` of sliding and chunked masks."""

    batch: int = 2
    seq: int = 8
    width: int = 16
    inner: int = 24
    heads: int = 2
    kv_heads: int = 1
    head: int = 8
    vocab: int = 32
    window: int = 3


class Inputs(NamedTuple):
    """What a network is called with. ``angle``: ``[1 or batch, seq, head / 2]``, fp32. ``bias``: additive mask
    ``[batch, 1, seq, seq]``, ``seen``: a boolean one. ``padding``; ``positions`` of packed documents: ``[batch, seq]``.
    """

    x: torch.Tensor
    ids: torch.Tensor
    labels: torch.Tensor
    angle: torch.Tensor
    padding: torch.Tensor
    positions: torch.Tensor
    bias: torch.Tensor
    seen: torch.Tensor


Returned = list[torch.Tensor]

# ------------------------------------------------------------------------------------------------------------- no-ops

#: What changes nothing, or the gradient alone.
GLUE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "": lambda x: x,
    "contiguous": lambda x: x.contiguous(),
    "clone": lambda x: x.clone(),
    "times one": lambda x: x * 1.0,
    "plus zero": lambda x: x + 0,
    "slice": lambda x: x[:],
    "ellipsis": lambda x: x[..., :],
    "dropout": lambda x: F.dropout(x, 0.0, True),
    "dropout outside of training": lambda x: F.dropout(x, 0.5, training=False),
    "other strides": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "flat and back": lambda x: x.reshape(-1, x.shape[-1]).view(x.shape),
    "rows of a larger tensor": lambda x: torch.cat((x, x), 1)[:, : x.shape[1]],
    "every second column": lambda x: torch.stack((x, x), -1).flatten(-2)[..., ::2],
    "up and down": lambda x: x.float().to(x.dtype),
    "half detached": lambda x: 0.5 * x + 0.5 * x.detach(),
    "scaled": lambda x: x * 0.5,
    "in place": lambda x: (x * 1.5).add_(0.25),
    "a copy is written to": lambda x: x.clone().mul_(0.5),
    "written to later": lambda x: _written_later(x),
    "tanh": torch.tanh,
}


def _written_later(x: torch.Tensor) -> torch.Tensor:
    y = x + 1.0
    z = y.view(-1, x.shape[-1])
    z += 0.5
    return y


# -------------------------------------------------------------------------------------------------------------- norms

SQUARES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "pow": lambda h: h.pow(2),
    "**": lambda h: h**2,
    "square": torch.square,
    "product": lambda h: h * h,
    "torch.pow": lambda h: torch.pow(h, 2),
}
#: x over the root of v.
ROOTS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "torch.rsqrt": lambda h, v: h * torch.rsqrt(v),
    "rsqrt()": lambda h, v: v.rsqrt() * h,
    "** -0.5": lambda h, v: h * v**-0.5,
    "pow(-0.5)": lambda h, v: h * torch.pow(v, -0.5),
    "1 / sqrt": lambda h, v: (1 / torch.sqrt(v)) * h,
    "reciprocal": lambda h, v: h * v.sqrt().reciprocal(),
    "/ sqrt": lambda h, v: h / torch.sqrt(v),
    "/ ** 0.5": lambda h, v: h / v**0.5,
}


def _root_plus(h: torch.Tensor, v: torch.Tensor, eps: float) -> torch.Tensor:
    return h / (torch.sqrt(v) + eps)


@dataclass(frozen=True, repr=False)
class RMSNorm(Spelling):
    weight: str = "after"
    root: str = "torch.rsqrt"
    square: str = "pow"
    eps: float = 1e-6
    upcast: str = "float"
    fp32: bool = False
    glue: str = ""
    twist: str = ""

    CHOICES: ClassVar[Choices] = {
        "root": tuple(ROOTS), "square": tuple(SQUARES), "glue": tuple(GLUE),
        "weight": (
            "after", "before", "swapped", "plus one", "one plus, after", "none", "native", "native, default",
            "native, none",
        ),
        "upcast": ("float", "to", "none"),
        "twist": (
            "sum", "another axis", "eps outside", "no eps", "eps twice", "eps of a tensor", "absolute values",
            "another tensor's", "variance returned", "normed returned", "variance used", "detached variance",
            "no_grad variance", "normed in no_grad", "two plus weight", "minus", "weight twice", "a scalar weight",
            "keepdim later", "normed in place", "variance in place", "result in place", "input written to later",
            "rounded between", "twice", "half of the variance", "result also returned", "weight of the input",
        ),
    }  # fmt: skip

    def weights(self, s: Sizes) -> dict[str, Any]:
        return self.of(s.width)

    def of(self, width: int) -> dict[str, Any]:
        width = 1 if self.twist == "a scalar weight" and self.weight != "native, default" else width
        mean = 0.0 if "plus" in self.weight else 1.0
        return {} if "none" in self.weight else {"weight": Weight((width,), 0.3, mean, self.fp32)}

    def __call__(self, x: torch.Tensor, w: Any, given: Inputs, returned: Returned) -> torch.Tensor:
        twist, kind = self.twist, x.dtype
        if self.weight.startswith("native"):
            if twist == "a scalar weight" and self.weight == "native":
                return F.rms_norm(x, x.shape[-1:], None, self.eps) * w.weight
            weight = None if self.weight == "native, none" else w.weight.to(kind)
            return F.rms_norm(x, x.shape[-1:], weight, None if self.weight == "native, default" else self.eps)
        if twist == "input written to later":
            x = x * 1.5
        h = x.float() if self.upcast == "float" else x.to(torch.float32) if self.upcast == "to" else x
        if twist == "rounded between":
            h = h.to(BF16).to(h.dtype)
        variance = self._variance(h)
        if twist == "variance returned":
            returned.append(variance)
        normed = self._normed(h, variance)
        if twist == "normed in place":
            normed.mul_(1.5)
        if twist == "normed returned":
            returned.append(normed)
        if twist == "input written to later" and not torch.is_grad_enabled():
            x.add_(1.0)
        result = self._weighted(GLUE[self.glue](normed), w, kind)
        if twist == "weight of the input":
            result = result * x[..., :1]
        if twist == "variance used":
            result = result + variance.to(result.dtype)
        if twist == "result in place":
            result.add_(0.5)
        if twist == "result also returned":
            returned.append(result)
        return result

    def _variance(self, h: torch.Tensor) -> torch.Tensor:
        twist, square = self.twist, SQUARES[self.square]
        source = h.roll(1, -2) if twist == "another tensor's" else h.detach() if twist == "detached variance" else h
        squares = source.abs() if twist == "absolute values" else square(source)
        if twist == "no_grad variance":
            with torch.no_grad():
                return square(h).mean(-1, keepdim=True)
        if twist == "sum":
            return squares.sum(-1, keepdim=True)
        if twist == "another axis":
            return squares.mean(-2, keepdim=True)
        if twist == "keepdim later":
            return squares.mean(-1).unsqueeze(-1)
        if twist == "half of the variance":
            return squares.mean(-1, keepdim=True) * 0.5
        return squares.mean(-1, keepdim=True) if self.upcast != "to" else torch.mean(squares, dim=(-1,), keepdim=True)

    def _normed(self, h: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
        twist, root = self.twist, ROOTS[self.root]
        if twist == "eps outside":
            return _root_plus(h, variance, self.eps)
        if twist == "no eps":
            return root(h, variance)
        if twist == "eps twice":
            return root(h, variance + self.eps + self.eps)
        if twist == "eps of a tensor":
            return root(h, variance + torch.full_like(variance, self.eps))
        if twist == "variance in place":
            variance = variance.mul(1.0)
            variance.add_(self.eps)
            return root(h, variance)
        if twist == "normed in no_grad":
            with torch.no_grad():
                return root(h, variance + self.eps)
        if twist == "twice":
            h = root(h, variance + self.eps)
            return root(h, self._variance(h) + self.eps)
        return root(h, self.eps + variance if self.root == "/ sqrt" else variance + self.eps)

    def _weighted(self, normed: torch.Tensor, w: Any, kind: torch.dtype) -> torch.Tensor:
        if self.weight == "none":
            return normed.to(kind)
        weight, twist = w.weight, self.twist
        if twist == "weight twice":
            normed = weight * normed
        if twist == "two plus weight":
            return ((2.0 + weight.float()) * normed).to(kind)
        if twist == "minus":
            return ((1.0 - weight.float()) * normed).to(kind)
        if self.weight == "after":
            return weight * normed.to(kind)
        if self.weight == "before":
            return (weight * normed).to(kind)
        if self.weight == "swapped":
            return normed.type_as(weight) * weight
        if self.weight == "plus one":
            return (normed * (1.0 + weight.float())).to(kind)
        return normed.to(kind) * (weight + 1)


@dataclass(frozen=True, repr=False)
class LayerNorm(Spelling):
    spelling: str = "native"
    weight: bool = True
    bias: bool = True
    eps: float = 1e-5
    root: str = "torch.rsqrt"
    fp32: bool = False
    twist: str = ""

    CHOICES: ClassVar[Choices] = {
        "root": tuple(ROOTS),
        "spelling": ("native", "written", "var"),
        "twist": (
            "unbiased", "eps outside", "another mean", "detached mean", "mean returned", "centred returned",
            "not centred", "centred twice", "two axes", "result in place", "no_grad mean", "centred in place",
            "swapped",
        ),
    }  # fmt: skip

    def weights(self, s: Sizes) -> dict[str, Any]:
        shape = (s.seq, s.width) if self.twist == "two axes" else (s.width,)
        found = {"weight": Weight(shape, 0.3, 1.0, self.fp32)} if self.weight else {}
        return found | ({"bias": Weight(shape, 0.3, 0.0, self.fp32)} if self.bias else {})

    def __call__(self, x: torch.Tensor, w: Any, given: Inputs, returned: Returned) -> torch.Tensor:
        weight, bias = w.weight if self.weight else None, w.bias if self.bias else None
        if self.twist == "two axes":
            cast = [None if t is None else t.to(x.dtype) for t in (weight, bias)]
            return F.layer_norm(x, x.shape[-2:], *cast, self.eps)
        if self.spelling == "native":
            cast = [None if t is None else t.to(x.dtype) for t in (weight, bias)]
            result = F.layer_norm(x, x.shape[-1:], *cast, self.eps)
        else:
            result = self._written(x, returned)
            result = result.to(x.dtype) if self.eps > 1e-4 else result
            if weight is not None:
                result = result * weight if self.twist == "swapped" else weight * result
            result = result.to(x.dtype)
            if bias is not None:
                result = result + bias
        if self.twist == "result in place":
            result *= 0.5
        return result

    def _written(self, x: torch.Tensor, returned: Returned) -> torch.Tensor:
        h, twist = x.float(), self.twist
        mean = h.mean(-1, keepdim=True)
        if twist == "no_grad mean":
            with torch.no_grad():
                mean = h.mean(-1, keepdim=True)
        if twist == "another mean":
            mean = mean.roll(1, -2)
        if twist == "detached mean":
            mean = mean.detach()
        centred = h - mean
        if twist == "centred twice":
            centred = centred - centred.mean(-1, keepdim=True)
        if twist == "centred in place":
            centred = centred + 1.0
            centred -= 0.5
        squared = (h if twist == "not centred" else centred).pow(2)
        if self.spelling == "var":
            variance = h.var(-1, unbiased=twist == "unbiased" and x.shape[-1] > 1, keepdim=True)
        else:
            variance = squared.mean(-1, keepdim=True)
        if twist == "mean returned":
            returned.append(mean)
        if twist == "centred returned":
            returned.append(centred)
        if twist == "eps outside":
            return _root_plus(centred, variance, self.eps)
        return ROOTS[self.root](centred, variance + self.eps)


# ------------------------------------------------------------------------------------------------------------- linears


@dataclass(frozen=True, repr=False)
class Adapter(Spelling):
    """LoRA as PEFT adds it to a layer's result."""

    rank: int = 2
    scale: float = 2.0
    fp32: bool = False
    dropout: float = 0.0
    bias: bool = False
    shared: bool = False
    twist: str = ""

    CHOICES: ClassVar[Choices] = {
        "twist": (
            "lora first", "in place", "scale before", "scale of a tensor", "vector scale", "minus",
            "something between", "thin returned", "thin used", "other input", "no scale", "scaled twice", "divided",
            "detached input", "thin in no_grad", "alpha",
        ),
    }  # fmt: skip

    def weights(self, n: int, k: int) -> dict[str, Any]:
        found = {
            "a": Weight((self.rank, k), k**-0.5, 0.0, self.fp32, self.shared),
            "b": Weight((n, self.rank), self.rank**-0.5, 0.0, self.fp32),
        }
        found |= {"bias": Weight((n,), 0.3, 0.0, self.fp32)} if self.bias else {}
        return found | ({"scale": Weight((n,), 0.3, 1.0, self.fp32)} if self.twist == "vector scale" else {})

    def __call__(self, result: torch.Tensor, x: torch.Tensor, w: Any, returned: Returned) -> torch.Tensor:
        twist, bias = self.twist, w.bias if self.bias else None
        own = x.roll(1, -2) if twist == "other input" else x.detach() if twist == "detached input" else x
        own = own.to(w.a.dtype)
        # A CPU draws the mask in memory order, and a result of ours may have other strides than eager's.
        own = F.dropout(own.contiguous() if self.dropout else own, self.dropout, True)
        if twist == "scale before":
            return result + F.linear(F.linear(own * self.scale, w.a), w.b, bias)
        if twist == "thin in no_grad":
            with torch.no_grad():
                thin = F.linear(own, w.a)
        else:
            thin = F.linear(own, w.a)
        if twist == "something between":
            thin = F.silu(thin)
        if twist == "thin returned":
            returned.append(thin)
        lora = F.linear(thin, w.b, bias)
        if twist == "thin used":
            lora = lora + thin.sum(-1, keepdim=True)
        if twist == "vector scale":
            return result + lora * w.scale
        if twist == "divided":
            return result + lora / self.scale
        if twist == "alpha":
            return torch.add(result, lora, alpha=self.scale)
        if twist == "no scale":
            return result + lora
        scale: Any = torch.tensor(self.scale) if twist == "scale of a tensor" else self.scale
        if twist == "scaled twice":
            lora = scale * lora
        if twist == "lora first":
            return lora * scale + result
        if twist == "minus":
            return result - lora * scale
        if twist == "in place" and result.dtype == lora.dtype:
            result += lora * scale
            return result
        return result + lora * scale


@dataclass(frozen=True, repr=False)
class Linear(Spelling):
    bias: bool = False
    adapters: tuple[Adapter, ...] = ()
    shared: bool = False
    twist: str = ""

    CHOICES: ClassVar[Choices] = {
        "twist": (
            "matmul", "base returned", "base used", "weight transposed", "weight cast", "frozen half",
            "weight in place",
        ),
    }  # fmt: skip

    def weights(self, n: int, k: int) -> dict[str, Any]:
        found: dict[str, Any] = {"weight": Weight((n, k), k**-0.5, 0.0, False, self.shared)}
        found |= {"bias": Weight((n,), 0.3)} if self.bias else {}
        return found | {f"lora_{i}": a.weights(n, k) for i, a in enumerate(self.adapters)}

    def __call__(self, x: torch.Tensor, w: Any, returned: Returned) -> torch.Tensor:
        weight, twist = w.weight, self.twist
        if twist == "weight transposed":
            weight = weight.t().contiguous().t()
        if twist == "weight cast":
            weight = weight.to(F32).to(x.dtype)
        if twist == "frozen half":
            weight = torch.cat((weight[:1].detach(), weight[1:]))
        if twist == "weight in place":
            weight = (weight * 1.0).mul_(0.5)
        if twist == "matmul":
            result = x @ weight.t()
            result = result + w.bias if self.bias else result
        else:
            result = F.linear(x, weight, w.bias if self.bias else None)
        base, kind = result, result.dtype
        if twist == "base returned":
            returned.append(base)
        for i, adapter in enumerate(self.adapters):
            result = adapter(result, x, getattr(w, f"lora_{i}"), returned)
        result = result.to(kind)
        return result + base.tanh() if twist == "base used" else result


@dataclass(frozen=True, repr=False)
class Projection(Spelling):
    """A linear layer by itself."""

    linear: Linear = Linear()

    def weights(self, s: Sizes) -> dict[str, Any]:
        return self.linear.weights(s.width, s.width)

    def __call__(self, x: torch.Tensor, w: Any, given: Inputs, returned: Returned) -> torch.Tensor:
        return self.linear(x, w, returned)


# ---------------------------------------------------------------------------------------------------------------- MLPs


def _new_gelu(g: torch.Tensor) -> torch.Tensor:
    return 0.5 * g * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (g + 0.044715 * torch.pow(g, 3.0))))


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "x * sigmoid": lambda g: g * torch.sigmoid(g),
    "gelu": F.gelu,
    "gelu, tanh": lambda g: F.gelu(g, approximate="tanh"),
    "new gelu": _new_gelu,
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "quick gelu": lambda g: g * torch.sigmoid(1.702 * g),
    "new gelu, another constant": lambda g: 0.5 * g * (1.0 + torch.tanh(0.8 * (g + 0.044715 * torch.pow(g, 3.0)))),
    "silu in place": lambda g: F.silu(g * 1.0, inplace=True),
    "silu in fp32": lambda g: F.silu(g.float()).to(g.dtype),
    "silu in fp32, kept": lambda g: F.silu(g.float()),
    "sigmoid of another": lambda g: g * torch.sigmoid(g + 1.0),
}


@dataclass(frozen=True, repr=False)
class MLP(Spelling):
    gate: Linear = Linear()
    up: Linear = Linear()
    down: Linear = Linear()
    activation: str = "silu"
    packed: str = ""
    swapped: bool = False
    twist: str = ""

    CHOICES: ClassVar[Choices] = {
        "activation": tuple(ACTIVATIONS),
        "packed": ("", "chunk", "split", "slices", "chunk, up first", "every second", "unequal"),
        "twist": (
            "gate twice", "up is gate", "activation returned", "product in place", "up has one column", "up detached",
            "gate detached", "up is x", "times a number", "activation used", "gate in place", "gate in no_grad",
            "plus one", "up is a row", "two products",
        ),
    }  # fmt: skip

    def weights(self, s: Sizes) -> dict[str, Any]:
        columns = 1 if self.twist == "up has one column" and not self.packed else s.inner
        found: dict[str, Any] = {"down": self.down.weights(s.width, s.inner)}
        if self.packed:
            return found | {"gate_up": self.gate.weights(2 * s.inner, s.width)}
        return found | {"gate": self.gate.weights(s.inner, s.width), "up": self.up.weights(columns, s.width)}

    def __call__(self, x: torch.Tensor, w: Any, given: Inputs, returned: Returned) -> torch.Tensor:
        gate, up = self._parts(x, w, returned)
        twist = self.twist
        if twist == "up is gate":
            up = gate
        if twist == "up detached":
            up = up.detach()
        if twist == "gate detached":
            gate = gate.detach()
        if twist == "gate in place":
            gate = gate * 1.0
            gate += 0.5
        if twist == "up is x":
            up = gate + 0.5
        if twist == "up is a row":
            up = up[:, :1]
        if twist == "plus one":
            up = up + 1
        if twist == "gate in no_grad":
            with torch.no_grad():
                active = ACTIVATIONS[self.activation](gate)
        else:
            active = ACTIVATIONS[self.activation](gate)
        if twist == "activation returned":
            returned.append(active)
        if twist == "times a number":
            active = 2.0 * active
        if twist == "product in place" and active.dtype == up.dtype:
            active *= up
            hidden = active
        else:
            hidden = up * active if self.swapped else active * up
        if twist == "gate twice":
            hidden = hidden + gate
        if twist == "activation used":
            hidden = hidden + active
        if twist == "two products":
            hidden = hidden + active * (up + 1.0)
        return self.down(hidden.to(x.dtype), w.down, returned)

    def _parts(self, x: torch.Tensor, w: Any, returned: Returned) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.packed:
            return self.gate(x, w.gate, returned), self.up(x, w.up, returned)
        both = self.gate(x, w.gate_up, returned)
        n = both.shape[-1] // 2
        if self.packed == "chunk":
            gate, up = both.chunk(2, dim=-1)
        elif self.packed == "chunk, up first":
            up, gate = both.chunk(2, dim=-1)
        elif self.packed == "split":
            gate, up = torch.split(both, [n, n], dim=-1)
        elif self.packed == "slices":
            gate, up = both[..., :n], both[..., n:]
        elif self.packed == "every second":
            gate, up = both[..., ::2], both[..., 1::2]
        else:  # other halves: the last column takes no part
            gate, up = both[..., : n - 1], both[..., n - 1 : 2 * n - 2]
            gate, up = F.pad(gate, (0, 1)), F.pad(up, (0, 1))
        return gate, up


# -------------------------------------------------------------------------------------------------------------- rotary


def _halves(t: torch.Tensor) -> torch.Tensor:
    return torch.cat((-t[..., t.shape[-1] // 2 :], t[..., : t.shape[-1] // 2]), dim=-1)


def _chunked_halves(t: torch.Tensor) -> torch.Tensor:
    first, second = t.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def _neighbours(t: torch.Tensor) -> torch.Tensor:
    return torch.stack((-t[..., 1::2], t[..., ::2]), dim=-1).flatten(-2)


@dataclass(frozen=True, repr=False)
class Rotary(Spelling):
    """``tables``: the axes that cos and sin have before the head's. ``kind``: their dtype, the model's or fp32."""

    style: str = "half"
    tables: str = "batch"
    fp32: bool = False
    upcast: bool = False
    twist: str = ""

    CHOICES: ClassVar[Choices] = {
        "style": ("half", "chunks", "partial", "apart", "to halves", "neighbours", "partial neighbours", "complex"),
        "tables": ("batch", "one row", "no axis", "seq alone", "each head"),
        "twist": (
            "sign", "minus", "sin and cos swapped", "k by other tables", "q alone", "k first", "tables learn",
            "turned returned", "q used before k", "q in no_grad", "k detached", "q in place", "q written to later",
            "cos in place", "tables in no_grad", "one table", "quarters", "k by k", "cos detached",
        ),
    }  # fmt: skip

    def turn(self, q: torch.Tensor, k: torch.Tensor, given: Inputs, seq_dim: int, returned: Returned) -> Any:
        """q and k, ``[batch, heads, seq, head]`` (``seq_dim`` 2) or ``[batch, seq, heads, head]`` (1), turned."""
        twist, angle = self.twist, given.angle
        if q.shape[-1] % 2:
            return q, k
        if twist == "tables in no_grad":
            with torch.no_grad():
                tables = self._tables(angle, q, seq_dim)
        else:
            tables = self._tables(angle, q, seq_dim)
        if twist == "tables learn":
            tables = tuple(t * (1.0 + given.x.float().mean()).to(t.dtype) for t in tables)
        if twist == "cos in place" and not tables[0].is_complex():
            tables[0].mul_(0.5)
        others = tables
        if twist == "k by other tables":
            others = self._tables(angle.flip(1), k, seq_dim)
        if self.tables == "each head":
            others = self._tables(angle, k, seq_dim)
        if twist == "k first":
            k, q = self._one(k, others, returned), self._one(q, tables, returned)
            return q, k
        if twist == "q in no_grad":
            with torch.no_grad():
                q = self._one(q, tables, returned)
        else:
            q = self._one(q, tables, returned)
        if twist == "q in place":
            q.mul_(0.5)
        if twist == "q used before k":
            k = k + q.mean().to(k.dtype)
        if twist == "k by k":
            k = self._one(k, others, returned)
        if twist == "k detached":
            k = k.detach()
        return q, k if twist == "q alone" else self._one(k, others, returned)

    def _tables(self, angle: torch.Tensor, x: torch.Tensor, seq_dim: int) -> tuple[torch.Tensor, ...]:
        width = x.shape[-1] // 2 if not self.style.startswith("partial") else max(x.shape[-1] // 4, 1)
        angle = angle[..., :width]
        if self.style == "complex":
            polar = torch.polar(torch.ones_like(angle), angle)
            return (self._axes(polar, x, seq_dim),)
        if self.style in ("half", "chunks", "partial"):
            angle = torch.cat((angle, angle), -1)
        elif "neighbours" in self.style:
            angle = angle.repeat_interleave(2, -1)
        kind = F32 if self.fp32 else x.dtype
        cos, sin = (self._axes(t.to(kind), x, seq_dim) for t in (angle.cos(), angle.sin()))
        if self.twist == "cos detached":
            cos = cos.detach()
        return (
            (sin, cos)
            if self.twist == "sin and cos swapped"
            else (cos, cos)
            if self.twist == "one table"
            else (cos, sin)
        )

    def _axes(self, t: torch.Tensor, x: torch.Tensor, seq_dim: int) -> torch.Tensor:
        if self.tables == "one row":  # the same angle for every token
            return t[:1, :1, None, :]
        if self.tables == "each head":  # [heads, seq, head], or [seq, heads, head]
            heads = x.shape[3 - seq_dim]
            rows = torch.stack([t[0] * (1.0 + i) for i in range(heads)], 0 if seq_dim == 2 else 1)
            return rows
        if seq_dim == 2 and self.tables == "no axis":
            return t[:1]
        if seq_dim == 2 and self.tables == "seq alone":
            return t[0]
        return t.unsqueeze(3 - seq_dim)

    def _one(self, x: torch.Tensor, tables: tuple[torch.Tensor, ...], returned: Returned) -> torch.Tensor:
        kind = x.dtype
        if self.twist == "q written to later":
            x = x * 1.0
        source = x
        h = x.float() if self.upcast else x
        if self.style == "complex":
            pairs = torch.view_as_complex(h.float().reshape(*h.shape[:-1], -1, 2))
            turned = torch.view_as_real(pairs * tables[0]).flatten(3)
        elif self.style.startswith("partial"):
            width = tables[0].shape[-1]
            h, rest = h[..., :width], h[..., width:]
            turned = torch.cat(
                (self._turned(h, *tables, returned), rest.to(torch.promote_types(h.dtype, tables[0].dtype))), -1
            )
        else:
            turned = self._turned(h, *tables, returned)
        if self.twist == "q written to later" and not torch.is_grad_enabled():
            source += 1.0
        return turned.type_as(x) if kind == x.dtype else turned

    def _turned(self, h: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, returned: Returned) -> torch.Tensor:
        twist = self.twist
        if self.style in ("apart", "to halves"):
            first, second = h.chunk(2, -1) if self.style == "apart" else (h[..., 0::2], h[..., 1::2])
            if twist == "sign":
                return torch.cat((first * cos + second * sin, second * cos - first * sin), -1)
            return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
        if twist == "quarters":
            at = h.shape[-1] // 4
            other = torch.cat((-h[..., at:], h[..., :at]), -1)
        elif "neighbours" in self.style:
            other = _neighbours(h)
        else:
            other = _chunked_halves(h) if self.style == "chunks" else _halves(h)
        if twist == "turned returned":
            returned.append(other)
        if twist == "sign":
            other = -other
        if twist == "minus":
            return h * cos - other * sin
        return (h * cos) + (other * sin)


# ----------------------------------------------------------------------------------------------------------- attention


def repeat_kv(x: torch.Tensor, n: int) -> torch.Tensor:
    b, h, s, d = x.shape
    return x[:, :, None, :, :].expand(b, h, n, s, d).reshape(b, h * n, s, d)


REPEATS: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "repeat_kv": repeat_kv,
    "unsqueeze": lambda x, n: x.unsqueeze(2).expand(-1, -1, n, -1, -1).flatten(1, 2),
    "repeat_interleave": lambda x, n: x.repeat_interleave(n, dim=1),
    "tiled": lambda x, n: x.repeat(1, n, 1, 1),  # another order
    "tiled, expanded": lambda x, n: x[:, None].expand(-1, n, -1, -1, -1).reshape(x.shape[0], -1, *x.shape[2:]),
    "enable_gqa": lambda x, n: x,
}


@dataclass(frozen=True, repr=False)
class Attention(Spelling):
    q: Linear = Linear()
    k: Linear = Linear()
    v: Linear = Linear()
    o: Linear = Linear()
    qk_norm: RMSNorm | None = None
    rotary: Rotary | None = None
    mask: str = "causal"
    repeat: str = "repeat_kv"
    spelling: str = "sdpa"
    scale: float | None = None
    seq_first: bool = False
    twist: str = ""

    CHOICES: ClassVar[Choices] = {
        "repeat": tuple(REPEATS), "spelling": ("sdpa", "written"),
        "mask": (
            "", "is_causal", "causal", "tril", "float causal", "padding", "padding alone", "float padding", "sliding",
            "packed", "documents", "chunked", "bias", "seen", "strictly causal", "next token too", "not causal",
            "causal or padding", "sliding alone", "all", "causal, window of one", "float of seen", "packed sliding",
            "twice", "learned", "one for each head", "causal, [S, S]", "causal from ones", "future",
        ),
        "twist": (
            "fused qkv", "k also returned", "v in place", "result in place", "transposed result", "scaled q",
            "v is k", "detached k", "cross", "result in no_grad", "fewer queries", "empty cache", "mask returned",
        ),
    }  # fmt: skip

    def weights(self, s: Sizes) -> dict[str, Any]:
        found: dict[str, Any] = {
            "q": self.q.weights(s.heads * s.head, s.width),
            "k": self.k.weights(s.kv_heads * s.head, s.width),
            "v": self.v.weights(s.kv_heads * s.head, s.width),
            "o": self.o.weights(s.width, s.heads * s.head),
        }
        if self.twist == "fused qkv":
            found = {"qkv": self.q.weights((s.heads + 2 * s.kv_heads) * s.head, s.width), "o": found["o"]}
        if self.qk_norm is not None:
            found |= {"q_norm": self.qk_norm.of(s.head), "k_norm": self.qk_norm.of(s.head)}
        if self.mask == "learned":
            found |= {"bias": Weight((1, s.heads, s.seq, s.seq), 0.5)}
        return found | {"s": s}

    def __call__(self, x: torch.Tensor, w: Any, given: Inputs, returned: Returned) -> torch.Tensor:
        s: Sizes = w.s
        twist, (batch, seq) = self.twist, x.shape[:2]
        if twist == "fused qkv":
            parts = [s.heads * s.head, s.kv_heads * s.head, s.kv_heads * s.head]
            q, k, v = self.q(x, w.qkv, returned).split(parts, -1)
        else:
            other = x.flip(1) if twist == "cross" else x
            q, k = self.q(x, w.q, returned), self.k(other, w.k, returned)
            v = k if twist == "v is k" else self.v(other, w.v, returned)
        q, k, v = (t.view(batch, seq, -1, s.head) for t in (q, k, v))
        if self.qk_norm is not None:
            q = self.qk_norm(q, w.q_norm, given, returned).to(x.dtype)
            k = self.qk_norm(k, w.k_norm, given, returned).to(x.dtype)
        if self.rotary is not None and self.seq_first:
            q, k = self.rotary.turn(q, k, given, 1, returned)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if self.rotary is not None and not self.seq_first:
            q, k = self.rotary.turn(q, k, given, 2, returned)
        if twist == "detached k":
            k = k.detach()
        if twist == "v in place":
            v = v * 1.0
            v += 0.5
        if twist == "k also returned":
            returned.append(k)
        if twist == "empty cache":
            k, v = (torch.cat((t.new_empty(0), t), dim=-2) for t in (k, v))
        if twist == "scaled q":
            q = q * 0.7
        if twist == "fewer queries" and self.mask in ("", "is_causal"):
            q = q[:, :, : max(seq // 2, 1)]
        if twist == "result in no_grad":
            with torch.no_grad():
                y = self._attend(q, k, v, w, given, returned)
        else:
            y = self._attend(q, k, v, w, given, returned)
        # PyTorch's fused attention keeps its result for the backward; a checkpoint would not notice that it is gone.
        if twist == "result in place" and self.spelling == "written":
            y.mul_(0.5)
        y = y.to(x.dtype)
        y = y.permute(0, 2, 1, 3) if twist == "transposed result" else y.transpose(1, 2)
        y = self.o(y.reshape(batch, y.shape[1], -1).contiguous(), w.o, returned)
        return y.sum(1, keepdim=True).expand(-1, seq, -1) if y.shape[1] != seq else y

    def _attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, w: Any, given: Inputs, returned: Returned
    ) -> torch.Tensor:
        s, gqa = w.s, self.repeat == "enable_gqa" and self.spelling == "sdpa"
        if not gqa:
            repeat = REPEATS["repeat_kv" if self.repeat == "enable_gqa" else self.repeat]
            k, v = repeat(k, s.heads // s.kv_heads), repeat(v, s.heads // s.kv_heads)
        is_causal = self.mask == "is_causal"
        mask = self._mask(q, w, given)
        if self.twist == "mask returned" and mask is not None:
            returned.append(mask.float())
        if self.spelling == "sdpa":
            options: dict[str, Any] = {"enable_gqa": True} if gqa else {}
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=0.0, is_causal=is_causal, scale=self.scale, **options
            )
        scores = torch.matmul(q, k.transpose(2, 3)) * (self.scale or s.head**-0.5)
        if is_causal:
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        elif mask is not None:
            scores = scores + mask
        attended = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        return torch.matmul(F.dropout(attended, p=0.0, training=True), v)

    def _mask(self, x: torch.Tensor, w: Any, given: Inputs) -> torch.Tensor | None:
        kind, batch = self.mask, x.shape[0]
        if kind in ("", "is_causal"):
            return None
        seq = given.padding.shape[1]
        rows, cols = torch.arange(seq)[None, None, :, None], torch.arange(seq)[None, None, None, :]
        b = torch.arange(batch)[:, None, None, None]
        causal = cols <= rows
        real = given.padding.to(torch.bool)[b, cols]
        lowest = torch.full((), torch.finfo(x.dtype).min, dtype=x.dtype)
        if kind == "causal":
            return causal.expand(batch, 1, seq, seq)
        if kind == "causal, [S, S]":
            return torch.arange(seq)[None, :] <= torch.arange(seq)[:, None]
        if kind == "causal from ones":
            return torch.ones(batch, 1, seq, seq, dtype=torch.bool).tril(diagonal=0)
        if kind == "tril":
            return torch.ones(seq, seq, dtype=torch.bool).tril()
        if kind == "float causal":
            return torch.where(causal, torch.zeros_like(lowest), lowest)
        if kind in ("padding"):
            return (causal & real).expand(batch, 1, seq, seq)
        if kind == "padding alone":
            return given.padding.bool()[:, None, None, :].expand(batch, 1, seq, seq)
        if kind == "float padding":
            return ((1.0 - given.padding[:, None, None, :].to(x.dtype)) * lowest).expand(batch, 1, seq, seq)
        if kind == "sliding":
            return (causal & (cols > rows - w.s.window)).expand(batch, 1, seq, seq)
        if kind == "sliding alone":
            return (cols > rows - w.s.window).expand(batch, 1, seq, seq)
        if kind == "causal, window of one":
            return causal & (cols > rows - 1)
        if kind in ("packed", "packed sliding"):
            p = given.positions
            ids = (torch.diff(p, prepend=p[:, :1] - 1, dim=-1) != 1).cumsum(-1)
            found = causal & (ids[b, rows] == ids[b, cols])
            return found & (cols > rows - w.s.window) & real if kind == "packed sliding" else found
        if kind == "documents":
            ids = (given.positions == 0).cumsum(-1)
            return causal & (ids[:, None, :, None] == ids[:, None, None, :])
        if kind == "chunked":
            return (causal & (cols // w.s.window == rows // w.s.window)).expand(batch, 1, seq, seq)
        if kind == "bias":
            return given.bias.to(x.dtype)
        if kind == "learned":
            return w.bias.to(x.dtype)
        if kind == "seen":
            return given.seen
        if kind == "float of seen":
            return torch.where(given.seen, torch.zeros_like(lowest), lowest)
        if kind == "strictly causal":
            return cols < rows
        if kind == "next token too":
            return cols <= rows + 1
        if kind == "not causal":
            return ~causal | (cols == 0)
        if kind == "causal or padding":
            return causal | real
        if kind == "twice":
            return causal & causal & real & (cols >= 0)
        if kind == "one for each head":
            return (causal & real).expand(batch, w.s.heads, seq, seq)
        if kind == "future":
            return cols >= rows
        return torch.ones(batch, 1, seq, seq, dtype=torch.bool)  # all


# ---------------------------------------------------------------------------------------------------------------- loss


@dataclass(frozen=True, repr=False)
class Loss(Spelling):
    head: Linear = Linear()
    spelling: str = "cross_entropy"
    shift: str = "pad"
    reduction: str = "mean"
    softcap: float = 0.0
    scale: float = 1.0
    upcast: bool = True
    returns: str = ""
    twist: str = ""

    CHOICES: ClassVar[Choices] = {
        "spelling": (
            "cross_entropy", "positional", "module", "log_softmax", "nll", "logsumexp", "functional nll",
            "transposed",
        ),
        "shift": ("pad", "slices", "none", "flat"),
        "reduction": ("mean", "sum", "sum over count", "none"),
        "returns": ("", "logits", "fp32 logits", "last logits"),
        "twist": (
            "smoothing", "class weights", "logits used", "no_grad logits", "detached logits", "all ignored",
            "ignore 0", "logits in place", "label probabilities", "two losses", "tanh alone", "plus z", "temperature",
            "tied",
        ),
    }  # fmt: skip

    def weights(self, s: Sizes) -> dict[str, Any]:
        found = self.head.weights(s.vocab, s.width)
        return found | ({"classes": Weight((s.vocab,), 0.1, 1.0)} if self.twist == "class weights" else {})

    def __call__(self, x: torch.Tensor, w: Any, given: Inputs, returned: Returned) -> torch.Tensor:
        labels, twist = given.labels, self.twist
        if twist == "all ignored":
            labels = torch.full_like(labels, -100)
        logits = self._logits(x, w, returned)
        vocab = logits.shape[-1]
        if self.returns == "logits":
            returned.append(logits)
        if self.returns == "last logits":
            returned.append(logits[:, -1])
        if self.upcast:
            logits = logits.float()
        if self.returns == "fp32 logits":
            returned.append(logits)
        if twist == "logits in place":
            logits = logits * 1.0
            logits *= 0.5
        if twist == "detached logits":
            logits = 0.5 * logits + 0.5 * logits.detach()
        if self.shift == "pad":
            labels = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
            flat = logits.view(-1, vocab)
        elif self.shift == "slices":
            labels, flat = labels[..., 1:].contiguous(), logits[..., :-1, :].contiguous().view(-1, vocab)
        elif self.shift == "flat":
            labels, flat = labels.flatten()[1:], logits.reshape(-1, vocab)[:-1]
        else:
            flat = logits.flatten(0, 1)
        labels = labels.reshape(-1)
        loss = self._loss(flat, labels, w)
        if twist == "logits used":
            loss = loss + 0.01 * logits.float().square().mean()
        if twist == "plus z":
            loss = loss + 0.01 * torch.logsumexp(flat.float(), -1).square().mean()
        if twist == "two losses":
            loss = loss + F.cross_entropy(flat, labels.clamp(min=0))
        return loss

    def _logits(self, x: torch.Tensor, w: Any, returned: Returned) -> torch.Tensor:
        if self.twist == "no_grad logits":
            with torch.no_grad():
                logits = self.head(x, w, returned)
        else:
            logits = self.head(x, w, returned)
        if self.scale != 1.0:
            logits = logits * self.scale if self.scale < 1 else logits / self.scale
        if self.twist == "temperature":
            logits = logits / 0.7 * 1.3
        if self.softcap:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        if self.twist == "tanh alone":
            logits = torch.tanh(logits)
        return logits

    def _loss(self, flat: torch.Tensor, labels: torch.Tensor, w: Any) -> torch.Tensor:
        twist, ignored = self.twist, 0 if self.twist == "ignore 0" else -100
        count = (labels != ignored).sum()
        reduction = "sum" if self.reduction == "sum over count" else self.reduction
        over = count if self.reduction == "sum over count" else 1
        if self.spelling not in ("cross_entropy", "positional", "module", "transposed"):
            return self._written(flat, labels.clamp(min=0), labels != ignored)
        if ignored == 0:
            labels = labels.clamp(min=0)
        options: dict[str, Any] = {"label_smoothing": 0.1} if twist == "smoothing" else {}
        if twist == "class weights":
            options["weight"] = w.classes.detach().to(flat.dtype)
        if twist == "label probabilities":
            return F.cross_entropy(flat, F.one_hot(labels.clamp(min=0), flat.shape[-1]).to(flat.dtype))
        if self.spelling == "transposed":
            return (
                F.cross_entropy(flat.t()[None], labels[None], ignore_index=ignored, reduction=reduction, **options)
                / over
            )
        if self.spelling == "module":
            return torch.nn.CrossEntropyLoss(ignore_index=ignored, reduction=reduction, **options)(flat, labels) / over
        if self.spelling == "positional" and not options:
            return F.cross_entropy(flat, labels, None, None, ignored, None, reduction) / over
        return F.cross_entropy(flat, labels, ignore_index=ignored, reduction=reduction, **options) / over

    def _written(self, flat: torch.Tensor, labels: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        if self.spelling == "logsumexp":
            each = torch.logsumexp(flat, -1) - flat.gather(-1, labels[:, None]).squeeze(-1)
        elif self.spelling == "nll":
            each = -torch.log_softmax(flat, -1).gather(-1, labels[:, None]).squeeze(-1)
        else:
            each = F.nll_loss(F.log_softmax(flat, dim=-1), labels, reduction="none")
        each = torch.where(kept, each, 0.0)
        return each.sum() / kept.sum().clamp(min=1) if self.reduction == "mean" else each.sum()


# ------------------------------------------------------------------------------------------------------------ networks

Block = RMSNorm | LayerNorm | Projection | MLP | Attention


@dataclass(frozen=True, repr=False)
class Layer(Spelling):
    """A block and what stands around it. ``glue`` before it; ``around`` it: nothing, ``"checkpoint"``, ``"autocast"``
    (bf16), ``"no_grad"``; ``times``: how often it is applied, with the same weights.
    """

    block: Block
    residual: str = ""
    glue: str = ""
    around: str = ""
    times: int = 1

    CHOICES: ClassVar[Choices] = {
        "glue": tuple(GLUE),
        "residual": ("", "before", "after", "in place", "scaled"),
        "around": ("", "checkpoint", "autocast", "no_grad", "autocast in checkpoint"),
    }  # fmt: skip

    def __call__(self, x: torch.Tensor, w: Any, given: Inputs, returned: Returned) -> torch.Tensor:
        for _ in range(self.times):
            h = GLUE[self.glue](x)
            y = self._around(h, w, given, returned).to(x.dtype)
            if self.residual == "before":
                y = x + y
            elif self.residual == "after":
                y = y + x
            elif self.residual == "scaled":
                y = x + 0.5 * y
            elif self.residual == "in place":
                y = y * 1.0
                y += x
            x = y
        return x

    def _around(self, x: torch.Tensor, w: Any, given: Inputs, returned: Returned) -> torch.Tensor:
        def run(x: torch.Tensor) -> Any:
            more: Returned = []
            if self.around.startswith("autocast"):
                with torch.autocast("cpu", BF16):
                    y = self.block(x, w, given, more)
            elif self.around == "no_grad":
                with torch.no_grad():
                    y = self.block(x, w, given, more)
            else:
                y = self.block(x, w, given, more)
            return y, *more

        y, *more = checkpoint(run, x, use_reentrant=False) if "checkpoint" in self.around else run(x)
        returned.extend(more)
        return y


@dataclass(frozen=True, repr=False)
class Case(Spelling):
    """``frozen``: share of parameters that require no gradient. ``start``: what the network begins with: ``"x"`` (that
    requires a gradient), ``"x, frozen"``, ``"ids"``. ``mode``: ``"train"``, or ``"no_grad"``. ``size``: of x's numbers.
    """

    layers: tuple[Layer, ...]
    loss: Loss | None = None
    sizes: Sizes = Sizes()
    dtype: torch.dtype = F32
    start: str = "x"
    mode: str = "train"
    frozen: float = 0.0
    dynamic: bool = False
    size: float = 1.0
    seed: int = 0

    @property
    def narrowest(self) -> torch.dtype:
        """The dtype that decides how exact the arithmetic is."""
        return BF16 if any(layer.around.startswith("autocast") for layer in self.layers) else self.dtype


class Weights(torch.nn.Module):
    """A tree of weights as a module."""

    def __init__(self, tree: dict[str, Any], make: Callable[[Weight], torch.nn.Parameter]) -> None:
        super().__init__()
        for name, what in tree.items():
            if isinstance(what, dict):
                self.add_module(name, Weights(what, make))
            elif isinstance(what, Weight):
                self.register_parameter(name, make(what))
            else:
                setattr(self, name, what)


class Network(torch.nn.Module):
    """The case as a module that is called with its :class:`Inputs`: the last value, or the loss, then all else."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(case.seed)
        shared: dict[Weight, torch.nn.Parameter] = {}

        def make(what: Weight) -> torch.nn.Parameter:
            if what in shared:
                return shared[what]
            numbers = what.mean + what.std * torch.randn(what.shape, generator=generator)
            trained = float(torch.rand((), generator=generator)) >= case.frozen
            parameter = torch.nn.Parameter(numbers.to(F32 if what.fp32 else case.dtype), requires_grad=trained)
            if what.shared:
                shared[what] = parameter
            return parameter

        s = case.sizes
        self.case = case
        self.embedding = make(Weight((s.vocab, s.width), 1.0)) if case.start == "ids" else None
        self.blocks = torch.nn.ModuleList(Weights(layer.block.weights(s), make) for layer in case.layers)
        self.head = Weights(case.loss.weights(s), make) if case.loss is not None else None
        if case.loss is not None and case.loss.twist == "tied" and self.embedding is not None:
            self.head.weight = self.embedding  # type: ignore[union-attr]

    def forward(self, given: Inputs) -> tuple[torch.Tensor, ...]:
        returned: Returned = []
        x = given.x if self.embedding is None else F.embedding(given.ids, self.embedding)
        for layer, weights in zip(self.case.layers, self.blocks, strict=True):
            x = layer(x, weights, given, returned)
        if self.case.loss is not None:
            x = self.case.loss(x, self.head, given, returned)
        return x, *returned


def inputs(case: Case) -> Inputs:
    """The case's inputs, from its seed."""
    s, generator = case.sizes, torch.Generator().manual_seed(case.seed + 1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    labels = torch.randint(0, s.vocab, (s.batch, s.seq), generator=generator)
    labels[torch.rand(s.batch, s.seq, generator=generator) < 0.2] = -100
    first, last = torch.randint(0, s.seq, (2, s.batch, 1), generator=generator).sort(0).values
    padding = (torch.arange(s.seq) >= first // 2) & (torch.arange(s.seq) <= last)
    starts = torch.rand(s.batch, s.seq, generator=generator) < 0.3
    starts[:, 0] = True
    at = torch.arange(s.seq).expand(s.batch, s.seq)
    seen = torch.rand(s.batch, 1, s.seq, s.seq, generator=generator) < 0.6
    seen[..., 0] = True
    return Inputs(
        (case.size * normal(s.batch, s.seq, s.width)).to(case.dtype).requires_grad_(case.start == "x"),
        torch.randint(0, s.vocab, (s.batch, s.seq), generator=generator),
        labels,
        3 * normal(1 if case.seed % 2 else s.batch, s.seq, max(s.head // 2, 1)),
        padding.long() if case.seed % 3 else padding,
        at - torch.where(starts, at, 0).cummax(-1).values,
        normal(s.batch, 1, s.seq, s.seq),
        seen,
    )
