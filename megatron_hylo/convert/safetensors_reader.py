"""Read a Hugging Face folder of safetensors, sharded or not, tensor by tensor.

Everything that can be wrong with the files is found before the first tensor is used: headers of all shards are
read and compared with the index, the sizes and the names that the configuration asks for.
"""

import json
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_hylo.config import ConfigError
from megatron_hylo.config.tensor_names import tensor_names
from megatron_hylo.convert.hf_config import model_config_from_hf
from megatron_hylo.convert.quantised import HARMLESS as HARMLESS_IF_QUANTISED
from megatron_hylo.convert.quantised import find_scaled, read_quantisation
from megatron_hylo.convert.safetensors_files import SafetensorsFile, file_state, require_unchanged
from megatron_hylo.convert.source_names import HARMLESS, refuse_adapter, refuse_unused
from megatron_hylo.convert.source_path import read_hf_config

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth", "model.pt")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FLOATS = ("BF16", "F16", "F32", "F64")  # as safetensors names them
KEPT_IN_FLOAT32 = (".A_log", ".dt_bias", ".D")  # by the model, whatever its other weights are
logger = logging.getLogger("megatron_hylo.convert")


class SafetensorsSource:
    """A Hugging Face folder, read tensor by tensor.

    Which file is read, what is tied and which tensors may be passed over follows transformers 5, except that what it
    drops with a warning is refused here.

    Args:
        folder: with config.json and weights.

    Attributes:
        config: the model's.
        quantisation: what config.json says of it; None for a folder that is not quantised.
        stored: name -> (safetensors' dtype, shape), as in the files.

    Raises:
        ConfigError: the model or a format is not read, or a file or a tensor is missing, left over or of another shape.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        values = read_hf_config(self.folder)
        self.config = model_config_from_hf(values)
        refuse_adapter(self.folder)
        if (named := values.get("transformers_weights")) not in (None, SINGLE, INDEX):
            raise ConfigError(f"{self.folder}: config.json has transformers_weights {named!r}; read are {SINGLE} or {INDEX}")
        self.quantisation = read_quantisation(self.folder, values)
        self._config_state = file_state(self.folder / "config.json")
        self._files: dict[str, SafetensorsFile] = {}
        self.shard_of: dict[str, str] = {}
        self.stored: dict[str, tuple[str, tuple[int, ...]]] = {}  # name -> (safetensors dtype, shape)
        self._alias: dict[str, str] = {}  # asked for -> stored, of tied embeddings
        self._read_headers()
        self.scaled = find_scaled(self.folder, self.quantisation, self.stored)
        self._tie()
        self._check_tensors()

    def _shards(self) -> dict[str, list[str]]:
        """Map the files to read to the tensors that the index places there; `model.safetensors` goes before an index."""
        index = self.folder / INDEX
        there = {file.name for file in self.folder.glob("*.safetensors")}
        if SINGLE in there:
            shards: dict[str, list[str]] = {SINGLE: []}
        elif index.is_file():
            shards = _read_index(index)
            if extra := sorted(name for name in there - set(shards) if re.fullmatch(r"model-\d+-of-\d+\.safetensors", name)):
                raise ConfigError(
                    f"{self.folder / extra[0]} is not named by {INDEX}: shards of two checkpoints seem to be mixed; download "
                    "the checkpoint again, or remove the shards that do not belong to it"
                )
        else:
            raise ConfigError(_no_weights(self.folder, there))
        if unread := sorted(there - set(shards)):
            logger.warning("%s: read is %s, as transformers does; not read: %s", self.folder, min(shards), ", ".join(unread))
        return shards

    def _read_headers(self) -> None:
        for shard, placed in sorted(self._shards().items()):
            if not (self.folder / shard).is_file():
                raise ConfigError(f"{self.folder / shard} is missing, though the index names it; download the checkpoint again")
            file = self._files[shard] = SafetensorsFile(self.folder / shard)
            present = set(file.stored)
            wanted = tensor_names(self.config)
            if lost := [name for name in placed if name in wanted and name not in present]:
                raise ConfigError(f"{self.folder / shard} lacks tensor {lost[0]}, though the index places it there")
            if twice := sorted(present & set(self.shard_of)):
                raise ConfigError(
                    f"{self.folder}: tensor {twice[0]} is in both {self.shard_of[twice[0]]} and {shard}; only one can count, "
                    "so download the checkpoint again"
                )
            self.shard_of |= dict.fromkeys(sorted(present), shard)
            self.stored |= file.stored

    def require_unchanged(self) -> None:
        """Refuse a folder of which a file was changed since it was opened.

        Raises:
            ConfigError: it names the file.
        """
        require_unchanged(self.folder / "config.json", self._config_state)
        for file in self._files.values():
            file.require_unchanged()

    def files(self) -> list[str]:
        """List the names of the files that hold weights."""
        return sorted(self._files)

    def state(self) -> list[Any]:
        """Describe the files that are read, as JSON: names, sizes and times of change."""
        files = {name: list(file.state) for name, file in self._files.items()}
        return [str(self.folder.resolve()), {"config.json": list(self._config_state)} | files]

    def _tie(self) -> None:
        """Tie embeddings as transformers 5 does: not where both are stored and differ, by either where one is."""
        if self.config.untie_embeddings_and_output_weights or HEAD not in self.stored:
            return
        if EMBEDDING not in self.stored:
            self._alias[EMBEDDING] = HEAD
        elif self.stored[HEAD][1] != self.stored[EMBEDDING][1] or not torch.equal(
            self.read(HEAD).float(), self.read(EMBEDDING).float()
        ):
            logger.warning(
                "%s: tie_word_embeddings is true, but the stored %s differs from %s; both are kept, as transformers does",
                self.folder, HEAD, EMBEDDING,
            )  # fmt: skip
            self.config = self.config.replace(untie_embeddings_and_output_weights=True)
        else:
            self._alias[HEAD] = EMBEDDING

    def _check_tensors(self) -> None:
        used = set(self._alias) | set(self._alias.values())
        for name, shape in tensor_names(self.config).items():
            stored = self._alias.get(name, name)
            if stored not in self.stored:
                raise ConfigError(f"{self.folder} has no tensor {name}, which its config.json asks for")
            dtype, found = self.stored[stored]
            if found != tuple(shape):
                raise ConfigError(f"tensor {name} has shape {list(found)}, config.json asks for {list(shape)}")
            if stored not in self.scaled and dtype not in FLOATS:
                raise ConfigError(
                    f"{self.folder}: tensor {name} is stored as {dtype}; weights are {', '.join(FLOATS)}, or quantised"
                )
            used |= set(self.scaled[stored].names()) if stored in self.scaled else {stored}
        known = {name for name in self.stored if HARMLESS.search(name)}
        if self.quantisation is not None:
            known |= {name for name in self.stored if HARMLESS_IF_QUANTISED.search(name)}
        refuse_unused(self.folder, set(self.stored) - used - known, self.config)

    def _read_stored(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        return self._files[self.shard_of[name]].read(name, rows)

    def is_quantised(self, name: str) -> bool:
        """Whether the tensor of that name is dequantised when it is read, so that it can only be read as a whole."""
        return self._alias.get(name, name) in self.scaled

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """Read the tensor of that name, dequantised.

        Args:
            name: of the tensor.
            rows: first row and the one after the last, of a tensor that is not quantised; by default all.

        Raises:
            ConfigError: it has values that are no numbers, or float64 values that float32 does not hold.
        """
        name = self._alias.get(name, name)
        if name in self.scaled:
            assert rows is None, f"{name} is quantised"
            tensor = self.scaled[name].read(self._read_stored)
        else:
            tensor = self._read_stored(name, rows)
        return checked(name, tensor, self.folder)

    def close(self) -> None:
        """Close all files."""
        for file in self._files.values():
            file.close()

    def dtype(self) -> torch.dtype:
        """Return bfloat16 where every weight is stored in it (but for those that the model keeps in float32), else float32."""
        names = [self._alias.get(name, name) for name in tensor_names(self.config) if not name.endswith(KEPT_IN_FLOAT32)]
        return torch.bfloat16 if {self.stored[name][0] for name in names} == {"BF16"} else torch.float32


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor of any shape has no NaN and no infinite values; in one pass, without a mask as large as it."""
    if not tensor.numel():
        return True
    ends = torch.stack(torch.aminmax(tensor))
    return bool(torch.isfinite(ends).all())


def checked(name: str, tensor: Tensor, where: Path) -> Tensor:
    """Check a weight and return it in bfloat16 or float32, unrounded.

    Args:
        name: for messages.
        tensor: as it is stored, or dequantised.
        where: file or folder, for messages.

    Raises:
        ConfigError: values that are no numbers, or float64 values that float32 does not hold.
    """
    if not is_finite(tensor):
        raise ConfigError(f"{where}: tensor {name} holds NaN or infinite values; the checkpoint is damaged, download it again")
    if tensor.dtype == torch.bfloat16:
        return tensor
    exact = tensor.float()
    if tensor.dtype == torch.float64 and not torch.equal(exact.double(), tensor):
        raise ConfigError(
            f"{where}: tensor {name} is float64 and holds values that float32 does not; models are float32 or bfloat16 here: "
            "save it in one of them first (model.float().save_pretrained(...))"
        )
    return exact


def _read_index(file: Path) -> dict[str, list[str]]:
    """Read model.safetensors.index.json: shard -> names of tensors."""
    try:
        shard_of = json.loads(file.read_text())["weight_map"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} is not an index of shards ({error!r}); download the checkpoint again") from error
    shards: dict[str, list[str]] = {}
    for name, shard in shard_of.items():
        if Path(shard).name != shard:
            raise ConfigError(f"{file} names {shard!r}, which is not a file of the folder")
        shards.setdefault(shard, []).append(name)
    return shards


def _no_weights(folder: Path, there: Iterable[str]) -> str:
    message = f"{folder} holds neither {SINGLE} nor {INDEX}; "
    if not (others := sorted(there) or [name for name in PICKLES if (folder / name).is_file()]):
        return message + "it has no weights; if its download was interrupted, the same `hf download` command completes it"
    return (
        f"{message}only safetensors checkpoints are read, not {', '.join(others)}: let transformers write one, "
        f"AutoModelForCausalLM.from_pretrained({str(folder)!r}, dtype='auto').save_pretrained(NEW_FOLDER)"
    )
