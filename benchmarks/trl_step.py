"""The other side of train_step.py: TRL's DPOTrainer on the same model, pairs, order and optimizer.

Runs in an environment of its own, made by `make bench-env`; imports nothing of scir_cli.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import datasets
import torch
import trl.trainer.utils
from common import Json, Meter, versions
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer


class Ticks(TrainerCallback):
    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.meter.start()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.meter.tick()


class ExactLosses(DPOTrainer):
    """TRL's trainer, unchanged but for a note of each step's loss: what it logs is rounded."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.__dict__.setdefault("losses", []).append(loss.detach())
        return loss


def settings(a: Json, folder: str) -> DPOConfig:
    stock = (
        a["implementation"] == "trl-out-of-the-box"
    )  # bf16 autocast, checkpointing, the reference model in the loop
    return DPOConfig(
        output_dir=folder,
        max_steps=a["steps"],
        per_device_train_batch_size=a["batch_size"],
        max_length=None,
        learning_rate=a["learning_rate"],
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        beta=a["beta"],
        bf16=stock or a["dtype"] == "bf16",
        gradient_checkpointing=stock,
        precompute_ref_log_probs=not stock,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        train_sampling_strategy="sequential",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def trainer(a: Json, folder: str, meter: Meter) -> ExactLosses:
    if a["implementation"] == "trl-compact":
        # TRL scores response positions only where Triton runs, and every position elsewhere: here
        # it does on a CPU what it does on CUDA
        trl.trainer.utils._use_triton = lambda device: True
    pairs = json.loads(Path(a["pairs"]).read_text())
    rows = [
        {
            "prompt": f"<s> user {pair['question']} </s> <s> assistant",
            "chosen": f" {pair['answers'][0]} </s>",
            "rejected": f" {pair['answers'][1]} </s>",
        }
        for pair in pairs
    ]
    model = AutoModelForCausalLM.from_pretrained(a["model"], dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(a["model"])
    made = ExactLosses(
        model,
        args=settings(a, folder),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Ticks(meter)],
    )
    for row, pair in zip(made.train_dataset, pairs, strict=True):
        assert [row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]] == [
            pair["prompt_ids"],
            *pair["answer_ids"],
        ]
    return made


def main() -> None:
    a, meter = json.loads(sys.argv[-1]), Meter()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        run = trainer(a, folder, meter)
        run.train()
    losses = [float(loss) for loss in run.losses]
    print(
        json.dumps(
            {
                **meter.result(),
                "losses": losses,
                "versions": versions("trl", "accelerate", "datasets"),
            }
        )
    )


if __name__ == "__main__":
    main()
