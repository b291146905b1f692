"""One process a time writes an output; the second is told who does, and a killed one leaves nothing that blocks."""

import contextlib
import multiprocessing
import os
import platform
import time

import pytest

from megatron_hylo.config import ConfigError
from megatron_hylo.io import _locks, atomic_directory, output_lock
from tests.io.conftest import make


def test_the_second_process_is_refused_and_told_who_is_there_until_that_one_is_killed(tmp_path, another_process):
    output = tmp_path / "new" / "output"
    process = another_process(output)
    (tmp_path / "link").symlink_to(tmp_path / "new")
    for path in (output, tmp_path / "link" / "output"):
        with pytest.raises(
            ConfigError, match=rf"output is being written by process {process.pid} on {platform.node()} since 20"
        ):
            make(path)
    assert not output.exists()
    process.kill()
    process.wait()
    assert (tmp_path / "new" / ".output.lock").is_file()
    make(output)
    assert [p.name for p in output.parent.iterdir()] == ["output"]


def test_what_is_in_a_locked_folder_needs_no_lock_of_its_own(tmp_path):
    with output_lock(tmp_path / "run"):
        with atomic_directory(tmp_path / "run" / "model"):
            assert [p.name for p in (tmp_path / "run").iterdir()] == [".model.partial"]
        assert sorted(p.name for p in tmp_path.iterdir()) == [".run.lock", "run"]
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_folders_made_for_a_lock_go_with_it(tmp_path):
    with pytest.raises(RuntimeError):
        with output_lock(tmp_path / "a" / "b" / "c"):
            assert (tmp_path / "a" / "b" / ".c.lock").is_file()
            raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_lock_on_a_file_that_its_holder_removed_just_now_is_none(tmp_path, monkeypatch):
    place, right, holder = tmp_path / "output", _locks._open, contextlib.ExitStack()
    holder.enter_context(_locks._locked(place))

    def release_in_between(file):
        opened = right(file)
        holder.close()
        return opened

    monkeypatch.setattr(_locks, "_open", release_in_between)
    file = tmp_path / ".output.lock"
    descriptor = _locks._acquire(file, place)
    assert os.path.samestat(os.fstat(descriptor), os.stat(file))
    os.close(descriptor)


def _count(folder, times: int) -> None:
    done = 0
    while done < times:
        try:
            with output_lock(folder / "output"):
                number = int((folder / "number").read_text())
                (folder / "number").write_text(str(number + 1))
                done += 1
        except ConfigError:
            time.sleep(0.001)


def test_processes_that_take_turns_are_never_in_at_the_same_time(tmp_path):
    """The lock file is removed and made again all the time; a lock on a removed one would count too little."""
    (tmp_path / "number").write_text("0")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_count, args=(tmp_path, 20)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert (tmp_path / "number").read_text() == "60"
