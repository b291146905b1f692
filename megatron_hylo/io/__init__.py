"""Files and folders: atomic folders with manifests, their verification, locks of outputs, JSON, the cache folder.

Everything this project writes for later use (converted models, checkpoints, datasets, exports) goes through
`sealed_directory`, and is checked by `verify_sealed` when it is opened. Import from here, not from the modules inside.
"""

from megatron_hylo.io._files import DamagedError, cache_dir, plain_os_errors, read_json, sha256, write_json
from megatron_hylo.io._folders import (
    check_apart,
    check_free,
    hash_early,
    remove_finished,
    sealed_directory,
    work_folder,
)
from megatron_hylo.io._locks import output_lock
from megatron_hylo.io._manifests import (
    MANIFEST,
    is_sealed,
    read_manifest,
    read_sealed_json,
    verify_if_sealed,
    verify_sealed,
)
from megatron_hylo.io._ranks import barrier, on_main

__all__ = [
    "MANIFEST", "DamagedError", "barrier", "cache_dir", "check_apart", "check_free", "hash_early", "is_sealed",
    "on_main", "output_lock", "plain_os_errors", "read_json", "read_manifest", "read_sealed_json", "remove_finished",
    "sealed_directory", "sha256", "verify_if_sealed", "verify_sealed", "work_folder", "write_json",
]  # fmt: skip
