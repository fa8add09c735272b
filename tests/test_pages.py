"""Pages: what models wrote is text, nothing is fetched, figures stand beside their numbers, and a
browser has nothing to complain of.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chromium import PROGRAM, Chromium

from scir_cli import config, registry, settings, stages
from scir_cli.analysis import verdicts
from scir_cli.data.dataset import Part, read_dataset, versions, write_dataset
from scir_cli.data.files import read_json, write_json
from scir_cli.errors import ConfigError
from scir_cli.report import html, plots

NASTY = {
    "script": (
        "<script>window.broken = 1</script><img src=x onerror='window.broken = "
        "2'></div></details></main>"
    ),
    "rtl": "مرحبا بالعالم \u202eabc\u202c שלום",
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 " * 5,
    "long": "x" * 50_000,
    "null": "before\x00after\x1b[31m\x85",
    "braces": "{{ 7 * 7 }} {% raw %} $\\frac{1}{2}$ &amp; ]]>",
}


def rows(
    n: int, seed: int = 0, text: Any = lambda i, side: f"answer {i} {side}", labeled: bool = True
) -> list[dict[str, Any]]:
    """Judged pairs.

    Two reward models that agree more often than not, gold labels that the judge often gets right.
    """
    rng = np.random.default_rng(seed)
    made = []
    for i in range(n):
        gold = int(rng.choice([-1, 1]))
        judge, implicit = float(gold * rng.normal(1, 2)), float(gold * rng.normal(0.5, 1))
        seat = float(rng.normal(0, 1))
        sides = [
            {
                "candidate_id": None,
                "text": text(i, side),
                "token_ids": [1] * int(rng.integers(1, 30)),
                "finish_reason": "stop",
            }
            for side in "ab"
        ]
        made.append(
            {
                "pair_id": f"p{i:06d}",
                "prompt_id": f"q{i}",
                "messages": [{"role": "user", "content": text(i, "?")}],
                "subset": f"s{i % 3}",
                "first": sides[0],
                "second": sides[1],
                "gold_label": {1: "first", -1: "second"}[gold] if labeled else None,
                "reference_logps": [],
                "rewards": [
                    {
                        "reward_model": "judge",
                        "log_odds": judge,
                        "forward_log_odds": judge + seat,
                        "swapped_log_odds": judge - seat,
                        "verdict_mass": 0.9,
                    },
                    {
                        "reward_model": "implicit",
                        "log_odds": implicit if i % 7 else None,
                        "forward_log_odds": None,
                        "swapped_log_odds": None,
                        "verdict_mass": None,
                    },
                ],
            }
        )
    return made


def dataset(out: Path, made: list[dict[str, Any]]) -> Path:
    write_dataset(
        out, "judged", {"stage": "judge"}, [(0, len(made))], lambda low, high: Part(made, len(made))
    )
    return out


def run(stage: str, **values: Any) -> dict[str, Any]:
    return stages.load(stage)(config.build(registry.STAGES[stage].settings, values, where="test"))


def trained(out: Path, steps: int, **more: Any) -> Path:
    """A model folder as `train` leaves it, but for the model."""
    out.mkdir()
    rng = np.random.default_rng(steps)
    with (out / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            noise = float(rng.normal(0, 0.1))
            figures = {
                "loss": 1 / step + noise,
                "scir/preference_loss": 0.6 + noise,
                "scir/mask_rate": 0.5,
                "abs_log_odds/judge_forward": 2.0,
                "abs_log_odds/implicit": 1.0,
            }
            figures |= {
                "rewards/margins": 0.1 * step,
                "grad_norm": 3.0,
                "tokens": 900,
                "tokens_per_second": 400.0,
                "novel/figure": 1.0,
            }
            file.write(json.dumps({"step": step, "kind": "train", **figures, **more}) + "\n")
            if step % 10 == 1:
                file.write(
                    json.dumps(
                        {
                            "step": step,
                            "kind": "validation",
                            "branch_grad_norm/judge": 3.0,
                            "validation/agreement": 0.5,
                        }
                    )
                    + "\n"
                )
    write_json(
        out / "plan.json", {"stage": "train", "settings": {"objective": "scir", "beta": 0.1}}
    )
    manifest = {
        "kind": "model",
        "digest": "x",
        "rows_in": 9,
        "rows_out": 8,
        "drops": {"too_long": 1},
        "nulls": {},
        "steps": steps,
        "seconds": 75.0,
    }
    write_json(
        out / "manifest.json",
        {**manifest, "versions": versions(), "summary": {"loss": 0.25, "scir/mask_rate": 0.5}},
    )
    return out


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every page there is, as name.html, and the folders they are made from."""
    root = tmp_path_factory.mktemp("pages")
    judged = str(dataset(root / "m1-judged", rows(600)))
    nasty = str(
        dataset(
            root / "nasty-judged",
            rows(30, text=lambda i, side: list(NASTY.values())[i % len(NASTY)]),
        )
    )
    run(
        "check-consistency",
        input=judged,
        output_dir=root / "m1-consistency",
        report=root / "consistency.html",
    )
    run("check-consistency", input=nasty, output_dir=root / "nasty", report=root / "nasty.html")
    run("eval rewards", input=judged, output_dir=root / "m1-heldout", report=root / "rewards.html")
    later = str(dataset(root / "m2-judged", rows(300, seed=1)))
    run("check-consistency", input=later, output_dir=root / "m2-consistency")
    trained(root / "m1", 4)
    trained(root / "m2", 700)
    html.write(root / "train.html", html.training_page(root / "m2"))
    answers = [*NASTY.values(), "short", "a longer answer"]
    for name, other in (("a", "b"), ("a", "c"), ("b", "c")):
        annotations = [
            {
                "instruction": f"q{i}",
                "output_1": answers[i % 8],
                "generator_1": other,
                "output_2": answers[(i + 3) % 8] + " ",
                "generator_2": name,
                "annotator": "x",
                "preference": 1 + (i * 7 % 10) / 9,
                "dataset": f"d{i % 2}",
            }
            for i in range(60)
        ]
        (root / f"{name}{other}.json").write_text(json.dumps(annotations), encoding="utf-8")
    files = [str(root / f"{pair}.json") for pair in ("ab", "ac", "bc")]
    run("eval winrate", annotations=files, output_dir=root / "wins", report=root / "winrate.html")
    run("eval winrate", annotations=files[:1], output_dir=root / "win", report=root / "one.html")
    names = [
        ("eval winrate", "win"),
        ("train", "m1"),
        ("check-consistency", "m1-consistency"),
        ("train", "m2"),
        ("check-consistency", "m2-consistency"),
    ]
    html.write(root / "story.html", html.run_page([(stage, root / name) for stage, name in names]))
    return root


NAMES = ["consistency", "rewards", "nasty", "train", "story", "winrate"]


class Reader(HTMLParser):
    """What a parser sees: tags that were opened, attributes, and the text that is shown."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.shown: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.shown.append(data)


# What a page is


@pytest.mark.parametrize("name", NAMES)
def test_a_page_is_whole_small_and_refers_to_nothing_outside(world: Path, name: str):
    page = (world / f"{name}.html").read_text(encoding="utf-8")
    seen = Reader(page)
    assert len(page.encode()) < html.MAX_BYTES
    assert seen.tags.count("script") == 1
    for attribute, value in seen.attributes:
        assert not attribute.startswith("on")
        if attribute in ("href", "src", "xlink:href"):
            assert value and value.startswith(("#", "data:"))
    assert "nan" not in re.findall(r"<td[^>]*>([^<]*)</td>", page)
    ids = [value for attribute, value in seen.attributes if attribute == "id"]
    assert len(ids) == len(set(ids)), (
        "an id that two pictures share would give one the other's clipping"
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_picture_has_its_numbers_in_a_table_behind_it(world: Path, name: str):
    page = (world / f"{name}.html").read_text(encoding="utf-8")
    figures = re.findall(r"<figure>.*?</figure>", page, re.DOTALL)
    assert len(figures) >= 3
    for figure in figures:
        assert figure.count("<svg") == 1
        numbers = figure[figure.index('<details class="numbers">') :]
        assert numbers.count("<tr>") >= 2, figure[:200]


def test_what_models_wrote_is_text(world: Path):
    page = (world / "nasty.html").read_text(encoding="utf-8")
    seen = Reader(page)
    assert "img" not in seen.tags
    assert NASTY["script"] in seen.shown
    assert NASTY["rtl"] in seen.shown
    assert NASTY["emoji"] in seen.shown
    assert NASTY["braces"] in seen.shown
    assert "before␀after␛[31m\ufffd" in seen.shown
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", page)
    (long,) = {text for text in seen.shown if text.startswith("x" * 1000)}
    assert long == "x" * 12_000 + "\n… 38,000 more characters, left out of this page"


def test_the_same_folders_give_the_same_bytes_and_a_finished_stage_still_writes_its_page(
    world: Path, tmp_path: Path
):
    again = tmp_path / "deep" / "er" / "again.html"
    manifest = run(
        "check-consistency",
        input=str(world / "m1-judged"),
        output_dir=world / "m1-consistency",
        report=again,
    )
    assert manifest["reused"]
    assert again.read_bytes() == (world / "consistency.html").read_bytes()


def test_a_failed_check_leaves_its_page(world: Path, tmp_path: Path):
    page = tmp_path / "page.html"
    command = [
        "check-consistency",
        "-i",
        str(world / "m1-judged"),
        "-o",
        str(tmp_path / "out"),
        "--report",
        str(page),
        "--fail-under",
        "1.0",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "scir_cli", *command], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "below --fail-under" in done.stderr
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_a_report_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    common = {"input": "x", "output_dir": tmp_path / "o"}
    with pytest.raises(ConfigError, match="folder"):
        config.build(settings.CheckConsistencySettings, common, {"report": tmp_path}, where="test")
    monkeypatch.setattr(settings, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'scir-cli\[report\]'"):
        config.build(
            settings.CheckConsistencySettings, common, {"report": "page.html"}, where="test"
        )


def test_pages_of_texts_that_all_are_long_stay_small_and_say_what_was_left_out(tmp_path: Path):
    table = read_dataset(
        dataset(tmp_path / "d", rows(80, text=lambda i, side: f"{i}<\x00" * 20_000))
    )
    shown = html.browser(table, verdicts.from_table(table))
    page = html.render(html.Page("t", "s", [], [], [shown]))
    assert 1_000_000 < len(page.encode()) < html.MAX_BYTES
    assert shown.text.startswith(f"{len(shown.pairs)} of 80 pairs")
    assert 5 < len(shown.pairs) < 60


def test_pairs_to_read_begin_with_the_surest_disagreement_and_hold_the_surest_mistake():
    log_odds = np.array([[3.0, 5.0, -1.0, 2.0, np.nan], [-2.0, -0.5, -1.0, 2.0, 1.0]])
    assert html.surest_disagreement(log_odds).tolist() == [2.0, 0.5, -1.0, -2.0, 0.0]
    # the surest on either side: min(3, 2), min(5, 0.5); where signs are equal the other side has
    # none: min(-1, 1), min(2, -2); one verdict: min(1, 0)
    assert html.pairs_to_read(np.array([2.0, 0.5, -1.0]), np.array([0.0, 0.0, 4.0]), 5)[:3] == [
        0,
        1,
        2,
    ]


def test_labels_that_look_like_mathematics_or_markup_are_drawn_as_they_are():
    names = ["$x_1$", "<b>&", 'a"b', "nul\x00"]
    rates = plots.rates('a "title" <i>', [(name, 0.5, 0.4, 0.6) for name in names], "")
    assert "$x_1$" in rates.svg
    assert "&lt;b&gt;&amp;" in rates.svg
    assert 'aria-label="a &quot;title&quot; &lt;i>"' in rates.svg


# Curves and rates


def test_long_curves_are_means_of_neighbors_and_their_tables_begin_and_end_where_they_do():
    steps = list(range(1, 10_001))
    picture = plots.steps("loss", {"loss": (steps, [float(s) for s in steps])})
    assert "mean over about 34 steps" in picture.caption
    assert (picture.rows[0], picture.rows[-1]) == ((1, 1.0), (10_000, 10_000.0))
    assert len(picture.rows) == plots.TABLE_ROWS
    assert len(picture.svg) < 60_000


def test_small_numbers_on_an_axis_are_written_whole():
    svg = plots.steps("learning_rate", {"learning_rate": ([1, 2, 3], [0.0001, 0.0005, 0.001])}).svg
    assert ">0.0002</text>" in svg
    assert not re.search(r"<[^>]*\d\.\d{3}[^>]*>", svg)  # places are


def test_win_rates_take_the_interval_they_have_or_make_it_from_their_standard_error():
    match = {
        "model": "a",
        "other": "b",
        "win_rate": 0.6,
        "standard_error": 0.05,
        "length_controlled_win_rate": None,
    }
    controlled = {
        "length_controlled_win_rate": 0.5,
        "length_controlled_low": 0.4,
        "length_controlled_high": 0.7,
        "standard_error": None,
    }
    assert html.win_rates({"matches": [match, {**match, **controlled, "other": "c"}]}) == {
        "Win rate": [
            ("a / b", 0.6, pytest.approx(0.502), pytest.approx(0.698)),
            ("a / c", 0.6, None, None),
        ],
        "Length-controlled win rate": [("a / c", 0.5, 0.4, 0.7)],
    }


def test_very_little_data_still_makes_a_page(tmp_path: Path):
    for name, made in (
        ("one", rows(1)),
        ("unlabeled", rows(9, labeled=False)),
        ("judge alone", [{**r, "rewards": r["rewards"][:1]} for r in rows(9)]),
        (
            "no verdict",
            [{**r, "rewards": [{**r["rewards"][0], "log_odds": None}]} for r in rows(3)],
        ),
    ):
        judged = dataset(tmp_path / name, made)
        run(
            "check-consistency",
            input=str(judged),
            output_dir=tmp_path / f"{name}-out",
            report=tmp_path / f"{name}.html",
        )
        assert "Read some pairs" in (tmp_path / f"{name}.html").read_text(encoding="utf-8")
    html.write(tmp_path / "t.html", html.training_page(trained(tmp_path / "t", 1)))
    write_json(
        tmp_path / "t" / "manifest.json",
        {**read_json(tmp_path / "t" / "manifest.json"), "summary": {}},
    )
    (tmp_path / "t" / "metrics.jsonl").unlink()
    html.write(tmp_path / "none.html", html.training_page(tmp_path / "t"))
    assert "optimizer steps" in (tmp_path / "none.html").read_text(encoding="utf-8")


# In a browser


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    browser = Chromium(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.mark.chromium
@pytest.mark.skipif(
    PROGRAM is None, reason="no Chromium on this machine (Debian: apt install chromium)"
)
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_a_browser_loads_nothing_else_reports_no_error_and_shows_every_picture(
    world: Path, chromium: Chromium, width: int, dark: bool
):
    for name in NAMES:
        chromium.look(world / f"{name}.html", width, dark)
        assert chromium.complaints == []
        assert chromium.requests == []
        assert chromium.evaluate("window.broken === undefined")
        assert chromium.evaluate("document.documentElement.scrollWidth <= innerWidth"), (
            f"{name} is wider than {width} pixels"
        )
        sizes = chromium.evaluate(
            "[...document.querySelectorAll('figure svg')].map(e => "
            "[e.getBoundingClientRect().width, e.getBoundingClientRect().height])"
        )
        assert len(sizes) >= 3
        assert all(w > 250 and h > 90 for w, h in sizes)
        paper, ink = (
            chromium.evaluate(f"getComputedStyle(document.body).{p}")
            for p in ("backgroundColor", "color")
        )
        assert (brightness(paper) < brightness(ink)) == dark
        drawn = chromium.evaluate(
            "getComputedStyle(document.querySelector('figure svg text')).fill"
        )
        assert (brightness(drawn) > 128) == dark, "text in a picture follows the page"


@pytest.mark.chromium
@pytest.mark.skipif(
    PROGRAM is None, reason="no Chromium on this machine (Debian: apt install chromium)"
)
@pytest.mark.parametrize("width", [400, 1400])
def test_pairs_are_filtered_by_subset_reward_model_verdict_and_text(
    world: Path, chromium: Chromium, width: int
):
    chromium.look(world / "consistency.html", width)

    def shown(**fields: str) -> list[Any]:
        """The data of the pairs that are shown under these values of the form; else all."""
        sets = "".join(f"f.elements['{name}'].value = {value!r};" for name, value in fields.items())
        pairs: list[Any] = chromium.evaluate(
            "(() => { const f = document.querySelector('form'); f.reset();"
            + sets
            + "f.dispatchEvent(new Event('input'));"
            "return [...document.querySelectorAll('.pair:not([hidden])')].map(p => "
            "[p.dataset.subset, JSON.parse(p.dataset.verdicts), p.textContent]); })()"
        )
        return pairs

    every = shown()
    subsets = {subset for subset, _, _ in every}
    assert len(subsets) > 1
    for subset in subsets:
        expected = [pair for pair in every if pair[0] == subset]
        assert sorted(shown(subset=subset)) == sorted(expected)
    for model, word in (("judge", "wrong"), ("implicit", "first")):
        expected = [p for p in every if any(v[0] == model and word in v for v in p[1])]
        assert 0 < len(expected) < len(every)
        assert sorted(shown(model=model, verdict=word)) == sorted(expected)
    word = every[0][2].split()[0]
    expected = [pair for pair in every if word.lower() in pair[2].lower()]
    assert sorted(shown(text=word.upper())) == sorted(expected)
    assert shown(text="no pair has this text") == []
    assert chromium.evaluate("document.querySelector('form output').textContent").startswith("0 of")
    assert chromium.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert chromium.complaints == []


def brightness(color: str) -> float:
    return sum(int(n) for n in re.findall(r"\d+", color)[:3]) / 3


@pytest.mark.chromium
@pytest.mark.skipif(
    PROGRAM is None, reason="no Chromium on this machine (Debian: apt install chromium)"
)
def test_pairs_are_sorted_and_chosen_and_an_injected_script_would_not_run(
    world: Path, chromium: Chromium
):
    chromium.look(world / "consistency.html", 1400)
    choose = (
        "(() => { const f = document.querySelector('form'); f.elements['%s'].value = '%s'; "
        "f.dispatchEvent(new Event('input')); })()"
    )
    chromium.evaluate(choose % ("order", "mistake"))
    mistakes = chromium.evaluate(
        "[...document.querySelectorAll('.pair')].map(p => Number(p.dataset.mistake))"
    )
    assert mistakes == sorted(mistakes, reverse=True)
    assert mistakes[0] > 0
    chromium.evaluate(choose % ("tag", "flips"))
    assert chromium.evaluate(
        "[...document.querySelectorAll('.pair:not([hidden])')].every(p => "
        "p.dataset.tags.includes('flips'))"
    )
    inject = (
        "(() => { const s = document.createElement('script'); s.textContent = 'window.broken "
        "= 3'; document.body.append(s); })()"
    )
    chromium.evaluate(inject)
    assert chromium.evaluate("window.broken === undefined"), (
        "the page's policy lets no script in but its own"
    )
