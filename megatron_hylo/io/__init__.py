"""Files and folders: atomic folders with manifests, their verification, locks of outputs, JSON, the cache folder.

Everything this project writes for later use (converted models, checkpoints, datasets, exports) goes through
`atomic_directory`, and is checked by `verify_manifest` when it is opened. Import from here, not from the modules inside.
"""

from megatron_hylo.io._files import DamagedError, cache_dir, plain_os_errors, read_json, sha256, write_json
from megatron_hylo.io._folders import (
    atomic_directory,
    check_apart,
    check_free,
    hash_early,
    remove_finished,
    work_folder,
)
from megatron_hylo.io._locks import output_lock
from megatron_hylo.io._manifests import (
    MANIFEST,
    has_manifest,
    read_manifest,
    read_verified_json,
    verify_manifest,
    verify_manifest_if_any,
)
from megatron_hylo.io._ranks import barrier, on_main

__all__ = [
    "MANIFEST", "DamagedError", "barrier", "cache_dir", "check_apart", "check_free", "hash_early", "has_manifest",
    "on_main", "output_lock", "plain_os_errors", "read_json", "read_manifest", "read_verified_json", "remove_finished",
    "atomic_directory", "sha256", "verify_manifest_if_any", "verify_manifest", "work_folder", "write_json",
]  # fmt: skip
