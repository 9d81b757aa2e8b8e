"""LoRA fine-tuning of a causal language model on prompt-completion pairs, stock transformers, PEFT and TRL.

The only line that names fastft is ``torch_compile_backend``; without it this is the script as it was.

    python examples/sft_lora.py MODEL_FOLDER OUTPUT_FOLDER --steps 100

trains on the documentation of the Python installation that runs it (python_docs.py). demo.py calls finetune() with
fastft and without, on a model that it builds itself.
"""

from __future__ import annotations

import argparse

import torch
from datasets import Dataset
from peft import LoraConfig
from python_docs import dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer


def finetune(
    model: str,
    output: str,
    data: Dataset,
    backend: str | None = "fastft",
    steps: int = 100,
    batch: int = 8,
    learning_rate: float = 1e-3,
    rank: int = 16,
    seed: int = 0,
    nf4: bool = False,
    callbacks: list[TrainerCallback] | None = None,
) -> SFTTrainer:
    """Train LoRA adapters on every linear layer of ``model`` (a folder) and save them in the folder ``output``."""
    set_seed(seed)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    on_gpu = torch.cuda.is_available()
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.bfloat16 if on_gpu else torch.float32, quantization_config=quantization if nf4 else None
        ),
        processing_class=AutoTokenizer.from_pretrained(model),
        train_dataset=data,
        peft_config=LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"),
        args=SFTConfig(
            output_dir=output,
            torch_compile=backend is not None,
            torch_compile_backend=backend,
            max_steps=steps,
            per_device_train_batch_size=batch,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=steps // 10,
            bf16=on_gpu,
            max_length=512,
            seed=seed,
            data_seed=0,  # every seed sees the same batches: what differs is the adapters' start
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
        callbacks=callbacks,
    )
    trainer.train()
    trainer.save_model(output)
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder with a causal language model and its tokenizer")
    parser.add_argument("output", help="folder to save the adapter in")
    parser.add_argument(
        "--backend", default="fastft", help="torch.compile backend; 'none' trains uncompiled (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--nf4", action="store_true", help="load the model's linear layers in NF4 (QLoRA)")
    options = vars(parser.parse_args())
    options["backend"] = None if options["backend"] == "none" else options["backend"]
    finetune(data=dataset(), **options)
