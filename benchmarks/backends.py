"""`generate`, and judging all pairs of N answers, by backend: transformers and the engine's token
trees beside vLLM, which runs in an environment of its own.

    python benchmarks/backends.py --vllm-python .venv-vllm/bin/python --json backends.json

vLLM judges three times: in the order the stage asks in (all pairs of a prompt together, both orders
of a pair together), shuffled, and both of these again with a cache that holds few prompts. Each
time the judge's prompt starts with another word, so that nothing is found that an earlier time had
left. What a model reads while it is loaded or for the first prompt is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from common import SHAPES, Json, child, make_model, make_pairs, table, versions, write

BLOCK = 32  # tokens of a cache block: vLLM's CPU build has 128 by default, a GPU 16


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="S")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--prompts", type=int, default=9, help="prompts; the first is warm-up")
    parser.add_argument(
        "--answers", type=int, default=5, help="answers of a prompt, sampled and judged"
    )
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, nargs=2, default=(128, 256))
    parser.add_argument("--response-tokens", type=int, nargs=2, default=(64, 256))
    parser.add_argument(
        "--small-cache", type=int, default=8192, help="tokens in the cache that holds few prompts"
    )
    parser.add_argument("--only", default="", help="backends whose name holds this")
    parser.add_argument(
        "--vllm-python",
        help="Python of an environment with vLLM; without it only transformers is measured",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child")
    return parser.parse_args()


# ------------------------------ in a child


def run(asked: Json) -> Json:
    """Figures of each task of one backend, which is loaded once."""
    from scir_cli import config
    from scir_cli.backends import Sampling, make
    from scir_cli.engine.lazy_policy import LazyPolicy
    from scir_cli.settings import GenerateSettings

    given = {
        "model": asked["model"],
        "output_dir": asked["folder"] + "/out",
        "input": "",
        "dtype": asked["dtype"],
        "device": "cpu",
        "max_model_len": 2048,
    }
    given |= {"backend": asked["backend"], "vllm_arg": asked["vllm_arg"]}
    settings = config.build(
        GenerateSettings,
        {**given, "n": asked["answers"], "max_new_tokens": asked["max_new_tokens"]},
        where="",
    )
    model = LazyPolicy(settings, settings.model)
    settings.output_dir.mkdir(exist_ok=True)
    backend = make(
        asked["backend"],
        model,
        Sampling(settings.temperature, settings.top_p, settings.max_new_tokens, 16),
        settings,
    )
    found = {task: task_of(task, asked, given, settings, model, backend) for task in asked["tasks"]}
    backend.close()
    return found


def task_of(task: str, asked: Json, given: Json, settings: Any, model: Any, backend: Any) -> Json:
    rows = json.loads(Path(asked["rows"]).read_text())
    if task == "generate":
        import pyarrow as pa

        from scir_cli.stages.sampling import Sampler

        prompts = [
            {
                "prompt_id": str(i),
                "messages": [{"role": "user", "content": r["question"]}],
                "subset": None,
                "extra": None,
            }
            for i, r in enumerate(rows)
        ]
        sampler = Sampler(settings, pa.Table.from_pylist(prompts), model)
        sampler.backend = backend
        return measured(sampler, model.meter, backend, (0, 1), (1, len(rows)))
    from scir_cli import config
    from scir_cli.data import schemas
    from scir_cli.rewards.prompts import PAIRWISE
    from scir_cli.settings import JudgeSettings
    from scir_cli.stages.pairing import PairInput, candidate_pairs
    from scir_cli.stages.scoring import JudgePart, Scorer

    template = (
        Path(asked["folder"]) / f"{task}.txt"
    )  # another first word: nothing that an earlier task has read begins alike
    template.write_text(f"w{100 + asked['tasks'].index(task)} {PAIRWISE}")
    known = config.build(
        JudgeSettings, {**given, "reward_models": ["judge"], "judge_prompt": template}, where=""
    )
    scorer = Scorer(known, known)
    scorer.backend = backend
    scorer.model = model
    scorer.meter = model.meter
    if task == "shuffled":
        shuffle(backend)
    table = schemas.to_table("candidates", candidates(rows))
    pair_input = PairInput(table, [], Counter(), "", make_pairs=candidate_pairs)
    n = asked["answers"]
    return measured(JudgePart(scorer, pair_input), model.meter, backend, (0, n), (n, n * len(rows)))


def candidates(rows: list[Json]) -> list[Json]:
    return [
        {
            "candidate_id": f"{i}-{k}",
            "prompt_id": str(i),
            "messages": [{"role": "user", "content": row["question"]}],
            "subset": None,
            "response": text,
            "token_ids": ids,
            "finish_reason": "stop",
            "duplicate_of": None,
            "weights_key": "m",
            "seed": 0,
            "extra": None,
        }
        for i, row in enumerate(rows)
        for k, (text, ids) in enumerate(zip(row["answers"], row["answer_ids"], strict=True))
    ]


def shuffle(backend: Any) -> None:
    """From here on requests reach vLLM in another order; answers come back in the right one."""
    ask = backend._ask

    def shuffled(what: str, requests: list[Any]) -> Any:
        order = random.Random(0).sample(range(len(requests)), len(requests))
        answers = dict(zip(order, ask(what, [requests[i] for i in order]), strict=True))
        return [answers[i] for i in range(len(requests))]

    backend._ask = shuffled


def measured(
    make: Any, meter: Any, backend: Any, warm: tuple[int, int], rows: tuple[int, int]
) -> Json:
    """CPU seconds of this process and the backend's, and what the meter has counted."""
    make(*warm)
    meter.pop()
    before = cpu_seconds(backend), time.perf_counter()
    made = make(*rows).rows
    cpu, wall = cpu_seconds(backend) - before[0], time.perf_counter() - before[1]
    return {"rows": len(made), "cpu_seconds": cpu, "wall_seconds": wall, **meter.figures()}


def cpu_seconds(backend: Any) -> float:
    """Of this process, and of vLLM's where there is one."""
    own, child = time.process_time(), getattr(backend, "child", None)
    if child is None:
        return own
    fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
    return own + (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# ------------------------------ in the driver


def main() -> None:
    a = arguments()
    if a.child:
        print(json.dumps(run(json.loads(a.child))))
        return
    found: list[Json] = []
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder) / "model", a.shape, a.dtype, a.seed)
        size = SHAPES[a.shape][1].get("vocab_size", 32_000)
        rows = make_pairs(
            a.prompts, size, tuple(a.prompt_tokens), tuple(a.response_tokens), a.answers, a.seed
        )
        (Path(folder) / "rows.json").write_text(json.dumps(rows))
        common = {
            "model": str(model),
            "folder": folder,
            "rows": f"{folder}/rows.json",
            "dtype": a.dtype,
            "answers": a.answers,
        }
        common |= {"max_new_tokens": a.max_new_tokens}
        runs: list[tuple[str, str, list[str], list[str]]] = [
            ("transformers", sys.executable, [], ["generate", "judge"])
        ]
        if a.vllm_python:
            engine = ["enforce_eager=true", f"block_size={BLOCK}"]
            few = [*engine, f"num_gpu_blocks_override={a.small_cache // BLOCK}"]
            runs += [("vllm", a.vllm_python, engine, ["generate", "judge", "shuffled"])]
            runs += [
                (
                    f"vllm, {a.small_cache} tokens of cache",
                    a.vllm_python,
                    few,
                    ["judge", "shuffled"],
                )
            ]
        for name, python, vllm_arg, tasks in (r for r in runs if a.only in r[0]):
            asked = {
                **common,
                "backend": name.partition(",")[0],
                "vllm_arg": vllm_arg,
                "tasks": tasks,
            }
            found += [
                {"backend": name, "task": task, **record}
                for task, record in child("backends.py", asked, python).items()
            ]
            own = [shown(record) for record in found if record["backend"] == name]
            print(f"{name}: {json.dumps(own)}", file=sys.stderr, flush=True)
    print(table([shown(record) for record in found]))
    write(
        {
            "table": found,
            "versions": versions(),
            "arguments": {k: str(v) for k, v in vars(a).items()},
        },
        a.json,
    )


def shown(record: Json) -> Json:
    seconds, hits = record["cpu_seconds"], record["prefix_cache_hit_rate"]
    return {
        "task": record["task"],
        "backend": record["backend"],
        "rows": record["rows"],
        "CPU s": seconds,
        "rows/s": record["rows"] / seconds,
        "tokens read": record["tokens_read"],
        "read/s": record["tokens_read"] / seconds,
        "sampled/s": record["tokens_sampled"] / seconds if record["tokens_sampled"] else None,
        "cache hits": hits,
    }


if __name__ == "__main__":
    main()
