"""A round in the history of a run: in its checkpoints, in `rounds` of summary.json, and in `round_finished`."""

from __future__ import annotations

from pydantic import Field

from cotune.reporting.documents.base import Document, Number


class MetricsEntry(Document):
    """Metrics of a task, those of other tasks being absent.

    Of several tasks they are means over them, and those of each stand beside as `TASK/accuracy`, `TASK/f1` and so on.
    """

    accuracy: Number = Field(
        0.0,
        description="Classes and texts: share of the records (with tags: of the words; of texts: of the target tokens) that are"
        " predicted correctly, of 1.",
    )
    precision: Number = Field(0.0, description="Classes: macro mean over them, of 1.")
    recall: Number = Field(0.0, description="Classes: macro mean over them, of 1.")
    f1: Number = Field(0.0, description="Classes: macro mean over them, of 1.")
    loss: Number = Field(0.0, description="Texts: mean negative log-likelihood of the target tokens, in nats per token.")
    perplexity: Number = Field(0.0, description="Texts: e to the loss.")
    mse: Number = Field(0.0, description="Numbers: mean squared error, in squares of their unit.")
    mae: Number = Field(0.0, description="Numbers: mean absolute error, in their unit.")
    spearman: Number = Field(0.0, description="Numbers: rank correlation, −1 to 1; 0 where one side is all the same.")
    r2: Number = Field(0.0, description="Numbers: R², 1 at most; 0 where the truth is all the same.")
    micro_f1: Number = Field(0.0, description="Label sets: F1 over all labels of all records, of 1.")
    macro_f1: Number = Field(0.0, description="Label sets: mean of the F1 of each label, of 1.")
    mean_average_precision: Number = Field(
        0.0, description="Label sets: mean over the labels that some record has of average precision, of 1."
    )
    token_f1: Number = Field(0.0, description="Questions: mean F1 of the words of an answer and of the nearest true one, of 1.")
    exact_answer: Number = Field(
        0.0, description="Questions: share of the answers that are true ones but for case, punctuation and articles, of 1."
    )
    exact: Number = Field(0.0, description="Label sets: share of the records with every label predicted correctly, from 0 to 1.")

    @property
    def score(self) -> float:
        """The figure by which two states of a model are compared (see `data.tasks.metrics.Metrics`)."""
        key = next((key for key in ("accuracy", "micro_f1", "token_f1", "r2") if key in self.keys()), "accuracy")
        return max(0.0, float(getattr(self, key)))


class DroppedEntry(Document):
    """An organization that was asked and has no update in the model."""

    organization: str = Field(description="Its name.")
    reason: str = Field(description="Why.")


class LateEntry(Document):
    """An update of an earlier round that entered this one."""

    organization: str = Field(description="Whose it is.")
    round: int = Field(description="The round that it was trained for.")


class SuspectEntry(Document):
    """An update that stood out in a round that was not applied."""

    organization: str = Field(description="Whose it is.")
    norm: Number = Field(description="L2 norm of the update.")
    median_norm: Number = Field(description="Median of the norms of the round.")
    cosine: Number | None = Field(description="Cosine to the middle of the updates; null where the server does not hold them.")
    weight: Number = Field(description="Its share of the round, of 1.")


class ClientPrivacyEntry(Document):
    """Client-level privacy of a round."""

    epsilon: Number = Field(description="ε spent so far.")
    clip_norm: Number = Field(description="The clip norm that the round used.")
    unclipped: Number | None = Field(description="Noised fraction of updates within it; null with fixed clipping.")


class RoundEntry(Document):
    """One finished round."""

    round: int = Field(description="Number of the round, from 1.")
    stage: str = Field(description="What was trained: `head`, `lora` or `full`.")
    metrics: MetricsEntry | None = Field(None, description="Metrics on the common test set; null without one.")
    epsilon: dict[str, Number] = Field(
        default_factory=dict, description="Organization → ε spent so far, or the most that it may spend, as it stated it."
    )
    disclosures: dict[str, dict[str, Number]] = Field(
        default_factory=dict,
        description="Organization → what it disclosed beside its delta, by name (table `disclosures` of a plan).",
    )
    client_privacy: ClientPrivacyEntry | None = Field(None, description="Client-level privacy; null without it.")
    participants: list[str] = Field(default_factory=list, description="Organizations whose update entered the round.")
    dropped: list[DroppedEntry] = Field(
        default_factory=list, description="Organizations that were asked and have no update in it, with the reason."
    )
    quarantined: list[str] = Field(
        default_factory=list, description="Organizations whose update was rejected, also a late one: a strike each."
    )
    timed_out: list[str] = Field(
        default_factory=list,
        description="Those of `dropped` that were connected and did not reply in time: a strike each, where at least half of"
        " those who were asked replied.",
    )
    absent: list[str] = Field(
        default_factory=list, description="Those of `dropped` that were not connected, or were lost and did not come back."
    )
    excluded: list[str] = Field(
        default_factory=list,
        description="Organizations that were not selected any more, after `server.strikes` strikes or as they were revoked.",
    )
    late: list[LateEntry] = Field(default_factory=list, description="Updates of earlier rounds that entered this one.")
    bytes_up: int = Field(0, description="Size of the updates, as Flower serializes arrays and values.")
    bytes_down: int = Field(0, description="Size of the requests.")
    seconds: Number = Field(0.0, description="Wall clock.")
    applied: bool = Field(
        True,
        description="False where the accuracy fell by more than `server.max_accuracy_drop` on the coordinator's validation"
        " records, or in a real run without them on its test set, or where organizations would refuse the state as extreme:"
        " the state before the round stayed.",
    )
    weights: dict[str, Number] = Field(
        default_factory=dict,
        description="Organization → its share of the round, of 1; empty under client-level privacy.",
    )
    norms: dict[str, Number] = Field(
        default_factory=dict, description="Organization → L2 norm of its update; empty under client-level privacy."
    )
    suspects: list[SuspectEntry] = Field(
        default_factory=list, description="Of a round that was not applied: the updates that stood out most, the first first."
    )
    metrics_not_applied: MetricsEntry | None = Field(
        None, description="Of a round that was not applied: its metrics; `metrics` are those of the state that stayed."
    )
