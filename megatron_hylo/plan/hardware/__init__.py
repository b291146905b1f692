"""Figures of GPUs from the makers' data sheets, one YAML file a GPU in this folder; a new file is a new GPU."""

import functools
from dataclasses import dataclass, fields
from pathlib import Path

from megatron_hylo.config import ConfigError, from_dict
from megatron_hylo.plan.yaml_files import read_yaml

GB, TERA = 1e9, 1e12


@dataclass(frozen=True)
class Hardware:
    """One kind of GPU and the links around it, as the data sheet has them; what is reached of them is in rates.yaml.

    Args:
        words: part of the name that the driver gives.
        memory_gib: memory that a process can have, GiB.
        bf16_tflops: dense matrix products in bf16, TFLOP/s.
        fp8_tflops: the same in FP8; None where there is none.
        memory_gb_s: bandwidth of its memory, GB/s.
        link_gb_s: to the GPUs of its node, one direction, GB/s.
        gpus_per_node: GPUs that these links join.
        network_gb_s: to other nodes, one direction, GB/s a GPU.
        host_gb_s: to the CPU's memory, one direction, GB/s.
        watts: power limit.
        name: of its file.
    """

    words: str
    memory_gib: float
    bf16_tflops: float
    fp8_tflops: float | None
    memory_gb_s: float
    link_gb_s: float
    gpus_per_node: int
    network_gb_s: float
    host_gb_s: float
    watts: float
    name: str = ""

    def __post_init__(self) -> None:
        for key in (field.name for field in fields(self) if field.name not in ("words", "name")):
            value = getattr(self, key)
            if not (isinstance(value, (int, float)) and value > 0) and not (key == "fp8_tflops" and value is None):
                raise ConfigError(f"{key} of GPU {self.name} must be a number above 0, got {value!r}")

    @property
    def measured(self) -> bool:
        """Whether the rates of rates.yaml were measured on this kind of GPU."""
        return self.words in ("H100", "H200")

    def peak(self, fp8: bool = False) -> float:
        """FLOP/s of dense matrix products.

        Raises:
            ConfigError: FP8 on a GPU without it.
        """
        if not fp8:
            return self.bf16_tflops * TERA
        if self.fp8_tflops is None:
            raise ConfigError(f"{self.name} has no FP8; leave FP8 out")
        return self.fp8_tflops * TERA

    def bandwidth(self, group: int) -> float:
        """Bytes a second between neighbours of a group of ranks that spans `group` consecutive GPUs."""
        return (self.link_gb_s if group <= self.gpus_per_node else self.network_gb_s) * GB


def names() -> list[str]:
    """Names that `get_hardware` knows."""
    return sorted(file.stem for file in Path(__file__).parent.glob("*.yaml"))


@functools.cache
def get_hardware(name: str) -> Hardware:
    """Read a GPU's file.

    Args:
        name: of a file in this folder, or the path of one's own YAML file.

    Raises:
        ConfigError: no such GPU, keys that are none, or figures that are no numbers.
    """
    file = Path(name) if name.endswith((".yaml", ".yml")) else Path(__file__).parent / f"{name.lower()}.yaml"
    if not file.is_file():
        raise ConfigError(f"unknown GPU {name!r}; known: {', '.join(names())}, or the path of a YAML file like theirs")
    values = read_yaml(file.read_text(), file, f"write keys as {Path(__file__).parent / 'h100-80gb.yaml'} has them")
    return from_dict(Hardware, values | {"name": file.stem}, str(file))


def of_device(name: str) -> Hardware | None:
    """Hardware of a device by the name that its driver gives: the one with the longest word in it; None for an unknown one."""
    known = [get_hardware(file) for file in names()]
    return max((one for one in known if one.words in name), key=lambda one: len(one.words), default=None)
