"""Types of options that jsonargparse checks; for a type checker they are plain numbers."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    PositiveInt = int
    PositiveFloat = float
else:
    from jsonargparse.typing import PositiveFloat, PositiveInt

__all__ = ["NUMBERS", "PositiveFloat", "PositiveInt"]

NUMBERS = {"PositiveInt": "integer above 0", "PositiveFloat": "number above 0"}  # in words
