"""Resume check: compares a start of a run with what its run folder was started with.

    RUN/config.json     settings, a recipe that starts the same run
    RUN/history.json    {"inputs": {key: {"path", "identity"}}, "windows": {"text": identity, "recall": identity},
                        "changes": [{"time", "user", "step", "key", "from", "to"}]}

Inputs are compared by what they hold (identity.py), settings by value, and then the training windows that both make with this
version. Some settings may always differ (where and how fast a run computes, what it records), others only where `allow_change`
names them, a few never.
"""

import getpass
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_hylo.config import ConfigError
from megatron_hylo.config.layouts import BASES, LAYOUTS
from megatron_hylo.config.paths import hugging_face_folder
from megatron_hylo.config.renamed import RENAMED, translate_settings
from megatron_hylo.config.train import TrainConfig
from megatron_hylo.config.train_settings import flatten
from megatron_hylo.convert.hf_start import model_identity
from megatron_hylo.io import has_manifest, on_main, read_json, write_json
from megatron_hylo.io.identity import content_identity, json_identity
from megatron_hylo.models.description import read_description
from megatron_hylo.platform.distributed import is_main
from megatron_hylo.train.checkpoint import checkpoint_step, latest_checkpoint

logger = logging.getLogger("megatron_hylo.train")
SETTINGS, HISTORY = "config.json", "history.json"
BLEND = "text.blend"  # an input of several folders
INPUTS = ("model", "second_model", "scratch", "teacher", "teacher_store", "data", BLEND)
ADDRESS = "teacher_address"  # an input too, whose identity its server tells
FREE = {
    "checkpoint", "logging", "profile", "eval_interval", "eval_windows", "eval_data", "evaluation", "parallel",
    "micro_batch_size", "recompute", "cuda_graphs", "backend", "deterministic", "loss_chunk_tokens", "output",
    "teacher_offload", "optimizer.offload", "allow_change",
}  # fmt: skip
WINDOW_SETTINGS = {"data", "seed", "packed_documents", "text", "recall", "teacher_store"}  # other values make other windows
FIXED = {
    "stage": "its checkpoints are of that stage",
    "model": "its checkpoints are of that model",
    "second_model": "its checkpoints are of that model",
    "scratch": "its checkpoints are of that shape",
    "trainable": "its optimizer has a state for what that trains",
    "align.loss": "its optimizer has a state for what that trains",
    "precision": "its optimizer's state is of that precision",
    "optimizer.name": "its optimizer's state is of that kind",
    "optimizer.use_distributed_optimizer": "its optimizer's state is of that kind",
    "sequence_length": "its position in the data counts windows of that length",
    "global_batch_size": "its position in the data counts batches of that size",
    "keep_optimizer_state": "its optimizer has gone on from there",
}


@dataclass
class Resume:
    """A start that passed the resume check, and what is written of it once the checkpoint is loaded."""

    run: Path
    settings: dict[str, Any]  # of this start, for config.json
    inputs: dict[str, dict[str, str]]
    history: list[dict[str, Any]] = field(default_factory=list)  # changes of earlier starts
    changes: list[dict[str, Any]] = field(default_factory=list)  # of this one
    is_new: bool = True
    is_translated: bool = False  # config.json has names of an earlier version
    known_teacher: str | None = None  # identity of the teacher at an address, as an earlier start saw it
    windows: dict[str, str] = field(default_factory=dict)  # identities of the training windows, of an earlier start or this one
    allowed_changes: set[str] = field(default_factory=set)

    @property
    def first_train_tokens(self) -> int:
        """Tokens that the run was to have at its first start."""
        changed = [c["from"] for c in [*self.history, *self.changes] if c["key"] == "train_tokens"]
        return changed[0] if changed else _total_tokens(self.settings)

    def goes_on(self, config: TrainConfig, newest: Path | None) -> bool:
        """Return whether there are steps left: also of a finished run that is extended.

        Args:
            config: settings of this start.
            newest: the run's newest finished checkpoint.

        Raises:
            ConfigError: train_tokens asks for fewer steps than are done, or no checkpoint is there to train on from.
        """
        finished, wanted, at = has_manifest(self.run / "model"), config.train_steps, checkpoint_step(newest)
        done = at
        if finished:
            first = replace(config, train_tokens=self.first_train_tokens, extend_tokens=0).train_steps
            done = read_description(self.run / "model")[1]["provenance"].get("train_steps", first)
        if wanted < done:
            raise ConfigError(
                f"{self.run} has done {done} steps, {config.total_tokens} tokens are {wanted}; give --extend_tokens N for more "
                f"than train_tokens, or use another output"
            )
        if not finished or wanted == done:
            return not finished
        if newest is None:
            raise ConfigError(
                f"{self.run} ended at step {done} and has no checkpoint to go on from; start another run from {self.run}/model"
            )
        logger.warning(
            "%s has done %d steps and goes on to step %d from its checkpoint of step %d; %s/model stays until then",
            self.run, done, wanted, at, self.run,
        )  # fmt: skip
        return True

    def check_remote(self, identity: str | None) -> None:
        """Compare a remote teacher, once it has answered, with the one that the run learnt from so far.

        Args:
            identity: identity of the teacher's content by its server; None of a server that does not tell.

        Raises:
            ConfigError: another teacher, and `allow_change` does not name teacher_address.
        """
        if identity is None:
            return
        if self.known_teacher not in (None, identity):
            if ADDRESS not in self.allowed_changes:
                raise ConfigError(
                    f"{self.run} learnt from another teacher (content {self.known_teacher[:12]}) than the one at "
                    f"{self.settings[ADDRESS]} ({identity[:12]}); serve that one, use another output, or give --allow_change "
                    f"{ADDRESS} to go on with this one"
                )
            self.changes.append({"key": ADDRESS, "from": self.known_teacher, "to": identity})
        self.inputs[ADDRESS] = {"path": self.settings[ADDRESS], "identity": identity}

    def check_windows(self, windows: Mapping[str, str]) -> None:
        """Compare the training windows with those that the run learnt from so far.

        Args:
            windows: of `windows_identity`.

        Raises:
            ConfigError: others, though inputs and settings are the same, and `allow_change` does not name text or recall.
        """
        known, changed = self.windows, not WINDOW_SETTINGS.isdisjoint(change["key"].split(".")[0] for change in self.changes)
        if not known and not self.is_new:
            logger.warning(
                "%s is of a version that did not keep which training windows it learns from: taken as they are now", self.run
            )
        for name, what in (("text", "text"), ("recall", "recall exercises")):
            before, now = known.get(name, ""), windows.get(name, "")
            if not before or before == now or changed:
                continue
            if name not in self.allowed_changes:
                raise ConfigError(
                    f"{self.run} learnt from other training windows (content {before[:12]}) than this version makes of the "
                    f"same settings ({now[:12]}): their {what} differ, by the tokenizer in {self.settings['data']}, or since "
                    f"megatron_hylo or a library is of another version ({self.run}/starts.jsonl has the run's); use those, use "
                    f"another output, or go on with the new windows by --allow_change {name}"
                )
            self.changes.append({"key": name, "from": f"windows {before[:12]}", "to": f"windows {now[:12]}"})
            changed = True  # exercises are inserted in the text
        self.windows = dict(windows)

    def record(self, step: int) -> None:
        """Write settings, inputs and changes into the run folder; the main rank does, all may call it.

        Args:
            step: steps done so far, which the changes hold from.
        """
        if is_main():
            self.run.mkdir(parents=True, exist_ok=True)
            about = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "user": _user(), "step": step}
            for change in self.changes:
                logger.warning("from step %d on: %s = %s instead of %s", step, change["key"], change["to"], change["from"])
            self.history += [about | change for change in self.changes]
            write_json(self.run / HISTORY, {"inputs": self.inputs, "windows": self.windows, "changes": self.history})
            if self.is_new or self.is_translated or self.changes:
                write_json(self.run / SETTINGS, self.settings)
        self.changes = []


def check_resume(config: TrainConfig, run: Path) -> Resume:
    """Compare a start with the run that it would go on with; nothing is written. All ranks call it.

    Args:
        config: settings of this start.
        run: its folder; without config.json it is a new run.

    Raises:
        ConfigError: an input holds something else, or a setting differs that is part of what the run is; says which, and
            what can be done.
    """
    return on_main(lambda: _compare(config, run))


def _compare(config: TrainConfig, run: Path) -> Resume:
    settings = json.loads(json.dumps(asdict(config)))
    del settings["allow_change"]
    ours = flatten(settings)
    inputs = {name: {"path": value, "identity": _identity(name, value)} for name in INPUTS if (value := ours[name])}
    resume = Resume(run, settings, inputs, allowed_changes=config.allowed_changes)
    if not (run / SETTINGS).is_file():
        if newest := latest_checkpoint(run):
            logger.warning(
                "%s has no %s, so this start is compared with nothing; it goes on from %s", run, SETTINGS, newest.name
            )
        return resume
    resume.is_new = False
    kept = read_json(run / SETTINGS)
    saved = translate_settings(kept)
    resume.is_translated = saved != kept
    history = read_json(run / HISTORY) if (run / HISTORY).is_file() else {"inputs": {}, "changes": []}
    resume.history = [change | {"key": RENAMED.get(change["key"], change["key"])} for change in history["changes"]]
    known = history["inputs"]
    resume.windows = history.get("windows", {})
    resume.known_teacher = known.get(ADDRESS, {}).get("identity")
    if ADDRESS in known:
        inputs[ADDRESS] = known[ADDRESS]
    # a setting that the run's version did not have yet had its default's effect
    defaults = asdict(TrainConfig(stage="pretrain", data="-", output="-", scratch="-"))
    theirs = flatten(defaults) | flatten(saved)
    for flat in (ours, theirs):  # by its total alone, however it is made up
        flat["train_tokens"] = _total_tokens(flat)
        flat.pop("extend_tokens", None)
    for name in sorted(ours.keys() | theirs.keys()):
        value, former = ours.get(name), theirs.get(name)
        if not FREE.isdisjoint((name, name.split(".")[0])) or (name == ADDRESS and value and former):
            continue
        if name in INPUTS and value and former:
            before, now = _known_identity(name, former, value, known, run), inputs[name]["identity"]
            if before is not None and before != now:
                said = [_in_words(path) + f" (content {content[:12]})" for path, content in ((former, before), (value, now))]
                _change(resume, config, name, *said)
        elif value != former:
            _change(resume, config, name, former, value)
    if unknown := [name for name in inputs if name not in known and name != ADDRESS]:
        logger.warning(
            "%s is of a version that did not keep what its inputs hold: %s taken as they are now, and compared from now on",
            run, ", ".join(unknown),
        )  # fmt: skip
        if config.stage == "align" and config.align.loss == "mse" and saved.get("micro_batch_size", 1) > 1:
            logger.warning(
                "that version normalised align's mse over micro-batches, this one over windows: losses go on a few per cent "
                "higher or lower"
            )
    return resume


def _change(resume: Resume, config: TrainConfig, name: str, former: Any, value: Any) -> None:
    """Keep a change that is allowed; refuse another."""
    longer = name == "train_tokens" and value > former
    said = f"{resume.run} was started with {name} = {former}, now {value}"
    if name in FIXED:
        raise ConfigError(f"{said}; use another output to change it: {FIXED[name]}{_other_way(resume.run)}")
    if name == "train_tokens" and not longer and name not in config.allowed_changes:
        raise ConfigError(
            f"{said}; give --extend_tokens {former - config.train_tokens} as well to go on with it, --allow_change {name} to "
            f"end it earlier, or use another output{_other_way(resume.run)}"
        )
    if not longer and config.allowed_changes.isdisjoint((name, name.split(".")[0])):
        raise ConfigError(
            f"{said}; use another output to change it, or go on with the new value by --allow_change {name}"
            f"{_other_way(resume.run)}"
        )
    if name in ("optimizer.lr", "optimizer.mixer_lr"):
        _check_groups(resume, config)
    resume.changes.append({"key": name, "from": former, "to": value})


def _other_way(run: Path) -> str:
    """How to change anything: another run from the newest checkpoint; empty where there is none."""
    newest = latest_checkpoint(run)
    if newest is None:
        return ""
    return (
        f". --model {newest} with another output starts another run from these weights, with --keep_optimizer_state true also "
        f"from the optimizer's state"
    )


def _check_groups(resume: Resume, config: TrainConfig) -> None:
    """Refuse learning rates that need other parameter groups than the optimizer's state has."""
    saved = read_json(resume.run / SETTINGS)["optimizer"]
    now = config.optimizer
    of_their_own = [mixer_lr not in (None, lr) for lr, mixer_lr in ((saved["lr"], saved["mixer_lr"]), (now.lr, now.mixer_lr))]
    if of_their_own[0] != of_their_own[1]:
        raise ConfigError(
            f"{resume.run} was started with optimizer.lr = {saved['lr']} and optimizer.mixer_lr = {saved['mixer_lr']}, now "
            f"{now.lr} and {now.mixer_lr}: mixers must keep {'a learning rate of their own' if of_their_own[0] else 'lr'}, "
            f"since the optimizer's state has groups of parameters for it; choose other rates, or use another output"
        )


def _in_words(value: str | list[dict[str, Any]]) -> str:
    """Return an input as an error names it; of a blend its folders and their weights."""
    return value if isinstance(value, str) else ", ".join(f"{part['data']} x {part['weight']:g}" for part in value)


def _identity(name: str, value: Any) -> str:
    """Return the identity of an input's content; of `scratch`, whose weights are not read, that of the architecture."""
    if name == BLEND:
        return json_identity([part | {"data": content_identity(part["data"])} for part in value])
    if name != "scratch":
        return content_identity(value) if name in ("data", "teacher_store") else model_identity(value)
    named = value in LAYOUTS or value in BASES or not Path(value).is_dir()
    return value if named else json_identity(read_description(value)[1]["model"])


def _known_identity(name: str, former: Any, value: Any, known: dict[str, dict[str, str]], run: Path) -> str | None:
    """Return the identity of the run's own input; None where an older version kept none and the path is still the same."""
    if name in known:
        return known[name]["identity"]
    if former == value or (name not in ("scratch", BLEND) and Path(former).resolve() == Path(value).resolve()):
        return None
    folders = [part["data"] for part in former] if name == BLEND else [former]
    if name == "scratch" or all((hugging_face_folder(folder) or Path(folder)).is_dir() for folder in folders):
        return _identity(name, former)
    raise ConfigError(
        f"{run} was started with {name} = {_in_words(former)}, which is not there any more, and kept no record of what it "
        f"held, so that {_in_words(value)} cannot be compared with it; put it back at its place, or use another output"
    )


def _total_tokens(settings: dict[str, Any]) -> int:
    """Tokens of a run by its settings; an earlier version knew no extensions."""
    return settings["train_tokens"] + settings.get("extend_tokens", 0)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return "unknown"
