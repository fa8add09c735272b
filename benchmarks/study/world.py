"""A world with gold labels: small instruction tasks whose quality a program computes, a tokenizer
and a random Llama for them, and data sets.

Four families. A response may begin with a phrase that means nothing, so its length says little
about its quality; how good a response is, is a number from 0 to 1. What a method trains on comes
from `seed_pairs` (labeled, few) and from its own answers to `prompts` (no label). `Gold` is the
only way to a label: it answers where somebody has said what for, and a test hands the study one
that raises outside evaluation.
"""

from __future__ import annotations

import contextlib
import json
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Json = dict[str, Any]
Draw = random.Random

END, USER, ASSISTANT = "<|end|>", "<|user|>", "<|assistant|>"
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
JUDGE_PROMPT = "{question}\nA {a}\nB {b}\n?"
#: How other reward models ask, where a world has them (Size.judges).
PROMPTS = {"rubric": "{question}\n{response}\n0-5?", "rationale": "{question}\nA {a}\nB {b}\nwhy?"}
#: Names of the models in a world's folder: the first, the same taught to answer and to judge, and
#: the file that teaches it.
CHAIN = ("random", "m0", "base")
#: Who answers the unlabeled prompts.
BACKEND = "transformers"
#: How answers are sampled where a policy is measured.
ANSWERS = {
    "sampled": {"n": 4, "temperature": 1.0, "top_p": 1.0},
    "greedy": {"n": 1, "temperature": 0.0},
}
PHRASES = (
    "",
    "ok ",
    "well then ",
)  # in front of an answer; they change its length and not its quality
CONSONANTS, VOWELS = "bdgkmp", "aeiou"


# ------------------------------ families


@dataclass(frozen=True)
class Family:
    """A kind of task.

    How a prompt is drawn, one right answer to it, and the quality of any answer.
    """

    prompt: Callable[[Draw], str]
    answer: Callable[[Draw, str], str]
    quality: Callable[[str, str], float]
    alphabet: str  # what a slip of the pen puts in


def positions(expected: Sequence[str], given: Sequence[str]) -> float:
    """Share of places that hold what they should, over the longer of the two."""
    return sum(a == b for a, b in zip(expected, given, strict=False)) / max(
        len(expected), len(given), 1
    )


def sort_prompt(draw: Draw) -> str:
    return "sort " + "".join(draw.choice("0123456789") for _ in range(draw.randint(3, 5)))


def sort_answer(draw: Draw, prompt: str) -> str:
    return "".join(sorted(prompt.split()[1]))


def add_prompt(draw: Draw) -> str:
    return "add " + "+".join(str(draw.randint(1, 9)) for _ in range(draw.randint(2, 4)))


def add_answer(draw: Draw, prompt: str) -> str:
    """The running totals: 3+9+4 -> 3,12,16."""
    total, steps = 0, []
    for term in prompt.split()[1].split("+"):
        total += int(term)
        steps.append(str(total))
    return ",".join(steps)


def drop_prompt(draw: Draw) -> str:
    word = "".join(draw.choice("abcde") for _ in range(draw.randint(4, 6)))
    return f"drop {draw.choice(word)} {word}"


def drop_answer(draw: Draw, prompt: str) -> str:
    _, letter, word = prompt.split()
    return word.replace(letter, "") or "-"


def spell_prompt(draw: Draw) -> str:
    return "spell " + "".join(draw.choice(CONSONANTS) for _ in range(draw.randint(2, 4)))


def spell_answer(draw: Draw, prompt: str) -> str:
    """The consonants given, each with a vowel that is not the one before.

    Kmp -> kamipa, kumope …; there are many right answers.
    """
    letters, last = "", ""
    for consonant in prompt.split()[1]:
        last = draw.choice(VOWELS.replace(last, "") if last else VOWELS)
        letters += consonant + last
    return letters


def spell_quality(prompt: str, answer: str) -> float:
    """Share of places that hold what the grammar allows there."""
    consonants = prompt.split()[1]
    fits = [
        letter in VOWELS and answer[i - 2 : i - 1] != letter
        if i % 2
        else letter == consonants[i // 2]
        for i, letter in enumerate(answer[: 2 * len(consonants)])
    ]
    return sum(fits) / max(len(answer), 2 * len(consonants))


def by_position(answer: Callable[[Draw, str], str], split: str = "") -> Callable[[str, str], float]:
    def quality(prompt: str, given: str) -> float:
        expected = answer(Draw(0), prompt)
        return (
            positions(expected.split(split), given.split(split))
            if split
            else positions(expected, given)
        )

    return quality


FAMILIES: dict[str, Family] = {
    "sort": Family(sort_prompt, sort_answer, by_position(sort_answer), "0123456789"),
    "add": Family(add_prompt, add_answer, by_position(add_answer, ","), "0123456789"),
    "drop": Family(drop_prompt, drop_answer, by_position(drop_answer), "abcde"),
    "spell": Family(spell_prompt, spell_answer, spell_quality, CONSONANTS + VOWELS),
}


def quality(prompt: str, response: str) -> float:
    """How good a response is, from 0 to 1; the phrase in front does not count."""
    body = next(
        (response.removeprefix(p) for p in reversed(PHRASES) if response.startswith(p)), response
    )
    return FAMILIES[prompt.split()[0]].quality(prompt, body)


@dataclass
class Gold:
    """The gold scorer.

    It answers only inside `purpose(...)` of one it was told to allow: nobody gets a label by
    accident.
    """

    allowed: tuple[str, ...]
    scorer: Callable[[str, str], float] = quality
    now: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def purpose(self, name: str) -> Iterator[None]:
        self.now.append(name)
        try:
            yield
        finally:
            self.now.pop()

    def __call__(self, prompt: str, response: str) -> float:
        if not self.now or self.now[-1] not in self.allowed:
            raise PermissionError(
                f"a gold label was asked for {self.now[-1] if self.now else 'nothing'}; "
                f"allowed: {', '.join(self.allowed)}"
            )
        return self.scorer(prompt, response)


def quality_of_rows(gold: Gold, candidates: Sequence[Json]) -> list[float]:
    """The gold quality of each row of a candidates dataset."""
    return [gold(row["messages"][-1]["content"], row["response"]) for row in candidates]


def scorer(size: Size) -> Callable[[str, str], float]:
    return quality


def of_answers(candidates: Sequence[Json], gold: Gold) -> Json:
    """Of answers that were sampled: their mean quality, and tokens."""
    with gold.purpose("evaluation"):
        scores = quality_of_rows(gold, candidates)
    return {
        "quality": statistics.fmean(scores),
        "tokens": statistics.fmean(len(row["token_ids"]) for row in candidates),
    }


# ------------------------------ responses


def noisy_answer(
    draw: Draw, prompt: str, slips: Sequence[float], systematic_error: float = 0.0
) -> str:
    """A right answer with 0, 1, 2 … slips of the pen, drawn with weights `slips`, behind one of the
    phrases.

    systematic_error: probability that its last letter is written three times.
    """
    family = FAMILIES[prompt.split()[0]]
    letters = list(family.answer(draw, prompt))
    for _ in range(draw.choices(range(len(slips)), slips)[0]):
        place, kind = draw.randrange(len(letters)), draw.randrange(4)
        if kind == 0:  # two letters change places
            other = draw.randrange(len(letters))
            letters[place], letters[other] = letters[other], letters[place]
        elif kind == 1 and len(letters) > 1:
            del letters[place]
        elif kind == 2:
            letters.insert(place, draw.choice(family.alphabet))
        else:
            letters[place] = draw.choice(family.alphabet)
    if systematic_error and draw.random() < systematic_error:
        letters += 2 * letters[-1:]
    return draw.choice(PHRASES) + "".join(letters)


def draw_prompts(draw: Draw, n: int, taken: set[str], families: Sequence[str]) -> list[str]:
    """n prompts of the families in turn.

    While a family has new ones, none that is in `taken`, which grows.
    """
    found = []
    for i in range(n):
        family = FAMILIES[families[i % len(families)]]
        for _ in range(20):
            prompt = family.prompt(draw)
            if prompt not in taken:
                break
        taken.add(prompt)
        found.append(prompt)
    return found


def labeled_pair(
    draw: Draw,
    prompt: str,
    slips: Sequence[float],
    noise: float = 0.0,
    length_bias: float = 0.0,
    systematic_error: float = 0.0,
) -> Json | None:
    """Two noisy answers of different quality, the better one chosen; None where none was found.

    noise: chance that the label is turned round. length_bias: chance that the longer one is chosen
    whatever its quality. systematic_error: as in `noisy_answer`.
    """
    for _ in range(20):
        one, other = (noisy_answer(draw, prompt, slips, systematic_error) for _ in range(2))
        better, worse = quality(prompt, one), quality(prompt, other)
        if one != other and better != worse:
            break
    else:
        return None
    if better < worse:
        one, other = other, one
    if draw.random() < noise:
        one, other = other, one
    if draw.random() < length_bias and len(other) > len(one):
        one, other = other, one
    return {"prompt": prompt, "chosen": one, "rejected": other, "subset": prompt.split()[0]}


def lesson(draw: Draw, judge: str, pair: Json) -> Json:
    """A row that teaches a rubric's score of one answer (its quality in fifths), or a rationale
    (both scores, then the verdict), and a wrong one beside it.
    """
    seats = draw.sample([pair["chosen"], pair["rejected"]], 2)
    scores = [round(5 * quality(pair["prompt"], answer)) for answer in seats]
    if judge == "rubric":
        asked = {"response": seats[0]}
        right, wrong = (
            str(scores[0]),
            str(draw.choice([score for score in range(6) if score != scores[0]])),
        )
    else:
        asked = {"a": seats[0], "b": seats[1]}
        verdicts = ("A", "B") if seats[0] == pair["chosen"] else ("B", "A")
        right, wrong = (
            f"A {scores[0]} B {scores[1]}\n\nVerdict: {verdict}" for verdict in verdicts
        )
    return {
        "prompt": PROMPTS[judge].format(question=pair["prompt"], **asked),
        "chosen": right,
        "rejected": wrong,
        "subset": judge,
    }


@dataclass(frozen=True)
class Size:
    """How large a world is; everything that scales its cost."""

    families: tuple[str, ...] = ("sort", "drop", "spell")
    hidden: int = 96
    layers: int = 3
    n_base: int = 16000  # pairs that M_0 is made from: noisy answers, and which is better
    n_seed: int = 600  # labeled pairs that are drawn
    n_labels: int = 600  # of them, those that anybody sees
    n_prompts: int = 256  # unlabeled prompts
    n_heldout: int = 600  # labeled pairs for measuring
    n_test: int = 200  # prompts for measuring the policy
    slips: tuple[float, ...] = (0.3, 0.3, 0.25, 0.15)
    label_noise: float = 0.0
    length_bias: float = 0.0
    position_bias: float = 0.0  # nats that M_0's judge is given for seat A
    # share of all answers that have the systematic error, so that the policy finds it likely
    systematic_error: float = 0.0
    judges: tuple[
        str, ...
    ] = ()  # of PROMPTS: what else M_0 is taught, each by as many of its pairs as a family has


def write(folder: Path, size: Size, seed: int) -> None:
    """Data sets of one world (base, seed, prompts, heldout, test), the prompt of each of its
    judges, and a random model in random/.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draw, taken = Draw(seed), set[str]()
    heldout = draw_prompts(draw, size.n_heldout, taken, size.families)
    test = draw_prompts(draw, size.n_test, taken, size.families)
    error = size.systematic_error
    pairs = [labeled_pair(draw, p, size.slips, 0, 0, error) for p in heldout]
    seeds = [
        labeled_pair(draw, p, size.slips, size.label_noise, size.length_bias, error)
        for p in draw_prompts(draw, size.n_seed, set(taken), size.families)
    ]
    answers = draw_prompts(draw, size.n_base, set(taken), size.families)
    base = [pair for p in answers if (pair := labeled_pair(draw, p, size.slips, 0, 0, error))]
    kinds = [*["answer"] * len(size.families), *size.judges]
    taught = [(kinds[i % len(kinds)], pair) for i, pair in enumerate(base)]
    rows = {
        "base": [pair if kind == "answer" else lesson(draw, kind, pair) for kind, pair in taught],
        "seed": [pair for pair in seeds if pair][: size.n_labels],
        "heldout": [pair for pair in pairs if pair],
        "prompts": [
            {"prompt": p} for p in draw_prompts(draw, size.n_prompts, set(taken), size.families)
        ],
        "test": [{"prompt": p} for p in test],
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
        )
    for judge in ("judge", *size.judges):
        (folder / f"{judge}.txt").write_text(
            {"judge": JUDGE_PROMPT, **PROMPTS}[judge], encoding="utf-8"
        )
    make_model(folder / "random", size, seed)


# ------------------------------ model


def make_model(folder: Path, size: Size, seed: int) -> Path:
    """An ordinary Llama folder with random weights and a tokenizer that gives every byte a
    token.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = make_tokenizer()
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=8 * size.hidden // 3 // 8 * 8,
        num_hidden_layers=size.layers,
        num_attention_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def plant_position_bias(folder: Path, prompts: Sequence[str], nats: float) -> None:
    """Has the model in `folder` favor seat A at the verdict.

    The row of A in its head moves along the mean hidden state there, h, by nats h / (h h).
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    states = []
    with torch.no_grad():
        for prompt in prompts:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
            states.append(
                model.model(
                    **tokenizer(text, return_tensors="pt", add_special_tokens=False)
                ).last_hidden_state[0, -1]
            )
        mean = torch.stack(states).mean(0)
        model.get_output_embeddings().weight[tokenizer.convert_tokens_to_ids("A")] += (
            nats * mean / (mean @ mean)
        )
    model.save_pretrained(folder)


def make_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END,
        pad_token=END,
        extra_special_tokens=[USER, ASSISTANT],
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer
