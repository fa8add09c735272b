"""A reward model in a user's file works in every stage, in child processes too, and its mistakes
are one line each.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from toy import make_model
from typer.testing import CliRunner

from scir_cli import cli, config, plugins
from scir_cli.data import dataset, files
from scir_cli.errors import ConfigError
from scir_cli.rewards import reward_models
from scir_cli.settings import RewardSettings

ROOT = Path(__file__).parent.parent
(EXAMPLE,) = re.findall(
    r"```python\n(.*?)```",
    (ROOT / "docs" / "reward_models.md").read_text(encoding="utf-8"),
    re.DOTALL,
)
WORDS = ("cat", "dog", "sun", "sea", "map", "key")
PAIRS = [
    {"prompt": f"Say {w}.", "chosen": f"The {w}, and more of the {w}.", "rejected": "No."}
    for w in WORDS
]

RECIPE = """
all: {dtype: fp32, device: cpu, model: policy, reward_reference: base,
      reward_models: [judge, implicit, "my_models:Brevity"]}
steps:
  - judge: {input: gold.jsonl, output_dir: "{out}/judged", rows_per_part: 3, workers: 2}
  - check-consistency: {input: "{out}/judged", agree_on: [judge, brevity],
                        output_dir: "{out}/consistency", report: "{out}/consistency.html"}
  - filter: {input: "{out}/judged", rule: brevity, output_dir: "{out}/preferences"}
  - train: {input: "{out}/preferences", validation: gold.jsonl, batch_size: 3,
            learning_rate: 1.0e-3, num_processes: 2, output_dir: "{out}/m2",
            report: "{out}/m2.html"}
  - eval rewards: {input: gold.jsonl, output_dir: "{out}/scores", report: "{out}/scores.html"}
"""

# What is wrong, the text of the file, the class, and a part of the one line that says so
MISTAKES = {
    "a missing module": (
        "",
        "nothing_here:Brevity",
        "cannot be imported: No module named 'nothing_here'",
    ),
    "a module that fails": (
        "1 / 0",
        "MODULE:Brevity",
        "cannot be imported: ZeroDivisionError: division by zero",
    ),
    "a missing class": (EXAMPLE, "MODULE:Brevty", "has no class 'Brevty'. Did you mean 'Brevity'?"),
    "no base class": (
        "class Brevity:\n    n_branches = 0",
        "MODULE:Brevity",
        "does not derive from scir_cli.rewards.reward_models.RewardModel",
    ),
    "missing methods": (
        (
            "from scir_cli.rewards.reward_models import RewardModel\nclass "
            "Brevity(RewardModel):\n    n_branches = 0"
        ),
        "MODULE:Brevity",
        "lacks branches and odds",
    ),
    "no number of branches": (
        EXAMPLE.replace("n_branches = 2", "pass"),
        "MODULE:Brevity",
        "lacks n_branches",
    ),
    "the name of a built-in model": (
        EXAMPLE.replace("n_branches", "name = 'judge'\n    n_branches"),
        "MODULE:Brevity",
        "cannot be called 'judge'",
    ),
    "a word of filter's rules": (
        EXAMPLE.replace("Brevity", "Majority"),
        "MODULE:Majority",
        "cannot be called 'majority'",
    ),
    "one name for two": (
        f"{EXAMPLE}\n\nclass Other(Brevity):\n    name = 'brevity'\n",
        "MODULE:Brevity,MODULE:Other",
        "are called 'brevity'",
    ),
    "another number of branches": (
        EXAMPLE.replace("n_branches = 2", "n_branches = 3"),
        "MODULE:Brevity",
        "returned 2 branches for a pair; its n_branches is 3",
    ),
    "no verdict branches": (
        EXAMPLE.replace("n_branches = 2", "n_branches = 2\n    reads_verdicts = True"),
        "MODULE:Brevity",
        "sets reads_verdicts, but one of its branches does not have exactly one target token",
    ),
    "other branches than the answers": (
        EXAMPLE.replace("n_branches = 2", "n_branches = 2\n    scores_answers = True").replace(
            "response_ids]", "response_ids[::-1]]"
        ),
        "MODULE:Brevity",
        "sets scores_answers, but its first two branches are not",
    ),
    "no seats": (
        EXAMPLE.replace("n_branches = 2", "n_branches = 2\n    has_seats = True"),
        "MODULE:Brevity",
        "have `orders` if, and only if,",
    ),
    "one number for all pairs": (
        EXAMPLE.replace("rewards[0] - rewards[1]", "rewards.mean()"),
        "MODULE:Brevity",
        "one log-odds per pair, a tensor of 6",
    ),
    "a reference that is not given": (
        EXAMPLE.replace("n_branches = 2", "n_branches = 2\n    needs_reference = True"),
        "MODULE:Brevity",
        "the brevity reward needs --reward-reference",
    ),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two models, labeled pairs and the example of the documentation."""
    root = tmp_path_factory.mktemp("own")
    make_model(root / "base", seed=1)
    make_model(root / "policy", seed=2)
    (root / "gold.jsonl").write_text(
        "".join(json.dumps(pair) + "\n" for pair in PAIRS), encoding="utf-8"
    )
    (root / "my_models.py").write_text(EXAMPLE, encoding="utf-8")
    return root


@pytest.fixture
def here(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, from which modules are found.

    What that adds to the search path goes with the test.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def judge(world: Path, out: Path, models: str) -> Any:
    words = [
        "judge",
        "-m",
        str(world / "policy"),
        "-i",
        str(world / "gold.jsonl"),
        "-o",
        str(out),
        "--reward-models",
        models,
    ]
    return CliRunner().invoke(cli.app, [*words, "--dtype", "fp32", "--device", "cpu"])


def test_the_example_of_the_documentation_has_at_most_15_lines():
    assert len(EXAMPLE.strip().splitlines()) <= 15


@pytest.fixture(scope="module")
def finished(world: Path) -> tuple[Path, str]:
    """The folders of a recipe with that model, and what it printed.

    Workers, ranks and steps are processes of their own.
    """
    (world / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    # PYTHONSAFEPATH: as for a console script, the current directory is not searched for modules.
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONSAFEPATH": "1",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "80",
    }
    command = [
        sys.executable,
        "-m",
        "scir_cli",
        "run",
        "recipe.yaml",
        "-o",
        "out",
        "--report",
        "story.html",
    ]
    done = subprocess.run(command, cwd=world, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return world, done.stdout


@pytest.mark.slow
def test_its_verdicts_are_those_of_its_equation_and_filter_labels_by_them(
    finished: tuple[Path, str],
):
    world, _ = finished
    rows = dataset.read_dataset(world / "out" / "judged").to_pylist()
    assert len(rows) == len(PAIRS)
    key = files.read_json(world / "out" / "judged" / "plan.json")["model"]
    verdicts = {}
    for row in rows:
        (reward,) = [r for r in row["rewards"] if r["reward_model"] == "brevity"]
        (logps,) = [r for r in row["reference_logps"] if r["weights_key"] == key]
        tokens = {side: len(row[side]["token_ids"]) for side in ("first", "second")}
        expected = {side: logps[side] / n - 0.1 * n for side, n in tokens.items()}
        assert reward["log_odds"] == pytest.approx(expected["first"] - expected["second"], abs=1e-4)
        verdicts[row["pair_id"]] = "first" if reward["log_odds"] > 0 else "second"
    labels = {
        row["pair_id"]: row["label"]
        for row in dataset.read_dataset(world / "out" / "preferences").to_pylist()
    }
    assert labels == verdicts


@pytest.mark.slow
def test_it_trains_beside_judge_and_implicit_and_is_validated(finished: tuple[Path, str]):
    world, _ = finished
    records = [
        json.loads(line)
        for line in (world / "out" / "m2" / "metrics.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()
    ]
    steps, validations = (
        [r for r in records if r["kind"] == kind] for kind in ("train", "validation")
    )
    assert len(steps) == 2
    assert all(r["abs_log_odds/brevity"] > 0 for r in steps)
    assert {f"validation/accuracy/{name}" for name in ("judge", "implicit", "brevity")} <= set(
        validations[0]
    )
    assert all(validations[0][f"branch_grad_norm/{name}"] > 0 for name in ("judge", "brevity"))


@pytest.mark.slow
def test_it_is_in_the_tables_and_on_every_page(finished: tuple[Path, str]):
    world, printed = finished
    assert any(line.split()[:1] == ["brevity"] for line in printed.splitlines())
    assert "judge / brevity" in printed
    for page in ("out/consistency.html", "out/m2.html", "out/scores.html", "story.html"):
        assert "brevity" in (world / page).read_text(encoding="utf-8"), page
    summary = files.read_json(world / "out" / "scores" / "manifest.json")["summary"]
    assert list(summary["models"]) == ["judge", "implicit", "brevity"]
    assert summary["models"]["brevity"]["labeled"] == len(PAIRS)


def test_a_model_without_branches_reads_the_lengths(world: Path, here: Path):
    text = (
        "from scir_cli.rewards.reward_models import RewardModel, RewardOutput\n\nclass "
        "ShortAnswer(RewardModel):\n"
    )
    text += (
        "    n_branches = 0\n    def branches(self, pair):\n        return []\n    def "
        "odds(self, logps, context):\n"
    )
    (here / "lengths_only.py").write_text(
        f"{text}        return RewardOutput(context.n_tokens[1] - context.n_tokens[0])\n"
    )
    assert judge(world, here / "out", "lengths_only:ShortAnswer").exit_code == 0
    for row in dataset.read_dataset(here / "out").to_pylist():
        (reward,) = row["rewards"]
        assert reward["reward_model"] == "short_answer"
        assert reward["log_odds"] == len(row["second"]["token_ids"]) - len(
            row["first"]["token_ids"]
        )


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_in_a_model_is_one_line(what: str, world: Path, here: Path):
    text, models, expected = MISTAKES[what]
    module = "wrong_" + re.sub(
        r"\W", "_", what
    )  # of its own: an imported module is not imported again
    (here / f"{module}.py").write_text(text, encoding="utf-8")
    done = judge(world, here / "out", models.replace("MODULE", module))
    assert done.exit_code == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("scir: error")]
    assert expected in line
    assert "unexpected" not in line
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "name", ["jugde", "my_models:", ":Brevity", "my models:Brevity", "my_models:Brevity.x"]
)
def test_a_name_that_no_model_can_have_is_refused_without_importing_anything(
    name: str, world: Path, here: Path
):
    done = judge(world, here / "out", name)
    assert done.exit_code == 2
    assert f"is '{name}': no such reward model." in done.stderr
    assert "Did you mean 'judge'?" in done.stderr or name != "jugde"


def test_a_stage_is_another_one_once_the_file_is_edited(here: Path):
    (here / "edited_model.py").write_text(EXAMPLE, encoding="utf-8")
    values = {"model": "m", "output_dir": "o", "reward_models": "judge,edited_model:Brevity"}
    settings = config.build(RewardSettings, values, where="test")
    before = settings.plan()
    assert before["reward_models"][0] == "judge"
    assert settings.plan() == before
    (here / "edited_model.py").write_text(EXAMPLE.replace("0.1", "0.2"), encoding="utf-8")
    assert settings.plan() != before
    assert settings.plan() | {"reward_models": before["reward_models"]} == before


@pytest.mark.parametrize(
    ("class_name", "name"),
    [
        ("Brevity", "brevity"),
        ("ShortAnswer", "short_answer"),
        ("HTTPScore", "http_score"),
        ("V2Judge", "v2_judge"),
    ],
)
def test_verdicts_are_stored_under_the_class_name_in_snake_case(class_name: str, name: str):
    assert type(class_name, (reward_models.RewardModel,), {}).name == name


def test_a_subclass_of_a_built_in_model_has_a_name_of_its_own_and_may_choose_it():
    class StrictJudge(reward_models.Judge):
        pass

    class Chosen(reward_models.Judge):
        name = "chosen_by_me"

    assert (StrictJudge.name, Chosen.name) == ("strict_judge", "chosen_by_me")
    assert StrictJudge.has_seats


def test_an_entropy_weight_is_checked_against_the_orders_of_a_users_model(world: Path, here: Path):
    """judge and strict_judge have two orders each, and implicit one verdict.

    K = 5, 2K/(K-1) = 2.5; the settings alone count 4.
    """
    text = (
        "from scir_cli.rewards.reward_models import Judge\n\nclass StrictJudge(Judge):\n    pass\n"
    )
    (here / "strict.py").write_text(text, encoding="utf-8")
    words = [
        "train",
        "-m",
        str(world / "policy"),
        "--reward-reference",
        str(world / "base"),
        "-i",
        str(world / "gold.jsonl"),
    ]
    words += [
        "--reward-models",
        "judge,implicit,strict:StrictJudge",
        "-o",
        str(here / "m"),
        "--dtype",
        "fp32",
        "--device",
        "cpu",
    ]
    done = CliRunner().invoke(cli.app, [*words, "--entropy-weight", "2.5"])
    assert done.exit_code == 2
    assert "with 5 verdicts per pair" in done.stderr
    assert "Use less than 2.5" in done.stderr
    assert not (here / "m").exists()


def test_a_module_of_the_current_directory_does_not_hide_an_installed_one(
    here: Path, monkeypatch: pytest.MonkeyPatch
):
    (here / "colorsys.py").write_text("raise RuntimeError('hidden')", encoding="utf-8")
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with pytest.raises(ConfigError, match=r"colorsys.py has no class 'Brevity'"):
        plugins.load_class("colorsys:Brevity", reward_models.RewardModel, "reward model")
