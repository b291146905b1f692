"""Errors that torch's compiler or allocator meets keep their kind at the edge of the program: sentence and exit code."""

import errno
import resource

import pytest
import torch

from megatron_hylo.cli.boundary import EXIT_ERROR, EXIT_FAILURE, plain_errors
from megatron_hylo.config import ConfigError
from megatron_hylo.kernels.norm import rms_norm


def ended(capsys, work) -> tuple[int, str]:
    """Exit code and words of work inside of the edge."""
    with pytest.raises(SystemExit) as left, plain_errors("train", "RUN"):
        work()
    return left.value.code, " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("met", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "CUDA out of memory; take a smaller"),
        (MemoryError(), "the machine's memory is used up"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/cache/kernel.cpp"),
            "torch.compile, whose files are in TORCHINDUCTOR_CACHE_DIR: /cache/kernel.cpp: no space left on device",
        ),
    ],
    ids=["memory of the GPU", "memory", "full disk"],
)
@pytest.mark.parametrize("phase", ["tracing", "lowering"])
def test_what_ends_a_compilation_is_said_in_a_sentence(capsys, monkeypatch, met, said, phase):
    from torch._dynamo.symbolic_convert import InstructionTranslatorBase

    def fail(*_):
        raise met

    torch._dynamo.reset()
    if phase == "tracing":
        monkeypatch.setattr(InstructionTranslatorBase, "step", fail)
    compiled = torch.compile(lambda x: x + 1, backend="eager" if phase == "tracing" else fail)
    code, words = ended(capsys, lambda: compiled(torch.ones(3)))
    assert code == EXIT_FAILURE and words.startswith(f"error: {said}") and "user code" not in words, words


def test_errors_of_compiled_functions_are_those_of_the_functions(capsys):
    def refused(x: torch.Tensor) -> torch.Tensor:
        raise ConfigError("3 is not 4")

    with pytest.raises(ValueError, match="rms_norm: weight has shape"):
        torch.compile(rms_norm, backend="eager")(torch.ones(2, 8), torch.ones(9), 1e-6)
    code, words = ended(capsys, lambda: torch.compile(refused, backend="eager")(torch.ones(3)))
    assert (code, words) == (EXIT_ERROR, "error: 3 is not 4")


def test_a_fault_inside_the_compiler_keeps_its_traceback():
    def backend(*_):
        raise KeyError("a fault")

    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="a fault"), plain_errors("train"):
        torch.compile(lambda x: x + 2, backend=backend)(torch.ones(3))


@pytest.mark.parametrize(
    "met",
    [
        RuntimeError("can't start new thread"),
        RuntimeError("Resource temporarily unavailable"),
        ImportError("\nadvice\n\nOriginal error was: libblas.so: failed to map segment from shared object\n"),
    ],
)
def test_a_limit_of_the_process_is_said_in_a_sentence(capsys, monkeypatch, met):
    def work():
        raise met

    monkeypatch.setattr(resource, "getrlimit", lambda kind: (2**32, 2**32))
    code, words = ended(capsys, work)
    assert code == EXIT_FAILURE and words.startswith("error: a limit of this process is too low ("), words
    assert str(met).split("\n")[-2 if "\n" in str(met) else 0] in words and words.endswith(
        "raise ulimit -v, ulimit -u or the container's pids.max"
    )


def test_a_library_that_cannot_be_mapped_without_a_limit_may_be_on_a_noexec_disk(capsys, monkeypatch):
    def work():
        raise ImportError("/tmp/a.so: failed to map segment from shared object")

    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY,) * 2)
    code, words = ended(capsys, work)
    assert code == EXIT_FAILURE and "/tmp/a.so" in words and "noexec" in words and "ulimit" not in words


def test_too_large_a_tensor_on_a_cpu_is_said_in_a_sentence(capsys):
    code, words = ended(capsys, lambda: torch.empty(10**15))  # torch's CPU allocator raises a RuntimeError
    assert code == EXIT_FAILURE and words.startswith("error: the machine's memory is used up; "), words
