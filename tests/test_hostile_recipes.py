"""Recipes that are wrong on purpose: one line each, at once, with status 2."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from helpers import run_command

from scir_cli import config, recipe
from scir_cli.errors import ConfigError
from scir_cli.settings import BackendSettings, FilterSettings, GenerateSettings

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
