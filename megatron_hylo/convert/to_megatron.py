"""Conversion of a Hugging Face folder or GGUF file to a Megatron model folder."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_hylo.config import ModelConfig
from megatron_hylo.convert.folder_source import FolderSource
from megatron_hylo.convert.hf_reader import open_source
from megatron_hylo.convert.streaming import SHARD_BYTES
from megatron_hylo.convert.token_ids import save_tokenizer
from megatron_hylo.convert.verify import require_equal
from megatron_hylo.convert.write_folders import write_model_folder
from megatron_hylo.io import check_free, rank
from megatron_hylo.io.foreign import load_transformers
from megatron_hylo.io.gguf_file import gguf_file
from megatron_hylo.io.progress import Track, no_progress
from megatron_hylo.io.provenance import made_by


def convert_hf_to_megatron(
    source: str | Path,
    output: str | Path,
    overwrite: bool = False,
    track: Track = no_progress,
    verify: bool = True,
    shard_bytes: int = SHARD_BYTES,
) -> ModelConfig:
    """Convert a Hugging Face folder or GGUF file to a model folder; `platform.initialize` must have run.

    No weight is rounded: all are bfloat16 where all are stored so, else all float32. Quantised weights are dequantised. One
    tensor, or the parts of one fused tensor, is in memory at a time; a killed conversion goes on at the shard where it was.

    Args:
        source: folder with config.json and safetensors, or a .gguf file, or a folder with one.
        output: the model folder to make.
        overwrite: replace what is there.
        track: progress display over an iterable.
        verify: compare tensors and logits with transformers' loading of the source, before the folder appears.
        shard_bytes: largest size of a file of weights.

    Returns:
        The model's configuration.

    Raises:
        ConfigError: the source cannot be converted or changes meanwhile, the disk is full, or what was made is another model;
            nothing is left at `output`.
    """
    check_free(output, overwrite, [source])
    opened = open_source(source)
    with ThreadPoolExecutor(2) as beside:  # the source is hashed, and the tokenizer's library imported, while it is read
        made: Future[dict[str, Any]] | None = None
        if rank() == 0:
            name = (gguf_file(Path(source)) or Path(source)).name
            made = beside.submit(made_by, "convert", {"source": source}, converted_from=name)
            beside.submit(load_transformers)

        def provenance() -> dict[str, Any]:
            """Wait for the description of source and versions, which is made beside the conversion."""
            assert made is not None, "rank 0 asks"
            return made.result()

        def check(folder: Path) -> None:
            """Refuse a source that has changed and, with `verify`, a folder whose weights or logits are not the source's."""
            opened.require_unchanged()
            if verify:
                require_equal(FolderSource(folder, verify_hashes=False), opened, source, track)

        write_model_folder(
            output, opened.config, opened.dtype(), opened.read, opened.state(), provenance,
            lambda folder: save_tokenizer(Path(source), folder / "tokenizer"), check, overwrite, (source,), shard_bytes, track,
        )  # fmt: skip
    return opened.config
