"""Writes seed.jsonl and heldout.jsonl from examples.jsonl: pairs with a gold label by construction.

The chosen answer is the example's own.
The rejected one is the answer to another question that is nearest in length,
so it is plain which one is better, and length does not give it away.
Seed and held-out pairs share no question and no answer.
"""

import json
from pathlib import Path

HERE = Path(__file__).parent
N_SEED = 112


def pairs(examples: list[dict[str, str]]) -> list[dict[str, str]]:
    """Each example with a foreign answer: neighbors in the order of length.

    Every answer is rejected exactly once.
    """
    by_length = sorted(examples, key=lambda e: (len(e["response"]), e["prompt"]))
    foreign = {}
    for index in range(0, len(by_length), 2):
        one, other = by_length[index : index + 2]
        foreign[one["prompt"]], foreign[other["prompt"]] = other["response"], one["response"]
    return [
        {"prompt": e["prompt"], "chosen": e["response"], "rejected": foreign[e["prompt"]]}
        for e in examples
    ]


examples = [
    json.loads(line) for line in (HERE / "examples.jsonl").read_text(encoding="utf-8").splitlines()
]
for name, part in (("seed", examples[:N_SEED]), ("heldout", examples[N_SEED:])):
    rows = pairs(part)
    (HERE / f"{name}.jsonl").write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    print(f"{name}.jsonl: {len(rows)} pairs")
