"""vLLM beside transformers, for real (`make test-vllm`).

The same greedy tokens, the same distribution, the same verdicts, one line when it fails.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import torch
from helpers import run
from toy import BOS, make_adapter, make_model

from scir_cli import config
from scir_cli.backends import Request, Sampling
from scir_cli.backends.transformers import TransformersBackend
from scir_cli.backends.vllm import VllmBackend
from scir_cli.data import dataset
from scir_cli.engine.lazy_policy import LazyPolicy
from scir_cli.errors import EngineError
from scir_cli.settings import BackendSettings

pytestmark = pytest.mark.vllm

SHAPE = {"hidden_size": 128}  # heads of 32: vLLM's CPU attention has none smaller
EAGER = "enforce_eager=true"  # compiling takes a minute


@pytest.fixture(scope="module", autouse=True)
def _little_memory() -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # GB
    yield
    patch.undo()


def opened_policy(folder: Path, **values: Any) -> LazyPolicy:
    given = {
        "model": str(folder),
        "output_dir": "unused",
        "dtype": "fp32",
        "device": "cpu",
        "vllm_arg": [EAGER],
        **values,
    }
    return LazyPolicy(config.build(BackendSettings, given, where="test"), str(folder))


def opened(folder: Path, out: Path, **values: Any) -> tuple[LazyPolicy, VllmBackend]:
    out.mkdir(exist_ok=True)
    model = opened_policy(folder, output_dir=out, **values)
    return model, VllmBackend(model, Sampling(0.0, 1.0, 16, 8), model.settings)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LazyPolicy, VllmBackend]]:
    root = tmp_path_factory.mktemp("vllm")
    model, backend = opened(make(root / "model", bos=True), root / "out")
    yield model, backend
    backend.close()
    assert backend.child.exitcode == 0


def make(folder: Path, **values: Any) -> Path:
    """A tiny model with four end tokens, so that some greedy answers stop and some do not."""
    make_model(folder, seed=2, **SHAPE, **values)
    (folder / "generation_config.json").write_text(
        '{"eos_token_id": [2, 27, 86, 157]}', encoding="utf-8"
    )
    return folder


def questions(model: LazyPolicy, n: int = 12) -> list[Request]:
    words = ["cat", "dog", "sun", "sea", "map", "key"]
    asked = [f"Tell me of the {words[i % 6]} and of number {i}." for i in range(n)]
    return [
        Request(tuple(model.chat.prompt_ids([{"role": "user", "content": text}])), i)
        for i, text in enumerate(asked)
    ]


def assert_same_greedy_tokens(model: LazyPolicy, backend: VllmBackend) -> None:
    backend.sampling = Sampling(0.0, 1.0, 40, 8)
    ours = TransformersBackend(model, backend.sampling).generate(questions(model))
    assert backend.generate(questions(model)) == ours
    assert {answer.finish_reason for answer in ours} == {"stop", "length"}, (
        "the test should see both"
    )


def test_greedy_tokens_and_finish_reasons_are_those_of_transformers_and_bos_is_there_once(
    both: tuple[LazyPolicy, VllmBackend],
):
    """The template writes BOS and the tokenizer would add another.

    Equal tokens say that both have read the same ids. vLLM's own server, below, has a template
    without.
    """
    model, backend = both
    bos = model.chat.tokenizer.convert_tokens_to_ids(BOS)
    assert all(r.prompt_ids.count(bos) == 1 for r in questions(model))
    assert model.chat.tokenizer("x")["input_ids"].count(bos) == 1
    assert_same_greedy_tokens(model, backend)


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """p-value of counts under probabilities.

    Classes expected fewer than 5 times are one class.  both: (classes,)
    """
    n = counts.sum()
    common = probabilities * n >= 5
    seen, expected = (
        torch.cat([v[common], v[~common].sum()[None]])
        for v in (counts.double(), (probabilities * n).double())
    )
    seen, expected = seen[expected > 0], expected[expected > 0]
    statistic = ((seen - expected) ** 2 / expected).sum()
    return float(
        torch.special.gammaincc(
            torch.tensor((len(seen) - 1) / 2, dtype=torch.double), statistic / 2
        )
    )


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_samples_of_both_backends_follow_the_models_distribution(
    both: tuple[LazyPolicy, VllmBackend], top_p: float
):
    """The first token of 2,000 samples over 400 classes, against the softmax at temperature 1.5,
    cut to its nucleus.
    """
    model, backend = both
    backend.sampling = Sampling(1.5, top_p, 1, 500)
    prompt = questions(model, 1)[0].prompt_ids
    with torch.no_grad(), model.load().plain_attention_mode():
        full = (model.load().model(torch.tensor([prompt])).logits[0, -1].float() / 1.5).softmax(-1)
    ranked, order = full.sort(descending=True)
    nucleus = torch.zeros_like(full).scatter(
        0, order, torch.where(ranked.cumsum(0) - ranked < top_p, ranked, 0.0)
    )
    requests = [Request(prompt, seed) for seed in range(2000)]
    for one in (backend, TransformersBackend(model, backend.sampling)):
        drawn = torch.tensor([answer.token_ids[0] for answer in one.generate(requests)])
        counts = torch.bincount(drawn, minlength=len(full))
        assert not counts[nucleus == 0].any(), "a token outside the nucleus"
        assert chi_square(counts, nucleus / nucleus.sum()) > 1e-3


def test_a_seed_gives_its_sample_again_beside_other_requests(both: tuple[LazyPolicy, VllmBackend]):
    model, backend = both
    backend.sampling = Sampling(1.0, 0.95, 8, 8)
    requests = questions(model)
    assert backend.generate(requests)[3:5] == backend.generate(requests[3:5])
    other = [Request(r.prompt_ids, r.seed + 1) for r in requests]
    assert backend.generate(requests) != backend.generate(other)


def test_verdicts_are_those_of_the_engine_whatever_their_rank(tmp_path: Path):
    for name, seed in (("policy", 2), ("base", 1)):
        make_model(tmp_path / name, seed=seed, **SHAPE)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "".join(f'{{"prompt": "Tell me of the {w}."}}\n' for w in ("cat", "dog", "sun")),
        encoding="utf-8",
    )
    common = {"model": str(tmp_path / "policy"), "reward_reference": str(tmp_path / "base")}
    run(
        "generate",
        model=common["model"],
        input=str(prompts),
        n=3,
        max_new_tokens=6,
        output_dir=tmp_path / "c",
    )
    names = ["judge", "implicit", "rubric", "rationale"]
    rows, work = {}, {}
    for backend in ("vllm", "transformers"):
        more = {"vllm_arg": [EAGER, "block_size=32"], "workers": 2} if backend == "vllm" else {}
        manifest = run(
            "judge",
            **common,
            **more,
            input=str(tmp_path / "c"),
            reward_models=names,
            rationale_max_tokens=8,
            backend=backend,
            rows_per_part=3,
            output_dir=tmp_path / backend,
        )
        rows[backend] = dataset.read_dataset(tmp_path / backend).to_pylist()
        work[backend] = manifest["work"]
    assert (
        work["vllm"]["prefix_cache_hit_rate"] > 0.1
        and work["transformers"]["prefix_cache_hit_rate"] is None
    )
    assert len(rows["vllm"]) == len(rows["transformers"]) > 5
    for ours, theirs in zip(rows["vllm"], rows["transformers"], strict=True):
        for a, b in zip(ours["reference_logps"], theirs["reference_logps"], strict=True):
            assert (a["first"], a["second"]) == pytest.approx(
                (b["first"], b["second"]), abs=1e-4
            )  # both by the engine, in other packs
        for a, b in zip(ours["rewards"], theirs["rewards"], strict=True):
            assert a["log_odds"] == pytest.approx(b["log_odds"], abs=1e-3)
            assert a["verdict_mass"] == (
                None if b["verdict_mass"] is None else pytest.approx(b["verdict_mass"], rel=1e-3)
            )
    masses = [
        r["verdict_mass"]
        for row in rows["vllm"]
        for r in row["rewards"]
        if r["reward_model"] == "judge"
    ]
    assert max(masses) < 0.1, (
        "the verdicts should be unlikely tokens here, or their rank is not tested"
    )


def test_an_adapter_is_added_by_vllm_and_merged_by_the_engine_and_a_killed_engine_is_one_line(
    tmp_path: Path,
):
    base = make(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    model, backend = opened(adapter, tmp_path / "out")
    assert_same_greedy_tokens(model, backend)
    os.kill(backend.child.pid, signal.SIGKILL)
    with pytest.raises(EngineError, match=f"ended with status -{signal.SIGKILL.value}; its log is"):
        backend.generate(questions(model))
    plain = TransformersBackend(opened_policy(base), Sampling(0.0, 1.0, 40, 8)).generate(
        questions(model)
    )
    assert (
        TransformersBackend(model, Sampling(0.0, 1.0, 40, 8)).generate(questions(model)) != plain
    ), "the adapter should matter"


def named_vllm(folder: Path) -> dict[str, str]:
    """An environment for the command `vllm`, which asks what version the package vllm has and fails
    where its name is vllm-cpu.
    """
    try:
        metadata.version("vllm")
        return dict(os.environ)
    except metadata.PackageNotFoundError:
        name = folder / f"vllm-{metadata.version('vllm-cpu')}+cpu.dist-info"
        name.mkdir()
        (name / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: vllm\nVersion: {metadata.version('vllm-cpu')}+cpu\n"
        )
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(
                filter(None, [str(folder), os.environ.get("PYTHONPATH")])
            ),
        }


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A model's folder, and the URL at which vLLM's own server has it."""
    root = tmp_path_factory.mktemp("served")
    folder = make(root / "model")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [
        str(Path(sys.executable).with_name("vllm")),
        "serve",
        str(folder),
        "--dtype",
        "float32",
        "--enforce-eager",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--no-enable-chunked-prefill",
        "--block-size",
        "32",
        "--enable-prompt-tokens-details",
    ]
    with (
        (root / "log").open("w") as log,
        subprocess.Popen(command, stdout=log, stderr=log, env=named_vllm(root)) as server,
    ):
        try:
            wait_until_healthy(f"http://127.0.0.1:{port}/health", server, root / "log")
            yield folder, f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()


def wait_until_healthy(url: str, server: Any, log: Path) -> None:
    until = time.monotonic() + 300
    while True:
        try:
            urlopen(url, timeout=10).close()
            return
        except OSError:
            assert server.poll() is None and time.monotonic() < until, log.read_text()[-2000:]
            time.sleep(0.2)


def test_vllms_own_server_gives_the_tokens_and_verdicts_of_the_engine(
    served: tuple[Path, str], tmp_path: Path
):
    folder, url = served
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "".join(f'{{"prompt": "Tell me of the {w}."}}\n' for w in ("cat", "dog", "sun")),
        encoding="utf-8",
    )
    model = {"model": str(folder)}
    at_it = {"backend": "openai", "base_url": url}
    rows: dict[str, Any] = {}
    for name, values in (("served", at_it), ("engine", {})):
        run(
            "generate",
            **model,
            **values,
            input=str(prompts),
            n=1,
            temperature=0,
            max_new_tokens=8,
            output_dir=tmp_path / f"g-{name}",
        )
        rows[name] = [
            row["token_ids"] for row in dataset.read_dataset(tmp_path / f"g-{name}").to_pylist()
        ]
    assert rows["served"] == rows["engine"]
    run(
        "generate",
        **model,
        input=str(prompts),
        n=3,
        temperature=1.0,
        max_new_tokens=6,
        output_dir=tmp_path / "c",
    )
    for name, values in (("served", at_it), ("engine", {})):
        work = run(
            "judge",
            **model,
            **values,
            input=str(tmp_path / "c"),
            reward_models=["judge", "rubric"],
            output_dir=tmp_path / name,
        )["work"]
        assert (
            (work["prefix_cache_hit_rate"] or 0) > 0.1
            if name == "served"
            else work["prefix_cache_hit_rate"] is None
        )
        rows[name] = [
            r for row in dataset.read_dataset(tmp_path / name).to_pylist() for r in row["rewards"]
        ]
    for ours, theirs in zip(rows["served"], rows["engine"], strict=True):
        assert ours["log_odds"] == pytest.approx(theirs["log_odds"], abs=1e-3)
        assert ours["verdict_mass"] == (
            None
            if theirs["verdict_mass"] is None
            else pytest.approx(theirs["verdict_mass"], rel=1e-3)
        )
    assert max(r["verdict_mass"] for r in rows["served"] if r["reward_model"] == "judge") < 0.1, (
        "no unlikely verdict was tested"
    )


class Dies(VllmBackend):
    """In one run.

    The first engine that is asked is killed, then the first worker that has another one.
    """

    def __init__(self, model: Any, sampling: Any, settings: Any) -> None:
        super().__init__(model, sampling, settings)
        self.folder = Path(settings.output_dir)
        (self.folder / f"engine-{self.child.pid}").touch()

    def generate(self, requests: Any) -> Any:
        for name, number in (("killed-engine", self.child.pid), ("killed-worker", os.getpid())):
            with contextlib.suppress(FileExistsError):
                (self.folder / name).touch(exist_ok=False)
                os.kill(number, signal.SIGKILL)
                break
        return super().generate(requests)


@pytest.mark.soak
def test_two_workers_give_the_tokens_of_one_process_though_an_engine_and_a_worker_are_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
    model = {"model": str(make(tmp_path / "model")), "dtype": "fp32", "device": "cpu"}
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "".join(f'{{"prompt": "Tell me of number {i}."}}\n' for i in range(12)), encoding="utf-8"
    )
    rows = {}
    for name, values in (
        ("one", {}),
        ("two", {"backend": "test_vllm:Dies", "workers": 2, "vllm_arg": [EAGER]}),
    ):
        run(
            "generate",
            **model,
            **values,
            input=str(prompts),
            n=1,
            temperature=0,
            max_new_tokens=8,
            rows_per_part=1,
            output_dir=tmp_path / name,
        )
        rows[name] = (
            dataset.read_dataset(tmp_path / name).drop_columns(["candidate_id"]).to_pylist()
        )
    assert rows["two"] == rows["one"]
    engines = [int(path.name.partition("-")[2]) for path in (tmp_path / "two").glob("engine-*")]
    assert len(engines) >= 3, "each that was killed has a successor"
    wait_until_gone(*engines)


def wait_until_gone(*numbers: int) -> None:
    until = time.monotonic() + 20
    while left := [number for number in numbers if Path(f"/proc/{number}").exists()]:
        assert time.monotonic() < until, f"engines that outlived their drivers: {left}"
        time.sleep(0.05)


def test_what_vllm_refuses_is_one_line_and_its_log_is_named(tmp_path: Path):
    folder = make_model(tmp_path / "model", **SHAPE)
    with pytest.raises(
        EngineError, match=r"vLLM failed: .*no_such_argument.*; its log is .*vllm\.log$"
    ):
        opened(folder, tmp_path / "out", vllm_arg=["no_such_argument=1"])
    assert "Traceback" in (tmp_path / "out" / "vllm.log").read_text()


def test_too_little_memory_is_one_line(tmp_path: Path):
    folder = make_model(tmp_path / "model", **SHAPE)
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(
            EngineError, match=r"vLLM failed: Available memory .*1000\.0 GiB.*vllm\.log$"
        ),
    ):
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1000")  # GB; on a GPU it is gpu_memory_utilization
        opened(folder, tmp_path / "out")


def test_a_killed_driver_leaves_no_engine(tmp_path: Path):
    folder = make_model(tmp_path / "model", **SHAPE)
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys, time; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path\nfrom test_vllm import opened\n"
        "if __name__ == '__main__':\n"
        f"    print(opened(Path({str(folder)!r}), "
        f"Path({str(tmp_path / 'out')!r}))[1].child.pid, flush=True)\n"
        "    time.sleep(600)\n",
        encoding="utf-8",
    )
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True
    ) as driver:
        assert driver.stdout is not None
        child = int(driver.stdout.readline())
        driver.kill()
    wait_until_gone(child)
