"""Settings of synthetic recall in training text."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from megatron_hylo.config.errors import ConfigError

RecallTask = Literal["key_value", "several_keys", "several_values", "variable_chain", "passkey", "counting"]
RECALL_TASKS: tuple[RecallTask, ...] = get_args(RecallTask)


@dataclass
class RecallSettings:
    """Facts and questions about them, inserted in the training windows as they are read; none by default.

    Args:
        share: part of each window's tokens that are facts, questions and answers, in [0, 0.9]; the rest is text of the dataset.
            0: none.
        tasks: drawn with equal probability, twice where named twice: key_value: one fact; several_keys: one to four of up to
            twelve facts like each other; several_values: all facts of one key; variable_chain: a value handed from name to
            name; passkey: a number or code that the text asks to remember; counting: how often something occurs.
        answer_weight: weight of cross-entropy at the answers' tokens, per token, beside the KL (distil) or the cross-entropy
            (pretrain) of all tokens; stage align ignores it. Raise it where windows are longer than the teacher's own: recipes
            have 10 there, as the best run had. Inside, more than 1 brought fewer of RULER's answers back (docs/text.md).
        kl_within: an answer's tokens have a KL only where the fact is at most so many tokens back. 0: none has, since a teacher
            that did not find the fact teaches a guess; null: all have.
        cross_entropy: exercises' tokens that have the text's cross-entropy, which distil.ce_weight weighs and which is
            pretrain's loss. all: all of them; answers: not facts and questions, so that it does not teach the model to write
            them unasked. Their KL and answer_weight stay. Not measured yet.
    """

    share: float = 0.0
    tasks: list[RecallTask] = field(default_factory=lambda: list(RECALL_TASKS))
    answer_weight: float = 1.0
    kl_within: int | None = 0
    cross_entropy: Literal["all", "answers"] = "all"

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 0.9:
            raise ConfigError(f"recall.share must be at least 0 and at most 0.9, got {self.share}")
        if self.answer_weight < 0:
            raise ConfigError(f"recall.answer_weight must be at least 0, got {self.answer_weight}")
        if self.kl_within is not None and self.kl_within < 0:
            raise ConfigError(f"recall.kl_within must be at least 0 tokens, or null, got {self.kl_within}")
        unknown = sorted(set(self.tasks) - set(RECALL_TASKS))
        if unknown or not self.tasks:
            raise ConfigError(f"recall.tasks has {unknown or 'no task'}; give some of {', '.join(RECALL_TASKS)}")
