"""Every figure of metrics.jsonl, listed once: its key, label, unit and where it is shown.

    key that ends in "/"   one figure per name after it (a reward model, a branch), for example
                           "abs_log_odds/judge"
    label                  in the terminal view, and in the legend of a picture
    section, picture       of the HTML page; figures of one picture share its unit.
                           Without a picture, a figure is not drawn.

Keys do not depend on settings: `scir/preference_loss` is the term's value under dpo and under ipo.
The terminal view, the page and trackers read this list; only a figure that is in it can be logged.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

OBJECTIVE, REWARD_MODELS, RESPONSES = "Objective", "Reward models", "Responses"
VALIDATION, OPTIMIZER, THROUGHPUT = "Validation", "Optimizer", "Throughput"
#: Sections of the page of a whole run, whose pictures have one line per iteration
RUN_SECTIONS = (OBJECTIVE, REWARD_MODELS, VALIDATION)


@dataclass(frozen=True)
class Metric:
    """An entry of METRICS.

    unit: "nats", "tokens", "s"; empty for a rate, or for a number without a unit.
    is_rate: between 0 and 1, shown in per cent.
    in_view: a row of the terminal view. in_line: in the line that is printed without a terminal.
    is_loss_term: indented below the loss.
    """

    key: str
    label: str
    section: str
    picture: str | None = None
    unit: str = ""
    is_rate: bool = False
    in_view: bool = False
    in_line: bool = False
    is_loss_term: bool = False

    @property
    def is_prefix(self) -> bool:
        """Whether the entry covers one figure per name after its key."""
        return self.key.endswith("/")

    def covers(self, key: str) -> bool:
        """Whether this is the entry of a key of metrics.jsonl."""
        if self.is_prefix:
            return key.startswith(self.key)
        return key == self.key

    def full_label(self, key: str) -> str:
        """The label of a key of metrics.jsonl, with its name: "accuracy judge"."""
        if self.is_prefix:
            return f"{self.label} {self._name(key)}"
        return self.label

    def short_label(self, key: str) -> str:
        """The label inside its picture, whose title names the figure: "judge"."""
        if self.is_prefix:
            return self._name(key)
        return self.label

    def _name(self, key: str) -> str:
        """The name after a prefix: "judge"."""
        return key.removeprefix(self.key)


#: In the order in which they are shown
METRICS = (
    Metric("loss", "loss",
           OBJECTIVE, "Loss terms", "nats", in_view=True, in_line=True),
    Metric("scir/preference_loss", "preference loss",
           OBJECTIVE, "Loss terms", "nats", in_view=True, is_loss_term=True),
    Metric("scir/inconsistency", "inconsistency",
           OBJECTIVE, "Loss terms", "nats", in_view=True, is_loss_term=True),
    Metric("scir/entropy", "entropy",
           REWARD_MODELS, "Mean entropy", "nats", in_view=True, is_loss_term=True),
    Metric("sft/answer_nll", "answer loss",
           OBJECTIVE, "Loss terms", "nats", in_view=True, is_loss_term=True),
    Metric("sft/verdict_nll", "verdict loss",
           OBJECTIVE, "Loss terms", "nats", in_view=True, is_loss_term=True),
    Metric("anchors/verdict_nll", "verdict loss of anchors",
           OBJECTIVE, "Loss terms", "nats", in_view=True, is_loss_term=True),
    Metric("scir/mask_rate", "pairs kept by mask",
           OBJECTIVE, "Pairs kept, agreement, order flips",
           is_rate=True, in_view=True, in_line=True),
    Metric("scir/agreement", "agreement",
           OBJECTIVE, "Pairs kept, agreement, order flips",
           is_rate=True, in_view=True, in_line=True),
    Metric("scir/flip_rate", "order-flip rate",
           OBJECTIVE, "Pairs kept, agreement, order flips", is_rate=True, in_view=True),
    Metric("rewards/accuracies", "preference accuracy",
           OBJECTIVE, "Accuracy on the step's pairs", is_rate=True, in_view=True, in_line=True),
    Metric("rewards/margins", "preference margin",
           OBJECTIVE, "Preference margin", "nats", in_view=True),
    Metric("rewards/chosen", "reward of chosen",
           OBJECTIVE, "Preference margin", "nats"),
    Metric("rewards/rejected", "reward of rejected",
           OBJECTIVE, "Preference margin", "nats"),
    Metric("accuracy/judge", "judge accuracy",
           OBJECTIVE, "Accuracy on the step's pairs", is_rate=True, in_view=True, in_line=True),
    Metric("abs_log_odds/", "|log-odds|",
           REWARD_MODELS, "Mean |log-odds|", "nats", in_view=True),
    Metric("scir/verdict_mass", "verdict mass",
           REWARD_MODELS, "Verdict mass P(A)+P(B)", is_rate=True),
    Metric("branch_grad_norm/", "branch gradient norm",
           REWARD_MODELS, "Gradient norm of each branch"),
    Metric("logps/chosen", "chosen",
           RESPONSES, "Log-probability of a response", "nats"),
    Metric("logps/rejected", "rejected",
           RESPONSES, "Log-probability of a response", "nats"),
    Metric("mean_response_tokens", "mean length",
           RESPONSES, "Mean length of a response", "tokens"),
    Metric("grad_norm", "gradient norm",
           OPTIMIZER, "Gradient norm before clipping", in_view=True),
    Metric("learning_rate", "learning rate",
           OPTIMIZER, "Learning rate"),
    Metric("scir/scale", "implicit scale",
           OPTIMIZER, "Scale of the implicit reward"),
    Metric("scir/penalty_weight", "penalty weight",
           OPTIMIZER, "Weight of the inconsistency penalty"),
    Metric("router_loss", "router's load balance",
           OPTIMIZER, "Load-balancing loss of the router (all experts alike: experts per token)"),
    Metric("validation/accuracy/", "validation accuracy",
           VALIDATION, "Accuracy on validation pairs", is_rate=True, in_view=True),
    Metric("validation/agreement", "validation agreement",
           VALIDATION, "Agreement and order flips on validation pairs", is_rate=True, in_view=True),
    Metric("validation/flip_rate", "validation order-flip rate",
           VALIDATION, "Agreement and order flips on validation pairs", is_rate=True, in_view=True),
    Metric("validation/abs_log_odds/", "validation |log-odds|",
           VALIDATION, "Mean |log-odds| on validation pairs", "nats"),
    Metric("tokens", "tokens",
           THROUGHPUT, "Tokens per step", "tokens"),
    Metric("sequence_tokens", "tokens without sharing",
           THROUGHPUT, "Tokens per step", "tokens"),
    Metric("tokens_per_second", "tokens per second",
           THROUGHPUT, "Tokens per second", "tokens/s"),
    Metric("step_seconds", "seconds per step",
           THROUGHPUT, unit="s"),
    Metric("packs", "packs per step",
           THROUGHPUT),
    Metric("memory_splits", "halvings of the pack size",
           THROUGHPUT),
)  # fmt: skip


def find(key: str) -> Metric | None:
    """The entry of a key of metrics.jsonl, or None (a file of another program)."""
    for metric in METRICS:
        if metric.covers(key):
            return metric
    return None


def present(keys: Iterable[str]) -> Iterator[tuple[str, Metric]]:
    """Each key that has an entry, and that entry, in the order of METRICS."""
    keys = list(keys)
    for metric in METRICS:
        for key in keys:
            if metric.covers(key):
                yield key, metric


def tracker_name(key: str) -> str:
    """A figure's name on a dashboard: train/loss, eval/accuracy/judge.

    The names are those of transformers' and TRL's trainers.
    """
    prefix = "validation/"
    if key.startswith(prefix):
        return f"eval/{key.removeprefix(prefix)}"
    return f"train/{key}"
