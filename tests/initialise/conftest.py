"""The tiny teachers of tests/upcycle."""

from tests.upcycle.conftest import make_layer, make_state, teacher_config  # noqa: F401  the fixtures
