"""Recipes that are wrong on purpose: one line each, at once, with status 2."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path
from typing import Any, get_args

import pytest
from helpers import run_command
from pydantic.fields import FieldInfo

from scir_cli import config, recipe, registry
from scir_cli.errors import ConfigError, StoreError
from scir_cli.report import html
from scir_cli.settings import (
    BackendSettings,
    CheckConsistencySettings,
    FilterSettings,
    GenerateSettings,
)

STEP = "generate: {model: m, input: p, output_dir: '{out}/c'}"
LEVELS = [f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]" for i in range(1, 12)]
BOMB = "set:\n  x0: &x0 [a, b]\n  " + "\n  ".join(LEVELS) + f"\nsteps: [{STEP}]"
FOLDERS = (
    "steps: [{{filter: {{input: a, output_dir: {}}}}}, {{filter: {{input: b, output_dir: {}}}}}]"
)


def iterated(count: str) -> str:
    return f"steps: [{{iterations: {count}, steps: [{{{STEP}}}]}}]"


CASES = {
    "bomb": (BOMB, "more than 20000 values"),
    "circle of aliases": ("set: &a {b: *a}", "inside of its own value"),
    "many": (iterated("1000000000"), "'iterations' is 1000000000; expected a whole number"),
    "zero": (iterated("0"), "'iterations' is 0"),
    "negative": (iterated("-1"), "'iterations' is -1"),
    "fraction": (iterated("1.5"), "'iterations' is 1.5"),
    "text": (iterated("two"), "'iterations' is 'two'"),
    "superscript": (iterated("'²'"), "'iterations' is '²'"),
    "truth": (iterated("true"), "'iterations' is True"),
    "list": (iterated("[2]"), "'iterations' is [2]"),
    "nested": (
        f"steps: [{{iterations: 900, steps: [{{iterations: 900, steps: [{{{STEP}}}]}}]}}]",
        "more than 1000 steps",
    ),
    "no steps inside": ("steps: [{iterations: 900, steps: []}]", "'steps' should be a list"),
    "key beside": (f"steps: [{{iterations: 2, stps: [{{{STEP}}}]}}]", "unknown key 'stps'"),
    "set": (f"set: [a]\nsteps: [{{{STEP}}}]", "'set' is a list; expected a mapping"),
    "all": (f"all: x\nsteps: [{{{STEP}}}]", "'all' is a text; expected a mapping"),
    "settings": ("steps: [{generate: [m]}]", "'generate' is a list; expected a mapping"),
    "steps": ("steps: {generate: {}}", "'steps' should be a list"),
    "top": ("[a]", "should hold a mapping"),
    "empty": ("", "should hold a mapping"),
    "itself": ("extends: recipe.yaml", "'extends' leads back to"),
    "list of bases": ("extends: [a]", "'extends' is ['a']; expected text"),
    "key twice": (f"steps: [{{{STEP}}}]\nname: a\nname: b", "line 3: the name 'name' occurs twice"),
    "setting twice": (
        "steps: [{generate: {model: m, model: m, input: p, output_dir: o}}]",
        "the name 'model' occurs twice",
    ),
    "same folder": (FOLDERS.format("o/a", "o/a"), "two steps write o/a"),
    "other spelling": (FOLDERS.format("o/a", "./o//b/../a/"), "two steps write o/a, also as ./o"),
    "inside": (FOLDERS.format("o/a", "o/a/b"), "a step writes o/a/b inside of o/a"),
    "outside": (FOLDERS.format("o/a/b", "o"), "a step writes o/a/b inside of o"),
    "url": (FOLDERS.format("memory://o/a", "memory://o//a/"), "two steps write memory://o/a"),
    "depth": ("a: " + "[" * 20_000, "nested too deeply"),
    "date": ("name: 2024-01-01\nsteps: []", "is read as a date; write it in quotes"),
    "no date": ("name: 2024-13-45", "is not YAML"),
    "number key": ("set: {1: a}", "the name 1 is not text"),
    "null": ('set: {a: "x\\0y"}', "contains a null character"),
    "digits": ("set: {a: " + "9" * 5000 + "}", "is not YAML"),
    "object": ("set: !!python/object:os.system {}", "is not YAML"),
    "length": (
        f"set: {{a: {'x' * 9000}}}\nsteps: [{{generate: {{model: '{'{a}' * 9000}'}}}}]",
        "repeats to more than",
    ),
    "size": ("#" * 300_000, "more than 262144 bytes"),
}


@pytest.mark.parametrize(("text", "expected"), CASES.values(), ids=CASES)
def test_a_wrong_recipe_is_one_line_at_once(
    text: str,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    started = time.monotonic()
    status = run_command(["run", "recipe.yaml", "--dry-run"], monkeypatch)
    seconds = time.monotonic() - started
    (line,) = capfd.readouterr().err.splitlines()
    assert status == 2
    assert line.startswith("scir: error: ") and expected in line, line
    assert seconds < 2


def test_recipes_that_extend_each_other_in_a_circle_are_refused(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("extends: b.yaml", encoding="utf-8")
    (tmp_path / "b.yaml").write_text("extends: ./a.yaml", encoding="utf-8")
    with pytest.raises(ConfigError, match="'extends' leads back to"):
        recipe.load(tmp_path / "a.yaml")


def test_a_recipe_may_use_an_alias_and_an_empty_mapping(tmp_path: Path):
    text = (
        "set:\nall:\nsteps:\n- generate: &g {model: m, input: p, output_dir: a}\n"
        "- generate: {<<: *g, output_dir: b}"
    )
    (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
    steps = recipe.load(tmp_path / "r.yaml")
    assert [step.settings["output_dir"] for step in steps] == ["a", "b"]
    assert {step.settings["model"] for step in steps} == {"m"}


@pytest.mark.parametrize("word", ["null", "none", "None", "NULL"])
def test_the_words_null_and_none_are_texts_in_a_recipe_and_in_its_shell_form(
    word: str, tmp_path: Path
):
    values = f"model: m, input: p, output_dir: o, system_prompt: '{word}', limit: null"
    (tmp_path / "r.yaml").write_text(f"steps: [{{generate: {{{values}}}}}]", encoding="utf-8")
    (step,) = recipe.load(tmp_path / "r.yaml")
    built = config.build(GenerateSettings, step.settings, where="test")
    assert built.system_prompt == word
    assert step.arguments[-2:] == ["--system-prompt", word]
    flags = {"model": "m", "input": "p", "output_dir": "o", "system_prompt": word}
    assert config.build(GenerateSettings, flags, where="test").system_prompt == word


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (["a", "b"], "a,b"),
        (["a,b", "c"], '["a,b", "c"]'),
        ([" a"], '[" a"]'),
        ([""], '[""]'),
        (['["a"]'], '["[\\"a\\"]"]'),
        (["[a"], "[a"),
        ([], ""),
    ],
)
def test_a_list_in_its_shell_form_is_the_same_list(values: list[str], text: str):
    assert config.list_as_text(values) == text
    settings = {"model": "m", "output_dir": "o", "vllm_arg": text}
    assert config.build(BackendSettings, settings, where="test").vllm_arg == values


@pytest.mark.parametrize("text", ["²", "1_000", "٣", "inf", "-inf", "nan", "1e999", "0x10", "1 "])
def test_a_number_is_finite_and_written_with_the_digits_0_to_9(text: str):
    flags = {"input": "i", "output_dir": "o"}
    for name in ("min_margin", "min_response_tokens", "limit"):
        with pytest.raises(ConfigError, match=f"'{name}' is "):
            config.build(FilterSettings, flags | {name: text}, where="test")


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_number_of_a_recipe_is_finite(value: float):
    flags = {"input": "i", "output_dir": "o", "min_margin": value}
    with pytest.raises(ConfigError, match="'min_margin' is (inf|nan): Input should be a finite"):
        config.build(FilterSettings, flags, where="test")


def test_a_list_that_names_something_twice_is_refused():
    flags = {"input": "i", "output_dir": "o", "agree_on": "judge,implicit,judge"}
    with pytest.raises(ConfigError, match="it names 'judge' twice"):
        config.build(FilterSettings, flags, where="test")


def bounds(info: Any) -> dict[str, Any]:
    """The bounds of a setting, those declared with its type and those beside its help."""
    kinds = [info.annotation, *get_args(info.annotation)]
    metadata = [*info.metadata, *(m for kind in kinds for m in getattr(kind, "__metadata__", ()))]
    while any(isinstance(m, FieldInfo) for m in metadata):
        metadata = [n for m in metadata for n in (m.metadata if isinstance(m, FieldInfo) else [m])]
    names = ("gt", "ge", "lt", "le")
    return {name: getattr(m, name) for m in metadata for name in names if hasattr(m, name)}


#: Settings that check their numbers themselves, and the variables of a chat template
UNBOUNDED = ("workers", "implicit_scale", "chat_template_kwargs")


@pytest.mark.parametrize("stage", registry.STAGES)
def test_every_number_of_a_command_has_a_lower_and_an_upper_bound(stage: str):
    for name, info in config.fields(registry.STAGES[stage].settings).items():
        kind = str(info.annotation)
        if ("int" in kind or "float" in kind) and name not in UNBOUNDED:
            known = bounds(info)
            assert {"gt", "ge"} & set(known) and {"lt", "le"} & set(known), (name, known)


@pytest.mark.parametrize(
    ("name", "value", "bound"),
    [
        ("n", "10001", "less than or equal to 10000"),
        ("seed", "-1", "greater than or equal to 0"),
        ("limit", "1000000001", "less than or equal to 1000000000"),
        ("temperature", "101", "less than or equal to 100"),
        ("max_new_tokens", "9" * 39, "less than or equal to 1000000"),
        ("workers", "1025", "expected a number from 1 to 1024, or auto"),
        ("workers", "²", "expected a number from 1 to 1024, or auto"),
    ],
)
def test_a_number_out_of_bounds_is_named_with_its_value_and_its_bound(
    name: str, value: str, bound: str
):
    values = {"model": "m", "input": "i", "output_dir": "o", name: value}
    with pytest.raises(ConfigError) as caught:
        config.build(GenerateSettings, values, where="test")
    (message,) = caught.value.messages
    assert message.startswith(f"test: '{name}' is '{value}': ")
    assert bound in message or "digits" in message


def test_a_plan_has_a_digest_in_place_of_a_secret():
    def plan(key: str) -> str:
        values = {"model": "m", "output_dir": "o", "vllm_arg": f"hf_token={key}"}
        return str(config.build(BackendSettings, values, where="test").plan()["vllm_arg"])

    assert "KEY" not in plan("KEY1")
    assert plan("KEY1") == plan("KEY1") != plan("KEY2")


def test_a_dry_run_prints_no_secret_and_nothing_that_cannot_be_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    values = r'model: m, input: p, output_dir: o, base_url: "http://u:KEY@h/v1", '
    values += r'system_prompt: "a\e[2J\\n\u200bb\n"'
    (tmp_path / "r.yaml").write_text(f"steps: [{{generate: {{{values}}}}}]", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert run_command(["run", "r.yaml", "--dry-run"], monkeypatch) == 0
    script = capfd.readouterr().out
    assert "KEY" not in script and "***@h/v1" in script
    assert not re.search("[\x00-\x09\x0b-\x1f\u200b]", script)
    words = script.splitlines(keepends=True)[2:]
    shell = "scir() { printf '%s|' \"$@\"; }\n" + "".join(words)
    done = subprocess.run(["sh", "-c", shell], capture_output=True, check=True)
    assert done.stdout.decode().split("|")[-2] == "a\x1b[2J\\n\u200bb\n"


def report(path: Path, out: str = "out") -> None:
    values = {"input": "i", "output_dir": str(path.parent / out), "report": str(path)}
    config.build(CheckConsistencySettings, values, where="test")


@pytest.mark.parametrize("content", ["", "<!doctype html>\n<html>", "x" * 2000 + "scir"])
def test_a_report_is_not_written_over_another_file(content: str, tmp_path: Path):
    path = tmp_path / "page.html"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match="a file is there that is no page of scir"):
        report(path)
    with pytest.raises(StoreError, match="a file is there that is no page of scir"):
        html.write(path, html.Page("", "", [], []))
    assert path.read_text(encoding="utf-8") == content


@pytest.mark.parametrize("name", ["manifest.json", "data-00000.arrow", "page", ".html"])
def test_a_report_has_the_ending_of_a_page(name: str, tmp_path: Path):
    with pytest.raises(ConfigError, match="expected the name of an HTML file"):
        report(tmp_path / name)


def test_a_report_is_not_the_output_folder_nor_in_a_file_nor_a_device_or_dangling_link(
    tmp_path: Path,
):
    (tmp_path / "link.html").symlink_to("/dev/null")
    (tmp_path / "gone.html").symlink_to(tmp_path / "nothing")
    (tmp_path / "file").write_text("x", encoding="utf-8")
    for name in ("link.html", "gone.html"):
        with pytest.raises(ConfigError, match="a file is there"):
            report(tmp_path / name)
    with pytest.raises(ConfigError, match="file is a file; choose another folder"):
        report(tmp_path / "file" / "page.html")
    for out in ("out.html", "out.html/inner"):
        with pytest.raises(ConfigError, match="is or holds output_dir"):
            report(tmp_path / "out.html", out)


def test_a_report_is_written_over_a_page_of_ours(tmp_path: Path):
    path = tmp_path / "new" / "page.html"
    for title in ("first", "second"):
        report(path)
        html.write(path, html.Page(title, "", [], []))
        assert title in path.read_text(encoding="utf-8")
