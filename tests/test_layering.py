"""Imports between packages point one way."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "megatron_hylo"
# from the top down: a package imports those of later rows, and itself
ORDER = (
    {"cli"},
    {"train"},
    {"upcycle", "plan", "serve"},
    {"teachers", "calibrate", "eval"},
    {"distill", "convert"},
    {"models", "data"},
    {"parallel", "initialise", "hf", "platform", "io"},
    {"kernels"},
    {"config"},
)
ROW = {package: row for row, packages in enumerate(ORDER) for package in packages}


def imported(source: str) -> set[str]:
    """Packages of megatron_hylo that a file imports, at its top or in a function."""
    modules = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules += [f"{node.module}.{alias.name}" for alias in node.names] if node.module == PACKAGE.name else [node.module]
    return {module.split(".")[1] for module in modules if module.startswith(f"{PACKAGE.name}.")}


def upward(package: str, source: str) -> set[str]:
    """Packages that this file may not import."""
    return {other for other in imported(source) - {package} if ROW[other] <= ROW[package]}


@pytest.mark.parametrize("package", sorted(ROW))
def test_imports_point_downward(package):
    """No file of a package imports one of its own row or of a row above."""
    files = sorted((PACKAGE / package).rglob("*.py"))
    assert files, f"there is no package {package}"
    assert not {str(file.relative_to(PACKAGE)): found for file in files if (found := upward(package, file.read_text()))}


def test_every_module_is_in_a_package_of_the_order():
    """Nothing but the public API lies beside the packages."""
    assert {path.name for path in PACKAGE.iterdir() if path.suffix == ".py"} == {"__init__.py"}
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(ROW)


def test_a_planted_upward_import_is_found():
    """The checks above can fail."""
    assert upward("models", "def f():\n    from megatron_hylo.train.loop import train\n") == {"train"}
    assert upward("kernels", "from megatron_hylo import parallel\n") == {"parallel"}
    assert upward("distill", "import megatron_hylo.convert.mapping\n") == {"convert"}
