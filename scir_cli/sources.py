"""What users bring: our own dataset folders, `datasets.save_to_disk` folders, JSONL/JSON/Parquet/CSV files, hub ids.

    prompts   `messages` (a list of {role, content}), or `prompt` (text or messages), or `instruction` with an optional `input`
    pairs     `chosen` and `rejected`: texts or assistant messages beside such a prompt, or transcripts that both repeat it (messages, or
              text with "\\n\\nHuman:" and "\\n\\nAssistant:" as hh-rlhf has it); lists of texts (RewardBench 2) are every chosen one
              beside every rejected one, and `id` goes into the candidate ids
    authors   optional: `chosen_model` and `rejected_model` (as RewardBench has them)
    subset    optional (or `dataset`, as AlpacaEval has it), kept; every other column is ignored

A spec is a path, `FOLDER:SPLIT` for a saved folder, or `[hf://]ORG/NAME[:CONFIG][:SPLIT]` on the hub; SPLIT is train unless
given. Left out on purpose: streaming (rows are read into memory), images and tools in messages.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet

from scir_cli import schemas, store
from scir_cli.errors import DataError, suggest
from scir_cli.places import place

Row = dict[str, Any]
Message = dict[str, str]
PROMPT_COLUMNS = ("messages", "prompt", "instruction")  # the first that is not null is the prompt
DEFAULT_SPLIT = "train"
HH_TURN = re.compile(r"\n\n(Human|Assistant): ?")
HUB_SPEC = re.compile(r"(?:hf://(?:datasets/)?)?(\w[\w.-]*/\w[\w.-]*)(?::([^:]+))??(?::([^:]+))?")


def open_prompts(spec: str, limit: int | None = None) -> tuple[pa.Table | store.Dataset, Counter[str]]:
    """As `load_prompts`; a dataset of ours stays on disk, to be read a slice at a time."""
    source = _locate(spec)
    if not isinstance(source.where, str) and store.is_dataset(source.where):
        return store.open_dataset(source.where, "prompts").head(limit), Counter()
    rows, drops = _collect(source, _read(source, limit), lambda row: [_prompt_row(row)], "prompt")
    return schemas.to_table("prompts", rows), drops


def load_prompts(spec: str, limit: int | None = None) -> tuple[pa.Table, Counter[str]]:
    """The prompts of `spec` as a table of kind "prompts", and the rows dropped by reason.

    limit: read only this many input rows. Drops: empty_prompt, duplicate_prompt. Raises DataError naming file and row or column.
    """
    rows, drops = open_prompts(spec, limit)
    return (rows if isinstance(rows, pa.Table) else rows.read()), drops


def open_pairs(spec: str, limit: int | None = None, external: str | None = None) -> tuple[pa.Table | store.Dataset, Counter[str]]:
    """As `load_pairs`; a dataset of ours stays on disk, to be read a slice at a time."""
    source = _locate(spec)
    if not isinstance(source.where, str) and store.is_dataset(source.where):
        if external is not None:
            raise DataError(f"{spec} is a dataset of ours with rewards of its own; external scores come with chosen and rejected")
        return store.open_dataset(source.where, "judged", "consistency", "preferences").seen_as("judged").head(limit), Counter()
    rows = _read(source, limit)
    scores = _score_columns(source, rows, external)
    pairs, drops = _collect(source, rows, lambda row: _pair_rows(row, scores), "pair")
    return schemas.to_table("judged", pairs), drops


def load_pairs(spec: str, limit: int | None = None, external: str | None = None) -> tuple[pa.Table, Counter[str]]:
    """The pairs of `spec` as a table of kind "judged", without token ids, `gold` naming the chosen side; and drops by reason.

    Which response is `first` follows from a hash of the pair, so the side does not tell the label.
    external: "COLUMN" (log-odds in nats that `chosen` is better) or "CHOSEN_COLUMN,REJECTED_COLUMN" (scores whose difference is the
    log-odds); it becomes the reward model "external", and null or NaN is no verdict.
    Drops: empty_prompt, empty_response, identical_responses, different_prompts (of two transcripts as text), duplicate_pair. Raises DataError naming file and row or column.
    """
    rows, drops = open_pairs(spec, limit, external)
    return (rows if isinstance(rows, pa.Table) else rows.read()), drops


def digest(spec: str) -> str:
    """A digest of the content of a local path; for the hub `hub:ID@REVISION`, or `hub:ID` where the revision cannot be known."""
    where, config, split = _locate(spec)
    tail = "".join(f":{part}" for part in (config, split) if part)
    if not isinstance(where, str):
        return store.digest_path(where) + tail
    import datasets

    try:
        revision = datasets.load_dataset_builder(where, config).hash  # the commit, also when it comes from the cache
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError):
        revision = None
    return f"hub:{where}" + (f"@{revision}" if revision else "") + tail


# -------------------------------------------------------------------------------------------------------- rows to prompts and pairs


def _collect(
    source: _Source, rows: list[Row], make: Callable[[Row], Iterable[Row | str]], noun: str
) -> tuple[list[Row], Counter[str]]:
    """What `make` makes of each row, once per id; a word among it is the reason for a drop."""
    kept: dict[str, Row] = {}
    drops: Counter[str] = Counter()
    for number, row in enumerate(rows, 1):
        try:
            everything = list(make(row))
        except DataError as error:
            raise DataError(f"{source.where}, row {number}: {error}") from error
        except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair; no hash, Arrow file or tokenizer can hold it
            text = ascii(error.object[error.start])
            raise DataError(f"{source.where}, row {number}: {text} is half a character; remove it") from error
        for made in everything:
            if isinstance(made, str):
                drops[made] += 1
            elif made[f"{noun}_id"] in kept:
                drops[f"duplicate_{noun}"] += 1
            else:
                kept[made[f"{noun}_id"]] = made
    return list(kept.values()), drops


def _prompt_row(row: Row) -> Row | str:
    messages = _prompt(row)
    return "empty_prompt" if _is_empty(messages) else _prompt_columns(row, messages)


def _prompt_columns(row: Row, messages: list[Message]) -> Row:
    subset = row.get("subset", row.get("dataset"))
    subset = None if subset in (None, "") else str(subset)
    return {"prompt_id": store.digest_json(messages)[:16], "messages": messages, "subset": subset}


def _pair_rows(row: Row, scores: list[str]) -> Iterator[Row | str]:
    """The pair of a row; where `chosen` and `rejected` are lists of texts, each of the one beside each of the other.

    The candidate ids are then ID/chosen/0/1 (the first of one) and ID/rejected/2/3, from which an evaluation puts the row together again.
    """
    lists: list[Any] = [row.get(column) for column in ("chosen", "rejected")]
    if not all(isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts) for texts in lists):
        yield _pair_row(row, scores)
        return
    known = row.get("id")
    name = store.digest_json([row.get(column) for column in PROMPT_COLUMNS] + lists)[:16] if known is None else known
    sides = [
        [(text, f"{name}/{side}/{i}/{len(texts)}") for i, text in enumerate(texts)]
        for side, texts in zip(("chosen", "rejected"), lists, strict=True)
    ]
    for (chosen, chosen_id), (rejected, rejected_id) in itertools.product(*sides):
        yield _pair_row(row | {"chosen": chosen, "rejected": rejected}, scores, {chosen: chosen_id, rejected: rejected_id})


def _pair_row(row: Row, scores: list[str], candidate_ids: Mapping[str, str] = MappingProxyType({})) -> Row | str:
    (context, chosen), (other_context, rejected) = _answer(row, "chosen"), _answer(row, "rejected")
    if not (chosen.strip() and rejected.strip()):
        return "empty_response"
    if context != other_context and isinstance(row["chosen"], str):
        return "different_prompts"
    if context != other_context:
        raise DataError("'chosen' and 'rejected' repeat different prompts; expected to share all but the last message")
    messages = context or _prompt(row)
    if _is_empty(messages):
        return "empty_prompt"
    if chosen == rejected:
        return "identical_responses"
    first, second = _sides(messages, chosen, rejected)
    authors = {text: _author(row.get(f"{side}_model")) for text, side in ((chosen, "chosen"), (rejected, "rejected"))}
    return {
        "pair_id": store.digest_json([messages, first, second])[:16],
        **_prompt_columns(row, messages),
        "first": _response(first, candidate_ids.get(first), authors.get(first)),
        "second": _response(second, candidate_ids.get(second), authors.get(second)),
        "gold": "first" if first == chosen else "second",
        "rewards": [_external_reward(row, scores, 1 if first == chosen else -1)] if scores else [],
        "reference_logps": [],
    }


def _sides(messages: list[Message], one: str, other: str) -> list[str]:
    """The two texts in an order that depends on the pair's content alone: not on which was chosen, nor on which sorts lower."""
    texts = sorted((one, other))
    return texts[::-1] if int(store.digest_json([messages, texts]), 16) % 2 else texts


def _author(name: Any) -> str | None:
    return name if isinstance(name, str) and name else None


def _response(text: str, candidate_id: str | None, author: str | None) -> Row:
    """A response that is not encoded yet: it has no ids."""
    return {"candidate_id": candidate_id, "text": text, "token_ids": [], "finish_reason": "stop", "author": author}


def _prompt(row: Row) -> list[Message]:
    """The prompt of a row as messages, without the answer it may end with; [] where its columns are null."""
    present = [column for column in PROMPT_COLUMNS if column in row]
    if not present:
        hint = "'messages', 'prompt' or 'instruction' (a pair may have it in the transcripts of 'chosen' and 'rejected' instead)"
        raise DataError(f"no column holds the prompt: expected {hint}; the columns are {', '.join(row)}")
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


def _answer(row: Row, column: str) -> tuple[list[Message], str]:
    """The prompt that a response column repeats ([] if none) and the text of the response ("" for null)."""
    if column not in row:
        raise DataError(f"no column '{column}'; a pair needs 'chosen' and 'rejected', and the columns are {', '.join(row)}")
    value = row[column] or ""
    if isinstance(value, str):
        return _hh_transcript(value) if HH_TURN.match(value) and not any(row.get(name) for name in PROMPT_COLUMNS) else ([], value)
    messages = _messages(value, column)
    if messages[-1]["role"] != "assistant":
        raise DataError(f"the last message of '{column}' should be the assistant's; its role is '{messages[-1]['role']}'")
    return messages[:-1], messages[-1]["content"]


def _hh_transcript(text: str) -> tuple[list[Message], str]:
    """The turns before the last of a transcript as hh-rlhf writes it, and the last ("" where it is not the assistant's)."""
    _, *parts = HH_TURN.split(text)
    roles = ["user" if name == "Human" else "assistant" for name in parts[::2]]
    turns = [{"role": role, "content": content} for role, content in zip(roles, parts[1::2], strict=True)]
    return turns[:-1], turns[-1]["content"] if roles[-1] == "assistant" else ""


def _messages(value: Any, column: str) -> list[Message]:
    """The messages of a cell with role and content only; raises DataError where it holds anything else."""
    try:
        messages = [{"role": message["role"], "content": message["content"]} for message in value]
    except (TypeError, KeyError, IndexError):
        messages = [{"role": None}]
    if not all(isinstance(text, str) for message in messages for text in message.values()):
        text = "" if column == "messages" else "text or "
        raise DataError(f"'{column}' should be {text}a list of {{role, content}} messages, both text; it holds {value!r:.80}")
    return messages


def _is_empty(messages: list[Message]) -> bool:
    """Whether there is nothing to answer: only white space outside the system message."""
    return not any(message["content"].strip() for message in messages if message["role"] != "system")


# ------------------------------------------------------------------------------------------------------------------ external scores


def _score_columns(source: _Source, rows: list[Row], external: str | None) -> list[str]:
    """The one or two columns that `external` names, [] for None; raises DataError for a column that no row has."""
    columns = [] if external is None else [column.strip() for column in external.split(",")]
    if len(columns) > 2:
        raise DataError(f"external scores are COLUMN or CHOSEN_COLUMN,REJECTED_COLUMN; '{external}' names {len(columns)} columns")
    present = dict.fromkeys(name for row in rows for name in row) if columns else {}
    for column in columns:
        if column not in present:
            hint = suggest(column, present).partition(" Known:")[0]  # the message lists the columns anyway
            raise DataError(f"{source.where} has no column '{column}'; the columns are {', '.join(present)}.{hint}")
    return columns


def _external_reward(row: Row, columns: list[str], sign: int) -> Row:
    values = [_number(row.get(column), column) for column in columns]
    log_odds = sign * (values[0] - sum(values[1:]))  # for chosen; the sign turns it to `first`
    nothing = {"forward_log_odds": None, "swapped_log_odds": None, "verdict_mass": None}
    return {"reward_model": "external", "log_odds": None if math.isnan(log_odds) else log_odds, **nothing}


def _number(value: Any, column: str) -> float:
    """A finite score, or NaN where there is none."""
    try:
        number = math.nan if value in (None, "") else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.inf
    if math.isinf(number) or isinstance(value, bool):
        raise DataError(f"'{column}' should be a finite number, or null for no verdict; it holds {value!r:.80}")
    return number


# ------------------------------------------------------------------------------------------------------------- where rows come from


class _Source(NamedTuple):
    where: Path | str  # a local path, or a hub id
    config: str | None = None
    split: str | None = None


def _locate(spec: str) -> _Source:
    """Where a spec points: a local path that exists, else a hub id; raises DataError when it can be neither."""
    folder, _, split = spec.rpartition(":")
    if spec and place(spec).exists():
        return _Source(place(spec))
    if folder and place(folder).is_dir():
        return _Source(place(folder), None, split)
    match = HUB_SPEC.fullmatch(spec)
    if match is None or (Path(spec).suffix in READERS and not spec.startswith("hf://")):
        expected = f"a file ({', '.join(READERS)}), a dataset folder, or a hub id such as ORG/NAME:SPLIT"
        raise DataError(f"'{spec}' does not exist; expected {expected}")
    return _Source(*match.groups())


def _read(source: _Source, limit: int | None) -> list[Row]:
    """The first `limit` rows of something that is not a dataset of ours; raises DataError if there are none."""
    if isinstance(source.where, str):
        rows = _read_hub(source, limit)
    elif source.where.is_dir():
        rows = _read_saved(source.where, source.split or DEFAULT_SPLIT, limit)
    else:
        rows = _read_file(source.where, limit)
    if not rows:
        raise DataError(f"{source.where} is empty; expected at least one row")
    return rows


def _read_hub(source: _Source, limit: int | None) -> list[Row]:
    import datasets

    try:
        data = datasets.load_dataset(source.where, source.config, split=source.split or DEFAULT_SPLIT)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"'{source.where}' is no local path, and the hub did not give it: {_one_line(error)}") from error
    return data.with_format("arrow")[:limit].to_pylist()


def _read_saved(path: Path, split: str, limit: int | None) -> list[Row]:
    if not (path / "state.json").is_file() and not (path / "dataset_dict.json").is_file():
        raise DataError(f"{path} is a dataset folder neither of ours nor of datasets.save_to_disk; name the data file inside it")
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
        splits = data if isinstance(data, datasets.DatasetDict) else {DEFAULT_SPLIT: data}
        if split not in splits:
            raise DataError(f"{path} has no split '{split}'; it has {', '.join(splits)}: name one as {path}:SPLIT")
        return splits[split].with_format("arrow")[:limit].to_pylist()
    except (OSError, ValueError) as error:  # pa.ArrowInvalid is a ValueError
        raise DataError(f"{path} cannot be read ({_one_line(error)}); write it again with datasets.save_to_disk") from error


def _read_file(path: Path, limit: int | None) -> list[Row]:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: unknown extension '{path.suffix}'; expected one of {', '.join(READERS)}")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    return list(itertools.islice(reader(path, raw), limit)) if raw else []


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _text(path: Path, raw: bytes) -> str:
    try:
        return raw.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: byte offset {error.start} holds 0x{raw[error.start]:02x}; convert it") from error


def _json_rows(path: Path, raw: bytes) -> Iterator[Row]:
    """The objects of a JSON list, or of a file with one object a line. Lines end at \\n only: U+2028 may stand inside a string."""
    expected = "expected a list of objects, or one object a line"
    text = _text(path, raw)
    is_list = text.lstrip().startswith("[")
    for line, chunk in [(1, text)] if is_list else enumerate(text.split("\n"), 1):
        if not chunk.strip():
            continue
        try:
            value = json.loads(chunk)
        except json.JSONDecodeError as error:
            at = line + error.lineno - 1
            raise DataError(f"{path}:{at}: malformed JSON ({error.msg} at column {error.colno}); {expected}") from error
        for row in value if is_list else [value]:
            if not isinstance(row, dict):
                raise DataError(f"{path}:{line}: found {row!r:.60}; {expected}")
            yield row


def _csv_rows(path: Path, raw: bytes) -> Iterator[Row]:
    csv.field_size_limit(max(len(raw), csv.field_size_limit()))  # the default refuses a response of over 128 KiB
    reader = csv.DictReader(io.StringIO(_text(path, raw), newline=""), strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():  # DictReader's marks for too many and too few fields
                raise DataError(f"{path}:{reader.reader.line_num}: not as many fields as the header; quote text with commas")
            yield row
    except csv.Error as error:
        raise DataError(f"{path}:{reader.reader.line_num}: malformed CSV ({error})") from error


def _parquet_rows(path: Path, raw: bytes) -> Iterator[Row]:
    try:
        for batch in pyarrow.parquet.ParquetFile(pa.BufferReader(raw)).iter_batches():
            yield from batch.to_pylist()
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is truncated or is not Parquet ({_one_line(error)}); write or download it again") from error


READERS: dict[str, Callable[[Path, bytes], Iterator[Row]]] = {
    **dict.fromkeys((".jsonl", ".json"), _json_rows),
    ".parquet": _parquet_rows,
    ".csv": _csv_rows,
}
