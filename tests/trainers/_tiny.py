"""A tiny Llama, a tokenizer and a dataset made in memory, and one run of a trainer with what it did."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

LAYERS, HIDDEN, VOCAB, SEQ, STEPS = 2, 64, 128, 16, 2
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama(vocab_size: int = VOCAB, layers: int = LAYERS) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocab_size,
        max_position_embeddings=64,
        pad_token_id=1,
        eos_token_id=2,
        bos_token_id=None,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def tokenizer() -> PreTrainedTokenizerFast:
    words = models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), unk_token="w0", pad_token="w1", eos_token="w2", model_max_length=64
    )


def dataset(labels: bool = False) -> Dataset:
    """Sequences of two lengths, so that batches are padded; the first tokens of some carry no label."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, VOCAB, (SEQ - 4 * (i % 2),), generator=generator).tolist() for i in range(8)]
    if not labels:
        return Dataset.from_dict({"input_ids": ids})
    ids = [row[: SEQ - 4] for row in ids]
    return Dataset.from_dict({"input_ids": ids, "labels": [[-100] * 3 + row[3:] for row in ids]})


@dataclass
class Run:
    """Loss of each step, gradients of the first, and what the compiled model was called with."""

    losses: list[float] = field(default_factory=list)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)


class Watch(TrainerCallback):
    def __init__(self, run: Run) -> None:
        self.run = run

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if not self.run.gradients:
            # The names that the parameters have without wrappers, so that every way of compiling can be compared.
            self.run.gradients = {
                n.replace("_orig_mod.", ""): p.grad.detach().clone()
                for n, p in model.named_parameters()
                if p.grad is not None
            }

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            self.run.losses.append(logs["loss"])


def arguments(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "max_grad_norm": 0.0,
        **more,
    }
