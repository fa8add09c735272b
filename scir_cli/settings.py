"""Every setting of every stage: default, help text, group and role, declared once."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
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
from scir_cli.data.storage import is_remote, to_path
from scir_cli.errors import install_hint, suggest

REWARD_MODELS = ("judge", "implicit", "rubric", "rationale", "likelihood", "pmi", "external")


def _reward_model(name: str) -> str:
    """A built-in name, or "module:Class", which is not imported here; raises ValueError for anything else."""
    if name not in REWARD_MODELS and not plugins.is_target(name):
        raise ValueError(
            f"no such reward model.{suggest(name, REWARD_MODELS)} A class of your own is written my_package.my_module:Class"
        )
    return name


RewardModelName = Annotated[str, AfterValidator(_reward_model)]


#: Default factor on the implicit reward's log-odds when judging: with it they have the judge's order of magnitude [ours].
IMPLICIT_SCALE = 5.0

Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(ge=0, le=1)]


def _workers(value: Any) -> int | str:
    if value == "auto":
        return "auto"
    if isinstance(value, bool) or not str(value).isdecimal() or not int(value):
        raise ValueError("expected a number of at least 1, or auto")
    return int(value)


def _scale(value: Any) -> float | str:
    if value == "fitted":
        return "fitted"
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not 0 < number < float("inf"):
        raise ValueError("expected a number above 0, or fitted")
    return number


class StageSettings(Settings):
    output_dir: Annotated[Path, PlainValidator(to_path)] = config.setting(
        ...,
        "Output folder, or a URL (s3://…). The same command resumes an unfinished run.",
        group=INPUT_OUTPUT,
        affects_output=False,
    )
    seed: int = config.setting(0, "Seed of all random choices.", group=INPUT_OUTPUT)
    limit: Positive | None = config.setting(
        None, "Use only the first N rows of the input.", group=RARE
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


def report_problem(path: Path) -> str | None:
    """Why an HTML page could not be written to `path`, found before the work and not after it; None if it can."""
    if find_spec("matplotlib") is None:
        return f"a report needs the package matplotlib: {install_hint('report')}"
    return "a report is a file, and this is a folder; name a FILE.html" if path.is_dir() else None


class ModelSettings(StageSettings):
    model: str = config.setting(
        ...,
        "Model: a folder, a hub id, or package:NAME (a GGUF file in a pip package). 'A | B' uses B if A is not available.",
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
        "Hold the weights in 4 bits (NF4, bitsandbytes). Training then requires --lora-rank (QLoRA).",
        group=MODEL,
    )
    device: str = config.setting(
        "auto", "Device: auto, cpu, cuda, cuda:1, …", group=MODEL, affects_output=False
    )
    trust_remote_code: bool = config.setting(
        False, "Run Python code from the model folder.", group=RARE, affects_output=False
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
        16384, "Tokens per forward pass, packed without padding.", group=MODEL, affects_output=False
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
    """What defines the internal reward models, in training as in judging."""

    reward_models: list[RewardModelName] = config.setting(
        ["judge", "implicit"],
        f"Internal reward models to use: any of {', '.join(REWARD_MODELS)}, or your own module:Class.",
        group=REWARDS,
        affects_fit=True,
    )
    reward_reference: str | None = config.setting(
        None,
        "Frozen reference model of the implicit reward (folder or hub id): the SFT model, not the model itself.",
        group=REWARDS,
        path=True,
        affects_output=False,
    )
    implicit_scale: float = config.setting(
        IMPLICIT_SCALE,
        "Factor on the implicit reward's log-odds, to match the judge's magnitude.",
        group=REWARDS,
        gt=0,
    )
    implicit_beta: float = config.setting(
        0.1,
        "beta of the implicit reward: log-odds per nat of log-ratio, before the scale.",
        group=RARE,
        affects_fit=True,
        gt=0,
    )
    rubric_scale: float = config.setting(
        1.0, "Log-odds (nats) per rubric point.", group=RARE, affects_fit=True, gt=0
    )
    likelihood_scale: float = config.setting(
        1.0,
        "Factor on the mean log-probabilities (nats per token) of the likelihood and pmi reward models.",
        group=RARE,
        affects_fit=True,
        gt=0,
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
        "Text file with the prompt of the judge that writes a rationale first; same placeholders.",
        group=RARE,
        path=True,
        affects_fit=True,
    )
    rubric_prompt: Path | None = config.setting(
        None,
        "Text file with the rubric prompt, which requests a score from 0 to 5; it contains {question} and {response}.",
        group=RARE,
        path=True,
        affects_fit=True,
    )
    judge_reads_system: bool = config.setting(
        True,
        "Show system turns to the judge, the rubric and the rationale.",
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
        "Smallest probability P(A)+P(B) of a verdict; below it, the pair has no verdict (null).",
        group=RARE,
        affects_fit=True,
    )

    @model_validator(mode="after")
    def _has_reward_models(self) -> RewardSettings:
        if not self.reward_models:
            raise ValueError("reward_models is empty; name at least one")
        if len(set(self.reward_models)) < len(self.reward_models):
            raise ValueError(
                f"reward_models names one model twice: {', '.join(self.reward_models)}"
            )
        return self

    def plan(self) -> dict[str, Any]:
        """As of all settings; a reward model of the user's own with a digest of its source file."""
        return super().plan() | {
            "reward_models": [plugins.with_digest(name) for name in self.reward_models]
        }


class JudgingSettings(RewardSettings):
    """What a command that judges pairs needs as well."""

    rationale_max_tokens: Positive = config.setting(
        128, "Maximum number of tokens per written rationale.", group=RARE
    )
    rationale_batch_size: Positive = config.setting(
        16, "Rationales sampled per batch.", group=RARE, affects_output=False
    )
    score_column: str | None = config.setting(
        None,
        "Input column for the reward model external: log-odds (nats), or 'CHOSEN,REJECTED', two columns of scores. "
        "For candidates: one column of scores.",
        group=RARE,
    )

    @model_validator(mode="after")
    def _has_a_score_column(self) -> JudgingSettings:
        if "external" in self.reward_models and not self.score_column:
            raise ValueError("reward model 'external' requires --score-column COLUMN")
        return self


class EndpointArguments(BaseModel):
    """What --endpoint-arg accepts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = None  # the model's name at the endpoint; required if it serves several
    retries: Annotated[int, Field(ge=0)] = (
        6  # after the first try; 0.5 s apart at first, then twice as far each time
    )
    timeout: Annotated[float, Field(gt=0)] = 600.0  # seconds to wait for an answer
    top_logprobs: Positive = 20  # requested from an endpoint that does not know logprob_token_ids


class BackendSettings(ModelSettings):
    backend: str = config.setting(
        "transformers",
        "What samples responses: transformers, vllm, openai (an endpoint), auto (vllm if it is installed and a GPU is "
        "available), or your own module:Class.",
        group=WORKERS,
    )
    workers: Annotated[int | Literal["auto"], PlainValidator(_workers)] = config.setting(
        1,
        "Number of workers that share the parts, each with its own GPU (or --tensor-parallel-size GPUs); auto: as many "
        "as the GPUs allow, 1 without a GPU.",
        group=WORKERS,
        affects_output=False,
    )
    workers_on: Literal["local", "ray"] = config.setting(
        "local",
        "Run workers as processes of this machine, or as actors of a Ray cluster (a local cluster if none is running).",
        group=WORKERS,
        affects_output=False,
    )
    tensor_parallel_size: Positive = config.setting(
        1, "vllm: number of GPUs per copy of the model.", group=WORKERS, affects_output=False
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
    )
    vllm_arg: list[str] = config.setting(
        [], "vllm: further engine arguments, as enforce_eager=true.", group=WORKERS
    )
    base_url: str | None = config.setting(
        None,
        "openai: URL of the endpoint, as http://localhost:8000/v1. Its key is read from OPENAI_API_KEY.",
        group=WORKERS,
        affects_output=False,
    )
    endpoint_arg: list[str] = config.setting(
        [],
        "openai: model=NAME (if the endpoint serves several), timeout=SECONDS (600), retries=N (6), top_logprobs=N (20; "
        "for an endpoint without logprob_token_ids).",
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
        return endpoint_arguments(self.endpoint_arg)

    def plan(self) -> dict[str, Any]:
        """As `Settings.plan`; of --endpoint-arg only top_logprobs, which decides the verdicts that an endpoint returns."""
        return super().plan() | {"top_logprobs": self.endpoint.top_logprobs}


def endpoint_arguments(words: list[str]) -> EndpointArguments:
    """The arguments of --endpoint-arg, with their types; raises ValueError for an unknown name or a value out of bounds."""
    known = EndpointArguments.model_fields
    values = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (name and equals and value):
            raise ValueError(f"expected NAME=VALUE, as timeout=60; got {word!r}")
        if name not in known:
            raise ValueError(f"unknown endpoint argument '{name}'.{suggest(name, known)}")
        values[name] = value
    try:
        return EndpointArguments.model_validate(values)
    except ValidationError as error:
        problems = [
            f"{item['loc'][0]} is {item['input']!r}: {item['msg']}" for item in error.errors()
        ]
        raise ValueError("; ".join(problems)) from error


class SamplingSettings(BackendSettings):
    """What samples responses to prompts."""

    input: str = config.setting(
        ...,
        "Prompts: a dataset folder, JSONL, Parquet, CSV or hub id.",
        group=INPUT_OUTPUT,
        path=True,
        affects_output=False,
    )
    temperature: float = config.setting(
        0.8, "Sampling temperature; 0 is greedy.", group=SAMPLING, ge=0
    )
    top_p: float = config.setting(
        0.95,
        "Nucleus sampling: sample from the smallest set of tokens with this probability.",
        group=SAMPLING,
        gt=0,
        le=1,
    )
    max_new_tokens: Positive = config.setting(
        512, "Maximum number of tokens per response.", group=SAMPLING
    )
    system_prompt: str | None = config.setting(
        None, "System message before each prompt.", group=SAMPLING
    )
    batch_size: Positive = config.setting(
        16, "Responses sampled per batch.", group=SAMPLING, affects_output=False
    )
    rows_per_part: Positive = config.setting(
        64, "Prompts per part; an interrupted run loses at most the current part.", group=RARE
    )


class GenerateSettings(SamplingSettings):
    n: Positive = config.setting(5, "Responses per prompt.", group=SAMPLING)

    @model_validator(mode="after")
    def _differ(self) -> GenerateSettings:
        if self.temperature == 0 and self.n > 1:
            raise ValueError(
                f"temperature 0 gives {self.n} equal responses; use --n 1 or a temperature above 0"
            )
        return self


class JudgeSettings(JudgingSettings, BackendSettings):
    backend: str = config.setting(
        "transformers",
        "What reads verdicts and writes rationales: as in generate; log-probabilities of responses always come from the engine.",
        group=WORKERS,
    )
    input: str = config.setting(
        ...,
        "A candidates dataset, or pairs (prompt, chosen, rejected); labels of pairs are kept as gold labels.",
        group=INPUT_OUTPUT,
        path=True,
        affects_output=False,
    )
    pairs: str = config.setting(
        "all",
        "Pairs per prompt: all, best-worst (by the first reward model), random:K, or cross (each candidate beside one "
        "for another prompt).",
        group=REWARDS,
    )
    rows_per_part: Positive = config.setting(
        64, "Input rows per part; an interrupted run loses at most the current part.", group=RARE
    )


class CheckConsistencySettings(ReportSettings):
    input: str = config.setting(
        ..., "A judged dataset.", group=INPUT_OUTPUT, path=True, affects_output=False
    )
    min_confidence: float = config.setting(
        0.5,
        "Smallest confidence max(p, 1-p) of every reward model in a pair on which they agree.",
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
        "Other judgements of the same pairs (judged datasets of another model, prompt or seed); report how verdicts and "
        "ranks change.",
        group=INPUT_OUTPUT,
        path=True,
        affects_output=False,
    )
    judge_author: str | None = config.setting(
        None,
        "Author of the judge's own responses (self-preference). Default: the model that judged.",
        group=AGREEMENT,
    )
    fail_under: Rate | None = config.setting(
        None,
        "Exit with status 1 if the agreement rate is below this.",
        group=AGREEMENT,
        affects_output=False,
    )
    rows_per_part: Positive = config.setting(50_000, "Rows per part.", group=RARE)


class FilterSettings(StageSettings):
    input: str = config.setting(
        ..., "A judged dataset.", group=INPUT_OUTPUT, path=True, affects_output=False
    )
    rule: str = config.setting(
        "agree",
        "Source of the labels: agree, majority, the name of a reward model, or random:RATE:MODEL (labels of MODEL, judge "
        "if left out, for a random share of the pairs).",
        group=LABELS,
    )
    agree_on: list[str] | None = config.setting(
        None, "Reward models that must agree. Default: all.", group=LABELS
    )
    length_neutral: bool = config.setting(
        False,
        "Subtract a per-token penalty from the labelling log-odds, so that chosen and rejected have the same mean length (DICE).",
        group=LABELS,
    )
    min_margin: float = config.setting(
        0.0, "Smallest |log-odds| of the labelling models, in nats.", group=LABELS, ge=0
    )
    min_confidence: float = config.setting(
        0.5, "Smallest confidence max(p, 1-p) of the labelling models.", group=LABELS, ge=0.5, lt=1
    )
    min_response_tokens: int = config.setting(
        0, "Drop pairs with a response of fewer tokens.", group=SELECTION, ge=0
    )
    max_response_tokens: Positive | None = config.setting(
        None, "Drop pairs with a response of more tokens.", group=SELECTION
    )
    max_pairs_per_prompt: Positive | None = config.setting(
        None,
        "Maximum number of pairs per prompt; those with the largest margins are kept.",
        group=SELECTION,
    )
    dedup: bool = config.setting(
        True, "Drop pairs whose two responses occurred before for the same prompt.", group=SELECTION
    )
    keep_unlabelled: bool = config.setting(
        False, "Keep pairs without a label, for SCIR's inconsistency penalty.", group=SELECTION
    )
    trl_jsonl: bool = config.setting(
        False, "Also write OUT/trl.jsonl (prompt, chosen, rejected) for TRL.", group=INPUT_OUTPUT
    )
    cream_previous: str | None = config.setting(
        None,
        "The same pairs judged by the previous model (a judged dataset); weight each label by how consistently the two "
        "models rank the responses (CREAM).",
        group=RARE,
        path=True,
        affects_output=False,
    )
    cream_reward_model: str | None = config.setting(
        None, "Reward model to read in --cream-previous. Default: the one that labels.", group=RARE
    )
    cream_average: Literal["all", "prompt"] = config.setting(
        "all", "Average CREAM's consistency over all prompts, or use each prompt's own.", group=RARE
    )
    rows_per_part: Positive = config.setting(50_000, "Rows per part.", group=RARE)


def entropy_ceiling(n_models: int) -> float:
    """The entropy weight from which small disagreements of K models grow by themselves.  2K/(K-1): 4 for two models, 3 for three"""
    return 2 * n_models / (n_models - 1)


class LoraSettings(Settings):
    rank: int = config.setting(
        0, "Rank of LoRA adapters; 0 trains all weights.", group=MEMORY, ge=0
    )
    alpha: int = config.setting(16, "LoRA alpha.", group=RARE, ge=1)
    target_modules: str = config.setting(
        "all-linear",
        "Modules with adapters: a name that peft knows, or a regular expression.",
        group=RARE,
    )


class TrainSettings(RewardSettings, ReportSettings):
    regrouped: ClassVar[dict[str, str]] = {MODEL: MEMORY, REWARDS: CONSISTENCY, "report": LOGGING}

    objective: Literal["sft", "dpo", "scir"] = config.setting(
        "scir",
        "sft: teach to answer and to judge. dpo: labelled pairs. scir: inconsistency penalty and dynamic mask.",
        group=INPUT_OUTPUT,
        affects_fit=True,
    )
    input: str = config.setting(
        ...,
        "Training pairs (file or dataset): preferences or judged pairs (scir), labelled pairs (sft, dpo).",
        group=INPUT_OUTPUT,
        path=True,
        affects_output=False,
    )
    validation: str | None = config.setting(
        None,
        "Labelled pairs (file or dataset) for evaluation during training.",
        group=INPUT_OUTPUT,
        path=True,
        affects_output=False,
    )

    learning_rate: float = config.setting(5e-7, "Peak learning rate.", group=OPTIMIZER, gt=0)
    num_epochs: Positive = config.setting(1, "Passes over the data.", group=OPTIMIZER)
    max_steps: Positive | None = config.setting(
        None, "Stop after this many optimizer steps.", group=OPTIMIZER
    )
    batch_size: Positive = config.setting(
        32,
        "Pairs per optimizer step; --max-tokens-per-pack limits how many are computed at once.",
        group=OPTIMIZER,
    )
    max_tokens_per_step: Positive | None = config.setting(
        None,
        "Tokens per optimizer step, instead of --batch-size: as many pairs as fit.",
        group=RARE,
    )
    max_tokens_per_pack: Positive = config.setting(
        8192,
        "Tokens per forward and backward pass, packed without padding; halved if memory runs out.",
        group=MEMORY,
        affects_output=False,
    )
    schedule: Literal["cosine", "linear", "constant"] = config.setting(
        "cosine", "Learning rate after warm-up.", group=OPTIMIZER
    )
    warmup_ratio: Rate = config.setting(
        0.1, "Fraction of the steps in which the learning rate rises.", group=OPTIMIZER
    )
    weight_decay: float = config.setting(0.0, "Weight decay of AdamW.", group=OPTIMIZER, ge=0)
    max_grad_norm: float = config.setting(
        1.0, "Clip the gradient norm to this.", group=OPTIMIZER, gt=0
    )
    gradient_checkpointing: bool = config.setting(
        False,
        "Recompute activations in the backward pass: less memory, more time.",
        group=MEMORY,
        affects_output=False,
    )
    compile: bool = config.setting(
        False,
        "Compile the model's layers (torch.compile); adds half a minute or more at the start.",
        group=MEMORY,
        affects_output=False,
    )
    lora: LoraSettings = config.setting(LoraSettings(), "Low-rank adapters.", group=MEMORY)

    preference_loss: Literal["dpo", "ipo", "simpo", "sppo"] = config.setting(
        "dpo",
        "Loss on a pair with a label (dpo), or on which the reward models agree (scir).",
        group=PREFERENCE_LOSS,
        affects_fit=True,
    )
    beta: float = config.setting(
        0.1,
        "beta of dpo and simpo; tau of ipo; 1/eta of sppo.",
        group=PREFERENCE_LOSS,
        affects_fit=True,
        gt=0,
    )
    target_margin: float = config.setting(
        0.0,
        "gamma of simpo: target margin, in nats after beta.",
        group=PREFERENCE_LOSS,
        affects_fit=True,
        ge=0,
    )
    # implicit_scale and penalty_ratio: docs/study.md, experiments main, sweep and real; with lambda 1 at an implicit scale of 5
    # the policy trained on its own mistakes
    penalty_weight: float | None = config.setting(
        None,
        "lambda: weight of the inconsistency penalty. Default: fitted by --penalty-ratio.",
        group=CONSISTENCY,
        ge=0,
    )
    penalty_ratio: float = config.setting(
        2.0,
        "Choose lambda so that at step 0 the penalty's gradient norm is this multiple of the preference loss's; later "
        "iterations reuse it.",
        group=CONSISTENCY,
        affects_fit=True,
        gt=0,
    )
    entropy_weight: float = config.setting(
        0.1,
        "alpha: weight of the entropy (nats) in the penalty. At 2K/(K-1) or more for K models, disagreement would grow.",
        group=CONSISTENCY,
        affects_fit=True,
        ge=0,
    )
    implicit_scale: Annotated[float | Literal["fitted"], PlainValidator(_scale)] = config.setting(  # type: ignore[assignment]
        "fitted",
        "Factor on the implicit reward's log-odds. fitted: match the judge's median |log-odds| once; later iterations reuse it.",
        group=CONSISTENCY,
        affects_fit=True,
    )
    mask: Literal["all", "judge"] = config.setting(
        "all",
        "Which reward models must agree for a pair to enter the preference loss: all, or the judge alone (then every "
        "pair with a verdict).",
        group=CONSISTENCY,
        affects_fit=True,
    )
    min_confidence: float = config.setting(
        0.5,
        "Smallest confidence max(p, 1-p) of those reward models for a pair to enter the preference loss.",
        group=CONSISTENCY,
        affects_fit=True,
        ge=0.5,
        lt=1,
    )
    judge_orders: Literal["separate", "averaged"] = config.setting(
        "separate",
        "Treat the judge's two response orders as two reward models of the penalty, or as their average.",
        group=CONSISTENCY,
        affects_fit=True,
    )
    stop_gradient: Literal["none", "judge"] = config.setting(
        "none", "Reward model that the penalty does not train.", group=CONSISTENCY, affects_fit=True
    )
    anchors: str | None = config.setting(
        None,
        "Labelled pairs (file or dataset) added to the steps; a supervised verdict loss on them keeps the judge from drifting.",
        group=CONSISTENCY,
        path=True,
        affects_output=False,
    )
    anchor_weight: float = config.setting(
        1.0, "Weight of the verdict loss on --anchors.", group=CONSISTENCY, ge=0
    )
    sft_response_weight: float = config.setting(
        1.0,
        "sft: weight of the chosen response's mean token loss, relative to the verdict loss.",
        group=RARE,
        ge=0,
    )

    num_processes: Positive = config.setting(
        1,
        "Number of local processes, one per GPU. Leave at 1 under torchrun or accelerate launch.",
        group=MEMORY,
        affects_output=False,
    )
    sharding: Literal["ddp", "fsdp"] = config.setting(
        "ddp",
        "Each process holds the whole model (ddp) or a shard of it (fsdp: FSDP2). accelerate's DeepSpeed plugin replaces both.",
        group=MEMORY,
        affects_output=False,
    )
    cpu_offload: bool = config.setting(
        False,
        "fsdp: keep weights and optimizer state in CPU memory, for a model that does not fit otherwise; slower.",
        group=MEMORY,
        affects_output=False,
    )
    validation_every: Positive = config.setting(
        50, "Optimizer steps between evaluations on the validation pairs.", group=LOGGING
    )
    save_every: Positive = config.setting(
        100, "Optimizer steps between checkpoints.", group=LOGGING, affects_output=False
    )
    report_to: list[str] = config.setting(
        [],
        "Experiment trackers that accelerate supports: tensorboard, wandb, trackio, mlflow, …",
        group=LOGGING,
        affects_output=False,
    )

    @model_validator(mode="after")
    def _quantized_trains_adapters(self) -> TrainSettings:
        if self.quantization != "none" and (not self.lora.rank or self.sharding == "fsdp"):
            raise ValueError(
                f"quantization {self.quantization} trains adapters only, each process with the whole model: "
                "set lora.rank and sharding ddp"
            )
        return self

    @model_validator(mode="after")
    def _output_is_local(self) -> TrainSettings:
        if is_remote(self.output_dir):
            raise ValueError(
                f"a model is written to a local folder, and output_dir is {self.output_dir}; only datasets may be URLs"
            )
        return self

    @model_validator(mode="after")
    def _offload_needs_shards(self) -> TrainSettings:
        if self.cpu_offload and self.sharding != "fsdp":
            raise ValueError("--cpu-offload needs --sharding fsdp and --num-processes above 1")
        return self

    @model_validator(mode="after")
    def _sft_has_a_loss(self) -> TrainSettings:
        if (
            self.objective == "sft"
            and not self.sft_response_weight
            and "judge" not in self.reward_models
        ):
            raise ValueError(
                "sft has no loss: sft_response_weight is 0, and 'judge' is not among reward_models"
            )
        return self

    @model_validator(mode="after")
    def _entropy_is_below_its_ceiling(self) -> TrainSettings:
        # A bound without importing the classes: the judge's two orders count; training checks again with those of all models.
        ceiling = entropy_ceiling(
            max(2, len(self.reward_models) + (self.judge_orders == "separate"))
        )
        if self.objective == "scir" and self.entropy_weight >= ceiling:
            raise ValueError(
                f"entropy_weight is {self.entropy_weight}; from {ceiling:g} on (--judge-orders {self.judge_orders}), the penalty "
                f"rewards confident disagreement. Use less than {ceiling:g}, 0.1 is the default"
            )
        return self

    @model_validator(mode="after")
    def _scir_trains_judge_and_implicit(self) -> TrainSettings:
        names = set(self.reward_models)
        if self.objective == "scir" and not (
            {"judge", "implicit"} <= names and "external" not in names
        ):
            raise ValueError(
                "objective scir trains the reward models 'judge' and 'implicit' together, and other internal ones beside them; "
                f"got {', '.join(self.reward_models)}"
            )
        return self


class EvalRewardsSettings(JudgingSettings, ReportSettings):
    input: str = config.setting(
        ...,
        "Labelled pairs (prompt, chosen, rejected), or a judged dataset, whose verdicts are then used as they are.",
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
    rows_per_part: Positive = config.setting(64, "Input rows per part.", group=RARE)


class EvalWinrateSettings(JudgingSettings, ReportSettings):
    responses: list[str] = config.setting(
        [],
        "Responses of one or more models to compare: AlpacaEval JSON files, or candidates datasets.",
        group=INPUT_OUTPUT,
        path=True,
        affects_output=False,
    )
    baseline: str | None = config.setting(
        None,
        "Responses to compare with (file or dataset). Without it, all pairs of --responses are compared.",
        group=INPUT_OUTPUT,
        path=True,
        affects_output=False,
    )
    annotations: list[str] = config.setting(
        [],
        "Existing AlpacaEval annotation files, instead of responses; nothing is judged.",
        group=INPUT_OUTPUT,
        path=True,
        affects_output=False,
    )
    gamed_baselines: Path | None = config.setting(
        None,
        "AlpacaEval's df_gamed.csv, for its length-controlled win rate. Without this file, the rate comes from the same "
        "regression without difficulty and without regularization to baselines.",
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
        ["judge"], f"Reward models that judge: any of {', '.join(REWARD_MODELS)}.", group=REWARDS
    )
    rows_per_part: Positive = config.setting(64, "Input rows per part.", group=RARE)

    @model_validator(mode="after")
    def _has_something_to_compare(self) -> EvalWinrateSettings:
        if bool(self.annotations) == bool(self.responses):
            raise ValueError("give either --responses to judge, or existing --annotations")
        if self.responses and not self.model:
            raise ValueError("--responses need a judge: give --model")
        if self.responses and not self.baseline and len(self.responses) < 2:
            raise ValueError("one file of --responses needs a --baseline to compare with")
        return self


class EvalResponsesSettings(SamplingSettings):
    n: ClassVar[int] = 1  # evaluators read one response per prompt

    temperature: float = config.setting(
        0.7, "Sampling temperature; 0 is greedy.", group=SAMPLING, ge=0
    )
    generator: str = config.setting(
        "scir", "Name of the model in responses.json.", group=INPUT_OUTPUT
    )


class EvalMtBenchSettings(SamplingSettings, ReportSettings):
    n: ClassVar[int] = 1  # one answer per turn
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
    temperature: float | None = config.setting(  # type: ignore[assignment]  # None is no temperature of `generate`: this stage chooses one
        None,
        "Sampling temperature. Default: FastChat's for the question's category.",
        group=SAMPLING,
        ge=0,
    )
    max_new_tokens: Positive = config.setting(
        1024, "Maximum number of tokens per response.", group=SAMPLING
    )

    @model_validator(mode="after")
    def _has_answers_and_a_judge(self) -> EvalMtBenchSettings:
        if bool(self.model) == bool(self.answers):
            raise ValueError("give either --model to answer the questions, or existing --answers")
        if self.answers and not self.judge:
            raise ValueError("--answers need a model that grades: give --judge")
        return self
