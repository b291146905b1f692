"""The windows that a run trains on, as its settings say."""

from functools import partial

from megatron_hylo.config import ConfigError
from megatron_hylo.config.train import TrainConfig
from megatron_hylo.data.load_tokenizer import load_transformers_tokenizer
from megatron_hylo.data.packed import PackedDataset
from megatron_hylo.data.preprocess import plain_encoder
from megatron_hylo.data.recall import RecallWindows
from megatron_hylo.data.windows import WindowSource


def training_windows(config: TrainConfig) -> WindowSource:
    """Windows of `config.sequence_length` of the run's text, with recall where it asks for it.

    Raises:
        ConfigError: no dataset, one shorter than a window, or, for recall, without a tokenizer.
        DamagedError: the dataset's files contradict each other.
    """
    make = partial(PackedDataset, f"{config.data}/train", seed=config.seed)
    if not config.recall.share:
        return make(sequence_length=config.sequence_length)
    tokenizer = load_transformers_tokenizer(f"{config.data}/tokenizer")
    if tokenizer is None:
        raise ConfigError(
            f"{config.data}/tokenizer holds no tokenizer, which recall.share needs; make it with `hylo preprocess`"
        )
    return RecallWindows(
        lambda length: make(sequence_length=length),
        config.sequence_length,
        config.recall,
        plain_encoder(tokenizer),
        config.seed,
        config.packed_documents,
    )
