"""Judging all ordered pairs of N answers of a prompt (both judge orders, implicit reward): token
trees beside the usual ways of scoring.

    python benchmarks/score.py --shape S M --json score.json

script       each distinct sequence by itself through the plain model,
             with its logits at every position, as most scripts do
one by one   the same, with logits only where there are targets
padded       batches of them, sorted by length, padded on the right
trees PACK   this engine, up to PACK tokens a forward

None scores the same sequence twice within a prompt.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from common import SHAPES, Json, Meter, child, make_model, make_pairs, table, write

Groups = Sequence[Sequence[Any]]  # branches, pair by pair


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=["S"])
    parser.add_argument("--dtype", nargs="+", choices=["fp32", "bf16"], default=["fp32"])
    parser.add_argument(
        "--reward-models", nargs="+", choices=["judge", "implicit"], default=["judge", "implicit"]
    )
    parser.add_argument("--answers", type=int, default=5, help="answers of a prompt")
    parser.add_argument("--prompts", type=int, default=4, help="prompts; the first is warm-up")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences in a padded batch")
    parser.add_argument(
        "--packs",
        type=int,
        nargs="+",
        default=[4096, 16384],
        help="tokens in a forward of this engine",
    )
    parser.add_argument("--prompt-tokens", type=int, nargs=2, default=(128, 256))
    parser.add_argument("--response-tokens", type=int, nargs=2, default=(64, 256))
    parser.add_argument(
        "--instruction-tokens",
        type=int,
        default=0,
        help="words before the judge's own prompt: a longer instruction",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


# ------------------------------ in the child


def run(a: Json) -> Json:
    """Scores prompt by prompt.

    Seconds, tokens computed, and every branch's summed log-probability.
    """
    import engine
    import torch

    from scir_cli.engine import loading
    from scir_cli.rewards import reward_models
    from scir_cli.rewards.prompts import PAIRWISE

    meter = Meter()
    with tempfile.TemporaryDirectory() as folder:
        settings = engine.settings(
            {
                **a,
                "objective": "scir",
                "batch_size": 1,
                "steps": 1,
                "learning_rate": 1.0,
                "beta": 0.1,
            },
            folder,
        )
        model = loading.load(settings)
        if a["instruction_tokens"]:
            words = ["better?", "answer", "to", "the", "question"] * a["instruction_tokens"]
            judge = Path(folder) / "judge.txt"
            judge.write_text(" ".join(words[: a["instruction_tokens"]]) + "\n" + PAIRWISE)
            settings = settings.model_copy(update={"judge_prompt": judge})
        models = reward_models.make(a["reward_models"], model.chat, settings)
        prompts = json.loads(Path(a["pairs"]).read_text())
        jobs = [
            [reward_models.all_branches(models, pair) for pair in engine.pairs_of(row, str(i))]
            for i, row in enumerate(prompts)
        ]
    score = (
        by_trees
        if a["method"] == "trees"
        else partial(by_batches, everywhere=a["method"] == "script")
    )
    logps = []
    meter.start()
    with torch.no_grad():
        for groups in jobs:
            logps += score(model, groups, a["size"])
            meter.tick()
    tokens = [tokens_computed(a["method"], groups, a["size"]) for groups in jobs]
    sequences = [sum(map(len, distinct_paths(groups))) for groups in jobs]
    return {**meter.result(), "tokens": tokens, "sequence_tokens": sequences, "logps": logps}


def by_trees(model: Any, groups: Groups, size: int) -> list[float]:
    return [float(logp) for part in model.score(groups, size) for logp in part]


def by_batches(model: Any, groups: Groups, size: int, everywhere: bool) -> list[float]:
    """Distinct sequences, shortest first, `size` at a time, padded on the right."""
    branches = [branch for group in groups for branch in group]
    distinct, paths = list(dict.fromkeys(branches)), distinct_paths(groups)
    found: dict[Any, float] = {}
    with model.plain_attention_mode():
        for low in range(0, len(paths), size):
            batch = paths[low : low + size]
            there = set(batch)
            wanted = [branch for branch in distinct if branch.ids in there]
            found |= zip(wanted, score_batch(model, batch, wanted, everywhere), strict=True)
    return [found[branch] for branch in branches]


def distinct_paths(groups: Groups) -> list[tuple[int, ...]]:
    return sorted({branch.ids for group in groups for branch in group}, key=len)


def tokens_computed(method: str, groups: Groups, size: int) -> int:
    """Tokens that go through the model, padding included."""
    from scir_cli.engine import trees

    if method == "trees":
        packs = trees.pack(groups, size)
        return sum(
            len(trees.build([b for group in groups[low:high] for b in group]))
            for low, high in packs
        )
    paths = distinct_paths(groups)
    return sum(
        len(paths[low : low + size]) * len(paths[low : low + size][-1])
        for low in range(0, len(paths), size)
    )


def score_batch(
    policy: Any, paths: Sequence[tuple[int, ...]], wanted: Sequence[Any], everywhere: bool
) -> list[float]:
    """Summed log-probability of each wanted branch.

    Hidden states of a whole batch, logits where there are targets, or everywhere.
    """
    import torch

    longest = max(map(len, paths))
    ids = torch.tensor(
        [[*path, *[0] * (longest - len(path))] for path in paths], device=policy.device
    )
    there = torch.tensor(
        [[1] * len(path) + [0] * (longest - len(path)) for path in paths], device=policy.device
    )
    mask = None if there.all() else there
    model = policy.model if everywhere else policy.model.base_model
    states = model(input_ids=ids, attention_mask=mask, use_cache=False)[
        0
    ]  # (sequences, tokens, vocab or width)
    index = {path: i for i, path in enumerate(paths)}
    own = [index[branch.ids] for branch in wanted]  # the sequence of each branch
    places = sorted(
        {(i, at) for i, branch in zip(own, wanted, strict=True) for at in branch.target_positions}
    )
    row_of = {place: row for row, place in enumerate(places)}
    sequence, at = torch.tensor(places, device=policy.device).T
    rows_of_logits = (
        states[sequence, at]
        if everywhere
        else policy.model.get_output_embeddings()(states[sequence, at])
    )
    logps = rows_of_logits.float().log_softmax(-1)  # (rows, vocab)
    out = []
    for i, branch in zip(own, wanted, strict=True):
        rows = [row_of[i, at] for at in branch.target_positions]
        out.append(float(logps[rows, list(branch.target_tokens)].sum()))
    return out


# ------------------------------ in the driver


def measure(shape: str, dtype: str, a: argparse.Namespace, folder: Path) -> list[Json]:
    model = make_model(folder, shape, dtype if shape in ("1.5b", "8b") else "fp32", a.seed)
    size = SHAPES[shape][1].get("vocab_size", 32_000)
    rows = make_pairs(
        a.prompts, size, tuple(a.prompt_tokens), tuple(a.response_tokens), a.answers, a.seed
    )
    (folder / "pairs.json").write_text(json.dumps(rows))
    asked = {
        "model": str(model),
        "pairs": str(folder / "pairs.json"),
        "dtype": dtype,
        "reward_models": a.reward_models,
    }
    asked["instruction_tokens"] = a.instruction_tokens
    methods = [
        ("one by one", 1),
        ("script", 1),
        ("padded", a.batch_size),
        *(("trees", pack) for pack in a.packs),
    ]
    records = []
    for method, at_once in methods:
        record = child("score.py", {**asked, "method": method, "size": at_once})
        records.append(
            {"shape": shape, "dtype": dtype, "method": method, "size": at_once, **record}
        )
        print(
            f"{shape} {dtype} {method} {at_once}: {statistics.median(record['seconds'][1:]):.3g} s",
            file=sys.stderr,
        )
    return records


def summarize(records: list[Json]) -> list[Json]:
    plain, script = records[:2]
    rows = []
    for record in records:
        seconds, tokens = (
            statistics.median(record["seconds"][1:]),
            statistics.fmean(record["tokens"][1:]),
        )
        name = (
            record["method"]
            if record["method"] in ("one by one", "script")
            else f"{record['method']} {record['size']}"
        )
        gaps = [abs(x - y) / abs(y) for x, y in zip(record["logps"], plain["logps"], strict=True)]
        rows.append(
            {
                "shape": record["shape"],
                "method": name,
                "precision": record["dtype"],
                "tokens computed": tokens,
                "s a prompt": seconds,
                "times faster": statistics.median(plain["seconds"][1:]) / seconds,
                "than the script": statistics.median(script["seconds"][1:]) / seconds,
                "sequence tokens/s": statistics.fmean(record["sequence_tokens"][1:]) / seconds,
                "peak MB": record["peak_mb"],
                "largest relative difference": max(gaps),
            }
        )
    return rows


def main() -> None:
    a = arguments()
    if a.child:
        print(json.dumps(run(json.loads(a.child))))
        return
    records, rows = [], []
    for shape in a.shape:
        for dtype in a.dtype:
            with tempfile.TemporaryDirectory() as folder:
                found = measure(shape, dtype, a, Path(folder))
            records += found
            rows += summarize(found)
    print(table(rows))
    write({"table": rows, "runs": records}, a.json)
    if any(
        row["precision"] == "fp32" and row["largest relative difference"] >= 1e-3 for row in rows
    ):
        raise SystemExit("in fp32 a log-probability differs by 1e-3 or more of itself")


if __name__ == "__main__":
    main()
