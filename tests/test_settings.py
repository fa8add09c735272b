"""Settings: flags that are frozen, roles that are declared, help that is readable at 80 columns,
and what --overwrite protects.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import flags
import pytest
from typer.testing import CliRunner

from scir_cli import config, registry, settings
from scir_cli.cli import app
from scir_cli.errors import ConfigError
from scir_cli.settings import (
    BackendSettings,
    EvalResponsesSettings,
    GenerateSettings,
    JudgeSettings,
    ModelSettings,
)
from scir_cli.stages import overwrite
from scir_cli.stages.filter import Rule
from scir_cli.training import fitting

#: Outputs: --overwrite protects what a command reads.
OUTPUTS = {"output_dir", "report"}
NAMES_AN_INPUT = re.compile(r"\b(files?|folder|hub id|datasets?)\b|^Model\b", re.IGNORECASE)


def settings_of_all_stages() -> dict[str, tuple[str, Any]]:
    """'stage setting' -> (setting, its pydantic field)."""
    return {
        f"{stage} {name}": (name, info)
        for stage, record in registry.STAGES.items()
        for name, info in config.fields(record.settings).items()
    }


# ------------------------------ flags


def test_the_flags_are_those_that_are_written_down():
    frozen = flags.FROZEN.read_text(encoding="utf-8").splitlines()
    assert flags.lines() == frozen, (
        "a flag, default or group changed; if on purpose: python tests/flags.py --write"
    )


def test_train_has_few_settings_and_few_to_read_first():
    assert flags.counts()["train"].total() <= flags.MOST_SETTINGS_OF_TRAIN
    assert flags.in_first_groups_of_train() <= flags.MOST_IN_FIRST_GROUPS_OF_TRAIN


def test_the_groups_of_train_are_shown_in_order_and_the_report_does_not_lead():
    text = (
        CliRunner()
        .invoke(app, ["train", "--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
        .stdout
    )
    headings = re.findall(r"^╭─ ([\w ]+?) ─", text, re.MULTILINE)
    assert headings[-7:] == [
        config.INPUT_OUTPUT,
        config.OPTIMIZER,
        config.PREFERENCE_LOSS,
        config.CONSISTENCY,
        config.MEMORY,
        config.LOGGING,
        config.RARE,
    ]
    shown = re.findall(r"^│ (--[\w-]+)", text, re.MULTILINE)
    assert shown.index("--report") > shown.index("--validation-every")


@pytest.mark.parametrize("stage", registry.STAGES)
def test_help_is_readable_at_eighty_columns(stage: str):
    result = CliRunner().invoke(
        app, [*stage.split(), "--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"}
    )
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert not re.search(r"\w…", result.stdout)  # nothing is cut off
    texts = [
        len(line) - re.match(r"^│ --\S+ +(-\w +)?\S+ +", line).end()
        for line in lines
        if line.startswith("│ --")
    ]
    assert min(texts) >= 28  # columns that are left for the text


def test_choices_that_are_too_wide_for_their_column_stand_in_the_text():
    fields = config.fields(settings.TrainSettings)
    assert config.metavar(fields["objective"]) == "sft|dpo|scir"
    assert config.metavar(fields["implicit_scale"]) == "fitted|NUMBER"
    assert config.metavar(fields["preference_loss"]) == "CHOICE"
    assert config.help_text(fields["preference_loss"]).endswith("One of: dpo, ipo, simpo, sppo.")
    assert all(len(config.metavar(info)) <= 14 for _, info in settings_of_all_stages().values())


# ------------------------------ roles


def test_every_setting_that_is_a_path_or_names_a_dataset_or_model_is_protected_from_overwrite():
    for where, (name, info) in settings_of_all_stages().items():
        kind = str(info.annotation)
        is_path = "Path" in kind
        is_text = "str" in kind or "Path" in kind
        names_an_input = is_text and bool(NAMES_AN_INPUT.search(info.description))
        protected = (is_path or names_an_input) and name not in OUTPUTS
        assert config.role(info, "path") == protected, where


def test_a_setting_that_shapes_a_fit_is_part_of_the_plan():
    for name in config.names_with(settings.TrainSettings, "affects_fit"):
        assert config.role(settings.TrainSettings.model_fields[name], "affects_output"), name


def test_all_of_the_consistency_group_but_weights_and_inputs_affects_what_is_fitted():
    fields = config.fields(settings.TrainSettings)
    shown = {
        name
        for name, info in fields.items()
        if config.group_of(settings.TrainSettings, name, info) == config.CONSISTENCY
    }
    kept = shown - set(config.names_with(settings.TrainSettings, "affects_fit"))
    assert kept == {
        "penalty_weight",
        "anchors",
        "anchor_weight",
        "reward_reference",
    }  # the reference is compared by its weights
    assert set(fitting.FITTED) <= shown


def test_a_plan_has_a_file_s_content_and_not_its_name(tmp_path: Path):
    prompt = tmp_path / "judge.txt"

    def plan(text: str) -> str:
        prompt.write_text(text, encoding="utf-8")
        values = {"model": "m", "input": "i", "output_dir": "o", "judge_prompt": str(prompt)}
        return str(config.build(JudgeSettings, values, where="test").plan()["judge_prompt"])

    assert plan("{question} {a} {b}").startswith("a file of digest ")
    assert plan("{question} {a} {b}") == plan("{question} {a} {b}") != plan("{question}: {a} {b}")


# ------------------------------ endpoint


def backend(*words: str) -> BackendSettings:
    return config.build(
        BackendSettings,
        {"model": "m", "output_dir": "o", "endpoint_arg": list(words)},
        where="test",
    )


def test_endpoint_arguments_have_types_and_defaults():
    assert backend().endpoint.model_dump() == {
        "model": None,
        "retries": 6,
        "timeout": 600.0,
        "top_logprobs": 20,
    }
    given = backend("model=n", "retries=0", "timeout=1.5", "top_logprobs=5").endpoint
    assert (given.model, given.retries, given.timeout, given.top_logprobs) == ("n", 0, 1.5, 5)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("retires=1", "unknown endpoint argument 'retires'. Did you mean 'retries'?"),
        ("retries=-1", "retries is '-1'"),
        ("retries=many", "retries is 'many'"),
        ("timeout=0", "timeout is '0'"),
        ("top_logprobs=0", "top_logprobs is '0'"),
        ("timeout", "expected NAME=VALUE, for example timeout=60; got 'timeout'"),
    ],
)
def test_a_wrong_endpoint_argument_is_refused_with_its_value(word: str, expected: str):
    with pytest.raises(ConfigError) as caught:
        backend(word)
    assert expected in str(caught.value)


def test_of_the_endpoint_s_arguments_only_top_logprobs_is_in_the_plan():
    assert backend("timeout=5", "retries=1", "model=n").plan() == backend().plan()
    assert backend("top_logprobs=5").plan() == backend().plan() | {"top_logprobs": 5}


# ------------------------------ removed


@pytest.mark.parametrize("stage", ["eval responses", "eval mt-bench"])
def test_evaluators_read_one_response_and_have_no_n(stage: str):
    assert "n" not in config.fields(registry.STAGES[stage].settings)
    assert EvalResponsesSettings.n == 1
    assert "n" in config.fields(GenerateSettings)


@pytest.mark.parametrize("name", ["rationale_max_tokens", "rationale_batch_size", "score_column"])
def test_train_has_no_setting_that_only_judging_needs(name: str):
    assert name not in config.fields(settings.TrainSettings)
    assert name in config.fields(settings.EvalRewardsSettings)


@pytest.mark.parametrize(
    ("rule", "model"), [("random:0.7", "judge"), ("random:0.7:implicit", "implicit")]
)
def test_a_random_share_is_labeled_by_the_model_in_the_rule_or_by_the_judge(rule: str, model: str):
    chosen = config.build(
        settings.FilterSettings, {"input": "i", "output_dir": "o", "rule": rule}, where="test"
    )
    found = Rule.of(chosen, ["judge", "implicit"])
    assert (found.models, found.rate) == ([model], 0.7)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("random:0.7:judg", "no verdicts of 'judg'. Did you mean 'judge'?"),
        ("random:1.5:judge", "a rate above 0 and at most 1"),
    ],
)
def test_a_random_rule_with_an_unknown_model_or_rate_is_refused(rule: str, message: str):
    chosen = config.build(
        settings.FilterSettings, {"input": "i", "output_dir": "o", "rule": rule}, where="test"
    )
    with pytest.raises(ConfigError) as caught:
        Rule.of(chosen, ["judge", "implicit"])
    assert message in str(caught.value)


# ------------------------------ overwrite


def test_eval_winrate_does_not_delete_the_gamed_baselines_that_lie_in_its_output_folder(
    tmp_path: Path,
):
    out = tmp_path / "out"
    out.mkdir()
    (out / "df_gamed.csv").write_text("x", encoding="utf-8")
    (tmp_path / "annotations.json").write_text(json.dumps([]), encoding="utf-8")
    words = [
        "eval",
        "winrate",
        "--annotations",
        str(tmp_path / "annotations.json"),
        "-o",
        str(out),
        "--overwrite",
    ]
    result = CliRunner().invoke(app, [*words, "--gamed-baselines", str(out / "df_gamed.csv")])
    assert result.exit_code == 2
    assert (
        f"output_dir {out} is or holds gamed_baselines {out}/df_gamed.csv; choose another folder"
        in result.stderr
    )
    assert (out / "df_gamed.csv").exists()


@pytest.mark.parametrize(
    "name", [n for n in config.names_with(JudgeSettings, "path") if n != "input"]
)
def test_every_input_in_the_output_folder_is_refused_by_its_name(tmp_path: Path, name: str):
    (tmp_path / "read").write_text("{question}", encoding="utf-8")
    values = {
        "model": "m",
        "input": "i",
        "output_dir": str(tmp_path),
        "overwrite": True,
        name: str(tmp_path / "read"),
    }
    with pytest.raises(
        ConfigError,
        match=f"^scir judge: output_dir .* is or holds {name} .*read; choose another folder$",
    ):
        overwrite.check(config.build(JudgeSettings, values, where="test"), "scir judge")


def test_a_recipe_with_a_step_that_would_delete_its_input_is_refused_before_anything_runs(
    tmp_path: Path,
):
    (tmp_path / "run" / "prompts").mkdir(parents=True)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"output_dir: {tmp_path}/run\n"
        "steps:\n"
        "  - generate: {model: m, input: other.jsonl, output_dir: '{out}/candidates'}\n"
        "  - generate: {model: m, input: '{out}/prompts', output_dir: '{out}/prompts'}\n",
        encoding="utf-8",
    )
    result = CliRunner().invoke(app, ["run", str(recipe)])
    assert result.exit_code == 2
    assert (
        f"{recipe}: generate: output_dir {tmp_path}/run/prompts is or holds input" in result.stderr
    )
    assert not (tmp_path / "run" / "candidates").exists()


# ------------------------------------------------------------------------ template variables


def with_template_kwargs(value: Any) -> ModelSettings:
    layer = {"model": "m", "output_dir": "o", "chat_template_kwargs": value}
    return config.build(ModelSettings, layer, where="test")


def test_template_kwargs_have_the_types_of_their_words():
    words = "enable_thinking=false,n=3,x=0.5,effort=low,none=null,on=True,eq=a=b,inf=inf"
    expected = {
        "enable_thinking": False,
        "n": 3,
        "x": 0.5,
        "effort": "low",
        "none": None,
        "on": True,
        "eq": "a=b",
        "inf": "inf",
    }
    kwargs = with_template_kwargs(words).chat_template_kwargs
    assert kwargs == expected
    assert [type(value) for value in kwargs.values()] == [type(v) for v in expected.values()]


def test_template_kwargs_of_a_recipe_keep_their_types():
    given = {"enable_thinking": False, "budget": 1, "scale": 1.0, "effort": "1"}
    kwargs = with_template_kwargs(given).chat_template_kwargs
    assert [(type(value), value) for value in kwargs.values()] == [
        (bool, False),
        (int, 1),
        (float, 1.0),
        (str, "1"),
    ]
    assert with_template_kwargs(["a=1", "b=x"]).chat_template_kwargs == {"a": 1, "b": "x"}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("enable_thinking", "expected NAME=VALUE, as enable_thinking=false; got 'enable_thinking'"),
        ("=1", "expected NAME=VALUE"),
        ("tokenize=true", "'tokenize' is no variable of the template alone"),
        ({"messages": 1}, "'messages' is no variable of the template alone"),
        ({"a": [1]}, "chat_template_kwargs"),
    ],
)
def test_a_wrong_template_variable_is_refused_with_its_value(value: Any, expected: str):
    with pytest.raises(ConfigError) as caught:
        with_template_kwargs(value)
    assert expected in str(caught.value)


def test_template_kwargs_are_in_the_plan_only_if_they_are_set():
    plain = with_template_kwargs(None).plan()
    assert "chat_template_kwargs" not in plain
    assert with_template_kwargs("a=1").plan() == plain | {"chat_template_kwargs": {"a": 1}}
