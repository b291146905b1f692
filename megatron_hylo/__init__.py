"""Long-context upcycling on Megatron-Core: a pretrained Transformer goes in, a hybrid comes out.

    import megatron_hylo as mh

    mh.convert("Llama-3.2-1B", "models/base")
    mh.upcycle("models/base", "models/hybrid", layout="llama3.2-1b-4mla12gdn", init="paper")
    mh.train(stage="distil", model="models/hybrid", teacher="models/base", data="data", output="runs/distil")
    mh.evaluate("runs/distil/model", "data")
    mh.export("runs/distil/model", "my-hybrid")
    print(mh.generate("my-hybrid", "The Linux kernel is").text)

Every function does what the verb of its name does on the command line. One process needs no set-up: process groups are made
where they are needed. Under torchrun each rank makes the same calls. Importing this package imports no torch.
"""

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from megatron_hylo.config.train import TrainConfig
    from megatron_hylo.config.upcycle import UpcycleConfig
    from megatron_hylo.eval.perplexity import Quality
    from megatron_hylo.models.hylo_model import HyloModel
    from megatron_hylo.serve.generate import Generation
    from megatron_hylo.upcycle.run import UpcycleReport

__version__ = "0.2.0"
__all__ = [
    "TrainConfig", "UpcycleConfig", "calibrate", "convert", "evaluate", "export", "generate", "load", "train", "upcycle",
]  # fmt: skip
Folder = str | Path


def convert(source: Folder, output: Folder, overwrite: bool = False, verify: bool = True) -> None:
    """Convert a Hugging Face folder or GGUF file to a model folder; `export` goes the other way.

    Args:
        source: folder of a Llama, Mistral, Qwen2.5, Qwen3, Qwen3-MoE or an exported hybrid, or a .gguf file.
        output: model folder to make; it appears only when it is complete.
        overwrite: replace what is there.
        verify: compare all tensors and logits with transformers' own loading first.

    Raises:
        ConfigError: a model that is not supported, or differs; an output that exists.
    """
    from megatron_hylo.convert.to_megatron import convert_hf_to_megatron
    from megatron_hylo.platform.distributed import session

    with session():
        convert_hf_to_megatron(source, output, overwrite, verify=verify)


def calibrate(
    teacher: Folder,
    data: Folder,
    output: Folder,
    tokens: int = 65_536,
    sequence_length: int = 2048,
    seed: int = 1234,
    overwrite: bool = False,
) -> None:
    """Measure what the calibrated initialisation needs of a teacher, in one fp32 pass over some text.

    Args:
        teacher: model folder of the teacher.
        data: dataset folder made by `hylo preprocess`.
        output: calibration folder to make.
        tokens: calibration text.
        sequence_length: tokens a window.
        seed: seed of the choice of windows.
        overwrite: replace what is there.

    Raises:
        ConfigError: teacher, data and settings do not fit one another.
    """
    from megatron_hylo.calibrate.gather import calibrate as gather
    from megatron_hylo.platform.distributed import session

    with session():
        gather(teacher, data, output, tokens, sequence_length, seed=seed, overwrite=overwrite)


def upcycle(teacher: Folder, output: Folder, **settings: Any) -> "UpcycleReport":
    """Make a hybrid from a teacher: its mixers from the attention weights.

    Args:
        teacher: model folder of the teacher.
        output: model folder to make.
        settings: fields of `UpcycleConfig`, such as layout, pattern, init and calibration.

    Returns:
        Configuration and, with a calibration folder, quality before training.

    Raises:
        ConfigError: teacher and settings do not fit one another.
    """
    from megatron_hylo.config.upcycle import UpcycleConfig
    from megatron_hylo.platform.distributed import session
    from megatron_hylo.upcycle.run import upcycle_folder

    with session():
        return upcycle_folder(UpcycleConfig(str(teacher), str(output), **settings))


def load(model: Folder, **settings: Any) -> "HyloModel":
    """Load a model folder or training checkpoint as a Megatron-Core module, in evaluation mode on this rank's device.

    The process groups that it needs stay until the process ends. Its call takes `input_ids` [batch, sequence] and returns
    hidden states [sequence, batch, hidden].

    Args:
        model: model folder or training checkpoint.
        settings: of `models.checkpoint.load_chunks`, such as params_dtype and parallel.

    Raises:
        ConfigError: no model folder.
        DamagedError: files that are not what the folder's manifest says.
    """
    import atexit

    import torch

    from megatron_hylo.models.checkpoint import load_model
    from megatron_hylo.platform.distributed import initialize, shutdown

    owner = not torch.distributed.is_initialized()
    initialize(settings.get("parallel"))
    if owner and torch.distributed.get_world_size() == 1:
        atexit.register(shutdown)
    return load_model(model, **settings).eval()


def train(config: "TrainConfig | None" = None, **settings: Any) -> "Quality | None":
    """Run one stage of training, from where an earlier start of the same run left off.

    Args:
        config: all settings; or else
        settings: fields of `TrainConfig`; those that are dataclasses may be mappings: optimizer={"lr": 1e-4}.

    Returns:
        Held-out quality of OUTPUT/model at the end.

    Raises:
        ConfigError: settings that cannot work.
        Stopped: a signal came; a checkpoint was saved.
    """
    from megatron_hylo.config import from_dict
    from megatron_hylo.config.train import TrainConfig
    from megatron_hylo.train.loop import train as run

    return run(config or from_dict(TrainConfig, settings, "train"))


def evaluate(
    model: "Folder | HyloModel",
    data: Folder,
    teacher: "Folder | HyloModel | None" = None,
    sequence_length: int = 2048,
    windows: int = 32,
) -> "Quality":
    """Measure held-out perplexity of a model and, with a teacher, KL to it and top-1 agreement.

    Args:
        model: model folder, training checkpoint, or what `load` returned.
        data: dataset folder made by `hylo preprocess`.
        teacher: model to compare with, as `model`.
        sequence_length: tokens a window.
        windows: windows at most.

    Raises:
        ConfigError: model and data of different tokenizers, or no document as long as a window.
    """
    from megatron_hylo.data.heldout import heldout_windows
    from megatron_hylo.eval.folders import evaluate_folder
    from megatron_hylo.eval.perplexity import evaluate as evaluate_model
    from megatron_hylo.models.checkpoint import load_model
    from megatron_hylo.platform.distributed import session

    with session():
        if isinstance(model, (str, Path)) and (teacher is None or isinstance(teacher, (str, Path))):
            return evaluate_folder(model, data, teacher, sequence_length, windows)
        batch = heldout_windows(f"{data}/heldout", sequence_length, windows)
        student, other = (load_model(m) if isinstance(m, (str, Path)) else m for m in (model, teacher))
        assert student is not None
        return evaluate_model(student, batch, other)


def export(
    model: Folder,
    output: Folder,
    overwrite: bool = False,
    verify: bool = True,
    quantize: Literal["fp8", "int8", "int4"] | None = None,
    calibration_data: Folder | None = None,
) -> None:
    """Export a model folder or checkpoint for Hugging Face: config, safetensors, tokenizer, modelling code.

    Args:
        model: model folder or training checkpoint.
        output: Hugging Face folder to make.
        overwrite: replace what is there.
        verify: compare tensors and logits with transformers' loading of the folder first.
        quantize: store a hybrid's linear maps in FP8, or in integers of 8 or 4 bits.
        calibration_data: dataset folder whose training text decides how weights are rounded; by default to the nearest value.

    Raises:
        ConfigError: no model folder; an output that exists; quantize without compressed-tensors, or of no hybrid.
    """
    from megatron_hylo.convert.quantise import export_quantised
    from megatron_hylo.convert.to_hf import convert_megatron_to_hf
    from megatron_hylo.platform.distributed import session

    with session():
        if quantize is None:
            convert_megatron_to_hf(model, output, overwrite, verify=verify)
        else:
            export_quantised(model, output, quantize, calibration_data, overwrite=overwrite, verify=verify)


def generate(model: Folder, prompt: str, **settings: Any) -> "Generation":
    """Continue a prompt with a carried cache: latents for MLA, states for linear layers.

    Args:
        model: model folder, training checkpoint, or exported Hugging Face folder.
        prompt: text to continue.
        settings: of `serve.generate.generate_text`, such as max_new_tokens, temperature, chat and on_text.

    Returns:
        The text without the prompt, and what it cost.

    Raises:
        ConfigError: a setting outside its range; nothing that can be loaded.
    """
    from megatron_hylo.serve.generate import generate_text

    return generate_text(model, prompt, **settings)


def __getattr__(name: str) -> Any:
    """Import the classes of settings when they are first asked for."""
    if name in ("TrainConfig", "UpcycleConfig"):
        return getattr(import_module(f"{__name__}.config.{name.removesuffix('Config').lower()}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _CallableModule(ModuleType):
    """A package that is named like a function of this one, and called as that function."""

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        return self.__wrapped__(*arguments, **settings)


# An import of megatron_hylo.convert.anything binds the package's name here, over the function. So it is the package that can be
# called, from the start: `mh.convert(...)` and `mh.convert.to_hf` both work, in any order of imports.
for _function in (convert, calibrate, upcycle, train):
    _module = import_module(f"{__name__}.{_function.__name__}")
    _module.__class__ = _CallableModule
    _module.__dict__.update(__wrapped__=_function, __doc__=_function.__doc__)
