"""With ``attn_implementation="flex_attention"`` transformers asks whether a padding mask hides anything, and hands the
making of its block mask to a compilation of its own. Dynamo can do neither, so that the graph breaks there, and blocks
come into the model's graph from outside, where nobody can tell what they hide.

While fastft traces, padding is part of the mask without being asked for (where it hides nothing, it changes nothing),
and the blocks are made in the model's graph.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch

from fastft.bridges._bridge import StayOut, attribute
from fastft.bridges._tracing import tracing

#: What the stock function is made of.
_PARTS = (
    "fast_all", "prepare_padding_mask", "and_masks", "padding_mask_function", "add_offsets_to_mask_function",
    "create_block_mask",
)  # fmt: skip


def apply(module: ModuleType) -> None:
    """Put a function before ``flex_attention_mask`` in ``transformers.masking_utils``."""
    stock: Any = attribute(module, "flex_attention_mask")
    functions: Any = attribute(module, "ALL_MASK_ATTENTION_FUNCTIONS")
    names = getattr(getattr(stock, "__code__", None), "co_names", ())
    missing = [name for name in _PARTS if name not in names or not hasattr(module, name)]
    if missing:
        raise StayOut(f"flex_attention_mask does not call {missing[0]} any more")
    if functions["flex_attention"] is not stock:
        raise StayOut("somebody else's function makes the masks of flex_attention")

    @functools.wraps(stock)
    def flex_attention_mask(*args: Any, **kwargs: Any) -> Any:
        if not tracing():
            return stock(*args, **kwargs)
        return traced(module, *args, **kwargs)

    module.flex_attention_mask = flex_attention_mask  # type: ignore[attr-defined]
    functions.register("flex_attention", flex_attention_mask)


def traced(
    module: Any,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Any:
    """The block mask, by the parts of ``module`` that the stock function uses. Arguments as its own."""
    shown = module.causal_mask_function if mask_function is None else mask_function
    if attention_mask is not None:
        padding = module.prepare_padding_mask(attention_mask, kv_length, kv_offset)
        shown = module.and_masks(shown, module.padding_mask_function(padding))
    shown = module.add_offsets_to_mask_function(shown, q_offset, kv_offset)
    return module.create_block_mask(shown, batch_size, None, q_length, kv_length, device)
