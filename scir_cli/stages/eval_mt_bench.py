"""eval mt-bench: a local model grades answers to questions of several turns.

Each answer is graded alone (MT-Bench's single-answer grading, arXiv 2306.05685).

OUT/turn-N-T        responses to turn N at sampling temperature T, as `generate` writes them
OUT/answers.jsonl   the answers in FastChat's form, which its tools can grade as well
OUT/                a `scores` dataset: one row per question and turn

Not included: grades parsed from a judge's prose. A grade here is the mean over the judge's
probabilities of 1 to 10 [ours].
"""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from scir_cli.analysis.consistency import rounded_json
from scir_cli.analysis.statistics import mean_interval
from scir_cli.data import dataset, files, hashing, readers
from scir_cli.data.dataset import Part
from scir_cli.data.files import Json
from scir_cli.data.storage import to_path
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

#: Question id -> its answers, the first turn's first.
Answers = dict[str, list[str]]

#: FastChat's sampling temperature for each category.
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
#: FastChat's temperature for all other categories.
TEMPERATURE = 0.7

GRADES = range(1, 11)

#: The judge's prompt: MT-Bench's criteria, in our words.
GRADE = (
    "Grade an assistant's answer. Weigh how helpful, relevant, accurate, deep, creative and "
    "detailed it is. Be objective: length is no merit.\n\n"
    "{reference}{conversation}\n\n"
    "Grade the last answer only. Reply with the grade alone, a whole number from 1 (worst) to "
    "10 (best)."
)


def run(settings: EvalMtBenchSettings) -> Json:
    """Writes a grade per question and turn; returns the manifest, with means under "summary"."""
    questions, dropped = load_questions(settings.input, settings.limit)
    model, judge = _model_and_judge(settings)
    plan: Json = {
        "stage": "eval mt-bench",
        "settings": settings.plan(),
        "input": readers.digest(settings.input),
        "judge": judge.weights_key,
    }
    if model:
        plan["model"] = model.weights_key
    else:
        plan["answers"] = readers.digest(settings.answers or "")

    n_turns = sum(len(question["turns"]) for question in questions)
    if settings.dry_run:
        return {"dry_run": True, "plan": plan, "rows_in": n_turns + dropped.total()}

    def make(low: int, high: int) -> Part:
        if model:
            answers = answer(questions, settings, model)
        else:
            answers = load_answers(settings.answers or "")
        if model and model is not judge:
            # Frees the model's memory before the judge's weights are read.
            model.unload()
        path = settings.output_dir / "answers.jsonl"
        write_answers(path, answers, settings.answers or settings.model)
        rows = grade(questions, answers, judge, settings.max_tokens_per_pack)
        n_missing = n_turns - len(rows)
        return Part(rows, n_turns, +Counter(not_answered=n_missing))

    def summarize(written: dataset.Dataset) -> Json:
        rows = []
        for table in written.tables():
            rows += table.to_pylist()
        return summary(rows)

    manifest = dataset.write_dataset(
        settings.output_dir,
        "scores",
        plan,
        [(0, 1)],
        make,
        overwrite=settings.overwrite,
        dropped_before=dropped,
        summarize=summarize,
        inputs={
            "input": settings.input,
            "model": settings.model or None,
            "answers": settings.answers,
            "judge": settings.judge,
        },
    )
    html.write_for("eval mt-bench", settings)
    return manifest


def _model_and_judge(settings: EvalMtBenchSettings) -> tuple[LazyPolicy | None, LazyPolicy]:
    """The model that answers (None with --answers), and the model that grades.

    They are one object if the model grades its own answers: it is hashed and loaded once.
    """
    model = None
    if settings.model:
        model = LazyPolicy(settings, settings.model)
        if settings.judge in (None, settings.model):
            return model, model

    judge = LazyPolicy(settings, settings.judge or settings.model)
    return model, judge


# ------------------------------------------------------------------------ questions and answers


def load_questions(spec: str, limit: int | None) -> tuple[list[Row], Counter[str]]:
    """The questions of a FastChat question.jsonl, and the dropped turns by reason.

    A row has question_id, category, turns, and optionally a reference answer per turn. A repeated
    question_id is dropped as duplicate_question.
    Raises DataError if a row has another form or there is no question.
    """
    questions: dict[str, Row] = {}
    dropped: Counter[str] = Counter()
    rows = _lines(spec)[:limit]
    for number, row in enumerate(rows, 1):
        turns: Any = row.get("turns")
        reference: Any = row.get("reference") or []
        has_turns = _is_texts(turns)
        has_id = row.get("question_id") is not None
        is_reference = not reference or _is_texts(reference)
        if not (has_turns and has_id and is_reference):
            raise DataError(
                f"{spec}, row {number}: expected 'question_id', and 'turns' (and any 'reference') "
                f"as lists of texts; it has {', '.join(row)}"
            )

        name = str(row["question_id"])
        if name in questions:
            dropped["duplicate_question"] += len(turns)
            continue
        questions[name] = {
            "id": name,
            "category": row.get("category"),
            "turns": turns,
            "reference": reference,
        }
    if not questions:
        raise DataError(f"{spec} holds no question; expected FastChat's question.jsonl")
    return list(questions.values()), dropped


def load_answers(spec: str) -> Answers:
    """The first choice of each question in a FastChat model_answer file.

    Raises DataError if a row has another form.
    """
    answers: Answers = {}
    for number, row in enumerate(_lines(spec), 1):
        try:
            turns = row["choices"][0]["turns"]
            answers.setdefault(str(row["question_id"]), turns)
        except (KeyError, IndexError, TypeError):
            turns = None
        if not _is_texts(turns):
            raise DataError(
                f"{spec}, row {number}: expected FastChat's answers, "
                f"{{question_id, choices: [{{turns: [text, …]}}]}}; it has {', '.join(row)}"
            )
    return answers


def _lines(spec: str) -> list[Row]:
    """The objects of a JSON lines file; raises DataError for any other file."""
    rows = []
    try:
        text = to_path(spec).read_text(encoding="utf-8-sig")
        for line in text.split("\n"):
            if line.strip():
                rows.append(json.loads(line))
    except (OSError, ValueError) as error:
        raise DataError(f"{spec} is not readable JSON lines ({error})") from error

    if not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{spec} should hold one JSON object per line")
    return rows


def _is_texts(value: Any) -> bool:
    """True for a list of one or more texts."""
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(text, str) for text in value)


def write_answers(path: Path, answers: Answers, model: str) -> None:
    """Writes answers as a FastChat model_answer file.  model: path or hub id"""
    rows = []
    for name, turns in answers.items():
        rows.append(
            {
                "question_id": name,
                "model_id": Path(model).name,
                "choices": [{"index": 0, "turns": turns}],
            }
        )
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    _write_text(path, text)


def _write_text(path: Path, text: str) -> None:
    with files.atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def answer(questions: list[Row], settings: EvalMtBenchSettings, model: LazyPolicy) -> Answers:
    """The model's answers, sampled turn by turn: a turn's prompt has the earlier answers.

    If a turn's prompt does not fit into the context, its question has no further answers.
    """
    answers: Answers = {question["id"]: [] for question in questions}
    n_turns = max(len(question["turns"]) for question in questions)
    for turn in range(n_turns):
        by_temperature = _questions_of_turn(questions, answers, turn, settings)
        for temperature, group in by_temperature.items():
            conversations = {}
            for question in group:
                name = question["id"]
                messages = dialogue(question, answers[name], turn)
                conversations[name] = messages[:-1]

            responses = _sample(
                list(conversations.values()),
                f"turn-{turn + 1}-{temperature}",
                settings.model_copy(update={"temperature": temperature}),
                model,
            )
            for name, messages in conversations.items():
                response = responses.get(_key(messages))
                if response is not None:
                    answers[name].append(response)
    return answers


def _questions_of_turn(
    questions: list[Row], answers: Answers, turn: int, settings: EvalMtBenchSettings
) -> dict[float, list[Row]]:
    """Sampling temperature -> the questions with this turn and answers to all earlier turns."""
    by_temperature: dict[float, list[Row]] = {}
    for question in questions:
        has_turn = turn < len(question["turns"])
        n_answers = len(answers[question["id"]])
        if has_turn and n_answers == turn:
            temperature = _temperature(question, settings)
            by_temperature.setdefault(temperature, []).append(question)
    return by_temperature


def _temperature(question: Row, settings: EvalMtBenchSettings) -> float:
    """--temperature, else FastChat's for the question's category."""
    if settings.temperature is not None:
        return settings.temperature
    return TEMPERATURES.get(question["category"], TEMPERATURE)


def dialogue(question: Row, answers: list[str], turn: int) -> list[Row]:
    """The messages up to and including the answer to a turn (from 0).

    An answer that does not exist yet is empty.
    """
    n_turns = turn + 1
    missing = [""] * (n_turns - len(answers))
    replies = [*answers, *missing]
    turns = question["turns"][:n_turns]
    messages = []
    for text, reply in zip(turns, replies, strict=False):
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": reply})
    return messages


def _sample(
    conversations: list[list[Row]], name: str, settings: EvalMtBenchSettings, model: LazyPolicy
) -> dict[str, str]:
    """One response per conversation, by `_key` of its messages.

    It resumes as `generate` does. Equal conversations are sampled once.
    name: of the candidates dataset in the output folder that holds the responses
    """
    folder = settings.output_dir
    prompts = folder / f"{name}.jsonl"
    text = "".join(json.dumps({"messages": messages}) + "\n" for messages in conversations)
    _write_text(prompts, text)
    changes = {
        "input": str(prompts),
        "output_dir": folder / name,
        "limit": None,
        "overwrite": False,
    }
    write_candidates(settings.model_copy(update=changes), model)

    # Sampling puts the system message first; the keys are without it.
    n_system = 1 if settings.system_prompt else 0
    responses = {}
    candidates = dataset.read_dataset(folder / name, "candidates")
    for row in candidates.to_pylist():
        messages = row["messages"][n_system:]
        responses[_key(messages)] = row["response"]
    return responses


def _key(messages: list[Row]) -> str:
    """A digest of the roles and contents of messages."""
    turns = []
    for message in messages:
        turns.append([message["role"], message["content"]])
    return hashing.digest_json(turns)


# ------------------------------------------------------------------------ grades


class _Answer(NamedTuple):
    """An answer to grade: its question, its turn (from 0), and a branch per grade."""

    question: Row
    turn: int
    branches: list[Branch]

    @property
    def n_tokens(self) -> int:
        """Tokens of the longest branch."""
        return max(len(branch.ids) for branch in self.branches)


def grade(questions: list[Row], answers: Answers, judge: LazyPolicy, max_tokens: int) -> list[Row]:
    """One score row per answer; null if the conversation exceeds the judge's context.

    max_tokens: per forward pass
    """
    to_grade = _answers_to_grade(questions, answers, judge.chat)
    groups = []
    for item in to_grade:
        if item.n_tokens <= judge.context_length:
            groups.append(item.branches)
    scores = iter(_grade_groups(groups, judge, max_tokens))

    rows = []
    for item in to_grade:
        fits = item.n_tokens <= judge.context_length
        value, mass = next(scores) if fits else (None, None)
        rows.append(_score_row(item, value, mass))
    return rows


def _answers_to_grade(questions: list[Row], answers: Answers, chat: Chat) -> list[_Answer]:
    """Every answer with its branches, in the order of questions and turns."""
    to_grade = []
    for question in questions:
        replies = answers.get(question["id"], [])
        n_answered = min(len(question["turns"]), len(replies))
        for turn in range(n_answered):
            conversation = dialogue(question, replies, turn)
            reference = question["reference"][turn : turn + 1]
            prompts = branches(chat, conversation, reference)
            to_grade.append(_Answer(question, turn, prompts))
    return to_grade


def _score_row(item: _Answer, value: float | None, mass: float | None) -> Row:
    """A row of the scores dataset.  value: the grade; mass: of the judge's probabilities"""
    turn = item.turn + 1
    return {
        "example_id": item.question["id"],
        "subset": item.question["category"],
        "metric": f"turn {turn}",
        "value": value,
        "detail": json.dumps({"turn": turn, "mass": mass}),
    }


def _grade_groups(
    groups: list[list[Branch]], judge: LazyPolicy, max_tokens: int
) -> list[tuple[float, float]]:
    """The expected grade and the probability mass of each group of ten branches."""
    scores = []
    with progress("grading", len(groups)) as advance:
        # The judge is not loaded if there is nothing to grade.
        if groups:
            policy = judge.load()
            for logps in policy.score(groups, max_tokens):
                scores.append(expected_grade(logps))
                advance(1)
    return scores


def branches(chat: Chat, conversation: list[Row], reference: list[str]) -> list[Branch]:
    """A branch for each grade from 1 to 10, to score in one tree.

    A branch has the grade's digits and the end of the turn, which separates 1 from 10.
    reference: the reference answer to the last question, or empty
    """
    preamble = ""
    if reference:
        preamble = f"A reference answer to the last question: {reference[0]}\n\n"
    turns = question_text(conversation, quoted=True)
    text = fill(GRADE, reference=preamble, conversation=turns)
    answers = chat.answer_options([str(grade) for grade in GRADES])
    prompt = answers.prompt_ids(chat.prompt_ids(text))
    return [continuation(prompt, ending) for ending in answers.endings]


def expected_grade(logps: torch.Tensor) -> tuple[float, float]:
    """The mean grade over the probabilities of 1 to 10, and the sum of these probabilities.

    logps: (10,) nats
    """
    steps, mass = log_odds.expected_score(logps)
    return GRADES[0] + float(steps), float(mass)


# ------------------------------------------------------------------------ figures


def summary(rows: list[Row]) -> Json:
    """The mean grade with its interval: overall, by turn and by category.

    A question's grade is the mean over its turns; the intervals are over questions.
    """
    masses = []
    for row in rows:
        mass = json.loads(row["detail"])["mass"]
        if mass is not None:
            masses.append(mass)

    figures = {
        "all": _mean_grade(rows),
        "turns": _mean_grades(rows, "metric"),
        "categories": _mean_grades(rows, "subset"),
        "mean_mass": float(np.mean(masses)) if masses else math.nan,
    }
    notes = []
    n_too_long = sum(row["value"] is None for row in rows)
    if n_too_long:
        notes.append(f"{n_too_long} answers do not fit into the judge's context and have no grade")
    return rounded_json(figures) | {"notes": notes}


def _mean_grades(rows: list[Row], column: str) -> Json:
    """`_mean_grade` for each value of a column, in order of first appearance."""
    parts: dict[Any, list[Row]] = {}
    for row in rows:
        parts.setdefault(row[column], []).append(row)

    figures = {}
    for value, part in parts.items():
        figures[str(value)] = _mean_grade(part)
    return figures


def _mean_grade(rows: list[Row]) -> Json:
    """The number of grades, and the mean over questions with its interval."""
    by_question: dict[str, list[float]] = {}
    n_grades = 0
    for row in rows:
        value = row["value"]
        if value is not None:
            n_grades += 1
            by_question.setdefault(row["example_id"], []).append(value)

    means = [np.mean(grades) for grades in by_question.values()]
    return {"grades": n_grades, **mean_interval("grade", np.array(means))}
