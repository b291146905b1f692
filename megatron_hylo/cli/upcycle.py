"""`hylo calibrate`, `upcycle`, `select`, `assemble`: from a teacher to a hybrid; `cache-teacher`, `serve-teacher`."""

from pathlib import Path
from typing import Literal

from megatron_hylo.calibrate.description import read_calibration
from megatron_hylo.cli.console import console, print_json, results, show_selection, show_upcycle, track
from megatron_hylo.cli.types import PositiveFloat, PositiveInt
from megatron_hylo.config import TeacherWindow
from megatron_hylo.config.teacher_window import OWN_WINDOW
from megatron_hylo.config.upcycle import UpcycleConfig
from megatron_hylo.data.dataset_path import check_indexed_dataset
from megatron_hylo.io import check_free
from megatron_hylo.io.start_up import model_imports, reuse_memory
from megatron_hylo.models.description import read_description
from megatron_hylo.teachers.addresses import replica_address


def chosen_dtype(precision: Literal["fp32", "bf16"] | None):
    """The torch.dtype of a verb's --precision; bf16 on a GPU, fp32 on a CPU where it is not given."""
    import torch

    bf16 = precision == "bf16" or (precision is None and torch.cuda.is_available())
    return torch.bfloat16 if bf16 else torch.float32


def calibrate(
    teacher: Path,
    data: Path,
    output: Path,
    tokens: PositiveInt = 65_536,
    sequence_length: PositiveInt = 2048,
    precision: Literal["fp32", "bf16"] = "fp32",
    tensor_model_parallel_size: PositiveInt = 1,
    seed: int = 1234,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Measure what the calibrated initialisation needs of a teacher, in one pass over some text, layer by layer.

    Made once for a teacher, used for any layout. Under torchrun the ranks share windows (and heads). Started again after
    an interruption, the same command keeps the layers that are done.

    Args:
        teacher: model folder of the teacher.
        data: dataset folder made by `hylo preprocess`, best of text like that the hybrid is for.
        output: calibration folder to make.
        tokens: calibration text; 65,536 for the default initialisation; 262,144 to a million for --sequential.
        sequence_length: tokens a window, the length that attention is measured over.
        precision: of the teacher's forward pass.
        tensor_model_parallel_size: ranks that share each layer.
        seed: of the choice of windows.
        overwrite: replace what is there.
        json: print what OUTPUT/calibration.json holds: {tokens, sequence_length, layers, ...}.
    """
    check_free(output, overwrite, [teacher, data])
    read_description(teacher)
    check_indexed_dataset(data / "train")
    import torch

    with model_imports():
        from megatron_hylo.calibrate.gather import calibrate as gather
        from megatron_hylo.config import ParallelConfig
        from megatron_hylo.io import read_json
        from megatron_hylo.platform.distributed import is_main, session

    parallel = ParallelConfig(tensor_model_parallel_size=tensor_model_parallel_size)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    with session(parallel):
        gather(teacher, data, output, tokens, sequence_length, seed=seed, precision=dtype, parallel=parallel,
               overwrite=overwrite, track=track)  # fmt: skip
        main = is_main()
    console.print(f"wrote {output}")
    if json and main:
        print_json({"output": str(output)} | read_json(output / "calibration.json"))


def cache_teacher(
    teacher: Path,
    data: Path,
    output: Path,
    kl: PositiveFloat = 9e-4,
    sequence_length: PositiveInt = 2048,
    overlap: int | None = None,
    micro_batch_size: PositiveInt = 8,
    precision: Literal["fp32", "bf16"] | None = None,
    tensor_model_parallel_size: PositiveInt = 1,
    teacher_window: TeacherWindow = OWN_WINDOW,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Keep what a teacher says of a dataset, for any number of `hylo train --stage distil --teacher_store OUTPUT` runs.

    Stored are its last hidden states, so coarsely that its distribution over the vocabulary is off by --kl nats a token, and
    its head. Runs may differ in batch size, seed, sequence length, packing and parallelism. Under torchrun the ranks
    share the text. Started again after an interruption, the same command keeps what is done.

    Args:
        teacher: model folder of the teacher.
        data: dataset folder made by `hylo preprocess` with its tokenizer; all of its training text is read.
        output: store to make.
        kl: mean KL(teacher || store) a token; smaller takes more bytes.
        sequence_length: tokens that the teacher reads at a time.
        overlap: of these the context that is read again, half by default: so much any token deep in a document has before it.
        micro_batch_size: segments a forward pass.
        precision: of the teacher; bf16 on a GPU, fp32 on a CPU by default.
        tensor_model_parallel_size: ranks that share each layer.
        teacher_window: how the teacher reads more tokens than its window has: --teacher_window.mode rope or windows.
        overwrite: replace what is there.
        json: print tokens, bytes a token and KL as JSON.
    """
    check_free(output, overwrite, [teacher, data])
    read_description(teacher)
    check_indexed_dataset(data / "train")
    with model_imports():
        from megatron_hylo.config import ParallelConfig
        from megatron_hylo.platform.distributed import is_main, session
        from megatron_hylo.teachers.store_writer import write_store

    parallel = ParallelConfig(tensor_model_parallel_size=tensor_model_parallel_size)
    with session(parallel):
        made = write_store(
            teacher, data, output, kl, sequence_length, overlap, micro_batch_size, chosen_dtype(precision),
            parallel, overwrite, track, teacher_window,
        )  # fmt: skip
        main = is_main()
    if main and json:
        print_json(made)
    elif main:
        results.print(
            f"wrote {output}: {made['tokens']:,} tokens, {made['bytes_per_token']:.0f} bytes each, KL to the teacher "
            f"{made['measured_kl']:.1e} nats a token (99 % below {made['measured_kl_p99']:.1e}) on {made['measured_tokens']:,} "
            f"tokens that the codec was not fitted on",
            highlight=False,
        )


def serve_teacher(
    teacher: Path,
    address: str,
    precision: Literal["fp32", "bf16"] | None = None,
    tensor_model_parallel_size: PositiveInt = 1,
    context_parallel_size: PositiveInt = 1,
    sequence_parallel: bool = False,
    timeout_minutes: PositiveFloat = 30.0,
    runs: PositiveInt | None = None,
    max_tokens: PositiveInt = 1 << 20,
    teacher_window: TeacherWindow = OWN_WINDOW,
) -> None:
    """Answer students of another job: `hylo train --stage distil --teacher_address ADDRESS`.

    Under torchrun with a GPU or more; its parallelism has nothing to do with the students'. Ranks beyond one copy of the
    teacher are more copies, which share the students; they listen at the ports after the first one's. Serves until Ctrl-C.
    Other machines must share a secret: HYLO_TEACHER_SECRET, or a file in HYLO_TEACHER_SECRET_FILE, on both sides.

    Args:
        teacher: model folder of the teacher.
        address: HOST:PORT to listen at, and nowhere else; PORT alone is of 127.0.0.1. Copies on several machines: one each,
            separated by commas.
        precision: bf16 on a GPU, fp32 on a CPU by default; hidden states travel in it.
        tensor_model_parallel_size: ranks that share each layer.
        context_parallel_size: ranks that share each sequence.
        sequence_parallel: with tensor parallelism: norms and residuals split over the sequence.
        timeout_minutes: how long a student may be silent before it is given up.
        runs: end when all students have left so many times.
        max_tokens: most tokens of a micro-batch that is answered.
        teacher_window: how the teacher reads more tokens than its window has: --teacher_window.mode rope or windows.
    """
    from datetime import timedelta

    replica_address(address, 0)
    read_description(teacher)

    from megatron_hylo.config import ParallelConfig
    from megatron_hylo.teachers.server import serve_teacher as serve

    parallel = ParallelConfig(
        tensor_model_parallel_size=tensor_model_parallel_size, context_parallel_size=context_parallel_size,
        sequence_parallel=sequence_parallel,
    )  # fmt: skip
    timeout = timedelta(minutes=timeout_minutes)
    serve(str(teacher), address, parallel, chosen_dtype(precision), timeout, runs, max_tokens, teacher_window)


def upcycle(config: UpcycleConfig, json: bool = False) -> None:
    """Make a hybrid from a teacher: its mixers from the attention weights; shows how good it is before any training.

    Under torchrun the ranks share the layers and the calibration text; the hybrid is the same to the last bit. Started again
    after an interruption, on any number of ranks, the same command keeps the layers and files that are done.

    TEACHER and OUTPUT may also be keys of a YAML file, as all options: `hylo upcycle --config FILE`.

    Args:
        config: settings of the hybrid.
        json: print {pattern, quality, teacher_quality, layers} instead of tables.
    """
    check_free(config.output, config.overwrite, [config.teacher, config.calibration])
    config.hybrid(read_description(config.teacher)[0])
    if config.calibration is not None:
        read_calibration(config.calibration)
    reuse_memory()
    with model_imports():
        from megatron_hylo.platform.distributed import session
        from megatron_hylo.upcycle.run import upcycle_folder

    with session():
        report = upcycle_folder(config, track)
    console.print(f"wrote {config.output}: {report.config.mixers}")
    if json:
        print_json(report.to_dict())
    else:
        show_upcycle(report)


def assemble(mla: Path, linear: Path, base: Path, output: Path, *, pattern: str, overwrite: bool = False) -> None:
    """Put a hybrid together, layer by layer, from an aligned pure-MLA and an aligned pure-linear model.

    Args:
        mla: model folder, all layers MLA.
        linear: model folder, the same linear mixer in all layers.
        base: model folder of the teacher, for embedding, final norm and head.
        output: model folder to make.
        pattern: one mixer a layer, e.g. "G+GG".
        overwrite: replace what is there.
    """
    check_free(output, overwrite, [mla, linear, base])
    for folder in (mla, linear, base):
        read_description(folder)
    reuse_memory()
    with model_imports():
        from megatron_hylo.platform.distributed import session
        from megatron_hylo.upcycle.run import assemble_folder

    with session():
        assemble_folder(mla, linear, base, output, pattern, overwrite, track)
    console.print(f"wrote {output}: {pattern}")


def select(
    teacher: Path,
    *,
    mla: Path,
    linear: Path,
    data: Path,
    count: PositiveInt,
    method: Literal["smart", "greedy", "backward", "uniform"] = "smart",
    by: Literal["kl", "recall", "both"] = "kl",
    tokens: PositiveInt = 65_536,
    sequence_length: PositiveInt = 2048,
    output: Path | None = None,
    allow_unaligned: bool = False,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Choose which layers of a hybrid are MLA, by KL to the teacher or by recall, from hybrids of two aligned pure models.

    Args:
        teacher: model folder both were aligned with.
        mla: model folder, aligned, all layers MLA.
        linear: model folder, aligned, the same linear mixer in all layers.
        data: dataset folder made by `hylo preprocess`; its training text is used.
        count: number of MLA layers.
        method: smart (sensitivity of each layer, spaced as in Zebra-Llama), greedy (from all linear, the best one more, count
            times), backward (from all MLA, the least needed one less until count are left) or uniform (evenly spread).
        by: kl (to the teacher, on plain text), recall (loss at the answers of key-value exercises in the text) or both (their
            sum, each as a part of the all-linear model's).
        tokens: text to measure on.
        sequence_length: tokens a window.
        output: folder to make, with selection.json and selection.png.
        allow_unaligned: go on where the models do not look aligned.
        overwrite: replace what is there.
        json: print all that was measured instead of the pattern.
    """
    if output is not None:
        check_free(output, overwrite, [teacher, mla, linear, data])
    for folder in (teacher, mla, linear):
        read_description(folder)
    check_indexed_dataset(data / "train")
    with model_imports():
        from megatron_hylo.platform.distributed import session
        from megatron_hylo.upcycle.select import select_folder

    with session():
        found = select_folder(
            teacher, mla, linear, data, count, method, by, tokens, sequence_length, output, allow_unaligned, overwrite, track
        )
    show_selection(found)
    cost = f"{found.tokens:,} tokens, {found.layer_evaluations:,.0f} layers run over them, {found.seconds:.1f} s"
    console.print(cost, style="dim", highlight=False)
    if json:
        print_json(found.to_dict())
    else:
        print(found.pattern)
