"""A served teacher reads past its window as it is told, and says what it reads."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from megatron_hylo.config import ConfigError, ParallelConfig, RopeScaling, TeacherWindow
from megatron_hylo.io.identity import content_identity
from megatron_hylo.models.checkpoint import load_model, save_model
from megatron_hylo.teachers.remote import Connection
from megatron_hylo.teachers.remote_link import HEAD, HIDDEN
from megatron_hylo.teachers.server import serve_teacher
from tests.conftest import uneven_model
from tests.models.test_windows import by_hand
from tests.ports import free_port


@pytest.fixture
def teacher(one_rank, tmp_path) -> Path:
    """A folder of a teacher with a window of 16 tokens."""
    save_model(uneven_model("*-*-", max_position_embeddings=16).float(), tmp_path / "teacher")
    return tmp_path / "teacher"


def served(teacher: Path, window: TeacherWindow, ids: torch.Tensor, starts: torch.Tensor | None = None):
    """(hidden states or the refusal, what the teacher says of itself) of one student's one micro-batch."""
    address = f"127.0.0.1:{free_port()}"

    def student():
        link = Connection(address, 0, "a test", 20.0)
        try:
            link.receive(HEAD, (160, 48), torch.float32)
            link.ask(ids, starts)
            return link.receive(HIDDEN, (ids.shape[1], len(ids), 48), torch.float32), link.about
        except ConfigError as error:
            return str(error), link.about
        finally:
            link.link.end()

    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(student)
        minute = timedelta(minutes=1)
        serve_teacher(str(teacher), address, ParallelConfig(), torch.float32, minute, runs=1, teacher_window=window)
        return answer.result()


@torch.no_grad()
def test_windows_are_served_as_read_by_hand(teacher):
    ids = torch.randint(160, (2, 50))
    hidden, about = served(teacher, TeacherWindow("windows"), ids)
    torch.testing.assert_close(hidden, by_hand(load_model(teacher).eval(), ids, 16), rtol=0, atol=1e-5)
    assert about["reach"] is None and about["identity"] != content_identity(teacher)


@torch.no_grad()
def test_stretched_positions_are_served(teacher):
    ways = TeacherWindow("rope", RopeScaling("yarn", factor=4.0, original_max_position_embeddings=16))
    ids = torch.randint(160, (2, 50))
    hidden, about = served(teacher, ways, ids)
    torch.testing.assert_close(hidden, load_model(teacher, **ways.changes()).eval()(ids), rtol=0, atol=1e-5)
    assert (hidden - load_model(teacher).eval()(ids)).norm() > 0.05 * hidden.norm()
    assert about["reach"] == 64 and about["identity"] != content_identity(teacher)
    with pytest.raises(ConfigError, match="factor = longest sequence / 16 and original_max_position_embeddings 16"):
        minute = timedelta(minutes=1)
        serve_teacher(
            str(teacher), "localhost:9", ParallelConfig(), torch.float32, minute, 1, teacher_window=TeacherWindow("rope")
        )
    refusal, _ = served(teacher, ways, torch.zeros(1, 65, dtype=torch.int64))
    assert "65 tokens is more than the 64 that this teacher reads" in refusal


def test_longer_than_its_window_is_refused_where_nothing_is_set(teacher):
    refusal, about = served(teacher, TeacherWindow(), torch.zeros(1, 17, dtype=torch.int64))
    assert "17 tokens is more than the 16 that this teacher reads; serve-teacher --teacher_window" in refusal
    assert about["reach"] == 16 and about["identity"] == content_identity(teacher)
    hidden, _ = served(teacher, TeacherWindow(), torch.zeros(1, 20, dtype=torch.int64), torch.tensor([0, 16]))
    assert hidden.shape == (20, 1, 48)  # documents of a packed sequence that are short enough
    refusal, _ = served(teacher, TeacherWindow(), torch.zeros(1, 20, dtype=torch.int64), torch.tensor([0, 1]))
    assert "19 tokens is more than the 16" in refusal
