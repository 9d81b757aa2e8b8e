"""What a rewritten graph computes, in numbers for the sizes that were traced: each op's own ``cost`` formula, and a
roofline over them.

The formulas are those of the forward pass. In AOTAutograd's joint graph an op is its raw calls: :func:`raw_work`.

Symbolic sizes count as what they were when the graph was traced, without a
guard.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils.flop_counter import flop_registry

from fastft import _torch_compat as compat
from fastft.fallback import said
from fastft.kernels import _linear_cross_entropy_fused as fused
from fastft.kernels import lora_linear, lora_mlp
from fastft.kernels._dense_weights import whole
from fastft.kernels._linear_cross_entropy_chunks import chunk_rows
from fastft.kernels._op import OPS, Cost, Op
from fastft.reporting import Work

# ------------------------------------------------------------------------------------------------------------ formulas


def _attention(q: Any, k: Any, v: Any, *, to: torch.dtype | None = None, variant: str = "", **options: Any) -> Cost:
    """``to``: what q, k and v are rounded to first, ``variant``: what computes then, both by
    :func:`fastft.patterns.attention.rounded_attention`.
    """
    q, k, v = (x if to is None else x.to(to) for x in (q, k, v))
    if len(q.shape) == 3:  # documents in a row, as packed_attention has them
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    return _formula("attention")(q, k, v, **options)


def _linear(
    x: Any, weight: Any, bias: Any = None, a: Any = (), b: Any = (), scaling: Any = (), *, quant: Any = (),
    shape: Any = (), dtype: torch.dtype | None = None, **_: Any,
) -> Cost:  # fmt: skip
    sizes = x.numel() // x.shape[-1], (shape or weight.shape)[0], x.shape[-1], sum(down.shape[0] for down in a)
    return _formula("lora_linear")(*sizes, (dtype or x.dtype).itemsize, bool(quant))


def _linears(
    x: Any, weight: Any, bias: Any = (), a: Any = (), b: Any = (), scaling: Any = (), *, quant: Any = (),
    shape: Any = (), dtype: torch.dtype | None = None, **_: Any,
) -> Cost:  # fmt: skip
    """The formula is for layers of one rank: those of each rank are added up."""
    by_rank: dict[int, list[int]] = {}
    for i, w in enumerate(weight):
        rank = sum(down.shape[0] for down in a[i]) if a else 0
        by_rank.setdefault(rank, []).append(((shape[i] if shape else ()) or w.shape)[0])
    tokens, K, nf4 = x.numel() // x.shape[-1], x.shape[-1], any(quant)
    each = [
        _formula("lora_linears")(tokens, N, K, rank, (dtype or x.dtype).itemsize, nf4) for rank, N in by_rank.items()
    ]
    return Cost(*(sum(getattr(c, of) for c in each) for of in ("flops", "bytes_moved", "bytes_kept")))


def _loss(name: str) -> Callable[..., Cost]:
    def formula(hidden: Any, weight: Any, bias: Any, labels: Any, **options: Any) -> Cost:
        cost = _formula(name)(hidden, weight, bias, labels)
        sizes = {"N": labels.numel(), "V": weight.shape[0], "H": weight.shape[1]}
        return Cost(*(e.subs({s: sizes[s.name] for s in e.free_symbols}) for e in vars(cost).values()))

    return formula


def _dequantise(*args: Any, shape: Any = None, dtype: torch.dtype | None = None) -> Cost:
    shape, dtype, blocksize = shape or args[7], dtype or args[8], args[5]
    return _formula("nf4_dequantize")(*shape, blocksize, dtype.itemsize)


#: Ops whose formula takes sizes, or whose call in a graph has more arguments than the op: how they come by them. The
#: formula of any other op takes the call's own arguments.
ADAPTERS: dict[str, Callable[..., Cost]] = {
    "attention": _attention,
    "lora_linear": _linear,
    "lora_linears": _linears,
    "linear_cross_entropy": _loss("linear_cross_entropy"),
    "linear_log_prob": _loss("linear_log_prob"),
    "nf4_dequantize": _dequantise,
}

#: What a reader of an op's numbers must know.
CAVEATS = {
    "attention": "documents of a packed batch count as one: how many there are is known at run time only",
    "rotary": "the tables that are kept are shared by all layers, and counted in each",
    "linear": "by the formula of lora_linear; the layer's input is kept by who produced it, and not counted here",
    "lora_linear": "the layer's input is kept by who produced it, and not counted here",
    "lora_linears": "the layers' input is kept by who produced it, and not counted here",
    "linear_cross_entropy": "forward and backward of a frozen head in bf16: its gradient is computed in the forward",
    "linear_log_prob": "forward and backward of a frozen head in bf16",
}


def _formula(name: str) -> Callable[..., Cost]:
    formula = OPS[name].cost
    if formula is None:
        raise Unknown("the op has no cost formula")
    return formula


# ----------------------------------------------------------------------------------------------------------- evaluation

#: Works by op and sizes: a model's layers are alike, and sympy is slow.
Memo = dict[Any, Work]


class Unknown(Exception):
    """Why there is no number."""


def work_of(kernel: Op | None, target: Any, args: Any, kwargs: Any, trained: bool, memo: Memo) -> Work:
    """The formula of ``kernel`` for these operands (fake tensors, numbers); a :class:`Work` with a ``problem`` where
    there is none or it fails. Nothing is kept for a backward unless ``trained``.
    """
    name = getattr(target, "__name__", str(target)) if kernel is None else kernel.name
    try:
        if kernel is None or kernel.cost is None:
            raise Unknown("the op has no cost formula")
        key = (name, trained, _key((args, kwargs)))
        if key not in memo:
            given, named = _sizes((args, kwargs))
            cost = ADAPTERS.get(name, kernel.cost)(*given, **named)
            kept = _number(cost.bytes_kept) if trained else 0
            memo[key] = Work(name, _number(cost.flops), _number(cost.bytes_moved), kept)
        return memo[key]
    except Exception as error:  # a formula that fails is no reason to leave a site alone
        return Work(name, problem=str(error) if isinstance(error, Unknown) else said(error))


def _key(x: Any, size: Callable[[Any], int] | None = None) -> Any:
    size = size or _size
    if isinstance(x, torch.Tensor):
        return tuple(map(size, x.shape)), x.dtype
    if isinstance(x, torch.SymInt):
        return size(x)
    if isinstance(x, (list, tuple)):
        return tuple(_key(one, size) for one in x)
    if isinstance(x, Mapping):
        return tuple((k, _key(v, size)) for k, v in x.items())
    # What is no plain value is in the graph, and lives as long as it.
    return x if x is None or isinstance(x, (bool, int, float, str, torch.dtype)) else id(x)


def _sizes(x: Any, size: Callable[[Any], int] | None = None) -> Any:
    """Operands as formulas need them: tensors without memory, with sizes that are numbers. ``size`` says which, if not
    those that were traced.
    """
    size = size or _size
    if isinstance(x, torch.Tensor):
        return torch.empty([size(n) for n in x.shape], dtype=x.dtype, device="meta")
    if isinstance(x, torch.SymInt):
        return size(x)
    if isinstance(x, (list, tuple)):
        return tuple(_sizes(one, size) for one in x)
    return {k: _sizes(v, size) for k, v in x.items()} if isinstance(x, Mapping) else x


def _size(n: int | torch.SymInt) -> int:
    hint = compat.size_hint(n)
    if hint is None:
        raise Unknown(f"the size {n} is known at run time only")
    return hint


def _number(e: Any) -> int:
    e = sympy.sympify(e)
    if e.free_symbols:
        raise Unknown(f"the cost formula has no value for {', '.join(sorted(map(str, e.free_symbols)))}")
    return round(float(e))


def added(name: str, each: Iterable[Work]) -> Work:
    """The sum; the first ``problem`` is kept, beside what is known."""
    each = list(each)
    return Work(
        name,
        sum(w.flops for w in each),
        sum(w.bytes_moved for w in each),
        sum(w.bytes_kept for w in each),
        next((w.problem for w in each if w.problem), ""),
    )


# ----------------------------------------------------------------------------------------------------------- raw calls


def _raw_attention(result: Any, *, q: Any, k: Any, v: Any, causal: bool, window: int, chunk: int, **_: Any) -> Cost:
    return _formula("attention")(q, k, v, causal=causal, window=window, chunk=chunk)


def _raw_linear(result: Any, *, x: Any, quant: Any, adapters: Any, b: Any, **_: Any) -> Cost:
    """``adapters``: how many each layer has, whose B are in ``b``, in turn."""
    tokens, K, dtype, ranks = x.numel() // x.shape[-1], x.shape[-1], x.dtype, iter([up.shape[1] for up in b])
    each = [
        _formula("lora_linear")(tokens, y.shape[-1], K, sum(islice(ranks, count)), dtype.itemsize, bool(quant))
        for y, count in zip(result, adapters, strict=True)
    ]
    return Cost(*(sum(getattr(c, of) for c in each) for of in ("flops", "bytes_moved", "bytes_kept")))


def _raw_stack(result: Any, *, x: Any, weight: Any, quant: Any, shape: Any, a: Any, **_: Any) -> Cost:
    pairs = list(zip(shape[::2], shape[1::2], strict=True))
    return _formula("lora_stack")(x, weight, a, quant=quant, shape=pairs)


def _raw_mlp(result: Any, *, x: Any, weight: Any, quant: Any, shape: Any, adapters: Any, b: Any, **_: Any) -> Cost:
    """What an MLP by slices computes."""
    return _mlp(x, weight, quant, shape, adapters, b, parts=3)


def _raw_mlp_again(
    result: Any, *, x: Any, weight: Any, quant: Any, shape: Any, adapters: Any, b: Any, **_: Any
) -> Cost:
    """What the backward of an MLP by slices computes again."""
    return _mlp(x, weight, quant, shape, adapters, b, parts=2)


def _mlp(x: Any, weight: Any, quant: Any, shape: Any, adapters: Any, b: Any, parts: int) -> Cost:
    ranks = iter([up.shape[1] for up in b])
    each = [sum(islice(ranks, count)) for count in adapters]
    return lora_mlp.cost_of(
        x.numel() // x.shape[-1],
        lora_mlp.widths(weight, quant, shape),
        each,
        x.dtype.itemsize,
        bool(quant),
        parts=parts,
    )


def _raw_down(result: Any, **_: Any) -> Cost:
    """Counted by the formula of ``lora_linear``."""
    return Cost(sympy.Integer(0), sympy.Integer(0), sympy.Integer(0))


def _raw_loss(result: Any, *, hidden: Any, weight: Any, unit_gradient: bool, unit_weight: bool, **_: Any) -> Cost:
    """The logits, and each gradient that is computed with them: as many products, each of three matrices."""
    (tokens, width), vocab, products = hidden.shape, weight.shape[0], sympy.Integer(1 + unit_gradient + unit_weight)
    moved = hidden.element_size() * (tokens * width + vocab * width + tokens * vocab)
    return Cost(2 * tokens * width * vocab * products, moved * products, sympy.Integer(0))


#: Raw calls of the forward that multiply matrices, and one that computes a forward again. Others move memory: their
#: operands and results.
RAW: dict[str, Callable[..., Cost]] = {
    "fastft::attention": _raw_attention,
    "fastft::lora_linear": _raw_linear,
    "fastft::lora_linear_down": _raw_down,
    "fastft::lora_stack": _raw_stack,
    "fastft::lora_mlp": _raw_mlp,
    "fastft::lora_mlp_backward": _raw_mlp_again,
    "fastft::linear_log_prob": _raw_loss,
}


def raw_work(node: fx.Node, size: Callable[[Any], int], memo: Memo) -> Work:
    """What one call in AOTAutograd's graph computes: by the formula of its op, or torch's own of FLOPs and the bytes of
    its operands and results. ``size`` gives the number that a size is.
    """
    target: Any = node.target
    schema = getattr(target, "_schema", None)
    if schema is None or target.is_view:  # an item of a tuple, other eyes on the same memory
        return Work(str(target))
    given = fx.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
    key = (schema.name, _key(given, size))
    if key not in memo:
        args, kwargs, result = _sizes((*given, node.meta.get("val")), size)
        if schema.name in RAW:
            cost = RAW[schema.name](result, **_named(target, args, kwargs))
            memo[key] = Work(schema.name, _number(cost.flops), _number(cost.bytes_moved))
        else:
            formula = flop_registry.get(target.overloadpacket)
            flops = 0 if formula is None else int(formula(*args, **kwargs, out_val=result))
            memo[key] = Work(schema.name, flops, _bytes((args, kwargs, result)))
    return memo[key]


#: What gives the number that a size is.
Size = Callable[[Any], int]


def nothing(size: Size) -> int:
    """Of a call that takes no buffers for itself. Most take none: who adds up knows this one, and leaves it out."""
    return 0


def scratch(node: fx.Node) -> Callable[[Size], int]:
    """Bytes of the largest buffers that a call in AOTAutograd's graph makes for itself and that its results are not,
    for any sizes: the logits of one chunk, a head's gradient summed up in fp32, a dequantised weight, what cuDNN's
    attention adds up. Holds no part of the graph, which may change.
    """
    name = getattr(getattr(node.target, "_schema", None), "name", "")
    if not name.startswith("fastft::"):
        return nothing
    given = fx.map_arg(_named(node.target, node.args, node.kwargs), lambda n: n.meta["val"])
    if name.startswith("fastft::linear_log_prob"):
        (tokens, width), vocab, item = given["hidden"].shape, given["weight"].shape[0], given["dtype"].itemsize
        if given["way"] != "chunks":
            return lambda size: fused.scratch(size(tokens), size(width), name.endswith("_backward"))
        trained = bool(given.get("unit_weight") or given.get("need_weight"))
        kind = given["weight"].dtype
        # Of a head in fp16 the forward gives the gradient in fp32.
        halves = kind == torch.bfloat16 or (kind == torch.float16 and name.endswith("_backward"))
        rounded_later, one_dtype = trained and halves, kind == given["dtype"]

        def of_loss(size: Size) -> int:
            rows = chunk_rows(size(tokens), size(vocab), item, size(width), trained)
            summed = rounded_later and (2 * rows < size(tokens) or not one_dtype)
            return size(vocab) * (rows * item + summed * size(width) * torch.float32.itemsize)  # type: ignore[no-any-return]

        return of_loss
    if name == "fastft::attention_backward":
        return _attention_scratch(given)
    if name.startswith("fastft::lora_mlp"):
        return _mlp_scratch(given, given["rows"])
    return _products(name, given)[0]


def in_one_piece(node: fx.Node) -> Callable[[Size], int] | None:
    """About :func:`scratch` of an MLP by slices, if it were computed in one piece; None: not by slices."""
    if not getattr(getattr(node.target, "_schema", None), "name", "").startswith("fastft::lora_mlp"):
        return None
    given = fx.map_arg(_named(node.target, node.args, node.kwargs), lambda n: n.meta["val"])
    return _mlp_scratch(given, None)


def _mlp_scratch(given: Mapping[str, Any], rows: int | None) -> Callable[[Size], int]:
    x, widths = given["x"], lora_mlp.widths(given["weight"], given["quant"], given["shape"])
    copied = bool(given["quant"]) or any(w.dtype != x.dtype for w in given["weight"])
    more = sum(t.shape[0] for t in given["a"]), x.element_size(), copied, given.get("need_weight")
    lead = x.shape[:-1]

    def of(size: Size) -> int:
        tokens = math.prod(map(size, lead))
        return lora_mlp.scratch_bytes(tokens, rows or tokens, list(map(size, widths)), *more)

    return of


def lasting(node: fx.Node) -> Callable[[Size], int] | None:
    """Of :func:`scratch`, the bytes of dense weights: they stay for the next call to write over, and grow to the most
    that one takes. None: the call gives them back first (an MLP by slices, which has copies of its own).
    """
    name = getattr(getattr(node.target, "_schema", None), "name", "")
    if name.startswith("fastft::lora_mlp"):
        return None
    if not name.startswith("fastft::"):
        return nothing
    return _products(name, fx.map_arg(_named(node.target, node.args, node.kwargs), lambda n: n.meta["val"]))[1]


def rounded(graph: fx.Graph) -> int:
    """Bytes of the adapters that a half of a cut graph takes in half precision, and makes of fp32 ones when it is
    called.
    """
    found: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if not getattr(getattr(node.target, "_schema", None), "name", "").startswith("fastft::lora_"):
            continue
        given = _named(node.target, node.args, node.kwargs)
        other = next((given[of] for of in ("h", "x", "wide", "dwide") if given.get(of) is not None), None)
        dtype = given.get("lora_dtype") or (None if other is None else other.meta["val"].dtype)
        if dtype is None or dtype.itemsize != 2:
            continue
        for thin in (*given.get("a", ()), *given.get("b", ())):
            value = thin.meta["val"]
            if thin.op == "placeholder" and value.dtype == torch.float32:
                found[thin] = int(value.numel()) * 2
    return sum(found.values())


def _products(name: str, given: Mapping[str, Any]) -> tuple[Callable[[Size], int], Callable[[Size], int]]:
    """What products with weights in 4 bits take, and of it their dense copies."""
    if not name.startswith(("fastft::lora_linear", "fastft::lora_stack")) or not given.get("quant"):
        return nothing, nothing
    widths, k = given["shape"][::2], given["shape"][1]
    below, rows = [] if name == "fastft::lora_linear" else [down.shape[0] for down in given["a"]], 0
    if name == "fastft::lora_linear_backward":
        item, own, dy = given["dtype"].itemsize, given["own"], given["dy"]
        asked = [given[of] for of in ("dtype", "lora_dtype", "together", "need_x")]
        if lora_linear.one_product(dy, given["shape"], own, *asked):
            shared = [n for n, alone in zip(below, own, strict=True) if not alone]
            below, rows = shared, dy[0].numel() // dy[0].shape[-1]
        else:
            below = []
    else:
        item = given["dwide" if name == "fastft::lora_stack_backward" else "x"].element_size()

    # All weights and matrices A below each other, and the gradients of all layers next to each other.
    def stacked(size: Size, columns: int = 0) -> int:
        return (sum(map(size, widths)) + whole(sum(below))) * (size(k) + columns) * item  # type: ignore[no-any-return]

    return (lambda size: stacked(size, size(rows))), stacked


def _attention_scratch(given: Mapping[str, Any]) -> Callable[[Size], int]:
    """Where cuDNN may compute it: dq in fp32, and dk and dv of every query head. Ours takes next to nothing."""
    q, v = given["q"], given["v"]
    masked = any(given[of] is not None for of in ("dense", "sinks")) or any(
        given[of] for of in ("window", "chunk", "softcap", "dropout_p")
    )
    if q.device.type == "cpu" or q.element_size() != 2 or masked or not given["causal"]:
        return nothing
    item, shape, wide = q.element_size(), q.shape, v.shape[-1]

    def number(size: Size) -> int:
        rows = math.prod(map(size, shape[:-1]))
        if rows * size(shape[-1]) >= 2**31:  # which cuDNN is not asked for
            return 0
        return rows * (size(shape[-1]) * (4 + item) + size(wide) * item)

    return number


def _named(target: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of a call by their names in the op's schema."""
    named = {a.name: a.default_value for a in target._schema.arguments if a.has_default_value()}
    return named | dict(zip((a.name for a in target._schema.arguments), args, strict=False)) | dict(kwargs)


def _bytes(x: Any) -> int:
    if isinstance(x, torch.Tensor):
        return x.numel() * x.element_size()
    if isinstance(x, Mapping):
        x = list(x.values())
    return sum(map(_bytes, x)) if isinstance(x, (list, tuple)) else 0


# ------------------------------------------------------------------------------------------------------------ roofline


@dataclass(frozen=True)
class Rates:
    """What a device does at best: TFLOP/s of bf16 products, TB/s of memory, and where the two numbers are from."""

    name: str
    tflops: float
    terabytes: float
    source: str

    def seconds(self, work: Work) -> float:
        """A lower bound: arithmetic and memory traffic overlap entirely."""
        return max(work.flops / (self.tflops * 1e12), work.bytes_moved / (self.terabytes * 1e12))

    def bound(self, work: Work) -> str:
        """What takes the longer: ``"compute"`` or ``"memory"``."""
        return "compute" if work.flops / self.tflops > work.bytes_moved / self.terabytes else "memory"


_MEASURED = "measured: what large bf16 products and copies reach"
H100 = Rates("H100 SXM", 750, 3.0, _MEASURED)
_DATASHEET = "the datasheet's, which nothing reaches"
#: By words of the name that CUDA has for a device; the first whose words are all in it counts.
RATES: tuple[tuple[tuple[str, ...], Rates], ...] = (
    (("H100", "PCIe"), Rates("H100 PCIe", 756, 2.0, _DATASHEET)),
    (("H100", "NVL"), Rates("H100 NVL", 835, 3.9, _DATASHEET)),
    (("H100",), H100),
    (("H200",), Rates("H200", 750, 4.1, _MEASURED)),
    (("A100", "80GB"), Rates("A100 80GB", 312, 2.0, _DATASHEET)),
    (("A100",), Rates("A100 40GB", 312, 1.55, _DATASHEET)),
    (("L40S",), Rates("L40S", 362, 0.86, _DATASHEET)),
    (("RTX 4090",), Rates("RTX 4090", 165, 1.0, _DATASHEET)),
)


def rates_of(device: str) -> Rates | None:
    """The rates of a device by its name; None for one that is not known (a CPU)."""
    return next((rates for words, rates in RATES if all(word.lower() in device.lower() for word in words)), None)
