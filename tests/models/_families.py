"""Tiny models of the families that the tests cover, built from configs, and how many sites each has.

Two layers each, hidden size 64. Nothing is downloaded. A family's ``sites`` are what its module counts say there is to
replace in one training step with labels: the tests demand exactly these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers

LAYERS = 2
VOCAB = 128
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "use_cache": False,
}


@dataclass(frozen=True)
class Family:
    """``norms``: RMSNorms by module count; ``linears``: in a layer, ``joint``: groups of them that read one input,
    ``sums``: of them, without adapters, and the residual stream (Gemma has a norm in between); ``mlps``: of all layers;
    ``head_norms``: whether q and k have norms, which go into one launch with rotary. A layer has one rotary and one
    attention site.
    """

    name: str
    build: Callable[..., transformers.PreTrainedModel]
    norms: int
    linears: int = 7
    joint: int = 2
    sums: int = 2
    mlps: int = LAYERS
    head_norms: bool = False

    def sites(self, lora: float | None = None, trained_input: bool = False) -> dict[str, int]:
        """Replaced sites that a training step must have, by pattern. ``lora``: its dropout, None without LoRA. With
        dropout each adapter has an input of its own, and no layers are joined. ``trained_input``: the embeddings
        require a gradient with LoRA too, as PEFT makes them do under checkpointing.
        """
        wanted = {
            "linear_cross_entropy": 1,
            "attention": LAYERS,
            "rotary": LAYERS,
            "rms_norm": self.norms,
            **({"mlp": self.mlps} if self.mlps else {}),
            **({"norm_rotary": LAYERS} if self.head_norms else {}),
            # Two norms of a layer read the stream that goes around them; the last one's stream ends there.
            "residual_norm": 2 * LAYERS - (lora is not None and not trained_input),
        }
        if lora is None:
            return wanted | ({"residual": self.sums * LAYERS} if self.sums else {})
        wanted |= {"lora": self.linears * LAYERS}
        # q, k and v are one group, gate and up, which the activation takes up, the other.
        groups = {"joint_linears": self.joint * LAYERS, "lora_glu": (self.joint - 1) * LAYERS}
        return wanted | (groups if lora == 0 and self.joint else {})


def _llama3() -> transformers.PreTrainedModel:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    config = transformers.LlamaConfig(**_SIZES, rope_parameters={**rope, "original_max_position_embeddings": 64})
    return transformers.LlamaForCausalLM(config)


def _mistral() -> transformers.PreTrainedModel:
    return transformers.MistralForCausalLM(transformers.MistralConfig(**_SIZES, head_dim=16, sliding_window=16))


def _qwen3() -> transformers.PreTrainedModel:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_SIZES, head_dim=16))


def _gemma2() -> transformers.PreTrainedModel:
    config = transformers.Gemma2Config(**_SIZES, head_dim=16, query_pre_attn_scalar=16, sliding_window=16)
    return transformers.Gemma2ForCausalLM(config)


def _gemma3() -> transformers.PreTrainedModel:
    config = transformers.Gemma3TextConfig(
        **_SIZES,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
    )
    return transformers.Gemma3ForCausalLM(config)


def _phi4() -> transformers.PreTrainedModel:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    return transformers.Phi3ForCausalLM(
        transformers.Phi3Config(**_SIZES, rope_parameters=rope, partial_rotary_factor=0.5)
    )


def _gpt_oss() -> transformers.PreTrainedModel:
    """Attention with sinks, which transformers writes out, in windows and whole. Experts stay as they are; all of them
    are asked, since in bf16 it would be chance which ones.
    """
    config = transformers.GptOssConfig(
        **_SIZES, head_dim=16, sliding_window=16, num_local_experts=2, num_experts_per_tok=2
    )
    return transformers.GptOssForCausalLM(config)


def _gemma2_eager() -> transformers.PreTrainedModel:
    """With the scores' cap, which transformers' SDPA leaves out."""
    config = transformers.Gemma2Config(
        **_SIZES, head_dim=16, query_pre_attn_scalar=16, sliding_window=16, attn_implementation="eager"
    )
    return transformers.Gemma2ForCausalLM(config)


def _deepseek3() -> transformers.PreTrainedModel:
    """Latent attention: the heads of v are narrower than those of q and k."""
    config = transformers.DeepseekV3Config(
        **{**_SIZES, "num_key_value_heads": 4},
        q_lora_rank=32,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
    )
    return transformers.DeepseekV3ForCausalLM(config)


FAMILIES = {
    f.name: f
    for f in (
        Family("llama3", _llama3, norms=2 * LAYERS + 1),
        Family("mistral", _mistral, norms=2 * LAYERS + 1),
        Family("qwen3", _qwen3, norms=4 * LAYERS + 1, head_norms=True),
        Family("gemma2", _gemma2, norms=4 * LAYERS + 1, sums=0),
        Family("gemma3", _gemma3, norms=6 * LAYERS + 1, sums=0, head_norms=True),
        Family("phi4", _phi4, norms=2 * LAYERS + 1, linears=4, joint=0),
    )
}


def _with_dropout() -> transformers.PreTrainedModel:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SIZES, attention_dropout=0.2))


#: Attention that those do not have.
ATTENTIONS = {
    f.name: f
    for f in (
        Family("gpt-oss", _gpt_oss, norms=2 * LAYERS + 1, sums=0, mlps=0),
        Family("gemma2, eager", _gemma2_eager, norms=4 * LAYERS + 1, sums=0),
        # The second layer has shared experts, and those that are chosen, which stay as they are.
        Family("deepseek3", _deepseek3, norms=4 * LAYERS + 1, mlps=LAYERS + 1),
    )
}
DROPOUT = Family("llama, attention dropout", _with_dropout, norms=2 * LAYERS + 1)


def build(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    lora: float | None = None,
    checkpointing: bool = False,
    seed: int = 0,
) -> torch.nn.Module:
    """A family's model in train mode. ``lora``: LoRA on all linears with this dropout (None: full fine-tuning)."""
    torch.manual_seed(seed)
    model = {**FAMILIES, **ATTENTIONS, DROPOUT.name: DROPOUT}[name].build()
    # Norm weights of a fresh model are all one (or zero): a dropped weight would not be noticed.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.to(dtype)
    if lora is not None:
        import peft

        config = peft.LoraConfig(
            r=4, lora_alpha=8, lora_dropout=lora, target_modules="all-linear", init_lora_weights=False
        )
        model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(0.1 * torch.randn_like(parameter))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def batch(kind: str = "plain", rows: int = 2, length: int = 40, seed: int = 1) -> dict[str, torch.Tensor]:
    """Ids and labels: ``plain``; ``padding`` (right, ignored in the loss); ``packing`` (``position_ids``)."""
    generator = torch.Generator().manual_seed(seed)
    rows = 1 if kind == "packing" else rows
    ids = torch.randint(1, VOCAB, (rows, length), generator=generator)
    labels = ids.clone()
    labels[:, :3] = -100
    found = {"input_ids": ids, "labels": labels}
    if kind == "padding":
        mask = torch.ones_like(ids)
        mask[-1, length - 11 :] = 0
        ids[mask == 0] = 0
        labels[mask == 0] = -100
        found["attention_mask"] = mask
    if kind == "packing":
        lengths = [13, 1, length - 14]
        found["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]
        starts = torch.tensor(lengths).cumsum(0)[:-1]
        labels[0, starts] = -100
    return found
