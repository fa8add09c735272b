"""A model that takes no token trees: padded batches beside one branch at a time with full logits.

    python benchmarks/fallback.py --vocabulary 150000 --json fallback.json

A tiny hybrid of linear and full attention scores, for each pair, the verdicts A and B in both
orders and both answers: without gradient, and with a backward pass.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import ENDS, Json, Meter, child, make_tokenizer, table, write

METHODS = {"alone": "one branch at a time, full logits", "padded": "padded batches"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabulary", type=int, default=150_000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=4, help="pairs in a pack")
    parser.add_argument("--steps", type=int, default=3, help="after one of warm-up")
    parser.add_argument("--prompt-tokens", type=int, nargs=2, default=(64, 128))
    parser.add_argument("--response-tokens", type=int, nargs=2, default=(32, 96))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def make_hybrid(a: Json, folder: Path) -> Path:
    """Writes a Qwen3.5-like model of random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    layers = ["linear_attention"] * a["layers"]
    layers[3::4] = ["full_attention"] * len(layers[3::4])
    config = AutoConfig.for_model(
        "qwen3_5_text",
        vocab_size=a["vocabulary"],
        hidden_size=a["width"],
        num_hidden_layers=a["layers"],
        intermediate_size=3 * a["width"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=a["width"] // 4,
        layer_types=layers,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        tie_word_embeddings=True,
        **ENDS,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    make_tokenizer(a["vocabulary"]).save_pretrained(folder)
    return folder


def branches_of(a: Json, seed: int) -> list[Any]:
    """The branches of some pairs: two verdicts in both orders, and two answers."""
    from scir_cli.engine import trees

    draw = random.Random(seed)

    def text(bounds: tuple[int, int]) -> list[int]:
        return [draw.randrange(4, a["vocabulary"]) for _ in range(draw.randint(*bounds))]

    branches = []
    for _ in range(a["pairs"]):
        prompt = text(a["prompt_tokens"])
        answers = [text(a["response_tokens"]) for _ in range(2)]
        branches += [trees.continuation(prompt, answer) for answer in answers]
        for first, second in (answers, reversed(answers)):
            asked = [*prompt, *first, *second]
            branches += [trees.verdict(asked, token) for token in (4, 5)]
    return branches


def run(a: Json) -> Json:
    """Seconds of each step, the peak of memory, and every log-probability."""
    import torch

    from scir_cli import config
    from scir_cli.engine import loading
    from scir_cli.settings import ModelSettings

    values = {"model": a["model"], "output_dir": "-", "dtype": "fp32", "device": "cpu"}
    policy = loading.load(config.build(ModelSettings, values, where="benchmark"))
    if policy.takes_trees or policy.batching != "padded":
        raise SystemExit("the model takes trees, or no padded batches")
    policy.batching = a["method"]
    meter = Meter(gpu=False)
    logps: list[float] = []
    for step in range(a["steps"] + 1):
        if step == 1:
            meter.start()
        branches = branches_of(a, step)
        with torch.set_grad_enabled(a["backward"]):
            found = policy.branch_logps(branches)
            if a["backward"]:
                found.mean().backward()
                policy.model.zero_grad()
        logps += found.tolist()
        if step:
            meter.tick()
    n_tokens = sum(len(branch.ids) for branch in branches)
    return {**meter.result(), "logps": logps, "sequence_tokens": n_tokens}


def main() -> None:
    given = arguments()
    if given.child:
        print(json.dumps(run(json.loads(given.child))))
        return
    a = {k: v for k, v in vars(given).items() if k not in ("json", "child")}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = str(make_hybrid(a, Path(folder)))
        for backward in (False, True):
            results = {}
            for method in METHODS:
                asked = {**a, "model": model, "method": method, "backward": backward}
                results[method] = child("fallback.py", asked)
            alone, padded = results["alone"], results["padded"]
            differences = zip(alone["logps"], padded["logps"], strict=True)
            seconds = {k: statistics.median(v["cpu_seconds"]) for k, v in results.items()}
            rows.append(
                {
                    "pass": "forward and backward" if backward else "forward",
                    "tokens": padded["sequence_tokens"],
                    "alone, CPU s": seconds["alone"],
                    "padded, CPU s": seconds["padded"],
                    "times as fast": seconds["alone"] / seconds["padded"],
                    "alone, peak MB": alone["peak_mb"],
                    "padded, peak MB": padded["peak_mb"],
                    "of its memory": padded["peak_mb"] / alone["peak_mb"],
                    "largest difference, nats": max(abs(x - y) for x, y in differences),
                }
            )
    print(table(rows))
    write({"settings": a, "rows": rows}, given.json)


if __name__ == "__main__":
    sys.exit(main())
