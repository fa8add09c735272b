"""Every setting, its default and its help text, once. The command line, recipes and plans are made from these classes.

Precedence: defaults < recipe or --config file < flags and `name=value` arguments. An unknown name is an error with a suggestion.
Defaults marked [ours] in docs/method.md are our reconstruction and not the paper's.
"""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator, ValidationError, field_validator, model_validator

from scir_cli import plugins
from scir_cli.errors import ConfigError, install_hint, suggest
from scir_cli.places import is_remote, place

REWARD_MODELS = ("judge", "implicit", "rubric", "rationale", "likelihood", "pmi", "external")


def _reward_model(name: str) -> str:
    """A built-in name, or "module:Class", which is not imported here; raises ValueError for anything else."""
    if name not in REWARD_MODELS and not plugins.is_target(name):
        raise ValueError(
            f"no such reward model.{suggest(name, REWARD_MODELS)} A class of your own is written my_package.my_module:Class"
        )
    return name


RewardModelName = Annotated[str, AfterValidator(_reward_model)]

#: Marks a setting that cannot change a row: it stays out of the plan, so a stopped run may go on with another value.
FREE: dict[str, Any] = {"free": True}


def setting(default: Any, help: str, *, free: bool = False, **limits: Any) -> Any:
    return Field(default, description=help, json_schema_extra=FREE if free else None, **limits)


Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(ge=0, le=1)]


def _workers(value: Any) -> int | str:
    if value == "auto":
        return "auto"
    if isinstance(value, bool) or not str(value).isdecimal() or not int(value):
        raise ValueError("it takes a number of at least 1, or auto")
    return int(value)


def _members(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself; `Annotated` is looked through."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return tuple(m for member in get_args(annotation) for m in _members(member))
    return (annotation,)


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _words(cls, value: Any, info: Any) -> Any:
        """Text from a command line: "null" is no value, and a list is written with commas."""
        if not isinstance(value, str):
            return value
        if value.lower() in ("null", "none") and cls.model_fields[info.field_name].default is None:
            return None
        listed = any(get_origin(kind) in (list, tuple) for kind in _members(cls.model_fields[info.field_name].annotation))
        return [word.strip() for word in value.split(",") if word.strip()] if listed else value

    def plan(self) -> dict[str, Any]:
        """The settings that determine the rows, JSON-ready; of a file, a digest of what it holds. Inputs and models have their own."""
        free = {name for name, info in type(self).model_fields.items() if info.json_schema_extra == FREE}
        plan = self.model_dump(mode="json", exclude=free)
        files = {name: value for name, value in self if name in plan and isinstance(value, Path) and value.is_file()}
        return plan | {
            name: f"a file of digest {hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()}"
            for name, path in files.items()
        }


class StageSettings(Settings):
    output_dir: Annotated[Path, PlainValidator(place)] = setting(
        ..., "Folder to write, or a URL (s3://…); the same settings resume it.", free=True
    )
    seed: int = setting(0, "Seed of everything random.")
    limit: Positive | None = setting(None, "Use the first N input rows only.")
    overwrite: bool = setting(False, "Replace what the output folder holds.", free=True)
    dry_run: bool = setting(False, "Check inputs and settings, say what would be done, write nothing.", free=True)

    @model_validator(mode="after")
    def _spares_its_inputs(self) -> StageSettings:
        """--overwrite would delete an input, or the model behind an adapter, that is or lies in the output folder."""
        from scir_cli import model_sources

        out = self.output_dir.resolve()
        for name in (
            "input",
            "model",
            "reward_reference",
            "validation",
            "anchors",
            "previous",
            "responses",
            "baseline",
            "annotations",
            "against",
            "answers",
            "judge",
            "chat_template",
            "judge_prompt",
            "rationale_prompt",
            "rubric_prompt",
        ):
            given = getattr(self, name, None) or ""
            for spec in given if isinstance(given, list) else str(given).split("|"):
                base = model_sources.named_base(place(spec.strip())) if spec.strip() else None
                for what, one in ((name, spec.strip()), (f"the base model of {name} {spec.strip()},", base)):
                    path = place(one or "").resolve()
                    if one and path.exists() and (path == out or out in path.parents):
                        raise ValueError(f"output_dir {self.output_dir} is or holds {what} {one}; choose another folder")
        return self


class ReportSettings(StageSettings):
    report: Path | None = setting(None, "Also write the results as one self-contained HTML page, FILE.html.", free=True)

    @field_validator("report")
    @classmethod
    def _can_be_written(cls, value: Path | None) -> Path | None:
        if value and (problem := report_problem(value)):
            raise ValueError(problem)
        return value


def report_problem(path: Path) -> str | None:
    """What would keep a page from being written there, known before the work and not after it."""
    if find_spec("matplotlib") is None:
        return f"a report needs the package matplotlib: {install_hint('report')}"
    return "a report is a file, and this is a folder; name a FILE.html" if path.is_dir() else None


class ModelSettings(StageSettings):
    model: str = setting(
        ...,
        "Model folder, hub id, or package:NAME (a GGUF file in a pip package); 'a | b' takes the first that can be had.",
        free=True,
    )
    dtype: Literal["auto", "bf16", "fp32"] = setting(
        "auto", "Precision of the forward pass; auto is bf16 where the hardware has it."
    )
    quantization: Literal["none", "4bit"] = setting(
        "none", "Hold the weights in 4 bits (NF4, bitsandbytes); training then needs --lora-rank: QLoRA."
    )
    device: str = setting("auto", "auto, cpu, cuda, cuda:1 …", free=True)
    trust_remote_code: bool = setting(False, "Run code that comes with the model.", free=True)
    chat_template: Path | None = setting(None, "Jinja file to use in place of the model's chat template.")
    max_tokens_per_pack: Positive = setting(16384, "Tokens in one forward pass, packed without padding.", free=True)


class RewardSettings(ModelSettings):
    reward_models: list[RewardModelName] = setting(
        ["judge", "implicit"], f"Internal reward models, of: {', '.join(REWARD_MODELS)}; or module:Class of your own."
    )
    reward_reference: str | None = setting(
        None, "Frozen model that defines the implicit reward: the SFT model, not the model itself.", free=True
    )
    implicit_beta: float = setting(0.1, "beta of the implicit reward.", gt=0)
    implicit_scale: float = setting(5.0, "s: factor on the implicit log-odds, to bring them to the judge's scale.", gt=0)
    length_control: Literal["sum", "mean", "penalty"] = setting(
        "sum", "Length control of the implicit reward: sum, mean per token, or sum - alpha * tokens."
    )
    length_alpha: float = setting(0.0, "alpha of --length-control penalty, nats a token.")
    rubric_scale: float = setting(1.0, "Log-odds per rubric point.", gt=0)
    likelihood_scale: float = setting(1.0, "Factor on the mean log-probabilities of likelihood and pmi.", gt=0)
    judge_prompt: Path | None = setting(None, "Text file with {question}, {a} and {b}: the pairwise judge's prompt.")
    rationale_prompt: Path | None = setting(None, "The same, for the judge that gives its reasons first.")
    rubric_prompt: Path | None = setting(None, "Text file with {question} and {response}: asks for a score from 0 to 5.")
    verdict_tokens: tuple[str, str] = setting(("A", "B"), "The judge's two verdicts; each must be one token.")
    min_verdict_mass: Rate = setting(0.0, "Below this P(A)+P(B) the judge gives no verdict (null).")
    rationale_max_tokens: Positive = setting(128, "Tokens of a written rationale, at most.")
    rationale_batch_size: Positive = setting(16, "Rationales written at a time.", free=True)
    external: str | None = setting(
        None, "Column of log-odds, or two columns 'CHOSEN,REJECTED' (for candidates: one column) of scores."
    )

    @model_validator(mode="after")
    def _needs(self) -> RewardSettings:
        if not self.reward_models:
            raise ValueError("reward_models is empty; name at least one")
        if len(set(self.reward_models)) < len(self.reward_models):
            raise ValueError(f"reward_models names one model twice: {', '.join(self.reward_models)}")
        if "external" in self.reward_models and not self.external:
            raise ValueError("reward model 'external' needs --external COLUMN")
        return self

    def plan(self) -> dict[str, Any]:
        """As of all settings; a reward model of the user's own with a digest of its source file."""
        return super().plan() | {"reward_models": [plugins.with_digest(name) for name in self.reward_models]}


class BackendSettings(ModelSettings):
    backend: str = setting(
        "transformers",
        "Who samples: transformers, vllm, openai (an endpoint), auto (vllm where it is installed and a GPU is there), or module:Class of your own.",
    )
    tensor_parallel_size: Positive = setting(1, "vLLM: GPUs that hold one copy of the model.", free=True)
    gpu_memory_utilization: float | None = setting(None, "vLLM: share of a GPU's memory it may take.", free=True, gt=0, le=1)
    max_model_len: Positive | None = setting(
        None, "vLLM: positions it makes room for; longer rows are dropped. The model's own by default."
    )
    data_parallel: Annotated[int | str, PlainValidator(_workers)] = setting(
        1,
        "Workers that share the parts, each with a GPU (or --tensor-parallel-size GPUs) of its own; auto: as many as there are GPUs for, on a CPU 1.",
        free=True,
    )
    executor: Literal["local", "ray"] = setting(
        "local",
        "Where those workers run: processes of this machine, or actors of a Ray cluster (a local one where none is there).",
        free=True,
    )
    engine_arg: list[str] = setting([], "vLLM: more of its engine's arguments, as enforce_eager=true,max_num_seqs=64.")
    base_url: str | None = setting(
        None, "openai: the endpoint, as http://localhost:8000/v1; its key is read from OPENAI_API_KEY.", free=True
    )
    served_model: str | None = setting(None, "openai: the model's name there, where it serves several.", free=True)
    endpoint_retries: int = setting(
        6, "openai: tries after the first, from 0.5 s apart and twice as far each time.", free=True, ge=0
    )
    endpoint_timeout: float = setting(600.0, "openai: seconds to wait for an answer.", free=True, gt=0)
    top_logprobs: Positive = setting(
        20, "openai: likeliest tokens a verdict is looked for among, where the endpoint cannot be asked for a token by its id."
    )


class GenerateSettings(BackendSettings):
    input: str = setting(..., "Prompts: a dataset folder, JSONL, Parquet, CSV or hub id.", free=True)
    n: Positive = setting(5, "Responses sampled for each prompt.")
    temperature: float = setting(0.8, "Sampling temperature; 0 is greedy.", ge=0)
    top_p: float = setting(0.95, "Nucleus sampling: keep the smallest set of tokens with this probability.", gt=0, le=1)
    max_new_tokens: Positive = setting(512, "Tokens of a response, at most.")
    system_prompt: str | None = setting(None, "System turn put before each prompt.")
    batch_size: Positive = setting(16, "Responses sampled at a time.", free=True)
    rows_per_part: Positive = setting(64, "Prompts a part; a stopped run loses the part at work.")

    @model_validator(mode="after")
    def _greedy(self) -> GenerateSettings:
        if self.temperature == 0 and self.n > 1:
            raise ValueError(f"temperature 0 gives the same response {self.n} times; use --n 1 or a temperature above 0")
        return self


class JudgeSettings(RewardSettings, BackendSettings):
    backend: str = setting(
        "transformers",
        "Who reads verdicts and writes rationales: as in generate. Log-probabilities of answers come from the engine in any case.",
    )
    input: str = setting(..., "Candidates, or pairs (prompt, chosen, rejected; their labels are kept as gold).", free=True)
    pairs: str = setting(
        "all",
        "Pairs of each prompt's candidates: all, best-worst (by the first reward model), random:K; or cross: each beside an answer to another prompt.",
    )
    rows_per_part: Positive = setting(64, "Input rows a part; a stopped run loses the part at work.")


class CheckConsistencySettings(ReportSettings):
    input: str = setting(..., "A judged dataset.", free=True)
    min_confidence: float = setting(0.5, "Pairs agree only where every model is at least this sure.", ge=0.5, lt=1)
    agree_on: list[str] | None = setting(None, "Reward models that have to agree; all by default.")
    by_subset: bool = setting(False, "Figures for each value of the subset column, too.", free=True)
    against: list[str] = setting(
        [], "The same pairs judged again (another iteration, judge prompt or seed): what stays of each verdict and rank.", free=True
    )
    own: str | None = setting(
        None, "Author whose responses are the judge's own, for self-preference; the model that judged, by default."
    )
    fail_under: Rate | None = setting(None, "Exit with status 1 when the agreement rate is below this.", free=True)
    rows_per_part: Positive = setting(50_000, "Rows a part.")


class FilterSettings(StageSettings):
    input: str = setting(..., "A judged dataset.", free=True)
    rule: str = setting(
        "agree", "Who labels: agree, majority, random:RATE (labels of --random-label), or the name of a reward model."
    )
    random_label: str = setting("judge", "Reward model that labels under --rule random:RATE.")
    length_neutral: bool = setting(
        False, "Take as much per token out of the log-odds that label as makes chosen and rejected equally long (DICE)."
    )
    previous: str | None = setting(
        None, "The same pairs judged by the previous model: labels are as certain as the two models rank alike (CREAM).", free=True
    )
    previous_model: str | None = setting(None, "Reward model of --previous; the one that labels by default.")
    certainty: Literal["average", "prompt"] = setting("average", "Certainty from --previous: one for all, or one a prompt.")
    agree_on: list[str] | None = setting(None, "Reward models that have to agree; all by default.")
    min_margin: float = setting(0.0, "Smallest |log-odds| in nats of the models that label.", ge=0)
    min_confidence: float = setting(0.5, "Smallest confidence max(p, 1-p) of the models that label.", ge=0.5, lt=1)
    min_response_tokens: int = setting(0, "Drop pairs with a shorter response.", ge=0)
    max_response_tokens: Positive | None = setting(None, "Drop pairs with a longer response.")
    max_pairs_per_prompt: Positive | None = setting(None, "Keep this many pairs of a prompt, largest margin first.")
    dedup: bool = setting(True, "Drop pairs whose two texts were seen before under the same prompt.")
    keep_unlabelled: bool = setting(False, "Keep pairs without a label: SCIR's penalty uses them.")
    format: Literal["scir", "trl"] = setting("scir", "trl: also write OUT/trl.jsonl with prompt, chosen, rejected.")
    rows_per_part: Positive = setting(50_000, "Rows a part.")


def entropy_ceiling(n_models: int) -> float:
    """The entropy weight from which small disagreements of K models grow by themselves.  2K/(K-1): 4 for two models, 3 for three"""
    return 2 * n_models / (n_models - 1)


class LoraSettings(Settings):
    rank: int = setting(0, "Rank of LoRA adapters; 0 trains all weights.", ge=0)
    alpha: int = setting(16, "LoRA alpha.", ge=1)
    target_modules: str = setting("all-linear", "Modules with adapters, a peft name or regular expression.")


class TrainSettings(RewardSettings, ReportSettings):
    objective: Literal["sft", "dpo", "scir"] = setting(
        "scir", "sft: teach to answer and to judge; dpo: labelled pairs; scir: penalty and dynamic mask."
    )
    input: str = setting(..., "Preferences or judged pairs (scir), labelled pairs (sft, dpo).", free=True)
    validation: str | None = setting(None, "Labelled pairs on which each reward model is watched.", free=True)
    validation_every: Positive = setting(50, "Optimiser steps between two looks at the validation pairs.")

    learning_rate: float = setting(5e-7, "Peak learning rate.", gt=0)
    num_epochs: Positive = setting(1, "Passes over the data.")
    max_steps: Positive | None = setting(None, "Stop after this many optimiser steps.")
    batch_size: Positive = setting(32, "Pairs in an optimiser step; --max-tokens-per-pack says how many at a time.")
    max_tokens_per_step: Positive | None = setting(
        None, "Tokens in an optimiser step, in place of --batch-size: as many pairs as fit."
    )
    max_tokens_per_pack: Positive = setting(
        8192, "Tokens in one forward and backward pass, packed without padding; halved where memory runs out.", free=True
    )
    schedule: Literal["cosine", "linear", "constant"] = setting("cosine", "Learning rate after warm-up.")
    warmup_ratio: Rate = setting(0.1, "Share of steps with a rising learning rate.")
    weight_decay: float = setting(0.0, "AdamW weight decay.", ge=0)
    max_grad_norm: float = setting(1.0, "Gradient norm is clipped to this.", gt=0)
    gradient_checkpointing: bool = setting(False, "Recompute activations in the backward pass: less memory, more time.", free=True)
    compile: bool = setting(False, "Compile the model's layers (torch.compile): half a minute or more at the start.", free=True)
    lora: LoraSettings = setting(LoraSettings(), "Low-rank adapters.")

    preference_loss: Literal["dpo", "ipo", "simpo", "sppo"] = setting("dpo", "Loss of a labelled (or agreed) pair.")
    beta: float = setting(0.1, "beta of the preference loss (dpo, simpo); tau of ipo; 1/eta of sppo.", gt=0)
    target_margin: float = setting(0.0, "gamma of simpo: the margin it wants, after beta.", ge=0)
    penalty: Literal["symmetric_kl", "entropy_of_mean", "agreement_likelihood"] = setting(
        "symmetric_kl", "Form of the inconsistency penalty."
    )
    # scale and penalty_ratio: docs/study.md, experiments main, sweep and real; lambda 1 at an implicit scale of 5 let the policy feed on its own mistakes
    penalty_weight: float | None = setting(
        None, "lambda: weight of the inconsistency penalty; found by --penalty-ratio where none is given.", ge=0
    )
    penalty_ratio: float = setting(
        2.0, "lambda such that the penalty's gradient begins as this many times the preference loss's; kept over iterations.", gt=0
    )
    penalty_schedule: Literal["constant", "rising", "falling"] = setting(
        "constant", "lambda over the steps: as it is, from 0 up to it, or from it down to 0."
    )
    entropy_weight: float = setting(
        0.1, "alpha: weight of the entropy in the penalty; from 2K/(K-1) on for K models, disagreement would grow by itself.", ge=0
    )
    confidence_threshold: float = setting(0.5, "tau: DPO uses a pair only where every model is at least this sure.", ge=0.5, lt=1)
    entropy_floor: float = setting(0.05, "Nats; the entropy term stops pushing a verdict below this.", ge=0)
    orders: Literal["separate", "averaged", "forward"] = setting(
        "separate", "The judge's two orders as two reward models, as their average, or the first order only."
    )
    voters: Literal["averaged", "each", "judge"] = setting(
        "averaged",
        "The dynamic mask asks the order-averaged judge and the implicit reward, each reward model of the penalty, or the judge alone.",
    )
    stop_gradient: str = setting("none", "Reward model that the penalty does not train, by the name of its verdicts.")
    scale: Literal["fixed", "fitted", "running"] = setting(
        "fitted",
        "s such that the implicit log-odds have the judge's median size, on the first iteration's data or in every step; or --implicit-scale, where that is given.",
    )
    balance: bool = setting(False, "Divide the penalty's gradient through the implicit reward by its scale s.")
    anchors: str | None = setting(
        None,
        "Labelled pairs mixed into SCIR's steps, on whose verdicts the judge goes on being taught so that it does not drift.",
        free=True,
    )
    anchor_weight: float = setting(1.0, "Weight of the verdict's loss on --anchors.", ge=0)
    sft_response_weight: float = setting(1.0, "sft: weight of the chosen response's mean token loss.", ge=0)
    sft_judge_weight: float = setting(1.0, "sft: weight of the verdict's loss, both orders.", ge=0)

    num_processes: Positive = setting(
        1, "Processes on this machine, one a GPU; 1 also where torchrun or accelerate launch has started them.", free=True
    )
    sharding: Literal["ddp", "fsdp"] = setting(
        "ddp",
        "Each process holds the whole model, or a shard of it (FSDP2); accelerate's DeepSpeed plugin replaces both.",
        free=True,
    )
    cpu_offload: bool = setting(
        False, "Keep sharded weights and optimizer state in CPU memory (fsdp): slower, for models that do not fit.", free=True
    )
    save_every: Positive = setting(100, "Optimiser steps between checkpoints.", free=True)
    branch_gradients: bool = setting(
        True, "Log the gradient norm of each branch at each validation (not under DeepSpeed).", free=True
    )
    report_to: list[str] = setting([], "Trackers known to accelerate: tensorboard, wandb, trackio, mlflow …", free=True)

    @model_validator(mode="before")
    @classmethod
    def _given_scale(cls, values: Any) -> Any:
        """A number that is given is meant."""
        return {"scale": "fixed", **values} if "implicit_scale" in values else values

    @model_validator(mode="after")
    def _quantised(self) -> TrainSettings:
        if self.quantization != "none" and (not self.lora.rank or self.sharding == "fsdp"):
            raise ValueError(
                f"quantization {self.quantization} trains adapters only, each process with the whole model: set lora.rank and sharding ddp"
            )
        return self

    @model_validator(mode="after")
    def _here(self) -> TrainSettings:
        if is_remote(self.output_dir):
            raise ValueError(f"a model is written to a folder, and output_dir is {self.output_dir}; datasets may be URLs")
        return self

    @model_validator(mode="after")
    def _offload(self) -> TrainSettings:
        if self.cpu_offload and self.sharding != "fsdp":
            raise ValueError("cpu_offload is of sharded weights: set sharding fsdp and num_processes")
        return self

    @model_validator(mode="after")
    def _sft(self) -> TrainSettings:
        if (
            self.objective == "sft"
            and not self.sft_response_weight
            and not (self.sft_judge_weight and "judge" in self.reward_models)
        ):
            raise ValueError(
                "sft has nothing to teach: sft_response_weight and sft_judge_weight are both 0 (or 'judge' is not among reward_models)"
            )
        return self

    @model_validator(mode="after")
    def _guards(self) -> TrainSettings:
        # A bound without importing the classes: the judge's two orders count; training checks again with those of all models.
        ceiling = entropy_ceiling(max(2, len(self.reward_models) + (self.orders == "separate")))
        if self.objective == "scir" and self.entropy_weight >= ceiling:
            raise ValueError(
                f"entropy_weight is {self.entropy_weight}; from {ceiling:g} on (--orders {self.orders}), the penalty rewards confident disagreement. "
                f"Use less than {ceiling:g}, 0.1 is the default"
            )
        if self.objective == "scir" and not {"judge", "implicit"} <= set(self.reward_models) - {"external"} == set(
            self.reward_models
        ):
            raise ValueError(
                "objective scir trains the reward models 'judge' and 'implicit' together, and other internal ones beside them; "
                f"got {', '.join(self.reward_models)}"
            )
        return self


class EvalRewardsSettings(RewardSettings, ReportSettings):
    input: str = setting(
        ..., "Labelled pairs (prompt, chosen, rejected), or a judged dataset, whose verdicts are then used as they are.", free=True
    )
    model: str = setting("", "Model folder, hub id or package:NAME; not needed where the input is already judged.", free=True)
    rows_per_part: Positive = setting(64, "Input rows a part.")


class EvalWinrateSettings(RewardSettings, ReportSettings):
    responses: list[str] = setting(
        [], "Responses of the model under test, or of several: AlpacaEval's JSON lists, or candidates datasets.", free=True
    )
    baseline: str | None = setting(
        None, "Responses to compare with, of the same form; without it, every two of --responses are compared.", free=True
    )
    annotations: list[str] = setting([], "AlpacaEval annotations that exist, in place of responses: nothing is judged.", free=True)
    gamed_baselines: Path | None = setting(
        None,
        "AlpacaEval's df_gamed.csv, for its length-controlled rate; without it, the rate is the same GLM's without difficulty and regularisation to baselines.",
        free=True,
    )
    model: str = setting("", "The judge: model folder, hub id or package:NAME; not needed with --annotations.", free=True)
    reward_models: list[RewardModelName] = setting(["judge"], "Who judges.")
    rows_per_part: Positive = setting(64, "Input rows a part.")

    @model_validator(mode="after")
    def _something_to_compare(self) -> EvalWinrateSettings:
        if bool(self.annotations) == bool(self.responses):
            raise ValueError("give --responses to be judged, or --annotations that exist, and not both")
        if self.responses and not self.model:
            raise ValueError("--responses need a judge: give --model")
        if self.responses and not self.baseline and len(self.responses) < 2:
            raise ValueError("one file of --responses needs a --baseline to compare with")
        return self


class EvalResponsesSettings(GenerateSettings):
    n: Positive = setting(1, "Responses sampled for each prompt: evaluators take one.", le=1)
    temperature: float = setting(0.7, "Sampling temperature; 0 is greedy.", ge=0)
    generator: str = setting("scir", "Name of the model in the file.")


class EvalMtBenchSettings(GenerateSettings, ReportSettings):
    input: str = setting(..., "Questions of one turn or more: FastChat's question.jsonl.", free=True)
    model: str = setting("", "Model that answers; not needed with --answers.", free=True)
    answers: str | None = setting(None, "Answers that exist (FastChat's model_answer file), in place of --model.", free=True)
    judge: str | None = setting(None, "Model that grades; --model itself by default.", free=True)
    n: Positive = setting(1, "Responses sampled for each turn.", le=1)
    temperature: float | None = setting(  # type: ignore[assignment]  # None is no temperature of `generate`: this stage chooses one
        None, "Sampling temperature; FastChat's for the question's category by default.", ge=0
    )
    max_new_tokens: Positive = setting(1024, "Tokens of a response, at most.")

    @model_validator(mode="after")
    def _someone(self) -> EvalMtBenchSettings:
        if bool(self.model) == bool(self.answers):
            raise ValueError("give --model to answer the questions, or --answers that exist, and not both")
        if self.answers and not self.judge:
            raise ValueError("--answers need a model that grades: give --judge")
        return self


def fields(settings: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Every setting by its dotted name (`lora.rank`), with its pydantic field."""
    found: dict[str, Any] = {}
    for name, info in settings.model_fields.items():
        nested = isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)
        found |= fields(info.annotation, f"{prefix}{name}.") if nested else {prefix + name: info}  # type: ignore[arg-type]
    return found


def build(settings: type[Settings], *layers: dict[str, Any], where: str) -> Any:
    """Settings from layers of values, later ones winning; names may be dotted, nested, kebab- or snake-case.

    Raises ConfigError with every mistake in one report, each named with its value.
    """
    known = fields(settings)
    merged: dict[str, Any] = {}
    problems = []
    for layer in layers:
        for name, value in flatten(layer, known).items():
            if name in known:
                merged[name] = value
            else:
                problems.append(f"{where}: unknown setting '{name}'.{suggest(name, known)}")
    nested: dict[str, Any] = {}
    for name, value in merged.items():
        at = nested
        *path, last = name.split(".")
        for step in path:
            at = at.setdefault(step, {})
        at[last] = value
    try:
        result = settings.model_validate(nested)
    except ValidationError as error:
        problems += [f"{where}: {_explain(item)}" for item in error.errors()]
    if problems:
        raise ConfigError("\n".join(problems))
    return result


def flatten(layer: dict[str, Any], known: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in layer.items():
        name = prefix + str(key).replace("-", "_")
        inner = isinstance(value, dict) and any(k.startswith(name + ".") for k in known)
        flat |= flatten(value, known, name + ".") if inner else {name: value}
    return flat


def _explain(item: Any) -> str:
    name = ".".join(str(part) for part in item["loc"])
    if item["type"] == "missing":
        return f"'{name}' is missing; give --{name.replace('_', '-').replace('.', '-')}"
    message = item["msg"].removeprefix("Value error, ")
    return f"'{name}' is {item['input']!r}: {message}" if name else message


def takes(info: Any) -> str:
    """What a setting takes, for help texts: `a|b` for choices, INTEGER, NUMBER, PATH, LIST or TEXT."""
    member = next(m for m in _members(info.annotation) if m is not NoneType)
    if get_origin(member) is Literal:
        return "|".join(get_args(member))
    if get_origin(member) in (list, tuple):
        return "A,B,…"
    return {int: "INTEGER", float: "NUMBER", Path: "PATH"}.get(member, "TEXT")
