"""Docstrings say what ruff's rules do not check: a list of arguments or fields is whole, errors are there, lines begin well."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "megatron_hylo"
IMPLIED = {"self", "cls", "ctx"}  # need no entry
FRAGMENT = re.compile(r"(What|Where|That|Of|Those|These)\b")  # first words of a line that is no sentence
ENTRY = re.compile(r"^ {4}((?:\**\w+, )*\**\w+): ", re.MULTILINE)  # "q, k: [b, t, h, dk]": arguments of one kind share an entry


def documented(tree: ast.AST, public: bool = True) -> Iterator[tuple[ast.FunctionDef | ast.ClassDef, bool]]:
    """Functions and classes with a docstring, and whether they are public."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            visible = public and not node.name.startswith("_")
            if ast.get_docstring(node):
                yield node, visible
            yield from documented(node, visible and isinstance(node, ast.ClassDef))
        else:
            yield from documented(node, public)


def called(node: ast.FunctionDef | ast.ClassDef) -> ast.FunctionDef | None:
    """The function, or the `__init__` of a class; None where it has none."""
    if isinstance(node, ast.FunctionDef):
        return node
    return next((part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"), None)


def arguments(function: ast.FunctionDef) -> set[str]:
    """Names of a function's arguments, but those that begin with an underscore."""
    a = function.args
    names = [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg) if x is not None]
    return {name for name in names if not name.startswith("_")}


def fields(node: ast.ClassDef) -> set[str]:
    """Names of a dataclass's or named tuple's own fields."""
    found = [part for part in node.body if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)]
    return {x.target.id for x in found if x.target.id[0] != "_" and "ClassVar" not in ast.unparse(x.annotation)}


def errors(function: ast.FunctionDef) -> set[str]:
    """Classes of errors that a function raises itself, by name."""
    inside = {id(part) for node in ast.walk(function) if node is not function and isinstance(node, ast.FunctionDef)
              for part in ast.walk(node)}  # fmt: skip
    calls = [n.exc for n in ast.walk(function) if isinstance(n, ast.Raise) and id(n) not in inside]
    names = [call.func.id for call in calls if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)]
    return {name for name in names if name[0].isupper()}


def mistakes(source: str, verbs: bool = False) -> list[str]:
    """Docstrings of a file that leave something out; of `verbs`, which are shown as help, errors are not told."""
    found = []
    for node, public in documented(ast.parse(source)):
        text, function = ast.get_docstring(node) or "", called(node)
        where = f"{node.lineno} {node.name}"
        if FRAGMENT.match(text):
            found.append(f"{where}: begins with a fragment: {text.splitlines()[0]}")
        section = text.partition("\nArgs:\n")[2].partition("\n\n")[0]
        named = {name.strip(" *") for entry in ENTRY.findall(f"{section}\n") for name in entry.split(",")} - IMPLIED
        own = fields(node) if function is None else arguments(function) - IMPLIED
        if function is None and node.bases:  # a base class's fields may be there
            own |= named
        if section and named != own:
            found.append(f"{where}: Args has {sorted(named - own)} too many and lacks {sorted(own - named)}")
        if function is None:
            continue
        if public and not verbs and (missing := sorted(name for name in errors(function) if name not in text)):
            found.append(f"{where}: raises {', '.join(missing)} and does not say so")
    return found


@pytest.mark.parametrize("room", sorted({path.relative_to(PACKAGE).parts[0] for path in PACKAGE.rglob("*.py")}))
def test_docstrings_name_all_arguments_and_errors(room):
    files = [PACKAGE / room] if room.endswith(".py") else sorted((PACKAGE / room).rglob("*.py"))
    found = {str(file.relative_to(PACKAGE)): mistakes(file.read_text(), verbs=room == "cli") for file in files}
    assert not {file: wrong for file, wrong in found.items() if wrong}


@pytest.mark.parametrize("bases, lacks", [("", "Args has ['c'] too many and lacks ['b']"), ("(Base)", "lacks ['b']")])
def test_a_field_that_is_not_there_is_found(bases, lacks):
    docstring = "Numbers.\n\n    Args:\n        a, c: numbers.\n    "
    fields = "a: int\n    b: int\n    d: ClassVar[int] = 0"
    (found,) = mistakes(f'@dataclass\nclass Pair{bases}:\n    """{docstring}"""\n\n    {fields}\n')
    assert lacks in found


@pytest.mark.parametrize(
    "docstring, wrong",
    [
        ("Add numbers.\n\n    Args:\n        a, b: numbers.\n\n    Raises:\n        ValueError: a is 0.\n    ", None),
        ("Add numbers; ValueError for 0.", None),
        ("Add numbers.", "raises ValueError"),
        ("What is added; ValueError for 0.", "begins with a fragment"),
        ("Add numbers; ValueError for 0.\n\n    Args:\n        a: a number.\n    ", "lacks ['b']"),
        ("Add numbers; ValueError for 0.\n\n    Args:\n        a, b, c: numbers.\n    ", "['c'] too many"),
    ],
)
def test_a_mistake_is_found(docstring, wrong):
    source = f'def add(a, b):\n    """{docstring}"""\n    if not a:\n        raise ValueError("a is 0")\n    return a + b\n'
    found = mistakes(source)
    assert (wrong is None and not found) or wrong in found[0]
