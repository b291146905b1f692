"""docs/cli.md is what the parser says."""

from pathlib import Path

from megatron_hylo.cli.reference import reference

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"


def test_docs_match_the_parser():
    """A changed option or help text is in the reference as well."""
    assert PAGE.read_text() == reference(), "run `python -m megatron_hylo.cli.reference > docs/cli.md`"


def test_an_option_is_documented_with_its_values_and_default():
    """The reference is not empty where it matters: a verb's usage, a literal, a nested setting."""
    text = reference()
    assert "`hylo generate MODEL PROMPT [options]`" in text
    assert "| `--optimizer.lr` | number | `6e-05` |" in text
    assert "| `--stage` | `pretrain`, `align`, `distil` | required |" in text
