"""The tiny models of tests/hf."""

from tests.hf.conftest import save_hybrid  # noqa: F401  the fixture
