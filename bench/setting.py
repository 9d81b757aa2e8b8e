"""One run's setting, and the batches that it trains on."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from bench.implementations import IMPLEMENTATIONS, SFT_BACKENDS
from bench.shapes import MODELS

#: How ids are drawn.
TOKENS = ("uniform", "zipf")
#: Forms of the data.
DATA = ("full", "packed", "padded")
#: How long rows are from step to step.
LENGTHS = ("fixed", "random")
#: Name → what transformers' ``optim`` calls it.
OPTIMIZERS = {"adamw": "adamw_torch_fused", "adamw8bit": "adamw_bnb_8bit"}
#: The tokenizer's <pad>, and the label of what is no target.
PAD, IGNORED = 2, -100


@dataclass(frozen=True)
class Setup:
    """One run's setting. ``batch`` and ``seq`` in sequences and tokens, ``document`` in tokens, its half more or less;
    ``options`` go to ``torch.compile``.
    """

    impl: str
    model: str = "llama-3.1-8b"
    quant: str = "nf4"
    train: str = "lora"
    rank: int = 16
    batch: int = 4
    seq: int = 2048
    data: str = "full"
    document: int = 512
    tokens: str = "uniform"
    lengths: str = "fixed"
    optimizer: str = "adamw"
    checkpointing: bool = True
    steps: int = 5
    warmup: int = 3
    seed: int = 0
    lr: float = 1e-4
    trainer: str = "loop"
    options: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Raise ``ValueError`` for what cannot be run, naming what was asked and what there is."""
        one_of("--impl", self.impl, IMPLEMENTATIONS)
        one_of("--model", self.model, MODELS)
        one_of("--quant", self.quant, ("nf4", "bf16"))
        one_of("--train", self.train, ("lora", "full"))
        one_of("--data", self.data, DATA)
        one_of("--tokens", self.tokens, TOKENS)
        one_of("--lengths", self.lengths, LENGTHS)
        one_of("--optimizer", self.optimizer, OPTIMIZERS)
        one_of("--trainer", self.trainer, ("loop", "sft"))
        if self.trainer == "sft":
            one_of("--impl with --trainer sft", self.impl, SFT_BACKENDS)
            if self.data != "full":
                raise ValueError(f"--data is {self.data!r}; with --trainer sft it is full")
            if self.options:
                raise ValueError("--options go to torch.compile, to which SFTConfig passes none")
        if self.lengths == "random" and (self.data != "full" or self.trainer == "sft"):
            raise ValueError("--lengths random is of --data full in the --trainer loop alone")
        if self.quant == "nf4" and self.train == "full":
            raise ValueError(
                "--quant nf4 with --train full: NF4 weights have no gradient; use --train lora or --quant bf16"
            )
        if not self.lr > 0:
            raise ValueError(f"--lr is {self.lr}; it is above 0")
        for name in ("rank", "batch", "seq", "document", "steps", "warmup"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"--{name} is {getattr(self, name)}; it is 1 or more (the first warm-up step compiles)"
                )
        if self.options and IMPLEMENTATIONS[self.impl].compile is None:
            raise ValueError(f"--options go to torch.compile, which --impl {self.impl} does not call")


def one_of(name: str, got: str, allowed: Any) -> None:
    if got not in allowed:
        raise ValueError(f"{name} is {got!r}; it is one of {', '.join(allowed)}")


# -- data --------------------------------------------------------------------------------------------------------------


def documents(setup: Setup) -> list[list[int]]:
    """Each row's documents, lengths in tokens. They come in pairs of ``document`` + x and ``document`` - x, x drawn by
    the seed from 0 to ``document`` / 2, each as likely: with 512 every length from 256 to 768 is as likely, and as many
    as fit fill the row to its end. Where the rest has no room for a pair, it is the last document.
    """
    draw = random.Random(setup.seed)
    rows = []
    for _ in range(setup.batch):
        row: list[int] = []
        while (left := setup.seq - sum(row)) >= 2 * setup.document:
            x = draw.randint(0, setup.document // 2)
            row += [setup.document + x, setup.document - x]
        rows.append([*row, left] if left else row)
    return rows


def batches(setup: Setup, device: Any) -> Iterator[dict[str, Any]]:
    """What the model gets in one step after another, on ``device``: ``full`` and ``packed`` are ``[batch, seq]``,
    ``padded`` is ``[documents, longest]``, padded on the right. Where lengths are random, ``[batch, length]``.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    generator = torch.Generator().manual_seed(setup.seed + 1)
    order = random.Random(setup.seed + 1)
    vocabulary = MODELS[setup.model]["vocab_size"]
    rows = documents(setup)
    pack = IMPLEMENTATIONS[setup.impl].pack
    while True:
        # Ids 0 to 3 are the tokenizer's special tokens.
        if setup.tokens == "zipf":
            rare = torch.arange(1, vocabulary - 3, dtype=torch.float64)
            drawn = torch.multinomial(1 / rare, setup.batch * setup.seq, replacement=True, generator=generator)
            x = 4 + drawn.view(setup.batch, setup.seq)
        else:
            x = torch.randint(4, vocabulary, (setup.batch, setup.seq), generator=generator)
        if setup.data == "full":
            if setup.lengths == "random":
                x = x[:, : order.randint(max(setup.seq // 4, 1), setup.seq)].contiguous()
            x = x.to(device)
            yield {"input_ids": x, "labels": x}
            continue
        for row in rows:
            order.shuffle(row)
        lengths = [n for row in rows for n in row]
        if setup.data == "padded":
            apart = x.flatten().split(lengths)
            batch = {
                "input_ids": pad_sequence(apart, batch_first=True, padding_value=PAD),
                "attention_mask": pad_sequence([torch.ones_like(d) for d in apart], batch_first=True),
                "labels": pad_sequence(apart, batch_first=True, padding_value=IGNORED),
            }
        else:
            positions = torch.cat([torch.arange(n) for n in lengths]).view_as(x)
            batch = {"input_ids": x, "position_ids": positions, "labels": x.masked_fill(positions == 0, IGNORED)}
        batch = {name: value.to(device) for name, value in batch.items()}
        yield pack(batch, lengths) if pack and setup.data == "packed" else batch


def described(setup: Setup, batch: dict[str, Any]) -> dict[str, Any]:
    """What a result says of its first batch: form, shape, tokens without padding, targets of the loss, documents."""
    real = batch.get("attention_mask", batch["input_ids"].new_ones(batch["input_ids"].shape))
    return {
        "form": setup.data,
        "shape": list(batch["input_ids"].shape),
        "real_tokens": int(real.sum()),
        "targets": int((batch["labels"][:, 1:] != IGNORED).sum()),
        "documents": setup.batch if setup.data == "full" else sum(map(len, documents(setup))),
    }
