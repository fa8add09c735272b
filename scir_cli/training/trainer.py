"""The training loop: one file. A step is scored in packs of token trees; nothing here knows an objective's equation.

    separable objective:       forward, loss, backward, pack by pack
    a loss over the whole step (SCIR's mask): all log-probabilities first, d loss / d log-prob of each branch, and each pack hands its share down:
                               in the same graph where the step is one pack, in a second pass where it is several

Over ranks the pairs of a step are shared out by tokens, every rank sees all their log-probabilities, and gradients are summed: neither packs nor ranks
change the result. Weights stay in the precision they are scored in, so that step 0 equals what `judge` saw; AdamW works on fp32 copies.
Left out on purpose: any reference model in the loop.
"""

from __future__ import annotations

import ctypes
import json
import math
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from scir_cli.data import files
from scir_cli.engine import trees
from scir_cli.engine.deepspeed_zero import ZeroAdamW
from scir_cli.engine.distributed import DistributedContext
from scir_cli.engine.policy import DUMMY_BRANCH, Layout, Policy
from scir_cli.engine.trees import Branch
from scir_cli.errors import TrainingError, warn
from scir_cli.settings import TrainSettings
from scir_cli.training.metrics import find as find_metric
from scir_cli.training.objectives import Example, Metrics, Objective
from scir_cli.training.optimizer import MasterAdamW, total_norm
from scir_cli.training.trackers import Trackers


def rate(step: int, n_steps: int, settings: TrainSettings) -> float:
    """Learning rate of a step as a share of the peak: linear warm-up that starts above 0, then the schedule, which ends above 0."""
    warmup = math.ceil(settings.warmup_ratio * n_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    left = (n_steps - step) / max(
        1, n_steps - warmup
    )  # 1 after warm-up, 1 / (steps left then) in the last step
    return {"cosine": 0.5 * (1 - math.cos(math.pi * left)), "linear": left, "constant": 1.0}[
        settings.schedule
    ]


T = TypeVar("T")
Packs = list[list[int]]  # places in the batch, pack by pack


@dataclass(frozen=True)
class Step:
    """The pairs of an optimiser step, made ready while the one before is computed."""

    batch: list[Example]
    groups: list[list[Branch]]  # branches of each pair
    mine: list[int]  # places of this rank's pairs, those of one prompt beside each other
    max_tokens: int  # of a pack
    packs: Packs  # `mine` in packs
    layouts: dict[int, Layout]  # of each pack, by its first place


class Trainer:
    """Trains `policy` on `examples`; `validate` gives figures to log every `validation_every` steps."""

    def __init__(
        self, policy: Policy, objective: Objective, examples: Sequence[Example], settings: TrainSettings, out: Path,
        validate: Callable[[], Metrics] | None = None, ranks: DistributedContext | None = None,
    ) -> None:  # fmt: skip
        self.policy, self.objective, self.examples, self.settings, self.out = (
            policy,
            objective,
            examples,
            settings,
            out,
        )
        self.validate, self.ranks = (
            validate,
            ranks or DistributedContext(policy.device.type == "cuda"),
        )
        if policy.device.type == "cpu":
            keep_freed_memory()
        self.batches = batches(examples, settings, objective)
        if settings.compile:
            for block in policy.scorer.blocks:
                block.compile(dynamic=True)
        if settings.gradient_checkpointing:
            # ZeRO-3's weights come and go: their shapes say nothing
            unchecked = (
                {"use_reentrant": False, "determinism_check": "none"}
                if self.ranks.shards_weights
                else None
            )
            policy.model.gradient_checkpointing_enable(unchecked)
            policy.model.train()  # transformers recomputes in train mode only; there is no dropout left to switch on
        self.params = [p for p in policy.model.parameters() if p.requires_grad]
        self.optimizer = self._optimizer()
        self.max_tokens = settings.max_tokens_per_pack
        self.n_splits = 0  # times a pack was too large for the memory
        self.step = 0
        self.started = time.monotonic()
        self.trackers: Trackers | None = None
        self.see: Callable[[int, Metrics], None] = lambda step, figures: None

    def _optimizer(self) -> MasterAdamW | ZeroAdamW:
        options = {"lr": self.settings.learning_rate, "weight_decay": self.settings.weight_decay}
        if not self.ranks.zero:
            return MasterAdamW(self.params, **options)

        def score() -> Tensor:
            return self.policy.branch_logps([DUMMY_BRANCH])

        optimizer = ZeroAdamW(
            self.ranks,
            self.policy.scorer,
            self.params,
            score,
            self.settings.max_grad_norm,
            **options,
        )
        self.policy.scorer = optimizer.engine
        return optimizer

    @property
    def n_steps(self) -> int:
        return len(self.batches)

    # -- the loop

    def train(self, see: Callable[[int, Metrics], None] = lambda step, figures: None) -> Metrics:
        """Runs to the end from the newest checkpoint, and returns the last step's figures; `see` is told what is logged, and the step at first."""
        self.see = see
        self._resume()
        see(self.step, {})
        self._start_trackers()
        metrics: Metrics = {}
        for step in self._steps():
            if self.step % self.settings.validation_every == 0:
                self._log(self._look(step), "validation")
            started = time.monotonic()
            metrics = self._optimise(step)
            self.step += 1
            seconds = time.monotonic() - started
            self._log(
                metrics
                | {"step_seconds": seconds, "tokens_per_second": metrics["tokens"] / seconds},
                "train",
            )
            if self.step % self.settings.save_every == 0 and self.step < self.n_steps:
                self.save_checkpoint()
        final = self._look(None)
        self._log(final, "validation")
        self.policy.model.eval()
        if self.trackers:
            self.trackers.close()
        return metrics | final

    def _steps(self) -> Iterator[Step]:
        """The steps from `self.step` on; the next one is made ready while this one is computed."""
        with ThreadPoolExecutor(1) as pool:
            ahead: Future[Step] | None = None
            for number in range(self.step, self.n_steps):
                step = (ahead or pool.submit(self._prepare, number)).result()
                ahead = (
                    pool.submit(self._prepare, number + 1) if number + 1 < self.n_steps else None
                )
                yield step

    def _prepare(self, number: int) -> Step:
        batch = [self.examples[i] for i in self.batches[number]]
        groups = [self.objective.branches(example) for example in batch]
        prompts: dict[tuple[int, ...], list[int]] = {}
        for place, example in enumerate(batch):
            prompts.setdefault(example.pair.prompt_ids, []).append(place)
        together = list(prompts.values())  # pairs of one prompt share it in one pack
        units = self.ranks.assign(
            [trees.size([b for place in places for b in groups[place]]) for places in together]
        )
        mine, max_tokens = [place for unit in units for place in together[unit]], self.max_tokens
        packs = self._pack(groups, mine, max_tokens)
        layouts = {
            pack[0]: self.policy.build_layout([b for place in pack for b in groups[place]])
            for pack in packs
        }
        return Step(batch, groups, mine, max_tokens, packs, layouts)

    def _optimise(self, step: Step) -> Metrics:
        self.optimizer.zero_grad()
        metrics = self._backward(step)
        self.ranks.sum_gradients(self.params)
        learning_rate = self.settings.learning_rate * rate(self.step, self.n_steps, self.settings)
        self.optimizer.param_groups[0]["lr"] = learning_rate
        norm = self.optimizer.update(self.settings.max_grad_norm)
        if not math.isfinite(metrics["loss"]) or not math.isfinite(norm):
            ids = ", ".join(e.pair.pair_id for e in step.batch[:4])
            raise TrainingError(
                f"step {self.step}: the loss is {metrics['loss']} and the gradient norm {norm}; the first pairs of the batch are {ids}. "
                f"Lower --learning-rate (now {self.settings.learning_rate}) or look at those pairs; earlier checkpoints are kept"
            )
        return metrics | {
            "grad_norm": norm,
            "learning_rate": learning_rate,
            "memory_splits": self.n_splits,
        }

    # -- one step

    def _backward(self, step: Step) -> Metrics:
        """Leaves d loss / d weights in the gradients; neither packs nor ranks change it."""
        return self._pack_by_pack(step) if self.objective.separable else self._all_at_once(step)

    def _pack_by_pack(self, step: Step) -> Metrics:
        def work(packs: Packs) -> Metrics:
            total: Metrics = {}
            for pack in packs:
                logps = self._logps(step, pack)
                loss, metrics = self.objective.loss(logps, [step.batch[i] for i in pack or [0]])
                share = len(pack) / len(step.batch)
                (loss * share * self._scale).backward()
                for name, value in (metrics | {"loss": float(loss.detach())}).items():
                    total[name] = total.get(name, 0.0) + share * value
            return total

        total, packs = self._within_memory(step, work)
        return _sum(self.ranks.all_gather(total | self._counts(step, packs)))

    def _all_at_once(self, step: Step) -> Metrics:
        """The loss needs all of the step: with one pack a rank its graph is kept, with several each is scored again with gradient."""
        figures: Metrics = {}

        def slope(logps: Tensor) -> Tensor:
            loss, metrics = self.objective.loss(logps, step.batch)
            figures.update(metrics, loss=float(loss.detach()))
            return torch.autograd.grad(loss, logps)[0]

        packs = self._hand_down(step, slope)
        return figures | _sum(self.ranks.all_gather(self._counts(step, packs)))

    def _hand_down(self, step: Step, slope_of: Callable[[Tensor], Tensor]) -> Packs:
        """Hands `slope_of` the log-probabilities of the whole step, and what it returns, of the same shape, down to the weights.  (pairs, branches)"""

        def score(packs: Packs) -> list[Tensor]:
            with torch.set_grad_enabled(len(packs) == 1):
                return [self._logps(step, pack) for pack in packs] or [
                    torch.zeros(0, len(step.groups[0]))
                ]

        def hand_down(packs: Packs) -> None:
            for pack in packs:
                kept = parts[0] if packs == scored and parts[0].requires_grad else None
                part = self._logps(step, pack) if kept is None else kept
                part.backward(self._scale * slope[pack] if pack else torch.zeros_like(part))

        parts, scored = self._within_memory(step, score)
        own = torch.cat(parts).detach()[: len(step.mine)].cpu()
        logps = torch.zeros(len(step.batch), own.shape[1])  # (pairs, branches)
        for places, values in self.ranks.all_gather((step.mine, own)):
            logps[places] = values
        slope = slope_of(logps.to(self.policy.device).requires_grad_())
        _, packs = self._within_memory(step, hand_down)
        return packs

    def _counts(self, step: Step, packs: Packs) -> Metrics:
        """tokens: computed in one pass; sequence_tokens: what the same branches hold one by one."""
        alone = sum(len(b.ids) for place in step.mine for b in step.groups[place])
        lengths = [len(ids) for place in step.mine for ids in step.batch[place].pair.response_ids]
        counts = {
            "tokens": sum(self._size(step, p) for p in packs if p),
            "sequence_tokens": alone,
            "packs": sum(map(bool, packs)),
        }
        return counts | {
            "mean_response_tokens": sum(lengths) / (2 * len(step.batch))
        }  # summed over ranks: the step's mean

    @property
    def _scale(self) -> int:
        return (
            self.ranks.size if self.ranks.sharded else 1
        )  # FSDP averages gradients over ranks; the step's is their sum

    def _logps(self, step: Step, pack: list[int]) -> Tensor:
        """(pairs, branches); of an empty pack, which keeps ranks in step, those of a pair that does not count"""
        ready = step.layouts[pack[0]] if pack and self.max_tokens == step.max_tokens else None
        return self.policy.branch_logps(
            [b for place in pack or [0] for b in step.groups[place]], ready
        ).view(len(pack or [0]), -1)

    def _size(self, step: Step, places: list[int]) -> int:
        if self.max_tokens == step.max_tokens:
            return len(step.layouts[places[0]].forest)
        return trees.size([b for place in places for b in step.groups[place]])

    def _packs(self, step: Step) -> Packs:
        """This rank's packs. Sharded ranks work in step, so those with fewer get empty ones."""
        packs = (
            step.packs
            if self.max_tokens == step.max_tokens
            else self._pack(step.groups, step.mine, self.max_tokens)
        )
        n = max(self.ranks.all_gather(len(packs))) if self.ranks.sharded else len(packs)
        return packs + [[]] * (n - len(packs))

    @staticmethod
    def _pack(groups: Sequence[Sequence[Branch]], places: list[int], max_tokens: int) -> Packs:
        return [
            places[low:high]
            for low, high in trees.pack([groups[place] for place in places], max_tokens)
        ]

    def _within_memory(self, step: Step, work: Callable[[Packs], T]) -> tuple[T, Packs]:
        """What `work` makes of the packs, and the packs; where memory runs out, packs are halved and the work begun again, so that nothing is lost."""
        while True:
            packs = self._packs(step)
            try:
                return work(packs), packs
            except torch.OutOfMemoryError as error:
                if self.ranks.sharded or max(map(len, packs)) <= 1:
                    raise TrainingError(
                        f"step {self.step}: out of memory with {self.max_tokens} tokens a pack; lower --max-tokens-per-pack, use "
                        "--gradient-checkpointing, --lora-rank or --sharding fsdp, or drop long pairs (filter --max-response-tokens)"
                    ) from error
            self.optimizer.zero_grad()
            self.max_tokens = max(
                1, min(self.max_tokens, max(self._size(step, pack) for pack in packs)) // 2
            )
            self.n_splits += 1
            warn(
                f"step {self.step}: out of memory; packs are {self.max_tokens} tokens from here on"
            )
            torch.cuda.empty_cache()

    # -- looking and logging

    def _look(self, step: Step | None) -> Metrics:
        metrics = self.validate() if self.validate else {}
        # DeepSpeed does not expose gradients
        if step and not self.ranks.zero and len(self.objective.branch_slices) > 1:
            for name, columns in self.objective.branch_slices.items():
                metrics[f"branch_grad_norm/{name}"] = self._gradient_norm(
                    step, partial(self._through, step, columns)
                )
        return metrics

    def _through(self, step: Step, columns: slice, logps: Tensor) -> Tensor:
        """The loss's slope through these branches alone: which reward model is being trained, and how hard."""
        slope = torch.autograd.grad(self.objective.loss(logps, step.batch)[0], logps)[0]
        kept = torch.zeros_like(slope)
        kept[:, columns] = slope[:, columns]
        return kept

    def term_norms(self, names: Sequence[str], n_steps: int) -> dict[str, float]:
        """Norm of the gradient of each of these terms of the objective at the present weights, a mean over the first `n_steps` steps."""

        def slope(step: Step, name: str, logps: Tensor) -> Tensor:
            return torch.autograd.grad(self.objective.loss_terms(logps, step.batch)[name], logps)[0]

        steps = [self._prepare(number) for number in range(min(n_steps, self.n_steps))]
        return {
            name: statistics.fmean(
                self._gradient_norm(step, partial(slope, step, name)) for step in steps
            )
            for name in names
        }

    def _gradient_norm(self, step: Step, slope_of: Callable[[Tensor], Tensor]) -> float:
        """Norm of the gradient that a slope of the step's log-probabilities leaves in the weights."""
        self._hand_down(step, slope_of)
        self.ranks.sum_gradients(self.params)
        norm = total_norm([p.grad for p in self.params if p.grad is not None])
        self.optimizer.zero_grad()
        return norm

    def _start_trackers(self) -> None:
        if self.settings.report_to and self.ranks.is_main:
            self.trackers = Trackers(
                self.settings.report_to,
                self.out,
                self.settings.plan(),
                self.policy.device.type == "cpu",
            )

    def _log(self, metrics: Metrics, kind: str) -> None:
        if not metrics or not self.ranks.is_main:
            return
        assert all(map(find_metric, metrics)), (
            f"not in metrics.py: {[key for key in metrics if not find_metric(key)]}"
        )
        record = {
            "step": self.step,
            "kind": kind,
            **{name: round(float(value), 8) for name, value in metrics.items()},
        }
        path = self.out / "metrics.jsonl"
        with files.as_store_error(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self.trackers:
            self.trackers.log(metrics, self.step)
        self.see(self.step, metrics)

    # -- checkpoints: whole tensors, so that another number of ranks can go on

    def save_checkpoint(self) -> None:
        """Writes the state after this step; only the newest checkpoint stays."""
        state = {
            "step": self.step,
            **self.optimizer.whole(self.ranks.is_main),
            "rng": torch.get_rng_state(),
        }
        if not self.ranks.is_main:
            return
        folder = self.out / "checkpoints"
        folder.mkdir(exist_ok=True)
        path = folder / f"step-{self.step:08d}.pt"
        with files.atomic_write(path) as temporary, temporary.open("wb") as file:
            torch.save(state, file)
        for old in folder.glob("step-*.pt"):
            if old != path:
                old.unlink()

    def _resume(self) -> None:
        """Goes back to the newest checkpoint; figures logged after it are dropped, because their steps are done again."""
        paths = sorted((self.out / "checkpoints").glob("step-*.pt"))
        if path := self.ranks.broadcast_from_main(paths[-1] if paths else None):
            self._restore(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
        log = self.out / "metrics.jsonl"
        if log.exists() and self.ranks.is_main:
            lines = [
                line
                for line in log.read_text(encoding="utf-8").splitlines(keepends=True)
                if line.endswith("\n")
            ]
            kept = [line for line in lines if _belongs(json.loads(line), self.step)]
            with files.atomic_write(log) as temporary:
                temporary.write_text("".join(kept), encoding="utf-8")

    def _restore(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.optimizer.restore(state)
        torch.set_rng_state(state["rng"])

    def finish(self) -> None:
        if self.ranks.is_main:
            shutil.rmtree(self.out / "checkpoints", ignore_errors=True)


def batches(
    examples: Sequence[Example], settings: TrainSettings, objective: Objective
) -> list[list[int]]:
    """Which examples each optimiser step takes: a function of the seed, the sizes and the settings alone."""
    found: list[list[int]] = []
    limit = settings.max_tokens_per_step
    sizes = [e.n_tokens or trees.size(objective.branches(e)) for e in examples] if limit else []
    for epoch in range(settings.num_epochs):
        order = [
            int(i) for i in np.random.default_rng([settings.seed, epoch]).permutation(len(examples))
        ]
        if not limit:
            found += [
                order[i : i + settings.batch_size]
                for i in range(0, len(order), settings.batch_size)
            ]
            continue
        used = limit
        for index in order:
            if used + sizes[index] > limit:
                found.append([])
                used = 0
            found[-1].append(index)
            used += sizes[index]
    return found[: settings.max_steps]


def _sum(parts: Sequence[Metrics]) -> Metrics:
    total: Metrics = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + value
    return total


def keep_freed_memory() -> None:
    """Lets glibc keep what is freed: large tensors otherwise go back to the system and are faulted in again, a tenth of a step on a CPU."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX: never by mmap
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def _belongs(record: dict[str, Any], step: int) -> bool:
    """Whether a logged record is of a step that a run resumed at `step` will not do again."""
    return bool(record["step"] <= step if record["kind"] == "train" else record["step"] < step)
