"""Shared fixtures: one process group of a single rank for the whole session, tiny models, a tiny dataset."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
import transformers
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_hylo.config import ModelConfig
from megatron_hylo.convert.mapping import model_entries
from megatron_hylo.models.hylo_model import HyloModel, build_model
from megatron_hylo.platform.distributed import session
from tests.forked import Program, end_programs

# Files that take longest. Workers of xdist take files in this order, so that neither begins a long one when the other is done.
LONGEST = (
    "parity/test_pretraining.py",
    "parity/test_distillation.py",
    "parity/test_alignment.py",
    "slurm/test_slurm_scripts.py",
    "slurm/test_examples.py",
    "plan/test_sweep.py",
    "train/test_loop.py",
    "train/test_pair.py",
    "train/test_checkpoint.py",
    "faults/test_fault_drill.py",
    "teachers/test_remote.py",
    "models/test_padded_vocabulary.py",
    "upcycle/test_select.py",
    "train/test_resume_check.py",
    "train/test_interrupts.py",
    "kernels/test_head_softmax.py",
    "kernels/test_recurrence_part.py",
    "data/test_resume_preprocess.py",
    "hf/test_transformers_mixins.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first."""
    order = {Path(__file__).parent / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


def starts_workers(config: pytest.Config) -> bool:
    """Whether this process has xdist's workers run the tests."""
    return bool(config.getoption("numprocesses", None)) and not hasattr(config, "workerinput")


def pytest_configure(config: pytest.Config) -> None:
    """Give a run of several processes a temporary folder of its own, where what tests leave behind shows at its end."""
    if starts_workers(config):
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())  # tmp_path of failed tests stays where it was
        os.environ["TMPDIR"] = tempfile.mkdtemp(prefix="hylo_tests_")


@pytest.hookimpl(wrapper=True)
def pytest_sessionfinish(session: pytest.Session) -> Iterator[None]:
    """Fail where the temporary folder holds torchelastic_*, pymp-* or others when the workers have ended."""
    yield
    if starts_workers(session.config):
        folder = Path(os.environ["TMPDIR"])
        if left := [path.name for path in folder.iterdir() if not path.name.startswith("torchinductor_")]:
            session.config.get_terminal_writer().line(f"tests left in {folder}: {', '.join(left)}", red=True)
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        else:
            shutil.rmtree(folder, ignore_errors=True)  # torch's compile workers may still write there


def pytest_collection_finish() -> None:
    """Freeze what the imports of all tests made; a checkpoint's gc.collect() would go through it each time."""
    from tests import frozen  # noqa: F401


@pytest.fixture(scope="session", autouse=False)
def one_rank():
    """Megatron-Core initialised with one rank; yields its device."""
    with session() as device:
        yield device


@pytest.fixture(scope="session")
def transformers4() -> Callable[..., str]:
    """run(program, *arguments) -> stdout: Python code in a process that imports transformers 4 in place of 5.

    The packages of tests/transformers4.txt lie in .venv/transformers4 (`make install`) or the folder that
    HYLO_TRANSFORMERS4 names.
    """
    folder = Path(os.environ.get("HYLO_TRANSFORMERS4") or Path(sys.prefix, "transformers4"))
    if not (folder / "transformers" / "__init__.py").is_file():
        pytest.skip(f"no transformers 4 in {folder}: run make install, or set HYLO_TRANSFORMERS4 to a folder with it")

    def run(program: str, *arguments: object) -> str:
        command = [sys.executable, "-c", program, *map(str, arguments)]
        environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    return run


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Every test starts from the same random state, of Megatron-Core's generators too, from which weights are drawn."""
    if parallel_state.model_parallel_is_initialized():
        model_parallel_cuda_manual_seed(1234, force_reset_rng=True)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_goes_on() -> Iterator[None]:
    """Kill programs that a failed test leaves running: they would take the processor from the tests after it."""
    before = list(Program.started)  # of fixtures for several tests
    yield
    end_programs(before)


def tiny_hf_model(family: str, tied: bool = True, **changes):
    """A tiny random transformers model of a family: every dimension different, so that a transpose is caught."""
    shared = dict(
        vocab_size=160, hidden_size=48, intermediate_size=112, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=128, tie_word_embeddings=tied, rms_norm_eps=1e-5,
        initializer_range=0.2,
    )  # fmt: skip
    configs = {
        "llama": transformers.LlamaConfig, "mistral": transformers.MistralConfig, "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config, "qwen3_moe": transformers.Qwen3MoeConfig,
    }  # fmt: skip
    if family == "qwen3_moe":
        shared |= dict(moe_intermediate_size=40, num_experts=6, num_experts_per_tok=2, norm_topk_prob=True)
    config = configs[family](**(shared | changes))
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():  # norms of all ones and biases of zeros would hide a missing one
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.uniform_(0.5, 1.5)
    return model


EXPERTS = dict(num_moe_experts=6, moe_ffn_hidden_size=40, moe_router_topk=2)  # of tiny configurations with `E`


def folder_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of a transformers model under the names of a folder, in which experts are not stacked."""
    found = {}
    for name, tensor in tensors.items():
        place, _, last = name.rpartition(".")
        if last not in ("gate_up_proj", "down_proj"):
            found[name] = tensor
            continue
        for number, one in enumerate(tensor):
            parts = {"down_proj": one} if last == "down_proj" else dict(zip(("gate_proj", "up_proj"), one.chunk(2)))
            found |= {f"{place}.{number}.{part}.weight": part_of for part, part_of in parts.items()}
    return found


@torch.no_grad()
def fill_model(model: HyloModel, read: Callable[[str], torch.Tensor]) -> None:
    """Fill a whole model with tensors by their Hugging Face names, as the conversion's table joins them."""
    entries = {entry.megatron: entry for entry in model_entries(model.config.hylo)}
    for name, parameter in model.named_parameters():
        tensor = entries[name].merge([read(n) for n in entries[name].hugging_face])
        assert tensor.shape == parameter.shape, name
        parameter.copy_(tensor)


def tiny_config(pattern: str = "G-+-M-*-", **changes) -> ModelConfig:
    """A tiny hybrid configuration with every dimension different."""
    fields = dict(
        hybrid_layer_pattern=pattern, hidden_size=48, ffn_hidden_size=112, num_attention_heads=6, num_query_groups=2,
        kv_channels=16, vocab_size=160, max_position_embeddings=128, rotary_base=10000.0,
        q_lora_rank=40, kv_lora_rank=24, qk_head_dim=10, qk_pos_emb_head_dim=6, v_head_dim=16,
        mamba_num_heads=6, mamba_head_dim=16, mamba_state_dim=16,
        linear_num_heads=2, linear_key_head_dim=18, linear_value_head_dim=36, kda_decay_rank=14, attention_window=9,
    )  # fmt: skip
    return ModelConfig(**(fields | changes))


def uneven_model(pattern: str, **changes) -> HyloModel:
    """A float64 model whose weights are large enough, and norms uneven enough, to show a fault; the norms are fp32."""
    model = build_model(tiny_config(pattern, **changes))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.uniform_(0.5, 1.5)
            elif p.dim() == 2:
                p.normal_(std=0.15)
    return model.double()


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gradients there are, cleared for the next pass."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for p in model.parameters():
        p.grad = None
    return found
