"""The stages that only count, on many rows.

The same rows as when they went row by row, in memory that does not grow with them.
"""

from __future__ import annotations

import random
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import settings as bounded
from hypothesis import strategies as st

from scir_cli import config, registry, stages
from scir_cli.data import dataset, files, hashing, schemas
from scir_cli.engine.policy import Policy

MODELS = ("judge", "implicit", "rubric")


def run(stage: str, **values: Any) -> dict[str, Any]:
    return stages.load(stage)(config.build(registry.STAGES[stage].settings, values, where="test"))


def odd_pairs(seed: int, rows: int) -> list[dict[str, Any]]:
    """Judged pairs with whatever may be odd: ties, no verdict, a model that is missing or comes
    late, texts seen before (also the other way round, under another prompt, far apart), empty
    texts, no token ids, ids twice, scripts, and rewards in any order.
    """
    draw = random.Random(seed)
    words = [
        "",
        "a",
        "b",
        "ab",
        "Zürich",
        "日本語のテキスト",
        "\n",
        "one two three four five",
        "x" * 300,
        "a\0b",
    ]

    def verdict(name: str) -> dict[str, Any]:
        value = draw.choice([None, 0.0, 0.25, 0.25, -0.25, draw.gauss(), draw.gauss(0, 3)])
        return {
            "reward_model": name,
            "log_odds": value,
            "forward_log_odds": value,
            "swapped_log_odds": None,
            "verdict_mass": 0.5,
        }

    def response(text: str, name: str) -> dict[str, Any]:
        ids = [] if draw.random() < 0.1 else [3] * draw.randrange(1, 9)
        author = draw.choice([None, "m1", "m2"])
        return {
            "candidate_id": name,
            "text": text,
            "token_ids": ids,
            "finish_reason": "stop",
            "author": author,
        }

    out = []
    for row in range(rows):
        prompt = f"p{draw.randrange(rows // 6)}" if draw.random() < 0.3 else f"p{row // 6}"
        known = [
            name for name in MODELS if draw.random() < 0.95 and (name != "implicit" or row > 5)
        ]
        draw.shuffle(known)
        texts = [
            draw.choice(words) + (str(draw.randrange(3)) if draw.random() < 0.5 else "")
            for _ in range(2)
        ]
        if out and draw.random() < 0.15:
            earlier = draw.choice(out)
            prompt, texts = (
                earlier["prompt_id"],
                [earlier[side]["text"] for side in ("first", "second")],
            )
            draw.shuffle(texts)
        out.append(
            {
                "pair_id": f"{draw.randrange(rows * 2):016x}",
                "prompt_id": prompt,
                "messages": [{"role": "user", "content": f"Question {prompt}"}],
                "subset": draw.choice([None, "s", "t"]),
                "first": response(texts[0], f"c{row}a"),
                "second": response(texts[1], f"c{row}b"),
                "gold_label": draw.choice([None, "first", "second"]),
                "rewards": [verdict(name) for name in known],
                "reference_logps": [{"weights_key": "w", "first": -1.5, "second": -2.0}]
                if row % 3
                else [],
            }
        )
    return out


def judged(folder: Path, rows: list[dict[str, Any]], rows_per_part: int) -> Path:
    bounds = dataset.part_bounds(len(rows), rows_per_part)
    plan = {"stage": "judge", "rows": len(rows), "model": "m1"}
    dataset.write_dataset(
        folder, "judged", plan, bounds, lambda low, high: dataset.Part(rows[low:high], high - low)
    )
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("odd")
    rows = odd_pairs(7, 2000)
    judged(root / "judged", rows, 190)
    before = [
        {**row, "rewards": again["rewards"]}
        for row, again in zip(rows, odd_pairs(8, 2000), strict=True)
    ]
    judged(root / "before", before[::-1][:1900] + before[:40], 700)
    return root


#: Names of columns -> those that the digests below were taken under
BEFORE = {"gold_label": "gold", "label_probability": "certainty"}


def with_british_spelling(value: Any) -> Any:
    """Figures under the keys that they had when the digests were made."""
    if not isinstance(value, dict):
        return value
    return {
        key.replace("labeled", "labelled"): with_british_spelling(entry)
        for key, entry in value.items()
    }


def content(manifest: dict[str, Any], out: Path, pairs: Path | None = None) -> str:
    """A digest of rows and manifest that no version of a library is part of, with names and signs
    of the first schema version.

    pairs: the judged dataset whose columns a consistency dataset had beside its own then.
    """
    rows, nulls = dataset.read_dataset(out).to_pylist(), manifest["nulls"]
    if pairs is not None:
        wide = dataset.read_dataset(pairs).to_pylist()
        assert [row["pair_id"] for row in rows] == [row["pair_id"] for row in wide]
        rows = [{**pair, **row} for pair, row in zip(wide, rows, strict=True)]
        nulls = files.read_json(pairs / "manifest.json")["nulls"] | nulls
    for row in rows:
        row["gold"] = row.pop("gold_label")
        assert row.pop("extra") is None
        for side in ("first", "second"):
            assert row[side].pop("reasoning") is None
        for name in ("messages", "prompt", "chosen", "rejected"):
            for message in row.get(name) or ():
                assert message.pop("more") is None
        if "label_probability" in row:
            probability = row.pop("label_probability")
            row["certainty"] = probability if probability is None else round(probability, 12)
        for reward in row["rewards"]:
            del reward["rationale_token_ids"]
            swapped = reward["swapped_log_odds"]
            reward["swapped_log_odds"] = swapped if swapped is None else -swapped
        row["reference_logps"] = [
            {"weights": r.pop("weights_key"), **r} for r in row["reference_logps"]
        ]
    counts = {name: manifest[name] for name in ("rows_in", "rows_out", "drops", "summary")}
    counts["summary"] = with_british_spelling(counts["summary"])
    counts["drops"] = with_british_spelling(counts["drops"])
    counts["nulls"] = {
        BEFORE.get(name, name): count for name, count in nulls.items() if name != "extra"
    }
    return hashing.digest_json([rows, counts, [part["rows"] for part in manifest["parts"]]])


PARTS: dict[str, Any] = {"rows_per_part": 300}
ALL = PARTS | {"keep_unlabeled": True}
FILTERS: dict[str, tuple[dict[str, Any], str]] = {
    "agree": (PARTS, "de24e6babd24d3fb1c80d79b61ca697c"),
    "unlabeled": (ALL, "a2a776398f47ccd484c344bdeea49264"),
    "two": (PARTS | {"agree_on": ["judge", "implicit"]}, "60c3c0b26010d0a6b85d4d2abec72537"),
    "majority": (ALL | {"rule": "majority", "min_margin": 0.1}, "64ae5dc538019ef050283a079ed5f920"),
    "one": (
        PARTS | {"rule": "implicit", "dedup": False, "min_confidence": 0.6},
        "9b6251b8750e0f1d58d0ab9e802d84ba",
    ),
    "random": (ALL | {"rule": "random:0.4:rubric", "seed": 3}, "6339ae0e36ffcfbf187c1b91866a6147"),
    "lengths": (
        PARTS
        | {"rule": "judge", "min_response_tokens": 2, "max_response_tokens": 7, "limit": 1777},
        "5d8093283c236ce20f793998e28ee2c3",
    ),
    "neutral": (
        ALL | {"agree_on": ["judge", "rubric"], "length_neutral": True},
        "a1a31ee84ed11cb4abb07ebc6110844b",
    ),
    "capped": (
        ALL | {"rule": "judge", "max_pairs_per_prompt": 2},
        "5df8d20f5a6cc21fe1cb6a03baccb049",
    ),
    "cream": (
        ALL | {"rule": "judge", "cream_previous": "before"},
        "c6e9ddf323d14568956ae183fc2eac69",
    ),
    "cream by prompt": (
        PARTS
        | {
            "rule": "rubric",
            "cream_previous": "before",
            "cream_reward_model": "judge",
            "cream_average": "prompt",
        },
        "b34e13629ed1a9daa74932da2d8c7c3b",
    ),
    "all at once": (
        ALL
        | {
            "rule": "majority",
            "length_neutral": True,
            "max_pairs_per_prompt": 1,
            "cream_previous": "before",
            "cream_average": "prompt",
            "trl_jsonl": True,
            "min_margin": 0.05,
        },
        "10cb3845fc299bc6c3487097b8d35452",
    ),
}


@pytest.mark.parametrize("name", FILTERS)
def test_filter_keeps_the_rows_that_it_kept_row_by_row(world: Path, tmp_path: Path, name: str):
    """The digests are of what the code of 2026-11-24 wrote, before it went column by column.

    Its one rounding of external scores to single precision was taken out for these digests.
    """
    settings, digest = FILTERS[name]
    settings = settings | {
        key: str(world / settings[key]) for key in ("cream_previous",) if key in settings
    }
    manifest = run("filter", input=str(world / "judged"), output_dir=tmp_path / "out", **settings)
    assert content(manifest, tmp_path / "out") == digest
    if settings.get("trl_jsonl"):
        assert (
            hashing.digest_file(tmp_path / "out" / "trl.jsonl")
            == "e87a69cd8b51cbbaa141277367a78e02"
        )


@pytest.mark.parametrize("begin", ["", "These are the first words of every answer: "])
def test_the_repeats_are_those_that_a_set_of_whole_texts_finds(tmp_path: Path, begin: str):
    """All texts of six letters, some of which begin alike.

    A glance tells them apart, or whole texts have to.
    """
    rows = odd_pairs(2, 300)
    for number, row in enumerate(rows):
        for side in ("first", "second"):
            row[side]["text"] = begin + f"{row[side]['text']:_<6.6}" + ("" if number % 3 else "!")
    seen: Counter[Any] = Counter(
        (row["prompt_id"], frozenset(row[side]["text"] for side in ("first", "second")))
        for row in rows
    )
    settings = {
        "input": str(judged(tmp_path / "judged", rows, 70)),
        "rule": "judge",
        "rows_per_part": 110,
    }
    manifest = run("filter", output_dir=tmp_path / "out", **settings)
    assert manifest["drops"]["duplicate"] == seen.total() - len(seen) > 20


def test_check_consistency_in_parts_equals_that_of_a_whole_table(world: Path, tmp_path: Path):
    more = {"by_subset": True, "compare_to": [str(world / "before")]}
    manifest = run(
        "check-consistency",
        input=str(world / "judged"),
        output_dir=tmp_path / "out",
        **PARTS,
        **more,
    )
    assert (
        content(manifest, tmp_path / "out", world / "judged") == "2f5d0eaa4b7f34155caa022400363c67"
    )
    stays = {
        name: figures
        for name, figures in manifest["across"]["against"][0].items()
        if name != "dataset"
    }
    figures = with_british_spelling({"by_subset": manifest["by_subset"]})
    digest = hashing.digest_json([figures["by_subset"], stays])
    assert digest == "e517fb78b48ef511d8edbbefdb23f149"


def odd_candidates(folder: Path, encoding: str) -> Path:
    """Candidates with token ids of an encoding; some repeat others or are blank (also to Unicode
    alone), of prompts with one to five of them, with scores or without.
    """
    draw = random.Random(5)
    words = ["", " ", "\u3000\x1c\x85", "a", "b c", "Zürich", "x" * 300]
    rows, scores = [], []
    for prompt in range(300):
        for number in range(draw.choice([1, 2, 3, 5])):
            row = {
                "candidate_id": f'{prompt}"ü{number}'
                if prompt % 9 == 0
                else f"{prompt * 10 + number:016x}",
                "prompt_id": f"p{prompt}",
            }
            row |= {
                "messages": [{"role": "user", "content": f"Question {prompt}"}],
                "subset": draw.choice([None, "s"]),
                "seed": number,
            }
            row |= {
                "response": draw.choice(words) + draw.choice(["", "!"]),
                "token_ids": [5] * draw.randrange(1, 9),
                "finish_reason": "stop",
            }
            rows.append(
                row
                | {
                    "duplicate_of": draw.choice([None, None, None, "", "other"]),
                    "weights_key": f"m{number % 2}",
                }
            )
            scores.append(draw.choice([None, 1.0, 0.1 * len(rows), draw.gauss()]))

    def make(low: int, high: int) -> dataset.Part:
        table = schemas.to_table("candidates", rows[low:high])
        return dataset.Part(
            table.append_column("score", pa.array(scores[low:high], pa.float64())), high - low
        )

    bounds = dataset.part_bounds(len(rows), 130)
    plan = {"stage": "generate"}
    dataset.write_dataset(folder, "candidates", plan, bounds, make, encoding=encoding)
    return folder


JUDGED = {
    "all": "6527fdbb13827f1e0c35b0e9cab32f65",
    "random:2": "f18dbed19100061b62f418bb3cbacc7e",
    "best-worst": "62926204d2fe891d31e6382cd0f6004c",
    "cross": "10f07284847ebff44a0930a6f23a70df",
}


def test_judge_makes_the_pairs_that_it_made_row_by_row(
    tiny_llama: Path, tiny_policy: Policy, tmp_path: Path
):
    """The digests are of what the code of 2026-11-24 wrote, before it went column by column.

    Its one rounding of external scores to single precision was taken out for these digests.
    """
    encoding = tiny_policy.chat.encoding_digest()
    source = str(odd_candidates(tmp_path / "candidates", encoding))
    settings = {
        "model": str(tiny_llama),
        "device": "cpu",
        "reward_models": ["external"],
        "score_column": "score",
        "rows_per_part": 100,
    }
    for pairs, digest in JUDGED.items():
        manifest = run(
            "judge", input=source, output_dir=tmp_path / pairs, pairs=pairs, seed=3, **settings
        )
        assert content(manifest, tmp_path / pairs) == digest, pairs


def test_a_part_without_rows_changes_nothing(tmp_path: Path):
    rows = odd_pairs(3, 40)
    judged(tmp_path / "whole", rows, 20)
    bounds = [(0, 0), (0, 20), (20, 20), (20, 40), (40, 40)]
    plan = {"stage": "judge", "rows": 40, "model": "m1"}
    dataset.write_dataset(
        tmp_path / "gaps",
        "judged",
        plan,
        bounds,
        lambda low, high: dataset.Part(rows[low:high], high - low),
    )
    rules = ALL | {
        "rule": "judge",
        "length_neutral": True,
        "max_pairs_per_prompt": 2,
        "cream_previous": str(tmp_path / "gaps"),
    }
    for stage, settings in (("filter", rules), ("check-consistency", PARTS)):
        outs = [tmp_path / stage / name for name in ("whole", "gaps")]
        one, other = (
            run(stage, input=str(tmp_path / out.name), output_dir=out, **settings) for out in outs
        )
        wide = [tmp_path / out.name if stage == "check-consistency" else None for out in outs]
        assert content(one, outs[0], wide[0]) == content(other, outs[1], wide[1])
    starts = dataset.group_bounds(dataset.open_dataset(tmp_path / "gaps"), "subset", 1)
    assert starts == dataset.group_bounds(dataset.open_dataset(tmp_path / "whole"), "subset", 1)
    subsets = [row["subset"] for row in rows]
    assert all(
        low == 0 or subsets[low] is None or subsets[low] != subsets[low - 1] for low, _ in starts
    )
    assert starts[-1][1] == 40


@bounded(deadline=None, max_examples=30)
@given(
    st.lists(st.text(max_size=20) | st.text("ab\0", max_size=20), max_size=12), st.integers(1, 40)
)
def test_equal_texts_have_equal_hashes_wherever_they_lie(texts: list[str], block: int):
    column = pa.chunked_array(
        [pa.array(["before", *texts])[1:], pa.array(texts[::-1], pa.string())], pa.string()
    )
    plain = hashing.hash_texts(column)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hashing, "HASH_BLOCK", block)
        assert hashing.hash_texts(column).tolist() == plain.tolist()
    assert len(set(plain.tolist())) == len(set(texts))
    assert (
        plain.tolist()
        == hashing.hash_texts(
            pa.chunked_array([pa.array(column.to_pylist(), pa.string())])
        ).tolist()
    )


# ------------------------------ memory

PART, LETTERS = 250, 3000  # rows of a part, letters of a response


def written(folder: Path, table: pa.Table, parts: int) -> Path:
    """The same rows again and again, under other prompts."""

    def make(low: int, high: int) -> dataset.Part:
        prompts = pa.array([f"{low}/{name}" for name in table["prompt_id"].to_pylist()])
        return dataset.Part(
            table.set_column(table.column_names.index("prompt_id"), "prompt_id", prompts), PART
        )

    kind = table.schema.metadata[schemas.KIND_KEY].decode()
    plan = {"stage": "generate" if kind == "candidates" else "judge", "parts": parts}
    dataset.write_dataset(
        folder, kind, plan, [(i * PART, (i + 1) * PART) for i in range(parts)], make
    )
    return folder


def long_pairs() -> pa.Table:
    rows = odd_pairs(1, PART)
    for row in rows:
        for side in ("first", "second"):
            row[side]["text"] += "x" * LETTERS
    return schemas.to_table("judged", rows)


def long_candidates() -> pa.Table:
    common = {
        "messages": [{"role": "user", "content": "Go."}],
        "finish_reason": "stop",
        "weights_key": "m",
        "seed": 0,
    }
    rows = [
        {
            "candidate_id": f"{i}",
            "prompt_id": f"{i // 2}",
            "response": f"{i}" + "x" * LETTERS,
            "token_ids": [5],
            **common,
        }
        for i in range(PART)
    ]
    return schemas.to_table("candidates", rows).append_column(
        "score", pa.array([i % 7 / 7 for i in range(PART)])
    )


def peak(monkeypatch: pytest.MonkeyPatch, stage: str, **values: Any) -> tuple[int, int]:
    """The most bytes that Arrow, Python and numpy held at once, and the most parts that were mapped
    at once.
    """
    mapped, read = [0], dataset.read_part

    def counting(path: Path, digest: str | None = None) -> pa.Table:
        table = read(path, digest)
        mapped.append(
            sum("/data-0" in line for line in Path("/proc/self/maps").read_text().splitlines())
        )
        return table

    pool, before = pa.proxy_memory_pool(pa.default_memory_pool()), pa.default_memory_pool()
    monkeypatch.setattr(dataset, "read_part", counting)
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        run(stage, **values)
        return pool.max_memory() + tracemalloc.get_traced_memory()[1], max(mapped)
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(before)
        monkeypatch.undo()


@pytest.mark.parametrize(
    "stage", ["filter", "filter with all its rules", "check-consistency", "judge"]
)
def test_memory_does_not_grow_with_the_texts(
    stage: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Five or six times the parts.

    A row adds numbers (hashes, log-odds, an id), and of its texts, 6,000 letters, nothing.
    """
    name, _, everything = stage.partition(" with ")
    table = long_candidates() if name == "judge" else long_pairs()
    settings: dict[str, Any] = {"rows_per_part": PART}
    if name == "judge":
        settings |= {
            "model": str(tiny_llama),
            "device": "cpu",
            "reward_models": ["external"],
            "score_column": "score",
        }
    n_few, n_many = (2, 10) if name == "judge" else (4, 24)
    few, many = (written(tmp_path / f"in{parts}", table, parts) for parts in (n_few, n_many))
    if everything:
        settings |= {
            "rule": "judge",
            "length_neutral": True,
            "max_pairs_per_prompt": 3,
            "cream_previous": str(few),
            "keep_unlabeled": True,
        }
    run(name, input=str(few), output_dir=tmp_path / "warm", **settings)
    small, _ = peak(monkeypatch, name, input=str(few), output_dir=tmp_path / "out4", **settings)
    large, mapped = peak(
        monkeypatch, name, input=str(many), output_dir=tmp_path / "out24", **settings
    )
    assert (large - small) / ((n_many - n_few) * PART) < (
        80 if name == "filter" else 300
    )  # bytes a row
    assert mapped <= 3
