"""Whether a run's text, students and teacher are of one tokenizer; before weights are read or a remote teacher is asked."""

from collections.abc import Mapping
from typing import Any

from megatron_hylo.data.tokenizer import check_dataset, check_dataset_ids, check_vocabulary_identity
from megatron_hylo.models.checkpoint import read_description
from megatron_hylo.platform.distributed import is_main
from megatron_hylo.train.config import TrainConfig


def check_run_tokens(config: TrainConfig, vocab_size: int) -> None:
    """Compare the dataset with every model folder of a run; the main rank does.

    Args:
        config: the run.
        vocab_size: rows of the first student's embedding.

    Raises:
        ConfigError: a token of the dataset is beyond a vocabulary, or means another one to a model; names it.
    """
    if is_main():
        check_dataset_ids(config.data, vocab_size, config.model or config.scratch)
        for folder in filter(None, (config.model, config.second_model, config.teacher)):
            check_dataset(config.data, folder, read_description(folder)[0].vocab_size)


def check_teacher_tokens(config: TrainConfig, vocab_size: int, about: Mapping[str, Any] | None) -> None:
    """Compare the dataset with a teacher that is not on these ranks.

    Args:
        config: the run.
        vocab_size: rows of the teacher's head.
        about: what a remote one's server says of it; None of a stored one, whose store was compared when it was opened.

    Raises:
        ConfigError: as `check_run_tokens`.
    """
    if is_main():
        check_dataset_ids(config.data, vocab_size, config.teacher_store or config.teacher_address)
        if about is not None:
            check_vocabulary_identity(config.data, config.teacher_address, about.get("vocabulary"))
