"""The tiny models of tests/hf."""

from tests.hf.conftest import ids  # noqa: F401  the fixture
