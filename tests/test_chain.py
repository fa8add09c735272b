"""The whole chain on a tiny model.

Rows add up, folders open elsewhere, killed runs end as undisturbed ones, failures are one line.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from helpers import FP32, load_fp32, run, run_command, train
from safetensors.torch import load_file
from toy import make_adapter, make_model

from scir_cli import config
from scir_cli.data import dataset
from scir_cli.data.files import read_json, write_json
from scir_cli.engine import model_files
from scir_cli.engine.lazy_policy import LazyPolicy
from scir_cli.errors import (
    ConfigError,
    DataError,
    EngineError,
    ModelError,
    PlanMismatch,
    StoreError,
)
from scir_cli.rewards import pairs
from scir_cli.rewards.pairs import encode_pairs
from scir_cli.settings import IMPLICIT_SCALE, ModelSettings, TrainSettings
from scir_cli.training import objectives
from scir_cli.training.objectives import Example


@pytest.mark.parametrize("name", ["candidates", "judged", "consistency", "preferences", "scores"])
def test_rows_in_are_rows_out_plus_drops_and_the_folder_opens_in_datasets(scored: Path, name: str):
    world = scored
    from datasets import load_dataset, load_from_disk

    manifest = read_json(world / name / "manifest.json")
    assert manifest["rows_in"] == (
        5 * 18 if name == "scores" else 18
    )  # 6 prompts, 3 candidates, 3 pairs each; 5 reward models
    assert manifest["rows_in"] == manifest["rows_out"] + sum(manifest["drops"].values())
    assert len(load_from_disk(str(world / name))) == manifest["rows_out"] > 0
    files = [str(path) for path in sorted((world / name).glob("data-*.arrow"))]
    loaded = load_dataset("arrow", data_files=files, split="train", cache_dir=str(world / "cache"))
    assert loaded.num_rows == manifest["rows_out"]


def test_a_column_of_the_prompts_is_in_the_preferences_at_the_end_of_the_chain(world: Path):
    for name in ("candidates", "judged", "preferences"):
        rows = dataset.read_dataset(world / name).select(["messages", "extra"]).to_pylist()
        assert rows
        for row in rows:
            (word,) = json.loads(row["extra"]).values()
            asked = {"role": "user", "content": f"Tell me of the {word}.", "more": None}
            assert row["messages"] == [asked]


def test_an_end_token_is_there_if_and_only_if_the_answer_finished(world: Path):
    chat = LazyPolicy(
        config.build(
            ModelSettings, FP32, {"model": str(world / "policy"), "output_dir": "x"}, where="test"
        ),
        str(world / "policy"),
    ).chat
    for row in dataset.read_dataset(world / "candidates").to_pylist():
        assert (row["token_ids"][-1] in chat.end_ids) == (row["finish_reason"] == "stop")
        assert (
            chat.tokenizer.decode([t for t in row["token_ids"] if t not in chat.end_ids])
            == row["response"]
        )


def test_the_same_seed_gives_the_same_candidates_in_any_batch_and_another_seed_others(
    world: Path, tmp_path: Path
):
    common = {
        "model": str(world / "policy"),
        "input": str(world / "prompts.jsonl"),
        "n": 3,
        "max_new_tokens": 6,
        "rows_per_part": 2,
    }
    run("generate", **common, batch_size=1, output_dir=tmp_path / "again")
    run("generate", **common, seed=1, output_dir=tmp_path / "other")
    tokens = [
        dataset.read_dataset(folder)["token_ids"].to_pylist()
        for folder in (world / "candidates", tmp_path / "again", tmp_path / "other")
    ]
    assert tokens[0] == tokens[1] != tokens[2]


def test_the_trainers_first_log_odds_are_those_the_judge_stage_wrote(world: Path):
    settings = config.build(
        TrainSettings,
        FP32,
        {
            "model": str(world / "policy"),
            "input": "x",
            "output_dir": "x",
            "reward_reference": str(world / "base"),
            "implicit_scale": IMPLICIT_SCALE,
        },
        where="test",
    )
    model, reference = (
        LazyPolicy(settings, str(world / "policy")),
        LazyPolicy(settings, str(world / "base")),
    )
    objective = objectives.Scir(settings, model.chat, model.weights_key, reference.weights_key)
    table = dataset.read_dataset(world / "judged")
    rows = table.to_pylist()
    examples = [Example(pair) for pair in encode_pairs(table, model.chat)[1]]
    logps = (
        model.load()
        .branch_logps([b for e in examples for b in objective.branches(e)])
        .view(len(rows), -1)
    )
    context = pairs.Context.of([e.pair for e in examples], reference.weights_key)
    for name in ("judge", "implicit"):
        trained = (
            objective.models[name].odds(logps[:, objective.branch_slices[name]].T, context).log_odds
        )
        judged = [
            next(r["log_odds"] for r in row["rewards"] if r["reward_model"] == name) for row in rows
        ]
        torch.testing.assert_close(trained, torch.tensor(judged), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("objective", ["scir", "dpo"])
def test_one_large_pack_and_many_small_ones_train_the_same_weights(
    world: Path, tmp_path: Path, objective: str
):
    values = {"objective": objective, "max_steps": 2}
    for name, tokens in (("large", 100_000), ("small", 150)):
        train(world, tmp_path / name, **values, max_tokens_per_pack=tokens)
    large, small = (load_file(tmp_path / name / "model.safetensors") for name in ("large", "small"))
    start = load_file(world / "policy" / "model.safetensors")
    assert any(not torch.equal(large[key], start[key]) for key in start)
    for key in large:
        torch.testing.assert_close(small[key], large[key], rtol=1e-4, atol=2e-5)


def test_dpo_starts_at_ln_2_and_scir_without_penalty_follows_dpo(world: Path, tmp_path: Path):
    run(
        "filter",
        input=str(world / "judged"),
        output_dir=tmp_path / "agreed",
        agree_on=["judge", "implicit"],
        keep_cut=True,
    )
    n = dataset.read_dataset(tmp_path / "agreed").num_rows
    shared = {
        "input": str(tmp_path / "agreed"),
        "batch_size": n,
        "learning_rate": 1e-5,
        "num_epochs": 3,
    }
    train(world, tmp_path / "dpo", objective="dpo", **shared)
    train(world, tmp_path / "scir", objective="scir", penalty_weight=0, **shared)
    losses = {
        name: [
            record["loss"]
            for record in map(
                json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines()
            )
            if record["kind"] == "train"
        ]
        for name in ("dpo", "scir")
    }
    assert losses["dpo"][0] == pytest.approx(0.693147, abs=1e-5)  # ln 2
    assert losses["scir"] == pytest.approx(losses["dpo"], abs=1e-5)
    assert len(losses["dpo"]) == 3


def test_a_degenerate_or_missing_reward_reference_is_refused(world: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="same weights"):
        train(world, tmp_path / "m", reward_reference=str(world / "policy"))
    with pytest.raises(ConfigError, match="--reward-reference"):
        train(world, tmp_path / "m", reward_reference=None)


def test_lora_trains_adapters_and_leaves_an_ordinary_folder(world: Path, tmp_path: Path):
    train(world, tmp_path / "m", lora={"rank": 2}, max_steps=1)
    assert set(load_file(tmp_path / "m" / "model.safetensors")) == set(
        load_file(world / "policy" / "model.safetensors")
    )
    spec = {"model": str(tmp_path / "m" / "adapter"), "reward_reference": str(world / "policy")}
    whole = run(
        "judge",
        **{**spec, "model": str(tmp_path / "m")},
        input=str(world / "gold.jsonl"),
        output_dir=tmp_path / "whole",
    )
    parts = run("judge", **spec, input=str(world / "gold.jsonl"), output_dir=tmp_path / "parts")
    assert parts["summary"]["agreed"] == whole["summary"]["agreed"], (
        "the adapter on its model is the merged model"
    )
    rows = [dataset.read_dataset(tmp_path / name).to_pylist() for name in ("whole", "parts")]
    assert rows[0][0]["rewards"][1]["log_odds"] != 0
    for one, other in zip(*rows, strict=True):
        assert [r["log_odds"] for r in one["rewards"]] == pytest.approx(
            [r["log_odds"] for r in other["rewards"]], abs=1e-5
        )
    train(
        world, tmp_path / "m3", model=spec["model"], lora={"rank": 2}, max_steps=1
    )  # an adapter on a model with an adapter
    trained, given = (
        load_fp32(tmp_path / "m3" / name).model.state_dict() for name in ("adapter", ".")
    )
    for name in given:
        torch.testing.assert_close(trained[name], given[name], rtol=0, atol=1e-6)


def test_too_little_memory_is_one_line_with_what_to_lower(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 8 GiB")

    common = {"model": str(world / "policy"), "output_dir": tmp_path / "out"}
    monkeypatch.setattr("transformers.LlamaForCausalLM.generate", full)
    with pytest.raises(
        EngineError, match=r"^out of memory sampling 16 answers at a time; lower --batch-size"
    ):
        run("generate", **common, input=str(world / "prompts.jsonl"), max_new_tokens=4)
    monkeypatch.setattr("scir_cli.engine.policy.Policy.branch_logps", full)
    with pytest.raises(
        EngineError,
        match=r"^out of memory with 16384 tokens per pack; lower --max-tokens-per-pack$",
    ):
        run(
            "judge",
            **{**common, "output_dir": tmp_path / "j"},
            input=str(world / "gold.jsonl"),
            reward_models=["judge"],
        )


def test_an_adapter_for_another_model_is_refused_by_one_line(tmp_path: Path):
    make_model(tmp_path / "base", seed=1)
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "base")

    def load() -> None:
        LazyPolicy(
            config.build(ModelSettings, {"model": str(adapter), "output_dir": "o"}, where="test"),
            str(adapter),
        )

    load()
    write_json(adapter / "base.json", {"digest": model_files.digest(tmp_path / "base")})
    load()
    make_model(tmp_path / "base", seed=2)
    with pytest.raises(ModelError, match="trained on other weights"):
        load()
    make_model(tmp_path / "base", hidden_size=64)
    with pytest.raises(
        ModelError,
        match=(
            r"for another base model than .*: model\.layers\.0\.self_attn\.q_proj is 64 x 64 "
            r"in the model and 32 in the adapter"
        ),
    ):
        load()
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(ModelError, match="needs its base model .*does not exist"):
        load()


def test_qlora_trains_adapters_on_four_bits_and_merges_them_into_the_weights_it_was_given(
    world: Path, tmp_path: Path
):
    wide = make_model(
        tmp_path / "wide", hidden_size=128, intermediate_size=128
    )  # four bits come in blocks of 64
    common = {
        "model": str(wide),
        "objective": "dpo",
        "input": str(world / "gold.jsonl"),
        "dtype": "fp32",
        "quantization": "4bit",
    }
    train(world, tmp_path / "m", **common, lora={"rank": 2}, max_steps=2)
    given, made = (load_file(folder / "model.safetensors") for folder in (wide, tmp_path / "m"))
    adapters = load_file(tmp_path / "m" / "adapter" / "adapter_model.safetensors")
    (place,) = {
        name.partition("base_model.model.")[2].partition(".lora_A")[0]
        for name in adapters
        if "0.mlp.up_proj.lora_A" in name
    }
    a, b = (adapters[f"base_model.model.{place}.lora_{x}.weight"] for x in "AB")
    assert b.abs().max() > 0
    torch.testing.assert_close(
        made[f"{place}.weight"], given[f"{place}.weight"] + 16 / 2 * b @ a
    )  # alpha / rank
    with pytest.raises(ConfigError, match="adapters only"):
        train(world, tmp_path / "x", **common)


def test_eval_rewards_scores_labeled_pairs_and_winrate_matches_instructions(
    world: Path, tmp_path: Path
):
    common = {"model": str(world / "policy"), "reward_reference": str(world / "base")}
    summary = run(
        "eval rewards", **common, input=str(world / "gold.jsonl"), output_dir=tmp_path / "rewards"
    )["summary"]
    assert summary["models"]["judge"]["labeled"] == 6
    for name, answers in (
        ("a", {"x": "yes", "y": "no", "z": "same"}),
        ("b", {"x": "no", "y": "yes", "z": "same", "w": "?"}),
    ):
        rows = [{"instruction": k, "output": v, "generator": name} for k, v in answers.items()]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    manifest = run(
        "eval winrate",
        model=common["model"],
        responses=[str(tmp_path / "a.json")],
        baseline=str(tmp_path / "b.json"),
        output_dir=tmp_path / "w",
    )
    assert manifest["drops"] == {"identical_responses": 1, "not_in_responses": 1}
    assert manifest["rows_in"] == 4
    assert manifest["summary"]["matches"][0]["verdicts"] == 2


def test_trl_rows_are_the_labeled_ones_as_messages(world: Path):
    rows = [
        json.loads(line) for line in (world / "preferences" / "trl.jsonl").read_text().splitlines()
    ]
    table = dataset.read_dataset(world / "preferences")
    assert len(rows) == table.num_rows - table["label"].null_count
    assert {m["role"] for row in rows for m in row["chosen"] + row["rejected"]} == {"assistant"}


def test_another_setting_in_the_same_folder_is_refused_by_name_and_overwrite_replaces_it(
    world: Path, tmp_path: Path
):
    first = {"input": str(world / "judged"), "output_dir": tmp_path / "f", "rule": "judge"}
    run("filter", **first)
    assert run("filter", **first)["reused"]
    with pytest.raises(PlanMismatch, match=r"settings\.min_margin was 0\.0, now 0\.1"):
        run("filter", **first, min_margin=0.1)
    assert "reused" not in run("filter", **first, min_margin=0.1, overwrite=True)


def test_a_judge_prompt_that_was_edited_is_another_setting(world: Path, tmp_path: Path):
    prompt, copy = tmp_path / "judge.txt", tmp_path / "copy.txt"
    for path in (prompt, copy):
        path.write_text("{question} {a} {b}?")
    again = {
        "model": str(world / "policy"),
        "input": str(world / "gold.jsonl"),
        "reward_models": ["judge"],
        "output_dir": tmp_path / "j",
    }
    run("judge", **again, judge_prompt=prompt)
    assert run("judge", **again, judge_prompt=copy)["reused"]  # the same words in another place
    prompt.write_text("{question} {a} or {b}?")
    with pytest.raises(PlanMismatch, match="settings.judge_prompt was"):
        run("judge", **again, judge_prompt=prompt)


def test_a_truncated_part_and_a_wrong_kind_are_named(world: Path, tmp_path: Path):
    run("filter", input=str(world / "judged"), output_dir=tmp_path / "f")
    with pytest.raises(DataError, match="'preferences' dataset"):
        run("filter", input=str(tmp_path / "f"), output_dir=tmp_path / "g")
    part = tmp_path / "f" / "data-00000.arrow"
    part.write_bytes(part.read_bytes()[:-1000])
    with pytest.raises(DataError, match="truncated"):
        dataset.read_dataset(tmp_path / "f")


def test_a_full_disk_keeps_finished_parts_and_the_next_run_goes_on(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        # A file and its folder each: plan, part 0, digest of part 0; then part 1.
        if len(calls) == 7:
            raise OSError(28, "No space left on device")
        real(descriptor)

    settings = {"input": str(world / "judged"), "output_dir": tmp_path / "c", "rows_per_part": 5}
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="no space left"):
        run("check-consistency", **settings)
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "c").glob("data-*.arrow")] == ["data-00000.arrow"]
    assert (
        run("check-consistency", **settings)["rows_out"]
        == dataset.read_dataset(world / "judged").num_rows
    )


def test_every_failure_is_one_line_and_a_documented_status(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    (tmp_path / "bad.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "hollow").mkdir()
    (tmp_path / "hollow" / "config.json").write_text("{}")
    policy, prompts = str(world / "policy"), str(world / "prompts.jsonl")
    generate = ["generate", "-o", str(tmp_path / "o"), "--n", "1"]
    cases = [
        (2, [*generate, "-m", policy, "-i", prompts, "--temperature", "warm"], "temperature"),
        (2, [*generate, "-m", policy, "-i", prompts, "temprature=1"], "Did you mean 'temperature'"),
        (1, [*generate, "-m", policy, "-i", str(tmp_path / "bad.jsonl")], "UTF-8"),
        (1, [*generate, "-m", policy, "-i", str(tmp_path / "empty.jsonl")], "empty"),
        (1, [*generate, "-m", policy, "-i", str(tmp_path / "none.jsonl")], "does not exist"),
        (1, [*generate, "-m", str(tmp_path / "hollow"), "-i", prompts], "no weights"),
        (
            1,
            [
                "check-consistency",
                "-i",
                str(world / "judged"),
                "-o",
                str(tmp_path / "c"),
                "--fail-under",
                "1.0",
            ],
            "below --fail-under",
        ),
    ]
    for status, arguments, expected in cases:
        assert run_command(arguments, monkeypatch) == status
        stderr = capfd.readouterr().err
        lines = [line for line in stderr.splitlines() if line.startswith("scir: error:")]
        assert len(lines) == 1
        assert expected in lines[0]
        assert "Traceback" not in stderr


def test_help_answers_without_torch_and_json_is_all_that_stdout_holds(world: Path, tmp_path: Path):
    code = (
        "import sys, scir_cli.cli; assert not {'torch', 'transformers', 'datasets'} & "
        "set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    command = [
        sys.executable,
        "-m",
        "scir_cli",
        "filter",
        "-i",
        str(world / "judged"),
        "-o",
        str(tmp_path / "f"),
        "--json",
    ]
    assert (
        json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)[
            "kind"
        ]
        == "preferences"
    )


# ------------------------------ SIGKILL


def kill_when(command: list[str], ready: Any) -> None:
    """Starts the command and kills it, with its children, as soon as `ready()` holds."""
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not ready():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def thousands(world: Path) -> Path:
    """The judged pairs many times over under new ids.

    Enough for a stage that only counts to be caught in the middle.
    """
    rows = dataset.read_dataset(world / "judged").to_pylist()
    many = [{**row, "pair_id": f"{row['pair_id']}-{copy}"} for copy in range(30) for row in rows]
    plan = {"stage": "judge", "made by": "a test"}
    dataset.write_dataset(
        world / "thousands",
        "judged",
        plan,
        [(0, len(many))],
        lambda low, high: dataset.Part(many, len(many)),
    )
    return world / "thousands"


STAGES = ["generate", "judge", "check-consistency", "filter", "eval rewards", "train"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_stage_started_again_ends_as_an_undisturbed_one(
    world: Path, thousands: Path, tmp_path: Path, stage: str, scir_command: list[str]
):
    many = tmp_path / "many.jsonl"
    many.write_text(
        "".join(json.dumps({"prompt": f"Tell me of number {i}."}) + "\n" for i in range(24)),
        encoding="utf-8",
    )
    gold = tmp_path / "gold.jsonl"
    labeled = [
        {"prompt": f"Say {i}.", "chosen": f"It is {i}.", "rejected": "No."} for i in range(40)
    ]
    gold.write_text("".join(json.dumps(row) + "\n" for row in labeled), encoding="utf-8")
    scored = ["-m", str(world / "policy"), "--reward-reference", str(world / "base")]
    options = {
        "generate": [
            *scored[:2],
            "-i",
            str(many),
            "--n",
            "2",
            "--max-new-tokens",
            "24",
            "--rows-per-part",
            "1",
        ],
        "judge": [*scored, "-i", str(world / "candidates"), "--rows-per-part", "1"],
        "check-consistency": ["-i", str(thousands), "--rows-per-part", "20"],
        "filter": [
            "-i",
            str(thousands),
            "--rows-per-part",
            "20",
            "--no-dedup",
            "--trl-jsonl",
            "--rule",
            "judge",
            "--keep-cut",
        ],
        "eval rewards": [*scored, "-i", str(gold), "--rows-per-part", "1"],
        "train": [
            *scored,
            "-i",
            str(world / "preferences"),
            "--batch-size",
            "3",
            "--num-epochs",
            "6",
            "--save-every",
            "1",
            "--learning-rate",
            "1e-3",
        ],
    }[stage]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    precision = (
        [] if stage in ("check-consistency", "filter") else ["--dtype", "fp32", "--device", "cpu"]
    )
    command = [*scir_command, *stage.split(), *options, *precision, "-o"]
    done = {"train": "checkpoints/step-*.pt", "eval rewards": "judged/data-*.arrow"}.get(
        stage, "data-*.arrow"
    )
    kill_when([*command, str(killed)], lambda: any(killed.glob(done)))
    assert not (killed / "manifest.json").exists()
    for folder in (killed, whole):
        subprocess.run(
            [*command, str(folder)],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    if stage == "train":
        assert_same_training(killed, whole)
        return
    tables: list[pa.Table] = [dataset.read_dataset(folder) for folder in (killed, whole)]
    assert tables[0].equals(tables[1])
    if stage == "filter":
        assert (killed / "trl.jsonl").read_bytes() == (whole / "trl.jsonl").read_bytes() != b""


def assert_same_training(killed: Path, whole: Path) -> None:
    weights = [load_file(folder / "model.safetensors") for folder in (killed, whole)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[1])
    records = [
        map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        for folder in (killed, whole)
    ]
    losses = [
        [(r["step"], r["loss"]) for r in record if r["kind"] == "train"] for record in records
    ]
    assert losses[0] == losses[1]


def is_locked(folder: Path) -> bool:
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize(
    "kill",
    [
        pytest.param(os.kill, id="driver alone"),
        pytest.param(os.killpg, id="driver and child", marks=pytest.mark.soak),
    ],
)
def test_a_killed_recipe_leaves_no_child_and_goes_on_where_it_stopped(
    world: Path, tmp_path: Path, kill: Any
):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"set: {{world: '{world}'}}\nall: {{dtype: fp32, device: cpu}}\nsteps:\n"
        "- generate: {model: '{world}/policy', input: '{world}/prompts.jsonl', n: 3, "
        "max_new_tokens: 24, rows_per_part: 1, output_dir: '{out}/c'}\n"
        "- judge: {model: '{world}/policy', reward_reference: '{world}/base', input: "
        "'{out}/c', output_dir: '{out}/j'}\n"
        "- check-consistency: {input: '{out}/j', output_dir: '{out}/k'}\n"
        "- filter: {input: '{out}/j', output_dir: '{out}/f', rule: judge}\n",
        encoding="utf-8",
    )
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, "-m", "scir_cli", "run", str(recipe), "-o"]
    driver = subprocess.Popen(
        [*command, str(killed)], stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not list(killed.glob("c/data-*.arrow")):
        assert driver.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    kill(driver.pid, signal.SIGKILL)
    driver.wait()
    # The lock of the folder is free as soon as no process writes it.
    while is_locked(killed / "c"):
        assert time.monotonic() < deadline, "the child outlived its driver"
        time.sleep(0.05)
    assert not (killed / "c" / "manifest.json").exists()
    for folder in (killed, whole):
        subprocess.run(
            [*command, str(folder)],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    for name in ("c", "j", "k", "f"):
        assert dataset.read_dataset(killed / name).equals(dataset.read_dataset(whole / name))
