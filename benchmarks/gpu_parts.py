"""The parts of first_gpu_hour.py: each is a process and writes one record at a time.

    python benchmarks/gpu_parts.py PART RECORDS '{"tiny": true, "seconds": 60}'

RECORDS is a file of JSON lines: what is measured before a failure or the time limit is kept.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import ENDS, HERE, Json, Meter, child, make_model, make_pairs, make_tokenizer
from common import random_model as make_random_model

#: Lengths of prompts and responses in tokens, and pairs per step.
LENGTHS: dict[str, tuple[tuple[int, int], tuple[int, int], int]] = {
    "short": ((128, 256), (64, 256), 8),
    "medium": ((512, 1024), (256, 512), 4),
    "long": ((2048, 3072), (256, 512), 2),
}
TINY_LENGTHS: dict[str, tuple[tuple[int, int], tuple[int, int], int]] = {
    "short": ((12, 20), (6, 12), 2),
    "medium": ((24, 40), (6, 12), 2),
    "long": ((40, 60), (6, 12), 1),
}
KINDS = ("scir_tree_varlen", "scir_tree_flex", "scir_tree")


class Part:
    """What a part has to know: the file of its records, its options and its time."""

    def __init__(self, path: Path, options: Json) -> None:
        self.path = path
        self.started = time.monotonic()
        self.tiny = bool(options.get("tiny"))
        self.seconds = float(options.get("seconds", 600))

    def record(self, **values: Any) -> None:
        """Appends a record to the file."""
        line = json.dumps({"at_seconds": round(time.monotonic() - self.started, 1), **values})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line[:400], flush=True)

    @property
    def over(self) -> bool:
        """Whether nothing new should be started: a sixth of the time is kept for what runs."""
        return time.monotonic() - self.started > self.seconds * 5 / 6

    def attempt(self, name: str, work: Callable[[], Json], **labels: Any) -> None:
        """Records what `work` returns, or the end of its traceback; skipped when time is over."""
        if self.over:
            self.record(name=name, **labels, skipped="no time left")
            return
        try:
            values = work()
        except Exception:  # whatever breaks, the next measurement runs
            values = {"error": traceback.format_exc()[-1500:]}
        self.record(name=name, **labels, **values)
        free_memory()

    def lengths(self) -> dict[str, tuple[tuple[int, int], tuple[int, int], int]]:
        return TINY_LENGTHS if self.tiny else LENGTHS


def free_memory() -> None:
    gc.collect()
    cuda = importlib.import_module("torch").cuda
    if cuda.is_available():
        cuda.empty_cache()


def synchronize() -> None:
    cuda = importlib.import_module("torch").cuda
    if cuda.is_available():
        cuda.synchronize()


def median_ms(work: Callable[[], Any], warmup: int = 3, counted: int = 5) -> float:
    """Median wall time of `work` in milliseconds, between synchronizations."""
    times = []
    for i in range(warmup + counted):
        synchronize()
        start = time.perf_counter()
        work()
        synchronize()
        if i >= warmup:
            times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


# ------------------------------ environment


def environment(part: Part) -> None:
    """The machine, the versions, what can be imported, and which tree attention works."""
    part.record(name="machine", **machine())
    part.record(name="versions", **installed())
    part.attempt("varlen_attn", varlen_signature)
    for kind in KINDS:
        part.attempt("attention", lambda kind=kind: attention_error(kind, part), kind=kind)
    part.attempt("chosen", lambda: {"kind": load_policy("tiny", "bf16").tree_attention})


def machine() -> Json:
    """What nvidia-smi and torch report of the device."""
    import torch

    query = "--query-gpu=name,driver_version,memory.total,power.limit,clocks.max.sm"
    try:
        command = ["nvidia-smi", query, "--format=csv,noheader"]
        smi = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        smi = "nvidia-smi is not available"
    cuda = torch.cuda.is_available()
    return {
        "nvidia_smi": smi,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "capability": list(torch.cuda.get_device_capability()) if cuda else None,
        "cuda": torch.version.cuda,
        "cpus": os.cpu_count(),
        "platform": platform.platform(),
    }


def installed() -> Json:
    """Versions of the packages that matter, and the error of each import of scir_cli that fails."""
    from importlib.metadata import PackageNotFoundError, version

    names = "torch triton transformers accelerate peft pydantic datasets trl pyarrow numpy typer"
    versions: Json = {"python": sys.version.split()[0]}
    for name in names.split():
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    for name in ("engine.tree_attention", "engine.loading", "training.trainer", "cli"):
        try:
            importlib.import_module(f"scir_cli.{name}")
        except Exception as error:
            versions[f"scir_cli.{name}"] = f"{type(error).__name__}: {error}"
    return {"versions": versions}


def varlen_signature() -> Json:
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    return {"signature": str(inspect.signature(varlen_attn))}


def tree_inputs(part: Part, heads: int, key_heads: int, size: int, tokens: int) -> Any:
    """A forest of two prompts with three answers each, its layout, and q, k, v with gradients."""
    import numpy as np
    import torch

    from scir_cli.engine import trees
    from scir_cli.engine.tree_attention import TreeLayout

    draw = np.random.default_rng(0)

    def ids(n: int) -> list[int]:
        return [int(i) for i in draw.integers(4, 400, n)]

    branches = []
    for _ in range(2):
        prompt = ids(tokens)
        branches += [trees.continuation(prompt, ids(tokens // 2)) for _ in range(3)]
    forest = trees.build(branches)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    n = len(forest)
    q, k, v = (
        torch.randn(1, h, n, size, device=device, dtype=dtype, requires_grad=True)
        for h in (heads, key_heads, key_heads)
    )
    return forest, TreeLayout.of(forest, device), (q, k, v)


def attention_error(kind: str, part: Part) -> Json:
    """Differences to a plain masked softmax in fp32, forward and backward. Needs no pydantic."""
    import torch

    from scir_cli.engine import trees

    forest, layout, inputs = tree_inputs(part, 4, 2, 64, 24 if part.tiny else 300)
    if kind == "scir_tree_flex" and not inputs[0].is_cuda:
        return {"skipped": "FlexAttention has no backward pass on a CPU"}
    if kind == "scir_tree_varlen" and not inputs[0].is_cuda:
        return {"skipped": "flash attention needs CUDA"}
    seen = torch.from_numpy(trees.visible(forest)).to(inputs[0].device)
    exact = [x.detach().float().requires_grad_() for x in inputs]
    k, v = (x.repeat_interleave(2, dim=1) for x in exact[1:])
    scores = exact[0] @ k.transpose(-1, -2) / 8  # the root of the head size
    want = (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(1, 2)
    start = time.perf_counter()
    got, _ = attention_function(kind)(torch.nn.Module(), *inputs, None, scaling=1 / 8, plan=layout)
    slope = torch.randn_like(want)
    gradients = torch.autograd.grad((got.float() * slope).sum(), inputs)
    synchronize()
    seconds = time.perf_counter() - start
    expected = torch.autograd.grad((want * slope).sum(), exact)
    return {
        "output_error": relative(got, want),
        "gradient_errors": [relative(g, e) for g, e in zip(gradients, expected, strict=True)],
        "first_call_seconds": round(seconds, 2),
    }


def relative(got: Any, want: Any) -> float:
    """Norm of the difference over the norm."""
    return float((got.float() - want.float()).norm() / want.float().norm())


def attention_function(kind: str) -> Callable[..., Any]:
    """The tree attention of this kind as transformers calls it."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from scir_cli.engine import tree_attention

    tree_attention.register()
    return ALL_ATTENTION_FUNCTIONS[kind]


# ------------------------------ tests


def tests(part: Part) -> None:
    """The tests that need a GPU, several at a time if xdist is there; with --tiny another one."""
    chosen = ["-k", "variable_length_call and llama"] if part.tiny else ["-m", "gpu"]
    files = ["tests/test_attention.py"] + ([] if part.tiny else ["tests/test_on_a_gpu.py"])
    several = not part.tiny and importlib.util.find_spec("xdist") is not None
    options = ["-v", "-o", "filterwarnings=default", "-p", "no:cacheprovider", "--tb=short"]
    options += ["-n", "6"] if several else []
    report, output = part.path.with_suffix(".xml"), part.path.with_suffix(".txt")
    command = [sys.executable, "-m", "pytest", *chosen, *options, f"--junitxml={report}", *files]
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "2"}
    with output.open("w") as file:
        process = subprocess.Popen(
            command, cwd=HERE.parent, stdout=file, stderr=subprocess.STDOUT, env=environment
        )
        try:
            process.wait(timeout=max(1.0, part.seconds - 10))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    text = output.read_text(errors="replace")
    print(text[-40_000:])
    if report.exists():
        for record in test_outcomes(report):
            part.record(**record)
        return
    part.record(name="pytest", error=text[-1500:])
    for line in text.splitlines():
        outcome = next((o for o in ("PASSED", "FAILED", "SKIPPED", "ERROR") if o in line), None)
        if outcome and "::" in line:
            name = line.partition("::")[2].split(" ")[0]
            part.record(name=name, outcome=outcome.lower().replace("error", "failed"))


def test_outcomes(report: Path) -> Iterator[Json]:
    """A record per test of a JUnit report."""
    for case in ElementTree.parse(report).iter("testcase"):
        bad = [child for child in case if child.tag in ("failure", "error")]
        skipped = case.find("skipped") is not None
        outcome = "failed" if bad else "skipped" if skipped else "passed"
        record = {
            "name": case.get("name"),
            "outcome": outcome,
            "seconds": float(case.get("time", 0)),
        }
        yield record | ({"error": (bad[0].text or "")[-1800:]} if bad else {})


# ------------------------------ models


def load_policy(shape: str, dtype: str, lora_rank: int = 0, seed: int = 0) -> Any:
    """A policy of random weights that never was on a disk, set up as `loading.load` does."""
    import torch
    from transformers import GenerationConfig

    from scir_cli.engine import loading
    from scir_cli.engine.chat import Chat
    from scir_cli.engine.policy import Policy
    from scir_cli.engine.tree_attention import register
    from scir_cli.training import adapters

    model = make_random_model(shape, dtype, seed).eval()
    model.generation_config = GenerationConfig()
    attention = model.config._attn_implementation
    if lora_rank:
        with tempfile.TemporaryDirectory() as folder:
            settings = train_settings({"lora_rank": lora_rank, "dtype": dtype}, folder)
        with torch.device(model.device):
            model = adapters.add_adapters(model, settings)
    chat = Chat(make_tokenizer(model.config.vocab_size), frozenset({ENDS["eos_token_id"]}))
    policy = Policy(model, chat, "start", Path("random"), attention)
    register()
    policy.tree_attention = loading.select_tree_attention(policy)
    return policy


def train_settings(values: Json, folder: str) -> Any:
    import engine

    defaults = {
        "model": "random",
        "dtype": "bf16",
        "objective": "dpo",
        "batch_size": 4,
        "steps": 8,
        "learning_rate": 1e-6,
        "beta": 0.1,
    }
    return engine.settings({**defaults, **values}, folder)


# ------------------------------ training

WARMUP, COUNTED = 3, 5


@contextmanager
def without_sharing(policy: Any) -> Iterator[None]:
    """Within it every branch is laid out by itself: packed sequences without sharing."""
    from scir_cli.engine import policy as policy_module
    from scir_cli.engine import trees

    build = trees.build

    def one_by_one(branches: Sequence[Any]) -> Any:
        return joined([build([branch]) for branch in branches])

    policy_module.trees.build = one_by_one
    try:
        yield
    finally:
        policy_module.trees.build = build


def joined(forests: Sequence[Any]) -> Any:
    """One forest that holds these one after the other and shares nothing between them."""
    import numpy as np

    from scir_cli.engine.trees import Forest, Segment

    starts = np.cumsum([0, *(len(f) for f in forests)])
    branches = np.cumsum([0, *(f.n_branches for f in forests)])
    segments: list[Any] = []
    for forest, start in zip(forests, starts, strict=False):
        base = len(segments)
        segments += [
            Segment(int(s.start + start), int(s.end + start), tuple(a + base for a in s.ancestors))
            for s in forest.segments
        ]

    def chain(name: str, shift: Any = None) -> Any:
        parts = [getattr(f, name) for f in forests]
        return np.concatenate([p + (0 if shift is None else shift[i]) for i, p in enumerate(parts)])

    return Forest(
        tokens=chain("tokens"),
        positions=chain("positions"),
        subtree_end=chain("subtree_end", starts),
        segments=tuple(segments),
        target_hidden=chain("target_hidden", starts),
        target_token=chain("target_token"),
        target_branch=chain("target_branch", branches),
        n_branches=int(branches[-1]),
    )


def engine_steps(policy: Any, rows: list[Json], values: Json, length: str) -> Json:
    """Steps of the package's own trainer; values: settings; `shared` False for plain packs."""
    import engine

    from scir_cli.training import objectives
    from scir_cli.training.objectives import Example
    from scir_cli.training.trainer import Trainer

    shared = values.pop("shared", True)
    steps, batch_size = WARMUP + COUNTED, len(rows) // (WARMUP + COUNTED)
    with tempfile.TemporaryDirectory() as folder:
        settings = train_settings({**values, "steps": steps, "batch_size": batch_size}, folder)
        pairs = [p for i, row in enumerate(rows) for p in engine.pairs_of(row, str(i))]
        engine.remember(policy, pairs, settings.max_tokens_per_pack)
        objective = objectives.TABLE[settings.objective](
            settings, policy.chat, engine.START, engine.EARLIER
        )
        examples = [Example(pair, label=1) for pair in pairs]
        if settings.objective == "scir":
            examples = [Example(pair) for pair in pairs]
        batches = [examples[i : i + batch_size] for i in range(0, len(examples), batch_size)]
        counts = [engine.count(objective, batch) for batch in batches]
        if not shared:
            counts = [plain_counts(objective, batch, everywhere=False) for batch in batches]
        meter = Meter()
        meter.start()
        ordered = engine.in_trainer_order(examples, settings.seed)
        trainer = Trainer(policy, objective, ordered, settings, Path(folder))
        meter.last = meter.now()

        def see(step: int, figures: Json) -> None:
            if "loss" in figures:
                meter.tick()

        if shared:
            trainer.train(see)
        else:
            with without_sharing(policy):
                trainer.train(see)
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    log = [record for record in map(json.loads, lines) if record["kind"] == "train"]
    if settings.gradient_checkpointing:
        policy.model.gradient_checkpointing_disable()
        policy.model.eval()
    kept = {key: [record[key] for record in log] for key in ("packs", "memory_splits", "tokens")}
    return figures_of(policy, meter, counts, [r["loss"] for r in log]) | kept | {"length": length}


def plain_counts(objective: Any, batch: Sequence[Any], everywhere: bool) -> Json:
    """As engine.count, of sequences that share nothing; everywhere: the head visits every token."""
    branches = [branch for example in batch for branch in objective.branches(example)]
    lengths = [len(branch.ids) for branch in branches]
    rows = sum(lengths) if everywhere else sum(len(b.target_tokens) for b in branches)
    return {
        "tokens": sum(lengths),
        "rows": rows,
        "keys": sum(n * (n + 1) // 2 for n in lengths),
        "sequence_tokens": sum(n + 1 for n in lengths),
    }


def figures_of(policy: Any, meter: Meter, counts: list[Json], losses: list[float]) -> Json:
    """Medians over the counted steps. Frozen weights need no gradient: 2 passes instead of 3."""
    import engine

    measured = meter.result()
    counted = counts[WARMUP:]
    seconds = statistics.median(measured["seconds"][WARMUP:])
    frozen = any(not p.requires_grad for p in policy.model.parameters())
    flops = [engine.train_flops(policy.model, c) * (2 / 3 if frozen else 1) for c in counted]
    mean = {key: statistics.fmean(c[key] for c in counted) for key in counted[0]}
    return {
        "seconds": seconds,
        "all_seconds": [round(s, 4) for s in measured["seconds"]],
        "peak_gb": (measured["peak_mb"] + measured["resident_mb"]) / 1024,
        "tokens_computed": mean["tokens"],
        "sequence_tokens": mean["sequence_tokens"],
        "sequence_tokens_per_second": mean["sequence_tokens"] / seconds,
        "flops": statistics.fmean(flops),
        "losses": [round(loss, 6) for loss in losses],
        "device": measured["device"],
        "tree_attention": policy.tree_attention,
    }


def padded_steps(
    policy: Any, rows: list[Json], length: str, *, everywhere: bool, checkpointing: bool = False
) -> Json:
    """DPO in padded batches of chosen and rejected with precomputed reference log-probabilities.

    everywhere: logits at all positions; else at response positions only, as TRL does on CUDA.
    The optimizer is the package's own, so that only the scoring differs.
    """
    import engine
    import torch
    import torch.nn.functional as F

    from scir_cli.training import objectives
    from scir_cli.training.objectives import Example
    from scir_cli.training.optimizer import MasterAdamW

    batch_size = len(rows) // (WARMUP + COUNTED)
    with tempfile.TemporaryDirectory() as folder:
        settings = train_settings({"batch_size": batch_size}, folder)
    pairs = [p for i, row in enumerate(rows) for p in engine.pairs_of(row, str(i))]
    engine.remember(policy, pairs, settings.max_tokens_per_pack)
    objective = objectives.TABLE["dpo"](settings, policy.chat, engine.START, engine.EARLIER)
    examples = [Example(pair, label=1) for pair in pairs]
    batches = [examples[i : i + batch_size] for i in range(0, len(examples), batch_size)]
    counts = [plain_counts(objective, batch, everywhere) for batch in batches]
    model = policy.model
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.train()
    losses, meter = [], Meter()
    meter.start()
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = MasterAdamW(params, lr=settings.learning_rate, weight_decay=0.0)
    with policy.plain_attention_mode():
        meter.last = meter.now()
        for batch in batches:
            optimizer.zero_grad()
            logps = padded_logps(policy, objective, batch, everywhere)  # (pairs, 2)
            stored = [e.pair.reference_logps[engine.START] for e in batch]
            ratios = logps - torch.tensor(stored, device=logps.device)
            loss = -F.logsigmoid(settings.beta * (ratios[:, 0] - ratios[:, 1])).mean()
            loss.backward()
            optimizer.update(settings.max_grad_norm)
            losses.append(float(loss.detach()))
            meter.tick()
    if checkpointing:
        model.gradient_checkpointing_disable()
        model.eval()
    return figures_of(policy, meter, counts, losses) | {"length": length}


def padded_logps(policy: Any, objective: Any, batch: Sequence[Any], everywhere: bool) -> Any:
    """Summed log-probabilities of chosen and rejected, from one padded batch.  -> (pairs, 2)"""
    import torch

    branches = [branch for example in batch for branch in objective.branches(example)]
    longest = max(len(b.ids) for b in branches)
    padded = [[*b.ids, *[0] * (longest - len(b.ids))] for b in branches]
    seen = [[1] * len(b.ids) + [0] * (longest - len(b.ids)) for b in branches]
    ids, mask = (torch.tensor(x, device=policy.device) for x in (padded, seen))
    core = policy.scorer.core
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    sums = []
    states = core(**inputs).logits if everywhere else core.base_model(**inputs).last_hidden_state
    for row, branch in zip(states, branches, strict=True):
        at = torch.tensor(branch.target_positions, device=row.device)
        token = torch.tensor(branch.target_tokens, device=row.device)
        if everywhere:
            logps = row.log_softmax(-1)[at].float()  # row by row, in bf16, as TRL does
        else:
            logps = core.get_output_embeddings()(row[at]).float().log_softmax(-1)
        sums.append(logps.gather(1, token[:, None]).sum())
    return torch.stack(sums).view(-1, 2)


def train_rows(part: Part, policy: Any, length: str, pairs: int | None = None) -> list[Json]:
    prompt, response, batch_size = part.lengths()[length]
    n = (WARMUP + COUNTED) * (pairs or batch_size)
    return make_pairs(n, policy.model.config.vocab_size, prompt, response)


def train(part: Part) -> None:
    """Steps at the shape of Qwen2.5-1.5B, all weights trained: trees, SCIR, packed, padded."""
    policy = load_policy("tiny" if part.tiny else "1.5b", "bf16")
    part.record(name="loaded", kind=policy.tree_attention, parameters=parameters(policy))
    measure_training(part, policy, ["medium", "long", "short"], {})
    rows = train_rows(part, policy, "medium")
    # Last, because the compiled layers stay compiled.
    for objective in ("dpo", "scir"):
        values = {"objective": objective, "compile": True}
        part.attempt(
            f"scir train, {objective.upper()}, compiled",
            lambda values=values: engine_steps(policy, rows, dict(values), "medium"),
            checkpointing=False,
        )


def train_large(part: Part) -> None:
    """Steps at the shape of Llama-3-8B with LoRA adapters of rank 16."""
    policy = load_policy("tiny" if part.tiny else "8b", "bf16", lora_rank=16)
    part.record(name="loaded", kind=policy.tree_attention, parameters=parameters(policy))
    measure_training(part, policy, ["medium"], {"lora_rank": 16}, pairs=2)


def parameters(policy: Any) -> int:
    return sum(p.numel() for p in policy.model.parameters())


def measure_training(
    part: Part, policy: Any, lengths: list[str], extra: Json, pairs: int | None = None
) -> None:
    """Every way of taking a step at each length; recomputation of activations at the first."""
    for length in lengths[:1] if part.tiny else lengths:
        rows = train_rows(part, policy, length, pairs)
        at_length(part, policy, rows, length, extra)
        if length == lengths[0]:
            with_recomputation(part, policy, rows, length, extra)


def at_length(part: Part, policy: Any, rows: list[Json], length: str, extra: Json) -> None:
    for name, values in (
        ("scir train, DPO", {"objective": "dpo"}),
        ("scir train, SCIR", {"objective": "scir"}),
        ("packed without sharing, DPO", {"objective": "dpo", "shared": False}),
    ):
        part.attempt(
            name,
            lambda values=values: engine_steps(policy, rows, extra | values, length),
            checkpointing=False,
        )
    for name, everywhere in (("padded, response logits", False), ("padded, all logits", True)):
        part.attempt(
            name,
            lambda every=everywhere: padded_steps(policy, rows, length, everywhere=every),
            checkpointing=False,
        )


def with_recomputation(part: Part, policy: Any, rows: list[Json], length: str, extra: Json) -> None:
    for objective in ("dpo", "scir"):
        values = extra | {"objective": objective, "gradient_checkpointing": True}
        part.attempt(
            f"scir train, {objective.upper()}",
            lambda values=values: engine_steps(policy, rows, dict(values), length),
            checkpointing=True,
        )
    part.attempt(
        "padded, response logits",
        lambda: padded_steps(policy, rows, length, everywhere=False, checkpointing=True),
        checkpointing=True,
    )


# ------------------------------ head, profile


def head(part: Part) -> None:
    """The head by itself: chunk sizes and kept probabilities, beside torch's own cross entropy."""
    import torch

    width, vocabulary, n = (32, 500, 64) if part.tiny else (1536, 151_936, 3072)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    linear = torch.nn.Linear(width, vocabulary, bias=False, device=device, dtype=dtype)
    hidden = torch.randn(n, width, device=device, dtype=dtype, requires_grad=True)
    tokens = torch.randint(vocabulary, (n,), device=device)
    part.attempt("torch's cross entropy", lambda: timed_step(lambda: plain(linear, hidden, tokens)))
    for chunk in (24, 26, 28, 30):
        for keep in (28, 30, 32):
            part.attempt(
                "target_logps",
                lambda chunk=chunk, keep=keep: timed_step(
                    lambda: chunked(linear, hidden, tokens, 2**chunk, 2**keep)
                ),
                log2_chunk_elements=chunk,
                log2_keep_bytes=keep,
            )


def plain(linear: Any, hidden: Any, tokens: Any) -> Any:
    import torch.nn.functional as F

    return F.cross_entropy(linear(hidden).float(), tokens, reduction="sum")


def chunked(linear: Any, hidden: Any, tokens: Any, chunk: int, keep: int) -> Any:
    """The head's loss with other bounds on its chunks and on what it keeps."""
    from types import SimpleNamespace

    import numpy as np

    from scir_cli.engine import lm_head

    before = lm_head.CHUNK_ELEMENTS, lm_head.KEEP_BYTES
    lm_head.CHUNK_ELEMENTS = {"cpu": chunk, "cuda": chunk}
    lm_head.KEEP_BYTES = {"cpu": keep, "cuda": keep}
    rows = np.arange(len(tokens))
    forest: Any = SimpleNamespace(target_hidden=rows, target_token=tokens.cpu().numpy())
    try:
        transform = lm_head.LogitTransform()
        return -lm_head.target_logps(hidden, linear, transform, forest).sum()
    finally:
        lm_head.CHUNK_ELEMENTS, lm_head.KEEP_BYTES = before


def timed_step(loss: Callable[[], Any]) -> Json:
    """Milliseconds of forward and backward, and the peak of memory above what was there."""
    meter = Meter()
    meter.start()
    ms = median_ms(lambda: loss().backward(), 2, 3)
    meter.tick()
    return {"ms": ms, "peak_gb": meter.result()["peak_mb"] / 1024, "loss": float(loss().detach())}


def profile(part: Part) -> None:
    """Kernels of a DPO and a SCIR step at 1.5B by device time, and the step's time on the host."""
    policy = load_policy("tiny" if part.tiny else "1.5b", "bf16")
    rows = train_rows(part, policy, "medium")
    for objective in ("dpo", "scir"):
        values = {"objective": objective}
        part.attempt(objective, lambda v=values: profiled(policy, rows, v), length="medium")


def profiled(policy: Any, rows: list[Json], values: Json) -> Json:
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    cuda = torch.cuda.is_available()
    plain = engine_steps(policy, rows, dict(values), "medium")
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    with torch_profile(activities=activities) as found:
        engine_steps(policy, rows, dict(values), "medium")
    attribute = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = sorted(found.key_averages(), key=lambda e: -getattr(e, attribute))
    total = sum(getattr(e, attribute) for e in events) / 1000
    top = [
        {"name": e.key[:100], "ms": getattr(e, attribute) / 1000, "calls": e.count}
        for e in events[:40]
    ]
    host = sorted(found.key_averages(), key=lambda e: -e.self_cpu_time_total)
    host_top = [
        {"name": e.key[:100], "ms": e.self_cpu_time_total / 1000, "calls": e.count}
        for e in host[:25]
    ]
    return {
        "steps": WARMUP + COUNTED,
        "seconds_per_step": plain["seconds"],
        "total_ms": total,
        "top": top,
        "host_top": host_top,
    }


# ------------------------------ judge, generate


def judge(part: Part) -> None:
    """All pairs of 5 answers, both orders, implicit reward: by trees, padded, one by one."""
    from functools import partial

    import engine
    import score
    import torch

    from scir_cli.rewards import reward_models

    policy = load_policy("tiny" if part.tiny else "1.5b", "bf16")
    with tempfile.TemporaryDirectory() as folder:
        settings = train_settings({"objective": "scir"}, folder)
    models = reward_models.make(["judge", "implicit"], policy.chat, settings)
    prompt, response, _ = part.lengths()["short" if part.tiny else "medium"]
    rows = make_pairs(
        WARMUP + COUNTED, policy.model.config.vocab_size, prompt, response, 3 if part.tiny else 5
    )
    jobs = [
        [reward_models.all_branches(models, pair) for pair in engine.pairs_of(row, str(i))]
        for i, row in enumerate(rows)
    ]

    def measure(method: str, size: int, work: Callable[..., list[float]]) -> Json:
        times, logps, meter = [], [], Meter()
        meter.start()
        with torch.no_grad():
            for groups in jobs:
                logps += work(policy, groups, size)
                meter.tick()
        figures = meter.result()
        times = figures["seconds"][WARMUP:]
        tokens = [score.tokens_computed(method, groups, size) for groups in jobs[WARMUP:]]
        own = [sum(map(len, score.distinct_paths(groups))) for groups in jobs[WARMUP:]]
        return {
            "seconds": statistics.median(times),
            "all_seconds": figures["seconds"],
            "pairs_per_second": len(jobs[0]) / statistics.median(times),
            "tokens_computed": statistics.fmean(tokens),
            "sequence_tokens": statistics.fmean(own),
            "peak_gb": (figures["peak_mb"] + figures["resident_mb"]) / 1024,
            "logps": logps[: len(logps) // len(jobs)],
        }

    plain_way = partial(score.by_batches, everywhere=False)
    for method, size, work in (
        ("trees", 8192, score.by_trees),
        ("trees", 32_768, score.by_trees),
        ("padded", 8, plain_way),
        ("padded", 32, plain_way),
        ("one by one", 1, plain_way),
    ):
        part.attempt(method, lambda m=method, s=size, w=work: measure(m, s, w), size=size)


def generate(part: Part) -> None:
    """Sampling with the transformers backend.

    Random weights make flat distributions, whose nucleus takes a full sort; at temperature 0.05
    they are as peaked as a trained model's.
    """
    policy = load_policy("tiny" if part.tiny else "1.5b", "bf16")
    sizes = (4,) if part.tiny else (64, 16, 256)
    for batch_size, temperature in [*((n, 0.05) for n in sizes), (sizes[0], 0.0), (sizes[0], 0.8)]:
        part.attempt(
            "generate",
            lambda n=batch_size, t=temperature: sampled(part, policy, n, t),
            batch_size=batch_size,
            temperature=temperature,
        )


def sampled(part: Part, policy: Any, batch_size: int, temperature: float) -> Json:
    """One batch of answers, four per prompt."""
    from types import SimpleNamespace

    from scir_cli.backends import Request, Sampling
    from scir_cli.backends.transformers import TransformersBackend

    prompt, response, _ = part.lengths()["short"]
    rows = make_pairs(batch_size // 4, policy.model.config.vocab_size, prompt, response)
    ids = [tuple(row["prompt_ids"]) for row in rows]
    requests = [Request(x, 4 * i + k) for i, x in enumerate(ids) for k in range(4)]
    model = SimpleNamespace(load=lambda: policy)
    TransformersBackend(model, Sampling(temperature, 0.95, 4, batch_size)).generate(requests)
    sampling = Sampling(temperature, 0.95, 8 if part.tiny else 128, batch_size)
    backend = TransformersBackend(model, sampling)
    meter = Meter()
    meter.start()
    done = backend.generate(requests)
    meter.tick()
    figures = meter.result()
    n_tokens = sum(len(completion.token_ids) for completion in done)
    seconds = figures["seconds"][0]
    return {
        "seconds": seconds,
        "requests": len(requests),
        "tokens_sampled": n_tokens,
        "sampled_per_second": n_tokens / seconds,
        "peak_gb": (figures["peak_mb"] + figures["resident_mb"]) / 1024,
    }


# ------------------------------ attention


def attention(part: Part) -> None:
    """One layer's attention of a 1.5B model on trees, by kind: forward and backward."""
    import torch

    heads, key_heads, size = (4, 2, 16) if part.tiny else (12, 2, 128)
    for tokens in (24,) if part.tiny else (512, 2048):
        _, layout, inputs = tree_inputs(part, heads, key_heads, size, tokens)
        for kind in KINDS:
            if not inputs[0].is_cuda and kind != "scir_tree":
                continue
            function = attention_function(kind)

            def step(function: Any = function, layout: Any = layout, inputs: Any = inputs) -> None:
                out, _ = function(torch.nn.Module(), *inputs, None, plan=layout)
                torch.autograd.grad(out.float().sum(), inputs)

            def work(step: Any = step) -> Json:
                start = time.perf_counter()
                step()
                synchronize()
                first = time.perf_counter() - start
                return {"first_call_seconds": first, "ms": median_ms(step)}

            n = inputs[0].shape[2]
            part.attempt("attention", work, kind=kind, tokens=n, prompt_tokens=tokens)
    part.attempt("flex at new lengths", lambda: flex_recompiles(part))


def flex_recompiles(part: Part) -> Json:
    """Seconds of the first call at other lengths: whether dynamic shapes compile again."""
    import torch

    function = attention_function("scir_tree_flex")
    seconds = []
    for tokens in (300, 411, 777, 1000):
        _, layout, inputs = tree_inputs(part, 12, 2, 128, tokens)
        if not inputs[0].is_cuda:
            return {"skipped": "needs CUDA"}
        synchronize()
        start = time.perf_counter()
        out, _ = function(torch.nn.Module(), *inputs, None, plan=layout)
        torch.autograd.grad(out.float().sum(), inputs)
        synchronize()
        seconds.append(round(time.perf_counter() - start, 3))
    return {"first_call_seconds": seconds}


# ------------------------------ TRL


def trl(part: Part) -> None:
    """TRL's own DPOTrainer at the shape of Qwen2.5-1.5B: bf16 autocast over fp32 weights."""
    for name in ("trl", "datasets"):
        if importlib.util.find_spec(name) is None:
            part.record(name="trl", skipped=f"the package {name} is missing")
            return
    with tempfile.TemporaryDirectory() as folder:
        shape = "tiny" if part.tiny else "1.5b"
        model = make_model(Path(folder) / "model", shape, "bf16")
        free_memory()
        for length in ("medium", "short"):
            prompt, response, batch_size = part.lengths()[length]
            n = (WARMUP + COUNTED) * batch_size
            size = 500 if part.tiny else 151_936
            pairs = Path(folder) / "pairs.json"
            pairs.write_text(json.dumps(make_pairs(n, size, prompt, response)))
            settings = {
                "model": str(model),
                "pairs": str(pairs),
                "dtype": "bf16",
                "steps": WARMUP + COUNTED,
                "batch_size": batch_size,
                "learning_rate": 1e-6,
                "beta": 0.1,
                "implementation": "trl",
            }
            part.attempt("trl", lambda s=settings: trl_figures(s), length=length)


def trl_figures(settings: Json) -> Json:
    try:
        run = child("trl_step.py", settings)
    except SystemExit as error:
        return {"error": str(error)[-1500:]}
    seconds = statistics.median(run["seconds"][WARMUP:])
    peak = (run["peak_mb"] + run["resident_mb"]) / 1024
    return {"seconds": seconds, "peak_gb": peak, "losses": run["losses"], "all": run["seconds"]}


PARTS: dict[str, Callable[[Part], None]] = {
    "environment": environment,
    "tests": tests,
    "train": train,
    "head": head,
    "judge": judge,
    "train-large": train_large,
    "profile": profile,
    "generate": generate,
    "attention": attention,
    "trl": trl,
}


def main() -> None:
    name, path, options = sys.argv[1:]
    PARTS[name](Part(Path(path), json.loads(options)))


if __name__ == "__main__":
    main()
