"""Training stages that recipes are written for, and the hyperparameters of each base model that has layouts."""

from dataclasses import dataclass

STAGES = {"stage1_ild": 2048, "stage2_ctx8k": 8192, "stage3_ctx32k": 32768, "stage3_ctx64k": 65536, "stage3_ctx128k": 131072}
SCRIPTED = ("stage1_ild", "stage2_ctx8k", "stage3_ctx64k", "stage3_ctx128k")  # stages with a Slurm script


@dataclass(frozen=True)
class Family:
    """Hyperparameters that the layouts of one base share.

    Args:
        title: the base model in words.
        teacher: teacher of stages 2 and 3 in words, and its key in `BASES`.
        gpus: GPUs that batch sizes and parallelism are for.
        lr: peak learning rate of stages 2 and 3, with its source.
        sequences_8k: sequences a step at 8,192 tokens, with their source.
        yarn_from: tokens that the student's YaRN stretches.
    """

    title: str
    teacher: tuple[str, str]
    gpus: int
    lr: tuple[str, str]
    sequences_8k: tuple[int, str]
    yarn_from: int


FAMILIES = {
    "llama3.2-1b": Family(
        "Llama-3.2-1B", ("Llama-3.1-8B-Instruct", "llama3.1-8b"), 8, ("6.0e-5", "[HyLo] (for a 3B base 4e-5)"),
        (32, "[HyLo] for 1B (3B: 16)"), 2048,
    ),
    "llama3.2-3b": Family(
        "Llama-3.2-3B", ("Llama-3.1-8B-Instruct", "llama3.1-8b"), 8, ("4.0e-5", "[HyLo] (for a 1B base 6e-5)"),
        (16, "[HyLo] for 3B (1B: 32)"), 2048,
    ),
    "qwen3-1.7b": Family(
        "Qwen3-1.7B", ("Qwen3-8B", "qwen3-8b"), 8, ("6.0e-5", "[HyLo]"), (32, "[HyLo]"), 32768,
    ),
    "qwen3-30b-a3b": Family(
        "Qwen3-30B-A3B", ("Qwen3-30B-A3B itself", "qwen3-30b-a3b"), 8, ("4.0e-5", "[HyLo] for a 3B base; our choice"),
        (16, "[HyLo] for a 3B base; our choice"), 32768,
    ),
    "smollm2-135m": Family(
        "SmolLM2-135M", ("SmolLM2-135M-Instruct itself", "smollm2-135m"), 1, ("1.5e-4", "measured [recall]"),
        (4, "32,768 tokens a step, measured [recall]"), 2048,
    ),
}  # fmt: skip
