"""Description of the model and of the run for a results folder."""

import os
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import megatron_hylo
from megatron_hylo.config import ConfigError
from megatron_hylo.config.layouts import kv_percent
from megatron_hylo.convert.hf_config import model_config_from_hf
from megatron_hylo.eval.results import RESULTS, EvalResult, read_results
from megatron_hylo.io.environment import commit, device_name, library_versions
from megatron_hylo.io.gguf_file import gguf_file
from megatron_hylo.io.identity import content_identity, json_identity
from megatron_hylo.io.progress import Track, no_progress
from megatron_hylo.io.provenance import describe_input


def model_kind(path: str | Path) -> str:
    """Kind of a model's folder or file, in words."""
    path = Path(path)
    if (path / "train_state.json").is_file():
        return "training checkpoint"
    if (path / "hylo.json").is_file():
        return "model folder"
    if gguf_file(path) is not None:
        return "GGUF file"
    return "exported model" if (path / "hylo_provenance.json").is_file() else "Hugging Face folder"


def describe_model(path: str | Path, lm: Any, track: Track = no_progress) -> dict[str, Any]:
    """Describe a model: {"name", "path", "kind", "hash", "parameters", "kv_percent", "max_length"}.

    Args:
        path: its folder or file.
        lm: `HyloLM` that holds it.
        track: progress display over files that have to be hashed.

    Returns:
        hash: of the weights, the same wherever the folder lies; kv_percent: KV cache a token, of the all-attention model's,
        None for a family that is not converted.
    """
    path = Path(os.path.abspath(path))
    parameters = {id(p): p.numel() for p in lm.model.parameters()}  # tied ones once
    try:
        percent = kv_percent(model_config_from_hf(lm.model.config.to_dict()))
    except (ConfigError, KeyError):
        percent = None
    return {
        "name": _name(path),
        "path": str(path),
        "kind": model_kind(path),
        "hash": model_identity(path, track),
        "parameters": sum(parameters.values()),
        "kv_percent": percent,
        "max_length": lm.max_length,
    }


def describe_run(lm: Any, settings: Mapping[str, Any], started: float) -> dict[str, Any]:
    """Describe a run: {"command", "commit", "version", "libraries", "devices", "dtype", "seed", "time", "seconds", "settings"}.

    Args:
        lm: `HyloLM`.
        settings: of the suites.
        started: time.time() at its beginning.
    """
    gpu = torch.cuda.get_device_name(lm.device) if lm.device.type == "cuda" else None
    return {
        "command": shlex.join(["hylo", *sys.argv[1:]]),
        "commit": commit(),
        "version": megatron_hylo.__version__,
        "libraries": library_versions(),
        "devices": [device_name(gpu)] * lm.world_size,
        "dtype": str(next(lm.model.parameters()).dtype).removeprefix("torch."),
        "seed": settings["seed"],
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "seconds": round(time.time() - started, 1),
        "settings": dict(settings),
    }


def parts_key(model: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Any]:
    """Return what parts of an evaluation must have in common to be put together: weights, settings, inputs, code.

    Args:
        model, run: as of `describe_model` and `describe_run`.
    """
    settings = run["settings"]
    files = [settings.get(name) for name in ("data", "essays", "squad", "hotpot")]
    times = {file: os.stat(os.path.expanduser(file)).st_mtime_ns for file in files if file and os.path.exists(file)}
    same = {name: run[name] for name in ("dtype", "settings", "commit", "version", "libraries")}
    return {"hash": model["hash"], "max_length": model["max_length"], "files_changed": times, **same}


def _name(path: Path) -> str:
    """The folder's name, with its run's where it is RUN/model or RUN/checkpoints/STEP."""
    if path.parent.name == "checkpoints":
        return f"{path.parent.parent.name}/{path.name}"
    return f"{path.parent.name}/{path.name}" if path.name in ("model", "second_model") else path.name


def results_of(model: str | Path) -> dict[Path, EvalResult]:
    """Read the evaluations of a run's model that lie in the run's folder or beside it, by their folders.

    Args:
        model: RUN/model; results folders are looked for in RUN and in the folder that holds RUN.
    """
    path = Path(os.path.abspath(model))
    files = [file for folder in (path.parent, path.parent.parent) for file in sorted(folder.glob(f"*/{RESULTS}"))]
    found: dict[Path, EvalResult] = {}
    identity = model_identity(path, no_progress) if files else ""
    for file in files:
        try:
            result = read_results(file.parent)
        except ConfigError:  # something else of that name
            continue
        if result.model.get("hash") == identity:
            found[file.parent] = result
    return found


def foreign_results(results: Mapping[Path, EvalResult], model: str | Path) -> list[Path]:
    """Return the folders whose results another model gave, by the hash of weights; an export has those of its source too."""
    own, made = {model_identity(Path(model), no_progress)}, describe_input(model).get("provenance", {})
    if made.get("verb") == "export":
        own.add(made["inputs"]["model"].get("content_sha256", ""))
    return [folder for folder, result in results.items() if result.model.get("hash") not in own]


def model_identity(path: Path, track: Track) -> str:
    """Return a sha256 of a model's weights: a model folder, checkpoint, Hugging Face folder or .gguf file."""
    if (path / "hylo.json").is_file():
        return content_identity(path)
    return json_identity(describe_input(gguf_file(path) or path, track).get("files", {}))
