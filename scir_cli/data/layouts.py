"""Layouts of input rows that people have -> the columns that `readers` reads.

conversations        messages of {from, value} (ShareGPT); with `chosen` and `rejected` as
                     {from, value}, a pair
question             a prompt, where no other column holds one
two answers          `answer_a` and `answer_b` (or `response_…`, `output_…`, `…_1` and `…_2`) with
                     a `winner`: a pair; a tie is a drop
conversation_a, _b   two conversations with a `winner` (Chatbot Arena, MT-bench): a pair
completions          answers with an `overall_score` (UltraFeedback): the best and the worst; a
                     tie is a drop
completion, label    unpaired feedback (KTO), which is refused
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from scir_cli.errors import DataError

Row = dict[str, Any]

#: Names of authors in ShareGPT's conversations -> roles
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "observation": "tool",
}

#: Columns of two answers, of which `winner` names one
ANSWERS = ("answer", "response", "output", "completion")
SIDES = (("a", "b"), ("1", "2"))
#: What `winner` calls the first and the second answer, and a tie
WINS = ({"a", "1", "model_a", "model_1", "first"}, {"b", "2", "model_b", "model_2", "second"})
TIES = {"tie", "tie (bothbad)", "both_bad", "both bad", "bothbad", "draw", "1.5", "0"}
#: Columns of a verdict
VERDICTS = ("winner", "preference")


def layout(row: Mapping[str, Any]) -> str | None:
    """The layout of a row in words, if it is one of those above."""
    if _is_sharegpt(row):
        return "pairs: ShareGPT conversations" if "chosen" in row else "prompts: ShareGPT"
    if _answer_columns(row):
        return "pairs: two answers and a winner"
    if "conversation_a" in row and "conversation_b" in row:
        return "pairs: two conversations and a winner"
    if _is_scored(row):
        return "pairs: the best and the worst of scored completions (UltraFeedback)"
    if _is_unpaired(row):
        return "unpaired feedback (KTO)"
    return None


def as_prompt(row: Row) -> Row:
    """The row with a column that `readers` reads as its prompt; unchanged if it has one."""
    row = _plain(row)
    if "conversation_a" in row and not _has_prompt(row):
        row["messages"] = row["conversation_a"]
    # Answers are no part of a prompt, and too large to be kept beside it.
    for name in ("conversation_a", "conversation_b", "completions", *(_answer_columns(row) or ())):
        row.pop(name, None)
    return row


def as_pair(row: Row) -> Row | str:
    """The row with `chosen` and `rejected`, or the reason for a drop; unchanged if it has them.

    Raises DataError for unpaired feedback, and for a winner that names neither answer.
    """
    if _is_unpaired(row):
        raise DataError(
            "the row has a 'completion' with a true or false 'label', which is unpaired feedback "
            "(KTO); a pair needs two answers to one prompt, as 'chosen' and 'rejected'"
        )
    row = _plain(row)
    if "chosen" in row or "rejected" in row:
        return row
    columns = _answer_columns(row)
    if columns or ("conversation_a" in row and "conversation_b" in row):
        return _with_winner(row, columns or ("conversation_a", "conversation_b"))
    return _best_and_worst(row) if _is_scored(row) else row


def _plain(row: Row) -> Row:
    """A copy of the row with ShareGPT's messages and a question as a prompt."""
    row = dict(row)
    if _is_sharegpt(row):
        row["messages"] = [_message(turn) for turn in row.pop("conversations")]
        for side in ("chosen", "rejected"):
            if isinstance(row.get(side), Mapping) and "value" in row[side]:
                row[side] = row[side]["value"]
    if "question" in row and not _has_prompt(row):
        row["prompt"] = row.pop("question")
    return row


def _has_prompt(row: Mapping[str, Any]) -> bool:
    return any(name in row for name in ("messages", "prompt", "instruction"))


def _is_sharegpt(row: Mapping[str, Any]) -> bool:
    """Whether a row has conversations of {from, value}, or of {role, content}, and no messages."""
    turns = row.get("conversations")
    if not isinstance(turns, Sequence) or isinstance(turns, str) or "messages" in row:
        return False
    return all(isinstance(turn, Mapping) and {"from", "role"} & turn.keys() for turn in turns)


def _message(turn: Mapping[str, Any]) -> Row:
    """A turn of ShareGPT as a message; a turn that has a role already is left as it is."""
    if "role" in turn:
        return dict(turn)
    author = str(turn["from"])
    return {"role": ROLES.get(author, author), "content": turn.get("value")}


def _answer_columns(row: Mapping[str, Any]) -> tuple[str, str] | None:
    """The columns of two answers beside a verdict, if the row has them."""
    if not any(name in row for name in VERDICTS):
        return None
    for name in ANSWERS:
        for first, second in SIDES:
            columns = (f"{name}_{first}", f"{name}_{second}")
            if all(column in row for column in columns):
                return columns
    return None


def _with_winner(row: Row, columns: tuple[str, str]) -> Row | str:
    """The row with the winner as `chosen`; "tie" or "no_winner" for a drop.

    columns: of the two answers.
    """
    verdict = next((name for name in VERDICTS if name in row), None)
    value = None if verdict is None else row.pop(verdict)
    if value is None or value == "":
        return "no_winner"
    is_whole = isinstance(value, float) and value.is_integer()
    winner = str(int(value) if is_whole else value).strip().lower()
    if winner in TIES:
        return "tie"

    models = [row.pop("model_a", None), row.pop("model_b", None)]
    names = [{*words, str(model).lower()} for words, model in zip(WINS, models, strict=True)]
    names = [words | {column.lower()} for words, column in zip(names, columns, strict=True)]
    if (winner in names[0]) == (winner in names[1]):
        raise DataError(
            f"'{verdict}' is {value!r:.80}; expected a, b or tie, model_a or model_b, or 1 or 2"
        )
    won = 0 if winner in names[0] else 1
    row["chosen"], row["rejected"] = row.pop(columns[won]), row.pop(columns[1 - won])
    row["chosen_model"], row["rejected_model"] = models[won], models[1 - won]
    return row


def _is_scored(row: Mapping[str, Any]) -> bool:
    """Whether a row has completions with scores, as UltraFeedback."""
    answers = row.get("completions")
    if not isinstance(answers, list) or "chosen" in row:
        return False
    return all(isinstance(answer, Mapping) and "response" in answer for answer in answers)


def _best_and_worst(row: Row) -> Row | str:
    """The row with the answers of the highest and the lowest score; "tie" if all are equal."""
    answers = []
    for answer in row.pop("completions"):
        score = answer.get("overall_score")
        if score is not None:
            answers.append((float(score), answer))
    if len(answers) < 2:
        return "no_winner"
    best, worst = (choose(answers, key=lambda pair: pair[0]) for choose in (max, min))
    if best[0] == worst[0]:
        return "tie"
    for side, (_, answer) in (("chosen", best), ("rejected", worst)):
        row[side] = answer["response"]
        row[f"{side}_model"] = answer.get("model")
    return row


def _is_unpaired(row: Mapping[str, Any]) -> bool:
    """Whether a row is one answer with a true or false label."""
    if "chosen" in row or "rejected" in row:
        return False
    return isinstance(row.get("label"), bool) and ("completion" in row or "response" in row)
