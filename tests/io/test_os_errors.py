"""A full disk is one sentence, whichever library met it."""

import resource

import pytest
import torch
from safetensors.torch import save_file

from megatron_hylo.config import ConfigError
from megatron_hylo.io import plain_os_errors


def test_a_disk_without_space_is_one_sentence_from_safetensors_too(tmp_path):
    """A limit on the size of files stands for the full disk: the kernel refuses the write in the same way."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        with pytest.raises(ConfigError, match="^file too large; make space, or look at your quota, and run again"):
            with plain_os_errors():
                save_file({"a": torch.zeros(1 << 16)}, tmp_path / "a.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_other_errors_pass_unchanged():
    with pytest.raises(ValueError, match="os error 28"), plain_os_errors():
        raise ValueError("os error 28")
