"""Recipes and settings of random content: a value, or errors of one visible line each."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scir_cli import config, recipe, registry
from scir_cli.errors import ConfigError, shown

WORDS = ["", "null", "none", "1", "-1", "²", "1_0", "nan", "1e999", "a,b", "[", "{out}", "{i}"]
KEYS = [
    *recipe.KEYS,
    "iterations",
    "generate",
    "train",
    "model",
    "input",
    "output_dir",
    "n",
    "lora",
]
TEXTS = st.sampled_from(WORDS) | st.text(max_size=6)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYS) | TEXTS, inner, max_size=4)
    ),
    max_leaves=12,
)
FEW = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def check_messages(error: ConfigError, start: str) -> None:
    """Checks that an error has status 2 and messages of one line, each with this start."""
    assert error.exit_code == 2
    assert error.messages
    for message in error.messages:
        assert message.startswith(start)
        assert "\n" not in shown(message)


def load(path: Path) -> None:
    """Loads a recipe; an error has status 2, at least one message, and takes little time."""
    started = time.monotonic()
    try:
        for step in recipe.load(path):
            step.shell_command()
    except ConfigError as error:
        check_messages(error, str(path))
    assert time.monotonic() - started < 5


@FEW
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=5))
def test_any_mapping_is_a_recipe_or_one_error(tmp_path: Path, value: dict[str, Any]):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(value), encoding="utf-8")
    load(tmp_path / "r.yaml")


@FEW
@given(st.text("{}[]:,&*<!|>-'\"#%@`?\n ab1", max_size=60) | st.binary(max_size=40))
def test_any_text_is_a_recipe_or_one_error(tmp_path: Path, value: str | bytes):
    content = value if isinstance(value, bytes) else value.encode()
    (tmp_path / "r.yaml").write_bytes(content)
    load(tmp_path / "r.yaml")


@pytest.mark.parametrize("stage", registry.STAGES)
@settings(parent=FEW, max_examples=60)
@given(data=st.data())
def test_any_values_are_settings_with_finite_numbers_or_errors_that_name_them(
    stage: str, data: st.DataObject
):
    kind = registry.STAGES[stage].settings
    names = st.sampled_from(sorted(config.fields(kind)))
    values = data.draw(st.dictionaries(names, VALUES, max_size=4))
    required = {"input": "i", "model": "m", "output_dir": "o", "responses": "a,b"}
    known = {name: value for name, value in required.items() if name in kind.model_fields}
    try:
        built = config.build(kind, known | values, where="test")
    except ConfigError as error:
        check_messages(error, "test: ")
        return
    for value in built.model_dump().values():
        assert not isinstance(value, float) or math.isfinite(value)
