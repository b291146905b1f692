"""The tiny models of tests/hf."""

from tests.hf.conftest import ids, save_hybrid  # noqa: F401  the fixtures
