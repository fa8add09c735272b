"""What users bring: our own dataset folders, `datasets.save_to_disk` folders, JSONL/JSON/Parquet/CSV files, hub ids.

    prompts   `messages` (a list of {role, content}), or `prompt` (text or messages), or `instruction` with an optional `input`
    pairs     `chosen` and `rejected`: texts or assistant messages beside such a prompt, or transcripts that both repeat it (messages, or
              text with "\\n\\nHuman:" and "\\n\\nAssistant:" as hh-rlhf has it); lists of texts (RewardBench 2) are every chosen one
              beside every rejected one, and `id` goes into the candidate ids
    authors   optional: `chosen_model` and `rejected_model` (as RewardBench has them)
    subset    optional (or `dataset`, as AlpacaEval has it)
    extra     every other column, `id` among them, as one JSON object per row (`extra_of`):
              no stage reads it, every stage keeps it

A spec is a path, `FOLDER:SPLIT` for a saved folder, or `[hf://]ORG/NAME[:CONFIG][:SPLIT]` on the hub; SPLIT is train unless
given. Rows are read some at a time, whoever brings them (but a JSON list is parsed whole), and kept on disk (`store.Scratch`).
Left out on purpose: images and tools in messages.
"""

from __future__ import annotations

import base64
import csv
import datetime
import io
import itertools
import json
import math
import re
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from scir_cli.data import dataset, folders, hashing, schemas, spool
from scir_cli.data.storage import to_path
from scir_cli.errors import DataError, suggest

Row = dict[str, Any]
Message = dict[str, str]
PROMPT_COLUMNS = ("messages", "prompt", "instruction")  # the first that is not null is the prompt
#: Never carried along: texts of prompts and responses are large
TEXT_COLUMNS = frozenset((*PROMPT_COLUMNS, "chosen", "rejected"))
AUTHOR_COLUMNS = ("chosen_model", "rejected_model")
OUR_PROMPTS = frozenset(schemas.schema("prompts").names)
OUR_COLUMNS = frozenset(column.name for columns in schemas.COLUMNS.values() for column in columns)
DEFAULT_SPLIT = "train"
ROWS_AT_A_TIME = 1000
BUFFER = 1 << 20  # bytes of a Parquet column read at a time
HH_TURN = re.compile(r"\n\n(Human|Assistant): ?")
HUB_SPEC = re.compile(r"(?:hf://(?:datasets/)?)?(\w[\w.-]*/\w[\w.-]*)(?::([^:]+))??(?::([^:]+))?")


def open_prompts(spec: str, limit: int | None = None) -> tuple[dataset.Rows, Counter[str]]:
    """The prompts of `spec`, rows of kind "prompts" to be read a slice at a time, and the rows dropped by reason.

    limit: read only this many input rows. Drops: empty_prompt, duplicate_prompt. Raises DataError naming file and row or column.
    """
    source = _resolve_spec(spec)
    if not isinstance(source.where, str) and folders.is_dataset(source.where):
        return dataset.open_dataset(source.where, "prompts").head(limit), Counter()
    return _collect(source, limit, lambda row: [_prompt_row(row)], "prompts", "prompt")


def open_pairs(
    spec: str, limit: int | None = None, external: str | None = None
) -> tuple[dataset.Rows, Counter[str]]:
    """The pairs of `spec`, rows of kind "judged" to be read a slice at a time, without token ids, `gold_label` naming the chosen side; and drops by reason.

    Which response is `first` follows from a hash of the pair, so the side does not tell the label.
    external: "COLUMN" (log-odds in nats that `chosen` is better) or "CHOSEN_COLUMN,REJECTED_COLUMN" (scores whose difference is the
    log-odds); it becomes the reward model "external", and null or NaN is no verdict.
    Drops: empty_prompt, empty_response, identical_responses, different_prompts (of two transcripts as text), duplicate_pair. Raises DataError naming file and row or column.
    """
    source = _resolve_spec(spec)
    if not isinstance(source.where, str) and folders.is_dataset(source.where):
        if external is not None:
            raise DataError(
                f"{spec} is a dataset of ours with rewards of its own; external scores come with chosen and rejected"
            )
        return dataset.open_dataset(source.where, "judged", "preferences").with_kind("judged").head(
            limit
        ), Counter()
    scores = _score_columns(external)
    present: dict[str, None] = {}

    def make(row: Row) -> Iterator[Row | str]:
        present.update(dict.fromkeys(row))
        return _pair_rows(row, scores)

    pairs, drops = _collect(source, limit, make, "judged", "pair")
    for column in scores:
        if column not in present:
            hint = suggest(column, present).partition(" Known:")[
                0
            ]  # the message lists the columns anyway
            raise DataError(
                f"{source.where} has no column '{column}'; the columns are {', '.join(present)}.{hint}"
            )
    return pairs, drops


def load_pairs(
    spec: str, limit: int | None = None, external: str | None = None
) -> tuple[pa.Table, Counter[str]]:
    """As `open_pairs`, as one table."""
    rows, drops = open_pairs(spec, limit, external)
    return rows.slice(0, rows.num_rows), drops


def digest(spec: str) -> str:
    """A digest of the content of a local path; for the hub `hub:ID@REVISION`, or `hub:ID` where the revision cannot be known."""
    where, config, split = _resolve_spec(spec)
    tail = "".join(f":{part}" for part in (config, split) if part)
    if not isinstance(where, str):
        return hashing.digest_path(where) + tail
    import datasets

    try:
        revision = datasets.load_dataset_builder(
            where, config
        ).hash  # the commit, also when it comes from the cache
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError):
        revision = None
    return f"hub:{where}" + (f"@{revision}" if revision else "") + tail


# -------------------------------------------------------------------------------------------------------- rows to prompts and pairs


def _collect(
    source: _Source,
    limit: int | None,
    make: Callable[[Row], Iterable[Row | str]],
    kind: str,
    noun: str,
) -> tuple[spool.Spool, Counter[str]]:
    """What `make` makes of each row, once per id; a word among it is the reason for a drop. Raises DataError where there is no row."""
    drops: Counter[str] = Counter()
    ids = array("Q")

    def tables() -> Iterator[pa.Table]:
        numbered = enumerate(itertools.islice(_read(source), limit), 1)
        for some in iter(lambda: list(itertools.islice(numbered, ROWS_AT_A_TIME)), []):
            made = [one for number, row in some for one in _convert_row(source, number, row, make)]
            drops.update(one for one in made if isinstance(one, str))
            rows = [one for one in made if not isinstance(one, str)]
            ids.extend(int(row[f"{noun}_id"], 16) for row in rows)
            yield schemas.to_table(kind, rows)
        if not (ids or drops):
            raise DataError(f"{source.where} is empty; expected at least one row")

    found = spool.Spool(schemas.schema(kind), tables())
    again = hashing.later_duplicates(np.asarray(ids)[None])
    drops[f"duplicate_{noun}"] += len(again)
    return found.drop_rows(again), +drops


def _convert_row(
    source: _Source, number: int, row: Row, make: Callable[[Row], Iterable[Row | str]]
) -> list[Row | str]:
    try:
        return list(make(row))
    except DataError as error:
        raise DataError(f"{source.where}, row {number}: {error}") from error
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair; no hash, Arrow file or tokenizer can hold it
        text = ascii(error.object[error.start])
        raise DataError(
            f"{source.where}, row {number}: {text} is half a character; remove it"
        ) from error


def _prompt_row(row: Row) -> Row | str:
    messages = _prompt(row)
    return "empty_prompt" if _is_empty(messages) else _prompt_columns(row, messages)


def _prompt_columns(row: Row, messages: list[Message], used: Collection[str] = ()) -> Row:
    """The columns of a prompt.  used: columns of `row` that the caller has stored elsewhere"""
    column = "subset" if "subset" in row else "dataset"
    subset = row.get(column)
    subset = None if subset in (None, "") else str(subset)
    extra = extra_of(row, {column, *used})
    return {
        "prompt_id": hashing.digest_json(messages)[:16],
        "messages": messages,
        "subset": subset,
        "extra": extra,
    }


def extra_of(row: Row, used: Collection[str]) -> str | None:
    """The columns of an input row that are stored nowhere else, as JSON; None if there are none.

    used: columns that are stored elsewhere. Texts of prompts and responses, and nulls, are left out
    in any case. Dates and times become ISO 8601 text, bytes base64, NaN and infinities null, and
    other values that JSON lacks their text.
    A row of our own dataset that another tool has written keeps the `extra` it has.
    """
    left_out = {*TEXT_COLUMNS, *used}
    if "instruction" in row:
        left_out.add("input")
    extra: Row = {}
    if row.keys() >= OUR_PROMPTS and (before := _json_object(row["extra"])) is not None:
        extra = before
        left_out |= OUR_COLUMNS
    extra |= {k: value for k, value in row.items() if k not in left_out and value is not None}
    if not extra:
        return None
    try:
        text = json.dumps(extra, ensure_ascii=False, allow_nan=False, default=_json_value)
    except ValueError:
        text = json.dumps(_finite(extra), ensure_ascii=False, default=_json_value)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a character, which only JSON's escapes can hold
        text = json.dumps(json.loads(text))
    return text


def _json_object(value: Any) -> Row | None:
    """The object in a cell of `extra`, {} for null; None if the cell holds anything else."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    return {} if value is None else dict(value) if isinstance(value, dict) else None


def _json_value(value: Any) -> str:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return str(value)


def _finite(value: Any) -> Any:
    """The value with None in place of NaN and infinities, however deep."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _pair_rows(row: Row, scores: list[str]) -> Iterator[Row | str]:
    """The pair of a row; where `chosen` and `rejected` are lists of texts, each of the one beside each of the other.

    The candidate ids are then ID/chosen/0/1 (the first of one) and ID/rejected/2/3, from which an evaluation puts the row together again.
    """
    lists: list[Any] = [row.get(column) for column in ("chosen", "rejected")]
    if not all(
        isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts)
        for texts in lists
    ):
        yield _pair_row(row, scores)
        return
    known = row.get("id")
    name = (
        hashing.digest_json([row.get(column) for column in PROMPT_COLUMNS] + lists)[:16]
        if known is None
        else known
    )
    sides = [
        [(text, f"{name}/{side}/{i}/{len(texts)}") for i, text in enumerate(texts)]
        for side, texts in zip(("chosen", "rejected"), lists, strict=True)
    ]
    for (chosen, chosen_id), (rejected, rejected_id) in itertools.product(*sides):
        yield _pair_row(
            row | {"chosen": chosen, "rejected": rejected},
            scores,
            {chosen: chosen_id, rejected: rejected_id},
        )


def _pair_row(
    row: Row, scores: list[str], candidate_ids: Mapping[str, str] = MappingProxyType({})
) -> Row | str:
    (context, chosen), (other_context, rejected) = (
        _prompt_and_response(row, "chosen"),
        _prompt_and_response(row, "rejected"),
    )
    if not (chosen.strip() and rejected.strip()):
        return "empty_response"
    if context != other_context and isinstance(row["chosen"], str):
        return "different_prompts"
    if context != other_context:
        raise DataError(
            "'chosen' and 'rejected' repeat different prompts; expected to share all but the last message"
        )
    messages = context or _prompt(row)
    if _is_empty(messages):
        return "empty_prompt"
    if chosen == rejected:
        return "identical_responses"
    first, second = _shuffle_sides(messages, chosen, rejected)
    authors = {
        text: _author(row.get(f"{side}_model"))
        for text, side in ((chosen, "chosen"), (rejected, "rejected"))
    }
    return {
        "pair_id": hashing.digest_json([messages, first, second])[:16],
        **_prompt_columns(row, messages, (*AUTHOR_COLUMNS, *scores)),
        "first": _response(first, candidate_ids.get(first), authors.get(first)),
        "second": _response(second, candidate_ids.get(second), authors.get(second)),
        "gold_label": "first" if first == chosen else "second",
        "rewards": [_external_reward(row, scores, 1 if first == chosen else -1)] if scores else [],
        "reference_logps": [],
    }


def _shuffle_sides(messages: list[Message], one: str, other: str) -> list[str]:
    """The two texts in an order that depends on the pair's content alone: not on which was chosen, nor on which sorts lower."""
    texts = sorted((one, other))
    return texts[::-1] if int(hashing.digest_json([messages, texts]), 16) % 2 else texts


def _author(name: Any) -> str | None:
    return name if isinstance(name, str) and name else None


def _response(text: str, candidate_id: str | None, author: str | None) -> Row:
    """A response that is not encoded yet: it has no ids."""
    return {
        "candidate_id": candidate_id,
        "text": text,
        "token_ids": [],
        "finish_reason": "stop",
        "author": author,
    }


def _prompt(row: Row) -> list[Message]:
    """The prompt of a row as messages, without the answer it may end with; [] where its columns are null."""
    present = [column for column in PROMPT_COLUMNS if column in row]
    if not present:
        hint = "'messages', 'prompt' or 'instruction' (a pair may have it in the transcripts of 'chosen' and 'rejected' instead)"
        raise DataError(
            f"no column holds the prompt: expected {hint}; the columns are {', '.join(row)}"
        )
    column = next((column for column in present if row[column] is not None), "")
    if not column:
        return []
    value = row[column]
    if column == "instruction":
        parts = [value, row.get("input") or ""]
        if not all(isinstance(part, str) for part in parts):
            raise DataError(f"'instruction' and 'input' should be text; they hold {parts!r:.80}")
        value = "\n\n".join(part for part in parts if part.strip())
    if isinstance(value, str) and column != "messages":
        return [{"role": "user", "content": value}]
    messages = _messages(value, column)
    return messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages


def _prompt_and_response(row: Row, column: str) -> tuple[list[Message], str]:
    """The prompt that a response column repeats ([] if none) and the text of the response ("" for null)."""
    if column not in row:
        raise DataError(
            f"no column '{column}'; a pair needs 'chosen' and 'rejected', and the columns are {', '.join(row)}"
        )
    value = row[column] or ""
    if isinstance(value, str):
        return (
            _hh_transcript(value)
            if HH_TURN.match(value) and not any(row.get(name) for name in PROMPT_COLUMNS)
            else ([], value)
        )
    messages = _messages(value, column)
    if messages[-1]["role"] != "assistant":
        raise DataError(
            f"the last message of '{column}' should be the assistant's; its role is '{messages[-1]['role']}'"
        )
    return messages[:-1], messages[-1]["content"]


def _hh_transcript(text: str) -> tuple[list[Message], str]:
    """The turns before the last of a transcript as hh-rlhf writes it, and the last ("" where it is not the assistant's)."""
    _, *parts = HH_TURN.split(text)
    roles = ["user" if name == "Human" else "assistant" for name in parts[::2]]
    turns = [
        {"role": role, "content": content} for role, content in zip(roles, parts[1::2], strict=True)
    ]
    return turns[:-1], turns[-1]["content"] if roles[-1] == "assistant" else ""


def _messages(value: Any, column: str) -> list[Message]:
    """The messages of a cell with role and content only; raises DataError where it holds anything else."""
    try:
        messages = [{"role": message["role"], "content": message["content"]} for message in value]
    except (TypeError, KeyError, IndexError):
        messages = [{"role": None}]
    if not all(isinstance(text, str) for message in messages for text in message.values()):
        text = "" if column == "messages" else "text or "
        raise DataError(
            f"'{column}' should be {text}a list of {{role, content}} messages, both text; it holds {value!r:.80}"
        )
    return messages


def _is_empty(messages: list[Message]) -> bool:
    """Whether there is nothing to answer: only white space outside the system message."""
    return not any(
        message["content"].strip() for message in messages if message["role"] != "system"
    )


# ------------------------------------------------------------------------------------------------------------------ external scores


def _score_columns(external: str | None) -> list[str]:
    """The one or two columns that `external` names, [] for None."""
    columns = [] if external is None else [column.strip() for column in external.split(",")]
    if len(columns) > 2:
        raise DataError(
            f"external scores are COLUMN or CHOSEN_COLUMN,REJECTED_COLUMN; '{external}' names {len(columns)} columns"
        )
    return columns


def _external_reward(row: Row, columns: list[str], sign: int) -> Row:
    values = [_number(row.get(column), column) for column in columns]
    log_odds = sign * (values[0] - sum(values[1:]))  # for chosen; the sign turns it to `first`
    nothing = {"forward_log_odds": None, "swapped_log_odds": None, "verdict_mass": None}
    return {
        "reward_model": "external",
        "log_odds": None if math.isnan(log_odds) else log_odds,
        **nothing,
    }


def _number(value: Any, column: str) -> float:
    """A finite score, or NaN where there is none."""
    try:
        number = math.nan if value in (None, "") else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.inf
    if math.isinf(number) or isinstance(value, bool):
        raise DataError(
            f"'{column}' should be a finite number, or null for no verdict; it holds {value!r:.80}"
        )
    return number


# ------------------------------------------------------------------------------------------------------------- where rows come from


class _Source(NamedTuple):
    where: Path | str  # a local path, or a hub id
    config: str | None = None
    split: str | None = None


def _resolve_spec(spec: str) -> _Source:
    """Where a spec points: a local path that exists, else a hub id; raises DataError when it can be neither."""
    folder, _, split = spec.rpartition(":")
    if spec and to_path(spec).exists():
        return _Source(to_path(spec))
    if folder and to_path(folder).is_dir():
        return _Source(to_path(folder), None, split)
    match = HUB_SPEC.fullmatch(spec)
    if match is None or (Path(spec).suffix in READERS and not spec.startswith("hf://")):
        expected = (
            f"a file ({', '.join(READERS)}), a dataset folder, or a hub id such as ORG/NAME:SPLIT"
        )
        raise DataError(f"'{spec}' does not exist; expected {expected}")
    return _Source(*match.groups())


def _read(source: _Source) -> Iterator[Row]:
    """The rows of something that is not a dataset of ours."""
    if isinstance(source.where, str):
        return _read_hub(source)
    if source.where.is_dir():
        return _read_saved(source.where, source.split or DEFAULT_SPLIT)
    return _read_file(source.where)


def _read_hub(source: _Source) -> Iterator[Row]:
    import datasets

    try:
        data = datasets.load_dataset(
            source.where, source.config, split=source.split or DEFAULT_SPLIT
        )
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"'{source.where}' is no local path, and the hub did not give it: {_one_line(error)}"
        ) from error
    yield from _mapped_rows(data)


def _read_saved(path: Path, split: str) -> Iterator[Row]:
    if not (path / "state.json").is_file() and not (path / "dataset_dict.json").is_file():
        raise DataError(
            f"{path} is a dataset folder neither of ours nor of datasets.save_to_disk; name the data file inside it"
        )
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
        splits = data if isinstance(data, datasets.DatasetDict) else {DEFAULT_SPLIT: data}
        if split not in splits:
            raise DataError(
                f"{path} has no split '{split}'; it has {', '.join(splits)}: name one as {path}:SPLIT"
            )
        yield from _mapped_rows(splits[split])
    except (OSError, ValueError) as error:  # pa.ArrowInvalid is a ValueError
        raise DataError(
            f"{path} cannot be read ({_one_line(error)}); write it again with datasets.save_to_disk"
        ) from error


def _mapped_rows(data: Any) -> Iterator[Row]:
    for table in data.with_format("arrow").iter(ROWS_AT_A_TIME):
        yield from table.to_pylist()


def _read_file(path: Path) -> Iterator[Row]:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path}: unknown extension '{path.suffix}'; expected one of {', '.join(READERS)}"
        )
    try:
        with path.open("rb") as file:
            yield from reader(path, file)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or _one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _lines(path: Path, file: BinaryIO, newline: str) -> Iterator[str]:
    try:
        with io.TextIOWrapper(file, "utf-8-sig", newline=newline) as text:
            yield from text
    except UnicodeDecodeError as error:  # it knows the place in a buffer
        at, byte = _not_utf8(path)
        raise DataError(
            f"{path} is not UTF-8: byte offset {at} holds 0x{byte:02x}; convert it"
        ) from error


def _not_utf8(path: Path) -> tuple[int, int]:
    """The first byte that cannot be there, and its offset."""
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
    """The objects of a JSON list, or of a file with one object a line. Lines end at \\n only: U+2028 may stand inside a string."""
    expected = "expected a list of objects, or one object a line"
    lines = enumerate(_lines(path, file, "\n"), 1)
    first = next((one for one in lines if one[1].strip()), (1, ""))
    is_list = first[1].lstrip().startswith("[")
    whole = (
        [(first[0], "".join([first[1], *(text for _, text in lines)]))]
        if is_list
        else itertools.chain([first], lines)
    )
    for line, chunk in whole:
        if not chunk.strip():
            continue
        try:
            value = json.loads(chunk if is_list else chunk.removesuffix("\n"))
        except json.JSONDecodeError as error:
            at = line + error.lineno - 1
            raise DataError(
                f"{path}:{at}: malformed JSON ({error.msg} at column {error.colno}); {expected}"
            ) from error
        for row in value if is_list else [value]:
            if not isinstance(row, dict):
                raise DataError(f"{path}:{line}: found {row!r:.60}; {expected}")
            yield row


def _csv_rows(path: Path, file: BinaryIO) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # the default refuses a response of over 128 KiB
    reader = csv.DictReader(_lines(path, file, ""), strict=True)
    try:
        for row in reader:
            if (
                None in row or None in row.values()
            ):  # DictReader's marks for too many and too few fields
                raise DataError(
                    f"{path}:{reader.reader.line_num}: not as many fields as the header; quote text with commas"
                )
            yield row
    except csv.Error as error:
        raise DataError(f"{path}:{reader.reader.line_num}: malformed CSV ({error})") from error


def _parquet_rows(path: Path, file: BinaryIO) -> Iterator[Row]:
    if not file.seek(0, io.SEEK_END):
        return
    try:
        for batch in pyarrow.parquet.ParquetFile(
            file, buffer_size=BUFFER, pre_buffer=False
        ).iter_batches(ROWS_AT_A_TIME):
            yield from batch.to_pylist()
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} is truncated or is not Parquet ({_one_line(error)}); write or download it again"
        ) from error


READERS: dict[str, Callable[[Path, BinaryIO], Iterator[Row]]] = {
    **dict.fromkeys((".jsonl", ".json"), _json_rows),
    ".parquet": _parquet_rows,
    ".csv": _csv_rows,
}
