"""Every setting of every stage: default, help text, group and roles, declared once.

The help texts are read at 80 columns. docs/method.md has the reasons for the defaults of training.
"""

from __future__ import annotations

import math
import os
import re
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path, PurePath
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    field_validator,
    model_validator,
)

from scir_cli import config, plugins
from scir_cli.config import (
    AGREEMENT,
    CONSISTENCY,
    INPUT_OUTPUT,
    LABELS,
    LOGGING,
    MEMORY,
    MODEL,
    OPTIMIZER,
    PREFERENCE_LOSS,
    RARE,
    REWARDS,
    SAMPLING,
    SELECTION,
    WORKERS,
    Settings,
)
from scir_cli.data.storage import is_remote, real_path, to_path
from scir_cli.errors import install_hint, suggest

REWARD_MODELS = ("judge", "implicit", "rubric", "rationale", "likelihood", "pmi", "external")


def _reward_model(name: str) -> str:
    """The name of a built-in reward model, or "module:Class", which is not imported here.

    Raises ValueError for other names.
    """
    if name not in REWARD_MODELS and not plugins.is_target(name):
        raise ValueError(
            f"no such reward model.{suggest(name, REWARD_MODELS)} "
            "Write a class of your own as my_package.my_module:Class"
        )
    return name


RewardModelName = Annotated[str, AfterValidator(_reward_model)]

#: Default factor on the implicit reward's log-odds when judging [ours]: it gives them the judge's
#: order of magnitude.
IMPLICIT_SCALE = 5.0

#: The bound of counts that have none of their own
MOST_COUNT = 1_000_000_000

MOST_WORKERS = 1024

#: The bound of factors and weights
LARGEST_FACTOR = 1e6

# A setting has its upper bound beside its default: one in the type would replace it.
Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(ge=0, le=1)]


def _workers(value: Any) -> int | str:
    """The value of --workers, "auto" or a number; raises ValueError for other values."""
    if value == "auto":
        return "auto"
    text = str(value)
    is_count = not isinstance(value, bool) and re.fullmatch("[0-9]{1,4}", text)
    if not is_count or not 1 <= int(text) <= MOST_WORKERS:
        raise ValueError(f"expected a number from 1 to {MOST_WORKERS}, or auto")
    return int(text)


def _scale(value: Any) -> float | str:
    """The value of train's --implicit-scale; raises ValueError unless above 0, or "fitted"."""
    if value == "fitted":
        return "fitted"

    number = float("nan")
    if not isinstance(value, bool):
        with suppress(TypeError, ValueError):
            number = float(value)
    if not 0 < number <= LARGEST_FACTOR:
        raise ValueError(f"expected a number above 0, at most {LARGEST_FACTOR:g}, or fitted")
    return number


FittedOrNumber = Annotated[float | Literal["fitted"], PlainValidator(_scale)]


def _folder(value: Any) -> Any:
    """The path or URL of an output folder; raises ValueError if it is no text."""
    if not isinstance(value, str | PurePath) and not hasattr(value, "fs"):
        raise ValueError("expected a folder")
    return to_path(value)


class StageSettings(Settings):
    """Settings of every stage."""

    output_dir: Annotated[Path, PlainValidator(_folder)] = config.setting(
        ...,
        "Output folder; for a dataset also a URL (s3://…). "
        "Run the same command again to continue an interrupted run.",
        group=INPUT_OUTPUT,
        affects_output=False,
    )
    seed: int = config.setting(
        0, "Seed of all random choices.", group=INPUT_OUTPUT, ge=0, le=2**32 - 1
    )
    limit: Positive | None = config.setting(
        None, "Use only the first N rows of the input.", group=RARE, le=MOST_COUNT
    )
    overwrite: bool = config.setting(
        False,
        "Delete the content of the output folder first.",
        group=INPUT_OUTPUT,
        affects_output=False,
    )
    dry_run: bool = config.setting(
        False,
        "Check settings and inputs, print what the command would do, and write nothing.",
        group=INPUT_OUTPUT,
        affects_output=False,
    )


#: A variable of a chat template, and the texts that are no text there
TemplateValue = bool | int | float | str | None
CONSTANTS: dict[str, bool | None] = {"true": True, "false": False, "null": None, "none": None}

#: Names that transformers' apply_chat_template uses itself
TEMPLATE_INPUTS = frozenset(
    [
        "conversation",
        "conversations",
        "messages",
        "tools",
        "documents",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "sanitize_control_tokens",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
    ]
)


class ReportSettings(StageSettings):
    """Settings of a stage that can also write an HTML page."""

    report: Path | None = config.setting(
        None,
        "Also write the results to this file, as one self-contained HTML page.",
        group=INPUT_OUTPUT,
        affects_output=False,
    )

    @field_validator("report")
    @classmethod
    def _can_be_written(cls, value: Path | None) -> Path | None:
        if value and (problem := report_problem(value)):
            raise ValueError(problem)
        return value

    @model_validator(mode="after")
    def _report_is_beside_the_output(self) -> ReportSettings:
        if self.report is None or is_remote(self.output_dir):
            return self
        report = real_path(self.report)
        out = real_path(self.output_dir)
        if report == out or report in out.parents:
            raise ValueError(f"report {self.report} is or holds output_dir {self.output_dir}")
        return self


#: The line of a page's head by which a later run recognizes it, and the bytes that are searched
PAGE_MARK = b'<meta name="generator" content="scir">'
MARK_WITHIN = 1024


def report_problem(path: Path) -> str | None:
    """Why an HTML page cannot be written to `path`; None if it can.

    It is checked before the work, so that no result is lost.
    """
    if find_spec("matplotlib") is None:
        return f"an HTML page needs the package matplotlib: {install_hint('report')}"
    try:
        return _place_problem(path)
    except OSError as error:
        return f"it cannot be written: {error.strerror}"


def _place_problem(path: Path) -> str | None:
    """Why `path` is no place for a page: it is taken, has another ending, or lies in a file."""
    if path.is_dir():
        return "this is a folder; expected the name of a file, for example results.html"
    # No input and no file of an output folder has this ending.
    if path.suffix.lower() not in (".html", ".htm"):
        return "expected the name of an HTML file, for example results.html"
    if os.path.lexists(path) and not _is_page(path):
        return "a file is there that is no page of scir; choose another name"
    parent = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not parent.is_dir():
        return f"{parent} is a file; choose another folder"
    if not os.access(parent, os.W_OK):
        return f"{parent} cannot be written; choose another folder"
    return None


def _is_page(path: Path) -> bool:
    """Whether `path` is a file that --report wrote."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return PAGE_MARK in file.read(MARK_WITHIN)


class ModelSettings(StageSettings):
    """Settings of a stage that loads a model."""

    model: str = config.setting(
        ...,
        "Model: a folder, a hub id, or package:NAME (a GGUF file in a pip package). 'A | B' "
        "uses B if A is not available.",
        group=INPUT_OUTPUT,
        path=True,
        affects_output=False,
    )
    dtype: Literal["auto", "bf16", "fp32"] = config.setting(
        "auto",
        "Precision of weights and activations; auto is bf16 if the hardware supports it.",
        group=MODEL,
    )
    quantization: Literal["none", "4bit"] = config.setting(
        "none",
        "Store the weights in 4 bits (NF4, bitsandbytes). Training then requires --lora-rank "
        "(QLoRA).",
        group=MODEL,
    )
    device: str = config.setting(
        "auto", "Device: auto, cpu, cuda, cuda:1, …", group=MODEL, affects_output=False
    )
    trust_remote_code: bool = config.setting(
        False,
        "Run Python code from the model folder. Only for folders that you trust.",
        group=RARE,
        affects_output=False,
    )
    chat_template: Path | None = config.setting(
        None, "Jinja file that replaces the model's chat template.", group=RARE, path=True
    )
    chat_template_kwargs: dict[str, TemplateValue] | None = config.setting(
        None,
        "Variables for the chat template, as enable_thinking=false (separated by commas).",
        group=RARE,
    )
    max_tokens_per_pack: Positive = config.setting(
        16384,
        "Maximum number of tokens per forward pass; sequences are packed without padding.",
        group=MODEL,
        affects_output=False,
        le=MOST_COUNT,
    )

    @field_validator("chat_template_kwargs", mode="before")
    @classmethod
    def _template_kwargs(cls, value: Any) -> Any:
        return template_kwargs(value)

    def plan(self) -> dict[str, Any]:
        """As of all settings; without chat_template_kwargs if it is not set."""
        plan = super().plan()
        if not self.chat_template_kwargs:
            plan.pop("chat_template_kwargs", None)
        return plan


class SplitSettings(ModelSettings):
    """Settings of a stage that separates answers from their reasoning."""

    think_end: str | None = config.setting(
        None,
        "Text after which an answer's reasoning is over, as </think>. Default: as the chat "
        "template or the tokenizer has it. Judges read what follows.",
        group=RARE,
    )

    @field_validator("think_end")
    @classmethod
    def _think_end_is_visible(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError("expected the text that ends the reasoning, as </think>")
        return value

    def plan(self) -> dict[str, Any]:
        """As of all settings; without think_end if it is not set."""
        plan = super().plan()
        if self.think_end is None:
            plan.pop("think_end", None)
        return plan


def template_kwargs(value: Any) -> Any:
    """The mapping of NAME=VALUE words, with the types of JSON's constants and numbers.

    value: words in a list or separated by commas; a mapping is returned as it is.
    Raises ValueError for a word that is no NAME=VALUE, and for a name that is not free.
    """
    if isinstance(value, str):
        value = [word.strip() for word in value.split(",") if word.strip()]
    if isinstance(value, list):
        parsed = {}
        for word in value:
            name, equals, text = str(word).partition("=")
            if not (name.strip() and equals):
                raise ValueError(f"expected NAME=VALUE, as enable_thinking=false; got {word!r}")
            parsed[name.strip()] = _typed(text.strip())
        value = parsed
    taken = sorted(TEMPLATE_INPUTS.intersection(value)) if isinstance(value, dict) else []
    if taken:
        raise ValueError(f"'{taken[0]}' is no variable of the template alone, and cannot be set")
    return value


def _typed(text: str) -> TemplateValue:
    """true, false, null, an integer or another number as such; any other text as it is."""
    if text.lower() in CONSTANTS:
        return CONSTANTS[text.lower()]
    for kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            continue
        if math.isfinite(number):
            return number
    return text


class RewardSettings(ModelSettings):
    """Settings that define the internal reward models, in training and in judging."""

    reward_models: list[RewardModelName] = config.setting(
        ["judge", "implicit"],
        f"Internal reward models: any of {', '.join(REWARD_MODELS)}, or your own module:Class.",
        group=REWARDS,
        affects_fit=True,
    )
    reward_reference: str | None = config.setting(
        None,
        "Frozen reference model of the implicit reward (folder or hub id): the SFT model, not "
        "--model itself.",
        group=REWARDS,
        path=True,
        affects_output=False,
    )
    implicit_scale: float = config.setting(
        IMPLICIT_SCALE,
        "Factor on the implicit reward's log-odds. The default gives them the judge's order "
        "of magnitude.",
        group=REWARDS,
        gt=0,
        le=LARGEST_FACTOR,
    )
    implicit_beta: float = config.setting(
        0.1,
        "beta of the implicit reward: log-odds per nat of log-ratio, before the scale.",
        group=RARE,
        affects_fit=True,
        gt=0,
        le=LARGEST_FACTOR,
    )
    likelihood_scale: float = config.setting(
        1.0,
        "Factor on the mean log-probabilities (nats per token) of the likelihood and pmi "
        "reward models.",
        group=RARE,
        affects_fit=True,
        gt=0,
        le=LARGEST_FACTOR,
    )
    judge_prompt: Path | None = config.setting(
        None,
        "Text file with the prompt of the pairwise judge; it contains {question}, {a} and {b}.",
        group=REWARDS,
        path=True,
        affects_fit=True,
    )
    rationale_prompt: Path | None = config.setting(
        None,
        "Text file with the prompt of the judge that writes a rationale first; it contains "
        "{question}, {a} and {b}.",
        group=RARE,
        path=True,
        affects_fit=True,
    )
    rubric_prompt: Path | None = config.setting(
        None,
        "Text file with the rubric prompt, which requests a score from 0 to 5; it contains "
        "{question} and {response}.",
        group=RARE,
        path=True,
        affects_fit=True,
    )
    hide_system: bool = config.setting(
        False,
        "Leave system turns out of what the judge, the rubric and the rationale read.",
        group=RARE,
        affects_fit=True,
    )
    verdict_tokens: tuple[str, str] = config.setting(
        ("A", "B"),
        "The judge's two verdicts; each must be a single token.",
        group=RARE,
        affects_fit=True,
    )
    min_verdict_mass: Rate = config.setting(
        0.0,
        "Smallest probability mass P(A)+P(B) of a verdict; a pair below it has no verdict (null).",
        group=RARE,
        affects_fit=True,
    )

    @model_validator(mode="after")
    def _has_reward_models(self) -> RewardSettings:
        if not self.reward_models:
            raise ValueError("reward_models is empty; pass at least one")
        if len(set(self.reward_models)) < len(self.reward_models):
            names = ", ".join(self.reward_models)
            raise ValueError(f"reward_models contains a name twice: {names}")
        return self

    def plan(self) -> dict[str, Any]:
        """As `Settings.plan`; a user's reward model has a digest of its source file."""
        names = [plugins.with_digest(name) for name in self.reward_models]
        return super().plan() | {"reward_models": names}


class JudgingSettings(RewardSettings, SplitSettings):
    """Further settings of a stage that judges pairs."""

    rationale_max_tokens: Positive = config.setting(
        128, "Maximum number of tokens per rationale.", group=RARE, le=1_000_000
    )
    rationale_batch_size: Positive = config.setting(
        16, "Rationales sampled per batch.", group=RARE, affects_output=False, le=1_000_000
    )
    score_column: str | None = config.setting(
        None,
        "Input column of the reward model external: log-odds (nats), or 'CHOSEN,REJECTED' for "
        "two columns of scores. For candidates: one column of scores.",
        group=RARE,
    )

    @model_validator(mode="after")
    def _has_a_score_column(self) -> JudgingSettings:
        if "external" in self.reward_models and not self.score_column:
            raise ValueError("reward model 'external' requires --score-column COLUMN")
        return self


class EndpointArguments(BaseModel):
    """The arguments of --endpoint-arg.

    model          name of the model at the endpoint; required if the endpoint serves several
    retries        after the first request; the first wait is 0.5 seconds, each next one doubles
    timeout        seconds per request
    top_logprobs   requested per verdict from an endpoint that does not support logprob_token_ids
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = None
    retries: Annotated[int, Field(ge=0, le=1000)] = 6
    timeout: Annotated[float, Field(gt=0, le=1e6)] = 600.0
    top_logprobs: Annotated[int, Field(ge=1, le=1000)] = 20


class BackendSettings(ModelSettings):
    """Settings of a stage that runs a backend, in one process or in several workers."""

    backend: str = config.setting(
        "transformers",
        "Backend that samples responses: transformers, vllm, openai (an endpoint), auto (vllm "
        "if it is installed and a GPU is available, else transformers), or your own "
        "module:Class.",
        group=WORKERS,
    )
    workers: Annotated[int | Literal["auto"], PlainValidator(_workers)] = config.setting(
        1,
        "Number of workers, each with its own GPU (or --tensor-parallel-size GPUs). auto: as "
        "many as the GPUs allow; 1 without a GPU.",
        group=WORKERS,
        affects_output=False,
    )
    workers_on: Literal["local", "ray"] = config.setting(
        "local",
        "Run workers as processes on this machine, or as actors of a Ray cluster (a local "
        "cluster if none is running).",
        group=WORKERS,
        affects_output=False,
    )
    tensor_parallel_size: Positive = config.setting(
        1,
        "vllm: number of GPUs per copy of the model.",
        group=WORKERS,
        affects_output=False,
        le=1024,
    )
    gpu_memory_utilization: float | None = config.setting(
        None,
        "vllm: fraction of a GPU's memory to use.",
        group=RARE,
        affects_output=False,
        gt=0,
        le=1,
    )
    max_model_len: Positive | None = config.setting(
        None,
        "vllm: maximum sequence length in tokens; longer rows are dropped. Default: the model's.",
        group=RARE,
        le=100_000_000,
    )
    vllm_arg: list[str] = config.setting(
        [], "vllm: further engine arguments, for example enforce_eager=true.", group=WORKERS
    )
    base_url: str | None = config.setting(
        None,
        "openai: URL of the endpoint, for example http://localhost:8000/v1. The API key is "
        "read from OPENAI_API_KEY.",
        group=WORKERS,
        affects_output=False,
    )
    endpoint_arg: list[str] = config.setting(
        [],
        "openai: model=NAME (required if the endpoint serves several), timeout=SECONDS "
        "(default 600), retries=N (6), top_logprobs=N (20; for an endpoint without "
        "logprob_token_ids).",
        group=WORKERS,
        affects_output=False,
    )

    @field_validator("endpoint_arg")
    @classmethod
    def _endpoint_arguments_are_valid(cls, value: list[str]) -> list[str]:
        endpoint_arguments(value)
        return value

    @property
    def endpoint(self) -> EndpointArguments:
        """The arguments of --endpoint-arg, with their types."""
        return endpoint_arguments(self.endpoint_arg)

    def plan(self) -> dict[str, Any]:
        """As `Settings.plan`; of --endpoint-arg only top_logprobs, which affects verdicts."""
        return super().plan() | {"top_logprobs": self.endpoint.top_logprobs}


def endpoint_arguments(words: list[str]) -> EndpointArguments:
    """The arguments of --endpoint-arg, with their types.

    words: each is NAME=VALUE
    Raises ValueError for another form, an unknown name or a value out of bounds.
    """
    fields = EndpointArguments.model_fields
    values = {}
    for word in words:
        name, _, value = word.partition("=")
        if not (name and value):
            raise ValueError(f"expected NAME=VALUE, for example timeout=60; got {word!r}")
        if name not in fields:
            raise ValueError(f"unknown endpoint argument '{name}'.{suggest(name, fields)}")
        values[name] = value
    try:
        return EndpointArguments.model_validate(values)
    except ValidationError as error:
        problems = []
        for item in error.errors():
            problems.append(f"{item['loc'][0]} is {item['input']!r}: {item['msg']}")
        raise ValueError("; ".join(problems)) from error


class SamplingSettings(BackendSettings, SplitSettings):
    """Settings of a stage that samples responses to prompts."""

    input: str = config.setting(
        ...,
        "Prompts: a dataset folder, JSONL, Parquet, CSV or hub id.",
        group=INPUT_OUTPUT,
        path=True,
        affects_output=False,
    )
    temperature: float = config.setting(
        0.8, "Sampling temperature; 0 is greedy.", group=SAMPLING, ge=0, le=100
    )
    top_p: float = config.setting(
        0.95,
        "Nucleus sampling: sample from the smallest set of tokens with this total probability.",
        group=SAMPLING,
        gt=0,
        le=1,
    )
    top_k: int = config.setting(
        0,
        "Sample from so many of the likeliest tokens; 0: from all.",
        group=SAMPLING,
        ge=0,
        le=1_000_000,
    )
    min_p: float = config.setting(
        0.0,
        "Sample from tokens with at least this share of the likeliest token's probability.",
        group=SAMPLING,
        ge=0,
        lt=1,
    )
    repetition_penalty: float = config.setting(
        1.0,
        "Factor by which logits of tokens in the prompt or the response are made smaller; 1: none.",
        group=SAMPLING,
        ge=0.1,
        le=10,
    )
    max_new_tokens: Positive = config.setting(
        512, "Maximum number of tokens per response.", group=SAMPLING, le=1_000_000
    )
    system_prompt: str | None = config.setting(
        None, "System message before each prompt.", group=SAMPLING
    )
    batch_size: Positive = config.setting(
        16, "Responses sampled per batch.", group=SAMPLING, affects_output=False, le=1_000_000
    )
    rows_per_part: Positive = config.setting(
        64,
        "Prompts per part; an interrupted run loses at most the current part.",
        group=RARE,
        le=10_000_000,
    )


class GenerateSettings(SamplingSettings):
    """Settings of `scir generate`."""

    n: Positive = config.setting(5, "Responses per prompt.", group=SAMPLING, le=10_000)

    @model_validator(mode="after")
    def _differ(self) -> GenerateSettings:
        if self.temperature == 0 and self.n > 1:
            raise ValueError(
                f"at temperature 0 the {self.n} responses to a prompt are equal; "
                "use --n 1 or a temperature above 0"
            )
        return self


class JudgeSettings(JudgingSettings, BackendSettings):
    """Settings of `scir judge`."""

    backend: str = config.setting(
        "transformers",
        "Backend that computes verdicts and writes rationales, as in generate. scir itself "
        "always computes the log-probabilities of responses.",
        group=WORKERS,
    )
    input: str = config.setting(
        ...,
        "A candidates dataset, or pairs (prompt, chosen, rejected), whose labels become gold "
        "labels.",
        group=INPUT_OUTPUT,
        path=True,
        affects_output=False,
    )
    pairs: str = config.setting(
        "all",
        "Pairs per prompt: all, best-worst (by the first reward model), random:K, cross "
        "(each candidate with a response to another prompt), or damaged (also with itself cut, "
        "shuffled or repeated; labeled, for --calibrate-on).",
        group=REWARDS,
    )
    rows_per_part: Positive = config.setting(
        64,
        "Input rows per part; an interrupted run loses at most the current part.",
        group=RARE,
        le=10_000_000,
    )


class CheckConsistencySettings(ReportSettings):
    """Settings of `scir check-consistency`."""

    input: str = config.setting(
        ..., "A judged dataset.", group=INPUT_OUTPUT, path=True, affects_output=False
    )
    min_confidence: float = config.setting(
        0.5,
        "Smallest confidence max(p, 1-p) of every reward model for a pair to count as agreed; "
        "0.5 excludes none.",
        group=AGREEMENT,
        ge=0.5,
        lt=1,
    )
    agree_on: list[str] | None = config.setting(
        None, "Reward models that must agree. Default: all.", group=AGREEMENT
    )
    by_subset: bool = config.setting(
        False,
        "Also report the figures for each value of the subset column.",
        group=AGREEMENT,
        affects_output=False,
    )
    compare_to: list[str] = config.setting(
        [],
        "Other judgments of the same pairs (judged datasets of another model, prompt or "
        "seed): report how verdicts and ranks change.",
        group=INPUT_OUTPUT,
        path=True,
        affects_output=False,
    )
    judge_author: str | None = config.setting(
        None,
        "Author whose responses count as the judge's own (self-preference). Default: the "
        "model that judged.",
        group=AGREEMENT,
    )
    fail_under: Rate | None = config.setting(
        None,
        "Exit with status 1 if the agreement rate is below this.",
        group=AGREEMENT,
        affects_output=False,
    )
    rows_per_part: Positive = config.setting(50_000, "Rows per part.", group=RARE, le=10_000_000)


class FilterSettings(StageSettings):
    """Settings of `scir filter`."""

    input: str = config.setting(
        ..., "A judged dataset.", group=INPUT_OUTPUT, path=True, affects_output=False
    )
    rule: str = config.setting(
        "agree",
        "Source of the labels: agree, majority, consensus (soft labels from the pooled log-odds "
        "of --voters), the name of a reward model, or random:RATE:MODEL (labels of MODEL, by "
        "default judge, for a random share RATE of the pairs).",
        group=LABELS,
    )
    voters: list[str] = config.setting(
        ["judge", "likelihood", "pmi"],
        "consensus: the reward models whose log-odds are pooled, with sizes matched to the "
        "first's; or all.",
        group=LABELS,
    )
    voter_weights: Literal["equal", "calibrated"] = config.setting(
        "equal",
        "consensus: equal weights, or weights by how well each voter's log-odds predict the gold "
        "labels of --calibrate-on.",
        group=LABELS,
    )
    soft_labels: bool = config.setting(
        False,
        "Write the probability that a label is correct, by which train's losses weigh it; "
        "consensus always does.",
        group=LABELS,
    )
    label_temperature: float | None = config.setting(
        None,
        "Soft labels: p = sigmoid(log-odds / label_temperature). Default: fitted on "
        "--calibrate-on, else 1.",
        group=LABELS,
        gt=0,
        le=LARGEST_FACTOR,
    )
    calibrate_on: str | None = config.setting(
        None,
        "Judged dataset of labeled pairs (the seed pairs) with the verdicts of the same "
        "reward models, to fit the temperature.",
        group=LABELS,
        path=True,
    )
    agree_on: list[str] | None = config.setting(
        None, "Reward models that must agree. Default: all.", group=LABELS
    )
    length_neutral: bool = config.setting(
        False,
        "Subtract a per-token penalty from the labeling log-odds, so that chosen and "
        "rejected have the same mean length (DICE).",
        group=LABELS,
    )
    min_margin: float = config.setting(
        0.0,
        "Smallest |log-odds| (nats) of the labeling models for a label.",
        group=LABELS,
        ge=0,
        le=LARGEST_FACTOR,
    )
    min_confidence: float = config.setting(
        0.5,
        "Smallest confidence max(p, 1-p) of the labeling models for a label; 0.5 excludes none.",
        group=LABELS,
        ge=0.5,
        lt=1,
    )
    min_response_tokens: int = config.setting(
        0,
        "Drop pairs with a response of fewer tokens than this.",
        group=SELECTION,
        ge=0,
        le=MOST_COUNT,
    )
    max_response_tokens: Positive | None = config.setting(
        None, "Drop pairs with a response of more tokens than this.", group=SELECTION, le=MOST_COUNT
    )
    keep_cut: bool = config.setting(
        False,
        "Keep pairs with a response that the length limit cut (finish_reason length).",
        group=SELECTION,
    )
    max_pairs_per_prompt: Positive | None = config.setting(
        None,
        "Maximum number of pairs per prompt; those with the largest margins are kept.",
        group=SELECTION,
        le=MOST_COUNT,
    )
    dedup: bool = config.setting(
        True,
        "Drop pairs whose two responses occurred in an earlier pair of the same prompt.",
        group=SELECTION,
    )
    keep_unlabeled: bool = config.setting(
        False, "Keep pairs without a label, for SCIR's inconsistency penalty.", group=SELECTION
    )
    trl_jsonl: bool = config.setting(
        False, "Also write OUT/trl.jsonl (prompt, chosen, rejected) for TRL.", group=INPUT_OUTPUT
    )
    cream_previous: str | None = config.setting(
        None,
        "The same pairs judged by the previous model (a judged dataset); weight each label by "
        "how consistently the two models rank the responses (CREAM).",
        group=RARE,
        path=True,
        affects_output=False,
    )
    cream_reward_model: str | None = config.setting(
        None, "Reward model to read in --cream-previous. Default: the one that labels.", group=RARE
    )
    cream_average: Literal["all", "prompt"] = config.setting(
        "all",
        "Average CREAM's consistency over all prompts, or compute it for each prompt.",
        group=RARE,
    )
    rows_per_part: Positive = config.setting(50_000, "Rows per part.", group=RARE, le=10_000_000)

    @property
    def is_soft(self) -> bool:
        """Whether labels get a probability from log-odds."""
        return self.soft_labels or self.rule == "consensus"

    @model_validator(mode="after")
    def _soft_labels_have_log_odds(self) -> FilterSettings:
        """Raises ValueError for soft labels of rules that have no single log-odds.

        Also for a temperature or voters' weights without soft labels that they belong to.
        """
        if self.is_soft and (self.rule in ("agree", "majority") or self.cream_previous):
            raise ValueError(
                "soft_labels are the sigmoid of one log-odds: use --rule consensus or a "
                "reward model, without --cream-previous"
            )
        if (self.calibrate_on or self.label_temperature) and not self.is_soft:
            raise ValueError(
                "--label-temperature and --calibrate-on need --soft-labels or --rule consensus"
            )
        if self.voter_weights == "calibrated" and not (
            self.calibrate_on and self.rule == "consensus" and self.label_temperature is None
        ):
            raise ValueError(
                "--voter-weights calibrated needs --rule consensus and --calibrate-on, "
                "without --label-temperature"
            )
        return self


def entropy_ceiling(n_models: int) -> float:
    """The smallest entropy weight at which small disagreements of K models grow: 2K/(K-1).

    4 for two models, 3 for three; docs/method.md, section 4, derives it.
    """
    return 2 * n_models / (n_models - 1)


class LoraSettings(Settings):
    """Settings of low-rank adapters."""

    rank: int = config.setting(
        0, "Rank of LoRA adapters; 0 trains all weights.", group=MEMORY, ge=0, le=65_536
    )
    alpha: int = config.setting(
        16,
        "LoRA alpha: the adapters' output is scaled by alpha / rank.",
        group=RARE,
        ge=1,
        le=1_000_000,
    )
    target_modules: str = config.setting(
        "all-linear",
        "Modules with adapters: a name that peft accepts, or a regular expression.",
        group=RARE,
    )


class TrainSettings(RewardSettings, ReportSettings):
    """Settings of `scir train`."""

    regrouped: ClassVar[dict[str, str]] = {MODEL: MEMORY, REWARDS: CONSISTENCY, "report": LOGGING}

    objective: Literal["sft", "dpo", "scir"] = config.setting(
        "scir",
        "sft: learn responses and verdicts from labeled pairs. dpo: preference loss on "
        "labeled pairs. scir: inconsistency penalty on all pairs, preference loss on agreed "
        "pairs.",
        group=INPUT_OUTPUT,
        affects_fit=True,
    )
    input: str = config.setting(
        ...,
        "Training pairs (file or dataset): preferences or judged pairs (scir), labeled pairs "
        "(sft, dpo).",
        group=INPUT_OUTPUT,
        path=True,
        affects_output=False,
    )
    validation: str | None = config.setting(
        None,
        "Labeled pairs (file or dataset) for evaluation during training.",
        group=INPUT_OUTPUT,
        path=True,
        affects_output=False,
    )

    learning_rate: float = config.setting(
        5e-7, "Peak learning rate.", group=OPTIMIZER, gt=0, le=1000
    )
    num_epochs: Positive = config.setting(1, "Passes over the data.", group=OPTIMIZER, le=1000)
    max_steps: Positive | None = config.setting(
        None, "Stop after this many optimizer steps.", group=OPTIMIZER, le=MOST_COUNT
    )
    batch_size: Positive = config.setting(
        32,
        "Pairs per optimizer step, computed in packs of at most --max-tokens-per-pack.",
        group=OPTIMIZER,
        le=1_000_000,
    )
    max_tokens_per_pack: Positive = config.setting(
        8192,
        "Maximum number of tokens per forward and backward pass, packed without padding; "
        "halved if memory runs out.",
        group=MEMORY,
        affects_output=False,
        le=MOST_COUNT,
    )
    schedule: Literal["cosine", "linear", "constant"] = config.setting(
        "cosine", "Learning-rate schedule after the warm-up.", group=OPTIMIZER
    )
    warmup_ratio: Rate = config.setting(
        0.1, "Fraction of the steps in which the learning rate rises.", group=OPTIMIZER
    )
    weight_decay: float = config.setting(
        0.0, "Weight decay of AdamW.", group=OPTIMIZER, ge=0, le=LARGEST_FACTOR
    )
    max_grad_norm: float = config.setting(
        1.0,
        "Maximum norm of the gradient; larger gradients are scaled down to it.",
        group=OPTIMIZER,
        gt=0,
        le=1e12,
    )
    gradient_checkpointing: bool = config.setting(
        False,
        "Recompute activations in the backward pass: less memory, more time.",
        group=MEMORY,
        affects_output=False,
    )
    compile: bool = config.setting(
        False,
        "Compile the model's layers (torch.compile); adds 30 seconds or more at the start.",
        group=MEMORY,
        affects_output=False,
    )
    lora: LoraSettings = config.setting(LoraSettings(), "Low-rank adapters.", group=MEMORY)

    preference_loss: Literal["dpo", "ipo", "simpo", "sppo"] = config.setting(
        "dpo",
        "Loss on pairs with a label (dpo), or on pairs on which the reward models agree (scir).",
        group=PREFERENCE_LOSS,
        affects_fit=True,
    )
    beta: float = config.setting(
        0.1,
        "beta of dpo and simpo; tau of ipo; 1/eta of sppo.",
        group=PREFERENCE_LOSS,
        affects_fit=True,
        gt=0,
        le=LARGEST_FACTOR,
    )
    target_margin: float = config.setting(
        0.0,
        "gamma of simpo: target margin (nats), subtracted after the factor beta.",
        group=PREFERENCE_LOSS,
        affects_fit=True,
        ge=0,
        le=LARGEST_FACTOR,
    )
    # docs/study.md (main, sweep and real) has the reason for the defaults of implicit_scale and
    # penalty_ratio: with lambda 1 at an implicit scale of 5, the policy learned its own mistakes.
    penalty_weight: float | None = config.setting(
        None,
        "lambda: weight of the inconsistency penalty. Default: fitted by --penalty-ratio.",
        group=CONSISTENCY,
        ge=0,
        le=LARGEST_FACTOR,
    )
    penalty_ratio: float = config.setting(
        2.0,
        "Choose lambda so that at step 0 the penalty's gradient norm is this multiple of the "
        "preference loss's; later iterations reuse it.",
        group=CONSISTENCY,
        affects_fit=True,
        gt=0,
        le=LARGEST_FACTOR,
    )
    entropy_weight: float = config.setting(
        0.1,
        "alpha: weight of the entropy (nats) in the penalty. It must be less than 2K/(K-1) "
        "for K reward models, or disagreements would grow.",
        group=CONSISTENCY,
        affects_fit=True,
        ge=0,
        le=LARGEST_FACTOR,
    )
    implicit_scale: FittedOrNumber = config.setting(  # type: ignore[assignment]
        "fitted",
        "Factor on the implicit reward's log-odds. fitted: match the judge's median "
        "|log-odds| once; later iterations reuse it.",
        group=CONSISTENCY,
        affects_fit=True,
    )
    target: Literal["agreed", "judge", "consensus"] = config.setting(
        "agreed",
        "Labels of the preference loss: agreed (the verdict that all reward models share, "
        "other pairs left out), judge (its verdict, every pair), or consensus (the input's "
        "soft labels, which the judge learns as well in both orders).",
        group=CONSISTENCY,
        affects_fit=True,
    )
    min_confidence: float = config.setting(
        0.5,
        "Smallest confidence max(p, 1-p) of each reward model of --mask for a pair to enter "
        "the preference loss; 0.5 excludes none.",
        group=CONSISTENCY,
        affects_fit=True,
        ge=0.5,
        lt=1,
    )
    judge_orders: Literal["separate", "averaged"] = config.setting(
        "separate",
        "Treat the judge's two response orders as two reward models in the penalty, or "
        "average them.",
        group=CONSISTENCY,
        affects_fit=True,
    )
    stop_gradient: Literal["none", "judge"] = config.setting(
        "none", "Reward model that the penalty does not train.", group=CONSISTENCY, affects_fit=True
    )
    anchors: str | None = config.setting(
        None,
        "Labeled pairs (file or dataset) added to the steps; a supervised verdict loss on "
        "them keeps the judge from drifting.",
        group=CONSISTENCY,
        path=True,
        affects_output=False,
    )
    anchor_weight: float = config.setting(
        1.0, "Weight of the verdict loss on --anchors.", group=CONSISTENCY, ge=0, le=LARGEST_FACTOR
    )
    sft_weight: float | None = config.setting(
        None,
        "Weight of the chosen response's mean token loss: beside the verdict loss in sft "
        "(default 1), and beside the preference loss in dpo and scir (default 0).",
        group=RARE,
        affects_fit=True,
        ge=0,
        le=LARGEST_FACTOR,
    )

    num_processes: Positive = config.setting(
        1,
        "Number of local processes, one per GPU. Leave at 1 under torchrun or accelerate launch.",
        group=MEMORY,
        affects_output=False,
        le=1024,
    )
    sharding: Literal["ddp", "fsdp"] = config.setting(
        "ddp",
        "ddp: each process holds the whole model; fsdp: each holds a shard of it (FSDP2). "
        "accelerate's DeepSpeed plugin replaces both.",
        group=MEMORY,
        affects_output=False,
    )
    cpu_offload: bool = config.setting(
        False,
        "fsdp: keep weights and optimizer state in CPU memory. Slower; for a model that does "
        "not fit otherwise.",
        group=MEMORY,
        affects_output=False,
    )
    validation_every: Positive = config.setting(
        50,
        "Optimizer steps between evaluations on the validation pairs.",
        group=LOGGING,
        le=MOST_COUNT,
    )
    save_every: Positive = config.setting(
        100,
        "Optimizer steps between checkpoints.",
        group=LOGGING,
        affects_output=False,
        le=MOST_COUNT,
    )
    report_to: list[str] = config.setting(
        [],
        "Experiment trackers that accelerate supports: tensorboard, wandb, trackio, mlflow, …",
        group=LOGGING,
        affects_output=False,
    )

    @property
    def learns_consensus(self) -> bool:
        """Whether the objective is SCIR with the input's soft labels, not the agreed verdict."""
        return self.objective == "scir" and self.target == "consensus"

    @model_validator(mode="after")
    def _quantized_trains_adapters(self) -> TrainSettings:
        if self.quantization != "none" and (not self.lora.rank or self.sharding == "fsdp"):
            raise ValueError(
                f"quantization {self.quantization} trains adapters only, and each process holds "
                "the whole model: set lora.rank and sharding ddp"
            )
        return self

    @model_validator(mode="after")
    def _output_is_local(self) -> TrainSettings:
        if is_remote(self.output_dir):
            raise ValueError(
                f"output_dir is {self.output_dir}, but a model is written to a local folder; "
                "only datasets may be at URLs"
            )
        return self

    @model_validator(mode="after")
    def _offload_needs_shards(self) -> TrainSettings:
        if self.cpu_offload and self.sharding != "fsdp":
            raise ValueError("--cpu-offload needs --sharding fsdp and --num-processes above 1")
        return self

    @property
    def response_weight(self) -> float:
        """The weight of the chosen response's loss: sft_weight, or its default."""
        if self.sft_weight is None:
            return 1.0 if self.objective == "sft" else 0.0
        return self.sft_weight

    @model_validator(mode="after")
    def _sft_has_a_loss(self) -> TrainSettings:
        has_loss = self.response_weight or "judge" in self.reward_models
        if self.objective == "sft" and not has_loss:
            raise ValueError(
                "sft has no loss: sft_weight is 0, and 'judge' is not among "
                "reward_models; set one of them"
            )
        return self

    @model_validator(mode="after")
    def _entropy_is_below_its_ceiling(self) -> TrainSettings:
        # The classes of the reward models are not imported here: only the judge's two orders count
        # as two. Training checks again with the orders of all models.
        n_models = len(self.reward_models) + (self.judge_orders == "separate")
        ceiling = entropy_ceiling(max(2, n_models))
        if self.objective == "scir" and self.entropy_weight >= ceiling:
            raise ValueError(
                f"entropy_weight is {self.entropy_weight}; from {ceiling:g} on "
                f"(--judge-orders {self.judge_orders}), the penalty rewards confident "
                f"disagreement. Use less than {ceiling:g}; the default is 0.1"
            )
        return self

    @model_validator(mode="after")
    def _consensus_has_a_judge(self) -> TrainSettings:
        if self.learns_consensus and ("judge" not in self.reward_models or self.anchors):
            raise ValueError(
                "target consensus trains the reward model 'judge' on the input's labels: "
                "name it, and leave anchors out"
            )
        return self

    @model_validator(mode="after")
    def _scir_trains_judge_and_implicit(self) -> TrainSettings:
        names = set(self.reward_models)
        has_both = {"judge", "implicit"} <= names
        is_complete = has_both and "external" not in names
        if self.objective == "scir" and not self.learns_consensus and not is_complete:
            raise ValueError(
                "objective scir trains the reward models 'judge' and 'implicit' together, and "
                "optionally other internal ones (not 'external'); "
                f"got {', '.join(self.reward_models)}"
            )
        return self


class EvalRewardsSettings(JudgingSettings, ReportSettings):
    """Settings of `scir eval rewards`."""

    input: str = config.setting(
        ...,
        "Labeled pairs (prompt, chosen, rejected), or a judged dataset, whose verdicts are "
        "used unchanged.",
        group=INPUT_OUTPUT,
        path=True,
        affects_output=False,
    )
    model: str = config.setting(
        "",
        "Model: a folder, hub id or package:NAME. Not needed if the input is a judged dataset.",
        group=INPUT_OUTPUT,
        path=True,
        affects_output=False,
    )
    rows_per_part: Positive = config.setting(64, "Input rows per part.", group=RARE, le=10_000_000)


class EvalWinrateSettings(JudgingSettings, ReportSettings):
    """Settings of `scir eval winrate`."""

    responses: list[str] = config.setting(
        [],
        "Responses of one or more models to compare: AlpacaEval JSON files, or candidates "
        "datasets.",
        group=INPUT_OUTPUT,
        path=True,
        affects_output=False,
    )
    baseline: str | None = config.setting(
        None,
        "Responses to compare with (file or dataset). Without it, all pairs of --responses "
        "are compared.",
        group=INPUT_OUTPUT,
        path=True,
        affects_output=False,
    )
    annotations: list[str] = config.setting(
        [],
        "Existing AlpacaEval annotation files, instead of --responses; no judge runs.",
        group=INPUT_OUTPUT,
        path=True,
        affects_output=False,
    )
    gamed_baselines: Path | None = config.setting(
        None,
        "AlpacaEval's df_gamed.csv, for its length-controlled win rate. Without this file, "
        "the regression has no difficulty term and no regularization to baselines.",
        group=INPUT_OUTPUT,
        path=True,
        affects_output=False,
    )
    model: str = config.setting(
        "",
        "Judge model: a folder, hub id or package:NAME. Not needed with --annotations.",
        group=INPUT_OUTPUT,
        path=True,
        affects_output=False,
    )
    reward_models: list[RewardModelName] = config.setting(
        ["judge"],
        f"Reward models that judge: any of {', '.join(REWARD_MODELS)}.",
        group=REWARDS,
    )
    rows_per_part: Positive = config.setting(64, "Input rows per part.", group=RARE, le=10_000_000)

    @model_validator(mode="after")
    def _has_something_to_compare(self) -> EvalWinrateSettings:
        if bool(self.annotations) == bool(self.responses):
            raise ValueError("pass either --responses to judge, or existing --annotations")
        if self.responses and not self.model:
            raise ValueError("--responses need a judge: pass --model")
        if self.responses and not self.baseline and len(self.responses) < 2:
            raise ValueError("one file of --responses needs a --baseline to compare with")
        return self


class EvalResponsesSettings(SamplingSettings):
    """Settings of `scir eval responses`."""

    #: Evaluators read one response per prompt.
    n: ClassVar[int] = 1

    temperature: float = config.setting(
        0.7, "Sampling temperature; 0 is greedy.", group=SAMPLING, ge=0, le=100
    )
    generator: str = config.setting(
        "scir", "Name of the model in responses.json.", group=INPUT_OUTPUT
    )


class EvalMtBenchSettings(SamplingSettings, ReportSettings):
    """Settings of `scir eval mt-bench`."""

    #: One answer per turn.
    n: ClassVar[int] = 1

    input: str = config.setting(
        ...,
        "File of questions of one or more turns: FastChat's question.jsonl.",
        group=INPUT_OUTPUT,
        path=True,
        affects_output=False,
    )
    model: str = config.setting(
        "",
        "Model that answers the questions. Not needed with --answers.",
        group=INPUT_OUTPUT,
        path=True,
        affects_output=False,
    )
    answers: str | None = config.setting(
        None,
        "Existing answers (a FastChat model_answer file), instead of --model.",
        group=INPUT_OUTPUT,
        path=True,
        affects_output=False,
    )
    judge: str | None = config.setting(
        None,
        "Model that grades the answers. Default: --model.",
        group=INPUT_OUTPUT,
        path=True,
        affects_output=False,
    )
    # None is not valid in `generate`; here it stands for the temperature of the category.
    temperature: float | None = config.setting(  # type: ignore[assignment]
        None,
        "Sampling temperature. Default: FastChat's for the question's category.",
        group=SAMPLING,
        ge=0,
        le=100,
    )
    max_new_tokens: Positive = config.setting(
        1024, "Maximum number of tokens per response.", group=SAMPLING, le=1_000_000
    )

    @model_validator(mode="after")
    def _has_answers_and_a_judge(self) -> EvalMtBenchSettings:
        if bool(self.model) == bool(self.answers):
            raise ValueError("pass either --model to answer the questions, or existing --answers")
        if self.answers and not self.judge:
            raise ValueError("--answers need a model that grades: pass --judge")
        return self
