"""The one list of named real shapes: what tests, kernel benchmarks and the tuner run on.

:data:`MODELS` holds architectures as their published ``config.json`` states them, in transformers' own field names;
``bench/implementations.py`` builds models from the same rows. :data:`SHAPES` is derived from it: for each model and op,
the sizes that op meets in that model, at a few (batch, seq) working points. A shape tagged ``test`` is small and odd on
purpose: sizes that are no multiple of a block, one row, one head.

    for shape in shapes("rms_norm", tag="test"):
        x = torch.randn(shape["batch"], shape["seq"], shape["hidden"])

Sizes are counts of elements. ``str(shape)`` is a test id. To add a model, add a row to :data:`MODELS`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _rope(theta: float, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, **more}


#: The classes with LayerNorm instead of RMSNorm, and the field that holds its eps.
LAYER_NORMS = {
    "starcoder2": "norm_epsilon",
    "phi": "layer_norm_eps",
    "stablelm": "layer_norm_eps",
    "nemotron": "norm_eps",
}


#: The classes with a norm of each head of q and k, and those of which some layers see a window and others everything.
HEAD_NORMS = ("qwen3", "gemma3_text")
MIXED_WINDOWS = ("gemma2", "gemma3_text")


def _model(
    model_type: str,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    vocab: int,
    **more: Any,
) -> dict[str, Any]:
    return dict(
        model_type=model_type,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        **{"max_position_embeddings": 131072, "tie_word_embeddings": False, **more},
    )


LLAMA3 = dict(rms_norm_eps=1e-5, rope_parameters=LLAMA3_ROPE)
LLAMA32 = dict(rms_norm_eps=1e-5, rope_parameters={**LLAMA3_ROPE, "factor": 32.0}, tie_word_embeddings=True)
QWEN = dict(rms_norm_eps=1e-6, rope_parameters=_rope(1e6), max_position_embeddings=40960)
GEMMA = dict(rms_norm_eps=1e-6, query_pre_attn_scalar=256, tie_word_embeddings=True)
GEMMA2 = dict(**GEMMA, rope_parameters=_rope(1e4), sliding_window=4096, max_position_embeddings=8192)
SOFTCAPS = dict(attn_logit_softcapping=50.0, final_logit_softcapping=30.0)
STARCODER2 = dict(
    norm_epsilon=1e-5,
    sliding_window=4096,
    use_bias=True,
    hidden_act="gelu_pytorch_tanh",
    bos_token_id=0,
    eos_token_id=0,
)
PHI4 = dict(rms_norm_eps=1e-5, max_position_embeddings=16384, original_max_position_embeddings=16384)
GRANITE_SCALES = dict(
    embedding_multiplier=12.0, attention_multiplier=0.0078125, residual_multiplier=0.22, logits_scaling=16.0
)

NEMOTRON = dict(norm_eps=1e-5, rope_parameters=_rope(1e4, partial_rotary_factor=0.5))

#: name → the fields of its transformers config that matter for sizes and numerics (``model_type`` picks the class).
#: Columns: class, hidden, intermediate, layers, heads, key/value heads, head size, vocabulary.
MODELS: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": _model("llama", 4096, 14336, 32, 32, 8, 128, 128256, **LLAMA3),
    "llama-3.2-1b": _model("llama", 2048, 8192, 16, 32, 8, 64, 128256, **LLAMA32),
    "llama-3.2-3b": _model("llama", 3072, 8192, 28, 24, 8, 128, 128256, **LLAMA32),
    "llama-3.3-70b": _model("llama", 8192, 28672, 80, 64, 8, 128, 128256, **LLAMA3),
    "mistral-7b": _model(
        "mistral",
        4096,
        14336,
        32,
        32,
        8,
        128,
        32000,
        rms_norm_eps=1e-5,
        rope_parameters=_rope(1e4),
        sliding_window=4096,
    ),
    "qwen2.5-7b": _model("qwen2", 3584, 18944, 28, 28, 4, 128, 152064, **QWEN),
    "qwen3-8b": _model("qwen3", 4096, 12288, 36, 32, 8, 128, 151936, **QWEN),
    "qwen3-0.6b": _model("qwen3", 1024, 3072, 28, 16, 8, 128, 151936, **{**QWEN, "tie_word_embeddings": True}),
    "qwen3-14b": _model("qwen3", 5120, 17408, 40, 40, 8, 128, 151936, **QWEN),
    "gemma-2-9b": _model("gemma2", 3584, 14336, 42, 16, 8, 256, 256000, **GEMMA2, **SOFTCAPS),
    "gemma-3-1b": _model("gemma3_text", 1152, 6912, 26, 4, 1, 256, 262144, **GEMMA, sliding_window=512),
    "gemma-3-4b": _model("gemma3_text", 2560, 10240, 34, 8, 4, 256, 262208, **GEMMA, sliding_window=1024),
    "gemma-3-12b": _model("gemma3_text", 3840, 15360, 48, 16, 8, 256, 262208, **GEMMA, sliding_window=1024),
    "phi-4": _model("phi3", 5120, 17920, 40, 40, 10, 128, 100352, **PHI4, rope_parameters=_rope(250000.0)),
    # Only the first 96 of 128 elements of a head are rotated.
    "phi-4-mini": _model(
        "phi3",
        3072,
        8192,
        32,
        24,
        8,
        128,
        200064,
        **{**PHI4, "tie_word_embeddings": True},
        rope_parameters=_rope(1e4, partial_rotary_factor=0.75),
    ),
    "granite-3.1-8b": _model(
        "granite", 4096, 12800, 40, 32, 8, 128, 49155, rms_norm_eps=1e-5, rope_parameters=_rope(1e7), **GRANITE_SCALES
    ),
    "starcoder2-3b": _model("starcoder2", 3072, 12288, 30, 24, 2, 128, 49152, **STARCODER2, rope_parameters=_rope(1e6)),
    "starcoder2-7b": _model("starcoder2", 4608, 18432, 32, 36, 4, 128, 49152, **STARCODER2, rope_parameters=_rope(1e6)),
    "starcoder2-15b": _model(
        "starcoder2", 6144, 24576, 40, 48, 4, 128, 49152, **STARCODER2, rope_parameters=_rope(1e5)
    ),
    # LayerNorm in other sizes; the first parts of a head are rotated.
    "phi-2": _model(
        "phi",
        2560,
        10240,
        32,
        32,
        32,
        80,
        51200,
        layer_norm_eps=1e-5,
        rope_parameters=_rope(1e4, partial_rotary_factor=0.4),
    ),
    "stablelm-2-1.6b": _model(
        "stablelm",
        2048,
        5632,
        24,
        32,
        32,
        64,
        100352,
        layer_norm_eps=1e-5,
        use_qkv_bias=True,
        rope_parameters=_rope(1e4, partial_rotary_factor=0.25),
    ),
    "minitron-8b": _model("nemotron", 4096, 16384, 32, 48, 8, 128, 256000, **NEMOTRON),
    "minitron-4b": _model("nemotron", 3072, 9216, 32, 24, 8, 128, 256000, **NEMOTRON),
    "nemotron-4-15b": _model("nemotron", 6144, 24576, 32, 48, 8, 128, 256000, **NEMOTRON),
    # The smallest that still has every kind of site: for tests of the harness on a CPU.
    "tiny": _model("llama", 64, 176, 2, 4, 2, 16, 512, rms_norm_eps=1e-5, rope_parameters=_rope(1e4)),
    # About a billion parameters with a small vocabulary: the demo's text on a GPU.
    "llama-1b": _model("llama", 2048, 5632, 22, 32, 8, 64, 32000, rms_norm_eps=1e-5, rope_parameters=_rope(1e4)),
}


@dataclass(frozen=True)
class Shape:
    """One op at one model's sizes. ``shape["hidden"]`` reads a size; ``tags`` are how a user picks rows.

    Tags: ``primary`` (what the benchmark runs by default), ``real`` (six sizes of each op that models have, for the
    whole table in one go), ``long`` (32k tokens in one sequence), ``attention`` (every kind of mask, at one model's
    heads), ``loss`` (heads frozen and trained), ``slices`` (an MLP's ops at the tokens that a memory plan cuts it
    into), ``test`` (small and odd, for the tests).
    """

    op: str
    model: str
    dims: dict[str, Any] = field(hash=False)
    tags: frozenset[str] = frozenset()

    def __getitem__(self, name: str) -> Any:
        if name not in self.dims:
            raise KeyError(f"{self.op} shapes have no size {name!r}; they have {', '.join(self.dims)}")
        return self.dims[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self.dims.get(name, default)

    def __str__(self) -> str:
        sizes = "x".join(
            name if v is True else str(v) for name, v in self.dims.items() if v not in (None, 0, False, "")
        )
        return f"{self.op}-{self.model}-{sizes}"


def _heads(config: dict[str, Any]) -> tuple[int, int, int]:
    """(query heads, key/value heads, head size)."""
    heads = config["num_attention_heads"]
    return heads, config["num_key_value_heads"], config.get("head_dim") or config["hidden_size"] // heads


def _activation(config: dict[str, Any]) -> str:
    return "gelu_tanh" if config["model_type"].startswith("gemma") else "silu"


def linears(model: str) -> list[tuple[str, int, int]]:
    """The linears of one decoder layer: (name, out_features, in_features). phi3 fuses q, k, v, and gate, up."""
    config = MODELS[model]
    heads, kv_heads, head_dim = _heads(config)
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    attention = heads * head_dim
    if config["model_type"] == "phi3":
        return [
            ("qkv_proj", attention + 2 * kv_heads * head_dim, hidden),
            ("o_proj", hidden, attention),
            ("gate_up_proj", 2 * intermediate, hidden),
            ("down_proj", hidden, intermediate),
        ]
    plain = {"starcoder2": ("c_fc", "c_proj"), "phi": ("fc1", "fc2"), "nemotron": ("up_proj", "down_proj")}
    if config["model_type"] in plain:  # no gate
        up, down = plain[config["model_type"]]
        mlp = [(up, intermediate, hidden), (down, hidden, intermediate)]
    else:
        mlp = [("gate_proj", intermediate, hidden), ("up_proj", intermediate, hidden)]
        mlp.append(("down_proj", hidden, intermediate))
    return [
        ("q_proj", attention, hidden),
        ("k_proj", kv_heads * head_dim, hidden),
        ("v_proj", kv_heads * head_dim, hidden),
        ("dense" if config["model_type"] == "phi" else "o_proj", hidden, attention),
        *mlp,
    ]


def _of_model(model: str, batch: int, seq: int, tags: frozenset[str]) -> Iterator[Shape]:
    """Every op's sizes in ``model`` at one working point. Linears of equal sizes appear once."""
    config = MODELS[model]
    heads, kv_heads, head_dim = _heads(config)
    hidden, family = config["hidden_size"], config["model_type"]
    tokens = dict(batch=batch, seq=seq)

    def shape(op: str, **dims: Any) -> Shape:
        return Shape(op, model, dims, tags)

    if family in LAYER_NORMS:
        yield shape("layer_norm", **tokens, hidden=hidden, eps=config[LAYER_NORMS[family]])
    else:
        offset = 1.0 if family.startswith("gemma") else 0.0  # Gemma multiplies by 1 + weight
        for op in ("rms_norm", "add_rms_norm"):
            yield shape(op, **tokens, hidden=hidden, eps=config["rms_norm_eps"], offset=offset)
        if family in HEAD_NORMS:  # of each head of q, and of k: rows of head_dim
            for count in dict.fromkeys((heads, kv_heads)):
                rows = dict(batch=batch, seq=seq * count, hidden=head_dim)
                yield shape("rms_norm", **rows, eps=config["rms_norm_eps"], offset=offset)
    if {name for name, *_ in linears(model)} & {"gate_proj", "gate_up_proj"}:
        yield shape("glu", **tokens, intermediate=config["intermediate_size"], activation=_activation(config))
    if {"gate_proj", "up_proj"} <= {name for name, *_ in linears(model)}:
        of_mlp = dict(intermediate=config["intermediate_size"], activation=_activation(config))
        yield shape("lora_glu", **tokens, **of_mlp, rank=16)
        yield shape("lora_stack", **tokens, hidden=hidden, intermediate=config["intermediate_size"], rank=16)
        yield shape("lora_mlp", **tokens, hidden=hidden, **of_mlp, rank=16)
    if family == "nemotron":
        yield shape("squared_relu", **tokens, intermediate=config["intermediate_size"])
    fraction = config.get("rope_parameters", {}).get("partial_rotary_factor", 1.0)
    per_head = dict(**tokens, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    yield shape("rotary", **per_head, rotary_dim=int(head_dim * fraction))
    if family in HEAD_NORMS:
        more = dict(eps=config["rms_norm_eps"], offset=offset)
        yield shape("norm_rotary", **per_head, rotary_dim=int(head_dim * fraction), **more)
    window, softcap = config.get("sliding_window"), config.get("attn_logit_softcapping")
    # transformers' SDPA leaves the cap out; whoever calls the op with it has it measured.
    for cap in dict.fromkeys((softcap, None)):
        for length in (window, None) if family in MIXED_WINDOWS else (window,):
            yield shape("attention", **per_head, window=length, softcap=cap)
    seen = set()
    for _, out_features, in_features in linears(model):
        if (out_features, in_features) not in seen:
            seen.add((out_features, in_features))
            yield shape("lora_linear", **tokens, in_features=in_features, out_features=out_features, rank=16)
    attention = ("q_proj", "k_proj", "v_proj")  # what reads one input, where not fused; in phi an MLP layer too
    for group in (attention, (*attention, "fc1"), ("gate_proj", "up_proj")):
        widths = tuple(out_features for name, out_features, _ in linears(model) if name in group)
        if len(widths) == len(group):
            yield shape("lora_linears", **tokens, in_features=hidden, out_features=widths, rank=16)
    softcap = config.get("final_logit_softcapping")
    yield shape("linear_cross_entropy", **tokens, hidden=hidden, vocab=config["vocab_size"], softcap=softcap)


def _attention_kinds() -> Iterator[Shape]:
    """Attention of every kind of mask, at Llama 3.1 8B's heads: short, long, packed, in windows and chunks, capped,
    with sinks, padded.
    """
    heads, kv_heads, head_dim = _heads(MODELS[_KINDS_OF])
    sizes = dict(heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    for batch, seq, more in (
        (4, 2048, {}),
        (2, 4096, {}),
        (1, 32768, {}),
        (1, 8192, {}),
        (1, 8192, {"hides": "documents"}),
        (1, 32768, {"window": 1024}),
        (1, 32768, {"hides": "documents", "window": 1024}),
        (1, 8192, {"softcap": 50.0}),
        (1, 8192, {"sinks": True}),
        (1, 32768, {"hides": "", "chunk": 8192}),
        (15, 768, {"hides": "padding"}),  # the documents of (1, 8192), a sequence each
    ):
        every = dict(batch=batch, seq=seq, **sizes, window=None, softcap=None)
        yield Shape("attention", _KINDS_OF, {**every, **more}, frozenset({"attention"}))


def _losses() -> Iterator[Shape]:
    """The loss under a frozen and under a trained head, with every label and with half of them: at Llama 3.1 8B's head,
    and at the one that TRL's own figures are of.
    """
    llama = dict(batch=4, seq=2048, hidden=4096, vocab=128256, softcap=None)
    trl = dict(batch=8, seq=2048, hidden=2048, vocab=248320, softcap=None)
    for model, sizes, more in (
        (_KINDS_OF, llama, {}),
        (_KINDS_OF, llama, {"trained": True}),
        (_KINDS_OF, llama, {"ignored": 0.5}),
        ("trl-6858", trl, {}),
        ("trl-6858", trl, {"trained": True}),
    ):
        yield Shape("linear_cross_entropy", model, {**sizes, **more}, frozenset({"loss"}))


def _slices() -> Iterator[Shape]:
    """An MLP's ops as ``lora_mlp`` calls them under a memory plan, a slice of tokens at a time: of Llama 3.1 8B's 8,192
    a half, and what longer contexts and smaller budgets have.
    """
    for rows in (4096, 3072, 2048):
        for s in _of_model(_KINDS_OF, 1, rows, frozenset({"slices"})):
            if s.op in ("glu", "lora_glu", "lora_stack"):
                yield s


def _nf4(model: str, tags: frozenset[str]) -> Iterator[Shape]:
    """Weights to dequantise: independent of batch and seq."""
    for out_features, in_features in dict.fromkeys((o, i) for _, o, i in linears(model)):
        yield Shape("nf4", model, dict(out_features=out_features, in_features=in_features), tags)


def _tests() -> Iterator[Shape]:
    """Small and odd: the interpreter runs these."""

    def shape(op: str, **dims: Any) -> Shape:
        return Shape(op, "odd", dims, frozenset({"test"}))

    for batch, seq, hidden in ((1, 1, 8), (2, 3, 48), (1, 7, 129), (3, 5, 256)):
        for offset in (0.0, 1.0):
            for op in ("rms_norm", "add_rms_norm"):
                yield shape(op, batch=batch, seq=seq, hidden=hidden, eps=1e-6, offset=offset)
        yield shape("layer_norm", batch=batch, seq=seq, hidden=hidden, eps=1e-5)
    for batch, seq, intermediate in ((1, 1, 16), (2, 3, 129), (1, 9, 352)):
        for activation in ("silu", "gelu", "gelu_tanh"):
            yield shape("glu", batch=batch, seq=seq, intermediate=intermediate, activation=activation)
            yield shape("lora_glu", batch=batch, seq=seq, intermediate=intermediate, activation=activation, rank=5)
        yield shape("lora_stack", batch=batch, seq=seq, hidden=64, intermediate=intermediate, rank=5)
        yield shape("lora_mlp", batch=batch, seq=seq, hidden=64, intermediate=64, activation="silu", rank=5)
        yield shape("squared_relu", batch=batch, seq=seq, intermediate=intermediate)
    for batch, seq, heads, kv_heads, head_dim, rotary_dim in (
        (1, 1, 1, 1, 16, 16),
        (2, 5, 4, 2, 32, 32),
        (1, 7, 3, 1, 40, 30),
        (2, 3, 6, 2, 80, 32),
    ):
        sizes = dict(batch=batch, seq=seq, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
        yield shape("rotary", **sizes, rotary_dim=rotary_dim)
        yield shape("norm_rotary", **sizes, rotary_dim=rotary_dim, eps=1e-6, offset=float(seq % 2))
    for batch, seq, in_features, out_features, rank in (
        (1, 1, 16, 16, 1),
        (2, 5, 48, 80, 8),
        (1, 7, 64, 24, 16),
        (3, 3, 80, 48, 5),
    ):
        sizes = dict(batch=batch, seq=seq, in_features=in_features, out_features=out_features)
        yield shape("lora_linear", **sizes, rank=rank)
        yield shape("lora_linears", **{**sizes, "out_features": (out_features, 16)}, rank=rank)
    for out_features, in_features in ((16, 64), (48, 80), (80, 64), (7, 192)):
        yield shape("nf4", out_features=out_features, in_features=in_features)
    for batch, seq, hidden, vocab, softcap in (
        (1, 2, 16, 32, None),
        (2, 5, 48, 97, None),
        (1, 7, 64, 300, 30.0),
        (2, 9, 32, 131, None),
    ):
        yield shape("linear_cross_entropy", batch=batch, seq=seq, hidden=hidden, vocab=vocab, softcap=softcap)
    for batch, seq, heads, kv_heads, head_dim, window, softcap in (
        (1, 1, 1, 1, 16, None, None),
        (2, 17, 4, 2, 16, None, None),
        (1, 33, 4, 1, 32, 8, None),
        (2, 19, 2, 2, 32, None, 50.0),
    ):
        sizes = dict(batch=batch, seq=seq, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
        yield shape("attention", **sizes, window=window, softcap=softcap)


#: Measured by default: one model for each way an op is used (head norms, offset norms, soft caps, fused linears, ...).
PRIMARY = (
    "llama-3.1-8b",
    "llama-3.2-1b",
    "qwen3-8b",
    "gemma-2-9b",
    "mistral-7b",
    "phi-4",
    "starcoder2-7b",
    "minitron-8b",
)
_SMALL = ("tiny", "llama-1b")
#: Whose heads every kind of attention's mask, and of the loss, is measured with.
_KINDS_OF = "llama-3.1-8b"
#: Measured with 32k tokens in one sequence too.
LONG = ("llama-3.1-8b", "minitron-8b", "minitron-4b", "nemotron-4-15b")
#: ``real``: so many sizes of each op, those of the first model all, of the others the largest that is new, in order. An
#: op of which the models have fewer is measured in long sequences too.
REAL_SIZES = 6
REAL = (
    "llama-3.1-8b",
    "llama-3.2-1b",
    "gemma-2-9b",
    "qwen3-8b",
    "phi-4",
    "gemma-3-1b",
    "mistral-7b",
    "qwen2.5-7b",
    "phi-4-mini",
    "llama-3.3-70b",
    "starcoder2-7b",
    "starcoder2-3b",
    "starcoder2-15b",
    "phi-2",
    "stablelm-2-1.6b",
    "minitron-8b",
    "minitron-4b",
    "nemotron-4-15b",
    "qwen3-0.6b",
    "qwen3-14b",
    "gemma-3-4b",
    "gemma-3-12b",
)


def _sizes(shape: Shape) -> tuple[Any, ...]:
    """What makes a shape another one for a kernel: its sizes, not its eps."""
    return (shape.op, *(value for name, value in shape.dims.items() if name != "eps"))


def _elements(shape: Shape) -> int:
    """How large a shape is, roughly: the product of its sizes."""
    sizes = (sum(v) if isinstance(v, tuple) else v for v in shape.dims.values())
    return math.prod(v for v in sizes if isinstance(v, int) and v > 0)


def _real(found: list[Shape]) -> set[tuple[str, str]]:
    """(op, name) of the shapes to tag ``real``."""
    chosen: dict[str, dict[tuple[Any, ...], str]] = {}
    ordered = [(model, long) for long in (False, True) for model in REAL]
    for i, (model, long) in enumerate(ordered):
        of_model = [s for s in found if s.model == model and ("long" in s.tags) == long]
        for op in dict.fromkeys(s.op for s in found):
            taken = chosen.setdefault(op, {})
            new = [s for s in of_model if s.op == op and _sizes(s) not in taken]
            new.sort(key=_elements, reverse=True)
            for s in new if i == 0 else new[:1]:
                if len(taken) < REAL_SIZES:
                    taken[_sizes(s)] = str(s)
    return {(op, name) for op, names in chosen.items() for name in names.values()}


def _all() -> Iterator[Shape]:
    found: list[Shape] = []
    for model in MODELS:
        if model in _SMALL:
            continue
        tags = frozenset({"primary"}) if model in PRIMARY else frozenset()
        found += [*_of_model(model, 4, 2048, tags), *_nf4(model, tags)]
    found += [s for model in LONG for s in _of_model(model, 1, 32768, frozenset({"long"}))]
    real = _real(found)
    kinds = {str(s): s for s in (*_attention_kinds(), *_losses(), *_slices())}
    for s in found:
        more = ({"real"} if (s.op, str(s)) in real else set()) | set(kinds.pop(str(s), s).tags)
        yield replace(s, tags=s.tags | more)
    yield from kinds.values()
    yield from _tests()


SHAPES: tuple[Shape, ...] = tuple(_all())


def shapes(op: str | None = None, *, model: str | None = None, tag: str | None = None) -> list[Shape]:
    """The shapes of ``op``, of ``model``, with ``tag``; None means any.

    Raises ``KeyError`` for an op or a model that has no shapes at all, naming those that have.
    """
    ops, models = {s.op for s in SHAPES}, {s.model for s in SHAPES}
    if op is not None and op not in ops:
        raise KeyError(f"no shapes for op {op!r}; there are shapes for {', '.join(sorted(ops))}")
    if model is not None and model not in models:
        raise KeyError(f"no shapes for model {model!r}; there are shapes for {', '.join(sorted(models))}")
    return [s for s in SHAPES if op in (None, s.op) and model in (None, s.model) and (tag is None or tag in s.tags)]
