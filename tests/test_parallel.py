"""Ranks and packs change nothing but speed.

Two CPU processes (gloo) train what one does, sharded or not, and go on from each other's
checkpoints.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import load_fp32
from safetensors.torch import load_file
from toy import make_model

from scir_cli import config
from scir_cli.data import dataset
from scir_cli.engine import deepspeed_zero, trees
from scir_cli.engine.distributed import DistributedContext
from scir_cli.engine.lazy_policy import LazyPolicy
from scir_cli.errors import ConfigError, TrainingError
from scir_cli.rewards import references
from scir_cli.settings import IMPLICIT_SCALE, TrainSettings
from scir_cli.stages import train
from scir_cli.training import dry_run
from scir_cli.training.examples import encode_examples, load_training_rows
from scir_cli.training.objectives import Example
from scir_cli.training.trainer import Trainer

WORDS = ["cat", "dog", "sun", "sea", "map"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parallel")
    make_model(folder / "base", seed=1)
    make_model(folder / "policy", seed=2)
    rows = [
        {"prompt": f"Say {w} {n}.", "chosen": f"The {w}.", "rejected": "No, " * n}
        for w in WORDS
        for n in (1, 2, 3)
    ]
    (folder / "gold.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    return folder


def command(root: Path, out: Path, *more: str) -> list[str]:
    common = [
        "train",
        "-m",
        "policy",
        "--reward-reference",
        "base",
        "-i",
        "gold.jsonl",
        "--dtype",
        "fp32",
        "--device",
        "cpu",
    ]
    common += [
        "--implicit-scale",
        "5",
        "--penalty-ratio",
        "1",
    ]  # losses of the order of one: 1e-5 of them is what is compared
    common = [str(root / w) if (root / w).exists() else w for w in common]
    return [
        sys.executable,
        "-m",
        "scir_cli",
        *common,
        "--batch-size",
        "5",
        "--learning-rate",
        "1e-3",
        "-o",
        str(out),
        *more,
    ]


def run(root: Path, out: Path, *more: str, **environment: str) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command(root, out, *more), capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("train: 15 in = 15 out") == 1, (
        done.stderr
    )  # one line, whatever the number of processes


def logged(out: Path, what: str, skip: str = "") -> list[float]:
    """A figure of every step: the loss; gradient norms, each reward model's among them."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [
        value
        for r in records
        for name, value in sorted(r.items())
        if what in name.split("/")[0] and name.split("/")[0] != skip
    ]


def assert_same_run(one: Path, other: Path, skip: str = "") -> None:
    """Losses, gradient norms (except those named `skip`) and weights of two runs are equal."""
    assert logged(other, "loss") == pytest.approx(logged(one, "loss"), abs=1e-5)
    norms = logged(one, "grad_norm", skip)
    assert len(norms) >= 3
    assert logged(other, "grad_norm", skip) == pytest.approx(norms, rel=1e-5)
    weights, same = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert weights.keys() == same.keys()
    assert max(float((weights[name] - same[name]).abs().max()) for name in weights) < 1e-5


@pytest.fixture(scope="module")
def alone(root: Path) -> Path:
    """What one process makes of three steps of SCIR."""
    run(root, root / "one", "--max-tokens-per-pack", "100000")
    return root / "one"


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_two_ranks_train_what_one_does(root: Path, alone: Path, tmp_path: Path, sharding: str):
    run(
        root,
        tmp_path / "two",
        "--num-processes",
        "2",
        "--sharding",
        sharding,
        "--max-tokens-per-pack",
        "300",
    )  # several packs a rank
    assert_same_run(alone, tmp_path / "two")


@pytest.mark.slow
def test_adapters_over_sharded_weights_in_cpu_memory_train_what_one_process_does(
    root: Path, tmp_path: Path
):
    more = ("--lora-rank", "2", "--objective", "dpo")
    run(root, tmp_path / "one", *more)
    run(
        root,
        tmp_path / "two",
        *more,
        "--num-processes",
        "2",
        "--sharding",
        "fsdp",
        "--cpu-offload",
        "--gradient-checkpointing",
    )
    assert_same_run(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize(
    "kill",
    [
        pytest.param(os.killpg, id="all"),
        pytest.param(os.kill, id="driver alone", marks=pytest.mark.soak),
    ],
)
def test_a_run_of_two_ranks_that_was_killed_is_finished_by_one(
    root: Path, tmp_path: Path, kill: Any
):
    more = ("--num-epochs", "4", "--save-every", "1")
    run(root, tmp_path / "whole", *more)
    out = tmp_path / "killed"
    process = subprocess.Popen(
        command(root, out, *more, "--num-processes", "2"),
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )
    while not list(out.glob("checkpoints/step-*.pt")):
        assert process.poll() is None
        time.sleep(0.005)
    kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "manifest.json").exists()
    while (
        subprocess.run(["pgrep", "-f", str(out)], capture_output=True).returncode == 0
    ):  # its ranks die with it, or soon
        time.sleep(0.05)
    run(root, out, *more)
    assert_same_run(tmp_path / "whole", out)


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        "torch.distributed.run --standalone --nproc-per-node 2",
        pytest.param(
            "accelerate.commands.launch --cpu --num_processes 2 --num_machines 1",
            marks=pytest.mark.soak,
        ),
    ],
)
def test_other_launchers_work_as_num_processes_does(
    root: Path, alone: Path, tmp_path: Path, launcher: str
):
    subprocess.run(
        [sys.executable, "-m", *launcher.split(), "-m", *command(root, tmp_path / "two")[2:]],
        check=True,
        capture_output=True,
    )
    assert json.loads((tmp_path / "two" / "manifest.json").read_text())["rows_out"] == 15
    assert_same_run(alone, tmp_path / "two")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_layers_train_what_plain_ones_do(root: Path, tmp_path: Path):
    for name in ("plain", "compiled"):
        more: dict[str, Any] = {"objective": "sft", "compile": name == "compiled"}
        train.run(config.build(TrainSettings, values(root, tmp_path / name, **more), where="test"))
    assert_same_run(tmp_path / "plain", tmp_path / "compiled")


@pytest.mark.slow
def test_all_ranks_together_print_an_error_once(root: Path, tmp_path: Path):
    wrong = command(root, tmp_path / "x", "--num-processes", "2", "--max-tokens-per-pack", "300")
    wrong[wrong.index("--reward-reference") + 1] = str(root / "policy")
    done = subprocess.run(wrong, capture_output=True, text=True)
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if "error" in line] == [
        done.stderr.splitlines()[-1]
    ]
    assert "same weights" in done.stderr


@pytest.mark.parametrize("plugin", ["DEEPSPEED", "FSDP"])
def test_a_plugin_of_accelerate_is_refused_and_never_ignored(
    plugin: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(f"ACCELERATE_USE_{plugin}", "true")
    with pytest.raises(ConfigError, match="--sharding fsdp"):
        DistributedContext(cuda=False)


def test_loads_are_shared_out_evenly_and_to_everybody_the_same():
    ranks = DistributedContext(cuda=False)
    ranks.size, shares = 3, []
    for ranks.rank in range(3):
        shares.append(ranks.assign([9, 1, 5, 4, 4, 3]))  # 26 in all: 9; 5, 3, 1; 4, 4
    assert sorted(i for share in shares for i in share) == list(range(6))
    assert shares == [[0], [1, 2, 5], [3, 4]]


def trainer(root: Path, out: Path, **values: Any) -> Trainer:
    """A trainer on the fifteen pairs, with references that give every pair a verdict."""
    base = {
        "model": str(root / "policy"),
        "input": str(root / "gold.jsonl"),
        "output_dir": out,
        "reward_reference": str(root / "base"),
        "dtype": "fp32",
        "device": "cpu",
        "batch_size": 5,
        "learning_rate": 1e-3,
        "implicit_scale": IMPLICIT_SCALE,
    }
    settings = config.build(TrainSettings, base | values, where="test")
    start = LazyPolicy(settings, settings.model)
    objective = train.build_objective(settings, start, "M_0")
    rows = load_training_rows(settings.input, settings.limit)
    labeled = settings.objective != "scir"
    examples = encode_examples(rows, objective, start, labeled=labeled).examples
    for example in examples:
        example.pair.reference_logps.update(
            {start.weights_key: (-20.0, -21.0), "M_0": (-20.5, -20.0)}
        )
    out.mkdir(exist_ok=True)
    return Trainer(load_fp32(root / "policy"), objective, examples, settings, out)


@pytest.mark.parametrize("objective", ["scir", "sft"])
def test_where_memory_runs_out_the_step_is_split_counted_and_the_same(
    root: Path,
    tmp_path: Path,
    objective: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    undisturbed = trainer(root, tmp_path / "a", objective=objective).train()
    short = trainer(root, tmp_path / "b", objective=objective)
    whole, real = short.max_tokens, short.policy.branch_logps

    def small_memory(branches: list[trees.Branch], layout: Any = None) -> torch.Tensor:
        if trees.size(branches) > 400:  # a step's five pairs need more, a pair less
            raise torch.OutOfMemoryError("out of memory")
        return real(branches, layout)

    monkeypatch.setattr(short.policy, "branch_logps", small_memory)
    final = short.train()
    assert short.max_tokens <= 400 < whole
    assert final["memory_splits"] == capsys.readouterr().err.count("out of memory; packs are") >= 1
    assert final["loss"] == pytest.approx(undisturbed["loss"], rel=1e-4)
    assert final["packs"] > undisturbed["packs"] == 1


def test_a_pair_too_large_for_the_memory_ends_the_run_with_one_line(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def none_left(branches: list[trees.Branch], layout: Any = None) -> torch.Tensor:
        raise torch.OutOfMemoryError("out of memory")

    short = trainer(root, tmp_path / "a")
    monkeypatch.setattr(short.policy, "branch_logps", none_left)
    with pytest.raises(TrainingError, match="lower --max-tokens-per-pack"):
        short.train()


def test_a_plan_counts_what_training_then_computes(root: Path, tmp_path: Path):
    planned = trainer(root, tmp_path / "a", max_tokens_per_pack=400)
    figures = dry_run.estimate(
        planned.policy, planned.examples, planned.settings, planned.objective
    )
    planned.train()
    records = map(json.loads, (tmp_path / "a" / "metrics.jsonl").read_text().splitlines())
    log = [record for record in records if record["kind"] == "train"]
    assert figures["steps"] == len(log) == 3
    assert figures["tokens_without_sharing"] == sum(r["sequence_tokens"] for r in log)
    assert figures["tokens"] == pytest.approx(
        sum(r["tokens"] for r in log), rel=0.02
    )  # packs are put together by prompt in the step
    assert 0.5 < figures["packing_efficiency"] <= 1


def test_reference_log_probabilities_are_kept_beside_the_data_and_used_again(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = {
        "model": str(root / "policy"),
        "input": str(root / "gold.jsonl"),
        "objective": "dpo",
        "dtype": "fp32",
        "device": "cpu",
    }
    first = config.build(TrainSettings, settings | {"output_dir": tmp_path / "m"}, where="test")
    train.run(first)
    (path,) = (tmp_path / "m").glob("reference_logps-*.arrow")
    known = dataset.read_columns(path)
    assert len(known) == 15
    pairs = [Example(e.pair).pair for e in trainer(root, tmp_path / "a").examples]
    for pair in pairs:
        pair.reference_logps.clear()
    start = LazyPolicy(first, first.model)
    monkeypatch.setattr(references, "add_missing_logps", lambda *_: pytest.fail("computed again"))
    train.add_reference_logps(pairs, start, first, DistributedContext(cuda=False))
    assert {p.pair_id: p.reference_logps[start.weights_key] for p in pairs} == known


DEEPSPEED = (
    Path(sys.prefix) / "deepspeed"
)  # a folder of its own, since whatever imports transformers would import it as well


def values(root: Path, out: Path, **more: Any) -> dict[str, Any]:
    """Settings of the run that `command` writes down."""
    base = {
        "model": str(root / "policy"),
        "reward_reference": str(root / "base"),
        "input": str(root / "gold.jsonl"),
        "dtype": "fp32",
    }
    return {
        **base,
        "device": "cpu",
        "implicit_scale": 5.0,
        "penalty_weight": 1.0,
        "batch_size": 5,
        "learning_rate": 1e-3,
        "output_dir": str(out),
        **more,
    }


def stopped(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], step: int) -> None:
    """A run in this process that ends after the checkpoint of a step."""
    save = Trainer.save_checkpoint

    def save_and_stop(trainer: Trainer) -> None:
        save(trainer)
        if trainer.step == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "save_checkpoint", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        train.run(config.build(TrainSettings, settings, where="test"))
    monkeypatch.undo()


@pytest.mark.slow
@pytest.mark.skipif(
    not (DEEPSPEED.is_dir() or importlib.util.find_spec("deepspeed")),
    reason="needs DeepSpeed, which `make test` installs",
)
def test_each_stage_of_zero_trains_what_one_process_does_and_goes_on_from_any_other(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    packs: dict[str, Any] = {"max_tokens_per_pack": 300, "save_every": 1}  # several packs a rank
    lora: dict[str, Any] = {"objective": "dpo", "lora": {"rank": 2}}
    for name, more in {"one": {}, "lora": lora}.items():
        train.run(config.build(TrainSettings, values(root, tmp_path / name, **more), where="test"))
    stopped(monkeypatch, values(root, tmp_path / "one to 3", **packs), 2)
    more = {"lora 2": lora, "lora 3": {**lora, "gradient_checkpointing": True}}
    jobs = [  # (stage, the last step before the run is broken off or 0, where)
        (1, 0, "1"),
        (3, 2, "3 to 2"),
        (2, 0, "3 to 2"),
        (2, 1, "2 to 3"),
        (3, 0, "2 to 3"),
        (3, 0, "one to 3"),
        (3, 2, "3 to one"),
        (2, 0, "lora 2"),
        (3, 0, "lora 3"),
    ]
    listed = [
        {"stage": s, "stop": n, "values": values(root, tmp_path / o, **packs, **more.get(o, {}))}
        for s, n, o in jobs
    ]
    (tmp_path / "jobs").write_text(json.dumps(listed), encoding="utf-8")
    env = {
        "PYTHONPATH": f"{DEEPSPEED}:{Path(train.__file__).parents[2]}",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    launcher = (
        "accelerate.commands.launch --use_deepspeed --zero_stage 3 --num_processes 2 "
        "--num_machines 1 --main_process_port 0"
    )
    script = [str(Path(__file__).parent / "zero_ranks.py"), str(tmp_path / "jobs")]
    done = subprocess.run(
        [sys.executable, "-m", *launcher.split(), *script],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
    )
    assert done.returncode == 0, done.stderr
    train.run(
        config.build(TrainSettings, values(root, tmp_path / "3 to one", **packs), where="test")
    )
    # DeepSpeed returns no gradient, so no branch's norm is logged under it.
    for name in ("1", "3 to 2", "2 to 3", "one to 3", "3 to one"):
        assert_same_run(tmp_path / "one", tmp_path / name, skip="branch_grad_norm")
    for name in ("lora 2", "lora 3"):
        assert_same_run(tmp_path / "lora", tmp_path / name, skip="branch_grad_norm")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"zero_optimization": {"stage": 0}}, "stages 1, 2 and 3"),
        ({"optimizer": {"type": "Lamb"}}, "sets the optimizer"),
    ],
)
def test_each_entry_of_a_deepspeed_config_is_applied_or_refused(given: dict[str, Any], said: str):
    fine = {
        "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"},
        "optimizer": "auto",
        "bf16": {"enabled": "auto"},
    }
    assert deepspeed_zero.validate_config(fine) == {"zero_optimization": {"stage": 2}, "bf16": {}}
    with pytest.raises(ConfigError, match=said):
        deepspeed_zero.validate_config(fine | given)


def test_an_install_hint_is_printed_if_deepspeed_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ConfigError, match=r"pip install 'scir-cli\[deepspeed\]'"):
        DistributedContext(cuda=False)


def test_under_deepspeed_lambda_is_given_as_a_number(root: Path, tmp_path: Path):
    asked = {
        name: value
        for name, value in values(root, tmp_path / "m").items()
        if name != "penalty_weight"
    }
    ranks = SimpleNamespace(zero=True, shards_weights=False)
    with pytest.raises(ConfigError, match="pass --penalty-weight"):
        train.check_deepspeed(config.build(TrainSettings, asked, where="test"), ranks)  # type: ignore[arg-type]
    train.check_deepspeed(
        config.build(TrainSettings, asked | {"penalty_weight": 1.0}, where="test"), ranks
    )  # type: ignore[arg-type]
