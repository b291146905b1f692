"""Table of every change that this package makes to third-party code or to the environment of the whole process.

`hylo doctor` lists it. `tests/platform/test_third_party.py` searches the package for such changes and fails for one without a
row here. The functions that tell whether a change is in force import nothing: what was never imported was never changed.
"""

import logging
import os
import queue
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from megatron_hylo.kernels.tuned import KnownConfigurations, autotuners
from megatron_hylo.platform.cpu import PATCHES, is_installed
from megatron_hylo.platform.safe_loading import is_safe_loading_installed

Scope = Literal["process", "thread", "one call", "one layer's backward"]


@dataclass(frozen=True)
class ThirdPartyChange:
    """One change to third-party code or to the environment of the process."""

    name: str
    changes: str  # what is replaced or set
    reason: str
    scope: Scope
    in_force: Callable[[], bool]  # in this process, now
    files: tuple[str, ...]  # files of the package that make the change
    targets: tuple[str, ...]  # the change as it stands in their source: what is assigned to, or called


def _loaded(module: str, *attributes: str) -> Any:
    """Return an attribute of a module that is already imported, else None."""
    value: Any = sys.modules.get(module)
    for name in attributes:
        value = getattr(value, name, None)
    return value


def _has_empty_scan() -> bool:
    module = _loaded("selective_scan_cuda")
    return module is not None and module.__spec__ is None


def _has_known_configurations() -> bool:
    if "triton.runtime.autotuner" not in sys.modules:
        return False
    return any(isinstance(tuner.cache, KnownConfigurations) for _, tuner in autotuners())


def _is_state_pass_registered() -> bool:
    register = _loaded("megatron_hylo.kernels.delta_rule_state_pass", "register")
    return register is not None and register.cache_info().currsize > 0


def _is_allocator_set() -> bool:
    variable = _loaded("triton.runtime._allocation", "_allocator")
    return variable is not None and getattr(variable.get(), "__module__", "").startswith("megatron_hylo.")


def _is_sum_replaced() -> bool:
    modes = torch.overrides._get_current_function_mode_stack()
    return any(type(mode).__module__ == "megatron_hylo.kernels.ssd" for mode in modes)


def _is_recompile_limit_raised() -> bool:
    limit = _loaded("torch._dynamo.config", "recompile_limit")
    ours = _loaded("megatron_hylo.kernels.elementwise", "RECOMPILATIONS")
    return limit is not None and ours is not None and limit >= ours


def _is_elastic_quiet() -> bool:
    return logging.getLogger("torch.distributed.elastic.multiprocessing.api").level == logging.CRITICAL


def _is_vllm_config_registered() -> bool:
    mapping = _loaded("transformers.models.auto.configuration_auto", "CONFIG_MAPPING")
    config = None if mapping is None else mapping._extra_content.get("hylo")
    return getattr(config, "__module__", "").startswith("megatron_hylo.serve.vllm")


def _is_results_queue_replaced() -> bool:
    found = _loaded("megatron.core.dist_checkpointing.strategies.filesystem_async", "_results_queue")
    return type(found) is queue.Queue


def _is_ours(module: str, name: str) -> Callable[[], bool]:
    """Check of a name in a module of others: whether it stands for a function or class of this package."""
    return lambda: getattr(_loaded(module, name), "__module__", "").startswith("megatron_hylo.")


def _is_set(name: str, value: str | None = None) -> Callable[[], bool]:
    return lambda: name in os.environ if value is None else os.environ.get(name) == value


_PREPARATION = "vllm.third_party.flash_linear_attention.ops.fused_gdn_prefill_post_conv"
_DECODING = "vllm.third_party.flash_linear_attention.ops.fused_recurrent"
_VLLM_GDN = "vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn"
_CPU_TARGETS = {
    "current_device": ("torch.cuda.current_device",),
    "random_state": (
        "megatron.core.tensor_parallel.random._get_cuda_rng_state", "megatron.core.tensor_parallel.random._set_cuda_rng_state",
        "torch.cuda.manual_seed", "torch.cuda.get_rng_state", "torch.cuda.set_rng_state", "logging.getLogger().setLevel",
    ),
    "synchronize": ("torch.cuda.synchronize",),
    "current_stream": ("torch.cuda.current_stream",),
    "token_dispatch": ("importlib.import_module().torch", "importlib.import_module().maybe_move_tensor_to_cpu"),
    "factories": ("importlib.import_module().torch",),
    "tensor_type": ("torch.Tensor.type",),
    "tensor_cuda": ("torch.Tensor.cuda",),
}  # fmt: skip


def _cpu_change(index: int) -> ThirdPartyChange:
    patch = PATCHES[index]
    return ThirdPartyChange(
        f"cpu: {patch.name}", patch.changes, patch.reason, "process", lambda: is_installed(patch.name),
        ("platform/cpu.py",), _CPU_TARGETS[patch.name],
    )  # fmt: skip


CHANGES: tuple[ThirdPartyChange, ...] = (
    *(_cpu_change(index) for index in range(len(PATCHES))),
    ThirdPartyChange(
        "safe loading",
        "FileSystemReader.read_metadata and DefaultLoadPlanner.load_bytes of torch.distributed.checkpoint",
        "torch unpickles parts of a checkpoint, and a pickle can run any code",
        "process",
        is_safe_loading_installed,
        ("platform/safe_loading.py",),
        (
            "torch.distributed.checkpoint.filesystem.FileSystemReader.read_metadata",
            "torch.distributed.checkpoint.default_planner.DefaultLoadPlanner.load_bytes",
        ),
    ),
    ThirdPartyChange(
        "gloo interface",
        "GLOO_SOCKET_IFNAME=lo, unless it is set, where all ranks are on one machine",
        "gloo's ports are not authenticated and would be reachable from the network",
        "process",
        _is_set("GLOO_SOCKET_IFNAME", "lo"),
        ("platform/distributed.py",),
        ("os.environ[GLOO_SOCKET_IFNAME]",),
    ),
    ThirdPartyChange(
        "autotuning cache",
        "TRITON_CACHE_AUTOTUNING=1, unless it is set, on a GPU",
        "autotuning takes minutes, so Triton keeps its results on disk",
        "process",
        _is_set("TRITON_CACHE_AUTOTUNING", "1"),
        ("platform/distributed.py",),
        ("os.environ[TRITON_CACHE_AUTOTUNING]",),
    ),
    ThirdPartyChange(
        "selective_scan_cuda",
        "an empty module of that name in sys.modules, where it is not installed",
        "mamba_ssm always imports Mamba1's compiled scan; its SSD kernels never call it",
        "process",
        _has_empty_scan,
        ("kernels/registry.py",),
        ("sys.modules[]",),
    ),
    ThirdPartyChange(
        "tuned kernels",
        "the `cache` of the Triton autotuners of fla and mamba_ssm",
        "tuning takes minutes for each new shape; known configurations are used instead (HYLO_AUTOTUNE)",
        "process",
        _has_known_configurations,
        ("kernels/tuned.py",),
        (),  # an attribute of objects that are found at run time
    ),
    ThirdPartyChange(
        "delta rule in fla",
        "a backend registered with fla's dispatch (fla.backends)",
        "fla's Gated DeltaNet functions then call this project's state-pass kernels on Hopper",
        "process",
        _is_state_pass_registered,
        ("kernels/delta_rule_state_pass.py",),
        ("importlib.import_module().register",),
    ),
    ThirdPartyChange(
        "Triton's allocator",
        "triton.set_allocator",
        "kernels with tensor descriptors need an allocator, which Triton keeps for each thread",
        "thread",
        _is_allocator_set,
        ("kernels/delta_rule_state_pass.py",),
        ("importlib.import_module().set_allocator",),
    ),
    ThirdPartyChange(
        "Tensor.sum in mamba_ssm",
        "torch.Tensor.sum over a dimension of size 1 becomes squeeze, by a TorchFunctionMode",
        "mamba_ssm's sums over one program copy up to 2 GB a layer at 64K tokens",
        "one layer's backward",
        _is_sum_replaced,
        ("kernels/ssd.py",),
        ("torch.overrides.TorchFunctionMode",),
    ),
    ThirdPartyChange(
        "recompile limit",
        "torch._dynamo.config.recompile_limit, raised to 64",
        "the models of a run need more compiled shapes and dtypes than torch's default of 8",
        "process",
        _is_recompile_limit_raised,
        ("kernels/elementwise.py",),
        ("torch._dynamo.config.recompile_limit",),
    ),
    ThirdPartyChange(
        "callable packages",
        "the classes of megatron_hylo.convert, calibrate, upcycle and train; groups that `load` made end with the process",
        "functions of the Python interface have the names of packages, and both are reached by them",
        "process",
        lambda: callable(sys.modules["megatron_hylo.convert"]),
        ("__init__.py",),
        ("importlib.import_module().__class__", "atexit.register"),
    ),
    ThirdPartyChange(
        "torchrun's loggers",
        "the level of torch.distributed.elastic's loggers, in megatron_hylo.train.launch alone",
        "its report of a rank that failed buries the one sentence of that rank",
        "process",
        _is_elastic_quiet,
        ("train/launch.py",),
        ("logging.getLogger().setLevel",),
    ),
    ThirdPartyChange(
        "checkpoint writer's queue",
        "megatron.core.dist_checkpointing.strategies.filesystem_async._results_queue",
        "Megatron-Core's own queue is served by a process that takes seconds to start and outlives a rank that is killed",
        "process",
        _is_results_queue_replaced,
        ("models/checkpoint.py",),
        ("megatron.core.dist_checkpointing.strategies.filesystem_async._results_queue",),
    ),
    ThirdPartyChange(
        "functions on lists of tensors",
        "Megatron-Core's own norm and scaling of an optimizer's tensors, where Transformer Engine and Apex are not installed",
        "they wait for the GPU or start kernels once a tensor; torch's foreach functions take them all at once",
        "process",
        _is_ours("megatron.core.optimizer.clip_grads", "l2_norm_impl"),
        ("train/multi_tensor.py",),
        (
            "megatron.core.optimizer.clip_grads.l2_norm_impl",
            "megatron.core.optimizer.clip_grads.multi_tensor_scale_impl",
            "megatron.core.optimizer.clip_grads.multi_tensor_scale_tensor_impl",
            "megatron.core.optimizer.optimizer.multi_tensor_scale_impl",
        ),
    ),
    ThirdPartyChange(
        "model class in transformers",
        "AutoConfig, AutoModel and its causal LM, classifiers and question answering know the model type of exported models",
        "exported models load by their type, without code from their folder",
        "process",
        lambda: _loaded("megatron_hylo.hf.modeling_hylo") is not None,
        ("hf/__init__.py",),
        (
            "transformers.AutoConfig.register",
            "transformers.AutoModel.register",
            "transformers.AutoModelForCausalLM.register",
            "transformers.AutoModelForSequenceClassification.register",
            "transformers.AutoModelForTokenClassification.register",
            "transformers.AutoModelForQuestionAnswering.register",
        ),  # fmt: skip
    ),
    ThirdPartyChange(
        "determinism",
        "torch.use_deterministic_algorithms and fill_uninitialized_memory during a deterministic run; CUBLAS_WORKSPACE_CONFIG, "
        "TORCHINDUCTOR_DETERMINISTIC and HYLO_AUTOTUNE, which stay set",
        "bit-identical repetition of a run on GPUs (`deterministic`)",
        "one call",
        torch.are_deterministic_algorithms_enabled,
        ("train/determinism.py",),
        ("os.environ[]", "torch.use_deterministic_algorithms", "torch.utils.deterministic.fill_uninitialized_memory"),
    ),
    ThirdPartyChange(
        "strict determinism of attention",
        "torch.use_deterministic_algorithms without `warn_only` in the backward pass of attention, where it was on with it",
        "torch's flash and memory-efficient kernels have a deterministic backward pass, and take it in this mode alone",
        "one layer's backward",
        lambda: torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled(),
        ("kernels/attention.py",),
        ("torch.use_deterministic_algorithms",),
    ),
    ThirdPartyChange(
        "quiet libraries",
        "root logger, log level of torch.utils.cpp_extension, warning filters, HF_HUB_DISABLE_PROGRESS_BARS=1, TQDM_DISABLE=1",
        "the command line shows only errors of other packages, and no progress bars of theirs",
        "process",
        _is_set("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("cli/console.py",),
        (
            "os.environ[HF_HUB_DISABLE_PROGRESS_BARS]",
            "os.environ[TQDM_DISABLE]",
            "logging.getLogger().setLevel",
            "logging.basicConfig",
            "warnings.filterwarnings",
        ),  # fmt: skip
    ),
    ThirdPartyChange(
        "compilation at the first call",
        "torch.compile, while a verb imports Megatron-Core; its decorated functions stay so",
        "each decorator would import torch's compiler, 2 s of CPU time for functions that most verbs never call",
        "process",
        _is_ours("megatron.core.jit", "jit_fuser"),
        ("io/start_up.py",),
        ("torch.compile",),
    ),
    ThirdPartyChange(
        "memory of large tensors",
        "THP_MEM_ALLOC_ENABLE=1; glibc's mallopt, to keep what is freed; in convert, verify, upcycle, assemble and export",
        "weights that are read once are limited by page faults: 2 GB/s of a core without, 6 in huge pages, none in used ones",
        "process",
        _is_set("THP_MEM_ALLOC_ENABLE", "1"),
        ("io/start_up.py",),
        ("os.environ[THP_MEM_ALLOC_ENABLE]",),
    ),
    ThirdPartyChange(
        "transformers' progress bars",
        "transformers.utils.logging.disable_progress_bar()",
        "they would be drawn over this project's own",
        "process",
        lambda: _loaded("transformers.utils.logging", "_tqdm_active") is False,
        ("io/foreign.py",),
        ("transformers.utils.logging.disable_progress_bar",),
    ),
    ThirdPartyChange(
        "no CRC-32 in weights",
        "torch.utils.serialization.config.save.compute_crc32, while a model folder's weights are written",
        "nothing reads the CRC-32 of torch's archives, and each tensor has its sha256",
        "one call",
        lambda: _loaded("torch.utils.serialization.config", "save", "compute_crc32") is False,
        ("models/weights_files.py",),
        ("torch.utils.serialization.config.patch",),
    ),
    ThirdPartyChange(
        "GGUF headers parsed once",
        "gguf.GGUFReader and gguf.get_tensor_name_map, while transformers loads from a GGUF file",
        "transformers parses a file's vocabulary three times and makes the map of tensor names for each module",
        "one call",
        _is_ours("gguf", "GGUFReader"),
        ("io/gguf_file.py",),
        ("gguf.GGUFReader", "gguf.get_tensor_name_map"),
    ),
    ThirdPartyChange(
        "words of RULER's keys",
        "WORDS of lm_eval.tasks.ruler.prepare_niah; nltk.data.path, where nltk has no sentence model",
        "lm-eval joins every adjective and noun: 6.2 million texts, 11 s and 0.7 GB a process; a model is not downloaded",
        "process",
        lambda: type(_loaded("lm_eval.tasks.ruler.prepare_niah", "WORDS")).__module__.startswith("megatron_hylo."),
        ("eval/ruler/sources.py",),
        ("importlib.import_module().WORDS",),
    ),
    ThirdPartyChange(
        "no words for RULER's import",
        "wonderwords.RandomWord, while lm_eval.tasks.ruler.prepare_niah is imported",
        "that module joins all words when it is imported",
        "one call",
        _is_ours("wonderwords", "RandomWord"),
        ("eval/ruler/words.py",),
        ("wonderwords.RandomWord",),
    ),
    ThirdPartyChange(
        "vLLM's configuration of HyLo models",
        "model type hylo of transformers.AutoConfig, in processes of vLLM",
        "vLLM reads sizes of a cached row from the configuration; a model that it cannot serve is refused, with the reason",
        "process",
        _is_vllm_config_registered,
        ("serve/vllm/__init__.py", "serve/vllm/config.py"),
        ("transformers.AutoConfig.register",),
    ),
    ThirdPartyChange(
        "one block width before vLLM's Gated DeltaNet",
        "vllm.third_party.flash_linear_attention.ops.fused_gdn_prefill_post_conv._fused_post_conv_kernel, in processes of vLLM",
        "Triton refuses it where value heads are wider than key heads",
        "process",
        lambda: _loaded(_PREPARATION, "_fused_post_conv_kernel", "values") is not None,  # of triton.heuristics
        ("serve/vllm/gdn.py",),
        ("vllm.third_party.flash_linear_attention.ops.fused_gdn_prefill_post_conv._fused_post_conv_kernel",),
    ),
    ThirdPartyChange(
        "enough warps for decode steps of vLLM's Gated DeltaNet",
        f"{_DECODING}.fused_recurrent_gated_delta_rule_packed_decode_kernel, in processes of vLLM",
        "its one warp has too few registers for a block of a state of 256 key channels",
        "process",
        lambda: _loaded(_DECODING, "fused_recurrent_gated_delta_rule_packed_decode_kernel", "values") is not None,
        ("serve/vllm/gdn.py",),
        (f"{_DECODING}.fused_recurrent_gated_delta_rule_packed_decode_kernel",),
    ),
    ThirdPartyChange(
        "long prompts to tune vLLM's Gated DeltaNet with",
        f"{_VLLM_GDN}.FLA_CHUNK_SIZE, in processes of vLLM",
        "Triton tunes kernels with a sequence of so many tokens at start; vLLM's 64 time the start of a kernel",
        "process",
        lambda: _loaded(_VLLM_GDN, "FLA_CHUNK_SIZE") not in (None, 64),
        ("serve/vllm/gdn.py",),
        (f"{_VLLM_GDN}.FLA_CHUNK_SIZE",),
    ),
)
