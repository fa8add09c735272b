"""Readers of input: our dataset folders, saved folders of `datasets`, data files, hub ids.

    prompts   `messages` (a list of {role, content}), or `prompt` (text or messages), or
              `instruction` with an optional `input`
    pairs     `chosen` and `rejected`: texts or assistant messages beside such a prompt, or
              transcripts that both repeat it (messages, or text with "\\n\\nHuman:" and
              "\\n\\nAssistant:" as in hh-rlhf); lists of texts (RewardBench 2) become every chosen
              text beside every rejected one, with `id` as a part of the candidate ids
              a prompt beside transcripts is joined with them: turns that begin alike are the same,
              others follow, and a row in which they contradict each other is dropped
    system    optional: `system` or `system_prompt`, the text of a system turn
    history   optional: earlier turns, as messages or as [question, answer] pairs
    authors   optional: `chosen_model` and `rejected_model`, as in RewardBench
    subset    optional: `subset`, or `dataset` as in AlpacaEval
    extra     every other column, `id` among them, as one JSON object per row (`extra_of`):
              no stage reads it, every stage keeps it

Other layouts (ShareGPT, arenas, UltraFeedback) are turned into these by `layouts`.

A spec is a path (JSONL, JSON, Parquet, CSV, Arrow, each also with .gz or .zst, or a folder of such
files), `FOLDER:SPLIT` for a saved folder, or `[hf://]ORG/NAME[@REVISION][:CONFIG][:SPLIT]` on the
hub; SPLIT is train if it is left out. `SPEC?prompt=question,chosen=answer_a` names columns.
Rows are read in blocks from every source (but a JSON list is parsed as a whole) and stored on disk
(`spool.Spool`).
`tools` (descriptions of functions) and `tool_calls` in messages are kept, lists of text parts are
joined, and images are refused. A cell may hold messages as JSON or as Python prints them, or a
transcript of hh-rlhf. Answers with tool calls, or with their reasoning in a field, are dropped.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import datetime
import io
import itertools
import json
import math
import re
import shutil
import sys
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from scir_cli.data import dataset, folders, hashing, layouts, schemas, spool
from scir_cli.data import messages as turns
from scir_cli.data.messages import Message, more_of, with_tools
from scir_cli.data.storage import to_path
from scir_cli.errors import DataError, suggest

Row = dict[str, Any]

#: The first of these columns that is not null is the prompt.
PROMPT_COLUMNS = ("messages", "prompt", "instruction")
#: Never stored in `extra`: texts of prompts and responses are large.
TEXT_COLUMNS = frozenset((*PROMPT_COLUMNS, "chosen", "rejected"))
#: Columns whose text is the system turn of the prompt
SYSTEM_COLUMNS = ("system", "system_prompt")
AUTHOR_COLUMNS = ("chosen_model", "rejected_model")
OUR_PROMPTS = frozenset(schemas.schema("prompts").names)
OUR_COLUMNS = frozenset(column.name for columns in schemas.COLUMNS.values() for column in columns)
DEFAULT_SPLIT = "train"
#: Extension of a compressed file -> pyarrow's name of the compression
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
ROWS_AT_A_TIME = 1000
#: What separates the fields of a CSV file.
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
#: Bytes of a Parquet column that are read at a time.
BUFFER = 1 << 20
HUB_SPEC = re.compile(
    r"(?:hf://(?:datasets/)?)?(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?(?::([^:]+))??(?::([^:]+))?"
)
#: Columns that an input may name otherwise
NAMED_COLUMNS = (
    "prompt",
    "messages",
    "chosen",
    "rejected",
    "answer_a",
    "answer_b",
    "winner",
    "subset",
    "id",
    "chosen_model",
    "rejected_model",
    "tools",
)
#: A JSON object with one of these is a row.
COLUMNS_OF_A_ROW = frozenset((*NAMED_COLUMNS, *TEXT_COLUMNS, "conversations", "question", "input"))
#: Names under which another JSON object holds the rows of a file.
ROW_LISTS = ("data", "rows", "examples", "instances")


#: Fields of an answer -> the reason for which a pair with them is dropped
ANSWER_DROPS = {
    "tool_calls": "tool_call_answer",
    "reasoning_content": "reasoning_beside_answer",
    "reasoning": "reasoning_beside_answer",
    "thinking": "reasoning_beside_answer",
}


def open_prompts(spec: str, limit: int | None = None) -> tuple[dataset.Rows, Counter[str]]:
    """The prompts of `spec` as rows of kind "prompts", and the dropped rows by reason.

    limit: number of input rows that are read; None: all.
    Drops: empty_prompt, different_prompts (of prompt, `system` and `history`), duplicate_prompt.
    Raises DataError, with file and row or column, if the input is not as expected.
    """
    source = _resolve_spec(spec)
    folder = _dataset_folder(source)
    if folder is not None:
        return dataset.open_dataset(folder, "prompts").head(limit), Counter()
    return _collect(source, limit, lambda row: [_prompt_row(row)], "prompts", "prompt")


def open_pairs(
    spec: str, limit: int | None = None, external: str | None = None
) -> tuple[dataset.Rows, Counter[str]]:
    """The pairs of `spec` as rows of kind "judged", and the dropped rows by reason.

    The responses have no token ids yet, and `gold_label` names the chosen one. A hash of the pair
    determines which response is `first`, so the position does not reveal the label.

    limit: number of input rows that are read; None: all.
    external: "COLUMN" (log-odds in nats that `chosen` is better) or "CHOSEN_COLUMN,REJECTED_COLUMN"
    (scores whose difference is the log-odds), for the reward model "external"; null or NaN is no
    verdict.
    Drops: empty_prompt, empty_response, identical_responses, different_prompts (of two transcripts
    as text, or of a prompt and a transcript), tool_call_answer, reasoning_beside_answer,
    duplicate_pair, contradictory_label (every row of a pair that is labeled both ways).
    Raises DataError, with file and row or column, if the input is not as expected.
    """
    source = _resolve_spec(spec)
    folder = _dataset_folder(source)
    if folder is not None:
        if external is not None:
            raise DataError(
                f"{spec} is a dataset folder of scir, which has rewards already; "
                "external scores need a file with 'chosen' and 'rejected'"
            )
        pairs = dataset.open_dataset(folder, "judged", "preferences").with_kind("judged")
        return pairs.head(limit), Counter()

    scores = _score_columns(external)
    # A dict and not a set, to hold the order.
    present: dict[str, None] = {}

    def make(row: Row) -> Iterator[Row | str]:
        present.update(dict.fromkeys(row))
        return _pair_rows(row, scores)

    rows, drops = _collect(source, limit, make, "judged", "pair")
    for column in scores:
        if column not in present:
            # The message lists the columns in any case.
            hint, _, _ = suggest(column, present).partition(" Known:")
            raise DataError(
                f"{source.location} has no column '{column}'; "
                f"the columns are {', '.join(present)}.{hint}"
            )
    return rows, drops


def load_pairs(
    spec: str, limit: int | None = None, external: str | None = None
) -> tuple[pa.Table, Counter[str]]:
    """The pairs of `spec` as one table, and the dropped rows, as `open_pairs` returns them."""
    rows, drops = open_pairs(spec, limit, external)
    return rows.slice(0, rows.num_rows), drops


def raw_rows(spec: str) -> Iterator[Row]:
    """The rows of an input that is no dataset folder of ours, as they are in it.

    Raises DataError if it cannot be read.
    """
    return _read(_resolve_spec(spec))


def layout_of(row: Row) -> str:
    """The layout of an input in words, as `open_pairs` and `open_prompts` read its rows."""
    known = layouts.layout(row)
    if known is not None:
        return known
    row = layouts.as_prompt(row)
    prompt = next((name for name in PROMPT_COLUMNS if row.get(name) is not None), None)
    if "chosen" in row and "rejected" in row:
        if isinstance(row["chosen"], str):
            is_transcript = prompt is None and turns.HH_TURN.match(row["chosen"]) is not None
            return "pairs: transcripts of hh-rlhf" if is_transcript else "pairs: prompt and texts"
        is_lists = _is_text_list(row["chosen"])
        return "pairs: lists of texts" if is_lists else "pairs: conversations"
    return "unknown" if prompt is None else f"prompts: {prompt}"


def digest(spec: str) -> str:
    """A digest of the content of an input.

    For a local path 32 hex digits; for the hub `hub:ID@REVISION`, or `hub:ID` if the revision is
    not available. A config and a split are appended.
    """
    location, config, split, wanted, columns = _resolve_spec(spec)
    tail = "".join(f":{part}" for part in (config, split) if part)
    if columns:
        tail += "?" + ",".join(f"{ours}={theirs}" for ours, theirs in sorted(columns))
    if not isinstance(location, str):
        return hashing.digest_path(location) + tail

    import datasets

    try:
        # The hash is that of the commit, also if the data set is in the cache.
        more = {"revision": wanted} if wanted else {}
        revision = datasets.load_dataset_builder(location, config, **more).hash
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError):
        revision = wanted
    at_revision = f"@{revision}" if revision else ""
    return f"hub:{location}{at_revision}{tail}"


# --------------------------------------------------------------------- rows to prompts and pairs


def _collect(
    source: _Source,
    limit: int | None,
    make: Callable[[Row], Iterable[Row | str]],
    kind: str,
    noun: str,
) -> tuple[spool.Spool, Counter[str]]:
    """The rows that `make` returns for the rows of a source, and the dropped rows by reason.

    Of rows with equal ids only the first is kept, and none if their gold labels differ.
    make: row of the input -> rows of `kind`, or a text for a drop: its reason.
    noun: "prompt" or "pair", for the name of the id.
    Raises DataError if the source has no rows.
    """
    drops: Counter[str] = Counter()
    ids = array("Q")
    # 1 if the first response is the better one, else 0
    labels = array("B")

    def tables() -> Iterator[pa.Table]:
        """Blocks of rows; counts `drops` and extends `ids` and `labels` as they are read."""
        numbered = enumerate(itertools.islice(_read(source), limit), 1)
        while block := list(itertools.islice(numbered, ROWS_AT_A_TIME)):
            rows = []
            for number, row in block:
                for result in _convert_row(source, number, row, make):
                    if isinstance(result, str):
                        drops[result] += 1
                    else:
                        rows.append(result)
            ids.extend(int(row[f"{noun}_id"], 16) for row in rows)
            labels.extend(row.get("gold_label") == "first" for row in rows)
            yield schemas.to_table(kind, rows)
        if not (ids or drops):
            raise DataError(f"{source.location} is empty; expected at least one row")

    collected = spool.Spool(schemas.schema(kind), tables())
    contradictory = _contradictory(np.asarray(ids), np.asarray(labels))
    duplicates = hashing.later_duplicates(np.asarray(ids)[None])
    duplicates = np.setdiff1d(duplicates, contradictory)
    drops["contradictory_label"] += len(contradictory)
    drops[f"duplicate_{noun}"] += len(duplicates)
    # The plus removes reasons without drops.
    return collected.drop_rows(np.union1d(duplicates, contradictory)), +drops


def _contradictory(ids: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The rows whose id occurs with two labels.  (rows,) each -> (rows that contradict,)"""
    order = np.lexsort((labels, ids))
    sorted_ids, sorted_labels = ids[order], labels[order]
    differs = (np.diff(sorted_labels) != 0) & (sorted_ids[1:] == sorted_ids[:-1])
    return np.flatnonzero(np.isin(ids, sorted_ids[1:][differs]))


def _convert_row(
    source: _Source, number: int, row: Row, make: Callable[[Row], Iterable[Row | str]]
) -> list[Row | str]:
    """The results of `make` for one row; raises DataError with source and number of the row."""
    try:
        return list(make(row))
    except DataError as error:
        raise DataError(f"{source.location}, row {number}: {error}") from error
    # JSON can spell half of a surrogate pair, which no hash, Arrow file or tokenizer accepts.
    except UnicodeEncodeError as error:
        text = ascii(error.object[error.start])
        raise DataError(
            f"{source.location}, row {number}: {text} is half of a surrogate pair; remove it"
        ) from error


def _prompt_row(row: Row) -> Row | str:
    """A row of kind "prompts", or the reason for a drop."""
    row = layouts.as_prompt(row)
    messages = _prompt(row)
    if messages is None:
        return "different_prompts"
    if _is_empty(messages):
        return "empty_prompt"
    return _prompt_columns(row, messages)


def _prompt_columns(row: Row, messages: list[Message], used: Collection[str] = ()) -> Row:
    """The columns of a prompt.

    used: columns of `row` that the caller has stored elsewhere.
    """
    column = "subset" if "subset" in row else "dataset"
    subset = row.get(column)
    if messages and "tools" in more_of(messages[0]):
        used = {*used, "tools"}
    used = {*used, *SYSTEM_COLUMNS, "history"}
    return {
        "prompt_id": hashing.digest_json(messages)[:16],
        "messages": messages,
        "subset": None if subset in (None, "") else str(subset),
        "extra": extra_of(row, {column, *used}),
    }


def extra_of(row: Row, used: Collection[str]) -> str | None:
    """The columns of an input row that are stored nowhere else, as JSON; None if none.

    used: columns that are stored elsewhere. Texts of prompts and responses, and nulls, are left out
    in any case. Dates and times become ISO 8601 text, bytes base64, NaN and infinities null, and
    other values that JSON lacks their text.
    A row of our dataset that another tool has written keeps its `extra`.
    """
    left_out = {*TEXT_COLUMNS, *used}
    if "instruction" in row:
        left_out.add("input")

    extra: Row = {}
    if row.keys() >= OUR_PROMPTS:
        earlier = _json_object(row["extra"])
        if earlier is not None:
            extra = earlier
            left_out |= OUR_COLUMNS
    for name, value in row.items():
        if name not in left_out and value is not None:
            extra[name] = value
    if not extra:
        return None

    try:
        text = json.dumps(extra, ensure_ascii=False, allow_nan=False, default=_json_value)
    except ValueError:
        text = json.dumps(_finite(extra), ensure_ascii=False, default=_json_value)
    try:
        text.encode()
    except UnicodeEncodeError:
        # Half of a surrogate pair, which only JSON's escapes can represent.
        text = json.dumps(json.loads(text))
    return text


def _json_object(value: Any) -> Row | None:
    """The object in a cell of `extra`, {} for null; None if the cell holds anything else."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    if value is None:
        return {}
    return dict(value) if isinstance(value, dict) else None


def _json_value(value: Any) -> str:
    """The text for a value that JSON lacks: base64 for bytes, ISO 8601 for dates and times."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return str(value)


def _finite(value: Any) -> Any:
    """The value with None in place of NaN and infinities, at every depth."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _pair_rows(row: Row, scores: list[str]) -> Iterator[Row | str]:
    """The pair of a row, or every chosen text beside every rejected one if both are lists.

    In the second case the candidate ids are ID/SIDE/INDEX/COUNT, for example ID/chosen/0/1 and
    ID/rejected/2/3, so that an evaluation can reassemble the row.
    scores: columns with external scores.
    """
    known = layouts.as_pair(row)
    if isinstance(known, str):
        yield known
        return
    row = known
    lists: list[Any] = [row.get(column) for column in ("chosen", "rejected")]
    if not all(_is_text_list(texts) for texts in lists):
        yield _pair_row(row, scores)
        return

    row_id = row.get("id")
    if row_id is None:
        prompt = [row.get(column) for column in PROMPT_COLUMNS]
        row_id = hashing.digest_json(prompt + lists)[:16]

    chosen_texts, rejected_texts = lists
    for i, chosen in enumerate(chosen_texts):
        for j, rejected in enumerate(rejected_texts):
            candidate_ids = {
                chosen: f"{row_id}/chosen/{i}/{len(chosen_texts)}",
                rejected: f"{row_id}/rejected/{j}/{len(rejected_texts)}",
            }
            pair = row | {"chosen": chosen, "rejected": rejected}
            yield _pair_row(pair, scores, candidate_ids)


def _is_text_list(value: Any) -> bool:
    """Whether a value is a list of texts that is not empty."""
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(text, str) for text in value)


def _pair_row(
    row: Row, scores: list[str], candidate_ids: Mapping[str, str] = MappingProxyType({})
) -> Row | str:
    """A row of kind "judged", or the reason for a drop.

    scores: columns with external scores.
    candidate_ids: text of a response -> its id, if it has one.
    Raises DataError if the two sides repeat different prompts as messages.
    """
    context, chosen_turn = _prompt_and_response(row, "chosen")
    other_context, rejected_turn = _prompt_and_response(row, "rejected")
    unusable = _why_unusable(chosen_turn) or _why_unusable(rejected_turn)
    if unusable:
        return unusable
    chosen, rejected = chosen_turn["content"], rejected_turn["content"]
    if context != other_context:
        if isinstance(row["chosen"], str):
            return "different_prompts"
        raise DataError(
            "'chosen' and 'rejected' repeat different prompts; "
            "expected to share all but the last message"
        )
    messages = _prompt(row, context)
    if messages is None:
        return "different_prompts"
    if _is_empty(messages):
        return "empty_prompt"
    if chosen == rejected:
        return "identical_responses"

    first, second = _shuffle_sides(messages, chosen, rejected)
    authors = {
        chosen: _author(row.get("chosen_model")),
        rejected: _author(row.get("rejected_model")),
    }
    first_is_chosen = first == chosen
    rewards = []
    if scores:
        rewards = [_external_reward(row, scores, 1 if first_is_chosen else -1)]
    return {
        "pair_id": hashing.digest_json([messages, first, second])[:16],
        **_prompt_columns(row, messages, (*AUTHOR_COLUMNS, *scores)),
        "first": _response(first, candidate_ids.get(first), authors.get(first)),
        "second": _response(second, candidate_ids.get(second), authors.get(second)),
        "gold_label": "first" if first_is_chosen else "second",
        "rewards": rewards,
        "reference_logps": [],
    }


def _why_unusable(answer: Message) -> str | None:
    """The reason to drop a pair with this answer: it is empty, or has what no column holds."""
    for name in more_of(answer):
        if name in ANSWER_DROPS:
            return ANSWER_DROPS[name]
    return None if answer["content"].strip() else "empty_response"


def _shuffle_sides(messages: list[Message], chosen: str, rejected: str) -> list[str]:
    """The two texts in an order that depends on the content of the pair alone.

    It depends neither on which text was chosen nor on which sorts lower.
    """
    texts = sorted((chosen, rejected))
    is_odd = int(hashing.digest_json([messages, texts]), 16) % 2
    return texts[::-1] if is_odd else texts


def _author(name: Any) -> str | None:
    """The name of an author; None for a cell that is empty or no text."""
    return name if isinstance(name, str) and name else None


def _response(text: str, candidate_id: str | None, author: str | None) -> Row:
    """A response that is not tokenized yet: it has no token ids."""
    return {
        "candidate_id": candidate_id,
        "text": text,
        "token_ids": [],
        "finish_reason": "stop",
        "author": author,
    }


def _prompt(row: Row, context: Sequence[Message] = ()) -> list[Message] | None:
    """The prompt of a row as messages, without an answer at their end; [] if it is null.

    context: the turns that `chosen` and `rejected` repeat before their last one.
    None if system, history, prompt and context contradict each other.
    Raises DataError if the row has no column for a prompt, or one of the wrong type.
    """
    prompt = _prompt_cell(row, required=not context)
    history = turns.read_history(row.get("history") or [])
    messages = turns.join(_system(row), prompt)
    if messages is not None:
        messages = turns.with_history(messages, history)
    if messages is not None:
        messages = turns.join(messages, context)
    if messages is None:
        return None
    if not context and messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    return with_tools(messages, row.get("tools"))


def _system(row: Row) -> list[Message]:
    """The system turn in a column of its own, if there is one.

    Raises DataError if it is no text, or if two columns hold different ones.
    """
    values = {name: row[name] for name in SYSTEM_COLUMNS if row.get(name) not in (None, "")}
    for name, value in values.items():
        if not isinstance(value, str):
            raise DataError(
                f"'{name}' should be the text of a system turn; it holds {value!r:.80}. "
                "Rename the column if it has another meaning"
            )
    texts = set(values.values())
    if len(texts) > 1:
        raise DataError(f"{' and '.join(map(repr, values))} hold different texts; remove one")
    return [{"role": "system", "content": text} for text in texts]


def _prompt_cell(row: Row, *, required: bool) -> list[Message]:
    """The messages of the prompt's column; [] if it is null.

    Raises DataError for a cell of the wrong type, and for a row without the column if required.
    """
    present = [column for column in PROMPT_COLUMNS if column in row]
    if not present and required:
        raise DataError(
            "no column holds the prompt: expected 'messages', 'prompt' or 'instruction' "
            "(a pair may have it in the transcripts of 'chosen' and 'rejected' instead); "
            f"the columns are {', '.join(row)}"
        )
    column = next((column for column in present if row[column] is not None), None)
    if column is None:
        return []

    value = row[column]
    if column == "instruction":
        parts = [value, row.get("input") or ""]
        if not all(isinstance(part, str) for part in parts):
            raise DataError(f"'instruction' and 'input' should be text; they hold {parts!r:.80}")
        value = "\n\n".join(part for part in parts if part.strip())
    if isinstance(value, str):
        transcript = turns.parse_messages(value) or turns.hh_turns(value)
        if not transcript and column != "messages":
            return [{"role": "user", "content": value}]
        value = transcript or value
    return _messages(value, column)


def _prompt_and_response(row: Row, column: str) -> tuple[list[Message], Message]:
    """The prompt that a response column repeats, and the turn of the response.

    The prompt is [] if the column repeats none, the response "" if the cell is null.
    Raises DataError if the column is missing or its messages do not end with the assistant's.
    """
    if column not in row:
        raise DataError(
            f"no column '{column}'; a pair needs 'chosen' and 'rejected', "
            f"and the columns are {', '.join(row)}"
        )
    value = row[column] or ""
    if isinstance(value, str):
        transcript = turns.hh_turns(value)
        if transcript and not _quotes_transcript(row):
            # Without the assistant's turn at its end there is no response.
            is_answered = transcript[-1]["role"] == "assistant"
            last = transcript[-1] if is_answered else {"role": "assistant", "content": ""}
            return transcript[:-1], last
        parsed = turns.parse_messages(value)
        if not parsed:
            prompt = row.get("prompt")
            is_transcript = isinstance(prompt, str) and turns.HH_TURN.match(prompt)
            text = value.removeprefix(" ") if is_transcript else value
            return [], {"role": "assistant", "content": text}
        value = parsed

    messages = _messages(value, column)
    last = messages[-1]
    if last["role"] != "assistant":
        raise DataError(
            f"the last message of '{column}' should be the assistant's; "
            f"its role is '{last['role']}'"
        )
    return messages[:-1], last


def _quotes_transcript(row: Row) -> bool:
    """Whether a text like a transcript is an answer: a prompt stands beside it, and another text.

    Beside a prompt both responses are transcripts, or neither is one.
    """
    if not any(row.get(name) for name in PROMPT_COLUMNS):
        return False
    responses = (row.get("chosen"), row.get("rejected"))
    return not all(isinstance(text, str) and turns.HH_TURN.match(text) for text in responses)


def _messages(value: Any, column: str) -> list[Message]:
    """The messages of a cell, as `messages.read_message` returns them.

    Raises DataError if the cell holds anything else.
    """
    are_texts = False
    messages: list[Message] = []
    if isinstance(value, Mapping) and {"role", "content"} <= value.keys():
        value = [value]
    try:
        messages = [turns.read_message(message) for message in value]
        are_texts = all(isinstance(text, str) for turn in messages for text in turn.values())
    except (TypeError, KeyError, IndexError, AttributeError):
        pass
    if not are_texts:
        alternative = "" if column == "messages" else "text or "
        raise DataError(
            f"'{column}' should be {alternative}a list of {{role, content}} messages, both text; "
            f"it holds {value!r:.80}"
        )
    return messages


def _is_empty(messages: list[Message]) -> bool:
    """Whether the prompt is only white space outside the system message."""
    for message in messages:
        has_content = message["content"].strip() or "tool_calls" in more_of(message)
        if message["role"] != "system" and has_content:
            return False
    return True


# ------------------------------------------------------------------------------ external scores


def _score_columns(external: str | None) -> list[str]:
    """The one or two columns that `external` names, [] for None; raises DataError for more."""
    if external is None:
        return []
    columns = [column.strip() for column in external.split(",")]
    if len(columns) > 2:
        raise DataError(
            "external scores are COLUMN or CHOSEN_COLUMN,REJECTED_COLUMN; "
            f"'{external}' names {len(columns)} columns"
        )
    return columns


def _external_reward(row: Row, columns: list[str], sign: int) -> Row:
    """The verdict of the reward model "external".

    sign: 1 if `first` is the chosen response, else -1.
    """
    values = [_number(row.get(column), column) for column in columns]
    # In nats: for chosen in the parentheses, for first after the sign.
    log_odds = sign * (values[0] - sum(values[1:]))
    return {
        "reward_model": "external",
        "log_odds": None if math.isnan(log_odds) else log_odds,
        "forward_log_odds": None,
        "swapped_log_odds": None,
        "verdict_mass": None,
    }


def _number(value: Any, column: str) -> float:
    """A finite score, or NaN for an empty cell; raises DataError for anything else."""
    try:
        number = math.nan if value in (None, "") else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.inf
    if math.isinf(number) or isinstance(value, bool):
        raise DataError(
            f"'{column}' should be a finite number, or null for no verdict; it holds {value!r:.80}"
        )
    return number


# ------------------------------------------------------------------------------ sources of rows


class _Source(NamedTuple):
    """The place of an input: a local path, or a hub id with revision, config and split."""

    location: Path | str
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    #: Our name of a column -> its name in the input.
    columns: tuple[tuple[str, str], ...] = ()


def _resolve_spec(spec: str) -> _Source:
    """The source that a spec names: a local path that exists, else a hub id.

    Raises DataError if the spec is neither.
    """
    if not to_path(spec).exists():
        place, mark, columns = spec.rpartition("?")
        if mark:
            return _resolve_spec(place)._replace(columns=_column_names(columns))
    folder, _, split = spec.rpartition(":")
    if spec and to_path(spec).exists():
        return _Source(to_path(spec))
    if folder and to_path(folder).is_dir():
        return _Source(to_path(folder), None, split)

    match = HUB_SPEC.fullmatch(spec)
    is_file_name = _format(Path(spec)) in READERS and not spec.startswith("hf://")
    if match is None or is_file_name:
        raise DataError(
            f"'{spec}' does not exist; expected a file ({', '.join(READERS)}), "
            "a dataset folder, or a hub id such as ORG/NAME:SPLIT"
        )
    name, revision, config, split = match.groups()
    return _Source(name, config, split, revision)


def _column_names(text: str) -> tuple[tuple[str, str], ...]:
    """Our name and the input's of each column in "prompt=question,chosen=answer_a".

    Raises DataError for another form, or for a name that we do not read.
    """
    names = {}
    for pair in text.split(","):
        ours, equals, theirs = (part.strip() for part in pair.partition("="))
        if not (equals and ours and theirs):
            raise DataError(
                f"the columns '{text}' should have the form prompt=question,chosen=answer_a"
            )
        if ours not in NAMED_COLUMNS:
            raise DataError(f"no column is called '{ours}'.{suggest(ours, NAMED_COLUMNS)}")
        names[ours] = theirs
    return tuple(names.items())


def _renamed(source: _Source, rows: Iterator[Row]) -> Iterator[Row]:
    """The rows with their columns under our names, in place of columns that have these names.

    Raises DataError if the first row lacks a column.
    """
    for number, row in enumerate(rows):
        values = {}
        for ours, theirs in source.columns:
            if theirs not in row and not number:
                raise DataError(
                    f"{source.location} has no column '{theirs}'; the columns are {', '.join(row)}"
                )
            values[ours] = row.get(theirs)
        used = {theirs for _, theirs in source.columns}
        yield {name: value for name, value in row.items() if name not in used} | values


def _dataset_folder(source: _Source) -> Path | None:
    """The folder of a source that is a dataset folder of ours; None for other sources."""
    if isinstance(source.location, str) or not folders.is_dataset(source.location):
        return None
    return source.location


def _read(source: _Source) -> Iterator[Row]:
    """The rows of a source that is not a dataset folder of ours, under our names of columns."""
    rows = _read_plain(source)
    return _renamed(source, rows) if source.columns else rows


def _read_plain(source: _Source) -> Iterator[Row]:
    """The rows as they are in the source."""
    if isinstance(source.location, str):
        return _read_hub(source)
    if source.location.is_dir():
        return _read_saved(source.location, source.split or DEFAULT_SPLIT)
    return _read_file(source.location)


def _read_hub(source: _Source) -> Iterator[Row]:
    """The rows of a split on the hub; raises DataError if it cannot be loaded."""
    import datasets

    split = source.split or DEFAULT_SPLIT
    try:
        more = {"revision": source.revision} if source.revision else {}
        data = datasets.load_dataset(source.location, source.config, split=split, **more)
    # A repository may hold anything, and so may the errors of the code that reads it.
    except Exception as error:
        raise DataError(
            f"'{source.location}' is not a local path, and loading it from the hub failed: "
            f"{_one_line(error)}"
        ) from error
    yield from _mapped_rows(data)


def _read_saved(path: Path, split: str) -> Iterator[Row]:
    """The rows of a split that `datasets.save_to_disk` wrote.

    Raises DataError if the folder is no such folder, has no such split, or cannot be read.
    """
    if not (path / "state.json").is_file() and not (path / "dataset_dict.json").is_file():
        shards = _shards(path, split)
        if shards:
            yield from itertools.chain.from_iterable(map(_read_file, shards))
            return
        raise DataError(
            f"{path} is a folder that neither scir nor datasets.save_to_disk wrote; "
            "it has no data files either; name the data file inside it"
        )
    import datasets

    advice = "write it again with datasets.save_to_disk"
    try:
        data = datasets.load_from_disk(str(path))
    # Its JSON files may hold anything, and so may the errors of the code that reads them.
    except Exception as error:
        raise DataError(f"{path} cannot be read ({_one_line(error)}); {advice}") from error
    splits = data if isinstance(data, datasets.DatasetDict) else {DEFAULT_SPLIT: data}
    if split not in splits:
        names = ", ".join(splits)
        raise DataError(f"{path} has no split '{split}'; it has {names}: name one as {path}:SPLIT")
    try:
        yield from _mapped_rows(splits[split])
    # pa.ArrowInvalid is a ValueError.
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read ({_one_line(error)}); {advice}") from error


def _shards(path: Path, split: str) -> list[Path]:
    """The data files in a folder, or in its folder `data`, in the order of their names.

    Of files named as on the hub (train-00000-of-00002.parquet), those of the split.
    Raises DataError if their formats differ.
    """
    files: list[Path] = []
    for folder in (path, path / "data"):
        for file in sorted(folder.iterdir()) if folder.is_dir() and not files else []:
            if file.is_file() and _format(file) in READERS and not file.name.startswith("."):
                files.append(file)
    of_split = [file for file in files if re.match(rf"{re.escape(split)}\b", file.name)]
    if of_split:
        files = of_split
    elif split != DEFAULT_SPLIT and files:
        raise DataError(f"{path} has no files of the split '{split}'; it has {files[0].name}")
    formats = {_format(file) for file in files}
    if len(formats) > 1:
        raise DataError(
            f"{path} holds files of several formats ({', '.join(sorted(formats))}); name one file"
        )
    return files


def _format(path: Path) -> str:
    """The extension of a data file, without that of its compression."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSIONS else suffix


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """A data file, decompressed into a temporary file if it is compressed."""
    compression = COMPRESSIONS.get(path.suffix.lower())
    if compression is None:
        with path.open("rb") as file:
            yield file
        return
    with path.open("rb") as packed, tempfile.NamedTemporaryFile() as plain:
        shutil.copyfileobj(pa.CompressedInputStream(packed, compression), plain)
        plain.flush()
        # Under its name, which stays when a reader closes the file.
        with open(plain.name, "rb") as file:
            yield file


def _mapped_rows(data: Any) -> Iterator[Row]:
    """The rows of a `datasets.Dataset`, of which ROWS_AT_A_TIME are in memory."""
    for table in data.with_format("arrow").iter(ROWS_AT_A_TIME):
        # Before an offset is used: a damaged one would end the process.
        table.validate(full=True)
        yield from table.to_pylist()


def _read_file(path: Path) -> Iterator[Row]:
    """The rows of a data file.

    Raises DataError if its extension is unknown or it cannot be read.
    """
    reader = READERS.get(_format(path))
    if reader is None:
        raise DataError(
            f"{path}: unknown extension '{path.suffix}'; expected one of {', '.join(READERS)}"
        )
    try:
        with _opened(path) as file:
            yield from reader(path, file)
    except OSError as error:
        reason = error.strerror or _one_line(error)
        raise DataError(f"{path} cannot be read: {reason}") from error


def _one_line(error: Exception) -> str:
    """The message of an error on one line, or its class if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def _lines(path: Path, file: BinaryIO, newline: str) -> Iterator[str]:
    """The lines of a UTF-8 file, without a byte order mark.

    newline: as of `open`.
    Raises DataError, with the byte offset, if the file is not UTF-8.
    """
    try:
        with io.TextIOWrapper(file, "utf-8-sig", newline=newline) as text:
            yield from text
    except UnicodeDecodeError as error:
        # The error holds an offset in a buffer and not in the file.
        is_packed = path.suffix.lower() in COMPRESSIONS
        offset, byte = _first_invalid_byte(Path(file.name) if is_packed else path)
        raise DataError(
            f"{path} is not UTF-8: byte offset {offset} holds 0x{byte:02x}; convert it"
        ) from error


def _first_invalid_byte(path: Path) -> tuple[int, int]:
    """Offset and value of the first byte at which a file is not UTF-8."""
    offset = 0
    with path.open("rb") as file:
        for line in file:
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return offset + error.start, line[error.start]
            offset += len(line)
    raise AssertionError(path)


def _json_rows(path: Path, file: BinaryIO) -> Iterator[Row]:
    """The objects of a JSON list, of an object that holds such a list, or of one object per line.

    Only \\n ends a line, because U+2028 may occur inside a string.
    Raises DataError, with the line, for malformed JSON and for values that are no objects.
    """
    expected = "expected a list of objects, or one object per line"
    lines = enumerate(_lines(path, file, "\n"), 1)
    start = next((line for line in lines if line[1].strip()), (1, ""))
    is_list = start[1].lstrip().startswith("[")
    # One object over several lines
    is_spread = start[1].strip().startswith("{") and not _is_json(start[1])

    # (number of the first line, text) of what is parsed together
    chunks: Iterable[tuple[int, str]]
    if is_list or is_spread:
        text = "".join([start[1], *(line for _, line in lines)])
        chunks = [(start[0], text)]
    else:
        chunks = itertools.chain([start], lines)

    for number, chunk in chunks:
        if not chunk.strip():
            continue
        try:
            value = json.loads(chunk if is_list or is_spread else chunk.removesuffix("\n"))
        except json.JSONDecodeError as error:
            at = number + error.lineno - 1
            raise DataError(
                f"{path}:{at}: malformed JSON ({error.msg} at column {error.colno}); {expected}"
            ) from error
        except (ValueError, RecursionError) as error:
            # A number of more than 4300 digits, or a nesting that is too deep.
            raise DataError(f"{path}:{number}: unreadable JSON ({_one_line(error)})") from error
        for row in value if is_list else _rows_inside(value):
            if not isinstance(row, dict):
                raise DataError(f"{path}:{number}: found {row!r:.60}; {expected}")
            yield row


def _is_json(text: str) -> bool:
    """Whether a text is JSON."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _rows_inside(value: Any) -> list[Any]:
    """The rows of an object that holds nothing but them and texts or numbers; else the object."""
    lists = []
    if isinstance(value, dict):
        lists = [rows for name, rows in value.items() if name in ROW_LISTS and _is_rows(rows)]
        if len(lists) == 1 and COLUMNS_OF_A_ROW.isdisjoint(value):
            rows: list[Any] = lists[0]
            return rows
    return [value]


def _is_rows(value: Any) -> bool:
    """Whether a value is a list of objects, and not empty."""
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _csv_rows(path: Path, file: BinaryIO) -> Iterator[Row]:
    """The rows of a CSV file with a header.

    Fields are separated by what is most frequent in the header: comma, semicolon or tab.
    Raises DataError, with the line, for malformed CSV and for rows with another number of fields.
    """
    # The default refuses a response of over 128 KiB.
    csv.field_size_limit(sys.maxsize)
    lines = _lines(path, file, "")
    header = next(lines, "")
    separator = max(SEPARATORS, key=header.count)
    reader = csv.DictReader(itertools.chain([header], lines), delimiter=separator, strict=True)
    try:
        for row in reader:
            # DictReader adds None as a key for too many fields, as a value for too few.
            if None in row or None in row.values():
                raise DataError(
                    f"{path}:{reader.reader.line_num}: not as many fields as the header; "
                    f"quote text with {SEPARATORS[separator]}"
                )
            yield row
    except csv.Error as error:
        raise DataError(f"{path}:{reader.reader.line_num}: malformed CSV ({error})") from error


#: What pyarrow raises on a damaged file. OverflowError: on a time that no Python object can hold;
#: MemoryError: on a size that no memory can hold.
ARROW_ERRORS = (OSError, ValueError, OverflowError, MemoryError, pa.ArrowException)


def _parquet_rows(path: Path, file: BinaryIO) -> Iterator[Row]:
    """The rows of a Parquet file, none for an empty file; raises DataError if it is damaged."""
    if not file.seek(0, io.SEEK_END):
        return
    try:
        parquet = pyarrow.parquet.ParquetFile(file, buffer_size=BUFFER, pre_buffer=False)
        for batch in parquet.iter_batches(ROWS_AT_A_TIME):
            batch.validate(full=True)
            yield from batch.to_pylist()
    except ARROW_ERRORS as error:
        raise DataError(
            f"{path} is truncated or is not Parquet ({_one_line(error)}); "
            "write or download it again"
        ) from error


def _arrow_rows(path: Path, file: BinaryIO) -> Iterator[Row]:
    """The rows of an Arrow file or stream; raises DataError if it is neither, or damaged."""
    try:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        if is_file:
            reader = pa.ipc.open_file(file)
            batches = map(reader.get_batch, range(reader.num_record_batches))
        else:
            batches = iter(pa.ipc.open_stream(file))
        for batch in batches:
            # Before an offset is used: a damaged one would end the process.
            batch.validate(full=True)
            yield from batch.to_pylist()
    except ARROW_ERRORS as error:
        raise DataError(
            f"{path} is truncated or is not Arrow ({_one_line(error)}); write or download it again"
        ) from error


#: Extension of a file -> its reader.
READERS: dict[str, Callable[[Path, BinaryIO], Iterator[Row]]] = {
    **dict.fromkeys((".jsonl", ".json", ".ndjson"), _json_rows),
    ".parquet": _parquet_rows,
    **dict.fromkeys((".csv", ".tsv"), _csv_rows),
    ".arrow": _arrow_rows,
}
