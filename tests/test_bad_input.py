"""Bad input through the real command line.

One line that says what was wrong, a documented status, nothing lost.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers import run_command
from toy import make_model

from scir_cli import cli, config, settings
from scir_cli.data import files
from scir_cli.errors import ConfigError, StoreError
from scir_cli.report import tables
from scir_cli.stages import overwrite


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its broken copies, and inputs that are wrong in one way each."""
    root = tmp_path_factory.mktemp("bad")
    make_model(root / "m0", seed=1)
    make_model(root / "m1", seed=2)
    (root / "ok.jsonl").write_text('{"prompt": "Hi."}\n', encoding="utf-8")
    (root / "column.jsonl").write_text('{"sentence": "Hi."}\n', encoding="utf-8")
    (root / "empty.jsonl").write_text("", encoding="utf-8")
    (root / "latin.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    pairs = [{"prompt": "Hi.", "chosen": "Yes.", "rejected": "No."}]
    (root / "pairs.jsonl").write_text(
        "".join(json.dumps(p) + "\n" for p in pairs), encoding="utf-8"
    )
    long = {"prompt": "word " * 2000, "chosen": "a", "rejected": "b"}
    (root / "long.jsonl").write_text(json.dumps(long) + "\n", encoding="utf-8")
    (root / "same.jsonl").write_text(
        json.dumps({"prompt": "Hi.", "chosen": "a", "rejected": "a"}) + "\n", encoding="utf-8"
    )
    graded = {
        "instruction": "i",
        "output_1": "a",
        "output_2": "b",
        "generator_1": "x",
        "generator_2": "y",
        "preference": 7,
    }
    (root / "graded.json").write_text(json.dumps([graded]), encoding="utf-8")
    for name in "ab":
        (root / f"{name}.json").write_text(
            json.dumps([{"instruction": name, "output": "x"}]), encoding="utf-8"
        )
    (root / "lists.jsonl").write_text(
        json.dumps({"prompt": "Hi.", "chosen": ["a", 1], "rejected": ["b"]}) + "\n",
        encoding="utf-8",
    )
    (root / "broken.jinja").write_text("{% for %}", encoding="utf-8")
    shutil.copytree(root / "m1", root / "hollow")
    (root / "hollow" / "model.safetensors").unlink()
    shutil.copytree(root / "m1", root / "speechless")
    (root / "speechless" / "chat_template.jinja").unlink()
    return root


GENERATE = "generate -m m1 --n 1 --max-new-tokens 4 -o OUT"
CASES = [
    (1, f"{GENERATE} -i column.jsonl", "no column holds the prompt"),
    (1, f"{GENERATE} -i empty.jsonl", "is empty"),
    (1, f"{GENERATE} -i latin.jsonl", "UTF-8"),
    (1, f"{GENERATE} -i none.jsonl", "does not exist"),
    (2, f"{GENERATE} -i ok.jsonl temprature=1", "Did you mean 'temperature'"),
    (2, f"{GENERATE} -i ok.jsonl --temprature 1", "--temprature"),
    (2, f"{GENERATE} -i ok.jsonl --limit 0", "'limit' is '0'"),
    (1, f"{GENERATE} -i ok.jsonl --chat-template broken.jinja", "the chat template fails"),
    (2, "genrate", "Did you mean 'generate'"),
    (1, "generate -m hollow -i ok.jsonl -o OUT", "no weights"),
    (1, "generate -m speechless -i ok.jsonl -o OUT", "no chat template"),
    (1, "filter -i pairs.jsonl -o OUT", "not a dataset folder"),
    (2, "judge -m m1 --reward-reference m1 -i pairs.jsonl -o OUT", "same weights"),
    (1, "judge -m m1 --reward-reference m0 -i same.jsonl -o OUT", "identical_responses"),
    (1, "eval rewards -m m1 --reward-reference m0 -i long.jsonl -o OUT", "too_long"),
    (1, "train --objective dpo -m m1 -i long.jsonl -o OUT", "too_long"),
    (
        1,
        "train --objective sft -m m1 -i pairs.jsonl --learning-rate 1000 --num-epochs 3 -o OUT",
        "Lower --learning-rate",
    ),
    (2, "train --objective sft -m m1 -i pairs.jsonl -o m1 --overwrite", "is or holds model m1"),
    (1, "eval winrate --annotations graded.json -o OUT", "'preference' is 7; expected 1"),
    (
        1,
        "eval winrate -m m1 --responses a.json --baseline b.json -o OUT",
        "no instruction in common",
    ),
    (2, "eval winrate -m m1 --responses a.json -o OUT", "needs a --baseline"),
    (
        1,
        "eval rewards -m m1 --reward-models judge -i lists.jsonl -o OUT",
        "'chosen' should be text or a list",
    ),
]


#: One of the usage, the data, the model and the training: these start an interpreter, as a user
#: does.
IN_A_PROCESS = [CASES[0], CASES[8], CASES[9], CASES[16]]
IDS = {case: case[1][:60] for case in CASES}


def assert_one_line(status: int, stderr: str, expected_status: int, expected: str) -> None:
    assert status == expected_status, stderr
    (line,) = stderr.splitlines()
    assert line.startswith("scir: error: ")
    assert expected in line


@pytest.mark.parametrize(("status", "line", "expected"), CASES, ids=IDS.values())
def test_bad_input_is_one_line_and_a_documented_status(
    here: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    status: int,
    line: str,
    expected: str,
):
    words = line.replace("OUT", str(tmp_path / "o")).split()
    monkeypatch.chdir(here)
    assert_one_line(run_command(words, monkeypatch), capfd.readouterr().err, status, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("status", "line", "expected"), IN_A_PROCESS, ids=[IDS[case] for case in IN_A_PROCESS]
)
def test_bad_input_is_one_line_in_a_process_of_its_own_too(
    here: Path, tmp_path: Path, scir_command: list[str], status: int, line: str, expected: str
):
    words = line.replace("OUT", str(tmp_path / "o")).split()
    done = subprocess.run([*scir_command, *words], cwd=here, capture_output=True, text=True)
    assert_one_line(done.returncode, done.stderr, status, expected)


def test_an_output_folder_that_holds_an_input_is_refused_before_overwrite_could_delete_it(
    tmp_path: Path,
):
    (tmp_path / "m" / "judged").mkdir(parents=True)
    for out in ("m", "m/judged"):
        values = {
            "input": str(tmp_path / "m" / "judged"),
            "output_dir": str(tmp_path / out),
            "overwrite": True,
        }
        with pytest.raises(ConfigError, match="is or holds input"):
            overwrite.check(config.build(settings.FilterSettings, values, where="test"), "test")


@pytest.mark.parametrize(
    "name", ["judge_prompt", "rationale_prompt", "rubric_prompt", "chat_template"]
)
def test_an_output_folder_that_holds_a_prompt_file_is_refused_too(tmp_path: Path, name: str):
    (tmp_path / "asked.txt").write_text("{question}", encoding="utf-8")
    values = {
        "model": "m",
        "input": "i",
        "output_dir": str(tmp_path),
        "overwrite": True,
        name: str(tmp_path / "asked.txt"),
    }
    with pytest.raises(ConfigError, match=f"is or holds {name}"):
        overwrite.check(config.build(settings.JudgeSettings, values, where="test"), "test")


@pytest.mark.parametrize("name", ["model", "reward_reference"])
def test_an_output_folder_that_holds_the_model_behind_an_adapter_is_refused_too(
    tmp_path: Path, name: str
):
    for folder in ("base", "adapter", "other"):
        (tmp_path / folder).mkdir()
    written = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "base")}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(written), encoding="utf-8")
    values = {
        "model": "m",
        "input": "i",
        "overwrite": True,
        name: f"{tmp_path}/absent | {tmp_path}/adapter",
    }

    def check(folder: str) -> None:
        given = {**values, "output_dir": str(tmp_path / folder)}
        overwrite.check(config.build(settings.TrainSettings, given, where="test"), "test")

    with pytest.raises(
        ConfigError,
        match=(
            f"base is or holds the base model of {name} .*adapter, .*base; choose another folder$"
        ),
    ):
        check("base")
    check("other")


def test_a_library_that_hides_a_full_disk_is_seen_through(tmp_path: Path):
    class RustError(Exception):  # as safetensors raises it
        pass

    with pytest.raises(StoreError, match="no space left"), files.as_store_error(tmp_path):
        raise RustError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(StoreError, match="no space left"), files.as_store_error(tmp_path):
        try:
            raise OSError(28, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos 174336 vs 174228")  # noqa: B904 (as torch raises it)


def test_the_story_is_whole_at_eighty_columns():
    from rich.console import Console

    model = {"accuracy": 1.0, "flip_rate": 1.0}
    figures = {
        "pairs": 10000,
        "models": {"judge": model, "implicit": model},
        "agreed": {"rate": 1.0, "accuracy": 1.0},
    }
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(
        tables.iterations_table([("m1-consistency", {**figures, "between": [{"kappa": -0.55}]})])
    )
    console.file.close()
    text = console.export_text()
    assert "…" not in text
    assert all(word in text for word in ("implicit", "10000", "m1-consistency", "-0.55"))


def test_an_interrupt_before_the_command_begins_is_a_line_and_status_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def interrupted(**options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", interrupted)
    assert run_command(["filter"], monkeypatch) == 130
    assert capsys.readouterr().err == "scir: interrupted\n"
