"""An OpenAI-compatible endpoint as a backend, against a small server in the test.

Retries, what it may answer, and keys.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from families import FAMILIES
from helpers import run
from transformers import AutoTokenizer

from scir_cli.data import dataset
from scir_cli.errors import ConfigError, EngineError, ModelError

KEY = "sk-very-secret"


class Endpoint(BaseHTTPRequestHandler):
    """Answers a prompt with its last two tokens and the end token, after the faults it was told to
    show.

    Asked for log-probabilities, it gives its `top` ({token: logprob} of a prompt), with names of
    tokens or the ids behind them.
    """

    server: Any

    def do_GET(self) -> None:
        self._say(200, {"data": [{"id": name} for name in self.server.models]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((body, self.headers.get("Authorization")))
        fault = self.server.faults.pop(0) if self.server.faults else None
        if fault == "close":
            self.close_connection = True
        elif fault == "cut":  # ends in the middle of what it promised
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(b'{"choices"')
            self.close_connection = True
        elif fault is not None:
            self._say(*fault)
        elif "logprobs" in body:
            self._say(
                200,
                {"choices": [{"text": "?", "logprobs": {"top_logprobs": [self.server.top(body)]}}]},
            )
        else:
            self._say(
                200,
                {
                    "choices": [{"text": "?", "token_ids": self.server.answer(body)}],
                    **self.server.more,
                },
            )

    def _say(self, status: int, value: Any) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with ThreadingHTTPServer(("127.0.0.1", 0), Endpoint) as server:
        server.faults, server.seen, server.models, server.more = [], [], ["m"], {}  # type: ignore[attr-defined]
        server.answer = lambda body: [*body["prompt"][-2:], 2]  # type: ignore[attr-defined]
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def generate(endpoint: Any, tiny_llama: Path, tmp_path: Path) -> Any:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps({"prompt": f"Say {w}."}) + "\n" for w in ("cat", "dog")),
        encoding="utf-8",
    )
    common = {
        "model": str(tiny_llama),
        "input": str(prompts),
        "n": 2,
        "max_new_tokens": 6,
        "backend": "openai",
        "batch_size": 1,
    }
    url = f"http://127.0.0.1:{endpoint.server_port}/v1"
    return lambda **values: run(
        "generate", **{**common, "base_url": url, "output_dir": tmp_path / "out", **values}
    )


def test_an_endpoint_receives_and_returns_token_ids_with_one_seed_per_row(
    endpoint: Any, generate: Any, tmp_path: Path
):
    manifest = generate()
    assert manifest["rows_out"] == 4
    assert manifest["work"]["tokens_read"] == sum(len(body["prompt"]) for body, _ in endpoint.seen)
    assert manifest["work"]["tokens_sampled"] == 4 * 3
    rows = dataset.read_dataset(tmp_path / "out").to_pylist()
    for row, (body, key) in zip(rows, endpoint.seen, strict=True):
        assert row["token_ids"] == [*body["prompt"][-2:], 2]
        assert (body["seed"], row["finish_reason"], key) == (row["seed"], "stop", f"Bearer {KEY}")
    assert (
        KEY
        not in (tmp_path / "out" / "plan.json").read_text()
        + (tmp_path / "out" / "manifest.json").read_text()
    )


def test_an_answer_without_an_end_token_was_cut_and_is_counted(
    endpoint: Any, generate: Any, tmp_path: Path
):
    answers = iter([[5, 6, 2], [5] * 6, [7] * 6, [6, 2]])
    endpoint.answer = lambda body: next(answers)
    manifest = generate()
    reasons = dataset.read_dataset(tmp_path / "out")["finish_reason"].to_pylist()
    assert reasons == ["stop", "length", "length", "stop"]
    assert manifest["summary"] == {"cut": 2, "without_answer": 0}


def test_cached_tokens_are_counted_if_the_endpoint_reports_them(
    endpoint: Any, generate: Any, tmp_path: Path
):
    for n, (usage, rate) in enumerate(
        [
            ({"prompt_tokens_details": {"cached_tokens": 3}}, True),
            ({"prompt_tokens_details": None}, False),
        ]
    ):
        endpoint.more = {"usage": usage}
        work = generate(output_dir=tmp_path / str(n))["work"]
        assert work["prefix_cache_hit_rate"] == (
            pytest.approx(4 * 3 / work["tokens_read"], abs=1e-4) if rate else None
        )


@pytest.mark.parametrize("fault", [(500, {}), (429, {}), "close", "cut"], ids=str)
def test_what_passes_is_tried_again_and_no_row_is_lost_or_there_twice(
    endpoint: Any, generate: Any, tmp_path: Path, fault: Any
):
    endpoint.faults += [fault, fault]
    assert generate()["rows_out"] == 4
    assert len(endpoint.seen) == 6
    assert (
        len({row["candidate_id"] for row in dataset.read_dataset(tmp_path / "out").to_pylist()})
        == 4
    )


@pytest.mark.parametrize(
    ("faults", "expected"),
    [
        ([(500, {"error": "overloaded"})] * 2, "status 500.*overloaded"),
        (["close"] * 2, "cannot be reached"),
        ([(200, b"<html>")], "not JSON"),
        ([(200, {"choices": [{"text": "hello"}]})], "no token ids"),
        ([(200, {"nonsense": 1})], "no token ids"),
        (
            [(200, {"choices": [{"text": "?", "token_ids": [5, 123456]}]})],
            "returned token id 123456, outside the vocabulary",
        ),
        (
            [(400, {"error": "maximum context length is 64 tokens"})],
            "status 400.*maximum context length is 64",
        ),
        ([(401, {"error": "bad key"})], "rejected the key"),
        ([(404, {"detail": "Not Found"})], "status 404.*end of --base-url, which is usually /v1"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_does_not_pass_is_one_line_without_the_key(
    endpoint: Any, generate: Any, faults: Any, expected: str
):
    endpoint.faults += faults
    with pytest.raises(EngineError, match=expected) as caught:
        generate(endpoint_arg=["retries=1"])
    assert KEY not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def judge(endpoint: Any, tiny_llama: Path, tmp_path: Path) -> Any:
    pairs = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"Say {w}.", "chosen": f"The {w}.", "rejected": "No."}
        for w in ("cat", "dog", "sun")
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    common = {
        "model": str(tiny_llama),
        "input": str(pairs),
        "reward_models": ["judge"],
        "rationale_batch_size": 1,
    }
    url = f"http://127.0.0.1:{endpoint.server_port}/v1"

    def judged(**values: Any) -> Any:
        out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        manifest = run(
            "judge", **{**common, "backend": "openai", "base_url": url, "output_dir": out, **values}
        )
        return manifest, [row["rewards"] for row in dataset.read_dataset(out).to_pylist()]

    return judged


def test_verdicts_are_read_by_id_or_by_a_text_that_no_other_token_has(endpoint: Any, judge: Any):
    """Whatever the rank where the endpoint knows ids.

    The log-probabilities are made up, and both orders get the same.
    """

    def by_id(body: Any) -> Any:
        a, b = body["logprob_token_ids"]
        return {f"token_id:{a}": -1.0, f"token_id:{b}": -3.0}

    for endpoint.top in (by_id, lambda body: {"A": -1.0, "B": -3.0, "the": -0.5}):
        manifest, rows = judge()
        assert "beyond_top_logprobs" not in manifest["summary"]
        for (reward,) in rows:
            assert (reward["forward_log_odds"], reward["log_odds"]) == (2.0, 0.0)
            assert reward["verdict_mass"] == pytest.approx(0.3679 + 0.0498, abs=1e-4)  # e^-1 + e^-3
    prompts = {tuple(body["prompt"]) for body, _ in endpoint.seen}
    assert len(endpoint.seen) == 2 * len(prompts) == 12, (
        "each order of each pair is asked once for both verdicts"
    )


def test_a_verdict_beyond_the_likeliest_tokens_is_null_its_mass_unknown_and_both_are_counted(
    endpoint: Any, judge: Any
):
    answers = iter(
        [{"A": -1.0, "B": -3.0}] * 2
        + [{"A": -1.0, "B": -3.0}, {"A": -0.1, "no": -4.0}]
        + [{"A": -1.0, "B": -3.0}] * 2
    )
    endpoint.top = lambda body: next(answers)
    manifest, rows = judge()
    assert manifest["nulls"]["rewards.judge"] == 1
    assert manifest["summary"]["beyond_top_logprobs"] == {"judge": 1}
    assert [reward["log_odds"] for (reward,) in rows] == [0.0, None, 0.0]
    assert (
        rows[1][0]["forward_log_odds"],
        rows[1][0]["swapped_log_odds"],
        rows[1][0]["verdict_mass"],
    ) == (2.0, None, None)
    with pytest.raises(EngineError, match="returned no log-probabilities"):
        endpoint.faults += [(200, {"choices": [{"text": "A", "logprobs": None}]})] * 2
        judge(endpoint_arg=["retries=0"])


def test_a_verdict_of_several_tokens_is_an_error_before_any_request(endpoint: Any, judge: Any):
    with pytest.raises(ModelError, match="'Zq' is 2 tokens .* must be one"):
        judge(verdict_tokens=["Zq", "B"])
    assert endpoint.seen == []


@pytest.mark.parametrize("backend", ["openai", "transformers"])
def test_a_row_that_cannot_be_answered_is_dropped_by_reason_and_the_others_are_answered(
    endpoint: Any, generate: Any, judge: Any, tmp_path: Path, backend: str
):
    newlines = "\n" * 100_000
    prompts = tmp_path / "bad.jsonl"
    bad = ["", " \n ", newlines, f"Say{newlines}cat.", "word " * 2000]
    prompts.write_text(
        "".join(json.dumps({"prompt": p}) + "\n" for p in [*bad, "Say cat."]), encoding="utf-8"
    )
    manifest = generate(input=str(prompts), backend=backend, output_dir=tmp_path / "g")
    assert (manifest["rows_out"], manifest["drops"]) == (
        2,
        {"empty_prompt": 6, "prompt_too_long": 4},
    )  # two samples each
    pairs = tmp_path / "bad-pairs.jsonl"
    chosen = [newlines, f"A{newlines}cat.", "word " * 2000, "A cat."]
    pairs.write_text(
        "".join(
            json.dumps({"prompt": "Hi.", "chosen": c, "rejected": "No."}) + "\n" for c in chosen
        ),
        encoding="utf-8",
    )
    endpoint.top = lambda body: {"A": -1.0, "B": -3.0}
    manifest, rows = judge(input=str(pairs), backend=backend)
    assert (len(rows), manifest["drops"]) == (1, {"empty_response": 1, "too_long": 2})


def test_the_url_and_the_model_are_required(endpoint: Any, generate: Any):
    for url, said in ((None, "not given"), ("localhost:8000", "localhost:8000")):
        with pytest.raises(
            ConfigError, match=f"--base-url, as http://localhost:8000/v1; it is {said}$"
        ):
            generate(base_url=url)
    endpoint.models += ["n"]
    with pytest.raises(ConfigError, match="serves m, n; choose one with --endpoint-arg model=NAME"):
        generate()
    assert generate(endpoint_arg=["model=n"])["rows_out"] == 4


def test_verdicts_after_an_empty_think_block_are_asked_for_behind_it(
    endpoint: Any, judge: Any, tiny_llama: Path, tmp_path: Path
):
    folder = tmp_path / "thinking"
    shutil.copytree(tiny_llama, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = FAMILIES["reasons"].template
    tokenizer.save_pretrained(folder)
    endpoint.top = lambda body: {f"token_id:{token}": -1.0 for token in body["logprob_token_ids"]}
    manifest, rows = judge(model=str(folder), reward_models=["judge", "rubric"])
    assert "beyond_top_logprobs" not in manifest["summary"]
    assert {body["max_tokens"] for body, _ in endpoint.seen} == {1}
    for body, _ in endpoint.seen:
        assert tokenizer.decode(body["prompt"]).endswith("assistant\n<think>\n\n</think>\n\n")
        asked = [tokenizer.decode([token]) for token in body["logprob_token_ids"]]
        assert sorted(asked) in (["A", "B"], ["0", "1", "2", "3", "4", "5"])
    for judged, rubric in rows:
        assert judged["verdict_mass"] == pytest.approx(2 * 0.367879, abs=1e-4)
        assert rubric["verdict_mass"] == pytest.approx(6 * 0.367879, abs=1e-4)
