"""eval mt-bench: answers to questions of several turns, each graded alone by a local model (MT-Bench's single-answer grading, arXiv 2306.05685).

OUT/answers.jsonl   the answers in FastChat's form, so that its tools can grade them too; OUT/turn-N-T holds what was sampled at temperature T
OUT/                a `scores` dataset: one row a question and turn

Left out on purpose: grades parsed from a judge's prose. A grade here is the mean over the judge's probabilities of 1 to 10 [ours].
"""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scir_cli.analysis.consistency import rounded_json
from scir_cli.analysis.statistics import mean_interval
from scir_cli.data import dataset, files, hashing, readers
from scir_cli.data.dataset import Part
from scir_cli.data.files import Json
from scir_cli.engine.chat import Chat
from scir_cli.engine.lazy_policy import LazyPolicy
from scir_cli.engine.trees import Branch, continuation
from scir_cli.errors import DataError
from scir_cli.report import html
from scir_cli.report.progress import progress
from scir_cli.rewards import log_odds
from scir_cli.rewards.prompts import fill, question_text
from scir_cli.settings import EvalMtBenchSettings
from scir_cli.stages.sampling import write_candidates

Row = dict[str, Any]
Answers = dict[str, list[str]]  # question id -> the answers, first turn first

#: FastChat's sampling temperature of each category; its default for others.
TEMPERATURES = {
    "writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1, "humanities": 0.1,
}  # fmt: skip
TEMPERATURE = 0.7
GRADES = range(1, 11)

#: MT-Bench's criteria, in our words.
GRADE = """Grade an assistant's answer. Weigh how helpful, relevant, accurate, deep, creative and detailed it is. Be objective: length is no merit.

{reference}{conversation}

Grade the last answer only. Reply with the grade alone, a whole number from 1 (worst) to 10 (best)."""


def run(settings: EvalMtBenchSettings) -> Json:
    """Writes a grade for each question and turn and returns the manifest; means are under "summary"."""
    out = settings.output_dir
    questions, dropped = load_questions(settings.input, settings.limit)
    model = LazyPolicy(settings, settings.model) if settings.model else None
    # The model that grades its own answers is hashed and loaded once.
    grades_itself = model is not None and settings.judge in (None, settings.model)
    judge = (
        model if model and grades_itself else LazyPolicy(settings, settings.judge or settings.model)
    )
    plan = {
        "stage": "eval mt-bench",
        "settings": settings.plan(),
        "input": readers.digest(settings.input),
        "judge": judge.weights_key,
    }
    plan |= (
        {"model": model.weights_key}
        if model
        else {"answers": readers.digest(settings.answers or "")}
    )
    n = sum(len(q["turns"]) for q in questions)
    if settings.dry_run:
        return {"dry_run": True, "plan": plan, "rows_in": n + dropped.total()}

    def make(low: int, high: int) -> Part:
        answers = (
            answer(questions, settings, model) if model else load_answers(settings.answers or "")
        )
        if model and model is not judge:
            # Its weights leave the memory before those of the judge are read.
            model.unload()
        write_answers(out / "answers.jsonl", answers, settings.answers or settings.model)
        rows = grade(questions, answers, judge, settings.max_tokens_per_pack)
        return Part(rows, n, +Counter(not_answered=n - len(rows)))

    def summarise(made: dataset.Dataset) -> Json:
        return summary([row for table in made.tables() for row in table.to_pylist()])

    manifest = dataset.write_dataset(
        out,
        "scores",
        plan,
        [(0, 1)],
        make,
        overwrite=settings.overwrite,
        dropped_before=dropped,
        summarise=summarise,
        inputs={
            "input": settings.input,
            "model": settings.model or None,
            "answers": settings.answers,
            "judge": settings.judge,
        },
    )
    html.write_for("eval mt-bench", settings)
    return manifest


# ------------------------------------------------------------------------------------------------------------- questions and answers


def load_questions(spec: str, limit: int | None) -> tuple[list[Row], Counter[str]]:
    """FastChat's question.jsonl: question_id, category, turns, and a reference for each turn where there is one. Drops: duplicate_question (turns)."""
    found: dict[str, Row] = {}
    dropped: Counter[str] = Counter()
    for number, row in enumerate(_lines(spec)[:limit], 1):
        turns: Any = row.get("turns")
        reference: Any = row.get("reference") or []
        if (
            not _texts(turns)
            or row.get("question_id") is None
            or (reference and not _texts(reference))
        ):
            raise DataError(
                f"{spec}, row {number}: expected 'question_id', and 'turns' (and any 'reference') as lists of texts; it has {', '.join(row)}"
            )
        if str(row["question_id"]) in found:
            dropped["duplicate_question"] += len(turns)
            continue
        found[str(row["question_id"])] = {
            "id": str(row["question_id"]), "category": row.get("category"), "turns": turns, "reference": reference,
        }  # fmt: skip
    if not found:
        raise DataError(f"{spec} holds no question")
    return list(found.values()), dropped


def load_answers(spec: str) -> Answers:
    """FastChat's model_answer file: the first choice of each question."""
    found: Answers = {}
    for number, row in enumerate(_lines(spec), 1):
        try:
            turns = row["choices"][0]["turns"]
            found.setdefault(str(row["question_id"]), turns)
        except (KeyError, IndexError, TypeError):
            turns = None
        if not _texts(turns):
            raise DataError(
                f"{spec}, row {number}: expected FastChat's answers, {{question_id, choices: [{{turns: [text, …]}}]}}; it has {', '.join(row)}"
            )
    return found


def _lines(spec: str) -> list[Row]:
    try:
        rows = [
            json.loads(line)
            for line in Path(spec).read_text(encoding="utf-8").split("\n")
            if line.strip()
        ]
    except (OSError, ValueError) as error:
        raise DataError(f"{spec} is not readable JSON lines ({error})") from error
    if not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{spec} should hold one JSON object a line")
    return rows


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def write_answers(path: Path, answers: Answers, model: str) -> None:
    rows = [
        {
            "question_id": name,
            "model_id": Path(model).name,
            "choices": [{"index": 0, "turns": turns}],
        }
        for name, turns in answers.items()
    ]
    with files.atomic_write(path) as temporary:
        temporary.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
        )


def answer(questions: list[Row], settings: EvalMtBenchSettings, model: LazyPolicy) -> Answers:
    """The model's answers, turn by turn: each turn sees the answers to those before it. A question ends where one did not fit."""
    answers: Answers = {q["id"]: [] for q in questions}
    for turn in range(max(len(q["turns"]) for q in questions)):
        by_temperature: dict[float, list[Row]] = {}
        for q in questions:
            if turn < len(q["turns"]) and len(answers[q["id"]]) == turn:
                chosen = (
                    TEMPERATURES.get(q["category"], TEMPERATURE)
                    if settings.temperature is None
                    else settings.temperature
                )
                by_temperature.setdefault(chosen, []).append(q)
        for temperature, group in by_temperature.items():
            asked = {q["id"]: dialogue(q, answers[q["id"]], turn)[:-1] for q in group}
            chosen_settings = settings.model_copy(update={"temperature": temperature})
            said = _sampled(
                list(asked.values()), f"turn-{turn + 1}-{temperature}", chosen_settings, model
            )
            for name, messages in asked.items():
                response = said.get(_key(messages))
                answers[name] += [] if response is None else [response]
    return answers


def dialogue(question: Row, answers: list[str], turn: int) -> list[Row]:
    """The conversation up to the answer of a turn; an answer that is not there yet is empty."""
    said = [*answers, *[""] * (turn + 1 - len(answers))]
    sides = [
        (("user", q), ("assistant", a))
        for q, a in zip(question["turns"][: turn + 1], said, strict=False)
    ]
    return [{"role": role, "content": text} for side in sides for role, text in side]


def _sampled(
    conversations: list[list[Row]], name: str, settings: EvalMtBenchSettings, model: LazyPolicy
) -> dict[str, str]:
    """One response to each conversation, by its key. It resumes as `generate` does, and equal conversations are sampled once.

    name: of the candidates dataset in the output folder that holds the responses.
    """
    folder = settings.output_dir
    prompts = folder / f"{name}.jsonl"
    with files.atomic_write(prompts) as temporary:
        temporary.write_text(
            "".join(json.dumps({"messages": m}) + "\n" for m in conversations), encoding="utf-8"
        )
    changes = {
        "input": str(prompts),
        "output_dir": folder / name,
        "limit": None,
        "overwrite": False,
    }
    write_candidates(settings.model_copy(update=changes), model)
    turns = 1 if settings.system_prompt else 0  # the system turn that sampling put first
    return {
        _key(row["messages"][turns:]): row["response"]
        for row in dataset.read_dataset(folder / name, "candidates").to_pylist()
    }


def _key(messages: list[Row]) -> str:
    return hashing.digest_json([[m["role"], m["content"]] for m in messages])


# ---------------------------------------------------------------------------------------------------------------------------- grades


def grade(questions: list[Row], answers: Answers, judge: LazyPolicy, max_tokens: int) -> list[Row]:
    """One row for each answer; its value is null where the conversation does not fit into the judge's context."""
    asked = [
        (
            q,
            turn,
            branches(
                judge.chat, dialogue(q, answers[q["id"]], turn), q["reference"][turn : turn + 1]
            ),
        )
        for q in questions
        for turn in range(min(len(q["turns"]), len(answers.get(q["id"], []))))
    ]
    fits = [max(len(b.ids) for b in group) <= judge.context_length for _, _, group in asked]
    groups = [group for (_, _, group), fit in zip(asked, fits, strict=True) if fit]
    with progress("grading", len(groups)) as advance:
        scored = []
        for logps in judge.load().score(groups, max_tokens) if groups else ():
            scored.append(expected_grade(logps))
            advance(1)
    values = iter(scored)
    rows = []
    for (q, turn, _), fit in zip(asked, fits, strict=True):
        value, mass = next(values) if fit else (None, None)
        detail = json.dumps({"turn": turn + 1, "mass": mass})
        rows.append(
            {
                "example_id": q["id"],
                "subset": q["category"],
                "metric": f"turn {turn + 1}",
                "value": value,
                "detail": detail,
            }
        )
    return rows


def branches(chat_: Chat, conversation: list[Row], reference: list[str]) -> list[Branch]:
    """A branch for each grade: its digits and the end of the turn, so that 1 is not the beginning of 10."""
    known = f"A reference answer to the last question: {reference[0]}\n\n" if reference else ""
    ask = fill(GRADE, reference=known, conversation=question_text(conversation))
    prompt = chat_.prompt_ids(ask)
    return [continuation(prompt, chat_.response_ids(ask, str(grade))) for grade in GRADES]


def expected_grade(logps: torch.Tensor) -> tuple[float, float]:
    """The mean grade over the probabilities of 1 to 10, and their sum.  logps: (10,) nats"""
    steps, mass = log_odds.expected_score(logps)
    return GRADES[0] + float(steps), float(mass)


def summary(rows: list[Row]) -> Json:
    """Mean grade of the questions, a question's being that of its turns, with its interval: overall, by turn and by category."""

    def mean(part: list[Row]) -> Json:
        of_question: dict[str, list[float]] = {}
        for row in part:
            of_question.setdefault(row["example_id"], []).extend(
                [] if row["value"] is None else [row["value"]]
            )
        means = np.array([np.mean(grades) for grades in of_question.values() if grades])
        return {"grades": sum(map(len, of_question.values())), **mean_interval("grade", means)}

    masses = [m for row in rows if (m := json.loads(row["detail"])["mass"]) is not None]
    turns, categories = (
        list(dict.fromkeys(row[key] for row in rows)) for key in ("metric", "subset")
    )
    unfit = sum(row["value"] is None for row in rows)
    notes = (
        [f"{unfit} answers do not fit into the judge's context and have no grade"] if unfit else []
    )
    figures = {
        "all": mean(rows),
        "turns": {turn: mean([row for row in rows if row["metric"] == turn]) for turn in turns},
        "categories": {
            str(c): mean([row for row in rows if row["subset"] == c]) for c in categories
        },
        "mean_mass": float(np.mean(masses)) if masses else math.nan,
    }
    return rounded_json(figures) | {"notes": notes}
