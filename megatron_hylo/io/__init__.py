"""Atomic directories with manifests, their verification, output locks, JSON files and the cache directory.

Everything this project writes for later use (converted models, checkpoints, datasets, exports) goes through
`atomic_directory`, and is checked by `verify_manifest` when it is opened. The names below are imported from this package; its
modules without a leading underscore (cache, foreign, gguf_file, gguf_quick_reader, identity, overlap, progress, provenance) are
imported directly.
"""

from megatron_hylo.io._files import DamagedError, cache_dir, place_file, plain_os_errors, read_json, sha256, write_json
from megatron_hylo.io._folders import (
    atomic_directory,
    check_apart,
    check_free,
    hash_for_manifest,
    record_for_manifest,
    remove_atomic_directory,
    staging_directory,
    staging_path,
)
from megatron_hylo.io._locks import LockState, output_lock, read_lock
from megatron_hylo.io._manifests import (
    MANIFEST,
    has_manifest,
    listed_files,
    read_manifest,
    read_verified_json,
    verify_manifest,
    verify_manifest_if_any,
)
from megatron_hylo.io._ranks import (
    barrier,
    gather,
    is_launched_first,
    launched_ranks,
    main_first,
    on_all,
    on_main,
    rank,
    world_size,
)

__all__ = [
    "MANIFEST", "DamagedError", "LockState", "atomic_directory", "barrier", "cache_dir", "check_apart", "check_free",
    "gather", "has_manifest", "hash_for_manifest", "is_launched_first", "launched_ranks", "listed_files", "main_first",
    "on_all", "on_main", "output_lock", "place_file", "plain_os_errors", "rank", "read_json", "read_lock", "read_manifest",
    "read_verified_json", "record_for_manifest", "remove_atomic_directory", "sha256", "staging_directory", "staging_path",
    "verify_manifest", "verify_manifest_if_any", "world_size", "write_json",
]  # fmt: skip
