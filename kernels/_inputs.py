"""Calls of an op at a model's sizes, as its file makes them: what is timed, tuned, and verified on.

An op's ``sizes`` gives the sizes with which training a model calls it, and its ``inputs`` makes the arguments of a call
of such sizes. The names of sizes are those of ``bench/shapes.py``. What ``inputs`` has a default for is no size but the
form of a call (how a weight is stored, what a mask hides): benchmarks measure the default, tuning each that ``sizes``
has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Inputs:
    """Arguments of one call, and those of its tensors whose gradients are wanted (weights are frozen, as for LoRA).
    ``asked``, broadcastable to the result: False where no gradient comes back in training, as to padding.
    """

    args: Sequence[Any]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    wanted: Sequence[torch.Tensor] = ()
    asked: torch.Tensor | None = None

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

        kwargs, wanted = {k: one(v) for k, v in self.kwargs.items()}, [one(x) for x in self.wanted]
        return Inputs(one(list(self.args)), kwargs, wanted, self.asked)

    def copy(self) -> Inputs:
        """The same values and strides at other addresses."""
        return self.mapped(lambda x: x.clone(memory_format=torch.preserve_format))

    def in_dtype(self, old: torch.dtype, new: torch.dtype) -> Inputs:
        """With the tensors of one dtype in another."""
        return self.mapped(lambda x: x.to(new) if x.dtype == old else x.clone())

    def tensors(self) -> list[torch.Tensor]:
        """All tensors, each once."""
        found: dict[int, torch.Tensor] = {}

        def note(x: torch.Tensor) -> torch.Tensor:
            found[x.data_ptr()] = x
            return x

        self.mapped(note)
        return list(found.values())


class New:
    """Makes the tensors of a call: random, in one dtype, on one device."""

    def __init__(self, dtype: torch.dtype, device: str | torch.device, seed: int = 0) -> None:
        self.dtype, self.device = dtype, torch.device(device)
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def __call__(self, *shape: int, grad: bool = False, scale: float = 1.0) -> torch.Tensor:
        made = torch.randn(shape, device=self.device, generator=self.generator) * scale
        return made.to(self.dtype).requires_grad_(grad)

    def integers(self, high: int, *shape: int) -> torch.Tensor:
        """From 0 to ``high`` − 1."""
        return torch.randint(0, high, shape, device=self.device, generator=self.generator)

    def uniform(self, *shape: int) -> torch.Tensor:
        """fp32, from 0 to 1."""
        return torch.rand(shape, device=self.device, generator=self.generator)

    def heads(self, batch: int, seq: int, head_dim: int, *counts: int) -> list[torch.Tensor]:
        """[batch, heads, seq, head_dim] for each count, as attention gets them: views of the projections' results."""
        return [self(batch, seq, n, head_dim).transpose(1, 2).requires_grad_() for n in counts]


#: Classes whose MLP has no gate, and its activation where the config does not name it.
_UNGATED = {"starcoder2": "gelu_tanh", "phi": "gelu_tanh", "nemotron": "relu2", "arcee": "relu2"}
#: Classes of which only some layers see a window, where the config does not say which.
_MIXED = {"gemma2", "gemma3_text", "cohere2", "qwen2", "qwen3"}
#: The field of a config that holds its norms' ε.
_EPS = ("rms_norm_eps", "norm_epsilon", "layer_norm_eps", "norm_eps")
_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "swish": "silu"}


@dataclass(frozen=True)
class Model:
    """What decides the sizes of the ops' calls in training: batch and seq, and what a transformers config says."""

    family: str
    batch: int
    seq: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    vocab: int
    activation: str
    rms_norm: bool
    eps: float
    windows: tuple[int, ...]
    logit_softcap: float | None

    @staticmethod
    def of(config: Mapping[str, Any], batch: int, seq: int) -> Model:
        """From the fields of a transformers config."""
        family, hidden, heads = str(config.get("model_type", "")), config["hidden_size"], config["num_attention_heads"]
        head_dim = config.get("head_dim") or hidden // heads
        rope = config.get("rope_parameters") or {}
        fraction = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
        usual = "gelu_tanh" if family.startswith("gemma") else _UNGATED.get(family, "silu")
        activation = config.get("hidden_activation") or config.get("hidden_act") or usual
        return Model(
            family=family,
            batch=batch,
            seq=seq,
            hidden=hidden,
            intermediate=config.get("intermediate_size") or 0,
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            rotary_dim=int(head_dim * fraction) // 2 * 2,
            vocab=config["vocab_size"],
            activation=_ACTIVATIONS.get(activation, activation),
            rms_norm="rms_norm_eps" in config,
            eps=next((config[name] for name in _EPS if name in config), 1e-6),
            windows=_windows(config),
            logit_softcap=config.get("final_logit_softcapping"),
        )

    @property
    def tokens(self) -> dict[str, Any]:
        """``batch`` and ``seq``."""
        return {"batch": self.batch, "seq": self.seq}

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate."""
        return self.intermediate > 0 and self.family not in _UNGATED

    @property
    def head_norms(self) -> bool:
        """Whether each head of q and of k has a norm."""
        return self.family.startswith(("qwen3", "gemma3"))

    @property
    def fused(self) -> bool:
        """Whether q, k and v come from one projection, and gate and up too."""
        return self.family == "phi3"

    @property
    def parallel(self) -> bool:
        """Whether the MLP reads what attention reads."""
        return self.family == "phi"

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(out_features, in_features) of a decoder layer's linear layers, each size once."""
        q, kv, hidden, wide = self.heads * self.head_dim, self.kv_heads * self.head_dim, self.hidden, self.intermediate
        into = [q + 2 * kv, 2 * wide] if self.fused else [q, kv, wide]
        found = [*((n, hidden) for n in into), (hidden, q), (hidden, wide)]
        return [(n, k) for n, k in dict.fromkeys(found) if n and k]


def _windows(config: Mapping[str, Any]) -> tuple[int, ...]:
    """How many tokens a query sees, of each kind of layer; 0: all before it."""
    window = config.get("sliding_window") or 0
    if not window or config.get("use_sliding_window") is False:  # Qwen's configs say how long one would be
        return (0,)
    if kinds := config.get("layer_types"):
        return tuple(dict.fromkeys(window if "sliding" in kind else 0 for kind in kinds))
    return (window, 0) if config.get("model_type") in _MIXED else (window,)


__all__ = ["Inputs", "Model", "New"]
