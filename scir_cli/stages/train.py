"""train: pairs -> a model folder.

The dataset holds the reference log-probabilities, so the training loop needs no second model.
The steps, in order:

- open: rows, models, objective and plan; refuses settings that cannot work
- estimate (--dry-run): tokens, memory and time, and nothing else
- claim: the output folder
- encode: rows -> examples with token ids
- add_reference_logps: log-probabilities under the frozen models, from the cache if it has them
- fit: the trainer, with scale and lambda fitted to the pairs
- train, write: the loop; the model folder
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from scir_cli import config
from scir_cli.data import dataset, folders, manifests, readers
from scir_cli.data.files import Json
from scir_cli.data.storage import is_remote, to_path
from scir_cli.engine import checkpoints, distributed, hardware, model_files
from scir_cli.engine.distributed import DistributedContext
from scir_cli.engine.lazy_policy import LazyPolicy
from scir_cli.engine.policy import Policy
from scir_cli.errors import ConfigError, warn
from scir_cli.recipe import Step
from scir_cli.report import html
from scir_cli.report.progress import progress
from scir_cli.report.training_view import View, watching
from scir_cli.rewards.pairs import Pair, warn_of_foreign_ids
from scir_cli.rewards.references import add_missing_logps, open_reward_reference
from scir_cli.settings import TrainSettings
from scir_cli.training import adapters, dry_run, fitting, objectives, trackers
from scir_cli.training.consensus import Consensus, warn_of_hard_labels
from scir_cli.training.examples import (
    Encoded,
    PairRows,
    encode_examples,
    load_labeled_rows,
    load_training_rows,
)
from scir_cli.training.model_folder import write_model_folder
from scir_cli.training.objectives import Example, Metrics, Objective
from scir_cli.training.trainer import Trainer
from scir_cli.training.validation import ValidationMetrics

#: A larger entropy weight gets a warning.
LARGE_ENTROPY_WEIGHT = 0.5

#: Number of pairs scored between two updates of the progress bar.
REFERENCE_ROWS = 256


def run(settings: TrainSettings) -> Json:
    """Trains, writes a model folder and returns its manifest; counts are in pairs.

    Raises ConfigError, DataError or ModelError if the settings, rows or models cannot be used.
    """
    if settings.num_processes > 1 and "WORLD_SIZE" not in os.environ and not settings.dry_run:
        return _launch(settings)
    ranks = DistributedContext(hardware.resolve_device(settings.device).startswith("cuda"))
    try:
        manifest = run_rank(settings, ranks)
        if ranks.is_main and not settings.dry_run:
            html.write_for("train", settings)
        return manifest
    finally:
        ranks.close()


def _launch(settings: TrainSettings) -> Json:
    """Runs the same command in settings.num_processes processes; returns their manifest."""
    values = settings.model_dump(exclude_unset=True)
    values.pop("num_processes")
    step = Step("train", config.flatten(values, config.fields(TrainSettings)))
    distributed.launch(step.arguments, settings.num_processes)
    return manifests.read(settings.output_dir)


def run_rank(settings: TrainSettings, ranks: DistributedContext) -> Json:
    """Runs the whole stage in one of its processes and returns the manifest."""
    job = TrainJob.open(settings, ranks)
    if settings.dry_run:
        return job.estimate()
    with job.claim() as finished:
        if finished is not None:
            return {**finished, "reused": True}
        data = job.encode()
        job.add_reference_logps(data)
        trainer = job.fit(data)
        metrics = job.train(trainer)
        return job.write(trainer, data.account, metrics)


@dataclass(frozen=True)
class TrainData:
    """The encoded pairs of a training run.

    examples: pairs to train on, including the anchors.
    validation: pairs to measure on.
    """

    examples: list[Example]
    validation: list[Example]
    # Name of the setting -> the pairs that it names
    sources: dict[str, Encoded]

    @property
    def account(self) -> Json:
        """Rows in, rows out and drops over everything that is read, as the manifest holds them.

        With more than one source, those of each source too.
        """
        sources = self.sources.values()
        examples = [example for source in sources for example in source.examples]
        drops = sum((source.drops for source in sources), Counter[str]())
        again = sum(source.encoded_again for source in sources)
        account = Encoded(examples, drops, again).account
        if len(self.sources) > 1:
            account["sources"] = {name: source.account for name, source in self.sources.items()}
        return account


@dataclass(frozen=True)
class TrainJob:
    """A training run: its rows, its models and its plan.

    reference: the reward reference, if the objective reads the implicit reward.
    objective: counts branches and fits the scale; training uses another one, with fitted settings.
    fitted: the scale and lambda that an earlier iteration fitted and this one keeps.
    """

    settings: TrainSettings
    ranks: DistributedContext
    rows: PairRows
    policy: LazyPolicy
    reference: LazyPolicy | None
    objective: Objective
    fitted: dict[str, float]
    plan: Json

    @classmethod
    def open(cls, settings: TrainSettings, ranks: DistributedContext) -> TrainJob:
        """Reads the rows, opens the models without their weights, and makes the plan.

        Raises ConfigError, DataError or ModelError if settings, rows or models cannot be used.
        """
        trackers.check(settings.report_to)
        check_deepspeed(settings, ranks)
        rows = load_training_rows(settings.input, settings.limit)
        digests: Json = {"input": readers.digest(settings.input)}
        for name, spec in (("validation", settings.validation), ("anchors", settings.anchors)):
            digests[name] = spec and readers.digest(spec)
        is_scir = settings.objective == "scir"
        reads_implicit = is_scir and not settings.learns_consensus
        if is_scir and settings.entropy_weight > LARGE_ENTROPY_WEIGHT:
            warn(
                f"--entropy-weight {settings.entropy_weight:g} is large: "
                "it makes arbitrary verdicts confident. The default is 0.1"
            )
        sharding: Json = {}
        if ranks.shards_weights or (ranks.size > 1 and settings.sharding == "fsdp"):
            sharding = {"ranks": ranks, "cpu_offload": settings.cpu_offload}
        adapt = partial(adapters.add_adapters, settings=settings) if settings.lora.rank else None
        policy = LazyPolicy(settings, settings.model, adapt=adapt, **sharding)
        reference = (
            open_reward_reference(settings, policy, ["implicit"], **sharding)
            if reads_implicit
            else None
        )
        reward_key = reference.weights_key if reference else None
        fitted = fitting.load_fitted_values(policy.path, settings, reward_key) if is_scir else {}
        plan = {
            "stage": "train",
            "settings": settings.plan(),
            **digests,
            "model": policy.weights_key,
            "reward_reference": reward_key,
        }
        if fitted:
            plan["kept"] = fitted
        objective = build_objective(settings, policy, reward_key)
        if isinstance(objective, objectives.Scir):
            objectives.check_scir(settings, objective.models)
        return cls(settings, ranks, rows, policy, reference, objective, fitted, plan)

    @property
    def reward_key(self) -> str | None:
        """Weights key of the reward reference, if there is one."""
        return self.reference.weights_key if self.reference else None

    def estimate(self) -> Json:
        """Returns the plan and an estimate of tokens, memory and time; writes nothing."""
        data = self.encode()
        estimate = dry_run.estimate(
            self.policy.load(), data.examples, self.settings, self.objective
        )
        account = data.account
        del account["rows_out"]
        return {"dry_run": True, "plan": self.plan, **account, "estimate": estimate}

    @contextmanager
    def claim(self) -> Iterator[Json | None]:
        """Claims the output folder for this plan.

        Yields the manifest if the plan is already finished, else None.
        """
        out = Path(self.settings.output_dir)
        with (
            folders.claim_folder(out, self.plan, self.settings.overwrite)
            if self.ranks.is_main
            else nullcontext() as finished
        ):
            yield self.ranks.broadcast_from_main(finished)

    def encode(self) -> TrainData:
        """The rows with token ids. Raises DataError if a source has none that can be used."""
        sources = {"input": self._encode_input()}
        for name in ("anchors", "validation"):
            spec = getattr(self.settings, name)
            if spec is not None:
                rows = load_labeled_rows(spec)
                sources[name] = encode_examples(rows, self.objective, self.policy, labeled=True)
        if self.ranks.is_main:
            for name, source in sources.items():
                spec = getattr(self.settings, name)
                warn_of_foreign_ids(source.account, spec, self.settings.model)
        anchors = sources.get("anchors", Encoded())
        validation = sources.get("validation", Encoded())
        examples = [*sources["input"].examples, *anchors.examples]
        return TrainData(examples, validation.examples, sources)

    def _encode_input(self) -> Encoded:
        # SCIR makes labels of its own, unless its target is the consensus that the data hold.
        labeled = self.settings.objective != "scir" or self.settings.learns_consensus
        encoded = encode_examples(self.rows, self.objective, self.policy, labeled=labeled)
        if self.settings.learns_consensus and self.ranks.is_main:
            warn_of_hard_labels(encoded.examples)
        return encoded

    def add_reference_logps(self, data: TrainData) -> None:
        """Adds log-probabilities under the frozen models to every pair.

        The reward reference is then unloaded from memory.
        """
        pairs = [example.pair for example in [*data.examples, *data.validation]]
        if self.reference:
            add_reference_logps(pairs, self.reference, self.settings, self.ranks)
        # The policy before its first step is the reference of the preference loss.
        if self.settings.objective != "sft":
            add_reference_logps(pairs, self.policy, self.settings, self.ranks)
        if self.reference:
            self.reference.unload()

    def fit(self, data: TrainData) -> Trainer:
        """The trainer, with scale and lambda of an earlier iteration or fitted here.

        Raises ConfigError if the weights are to be sharded and the model takes no token trees.
        """
        settings = self.settings.model_copy(update=self.fitted)
        if isinstance(self.objective, objectives.Scir) and settings.implicit_scale == "fitted":
            pairs = [example.pair for example in data.examples]
            scale = fitting.fit_implicit_scale(
                self.rows.table,
                pairs,
                self.objective.models,
                self.policy,
                self.reward_key,
                settings,
            )
            settings = settings.model_copy(update={"implicit_scale": scale})
        policy = self.policy.load()
        self._tell_what_is_left_out(policy)
        if self.policy.sharded and not policy.keeps_ranks_in_step:
            raise ConfigError(
                "--sharding fsdp needs a model that supports token trees or padded batches; "
                f"{settings.model} does not: use ddp"
            )
        validate = (
            ValidationMetrics(settings, policy, data.validation, self.reward_key)
            if data.validation
            else None
        )
        objective = build_objective(settings, self.policy, self.reward_key)
        trainer = Trainer(
            policy,
            objective,
            data.examples,
            settings,
            Path(settings.output_dir),
            validate,
            self.ranks,
        )
        if isinstance(objective, objectives.Scir | Consensus) and settings.penalty_weight is None:
            objective.penalty_weight = self.ranks.broadcast_from_main(
                fitting.fit_penalty_weight(trainer, settings.penalty_ratio)
            )
        return trainer

    def _tell_what_is_left_out(self, policy: Policy) -> None:
        """Prints one line if the trained folder will lack tensors of the checkpoint."""
        lost = checkpoints.left_out(model_files.base_model_path(policy.path), policy.scorer.core)
        if lost and self.ranks.is_main:
            warn(
                f"{len(lost)} tensors of the checkpoint ({lost[0]} …) are not used by "
                f"{type(policy.scorer.core).__name__}, and the trained model will not have them"
            )

    def train(self, trainer: Trainer) -> Metrics:
        """Trains to the end, from the newest checkpoint if there is one.

        Returns the last metrics.
        """
        view = View(f"train {self.settings.objective}", trainer.n_steps)
        with watching(view) if self.ranks.is_main else nullcontext(lambda *_: None) as show:
            return trainer.train(show)

    def write(self, trainer: Trainer, account: Json, metrics: Metrics) -> Json:
        """Writes the model folder on the main rank and returns its manifest on every rank."""
        policy = self._unsharded(trainer.policy) if self.policy.sharded else trainer.policy
        manifest = None
        if policy and self.ranks.is_main:
            manifest = write_model_folder(
                trainer.settings,
                policy,
                self.policy.weights_digest,
                trainer,
                self.plan,
                metrics,
                account,
            )
        return self.ranks.broadcast_from_main(manifest)

    def _unsharded(self, policy: Policy) -> Policy | None:
        """The trained policy with whole weights on the main rank, None on the others.

        Collective: every rank has to call it.
        """
        weights = policy.model.state_dict(keep_vars=True)
        state = {
            name: distributed.full_tensor(value, self.ranks.is_main)
            for name, value in weights.items()
        }
        if not self.ranks.is_main:
            return None
        whole = self.policy.load_unsharded()
        whole.model.load_state_dict(state)
        return whole


def check_deepspeed(settings: TrainSettings, ranks: DistributedContext) -> None:
    """Raises ConfigError if accelerate's plugin enables DeepSpeed and a setting excludes it."""
    if ranks.zero and (settings.sharding == "fsdp" or settings.compile):
        raise ConfigError(
            "accelerate's DeepSpeed plugin shards by itself and does not compile: "
            "leave --sharding and --compile out"
        )
    if ranks.shards_weights and (settings.quantization != "none" or settings.dry_run):
        raise ConfigError(
            "--quantization and --dry-run need the whole model in each process: "
            "use ZeRO stage 1 or 2, or leave them out"
        )
    if ranks.zero and settings.objective == "scir" and settings.penalty_weight is None:
        raise ConfigError(
            "--penalty-ratio is not available under DeepSpeed, which does not expose gradients: "
            "pass --penalty-weight"
        )


def build_objective(
    settings: TrainSettings, policy: LazyPolicy, reward_key: str | None
) -> Objective:
    """The objective of the settings.

    reward_key: weights key of the reward reference, if there is one.
    """
    objective = Consensus if settings.learns_consensus else objectives.TABLE[settings.objective]
    return objective(settings, policy.chat, policy.weights_key, reward_key)


def add_reference_logps(
    pairs: list[Pair], model: LazyPolicy, settings: TrainSettings, ranks: DistributedContext
) -> None:
    """Adds the log-probabilities (nats) under `model` to the pairs that lack them.

    The ranks share the work. A file beside the data, or in the output folder, stores the
    log-probabilities for the next run under the model's weights key.
    Collective: every rank has to call it.
    """
    source = to_path(settings.input)
    folder = (
        source
        if folders.is_dataset(source) and not is_remote(source)
        else Path(settings.output_dir)
    )
    cache = folder / f"reference_logps-{model.weights_key}.arrow"
    _fill_from_cache(pairs, model.weights_key, dataset.read_columns(cache))
    missing = [pair for pair in pairs if model.weights_key not in pair.reference_logps]
    if not ranks.broadcast_from_main(len(missing)):
        return
    local = missing[ranks.rank :: ranks.size]
    with progress("reference log-probabilities", len(local)) as advance:
        # Every rank makes the same number of calls: with sharded weights each call is collective.
        for low in range(0, max(ranks.all_gather(len(local))), REFERENCE_ROWS):
            add_missing_logps(
                local[low : low + REFERENCE_ROWS], model, settings.max_tokens_per_pack
            )
            advance(len(local[low : low + REFERENCE_ROWS]))
    for part in ranks.all_gather(
        {pair.pair_id: pair.reference_logps[model.weights_key] for pair in local}
    ):
        _fill_from_cache(missing, model.weights_key, part)
    if ranks.is_main and os.access(folder, os.W_OK):
        dataset.write_columns(
            cache, {pair.pair_id: pair.reference_logps[model.weights_key] for pair in pairs}
        )


def _fill_from_cache(
    pairs: Sequence[Pair], key: str, cached: dict[str, tuple[float, float]]
) -> None:
    """Sets the log-probabilities under the weights `key` of the pairs that the cache holds.

    cached: pair id -> log-probabilities of first and second, nats.
    """
    for pair in pairs:
        if pair.pair_id in cached:
            pair.reference_logps[key] = cached[pair.pair_id]
