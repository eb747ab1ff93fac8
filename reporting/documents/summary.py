"""summary.json as models: the results of a run, simulated or real."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from cotune.reporting.documents.base import Document, Number
from cotune.reporting.documents.rounds import MetricsEntry, RoundEntry
from cotune.storage.json_documents import parse_json

_WHERE_REAL = "null in a real run"


class ClaimFigures(Document):
    """How much an organization's steps give away, of the one that spent most."""

    epsilon: Number = Field(description="ε at `delta`.")
    delta: Number = Field(description="δ.")
    epsilon_at_small_delta: Number = Field(description="ε of the same steps at δ = 1e-6.")
    gaussian_mu: Number = Field(description="μ of Gaussian differential privacy.")
    true_positive_rate: Number = Field(description="Share of the members, at most, that an attack finds at 1 % false alarms.")


class ClaimEntry(Document):
    """What is promised, in the form of NIST SP 800-226."""

    mechanism: str = Field(description="How noise is added.")
    unit: str = Field(description="`record`, or the column whose values are protected with all of their records.")
    max_records: int | None = Field(description="Records of a unit that count at most; null for a record.")
    neighbors: str = Field(description="Which data sets count as neighbors.")
    adversary: str = Field(description="Who is protected against.")
    accountant: str = Field(description="How ε is composed.")
    epsilon_allowed: Number = Field(description="ε of the plan.")
    delta_rule: str = Field(description="How δ follows from the number of records.")
    figures: ClaimFigures | None = Field(description=f"What was spent; {_WHERE_REAL}.")
    public: list[str] = Field(description="What counts as known to everybody.")
    not_covered: list[str] = Field(description="What no figure of this claim bounds.")


class PrivacySummary(Document):
    """Record-level privacy of the run."""

    mode: str = Field(description="`record`, or `none`.")
    epsilon: Number | None = Field(description="As in the plan.")
    delta: str | None = Field(description="As in the plan.")
    clip_norm: Number | None = Field(description="As in the plan; null where no gradient is clipped.")
    claim: ClaimEntry | None = Field(description="What is promised; null without record-level privacy.")
    claim_table: list[list[str]] = Field(description="The same as pairs of name and text.")
    epsilon_all_models: Number | None = Field(
        description=f"The largest over the organizations of their `epsilon_all_models`; {_WHERE_REAL}."
    )
    statement: list[str] = Field(description="What it means, in words: a list of paragraphs.")


class ClientPrivacySummary(Document):
    """Client-level privacy of the run."""

    epsilon: Number = Field(description="As in the plan.")
    delta: Number = Field(description="As in the plan.")
    epsilon_spent: Number = Field(description="Composed from the account, interrupted rounds included.")
    epsilon_spent_in_all_runs: Number = Field(description="The same over all runs of the federation.")
    delta_in_all_runs: Number = Field(description="δ of all runs of the federation.")
    runs: int = Field(description="Runs that the account was charged for.")
    rounds_charged: int = Field(description="Rounds that the account was charged for.")
    noise_multiplier: Number = Field(description="z of each round.")
    clipping: str = Field(description="As in the plan.")
    clip_norm: Number = Field(description="As in the plan; with adaptive clipping that of the round after the last.")
    sample_rate: Number = Field(description="As in the plan.")
    amplification: bool = Field(description="As in the plan.")
    expected_organizations: Number = Field(description="K, by which sums are divided.")
    statement: list[str] = Field(description="What it means, in words: a list of paragraphs.")


class ModelSummary(Document):
    """The model."""

    base: str = Field(description="Base model, as in the plan.")
    base_hash: str | None = Field(description="SHA-256 over its safetensors.")
    parameters: int = Field(description="Number of parameters of the whole model.")
    common: bool = Field(True, description="Whether there is one for all: false with personal parts.")
    shared_parameters: int = Field(description="Number of those that were trained and traveled.")


class DataSummary(Document):
    """The records of a simulation."""

    records: int = Field(description="How many can be used.")
    left_out: dict[str, int] = Field(description="Reason → how many others there are; also how many texts are cut.")
    notes: list[str] = Field(
        description="The same as sentences, of several files one for each that loses any; a warning where classes differ in"
        " spelling alone."
    )


class OverallWorth(Document):
    """Is it worth joining, over all organizations."""

    answer: str = Field(description="`yes`, `no`, `it depends` or `too close to tell`.")
    answers: dict[str, int] = Field(description="Number of organizations for each answer.")
    own_means: dict[str, MetricsEntry | None] = Field(description="Column → mean metrics on own held-out records.")


class PersonalGain(Document):
    """What personal parts change, over the organizations (their `personal_gain`)."""

    mean_gain: Number = Field(description="Mean over the organizations.")
    worst_gain: Number = Field(description="The smallest of them.")
    worst: str = Field(description="Whose it is.")


class TaskGain(Document):
    """What sharing the encoder changes for one task, on some test records with a label of it."""

    records: int = Field(description="Number of its test records.")
    federated: Number = Field(description="Accuracy of this run.")
    single: Number | None = Field(description="Accuracy of the same run with this task alone; null where not measured.")
    gain: Number | None = Field(description="`federated` less `single`; below 0: negative transfer.")
    interval: list[Number] = Field(description="95 % interval of the gain.")
    p: Number | None = Field(description="p-value of the paired test.")


class TaskSummary(Document):
    """One of several tasks of a simulation."""

    name: str = Field(description="Its name.")
    weight: Number = Field(description="λ, as in the plan.")
    classes: int = Field(description="Number of its classes.")
    holders: list[str] = Field(description="The organizations that have labels of it.")
    all: TaskGain | None = Field(description="On the common test set.")
    organizations: dict[str, TaskGain | None] = Field(description="Organization → the same on its own held-out records.")


class Repeated(Document):
    """Metrics of each organization's model."""

    mean: MetricsEntry = Field(description="Mean over the organizations.")
    each: dict[str, MetricsEntry] = Field(description="Organization → metrics.")


class WrittenFigures(Document):
    """How near written texts are to the true targets, each of 1."""

    exact_match: Number = Field(description="Share of the texts that are equal to their target, but for white space.")
    rouge_l: Number = Field(description="Mean F-measure of the longest common subsequence of words.")
    chrf: Number = Field(description="chrF2 of all texts.")
    bleu: Number = Field(description="BLEU of all texts.")


class WrittenSummary(Document):
    """What models write after prompts of some test records, always taking the most probable token."""

    examples: int = Field(description="Records that were written for.")
    left_out: int = Field(description="Others, whose prompts are longer than the model reads.")
    max_new_tokens: int = Field(description="Most tokens of a text.")
    figures: dict[str, WrittenFigures] = Field(
        description="`first_sentence` of the prompt, `base` (the unchanged base model), `federated`; of a simulation also"
        " `alone`, `alone_without_privacy` (means over the organizations) and `pooled`, where they were "
        "trained."
    )
    shown: list[dict[str, str]] = Field(
        description="Ten of the records: `prompt`, `target`, and the texts `base` and `federated`."
    )


class TestSummary(Document):
    """Figures on the common test set; in a real run on the coordinator's own, if it has one."""

    __test__ = False  # no test of pytest's

    examples: int = Field(description="Size of the test set; 0: there is none.")
    majority: MetricsEntry | None = Field(
        description="Always answering the most frequent class of the training data (in a real run: of the test set); of texts,"
        " the unchanged base model."
    )
    alone: Repeated | None = Field(
        description=f"Each organization training by itself: same plan, privacy and number of steps; {_WHERE_REAL}."
    )
    alone_without_privacy: Repeated | None = Field(description="The same without privacy.")
    plain: MetricsEntry | None = Field(
        None, description=f"The same run without personal parts; null where the plan has none; {_WHERE_REAL}."
    )
    federated: MetricsEntry | None = Field(
        description="The fused model after the last round; with personal parts the mean over the organizations' own models, and"
        " null in a real run."
    )
    adapted: Repeated | None = Field(description="The federated model as each organization has adapted it.")
    pooled: MetricsEntry | None = Field(description=f"All training data in one place, without privacy: the bound; {_WHERE_REAL}.")
    written: WrittenSummary | None = Field(
        None, description="Texts that models write, where the plan asks for them (`generate`) and there is a common model."
    )


class ColumnFigures(MetricsEntry):
    """Metrics with intervals."""

    accuracy_interval: list[Number] = Field([], description="Classes and texts: 95 % interval of the accuracy.")
    f1_interval: list[Number] = Field([], description="Classes: 95 % interval of F1.")
    loss_interval: list[Number] = Field([], description="Texts: 95 % interval of the loss.")
    mse_interval: list[Number] = Field([], description="Numbers: 95 % interval of the mean squared error.")
    micro_f1_interval: list[Number] = Field([], description="Label sets: 95 % interval of micro F1.")
    token_f1_interval: list[Number] = Field([], description="Questions: 95 % interval of F1.")


class OwnFigures(Document):
    """Figures of an organization on a test set, by column; null where not measured."""

    records: int = Field(description="Size of the test set.")
    accuracy: Number | None = Field(description="Of the federated model; null where the task has none.")
    majority: ColumnFigures | None = Field(
        description="Always answering its most frequent class; of texts, the unchanged base model."
    )
    alone: ColumnFigures | None = Field(description="The model that it trained alone.")
    alone_without_privacy: ColumnFigures | None = Field(description="The same without privacy.")
    plain: ColumnFigures | None = Field(None, description="The federated model of the same run without personal parts.")
    federated: ColumnFigures | None = Field(description="The federated model; with personal parts its own.")
    adapted: ColumnFigures | None = Field(description="The federated model as it has adapted it.")


class OrganizationWorth(Document):
    """Is it worth joining, for one organization."""

    answer: str = Field(description="`yes`, `no` or `too close to tell`.")
    useful: bool = Field(description="Whether the model is better than a constant answer.")
    joined: str = Field(description="The column that stands for joining.")
    against: str = Field(description="The column that it is compared with.")
    difference: Number = Field(
        description="By how much joining is better: accuracy, nats per token, mean squared error, or micro F1."
    )
    interval: list[Number] = Field(description="Its 95 % interval.")
    p: Number = Field(description="p-value of the test.")
    test: str = Field(description="Which test.")
    few: bool = Field(description="Whether there are fewer than 200 test units.")


class AdaptationSummary(Document):
    """How an organization has adapted the federated model."""

    method: str = Field(description="`federated`, `prior`, `head`, `mix` or `alone`.")
    described: str = Field(description="The method with its strength.")
    tried: dict[str, Number] = Field(description="Method → accuracy on parts of its training records.")


class OrganizationSummary(Document):
    """One organization. In a real run what the coordinator does not know is null."""

    name: str = Field(description="Its name.")
    examples: int | None = Field(None, description="Number of training records, or of units.")
    labels: dict[str, int] | None = Field(None, description="Class → count of records, or tag → count of words.")
    alone: MetricsEntry | None = Field(None, description="The model that it trained alone, on the common test set.")
    personal: MetricsEntry | None = Field(None, description="Its own model; null where the model is common.")
    epsilon_spent: Number | None = Field(
        None,
        description="ε composed from its ledger; in a real run as stated with its last update in the model, so without "
        "what it spent on updates that did not arrive.",
    )
    epsilon_allowed: Number | None = Field(
        None, description="The largest ε that it spends; in a real run that of the plan: its own policy may allow less."
    )
    epsilon_all_models: Number | None = Field(
        None, description="ε of this run and of the model that it trained alone, composed, as both are reported in one summary."
    )
    delta: Number | None = Field(None, description="δ of these figures.")
    noise_multiplier: Number | None = Field(None, description="σ of its steps.")
    sample_rate: Number | None = Field(None, description="q of its steps.")
    steps: int | None = Field(None, description="Optimizer steps.")
    rounds: int = Field(description="Rounds that it took part in.")
    own: OwnFigures | None = Field(None, description="Figures on its own held-out records; null without any.")
    common: OwnFigures | None = Field(None, description="Figures on the common test set.")
    worth: OrganizationWorth | None = Field(None, description="Whether joining is worth it; null where it was not measured.")
    adaptation: AdaptationSummary | None = Field(None, description="How it has adapted the federated model.")
    gain: Number | None = Field(None, description="`difference` of `worth`.")
    personal_gain: Number | None = Field(
        None,
        description="Accuracy of its own model on its own held-out records, less that of the same run without personal parts.",
    )
    bytes_up: int | None = Field(None, description="Real run: size of all its updates, interrupted rounds included.")
    weight: Number | None = Field(None, description="Real run: its share in the last round that it took part in, of 1.")
    dropped: int | None = Field(None, description="Real run: rounds without an update of it.")
    quarantined: int | None = Field(None, description="Real run: rounds in which an update of it was rejected.")
    excluded: bool | None = Field(None, description="Real run: whether it is excluded after too many strikes.")
    delivered: bool | None = Field(None, description="Real run: whether it has confirmed the finished model.")


class BytesSummary(Document):
    """What traveled: arrays and values as Flower serializes them."""

    up: int = Field(description="Sum over the rounds, of updates.")
    down: int = Field(description="Sum over the rounds, of requests.")


class PublicSummary(Document):
    """Public inputs."""

    answers: int = Field(description="Predictions that they ask for.")
    license: str = Field(description="As the plan gives it.")
    sha256: str = Field(description="Over the inputs in their order.")


class RunSummary(Document):
    """summary.json."""

    schema_version: int = Field(alias="schema", description="1; raised when a key changes its meaning or goes.")
    run: str = Field(description="Name of the run.")
    plan: str = Field(description="Name of the plan.")
    plan_id: str = Field(description="SHA-256 of the plan's canonical form.")
    created: str = Field(description="When the run was made (UTC).")
    engine: str = Field(description="`in-process`, `ray`, `flower` or `superlink`.")
    status: str = Field(description="`finished` or `stopped`.")
    stopped: str | None = Field(description="Why the run ended before its last round; null if it did not.")
    client_privacy: ClientPrivacySummary | None = Field(description="Client-level privacy; null without it.")
    model: ModelSummary = Field(description="The model.")
    task: str | None = Field(None, description="What the records are read as; absent in runs of earlier builds.")
    labels: list[str] = Field(description="Class names in the order of the head; empty where there are no classes.")
    federation: str | None = Field(None, description="Real run: folder of the federation.")
    privacy: PrivacySummary = Field(description="Record-level privacy.")
    partition: str | None = Field(description=f"How records were shared out: `simulation.partition`, or `files`; {_WHERE_REAL}.")
    data: DataSummary | None = Field(None, description="The records; absent in a real run.")
    worth: OverallWorth | None = Field(
        description="[Is it worth joining](worth.md), over all organizations; null where training alone was not measured."
    )
    personal: PersonalGain | None = Field(
        None, description="What [personal parts](personal.md) change; null without them, or where that was not measured."
    )
    collaboration: str = Field(
        "parameters", description="What organizations shared: updates of `parameters`, or `predictions` for public inputs."
    )
    public: PublicSummary | None = Field(
        None, description="The public inputs that [models learned from](distill.md); absent where the plan names none."
    )
    tasks: list[TaskSummary] = Field(
        default_factory=list, description="Several tasks on one encoder ([docs](several-tasks.md)); absent otherwise."
    )
    test: TestSummary = Field(description="Figures on the common test set.")
    organizations: list[OrganizationSummary] = Field(description="The organizations.")
    rounds: list[RoundEntry] = Field(description="The rounds.")
    bytes: BytesSummary = Field(description="Size of what was exchanged.")
    seconds: Number = Field(
        description="Wall clock, preparation and baselines included; of a resumed run without rounds that were lost; of a"
        " real run,"
        " of the finished rounds."
    )
    peak_memory_bytes: int | None = Field(
        description="Resident set of the process at its largest; with workers, the sum over all processes."
    )
    peak_gpu_memory_bytes: int | None = Field(
        None,
        description="The most memory of one GPU that the process held in tensors; with workers, the sum over all"
        " processes; null without a GPU.",
    )
    versions: dict[str, str] = Field(description="Versions of Python and of the packages.")
    reproduce: list[str] = Field(description="The command that repeats the run.")


def read_summary(file: Path) -> RunSummary:
    """Read a summary.json.

    Raises:
        OSError: It cannot be read.
        ValueError: It is not the summary of a run.
    """
    return RunSummary.model_validate(parse_json(file.read_bytes()))
