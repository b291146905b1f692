"""Plugin that serves exported hybrids with stock vLLM, which finds it by the entry point `vllm.general_plugins`.

vLLM calls `register` in each of its processes, whatever model they serve. So this module imports no torch, and `register` never
raises and may be called again: where HyLo models cannot be served, those alone fail when they are loaded, with the reason.
"""

import contextlib
import logging
import re

TESTED = ("0.26.0", "0.32.0")  # oldest and newest vLLM that `make serve-test` has passed with
ARCHITECTURE = "HyloForCausalLM"
logger = logging.getLogger("vllm.hylo")  # below vLLM's own, so that its settings hold


def check_version(version: str) -> None:
    """Raise ImportError for a vLLM outside the tested range, whose internal interfaces (docs/serving.md) may differ."""
    found, oldest, newest = (tuple(int(part) for part in re.findall(r"\d+", text)[:2]) for text in (version, *TESTED))
    if not oldest <= found <= newest:
        raise ImportError(
            f"HyLo models are served with vLLM {TESTED[0]} to {TESTED[1]}, but {version} is installed; "
            f"pip install 'vllm>={TESTED[0]},<{newest[0]}.{newest[1] + 1}'"
        )


def register() -> None:
    """Tell vLLM and transformers about HyLo models; never raises."""
    try:
        import vllm

        check_version(vllm.__version__)
        from megatron_hylo.serve.vllm.config import register_config

        register_config()
    except Exception as error:
        logger.warning("HyLo models cannot be served here: %s: %s", type(error).__name__, error)
        _refuse(f"HyLo models cannot be served here: {error}")


def _refuse(reason: str) -> None:
    """Let configurations of HyLo models fail with the reason, in place of vLLM's "not supported"."""
    with contextlib.suppress(Exception):  # transformers may be what is missing
        from transformers import AutoConfig, PretrainedConfig

        class RefusedHyloConfig(PretrainedConfig):
            """Configuration of model_type "hylo" that cannot be loaded."""

            model_type = "hylo"

            @classmethod
            def from_dict(cls, config_dict, **kwargs):
                """Raise ImportError with the reason."""
                raise ImportError(reason)

        AutoConfig.register(RefusedHyloConfig.model_type, RefusedHyloConfig, exist_ok=True)
