"""What the benchmarks share: a random model and pairs on disk, clocks and peaks, child processes,
tables.

Imports nothing of scir_cli: the other trainer's environment reads this file too. Every measurement
runs in a child process of its own, so that neither memory nor a warm cache of one run reaches the
next. On a CPU the time is CPU time of one thread, which other work on the machine changes least; on
a GPU it is wall time between synchronizations.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Json = dict[str, Any]

HERE = Path(__file__).parent
PAD, BOS, EOS, UNK = range(4)
#: The words of the chat template and of the judge's prompt; everything else is w17, w993 …
WORDS = [
    "user",
    "assistant",
    "Which",
    "answer",
    "to",
    "the",
    "question",
    "is",
    "better?",
    "Question:",
    "Answer",
    "A:",
    "B:",
    "Reply",
    "with",
    "A",
    "or",
    "B.",
    "B",
]
TEMPLATE = (
    "{% for message in messages %}{{ '<s> ' + message['role'] + ' ' + message['content'] + ' "
    "</s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s> assistant' }}{% endif %}"
)

#: A shape's name -> transformers' model type and settings.
SHAPES: dict[str, tuple[str, Json]] = {
    "tiny": (
        "llama",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "vocab_size": 500,
        },
    ),
    "S": (
        "llama",
        {
            "hidden_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "intermediate_size": 688,
        },
    ),
    "M": (
        "llama",
        {
            "hidden_size": 512,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "intermediate_size": 1376,
        },
    ),
    "1.5b": (  # Qwen2.5-1.5B
        "qwen2",
        {
            "hidden_size": 1536,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "intermediate_size": 8960,
            "vocab_size": 151_936,
            "tie_word_embeddings": True,
        },
    ),
    "8b": (  # Llama-3-8B
        "llama",
        {
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 14336,
            "vocab_size": 128_256,
        },
    ),
}
COMMON: Json = {
    "vocab_size": 32_000,
    "max_position_embeddings": 16_384,
    "tie_word_embeddings": False,
}
ENDS: Json = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}


# ------------------------------ inputs


def random_model(shape: str, dtype: str = "fp32", seed: int = 0, **overrides: Any) -> Any:
    """A model of random weights, made on the GPU if there is one."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, settings = SHAPES[shape]
    config = AutoConfig.for_model(kind, **(COMMON | ENDS | settings | overrides))
    torch.manual_seed(seed)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32
        )


def make_model(
    folder: Path, shape: str, dtype: str = "fp32", seed: int = 0, **overrides: Any
) -> Path:
    """Writes a model of random weights and a word-level tokenizer whose every id is one word of
    text.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = random_model(shape, dtype, seed, **overrides)
    model.save_pretrained(folder)
    make_tokenizer(model.config.vocab_size).save_pretrained(folder)
    return folder


def vocabulary(size: int) -> list[str]:
    words = ["<pad>", "<s>", "</s>", "<unk>", *WORDS]
    return [*words, *(f"w{i}" for i in range(len(words), size))]


def make_tokenizer(size: int) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(vocabulary(size))}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **ends)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_pairs(
    n: int,
    size: int,
    prompt: tuple[int, int] = (128, 256),
    response: tuple[int, int] = (64, 256),
    answers: int = 2,
    seed: int = 0,
) -> list[Json]:
    """Prompts with their answers, lengths in tokens drawn evenly from the ranges.

    Ids and the text that gives exactly these ids.
    """
    draw = random.Random(seed)
    words = vocabulary(size)
    index = {word: i for i, word in enumerate(words)}

    def body(low: int, high: int, spent: int) -> list[int]:
        return [
            draw.randrange(len(WORDS) + 4, size) for _ in range(draw.randint(low, high) - spent)
        ]

    def text(ids: list[int]) -> str:
        return " ".join(words[i] for i in ids)

    pairs = []
    for _ in range(n):
        question = body(*prompt, spent=5)
        replies = [body(*response, spent=1) for _ in range(answers)]
        before, after = [BOS, index["user"]], [EOS, BOS, index["assistant"]]
        pairs.append(
            {
                "question": text(question),
                "answers": [text(reply) for reply in replies],
                "prompt_ids": [*before, *question, *after],
                "answer_ids": [[*reply, EOS] for reply in replies],
            }
        )
    return pairs


# ------------------------------ clocks


class Meter:
    """CPU and wall seconds of each step, and the peak memory above what was there at the start."""

    def __init__(self, gpu: bool = True) -> None:
        """gpu: look for one, which imports torch."""
        cuda = importlib.import_module("torch").cuda if gpu else None
        self.cuda = cuda if cuda and cuda.is_available() else None
        self.seconds: list[tuple[float, float]] = []  # (CPU, wall) of each step

    def start(self) -> None:
        gc.collect()
        if self.cuda:
            self.cuda.reset_peak_memory_stats()
            self.resident = self.cuda.memory_allocated() / 2**20
        else:
            ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not hide what is used now
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
            self.resident = status_mb("VmRSS")
        self.last = self.now()

    def now(self) -> tuple[float, float]:
        if self.cuda:
            self.cuda.synchronize()
        return time.process_time(), time.perf_counter()

    def tick(self) -> None:
        """A step is over."""
        now = self.now()
        self.seconds.append((now[0] - self.last[0], now[1] - self.last[1]))
        self.last = now

    def result(self) -> Json:
        peak = self.cuda.max_memory_allocated() / 2**20 if self.cuda else status_mb("VmHWM")
        cpu, wall = zip(*self.seconds, strict=True)
        return {
            "device": self.cuda.get_device_name() if self.cuda else "cpu",
            "cpu_seconds": list(cpu),
            "wall_seconds": list(wall),
            "seconds": list(wall if self.cuda else cpu),  # what tables report
            "resident_mb": round(self.resident, 1),
            "peak_mb": round(peak - self.resident, 1),
        }


class AnonymousPeak:
    """The peak of memory that is not a file's pages, above what it was at the start, looked at
    every 5 ms: a file's pages are given back when others need them.
    """

    def __enter__(self) -> AnonymousPeak:
        self.before = self.highest = status_mb("RssAnon")
        self.over = threading.Event()
        self.watcher = threading.Thread(target=self._watch)
        self.watcher.start()
        return self

    def _watch(self) -> None:
        while not self.over.wait(0.005):
            self.highest = max(self.highest, status_mb("RssAnon"))
        self.seconds = time.thread_time()  # of looking

    def __exit__(self, *_: Any) -> None:
        self.over.set()
        self.watcher.join()

    @property
    def mb(self) -> float:
        return round(self.highest - self.before, 1)


def measured(work: Callable[[], Any]) -> tuple[Any, Json]:
    """What `work` gives, and what it took on a CPU: seconds, peaks."""
    meter = Meter(gpu=False)
    meter.start()
    with AnonymousPeak() as anonymous:
        given = work()
    meter.tick()
    found = meter.result()
    return given, {
        **found,
        "cpu_seconds": [found["cpu_seconds"][0] - anonymous.seconds],
        "anonymous_mb": anonymous.mb,
    }


def status_mb(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":"))


# ------------------------------ processes


def child(script: str, arguments: Json, python: str = sys.executable) -> Json:
    """What another process of `script` prints as its last line, read as JSON.

    Its settings go in as JSON too.
    """
    offline = {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [python, str(HERE / script), "--child", json.dumps(arguments)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**threads, **os.environ, **offline},
        check=False,
    )
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command[:2])} failed with status {done.returncode}:\n{done.stderr[-4000:]}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def versions(*packages: str) -> Json:
    from importlib.metadata import version

    return {
        "python": sys.version.split()[0],
        **{name: version(name) for name in ("torch", "transformers", *packages)},
    }


# ------------------------------ tables


def table(rows: Sequence[Json]) -> str:
    """Rows of one shape as a Markdown table."""
    head = list(rows[0])
    lines = [
        head,
        ["---" if i == 0 else "---:" for i in range(len(head))],
        *([cell(row[name]) for name in head] for row in rows),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(value: Any) -> str:
    if value is None:
        return "–"
    if not isinstance(value, float):
        return str(value)
    if abs(value) < 1e-12:
        return "0"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def write_page(path: Path, name: str, text: str) -> None:
    """Replaces the text between the markers NAME: begin and NAME: end of a page."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    page = path.read_text(encoding="utf-8")
    before, rest = page.split(begin)
    _, after = rest.split(end)
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def write(result: Json, path: Path | None) -> None:
    if path:
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
