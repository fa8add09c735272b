"""Names with control characters, markup and secrets, in all that is printed."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from helpers import run_command

from scir_cli.data import dataset
from scir_cli.errors import ConfigError, DataError, json_text, print_line, shown, warn
from scir_cli.report import tables
from scir_cli.report.console import PlainConsole
from scir_cli.report.training_view import View, watching

#: Sets the title, clears the screen, reverses the direction; markup and an emoji code of rich
HOSTILE = "a\x1b]0;t\x07\x1b[2J\x9b\u202e\u200b[red]x[/red]:bomb:"
SHOWN = r"a\x1b]0;t\x07\x1b[2J\x9b\u202e\u200b[red]x[/red]:bomb:"
RAW = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]")


def printed(renderables: list[Any]) -> str:
    console = PlainConsole(file=io.StringIO(), width=400)
    for renderable in renderables:
        console.print(renderable)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (HOSTILE, SHOWN),
        ("two\nlines\r\ttab", r"two\nlines\r\ttab"),
        ("naïve 日本　語 🎉", "naïve 日本　語 🎉"),
        ("\ud800 \U000e0041 \u3164", r"\ud800 \U000e0041 \u3164"),
        ("b" * 3000, "b" * 1000 + "… 1000 characters …" + "b" * 1000),
    ],
    ids=["controls", "lines", "letters", "invisible", "long"],
)
def test_each_character_that_cannot_be_seen_is_written_as_its_code(text: str, expected: str):
    assert shown(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://user:KEY@host:1/v1", "http://***@host:1/v1"),
        ("'https://KEY@host' fails", "'https://***@host' fails"),
        ("s3://id:KEY@host/bucket", "s3://***@host/bucket"),
        ("http://user:K/EY@host/v1", "http://***@host/v1"),
        ("http://host/v1?token=KEY&n=1", "http://host/v1?token=***&n=1"),
        ("http://host/f?X-Amz-Signature=KEY", "http://host/f?X-Amz-Signature=***"),
        ("vllm: api_key=KEY", "vllm: api_key=***"),
        ("OPENAI_API_KEY=KEY scir", "OPENAI_API_KEY=*** scir"),
        ('{"hf_token": "KEY"}', '{"hf_token": "***"}'),
        ("Authorization: Bearer 123KEY456", "Authorization: Bearer ***"),
    ],
)
def test_passwords_keys_and_tokens_are_not_shown(text: str, expected: str):
    assert shown(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "http://localhost:8000/v1",
        "http://localhost:8000/v1 of a@b",
        "hf://datasets/user/repo@revision/file",
        "abfs://container@account/path",
        "max_new_tokens=4 eos_token=</s> verdict_tokens=A,B",
    ],
)
def test_what_is_no_secret_is_shown(text: str):
    assert shown(text) == text


def test_a_cut_does_not_separate_a_password_from_its_host():
    assert "KEY" not in shown("http://user:KEY" + "y" * 5000 + "@host")


def test_json_is_one_visible_line_with_the_same_value():
    value = {HOSTILE + "\x7f\U000e0041": ["two\nlines", "日本"]}
    text = json_text(value)
    assert json.loads(text) == value
    assert not RAW.search(text) and "\n" not in text
    assert "日本" in text


def figures() -> dict[str, Any]:
    """The summary of two reward models with hostile names."""
    names = [HOSTILE, HOSTILE + "2"]
    model = {
        "verdicts": 1,
        "median_abs_log_odds": 0.1,
        "flip_rate": None,
        "verdict_mass": 0.1,
        "length_correlation": None,
        "labeled": 1,
        "accuracy": 1.0,
        "pairs": 1,
        "rate": 0.5,
        "kappa": None,
        "spearman": None,
        "kendall": None,
        "top_order": None,
        "agreement": 1.0,
        "unanimous": 1.0,
        "ranked_prompts": 0,
        "sections": {HOSTILE: 0.5},
        "score": 0.5,
    }
    models = dict.fromkeys(names, model)
    between = {"first": names[0], "second": names[1], "pairs": 1, "kappa": None, "spearman": None}
    return {
        "pairs": 1,
        "models": models,
        "between": [between],
        "agreed": {"pairs": 1, "rate": 1.0, "labeled": 1, "accuracy": 1.0},
        "beyond_top_logprobs": {HOSTILE: 1},
        "curves": {"risk_coverage": {HOSTILE: [{"coverage": 1.0, "accuracy": 1.0}]}},
        "benchmark": {"name": HOSTILE, "models": {HOSTILE: model | {"missing": [HOSTILE]}}},
        "biases": {HOSTILE: {HOSTILE: model}},
        "by_subset": {HOSTILE: {"pairs": 1, "models": models}},
    }


def across() -> dict[str, Any]:
    summary = figures()
    against = {"dataset": HOSTILE, "pairs": 1, "left_out": {HOSTILE: 1}}
    return {
        "against": [against | {"models": summary["models"]}],
        "unanimous_pairs": 1,
        "unanimous": summary["models"],
    }


def win_rates() -> dict[str, Any]:
    match = {
        "model": HOSTILE,
        "other": HOSTILE,
        "verdicts": 1,
        "pairs": 1,
        "win_rate": 0.5,
        "standard_error": None,
        "mean_characters": 1.0,
        "mean_characters_other": 1.0,
    }
    rows = [{"model": HOSTILE, "win_rate": 0.5}] * 3
    return {
        "matches": [match | {"by_subset": {HOSTILE: match}}],
        "bradley_terry": {"models": rows},
    }


def grades() -> dict[str, Any]:
    grade = {"grades": 1, "grade": 5.0, "grade_low": None, "grade_high": None}
    return {"all": grade, "turns": {}, "categories": {HOSTILE: grade}, "mean_mass": None}


def test_no_table_passes_a_control_character_on_and_markup_is_text():
    manifest = {"summary": figures(), "across": across(), "by_subset": {HOSTILE: figures()}}
    groups = {
        "verdicts": tables.verdict_tables(manifest),
        "iterations": [tables.iterations_table([(HOSTILE, figures())])],
        "win rates": tables.winrate_tables(win_rates()),
        "grades": [tables.grade_table(grades())],
    }
    for name, group in groups.items():
        for table in group:
            text = printed([table])
            assert not RAW.search(text), (name, text)
            assert SHOWN in text, (name, text)


def test_lines_errors_and_warnings_are_one_visible_line(capsys: pytest.CaptureFixture[str]):
    manifest = {
        "rows_in": 1,
        "rows_out": 0,
        "drops": {HOSTILE: 1},
        "nulls": {"rewards." + HOSTILE: 1},
    }
    print_line(tables.summary_line("judge", HOSTILE + "\n", manifest))
    warn(HOSTILE + "\nsecond")
    text = capsys.readouterr().err
    assert not RAW.search(text)
    assert text.count(SHOWN) == 4
    assert len(text.splitlines()) == 2


def test_an_error_of_several_messages_is_several_lines_and_a_line_break_in_a_name_is_none():
    assert str(ConfigError("one", "two")) == "one\ntwo"
    assert [shown(m) for m in DataError("a\nb").messages] == [r"a\nb"]


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "pipe"])
def test_the_view_of_a_training_shows_a_hostile_title(terminal: bool):
    now = iter(range(0, 10_000, 100))
    view = View(HOSTILE, 2, clock=lambda: float(next(now)))
    out = io.StringIO()
    console = PlainConsole(file=out, width=200, force_terminal=terminal, color_system=None)
    with watching(view, console) as see:
        see(1, {"loss": 1.0})
        see(2, {"loss": 1.0})
    assert SHOWN in out.getvalue()
    assert "\x1b]0;" not in out.getvalue()


COMMANDS = [
    ["generate", "-m", HOSTILE, "-i", HOSTILE, "-o", "o"],
    ["generate", "-m", "m", "-i", "i", "-o", "o", f"{HOSTILE}=1"],
    ["generate", "-m", "m", "-i", "i", "-o", "o", "--n", HOSTILE],
    ["generate", "-m", "m", "-i", "i", "-o", "o", "--config", HOSTILE],
    [HOSTILE],
    ["generate", f"--{HOSTILE}"],
    ["filter", "-i", HOSTILE, "-o", "o"],
    ["filter", "-i", "kind", "-o", "o"],
    ["run", HOSTILE],
    ["run", "keys.yaml"],
    ["run", "stage.yaml"],
    ["filter", "-i", HOSTILE, "-o", "o", "--traceback"],
]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words)[:12])
def test_no_error_passes_a_control_character_on(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    key = json.dumps(HOSTILE)
    (tmp_path / "keys.yaml").write_text(f"{{{key}: 1}}", encoding="utf-8")
    (tmp_path / "stage.yaml").write_text(f"steps: [{{{key}: {{}}}}]", encoding="utf-8")
    dataset.write_dataset(
        tmp_path / "kind",
        "consistency",
        {"stage": "check-consistency"},
        [],
        lambda *_: dataset.Part(pa.table({}), 0),
    )
    path = tmp_path / "kind" / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8")) | {"kind": HOSTILE}
    del manifest["checksum"]
    path.write_text(json.dumps(manifest), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert run_command(words, monkeypatch) in (1, 2)
    text = "".join(capfd.readouterr())
    assert not RAW.search(text), text
    assert SHOWN in text
