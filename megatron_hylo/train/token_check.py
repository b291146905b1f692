"""Check that a run's text, students and teacher have one tokenizer, before weights are read or a remote teacher is asked."""

from collections.abc import Mapping
from typing import Any

import torch

from megatron_hylo.config.paths import plain_path
from megatron_hylo.config.train import TrainConfig
from megatron_hylo.convert.hf_start import read_model_config
from megatron_hylo.data.tokenizer import check_dataset, check_dataset_ids, check_vocabulary_identity
from megatron_hylo.io import on_main
from megatron_hylo.teachers.remote import RemoteTeacher


def check_run_tokens(config: TrainConfig, vocab_size: int) -> None:
    """Compare the dataset with every model of a run that is read from a folder; all ranks call it.

    Args:
        config: the run.
        vocab_size: rows of the first student's embedding.

    Raises:
        ConfigError: a token of the dataset is beyond a vocabulary, or means another one to a model; names it.
    """

    def compare() -> None:
        """Read token ids and tokenizers on rank 0; ConfigError for a model that the dataset is not for."""
        check_dataset_ids(config.data, vocab_size, config.model or config.scratch or "")
        for folder in filter(None, (config.model, config.second_model, config.teacher)):
            check_dataset(config.data, plain_path(folder), read_model_config(folder).vocab_size)

    on_main(compare)


def check_teacher_tokens(config: TrainConfig, vocab_size: int, about: Mapping[str, Any] | None) -> None:
    """Compare the dataset with a teacher that is not on these ranks; all ranks call it.

    Args:
        config: the run.
        vocab_size: rows of the teacher's head.
        about: description by a remote teacher's server; None of a stored one, whose store was compared when it was opened.

    Raises:
        ConfigError: as `check_run_tokens`.
    """

    def compare() -> None:
        """Read token ids on rank 0; ConfigError for a teacher of another vocabulary."""
        check_dataset_ids(config.data, vocab_size, config.teacher_store or config.teacher_address or "")
        if about is not None:
            assert config.teacher_address is not None, "only a remote teacher is described by a server"
            check_vocabulary_identity(config.data, config.teacher_address, about.get("vocabulary"))

    on_main(compare)


def remote_description(teacher: RemoteTeacher) -> dict[str, Any]:
    """Share the description by a remote teacher's server with all ranks; all ranks call it."""
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, teacher.about)
    return next(filter(None, found), {})
