"""The training loop. A step is scored in packs of token trees.

The equations are in losses.py; the loop depends on how a loss combines pairs, and on nothing else:

    a loss that is a mean over pairs    forward, loss and backward, one pack after the other
    a loss over the whole step          1. the log-probabilities of all pairs
    (SCIR's mask)                       2. d loss / d log-probability of each branch
                                        3. each pack backpropagates its part of that gradient:
                                           in the same graph if the step is one pack, in a second
                                           forward pass if it is several

The pairs of a step are divided among ranks by tokens, every rank gets all log-probabilities of the
step, and gradients are summed: results depend neither on packs nor on the number of ranks.
Weights keep the precision they are scored in, so that step 0 equals the output of `judge`; AdamW
updates fp32 copies. No reference model is loaded here: its log-probabilities are in the examples.
"""

from __future__ import annotations

import ctypes
import json
import math
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
from torch.distributed.tensor import DTensor

from scir_cli.data import files
from scir_cli.engine import trees
from scir_cli.engine.deepspeed_zero import ZeroAdamW
from scir_cli.engine.distributed import DistributedContext
from scir_cli.engine.policy import DUMMY_BRANCH, Layout, Policy
from scir_cli.engine.trees import Branch
from scir_cli.errors import TrainingError, warn
from scir_cli.settings import TrainSettings
from scir_cli.training import checkpoints
from scir_cli.training.metrics import find as find_metric
from scir_cli.training.objectives import Example, Metrics, Objective
from scir_cli.training.optimizer import MasterAdamW, total_norm
from scir_cli.training.trackers import Trackers

T = TypeVar("T")

#: The pairs of each pack, as indices into the step's batch.
Packs = list[list[int]]

#: d loss / d log-probabilities, from the log-probabilities of a step.  (pairs, branches) -> same
GradLogps = Callable[[Tensor], Tensor]

#: Called with the step and the figures that are logged.
OnLog = Callable[[int, Metrics], None]

#: Pairs of a batch that an error names.
N_NAMED_PAIRS = 4

#: Weights that an error names.
N_NAMED = 3

# Parameters of glibc's mallopt
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4


def learning_rate_factor(step: int, n_steps: int, settings: TrainSettings) -> float:
    """The learning rate of a step as a share of the peak, above 0 in every step.

    Linear warm-up, then the schedule of the settings.
    """
    warmup = math.ceil(settings.warmup_ratio * n_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    # 1 in the first step after warm-up, 1 / (steps after warm-up) in the last step
    left = (n_steps - step) / max(1, n_steps - warmup)
    factors = {
        "cosine": 0.5 * (1 - math.cos(math.pi * left)),
        "linear": left,
        "constant": 1.0,
    }
    return factors[settings.schedule]


@dataclass(frozen=True)
class OptimizerStep:
    """The pairs of an optimizer step, prepared while the step before is computed.

    branches: of each pair of the batch.
    local_pairs: indices of this rank's pairs; pairs of one prompt are neighbors.
    max_tokens: limit of a pack. packs: the local pairs, in packs.
    layouts: of each pack, by the index of its first pair.
    """

    batch: list[Example]
    branches: list[list[Branch]]
    local_pairs: list[int]
    max_tokens: int
    packs: Packs
    layouts: dict[int, Layout]

    def branches_of(self, pairs: Sequence[int]) -> list[Branch]:
        """The branches of these pairs, one pair after the other."""
        return _branches_of(self.branches, pairs)


def _branches_of(branches: Sequence[Sequence[Branch]], pairs: Sequence[int]) -> list[Branch]:
    return [branch for index in pairs for branch in branches[index]]


class Trainer:
    """Trains a policy on examples with an objective.

    out: the folder of metrics.jsonl and of the checkpoints.
    validate: returns figures to log every `validation_every` steps and at the end.
    """

    def __init__(
        self,
        policy: Policy,
        objective: Objective,
        examples: Sequence[Example],
        settings: TrainSettings,
        out: Path,
        validate: Callable[[], Metrics] | None = None,
        ranks: DistributedContext | None = None,
    ) -> None:
        """Divides the examples into steps and prepares the model and the optimizer."""
        self.policy = policy
        self.objective = objective
        self.examples = examples
        self.settings = settings
        self.out = out
        self.validate = validate
        self.ranks = ranks or DistributedContext(policy.device.type == "cuda")

        if policy.device.type == "cpu":
            keep_freed_memory()
        self.batches = batches(len(examples), settings)
        self._prepare_model()
        self.params = [p for p in policy.model.parameters() if p.requires_grad]
        self.optimizer = self._make_optimizer()

        #: Limit of a pack; halved when memory runs out
        self.max_tokens = settings.max_tokens_per_pack
        #: How often the limit of a pack was halved
        self.n_splits = 0
        self.step = 0
        self.started = time.monotonic()
        self.trackers: Trackers | None = None
        #: Whether passes add the router's auxiliary loss: those of a step, not of fitting.
        self._trains_router = False
        self.on_log: OnLog = _ignore

    def _prepare_model(self) -> None:
        """Compiles blocks and enables gradient checkpointing, as the settings request."""
        policy = self.policy
        if self.settings.compile:
            for block in policy.scorer.blocks:
                block.compile(dynamic=True)
        if self.settings.gradient_checkpointing:
            options = None
            if self.ranks.shards_weights:
                # ZeRO-3 gathers and releases weights, so the shapes that are checked change.
                options = {"use_reentrant": False, "determinism_check": "none"}
            policy.model.gradient_checkpointing_enable(options)
            # transformers recomputes in train mode only. The models have no dropout to enable.
            policy.model.train()

    def _make_optimizer(self) -> MasterAdamW | ZeroAdamW:
        """AdamW on fp32 copies, or DeepSpeed's engine around the module that scores."""
        options = {
            "lr": self.settings.learning_rate,
            "weight_decay": self.settings.weight_decay,
        }
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
        """The number of optimizer steps of the whole run."""
        return len(self.batches)

    # -- the loop

    def train(self, on_log: OnLog | None = None) -> Metrics:
        """Trains from the newest checkpoint to the end, and returns the last figures.

        on_log: called with the step and no figures at the start, and then with all that is logged.
        Raises TrainingError if a loss or gradient is not finite, or if memory is too small.
        """
        self.on_log = on_log or _ignore
        self._resume()
        self.on_log(self.step, {})
        self._start_trackers()

        metrics: Metrics = {}
        for step in self._steps():
            if self.step % self.settings.validation_every == 0:
                self._log(self._validate(step), "validation")
            metrics = self._timed_step(step)
            if self.step % self.settings.save_every == 0 and self.step < self.n_steps:
                self.save_checkpoint()

        self._check_weights()
        final = self._validate(None)
        self._log(final, "validation")
        self.policy.model.eval()
        if self.trackers:
            self.trackers.close()
        return metrics | final

    def _timed_step(self, step: OptimizerStep) -> Metrics:
        """Takes an optimizer step and logs it; returns its figures, without those of time."""
        started = time.monotonic()
        metrics = self._optimize(step)
        self.step += 1
        seconds = time.monotonic() - started
        throughput = {
            "step_seconds": seconds,
            "tokens_per_second": metrics["tokens"] / seconds,
        }
        self._log(metrics | throughput, "train")
        return metrics

    def _steps(self) -> Iterator[OptimizerStep]:
        """The steps from `self.step` on.

        A thread prepares the next step while the caller computes one.
        """
        with ThreadPoolExecutor(1) as pool:
            upcoming: Future[OptimizerStep] | None = None
            for number in range(self.step, self.n_steps):
                if upcoming is None:
                    upcoming = pool.submit(self._prepare, number)
                step = upcoming.result()
                if number + 1 < self.n_steps:
                    upcoming = pool.submit(self._prepare, number + 1)
                yield step

    def _prepare(self, number: int) -> OptimizerStep:
        """A step: its pairs, divided among ranks and laid out in packs.

        All pairs of a prompt go to one rank, as neighbors, so that a pack shares their prompt.
        """
        batch = [self.examples[index] for index in self.batches[number]]
        branches = [self.objective.branches(example) for example in batch]

        by_prompt: dict[tuple[int, ...], list[int]] = {}
        for index, example in enumerate(batch):
            by_prompt.setdefault(example.pair.prompt_ids, []).append(index)
        units = list(by_prompt.values())
        sizes = [trees.size(_branches_of(branches, unit)) for unit in units]
        local_pairs: list[int] = []
        for unit in self.ranks.assign(sizes):
            local_pairs += units[unit]

        max_tokens = self.max_tokens
        packs = _pack(branches, local_pairs, max_tokens)
        layouts = {}
        for pack in packs:
            layouts[pack[0]] = self.policy.build_layout(_branches_of(branches, pack))
        return OptimizerStep(batch, branches, local_pairs, max_tokens, packs, layouts)

    def _optimize(self, step: OptimizerStep) -> Metrics:
        """Takes an optimizer step and returns its figures.

        Raises TrainingError if the loss or the gradient norm is not finite.
        """
        self.optimizer.zero_grad()
        self._trains_router = self.policy.router_loss is not None
        metrics = self._backward(step)
        if self.policy.router_loss:
            self._trains_router = False
            self.policy.router_loss.weight = 0.0
        self.ranks.sum_gradients(self.params)

        factor = learning_rate_factor(self.step, self.n_steps, self.settings)
        learning_rate = self.settings.learning_rate * factor
        self.optimizer.param_groups[0]["lr"] = learning_rate
        norm = self.optimizer.update(self.settings.max_grad_norm)
        if not math.isfinite(metrics["loss"]) or not math.isfinite(norm):
            first_ids = [example.pair.pair_id for example in step.batch[:N_NAMED_PAIRS]]
            raise TrainingError(
                f"step {self.step}: the loss is {metrics['loss']} and the gradient norm is {norm};"
                f" both must be finite. The first pairs of the batch are {', '.join(first_ids)}."
                f" Lower --learning-rate (now {self.settings.learning_rate}) or check those pairs;"
                " earlier checkpoints are kept"
            )
        metrics = dict(metrics)
        metrics["grad_norm"] = norm
        metrics["learning_rate"] = learning_rate
        metrics["memory_splits"] = self.n_splits
        return metrics

    # -- one step

    def _backward(self, step: OptimizerStep) -> Metrics:
        """Adds d loss / d weights to the gradients, and returns the step's figures."""
        if self.objective.separable:
            return self._backward_per_pack(step)
        return self._backward_whole_step(step)

    def _backward_per_pack(self, step: OptimizerStep) -> Metrics:
        """For a loss that is a mean over pairs: one pack after the other."""

        def backward(packs: Packs) -> Metrics:
            total: Metrics = {}
            for pack in packs:
                logps = self._logps(step, pack)
                examples = [step.batch[index] for index in pack or [0]]
                loss, metrics = self.objective.loss(logps, examples)
                share = len(pack) / len(step.batch)
                (loss * share * self._gradient_scale).backward()
                metrics = metrics | {"loss": float(loss.detach())}
                for name, value in metrics.items():
                    total[name] = total.get(name, 0.0) + share * value
            return total

        total, packs = self._within_memory(step, backward)
        return _sum(self.ranks.all_gather(total | self._counts(step, packs)))

    def _backward_whole_step(self, step: OptimizerStep) -> Metrics:
        """For a loss over the whole step, whose pairs depend on one another."""
        figures: Metrics = {}

        def grad_logps(logps: Tensor) -> Tensor:
            loss, metrics = self.objective.loss(logps, step.batch)
            figures.update(metrics)
            figures["loss"] = float(loss.detach())
            return torch.autograd.grad(loss, logps)[0]

        packs = self._backpropagate(step, grad_logps)
        counts = self._counts(step, packs)
        return figures | _sum(self.ranks.all_gather(counts))

    def _backpropagate(self, step: OptimizerStep, grad_logps: GradLogps) -> Packs:
        """Backpropagates d loss / d log-probabilities into the weights; returns the packs.

        grad_logps: called once, with the log-probabilities of the whole step.
        With one pack per rank its graph is kept; several packs are scored again with gradient.
        """

        def score(packs: Packs) -> list[Tensor]:
            with torch.set_grad_enabled(len(packs) == 1):
                parts = [self._logps(step, pack) for pack in packs]
            return parts or [torch.zeros(0, len(step.branches[0]))]

        def backward(packs: Packs) -> None:
            has_graph = packs == scored and parts[0].requires_grad
            for pack in packs:
                part = parts[0] if has_graph else self._logps(step, pack)
                if pack:
                    part.backward(self._gradient_scale * gradient[pack])
                else:
                    part.backward(torch.zeros_like(part))

        parts, scored = self._within_memory(step, score)
        logps = self._all_logps(step, parts).to(self.policy.device)
        # (pairs, branches)
        gradient = grad_logps(logps.requires_grad_())
        _, packs = self._within_memory(step, backward)
        return packs

    def _all_logps(self, step: OptimizerStep, parts: Sequence[Tensor]) -> Tensor:
        """The log-probabilities of the whole step, from all ranks, detached, on the CPU.

        parts: (pairs of a pack, branches), nats, of this rank -> (pairs, branches)
        """
        local = torch.cat(list(parts)).detach()[: len(step.local_pairs)].cpu()
        logps = torch.zeros(len(step.batch), local.shape[1])
        for pairs, values in self.ranks.all_gather((step.local_pairs, local)):
            logps[pairs] = values
        return logps

    def _counts(self, step: OptimizerStep, packs: Packs) -> Metrics:
        """This rank's counts, which are summed over ranks.

        tokens: computed in one pass; sequence_tokens: those of the branches without sharing.
        mean_response_tokens: this rank's part of the step's mean. router_loss: of the model's
        router, if it is trained with one, without its coefficient; it is no part of `loss`.
        """
        sequence_tokens = 0
        for branch in step.branches_of(step.local_pairs):
            sequence_tokens += len(branch.ids)
        response_tokens = 0
        for index in step.local_pairs:
            first, second = step.batch[index].pair.response_ids
            response_tokens += len(first) + len(second)
        filled = [pack for pack in packs if pack]
        router_loss = {}
        if self._trains_router and self.policy.router_loss:
            router_loss["router_loss"] = self.policy.router_loss.take() / self._gradient_scale
        return router_loss | {
            "tokens": sum(self._size(step, pack) for pack in filled),
            "sequence_tokens": sequence_tokens,
            "packs": len(filled),
            "mean_response_tokens": response_tokens / (2 * len(step.batch)),
        }

    @property
    def _gradient_scale(self) -> int:
        """The factor that makes FSDP's mean of gradients over ranks the step's sum."""
        return self.ranks.size if self.ranks.sharded else 1

    def _logps(self, step: OptimizerStep, pack: list[int]) -> Tensor:
        """The log-probabilities of a pack's branches, nats.  -> (pairs, branches)

        For an empty pack, which keeps sharded ranks in step, those of the first pair.
        """
        layout = None
        if pack and self.max_tokens == step.max_tokens:
            layout = step.layouts[pack[0]]
        pairs = pack or [0]
        if self._trains_router and self.policy.router_loss:
            share = len(pack) / len(step.batch)
            self.policy.router_loss.weight = share * self._gradient_scale
        logps = self.policy.branch_logps(step.branches_of(pairs), layout)
        return logps.view(len(pairs), -1)

    def _size(self, step: OptimizerStep, pack: list[int]) -> int:
        """The tokens of a pack's forest."""
        if self.max_tokens == step.max_tokens:
            return len(step.layouts[pack[0]].forest)
        return trees.size(step.branches_of(pack))

    def _packs(self, step: OptimizerStep) -> Packs:
        """This rank's packs, computed again if their limit was halved after `_prepare`.

        Sharded ranks work in step, so those with fewer packs get empty ones.
        """
        packs = step.packs
        if self.max_tokens != step.max_tokens:
            packs = _pack(step.branches, step.local_pairs, self.max_tokens)
        if not self.ranks.sharded:
            return packs
        n_packs = max(self.ranks.all_gather(len(packs)))
        return packs + [[]] * (n_packs - len(packs))

    def _within_memory(self, step: OptimizerStep, work: Callable[[Packs], T]) -> tuple[T, Packs]:
        """The result of `work` on this rank's packs, and those packs.

        If memory runs out, the limit of a pack is halved and all of the work is repeated.
        Raises TrainingError if packs cannot be split.
        """
        while True:
            packs = self._packs(step)
            try:
                return work(packs), packs
            except torch.OutOfMemoryError as error:
                if self.ranks.sharded or max(map(len, packs)) <= 1:
                    raise TrainingError(
                        f"step {self.step}: out of memory with {self.max_tokens} tokens per pack;"
                        " lower --max-tokens-per-pack, use --gradient-checkpointing, --lora-rank"
                        " or --sharding fsdp, or drop long pairs (filter --max-response-tokens)"
                    ) from error
            self.optimizer.zero_grad()
            if self.policy.router_loss:
                # The passes so far are repeated.
                self.policy.router_loss.take()
            self._halve_packs(step, packs)

    def _halve_packs(self, step: OptimizerStep, packs: Packs) -> None:
        """Lowers the limit to half of the largest pack, and releases cached memory."""
        largest = max(self._size(step, pack) for pack in packs)
        self.max_tokens = max(1, min(self.max_tokens, largest) // 2)
        self.n_splits += 1
        warn(
            f"step {self.step}: out of memory; packs are limited to {self.max_tokens} tokens"
            " from now on"
        )
        torch.cuda.empty_cache()

    # -- measuring and logging

    def _validate(self, step: OptimizerStep | None) -> Metrics:
        """The validation figures, and the gradient norm of each reward model's branches.

        step: the pairs for the gradient norms; None leaves them out.
        """
        metrics = self.validate() if self.validate else {}
        slices = self.objective.branch_slices
        # DeepSpeed does not expose gradients
        if step is None or self.ranks.zero or len(slices) < 2:
            return metrics
        for name, columns in slices.items():
            grad_logps = partial(self._grad_through_branches, step, columns)
            metrics[f"branch_grad_norm/{name}"] = self._gradient_norm(step, grad_logps)
        return metrics

    def _grad_through_branches(self, step: OptimizerStep, columns: slice, logps: Tensor) -> Tensor:
        """d loss / d log-probabilities of these branches, 0 for the others.

        Its norm in the weights shows which reward model is trained, and how strongly.
        columns: the branches; logps: (pairs, branches), nats -> same shape
        """
        loss, _ = self.objective.loss(logps, step.batch)
        (gradient,) = torch.autograd.grad(loss, logps)
        through = torch.zeros_like(gradient)
        through[:, columns] = gradient[:, columns]
        return through

    def gradient_norms_by_term(self, names: Sequence[str], n_steps: int) -> dict[str, float]:
        """The norm of the gradient of each of these loss terms, at the present weights.

        A mean over the first `n_steps` steps. names: keys of the objective's `loss_terms`.
        """

        def grad_logps(step: OptimizerStep, name: str, logps: Tensor) -> Tensor:
            term = self.objective.loss_terms(logps, step.batch)[name]
            return torch.autograd.grad(term, logps)[0]

        n_steps = min(n_steps, self.n_steps)
        steps = [self._prepare(number) for number in range(n_steps)]
        means = {}
        for name in names:
            norms = [self._gradient_norm(step, partial(grad_logps, step, name)) for step in steps]
            means[name] = statistics.fmean(norms)
        return means

    def _gradient_norm(self, step: OptimizerStep, grad_logps: GradLogps) -> float:
        """The norm in the weights of a gradient of the step's log-probabilities."""
        self._backpropagate(step, grad_logps)
        self.ranks.sum_gradients(self.params)
        norm = total_norm([p.grad for p in self.params if p.grad is not None])
        self.optimizer.zero_grad()
        return norm

    def _start_trackers(self) -> None:
        names = self.settings.report_to
        if names and self.ranks.is_main:
            on_cpu = self.policy.device.type == "cpu"
            self.trackers = Trackers(names, self.out, self.settings.plan(), on_cpu)

    def _log(self, metrics: Metrics, kind: str) -> None:
        """Appends a record to metrics.jsonl and reports it, on the main rank.

        kind: "train" or "validation".
        """
        if not metrics or not self.ranks.is_main:
            return
        unlisted = [key for key in metrics if not find_metric(key)]
        assert not unlisted, f"not in metrics.py: {unlisted}"
        record: dict[str, Any] = {"step": self.step, "kind": kind}
        for name, value in metrics.items():
            record[name] = round(float(value), 8)
        path = self.out / "metrics.jsonl"
        with files.as_store_error(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self.trackers:
            self.trackers.log(metrics, self.step)
        self.on_log(self.step, metrics)

    # -- checkpoints: full tensors, so that a run can resume with another number of ranks

    def save_checkpoint(self) -> None:
        """Writes the state after this step and removes older checkpoints.

        Collective: every rank must call it, and the main rank writes.
        Raises TrainingError if a weight is not finite.
        """
        self._check_weights()
        state = {
            "step": self.step,
            **self.optimizer.whole(self.ranks.is_main),
            "rng": torch.get_rng_state(),
        }
        if self.ranks.is_main:
            checkpoints.save(self.out, self.step, state)

    def _check_weights(self) -> None:
        """Raises TrainingError on every rank if a trained weight of any rank is not finite."""
        broken = []
        for name, param in self.policy.model.named_parameters():
            local = param.to_local() if isinstance(param, DTensor) else param
            if param.requires_grad and not torch.isfinite(local.detach()).all():
                broken.append(name)
        names = sorted({name for names in self.ranks.all_gather(broken) for name in names})
        if names:
            raise TrainingError(
                f"after step {self.step}, weights are not finite: {', '.join(names[:N_NAMED])}; "
                f"lower --learning-rate (now {self.settings.learning_rate}). "
                "Nothing was written; earlier checkpoints are kept"
            )

    def _resume(self) -> None:
        """Restores the newest checkpoint, and removes figures that are logged again."""
        newest = checkpoints.newest(self.out) if self.ranks.is_main else None
        path = self.ranks.broadcast_from_main(newest)
        if path:
            self._restore(checkpoints.load(path))
        log = self.out / "metrics.jsonl"
        if not log.exists() or not self.ranks.is_main:
            return
        with files.as_store_error(log):
            lines = log.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if _precedes(line, self.step)]
        with files.atomic_write(log) as temporary:
            temporary.write_bytes(b"".join(kept))

    def _restore(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.optimizer.restore(state)
        torch.set_rng_state(state["rng"])

    def finish(self) -> None:
        """Removes the checkpoints, on the main rank: the model folder is written."""
        if self.ranks.is_main:
            checkpoints.remove(self.out)


def batches(n_examples: int, settings: TrainSettings) -> list[list[int]]:
    """The indices of the examples of each optimizer step, a function of the settings alone."""
    steps: list[list[int]] = []
    for epoch in range(settings.num_epochs):
        random = np.random.default_rng([settings.seed, epoch])
        order = [int(index) for index in random.permutation(n_examples)]
        for start in range(0, len(order), settings.batch_size):
            steps.append(order[start : start + settings.batch_size])
    return steps[: settings.max_steps]


def _pack(branches: Sequence[Sequence[Branch]], pairs: Sequence[int], max_tokens: int) -> Packs:
    """These pairs in packs of at most `max_tokens`, in their order."""
    ranges = trees.pack([branches[index] for index in pairs], max_tokens)
    return [list(pairs[low:high]) for low, high in ranges]


def _sum(parts: Sequence[Metrics]) -> Metrics:
    """The sum of each figure over these parts."""
    total: Metrics = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + value
    return total


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory for reuse.

    By default it returns large tensors to the system, and faulting their pages in again takes a
    tenth of a step on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _precedes(line: bytes, step: int) -> bool:
    """Whether a line of metrics.jsonl is whole, and a run that resumes at `step` does not log it.

    A training record has the number of the step it completes, a validation record that of the
    step it precedes. An interrupted run can leave a last line without an end.
    """
    if not line.endswith(b"\n"):
        return False
    try:
        record = json.loads(line)
        is_training = record["kind"] == "train"
        return bool(record["step"] <= step if is_training else record["step"] < step)
    except (ValueError, KeyError, TypeError):
        warn("metrics.jsonl holds a damaged line, which is left out")
        return False


def _ignore(step: int, figures: Metrics) -> None:
    """Nobody observes the run."""
