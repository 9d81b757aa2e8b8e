"""Training steps of one implementation in one process, and several implementations beside each other.

    python bench/train.py run --impl fastft --model llama-3.1-8b --quant nf4 --out fastft.json
    python bench/train.py compare --impls eager,inductor,unsloth,fastft --model llama-3.1-8b --quant nf4 --out all.json
    python bench/train.py compare --impls unsloth_xformers unsloth:data=padded fastft --data packed --batch 1 --seq 8192
    python bench/train.py compare --trainer sft --impls eager,fastft --model llama-3.2-1b --quant bf16 --out sft.json

What a row means: an architecture of ``bench/shapes.py`` with random weights, read by every implementation from the same
checkpoint folder. NF4 is bitsandbytes' nf4 with double quantisation and bf16 compute. LoRA sits on every linear of the
decoder layers (alpha 16, dropout 0, PEFT's fp32 adapters). A step is
``loss = model(input_ids=x, labels=x).loss; loss.backward(); optimizer.step()`` on fresh random tokens, with fused AdamW
(``--optimizer adamw8bit``: bitsandbytes', its state in 8 bits) on what is trained and the forward under bf16 autocast
(what ``Trainer(bf16=True)`` does). Checkpointing is
``gradient_checkpointing_enable(use_reentrant=False)``; for Unsloth its own, ``use_gradient_checkpointing="unsloth"``.
``--train full`` trains bf16 weights with bf16 optimizer state.

``--data``: ``full`` rows of tokens; or documents of 512 ± 256 tokens (``--document``; :func:`documents`) that fill as
many tokens, which see nothing of each other, in the form ``packed``, rows of them with ``position_ids`` that begin
again at each, as TRL packs them, or ``padded``, a row for each with an ``attention_mask``. A seed gives the same
documents in both forms and the same real tokens in all three: tokens/s are of real tokens, and losses are comparable.
Shapes stay as they are from step to step: a row's documents come in another order, with fresh tokens.
``--lengths random``: full rows of another length in each step, drawn by the seed from a quarter of ``--seq`` to all of
it; tokens/s are those of all measured steps over their time, and a result says how many graphs there were after each.
``--tokens``: ``uniform``, where there is nothing to learn; ``zipf``, where the n-th id is n times as rare as the first,
and a loss falls.

With ``--trainer sft`` TRL's ``SFTTrainer`` does the steps, by its own loop, loss and defaults (clipped gradients among
them), and an implementation is no more than ``SFTConfig(torch_compile_backend=...)``: ``eager`` is stock TRL. A step's
time goes from the trainer's ``on_step_begin`` to its ``on_step_end``.

Only stock code is driven here: nothing of fastft but ``backend="fastft"`` and its report. Times are wall clock between
device synchronisations; the peak is ``torch.cuda.max_memory_allocated`` over the measured steps (None on a CPU).
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import linecache
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Run as a script, Python puts bench/ first on the path, where kernels.py would pass for the Hub's package of that name.
if __name__ == "__main__":
    sys.path[0] = str(ROOT)
from bench.shapes import MODELS, linears  # noqa: E402

if __name__ == "__main__":
    del sys.path[0]

SCHEMA = 1
GIB = 2**30
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "trl",
    "liger-kernel",
    "cut-cross-entropy",
    "quack-kernels",
    "unsloth",
    "xformers",
    "fastft",
)
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
#: Environment of every run: no network, nothing sent anywhere, no unasked threads of the tokenizer.
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "DO_NOT_TRACK": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


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
        _one_of("--impl", self.impl, IMPLEMENTATIONS)
        _one_of("--model", self.model, MODELS)
        _one_of("--quant", self.quant, ("nf4", "bf16"))
        _one_of("--train", self.train, ("lora", "full"))
        _one_of("--data", self.data, DATA)
        _one_of("--tokens", self.tokens, TOKENS)
        _one_of("--lengths", self.lengths, LENGTHS)
        _one_of("--optimizer", self.optimizer, OPTIMIZERS)
        _one_of("--trainer", self.trainer, ("loop", "sft"))
        if self.trainer == "sft":
            _one_of("--impl with --trainer sft", self.impl, SFT_BACKENDS)
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


def _one_of(name: str, got: str, allowed: Any) -> None:
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


def in_one_row(batch: dict[str, Any], lengths: Sequence[int]) -> dict[str, Any]:
    """A packed batch as Unsloth's own trainer makes it: rows behind each other in one, since it knows documents in one
    row alone, and beside them their lengths, on the CPU.
    """
    import torch

    flat = {name: value.view(1, -1) for name, value in batch.items()}
    return {**flat, "packed_seq_lengths": torch.tensor(lengths, dtype=torch.int32)}


def described(setup: Setup, batch: dict[str, Any]) -> dict[str, Any]:
    """What a result says of its (first) data: form, shape, tokens that are not padding, targets of the loss, documents.
    """
    real = batch.get("attention_mask", batch["input_ids"].new_ones(batch["input_ids"].shape))
    return {
        "form": setup.data,
        "shape": list(batch["input_ids"].shape),
        "real_tokens": int(real.sum()),
        "targets": int((batch["labels"][:, 1:] != IGNORED).sum()),
        "documents": setup.batch if setup.data == "full" else sum(map(len, documents(setup))),
    }


# -- models ------------------------------------------------------------------------------------------------------------


def checkpoint_root() -> Path:
    """Where checkpoints go: ``FASTFT_BENCH_CHECKPOINTS``, /dev/shm where 40 GiB are free, or the temporary folder."""
    if asked := os.environ.get("FASTFT_BENCH_CHECKPOINTS"):
        return Path(asked)
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 40 * GIB
    return (memory if roomy else Path(tempfile.gettempdir())) / "fastft-bench"


def write_checkpoint(model: str, folder: Path) -> None:
    """Write a bf16 checkpoint of ``model`` with random weights to ``folder``, with a tokenizer beside it.

    Made on the GPU where there is one. Nobody reads text here, but Unsloth's loader asks for a tokenizer, so a small
    one is trained in memory.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    fields = dict(MODELS[model])
    config = AutoConfig.for_model(
        fields.pop("model_type"), **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None, **fields}
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        built = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<s>", "</s>", "<pad>", "<unk>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([__doc__ or ""], trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )

    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        built.save_pretrained(partial, max_shard_size="2GB")
        wrapped.save_pretrained(partial)
        partial.chmod(0o755)
        os.replace(partial, folder)  # whole or not at all
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def checkpoint(model: str, root: Path) -> Path:
    """The folder of ``model``'s checkpoint under ``root``, written first, by another process, if it is not there."""
    folder = root / model
    if not (folder / "config.json").exists():
        say(f"writing a checkpoint of {model} to {folder}")
        subprocess.run(
            [sys.executable, __file__, "checkpoint", "--model", model, "--checkpoints", str(root)],
            check=True,
            env={**os.environ, **QUIET},
        )
    return folder


def _arguments(setup: Setup) -> dict[str, Any]:
    """What ``from_pretrained`` gets."""
    import torch
    from transformers import BitsAndBytesConfig

    arguments: dict[str, Any] = {"dtype": torch.bfloat16}
    if torch.cuda.is_available():
        arguments["device_map"] = {"": 0}
    if setup.quant == "nf4":
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    return arguments


def _targets(setup: Setup) -> list[str]:
    return [name for name, _, _ in linears(setup.model)]


def _prepare(model: Any, setup: Setup) -> Any:
    """Checkpointing and LoRA on a stock transformers model, in the order in which TRL does them."""
    model.config.use_cache = False
    if setup.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if setup.train == "lora":
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(
            r=setup.rank,
            lora_alpha=16,
            lora_dropout=0.0,
            target_modules=_targets(setup),
            bias="none",
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, lora)
    return model.train()


def load_stock(setup: Setup, folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return _prepare(AutoModelForCausalLM.from_pretrained(folder, **_arguments(setup)), setup)


def load_liger(setup: Setup, folder: Path) -> Any:
    from liger_kernel.transformers import AutoLigerKernelForCausalLM

    return _prepare(AutoLigerKernelForCausalLM.from_pretrained(folder, **_arguments(setup)), setup)


def import_unsloth() -> None:
    import unsloth  # noqa: F401  (it must come before transformers)


def import_unsloth_with_xformers() -> None:
    """For attention by xformers, which knows packed documents. Its wheels are built for CUDA 12; beside a PyTorch for
    CUDA 13 they load once CUDA 12's runtime is in the process.
    """
    name = "libcudart.so.12"
    installed = [path for folder in sys.path if (path := Path(folder, "nvidia/cuda_runtime/lib", name)).exists()]
    try:
        ctypes.CDLL(str(installed[0]) if installed else name, mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise ImportError(f"unsloth_xformers needs {name}: pip install nvidia-cuda-runtime-cu12 ({error})") from error
    import_unsloth()
    from unsloth.utils.attention_dispatch import HAS_XFORMERS

    if not HAS_XFORMERS:
        raise ImportError("unsloth_xformers: Unsloth has found no xformers that works here; its output says why")


def load_unsloth(setup: Setup, folder: Path) -> Any:
    import torch
    from unsloth import FastLanguageModel

    checkpointing = "unsloth" if setup.checkpointing else False
    model, _ = FastLanguageModel.from_pretrained(
        model_name=str(folder),
        max_seq_length=setup.seq,
        dtype=torch.bfloat16,
        load_in_4bit=setup.quant == "nf4",
        full_finetuning=setup.train == "full",
        use_gradient_checkpointing=checkpointing,
        use_exact_model_name=True,  # the folder, not a name of a repository that the folder's name resembles
    )
    if setup.train == "lora":
        model = FastLanguageModel.get_peft_model(
            model,
            r=setup.rank,
            target_modules=_targets(setup),
            lora_alpha=16,
            lora_dropout=0.0,
            bias="none",
            use_gradient_checkpointing=checkpointing,
            max_seq_length=setup.seq,
            random_state=setup.seed,
        )
    return FastLanguageModel.for_training(model, use_gradient_checkpointing=checkpointing)


def _layers(model: Any) -> Iterator[Any]:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    yield from base.model.layers


def compile_inductor(model: Any, options: dict[str, Any]) -> None:
    model.compile(options=options or None)


def compile_dynamo(model: Any, options: dict[str, Any]) -> None:
    """Dynamo's graph run op by op: no backend's first step takes less than this one's."""
    model.compile(backend="eager", options=options or None)


def compile_layers(model: Any, options: dict[str, Any]) -> None:
    for layer in _layers(model):
        layer.compile(options=options or None)


def compile_fastft(model: Any, options: dict[str, Any]) -> None:
    model.compile(backend="fastft", options=options or None)


@dataclass(frozen=True)
class Implementation:
    """How an implementation loads a model and, if it does, compiles it in place. ``peer``: it has its own packages.
    ``first``: what comes before transformers is imported. ``pack``: what it makes of a packed batch and its documents'
    lengths, if it wants them otherwise.
    """

    load: Callable[[Setup, Path], Any]
    compile: Callable[[Any, dict[str, Any]], None] | None = None
    peer: bool = False
    first: Callable[[], None] | None = None
    pack: Callable[[dict[str, Any], Sequence[int]], dict[str, Any]] | None = None


IMPLEMENTATIONS: dict[str, Implementation] = {
    "eager": Implementation(load_stock),
    "dynamo": Implementation(load_stock, compile_dynamo),
    "inductor": Implementation(load_stock, compile_inductor),
    "inductor_layers": Implementation(load_stock, compile_layers),
    "liger": Implementation(load_liger, peer=True),
    "liger_inductor_layers": Implementation(load_liger, compile_layers, peer=True),
    "unsloth": Implementation(load_unsloth, peer=True, first=import_unsloth, pack=in_one_row),
    "unsloth_xformers": Implementation(load_unsloth, peer=True, first=import_unsloth_with_xformers, pack=in_one_row),
    "fastft": Implementation(load_stock, compile_fastft),
}


#: Implementation → what ``SFTConfig`` is told: the backend of ``torch.compile``, None for none.
SFT_BACKENDS = {"eager": None, "inductor": "inductor", "fastft": "fastft"}


# -- one run -----------------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    print(f"[bench {time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


@contextmanager
def _timed(result: dict[str, Any], key: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    result[key] = round(time.perf_counter() - start, 3)
    say(f"{key} {result[key]}")


def measure(setup: Setup, folder: Path, result: dict[str, Any], profile: bool = False, timeline: bool = False) -> None:
    """Load, compile, warm up, measure. Figures go into ``result`` as they come, so that a failure keeps what it had."""
    implementation = IMPLEMENTATIONS[setup.impl]
    if implementation.first is not None:
        implementation.first()
    import torch

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    result["device"] = _device()
    result["versions"] = _versions()
    torch.manual_seed(setup.seed)

    with _timed(result, "load_s"):
        model = implementation.load(setup, folder)
    if implementation.compile is not None:
        implementation.compile(model, setup.options)
    # A peer's packages have no fastft beside them, which knows where torch keeps such figures.
    compiles = implementation.compile is not None and not implementation.peer
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = _optimizer(setup, trained)
    result["trained_parameters"] = sum(p.numel() for p in trained)
    result["weights_bytes"] = torch.cuda.memory_allocated() if cuda else None
    result["data"] = described(setup, next(batches(setup, "cpu")))

    data = batches(setup, device)

    def step(batch: dict[str, Any], begins: Callable[[str], None] = lambda phase: None) -> torch.Tensor:
        begins("forward")
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = model(**batch).loss
        begins("backward")
        loss.backward()
        begins("optimizer")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def synchronize() -> None:
        if cuda:
            torch.cuda.synchronize()

    losses: list[torch.Tensor] = []
    lengths: list[int] = []
    graphs: list[int] = []

    def timed_step() -> float:
        batch = next(data)
        synchronize()
        start = time.perf_counter()
        losses.append(step(batch))
        synchronize()
        seconds = time.perf_counter() - start
        lengths.append(batch["input_ids"].shape[1])
        if compiles:
            graphs.append(_graphs())
        return seconds

    with _timed(result, "first_step_s"):
        timed_step()
    result["first_step_peak_bytes"] = torch.cuda.max_memory_allocated() if cuda else None
    if compiles:
        result["compile_s"] = _compile_seconds()
    if cuda:  # the second step is as the others; in it CUDA graphs are recorded, whose replays allocate nothing
        torch.cuda.reset_peak_memory_stats()
    result["warmup_ms"] = [round(timed_step() * 1e3, 3) for _ in range(setup.warmup - 1)]
    times = [timed_step() * 1e3 for _ in range(setup.steps)]
    result["step_ms"] = _spread(times)
    if setup.lengths == "random":
        result["lengths"] = lengths.copy()
    result["tokens_per_s"] = _speed([result], result["data"]["real_tokens"])
    result["peak_bytes"] = torch.cuda.max_memory_allocated() if cuda else None
    result["peak_reserved_bytes"] = torch.cuda.max_memory_reserved() if cuda else None
    result["loss"] = [round(float(x), 6) for x in losses]
    if compiles:
        result["graphs"] = graphs.copy()
    say(f"{result['tokens_per_s']:.0f} tokens/s, step {result['step_ms']['median']:.1f} ms, losses {result['loss']}")
    if setup.impl == "fastft":
        import fastft

        result["report"] = fastft.report().to_dict()
        print(fastft.report(), file=sys.stderr, flush=True)
    if profile:
        result["kernels"], result["idle"] = _profile(timed_step, cuda)
    if timeline and cuda:
        last = next(data)
        result["timeline"] = _timeline(lambda begins: step(last, begins))
    elif timeline:
        result["timeline_note"] = "no memory timeline: PyTorch keeps no memory history of a CPU"
        say(result["timeline_note"])


def _optimizer(setup: Setup, trained: list[Any]) -> Any:
    import torch

    if setup.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(trained, lr=setup.lr, weight_decay=0.0)
    return torch.optim.AdamW(trained, lr=setup.lr, weight_decay=0.0, fused=True)


def _graphs() -> int:
    """How many graphs Dynamo has handed to a backend in this process."""
    from fastft import _torch_compat as compat

    return compat.dynamo_counters().get("stats", {}).get("unique_graphs", 0)


def _compile_seconds() -> dict[str, float]:
    """What torch spent a tenth of a second on in compiling, most first. Phases lie in each other."""
    from fastft import _torch_compat as compat

    found = {phase: round(seconds, 2) for phase, seconds in compat.compile_seconds().items() if seconds >= 0.1}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def measure_sft(setup: Setup, folder: Path, result: dict[str, Any]) -> None:
    """As :func:`measure`, with the steps of TRL's ``SFTTrainer``."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    cuda = torch.cuda.is_available()
    result["device"] = _device()
    result["versions"] = _versions()
    torch.manual_seed(setup.seed)
    with _timed(result, "load_s"):
        model = AutoModelForCausalLM.from_pretrained(folder, **_arguments(setup))
    steps = setup.warmup + setup.steps
    data = batches(setup, "cpu")
    ids = torch.cat([next(data)["input_ids"] for _ in range(steps)])
    result["data"] = described(setup, next(data))
    times: list[float] = []

    class Clock(TrainerCallback):
        """Milliseconds of every step; the first one's peak of memory, and that of the measured ones."""

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            if cuda:
                torch.cuda.synchronize()
                if len(times) == setup.warmup:
                    torch.cuda.reset_peak_memory_stats()
            self.start = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if cuda:
                torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - self.start))
            if len(times) == 1:
                result["first_step_peak_bytes"] = torch.cuda.max_memory_allocated() if cuda else None

    lora = LoraConfig(r=setup.rank, lora_alpha=16, lora_dropout=0.0, target_modules=_targets(setup), bias="none")
    with tempfile.TemporaryDirectory(prefix="fastft-bench-") as output:
        arguments = SFTConfig(
            output_dir=output,
            torch_compile=SFT_BACKENDS[setup.impl] is not None,
            torch_compile_backend=SFT_BACKENDS[setup.impl],
            max_steps=steps,
            per_device_train_batch_size=setup.batch,
            max_length=setup.seq,
            learning_rate=setup.lr,
            optim=OPTIMIZERS[setup.optimizer],
            lr_scheduler_type="constant",
            gradient_checkpointing=setup.checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            bf16=True,
            use_cpu=not cuda,
            seed=setup.seed,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = SFTTrainer(
            model,
            arguments,
            train_dataset=Dataset.from_dict({"input_ids": ids.tolist()}),
            processing_class=AutoTokenizer.from_pretrained(folder),
            peft_config=lora if setup.train == "lora" else None,
            callbacks=[Clock()],
        )
        result["trained_parameters"] = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        result["weights_bytes"] = torch.cuda.memory_allocated() if cuda else None
        trainer.train()
    first, *warmup = times[: setup.warmup]
    result["first_step_s"] = round(first / 1e3, 3)
    result["warmup_ms"] = [round(ms, 3) for ms in warmup]
    result["step_ms"] = _spread(times[setup.warmup :])
    result["tokens_per_s"] = _speed([result], result["data"]["real_tokens"])
    result["peak_bytes"] = torch.cuda.max_memory_allocated() if cuda else None
    result["peak_reserved_bytes"] = torch.cuda.max_memory_reserved() if cuda else None
    result["loss"] = [round(float(row["loss"]), 6) for row in trainer.state.log_history if "loss" in row]
    say(f"{result['tokens_per_s']:.0f} tokens/s, step {result['step_ms']['median']:.1f} ms, losses {result['loss']}")
    if setup.impl == "fastft":
        import fastft

        result["report"] = fastft.report().to_dict()
        print(fastft.report(), file=sys.stderr, flush=True)


def _speed(runs: Sequence[dict[str, Any]], tokens: int) -> float:
    """Tokens per second of a step of ``tokens`` in the median time; where each step has other lengths, of all."""
    times = [t for run in runs for t in run["step_ms"]["all"]]
    if "lengths" not in runs[0]:
        return round(tokens / (statistics.median(times) / 1e3), 2)
    done = sum(n for run in runs for n in run["lengths"][-len(run["step_ms"]["all"]) :])
    return round(runs[0]["setup"]["batch"] * done / (sum(times) / 1e3), 2)


def _spread(times: Sequence[float]) -> dict[str, Any]:
    """Milliseconds: the median, the fastest and the slowest step, and all of them."""
    return {
        "median": round(statistics.median(times), 3),
        "min": round(min(times), 3),
        "max": round(max(times), 3),
        "all": [round(t, 3) for t in times],
    }


def _profile(step: Callable[[], float], cuda: bool) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """One more step's 60 kernels with most device time (on a CPU: operators): name, calls, milliseconds. And when the
    GPU had nothing to do: :func:`idle`.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        seconds = step()
    rows = [
        {
            "name": e.key,
            "calls": e.count,
            "ms": round((e.self_device_time_total if cuda else e.self_cpu_time_total) / 1e3, 3),
        }
        for e in profiler.key_averages()
    ]
    ran = [
        (e.time_range.start, e.time_range.end, e.name) for e in profiler.events() if e.device_type == DeviceType.CUDA
    ]
    rows = sorted((r for r in rows if r["ms"] > 0), key=lambda r: -r["ms"])[:60]
    return rows, idle(ran, seconds * 1e3) if cuda else None


def idle(ran: Sequence[tuple[float, float, str]], wall_ms: float) -> dict[str, Any]:
    """When the GPU had nothing to do in a step of ``wall_ms`` milliseconds, of what ran on it: ``(start, end, name)``,
    in µs.

    ``outside_ms``: before the first and after the last. ``gaps_ms``: in between, of which ``short_ms`` in gaps under
    20 µs (from one launch to the next); ``largest``: the ten longest gaps, with what ran before and after; ``copying``:
    the same of the times when nothing but copies between host and device ran, which kernels waited for.
    """
    copies = [row for row in ran if "Pinned" in row[2]]
    kernels = [row for row in ran if "Pinned" not in row[2]]
    return {**_gaps(ran, wall_ms), "copying": _waits(kernels, copies)}


def _waits(kernels: Sequence[tuple[float, float, str]], copies: Sequence[tuple[float, float, str]]) -> dict[str, Any]:
    """Gaps between kernels, as far as copies ran in them."""
    found: list[tuple[float, str, str, float]] = []
    end, last = float("inf"), ""
    for start, stop, name in sorted(kernels):
        inside = sum(max(0.0, min(start, b) - max(end, a)) for a, b, _ in copies) if start > end else 0.0
        if inside:
            found.append((inside, last, name, end))
        if not last or stop > end:
            end, last = stop, name
    first = min((start for start, *_ in kernels), default=0.0)
    return {
        "ms": round(sum(us for us, *_ in found) / 1e3, 3),
        "largest": [
            {"ms": round(us / 1e3, 3), "at_ms": round((at - first) / 1e3, 1), "after": a[:60], "before": b[:60]}
            for us, a, b, at in sorted(found, reverse=True)[:40]
        ],
    }


def _gaps(ran: Sequence[tuple[float, float, str]], wall_ms: float) -> dict[str, Any]:
    """The rest of :func:`idle`."""
    gaps: list[tuple[float, str, str]] = []
    busy, end, last = 0.0, float("-inf"), ""
    for start, stop, name in sorted(ran):
        if last and start > end:
            gaps.append((start - end, last, name))
        busy += max(0.0, stop - max(start, end))
        if stop > end:
            end, last = stop, name
    between = sum(us for us, *_ in gaps)
    return {
        "wall_ms": round(wall_ms, 3),
        "busy_ms": round(busy / 1e3, 3),
        "outside_ms": round(wall_ms - (busy + between) / 1e3, 3),
        "gaps_ms": round(between / 1e3, 3),
        "short_ms": round(sum(us for us, *_ in gaps if us < 20) / 1e3, 3),
        "largest": [
            {"ms": round(us / 1e3, 3), "after": after[:100], "before": before[:100]}
            for us, after, before in sorted(gaps, reverse=True)[:10]
        ],
    }


def _timeline(step: Callable[[Callable[[str], None]], Any]) -> dict[str, Any]:
    """One more step's allocated bytes over time, from the allocator's own history: it sees compiled code too."""
    import torch

    phases: list[tuple[str, float]] = []
    torch.cuda.synchronize()
    start_bytes, start_us = torch.cuda.memory_allocated(), time.time_ns() / 1e3
    torch.cuda.memory._record_memory_history(enabled="all", context="alloc", stacks="python", max_entries=2_000_000)
    try:
        step(lambda phase: phases.append((phase, time.time_ns() / 1e3)))
        torch.cuda.synchronize()
        events = torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    return timeline_of(events, start_bytes, start_us, phases)


def timeline_of(
    events: Sequence[dict[str, Any]],
    start_bytes: int,
    start_us: float,
    phases: Sequence[tuple[str, float]],
    bins: int = 300,
) -> dict[str, Any]:
    """Points (ms, bytes) of the allocator's ``events``: of each of ``bins`` equal times the most and the last. The
    time is the host's, when memory was asked for or given back, which is ahead of when the device used it. And what
    was there at the peak of what the step itself had asked for.
    """
    sizes, size, most = [], start_bytes, start_bytes
    alive: dict[int, dict[str, Any]] = {}
    at_peak: list[dict[str, Any]] = []
    for event in events:
        if event["action"] not in ("alloc", "free_requested"):
            continue
        allocated = event["action"] == "alloc"
        size += event["size"] if allocated else -event["size"]
        sizes.append(((event["time_us"] - start_us) / 1e3, size))
        if allocated:
            alive[event["addr"]] = event
        else:
            alive.pop(event["addr"], None)
        if size > most:
            most, at_peak = size, list(alive.values())
    points: list[tuple[float, int]] = [(0.0, start_bytes)]
    width = max(sizes[-1][0] if sizes else 0.0, 1e-3) / bins
    at = 0
    for i in range(bins):
        inside = []
        while at < len(sizes) and (sizes[at][0] <= (i + 1) * width or i == bins - 1):
            inside.append(sizes[at])
            at += 1
        points += dict.fromkeys([max(inside, key=lambda p: p[1]), inside[-1]]) if inside else ()
    return {
        "start_bytes": start_bytes,
        "peak_bytes": max([start_bytes, *(s for _, s in sizes)]),
        "phases_ms": {phase: round((us - start_us) / 1e3, 3) for phase, us in phases},
        "points": [[round(ms, 3), b] for ms, b in points],
        "at_peak": largest(at_peak),
    }


def largest(events: Sequence[dict[str, Any]], count: int = 60) -> list[dict[str, Any]]:
    """Allocations of one size and place together, by bytes: ``bytes``, ``count``, ``at``, the line that asked."""
    together: dict[tuple[int, str], int] = {}
    for event in events:
        frames = event.get("frames") or [{}]
        file, line = frames[0].get("filename", ""), frames[0].get("line", 0)
        at = f"{Path(file).name}:{line} {linecache.getline(file, line).strip()[:120]}"
        key = event["size"], at
        together[key] = together.get(key, 0) + 1
    rows = [{"bytes": size * n, "count": n, "at": at} for (size, at), n in together.items()]
    return sorted(rows, key=lambda r: -r["bytes"])[:count]


def _device() -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {"host": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    if not torch.cuda.is_available():
        return {"name": "cpu", **found}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        **found,
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """The commit measured, ``-dirty`` where the tree differs from it; without a repository, ``FASTFT_COMMIT``."""
    if known := os.environ.get("FASTFT_COMMIT"):
        return known
    try:
        head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run(
            ["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("-dirty" if changes.stdout.strip() else "")


def run(setup: Setup, root: Path, profile: bool = False, timeline: bool = False) -> dict[str, Any]:
    """Measure one implementation in this process. A failure is a result too: ``status`` ``failed``, and ``error``."""
    setup.check()
    os.environ.update(QUIET)
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "impl": setup.impl,
        "setup": asdict(setup),
        "status": "failed",
        "error": None,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": _commit(),
        "argv": sys.argv,
    }
    try:
        folder = checkpoint(setup.model, root)
        if setup.trainer == "sft":
            measure_sft(setup, folder, result)
        else:
            measure(setup, folder, result, profile, timeline)
        result["status"] = "ok"
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {error}"
        result["traceback"] = traceback.format_exc()[-4000:]
        traceback.print_exc()
    return result


# -- several beside each other -----------------------------------------------------------------------------------------


def run_apart(
    arguments: Sequence[str], impl: str, *, peers: str | None, caches: Path, timeout: float, log: Any
) -> dict[str, Any]:
    """One run in a process and with compiler caches of its own, killed after ``timeout`` s. A failure is a result."""
    out = caches / "result.json"
    out.unlink(missing_ok=True)
    environment = {**os.environ, **QUIET, **{k: str(caches / v) for k, v in CACHES.items()}, "PYTHONUNBUFFERED": "1"}
    # A container's NVIDIA_VISIBLE_DEVICES alone makes Unsloth compile with a single worker.
    environment.setdefault("CUDA_VISIBLE_DEVICES", "0")
    if impl.partition(":")[0] != "fastft":
        environment["FASTFT_AUTOLOAD"] = "0"
    if peers and IMPLEMENTATIONS[impl.partition(":")[0]].peer:
        environment["PYTHONPATH"] = peers
    command = [sys.executable, str(Path(__file__).resolve()), "run", *arguments, "--out", str(out)]
    failed = {"schema": SCHEMA, "impl": impl, "status": "failed", "argv": command}
    if timeout < 5:
        return {**failed, "error": "not started: the time of this comparison (--budget) is used up"}
    print(f"\n===== {impl} =====", file=log, flush=True)
    # A session of its own, so that compile workers go with it.
    process = subprocess.Popen(
        command, cwd=caches, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        code = process.wait(timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return {**failed, "error": f"timed out after {timeout:.0f} s"}
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    if out.exists():
        return {**json.loads(out.read_text()), "impl": impl}
    return {**failed, "error": f"the process ended with code {code} and wrote no result; its output is in the log"}


#: Caches that a run fills, as environment variable → folder: fresh ones make the first step a cold one.
CACHES = {
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "UNSLOTH_COMPILE_LOCATION": "unsloth",
    "XDG_CACHE_HOME": "xdg",
}


def compare(
    specs: Sequence[str],
    arguments: Sequence[str],
    *,
    model: str,
    root: Path,
    rounds: int = 1,
    baseline: str | None = None,
    peers: str | None = None,
    timeout: float = 300.0,
    budget: float = 3600.0,
    log: Any = sys.stderr,
    save: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:
    """Run ``specs`` (see :func:`chosen`) ``rounds`` times, interleaved; merge each one's rounds.

    The first round of an implementation starts with empty compiler caches, so its first step is a cold one; later
    rounds keep them. ``budget`` seconds hold for all runs together, ``timeout`` for each. ``save`` is called after
    every run with what there is so far: what a comparison that is cut short leaves behind.
    """
    for spec in specs:
        _one_of("--impls", spec.partition(":")[0], IMPLEMENTATIONS)
    baseline = baseline or specs[0]
    _one_of("--baseline", baseline, specs)
    deadline = time.monotonic() + budget
    checkpoint(model, root)
    results: dict[str, list[dict[str, Any]]] = {spec: [] for spec in specs}
    with tempfile.TemporaryDirectory(prefix="fastft-bench-") as scratch:
        for round_ in range(rounds):
            for i, spec in enumerate(specs):
                caches = Path(scratch) / str(i)
                caches.mkdir(exist_ok=True)
                name, data, options = chosen(spec)
                own = [*(["--data", data] if data else []), *(w for option in options for w in ("--options", option))]
                say(f"round {round_ + 1} of {rounds}: {spec}")
                result = run_apart(
                    ["--impl", name, "--model", model, "--checkpoints", str(root), *arguments, *own],
                    spec,
                    peers=peers,
                    caches=caches,
                    timeout=min(timeout, deadline - time.monotonic()),
                    log=log,
                )
                say(f"{spec}: {_in_short(result)}")
                results[spec].append(result)
                save(compared(results, rounds, baseline))
    return compared(results, rounds, baseline)


def chosen(spec: str) -> tuple[str, str | None, list[str]]:
    """``name`` or ``name:key=value;key=value`` → the name, its own form of the data (``data=padded``) or None for that
    of all, options for ``torch.compile``.
    """
    name, _, words = spec.partition(":")
    options = [word for word in words.split(";") if word]
    data = [word.removeprefix("data=") for word in options if word.startswith("data=")]
    return name, data[-1] if data else None, [word for word in options if not word.startswith("data=")]


def compared(
    results: dict[str, list[dict[str, Any]]], rounds: int, baseline: str, said: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What :func:`compare` returns, of its runs so far. ``said``: a file whose commit and arguments these are."""
    rows = [merge(spec, runs) for spec, runs in results.items() if runs]
    base = next((r for r in rows if r["impl"] == baseline), {})
    for row in rows:
        row["speed_ratio"] = _ratio(row.get("tokens_per_s"), base.get("tokens_per_s"))
        row["peak_ratio"] = _ratio(row.get("peak_bytes"), base.get("peak_bytes"))
    good = [r for r in rows if r["status"] == "ok"]
    said = said or {"schema": SCHEMA, "commit": _commit(), "argv": sys.argv}
    return {
        "schema": said["schema"],
        "device": next((run["device"] for r in good for run in r["runs"] if "device" in run), None),
        "commit": said.get("commit"),
        "argv": said.get("argv"),
        "rounds": rounds,
        "baseline": baseline,
        "rows": rows,
    }


def _in_short(result: dict[str, Any]) -> str:
    if result["status"] != "ok":
        return f"failed: {result['error']}"
    speed, peak = f"{result['tokens_per_s']:.0f} tokens/s", f"{_gib(result.get('peak_bytes'))} GiB"
    return f"{speed}, {peak}, first step {result['first_step_s']:.1f} s"


def merge(impl: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row from an implementation's rounds: all steps together, the largest peak, the first step cold and warm."""
    good = [r for r in runs if r["status"] == "ok"]
    row: dict[str, Any] = {"impl": impl, "status": "ok" if good else "failed", "runs": list(runs)}
    row["error"] = next((r["error"] for r in runs if r["status"] != "ok"), None)
    if good:
        setup = good[0]["setup"]
        row["data"] = good[0].get("data")
        row["step_ms"] = _spread([t for r in good for t in r["step_ms"]["all"]])
        row["tokens_per_s"] = _speed(good, setup["batch"] * setup["seq"])
        row["graphs"] = good[0].get("graphs")
        peaks = [r["peak_bytes"] for r in good if r["peak_bytes"] is not None]
        row["peak_bytes"] = max(peaks) if peaks else None
        row["first_step_s"] = good[0]["first_step_s"]
        row["first_step_warm_s"] = min((r["first_step_s"] for r in good[1:]), default=None)
        row["loss_first"], row["loss_last"] = good[0]["loss"][0], good[0]["loss"][-1]
    return row


def _ratio(value: float | None, base: float | None) -> float | None:
    return round(value / base, 4) if value and base else None


def _gib(size: int | None) -> str:
    return f"{size / GIB:.2f}" if size else "–"


def tokens_of(setup: dict[str, Any]) -> str:
    """``4×2048 tokens`` (random lengths: ``4×512 to 2048 tokens``); and of what documents, if any."""
    if setup["data"] == "full":
        least = f"{max(setup['seq'] // 4, 1)} to " if setup["lengths"] == "random" else ""
        return f"{setup['batch']}×{least}{setup['seq']} tokens"
    mean, half = setup["document"], setup["document"] // 2
    return f"{setup['batch']}×{setup['seq']} real tokens in documents of {mean} ± {half}"


def optimizer_of(setup: dict[str, Any]) -> str:
    """``, AdamW in 8 bits``; empty where it is the usual one."""
    return ", AdamW in 8 bits" if setup["optimizer"] == "adamw8bit" else ""


def input_of(row: dict[str, Any]) -> str:
    """``packed 1×8192``: the form and the shape of what an implementation got; empty where rows are full."""
    data = row.get("data")
    if not data or data["form"] == "full":
        return ""
    return f"{data['form']} {'×'.join(map(str, data['shape']))}"


def graphs_of(row: dict[str, Any]) -> str:
    """``2, from step 2 on``: where lengths are random, how many graphs there are in the end and since when, else
    empty.
    """
    found = row.get("graphs") if any("lengths" in run for run in row["runs"]) else None
    return f"{found[-1]}, from step {found.index(found[-1]) + 1} on" if found else ""


def table(compared: dict[str, Any], title: str) -> Any:
    """A ``rich`` table of what :func:`compare` returned, with the errors of failed runs under it."""
    from rich.markup import escape
    from rich.table import Table

    errors = [f"{r['impl']}: {' '.join(str(r['error']).split())[:300]}" for r in compared["rows"] if r["error"]]
    told = any(input_of(row) for row in compared["rows"])
    counted = any(graphs_of(row) for row in compared["rows"])
    shown = Table(title=title, title_justify="left", caption=escape("\n".join(errors)) or None, caption_justify="left")
    ratios = (f"speed / {compared['baseline']}", f"peak / {compared['baseline']}")
    for column in (
        "implementation",
        *(["input"] if told else []),
        "tokens/s",
        "step ms",
        "± ms",
        "peak GiB",
        "first step s",
        "loss first",
        "last",
        *(["graphs"] if counted else []),
        *ratios,
    ):
        shown.add_column(column, justify="left" if column in ("implementation", "input") else "right")
    for row in compared["rows"]:
        if row["status"] != "ok":
            shown.add_row(row["impl"], *([""] if told else []), "failed")
            continue
        ms = row["step_ms"]
        shown.add_row(
            row["impl"],
            *([input_of(row)] if told else []),
            f"{row['tokens_per_s']:,.0f}",
            f"{ms['median']:.1f}",
            f"{(ms['max'] - ms['min']) / 2:.1f}",
            _gib(row["peak_bytes"]),
            f"{row['first_step_s']:.1f}",
            f"{row['loss_first']:.4f}",
            f"{row['loss_last']:.4f}",
            *([graphs_of(row)] if counted else []),
            f"{row['speed_ratio']:.3f}" if row["speed_ratio"] else "–",
            f"{row['peak_ratio']:.3f}" if row["peak_ratio"] else "–",
        )
    return shown


# -- command line ------------------------------------------------------------------------------------------------------


def _option(text: str) -> tuple[str, Any]:
    """``key=value``; a value that reads as JSON is that (numbers, true, null, {...}), any other is the text itself."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"an option is key=value, not {text!r}")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def write(result: dict[str, Any], out: Path | None) -> None:
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")


def _specs(words: Sequence[str]) -> list[str]:
    """``eager,inductor fastft`` → three; a word with options (``fastft:disable=rotary,attention``) is one."""
    return [name for word in words for name in ([word] if "=" in word else word.split(",")) if name]


def _parser() -> argparse.ArgumentParser:
    setting = argparse.ArgumentParser(add_help=False)
    setting.add_argument("--model", default="llama-3.1-8b", help=f"architecture, random weights: {', '.join(MODELS)}")
    setting.add_argument("--quant", default="nf4", help="nf4 or bf16 (default nf4)")
    setting.add_argument("--train", default="lora", help="lora or full (default lora)")
    setting.add_argument("--trainer", default="loop", help="loop or sft: TRL's SFTTrainer (default loop)")
    setting.add_argument("--rank", type=int, default=16, help="LoRA rank (default 16)")
    setting.add_argument("--batch", type=int, default=4, help="sequences in a step (default 4)")
    setting.add_argument("--seq", type=int, default=2048, help="tokens in a sequence (default 2048)")
    setting.add_argument(
        "--data", default="full", help="full, packed or padded (default full): rows of tokens, or documents, see above"
    )
    setting.add_argument(
        "--document", type=int, default=512, help="tokens in a document, up to half as many more or less (default 512)"
    )
    setting.add_argument("--tokens", default="uniform", help="uniform or zipf (default uniform): what ids are drawn")
    setting.add_argument(
        "--lengths", default="fixed", help="fixed or random (default fixed): rows of --seq tokens, or from a quarter"
    )
    setting.add_argument(
        "--optimizer", default="adamw", help="adamw or adamw8bit: bitsandbytes' (default adamw, fused)"
    )
    setting.add_argument("--lr", type=float, default=1e-4, help="learning rate (default 1e-4)")
    setting.add_argument(
        "--checkpointing", choices=("on", "off"), default="on", help="gradient checkpointing (default on)"
    )
    setting.add_argument("--steps", type=int, default=5, help="measured steps (default 5)")
    setting.add_argument(
        "--warmup", type=int, default=3, help="steps before them, the first of which compiles (default 3)"
    )
    setting.add_argument("--seed", type=int, default=0)
    setting.add_argument(
        "--profile",
        action="store_true",
        help="one more step under the profiler: kernels by time, and idle times, in the JSON",
    )
    setting.add_argument(
        "--timeline", action="store_true", help="one more step's allocated memory over time in the JSON (CUDA)"
    )
    setting.add_argument(
        "--checkpoints", type=Path, default=None, help="folder of checkpoints (default: see checkpoint_root)"
    )
    setting.add_argument("--out", type=Path, default=None, help="JSON file (default: standard output)")

    parser = argparse.ArgumentParser(prog="bench/train.py", description=(__doc__ or "").split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", parents=[setting], help="one implementation in this process")
    one.add_argument("--impl", required=True, help=", ".join(IMPLEMENTATIONS))
    one.add_argument(
        "--options", type=_option, action="append", default=[], metavar="KEY=VALUE", help="for torch.compile"
    )
    several = commands.add_parser("compare", parents=[setting], help="several beside each other, a process for each")
    several.add_argument(
        "--impls",
        nargs="+",
        default=["eager,fastft"],
        help="names, or name:key=value;key=value; data=padded is this one's own form of the data, others are options",
    )
    several.add_argument("--rounds", type=int, default=1, help="each this many times, interleaved (default 1)")
    several.add_argument("--baseline", default=None, help="whom the ratios refer to (default: the first)")
    several.add_argument("--timeout", type=float, default=300.0, help="seconds for one run (default 300)")
    several.add_argument("--budget", type=float, default=3600.0, help="seconds for all runs together (default 3600)")
    several.add_argument("--peers", default=None, help="PYTHONPATH of liger's and unsloth's runs")
    several.add_argument("--log", type=Path, default=None, help="file for the runs' output (default: standard error)")
    prepare = commands.add_parser("checkpoint", help="write a random-weight checkpoint, if it is not there")
    prepare.add_argument("--model", required=True)
    prepare.add_argument("--checkpoints", type=Path, default=None)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 if a run worked (``compare``: any of them), 1 if none did, 2 for arguments that cannot be."""
    parser = _parser()
    a = parser.parse_args(argv)
    root = a.checkpoints or checkpoint_root()
    if a.command == "checkpoint":
        if a.model not in MODELS:
            parser.error(f"--model is {a.model!r}; it is one of {', '.join(MODELS)}")
        os.environ.update(QUIET)
        if not (root / a.model / "config.json").exists():
            write_checkpoint(a.model, root / a.model)
        return 0
    sizes = ("rank", "batch", "seq", "document", "steps", "warmup", "seed")
    words = ("model", "quant", "train", "trainer", "data", "tokens", "lengths", "optimizer", "lr")
    common = {k: getattr(a, k) for k in (*words, *sizes)}
    if a.trainer == "sft" and (a.profile or a.timeline):
        parser.error("--profile and --timeline are of one step more, which --trainer sft does not take")
    if a.command == "run":
        setup = Setup(impl=a.impl, checkpointing=a.checkpointing == "on", options=dict(a.options), **common)
        try:
            setup.check()
        except ValueError as error:
            parser.error(str(error))
        result = run(setup, root, a.profile, a.timeline)
        ok = result["status"] == "ok"
    else:
        specs = _specs(a.impls)
        try:
            for spec in specs:
                name, data, _ = chosen(spec)
                Setup(**{**common, "impl": name, "data": data or a.data}).check()
            if a.baseline is not None:
                _one_of("--baseline", a.baseline, specs)
        except ValueError as error:
            parser.error(str(error))
        del common["model"]
        arguments = [w for k, v in common.items() for w in (f"--{k}", str(v))] + ["--checkpointing", a.checkpointing]
        log = open(a.log, "a") if a.log else sys.stderr  # noqa: SIM115  (the runs write to it, closed at exit)
        result = compare(
            specs,
            [*arguments, *(["--profile"] if a.profile else []), *(["--timeline"] if a.timeline else [])],
            model=a.model,
            root=root,
            rounds=a.rounds,
            baseline=a.baseline,
            peers=a.peers,
            timeout=a.timeout,
            budget=a.budget,
            log=log,
            save=lambda found: write(found, a.out),
        )
        ok = any(r["status"] == "ok" for r in result["rows"])
        checkpointing = "checkpointing" if a.checkpointing == "on" else "no checkpointing"
        adapters = f"LoRA r={a.rank}" if a.train == "lora" else "full"
        device = (result["device"] or {}).get("name", "no device")
        loop = ", SFTTrainer" if a.trainer == "sft" else ""
        setting = f"{a.model}, {a.quant}, {adapters}, {checkpointing}{optimizer_of(common)}{loop}"
        title = f"{setting}, {tokens_of(common)}, {device}"
        from rich.console import Console

        Console(width=150).print(table(result, title))
    write(result, a.out)
    if a.out is None and a.command == "run":
        print(json.dumps(result, indent=1))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
