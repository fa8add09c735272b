"""What a dataset folder holds beside its rows.

A card, a schema version, and the input's columns.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest

from scir_cli import config, registry, stages
from scir_cli.data import dataset, dataset_card, files, schemas
from scir_cli.errors import DataError, PlanMismatch

PLAN = {"stage": "generate", "settings": {"limit": None, "top_p": 0.9}, "input": "abc"}


def run(stage: str, **values: Any) -> dict[str, Any]:
    return stages.load(stage)(config.build(registry.STAGES[stage].settings, values, where="test"))


def prompts(folder: Path, drops: int = 1, **options: Any) -> dict[str, Any]:
    """Two prompts, one of them in each part, and the given number of dropped rows."""
    rows = [
        {"prompt_id": name, "messages": [{"role": "user", "content": name}], "extra": '{"id": 1}'}
        for name in "ab"
    ]

    def make(low: int, high: int) -> dataset.Part:
        return dataset.Part(rows[low:high], high - low)

    dropped = Counter(empty_prompt=drops)
    return dataset.write_dataset(
        folder, "prompts", PLAN, [(0, 1), (1, 2)], make, dropped_before=dropped, **options
    )


# --------------------------------------------------------------------------------------- cards


def test_a_card_describes_the_rows_and_their_origin(tmp_path: Path):
    manifest = prompts(tmp_path / "p", inputs={"input": "mine.jsonl", "previous": None})
    card = (tmp_path / "p" / "README.md").read_text(encoding="utf-8")
    lines = card.splitlines()
    assert "# A prompts dataset, written by `scir generate`" in lines
    assert f"| kind | prompts, schema version {schemas.VERSION} |" in lines
    assert "| rows | 2 of 3 read |" in lines
    assert "| input | mine.jsonl; abc |" in lines  # its name, and its digest
    assert "| empty_prompt | 1 |" in lines
    assert "| top_p | 0.9 |" in lines
    assert "limit" not in card  # it has no value
    assert manifest["inputs"] == {"input": "mine.jsonl"}
    assert manifest["digest"] in card


@pytest.mark.parametrize("kind", schemas.COLUMNS)
def test_a_card_lists_every_column_with_its_meaning(tmp_path: Path, kind: str):
    dataset.write_dataset(tmp_path, kind, PLAN, [], lambda low, high: dataset.Part([], 0))
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    for column in schemas.COLUMNS[kind]:
        assert f"| `{column.name}` | " in card
        assert column.meaning.replace("|", "\\|") in card
    if kind == "judged":
        assert (
            "| `rewards[].swapped_log_odds` | double, may be null | the same, also positive "
            "if first is better"
        ) in card
        assert "| `first.token_ids` | list of int32 |" in card
        assert "`second.token_ids`" not in card  # as in `first`


def test_a_folder_that_was_uploaded_with_its_card_opens_in_datasets(tmp_path: Path):
    prompts(tmp_path / "p")
    assert datasets.load_from_disk(str(tmp_path / "p"))["prompt_id"] == ["a", "b"]
    # the hub's copy: `datasets` refuses state.json on this machine only, where load_from_disk is
    # meant
    left_out = shutil.ignore_patterns("state.json", ".*")
    shutil.copytree(tmp_path / "p", tmp_path / "uploaded", ignore=left_out)
    opened = datasets.load_dataset(str(tmp_path / "uploaded"), cache_dir=str(tmp_path / "cache"))
    assert {name: split["prompt_id"][:] for name, split in opened.items()} == {"train": ["a", "b"]}
    data = huggingface_hub.DatasetCard.load(tmp_path / "p" / "README.md").data
    assert data.size_categories == ["n<1K"]
    assert data.configs[0]["data_files"] == [{"split": "train", "path": "data-*.arrow"}]


def test_a_run_that_ended_before_its_manifest_writes_the_same_card_again(tmp_path: Path):
    first = prompts(tmp_path / "p")
    card = (tmp_path / "p" / "README.md").read_bytes()
    (tmp_path / "p" / "manifest.json").unlink()
    (tmp_path / "p" / "README.md").write_text("half", encoding="utf-8")
    again = prompts(tmp_path / "p")
    assert again["digest"] == first["digest"]
    assert (tmp_path / "p" / "README.md").read_bytes() == card


def test_a_cell_of_a_card_is_one_line_whatever_a_setting_holds():
    manifest = {
        "kind": "scores",
        "rows_in": 0,
        "rows_out": 0,
        "drops": {},
        "digest": "d",
        "inputs": {},
    }
    manifest |= {"schema_version": schemas.VERSION, "versions": {}}
    plan = {"stage": "eval rewards", "settings": {"system_prompt": "one | two\nthree"}}
    assert "| system_prompt | one \\| two three |\n" in dataset_card.render(plan, manifest)


# ------------------------------------------------------------------------------------- version


def outdated(folder: Path, name: str) -> None:
    """Makes a plan or a manifest one of the first schema version, which named no version."""
    document = files.read_json(folder / name)
    del document["schema_version"]
    files.write_json(folder / name, document)


def test_a_dataset_of_another_schema_version_is_refused_with_what_to_do(tmp_path: Path):
    prompts(tmp_path / "p")
    outdated(tmp_path / "p", "manifest.json")
    expected = (
        "p was written by 'scir generate' with schema version 1, and this scir has version "
        f"{schemas.VERSION}; "
    )
    with pytest.raises(DataError, match=expected + "run that command again with --overwrite"):
        dataset.open_dataset(tmp_path / "p")


def test_a_folder_of_another_schema_version_is_not_resumed_but_overwritten(tmp_path: Path):
    prompts(tmp_path / "p")
    outdated(tmp_path / "p", "plan.json")
    with pytest.raises(
        PlanMismatch, match="with schema version 1, .* run that command again with --overwrite"
    ):
        prompts(tmp_path / "p")
    assert prompts(tmp_path / "p", overwrite=True)["rows_out"] == 2


# ----------------------------------------------------------------------------- carried columns


def test_what_a_file_of_pairs_has_beside_its_texts_is_in_the_preferences_made_of_it(
    tiny_llama: Path, tmp_path: Path
):
    rows = [
        {
            "id": number,
            "prompt": f"Why {number}?",
            "chosen": "a",
            "rejected": "b",
            "score": 1.5,
            "source": {"page": number},
        }
        for number in range(5)
    ]
    rows[4] = {name: rows[4][name] for name in ("prompt", "chosen", "rejected", "score")}
    (tmp_path / "pairs.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    given = {
        "model": str(tiny_llama),
        "device": "cpu",
        "reward_models": ["external"],
        "score_column": "score",
    }
    run(
        "judge",
        input=str(tmp_path / "pairs.jsonl"),
        output_dir=tmp_path / "judged",
        rows_per_part=2,
        **given,
    )
    run(
        "filter",
        input=str(tmp_path / "judged"),
        output_dir=tmp_path / "out",
        rule="external",
        trl_jsonl=True,
    )
    table = dataset.read_dataset(tmp_path / "out", "preferences")
    carried = {
        row["messages"][0]["content"]: row["extra"] and json.loads(row["extra"])
        for row in table.select(["messages", "extra"]).to_pylist()
    }
    assert carried == {f"Why {n}?": {"id": n, "source": {"page": n}} for n in range(4)} | {
        "Why 4?": None
    }
    trl = (tmp_path / "out" / "trl.jsonl").read_text(encoding="utf-8").splitlines()
    assert {tuple(json.loads(line)) for line in trl} == {("prompt", "chosen", "rejected")}
