"""Every change to third-party code or to the process's environment has a row in platform/third_party.py."""

import ast
import os
import subprocess
import sys
from pathlib import Path

from megatron_hylo.platform.third_party import CHANGES

PACKAGE = Path(__file__).parents[2] / "megatron_hylo"
# functions that change something for the whole process
SETTERS = (
    "set_allocator", "use_deterministic_algorithms", "set_default_dtype", "set_default_device", "set_num_threads",
    "set_float32_matmul_precision", "disable_progress_bar", "basicConfig", "filterwarnings", "setLevel", "register",
    "patch",
)  # fmt: skip


class Finder(ast.NodeVisitor):
    """Collects the changes that one file makes, by what is assigned to or called."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}  # local name -> dotted name outside the package
        self.found: set[str] = set()

    def dotted(self, node: ast.AST) -> str | None:
        """Dotted name of an expression that begins in an imported module of others; None for everything else."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id)
        if isinstance(node, ast.Attribute):
            base = self.dotted(node.value)
            return f"{base}.{node.attr}" if base else None
        if isinstance(node, ast.Call):
            base = self.dotted(node.func)
            return f"{base}()" if base in ("importlib.import_module", "logging.getLogger") else base
        return None

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            name = alias.asname or alias.name.split(".")[0]
            self.names[name] = alias.name if alias.asname else name

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.module and not node.module.startswith("megatron_hylo"):
            self.names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}

    def assigned(self, target: ast.AST) -> None:
        """Note an assignment to an attribute of a module or class of others, or to an entry of os.environ or sys.modules."""
        if isinstance(target, ast.Tuple | ast.List):
            for part in target.elts:
                self.assigned(part)
        elif isinstance(target, ast.Subscript) and (name := self.dotted(target.value)) in ("os.environ", "sys.modules"):
            self.found.add(f"{name}[{_constant(target.slice)}]")
        elif isinstance(target, ast.Attribute) and (name := self.dotted(target)):
            self.found.add(name)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            self.assigned(target)
            alias = self.dotted(node.value)
            if isinstance(target, ast.Name) and alias and not (isinstance(node.value, ast.Call) and not alias.endswith("()")):
                self.names[target.id] = alias

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit_Assign(ast.Assign(targets=[node.target], value=node.value))

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.generic_visit(node)
        self.assigned(node.target)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.found |= {name for base in node.bases if (name := self.dotted(base)) and name.endswith("FunctionMode")}
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id == "setattr" and (owner := self.dotted(node.args[0])):
            self.found.add(f"{owner}.{_constant(node.args[1])}")
        if not isinstance(node.func, ast.Attribute):
            return
        owner = self.dotted(node.func.value)
        if owner in ("os.environ", "sys.modules") and node.func.attr in ("setdefault", "update", "pop"):
            self.found.add(f"{owner}[{_constant(node.args[0])}]")
        elif owner and node.func.attr in SETTERS and not _is_own_logger(node):
            self.found.add(f"{owner}.{node.func.attr}")


def _constant(node: ast.AST) -> str:
    return node.value if isinstance(node, ast.Constant) else ""


def _is_own_logger(node: ast.Call) -> bool:
    """Whether a call is logging.getLogger("megatron_hylo...").setLevel(...)."""
    inner = node.func.value
    return isinstance(inner, ast.Call) and bool(inner.args) and str(_constant(inner.args[0])).startswith("megatron_hylo")


def changes_in(source: str) -> set[str]:
    """Changes that a file makes, as the table's `targets` name them."""
    finder = Finder()
    finder.visit(ast.parse(source))
    return finder.found


def found_in_package() -> dict[str, set[str]]:
    found = {str(file.relative_to(PACKAGE)): changes_in(file.read_text()) for file in sorted(PACKAGE.rglob("*.py"))}
    return {file: changes for file, changes in found.items() if changes}


def test_every_change_is_in_the_table():
    """The table lists exactly the changes that the files make."""
    listed: dict[str, set[str]] = {}
    for change in CHANGES:
        assert change.reason and change.changes and all((PACKAGE / file).is_file() for file in change.files), change.name
        for file in change.files:
            listed.setdefault(file, set()).update(change.targets)
    assert found_in_package() == {file: targets for file, targets in listed.items() if targets}


def test_planted_changes_are_found():
    """The search above can fail."""
    for source, change in {
        "import torch\ntorch.Tensor.sum = None": "torch.Tensor.sum",
        "import torch\ndef f():\n    cuda: object = torch.cuda\n    cuda.current_device = None": "torch.cuda.current_device",
        "from fla.ops import kda\nsetattr(kda, 'chunk_kda', None)": "fla.ops.kda.chunk_kda",
        "import sys\nsys.modules['flash_attn'] = None": "sys.modules[flash_attn]",
        "from os import environ\nenviron['A'] = '1'": "os.environ[A]",
        "import os\nos.environ.setdefault('B', '1')": "os.environ[B]",
        "import importlib\nimportlib.import_module('triton').set_allocator(None)": "importlib.import_module().set_allocator",
        "import torch\nsettings = torch._dynamo.config\nsettings.verbose = True": "torch._dynamo.config.verbose",
        "import torch\ntorch.backends.cudnn.benchmark, x = True, 1": "torch.backends.cudnn.benchmark",
    }.items():
        assert changes_in(source) == {change}, source
    assert not changes_in("import logging\nx = logging.getLogger('megatron_hylo.a')\ndef f(self):\n    self.b = 1")


def test_the_table_tells_what_is_in_force():
    """In a process without a GPU the CPU patches are in force after `initialize`, and before it the package's own alone."""
    program = """
from megatron_hylo.platform.third_party import CHANGES
def now():
    return {change.name for change in CHANGES if change.in_force()}
before = now()
from megatron_hylo.platform.distributed import session
from megatron_hylo.platform.safe_loading import install_safe_loading
install_safe_loading()
with session():
    print(sorted(before), sorted(now() - before), sep="\\n")
"""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("GLOO_SOCKET_IFNAME", "RANK", "HF_HUB_DISABLE_PROGRESS_BARS", "THP_MEM_ALLOC_ENABLE")
    }
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, after = (ast.literal_eval(line) for line in done.stdout.strip().splitlines()[-2:])
    cpu = [change.name for change in CHANGES if change.name.startswith("cpu: ")]
    assert before == ["callable packages"] and after == sorted([*cpu, "gloo interface", "safe loading"])
