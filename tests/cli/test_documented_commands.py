"""Commands that documents, examples, recipes and scripts show are accepted by the real parser."""

import ast
import contextlib
import importlib.util
import io
import os
import re
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import get_args, get_type_hints

import pytest

from megatron_hylo.cli.main import VERBS
from megatron_hylo.cli.parser import build_parser
from megatron_hylo.config.evaluation import SUITES
from megatron_hylo.config.recall import RECALL_TASKS
from megatron_hylo.config.train_settings import AlignSettings, KLSettings
from megatron_hylo.eval.recall_text import RECALL_EVAL_TASKS

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/results/*.md")])
SCRIPTS = sorted([
    *ROOT.glob("slurm/*.sh"), *ROOT.glob("examples/*/*.sh"), *ROOT.glob("megatron_hylo/recipes/*.yaml"),
    *ROOT.glob("megatron_hylo/**/*.py"),
])  # fmt: skip
LAUNCH = r"python -m megatron_hylo\.train\.launch .*?-m megatron_hylo\.cli"
SHOWN = re.compile(
    rf"\b((?:[A-Z]\w*=\S+ +)*)((?:\.venv/bin/)?hylo|{LAUNCH}|(?:bash|sbatch)(?: --\S+)* (?:slurm|examples)/\S+\.sh)(?= |$)(.*)"
)
FOREIGN = {"--option", "--standalone", "--nproc-per-node", "--signals-to-handle"}  # torchrun's
FOREIGN |= {"--signal", "--time", "--export", "--wait", "--kill-on-invalid-dep", "--nodes", "--exclude", "--output"}  # Slurm's
FOREIGN |= {"--work", "--append-eod"}  # a benchmark's, Megatron-LM's
FOREIGN |= {  # vLLM's
    "--additional-config", "--cpu-offload-gb", "--decode-context-parallel-size", "--disable-hybrid-kv-cache-manager",
    "--dtype", "--enable-lora", "--enable-prefix-caching", "--enforce-eager", "--hf-overrides", "--kv-cache-dtype",
    "--kv-offloading-size", "--kv-transfer-config", "--max-model-len", "--max-num-batched-tokens", "--max-num-seqs",
    "--offload-group-size", "--pipeline-parallel-size", "--quantization", "--runner", "--speculative-config",
    "--structured-outputs-config", "--tensor-parallel-size",
}  # fmt: skip


@pytest.fixture(scope="module")
def parser():
    return build_parser(VERBS)


def commands(text: str) -> list[tuple[str, list[str], list[str]]]:
    """Commands of the shell blocks of a page or the comments of a script: program, names of its variables, its arguments.

    Redirections (`< FILE`) are left out.
    """
    found = [SHOWN.match(re.sub(r" [<>] \S+", "", line.strip())) for line in text.replace("\\\n", " ").splitlines()]
    return [
        (m[2].split("/")[-1] if m[2].endswith("hylo") else m[2], re.findall(r"(\w+)=", m[1]), shlex.split(m[3], comments=True))
        for m in found
        if m
    ]


def blocks(page: Path) -> str:
    """Everything in the shell blocks of a page."""
    return "\n".join(re.findall(r"```(?:sh|bash)\n(.*?)```", page.read_text(), flags=re.S))


def comments(script: Path) -> str:
    """Comments of a shell script or recipe without their `#` and a label before a command; a Python file's docstring."""
    if script.suffix == ".py":
        return script.read_text().split('"""')[1] if script.read_text().startswith('"""') else ""
    lines = [line[1:].strip() for line in script.read_text().splitlines() if line.startswith("#") and line[1:2] not in "!S"]
    return "\n".join(re.sub(r"^[\w ]+: +(?=[A-Z_]+=|hylo|bash|sbatch)", "", line) for line in lines)


def refused(parser, program: str, variables: list[str], arguments: list[str]) -> str:
    """Return what is wrong with a command; nothing where it is accepted.

    RECIPE.yaml stands for a recipe and N for a number; after `...` the reader adds what is needed.
    """
    arguments = [word for word in (re.sub(r"^\[(?=[-.])|(?<=\.\.)\]$", "", word) for word in arguments) if word]
    open_end = "..." in arguments
    words = ["1" if word == "N" else word for word in arguments if word != "..."]
    if program.startswith(("bash", "sbatch")):
        script = ROOT / program.split()[-1]
        if not script.exists():
            return f"there is no {script}"
        lines = [line for path in script.parent.glob("*.sh") for line in path.read_text().splitlines()]
        known = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
        if unknown := [name for name in variables if not re.search(rf"\b{re.sub(r'_[0-9]+$', '', name)}\b", known)]:
            return f"{script.name} does not read {unknown}"
        if script.name == "submit_chain.sh":
            return "".join(f"there is no stage {word}" for word in words if not (script.parent / f"{word}.sh").exists())
        if script.parent.name != "slurm":
            code = [line for line in script.read_text().splitlines() if not line.lstrip().startswith("#")]
            return "".join(f"takes no {word} " for word in words if not re.search(rf"\b{re.escape(word)}\b", "\n".join(code)))
        if script.name == "remote_teacher.sh":  # takes the arguments of the stage that it starts
            script = script.with_name("stage2_ctx8k.sh")
        (recipe,) = re.findall(r"recipes/(\S+\.yaml)", script.read_text())
        words = ["train", "--config", recipe, *(f"--{name}=x" for name in ("model", "teacher", "data", "output")), *words]
    if "--config" in words:
        place = words.index("--config") + 1
        recipe = words[place] if words[place] != "RECIPE.yaml" else "stage3_ctx64k_llama3.2-1b.yaml"
        words[place] = str(ROOT / "megatron_hylo" / "recipes" / recipe)
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            parser.parse_args(words)
        except SystemExit as end:
            lacks = open_end and re.match(r"error: hylo [\w-]+ needs [A-Z-]", said.getvalue())
            return said.getvalue() if end.code and not lacks else ""
    return ""


def all_refused(parser, texts: dict[Path, str]) -> tuple[int, dict[str, str]]:
    """Return the number of commands in some texts, and what is wrong with each that is not accepted."""
    found = [(path, command) for path, text in texts.items() for command in commands(text)]
    answers = {
        f"{path.relative_to(ROOT)}: {command[0]} {shlex.join(command[2])}": refused(parser, *command) for path, command in found
    }
    return len(found), {command: said for command, said in answers.items() if said}


def test_commands_of_the_documents_are_accepted(parser):
    number, wrong = all_refused(parser, {page: blocks(page) for page in PAGES})
    assert number > 25 and wrong == {}


def test_commands_in_comments_of_scripts_and_recipes_are_accepted(parser):
    number, wrong = all_refused(parser, {script: comments(script) for script in SCRIPTS})
    assert number > 8 and wrong == {}


def test_verbs_and_options_in_running_text_are_real(parser):
    verbs = parser._subcommands_action._name_parser_map
    options = {name: set(sub._option_string_actions) for name, sub in verbs.items()}
    actions = [action for sub in verbs.values() for action in sub._actions if action.nargs != 0]
    take_value = {option for action in actions for option in action.option_strings}
    anywhere = set.union(*options.values()) | FOREIGN
    wrong, number = [], 0
    for path in [*PAGES, *(script for script in SCRIPTS if script.suffix != ".py")]:
        if path.parent.name == "results":  # their commands are those of their commits
            continue
        page = path.suffix == ".md"
        text = re.sub(r"```.*?```", "", path.read_text(), flags=re.S) if page else comments(path)
        for code in re.findall(r"`([^`\n]+)`", text) + ([] if page else re.findall(r"--[a-z]\S+", text)):
            verb = re.match(r"hylo ([a-z][\w-]*)", code)
            number += 1
            if verb and verb[1] not in options:
                wrong.append(f"{path.name}: {code}")
            known = options[verb[1]] if verb and verb[1] in options else anywhere
            if (switch := re.search(r"(--[a-z][\w.-]*) (true|false)\b", code)) and switch[1] not in take_value:
                wrong.append(f"{path.name}: {switch[0]}")
            if code.startswith(("hylo", "--")):
                wrong += [
                    f"{path.name}: {option}"
                    for option in re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", code)
                    if option not in known
                ]
    assert number > 200 and wrong == []


def test_links_between_files_lead_somewhere():
    """mkdocs checks the pages of the site, as they are there; these are all pages as they are in the repository."""
    pages = [*PAGES, ROOT / "CHANGELOG.md", *ROOT.glob("tests/**/*.md")]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text())]
    assert len(links) > 100
    assert [f"{page.name}: {link}" for page, link in links if not (page.parent / link).exists()] == []


def test_links_of_the_site_lead_to_pages_and_headings():
    """`make docs` refuses others, but is not part of `make test`; `docs/hooks.py` moves what lies outside docs/."""
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    spec.loader.exec_module(hooks := importlib.util.module_from_spec(spec))
    places = {path.name: path for path in [*ROOT.glob("docs/*.*"), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]}
    places |= {f"results/{path.name}": path for path in ROOT.glob("benchmarks/results/*.*")}
    texts = {}
    for name, path in places.items():
        if path.suffix == ".md":
            page = SimpleNamespace(file=SimpleNamespace(src_uri=name))
            text = re.sub(r"```.*?```", "", path.read_text(), flags=re.S)
            texts[name] = hooks.on_page_markdown(text, page, None, None)
    anchors = {
        name: {
            re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip())
            for title in re.findall("^#+ (.*)", text, re.M)
        }
        for name, text in texts.items()
    }
    wrong, number = [], 0
    for name, text in texts.items():
        for link, anchor in re.findall(r"\]\(([^)#:\s]*)(?:#([^)\s]*))?\)", text):
            number += 1
            target = os.path.normpath(os.path.join(os.path.dirname(name), link)) if link else name
            if target not in places or (anchor and anchor not in anchors[target]):
                wrong.append(f"{name}: {link}#{anchor}")
    assert number > 300 and wrong == []


def test_every_results_page_is_listed():
    listed = (ROOT / "docs" / "results.md").read_text()
    names = [page.name for page in ROOT.glob("benchmarks/results/*.md")]
    assert names and [name for name in names if f"](../benchmarks/results/{name})" not in listed] == []


def test_every_page_is_in_the_navigation():
    """`make docs` refuses a page outside it, but is not part of `make test`."""
    named = set(re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.M))
    results = {f"results/{page.name}" for page in ROOT.glob("benchmarks/results/*.md")}
    assert named == {page.name for page in ROOT.glob("docs/*.md")} | results | {"CONTRIBUTING.md", "CHANGELOG.md"}


@pytest.mark.parametrize("page", ["docs/code.md", "docs/testing.md", "docs/upcycling.md", "CONTRIBUTING.md"])
def test_files_and_folders_that_documents_name_exist(page):
    """Names of files and folders of the code, perhaps with a name inside: `train/loop.py`, `models/specs.py: X`."""
    missing, number, package = [], 0, ROOT / "megatron_hylo"
    for code in re.findall(r"`((?:[\w-]+/)+(?:[\w-]+\.(?:py|yaml|sh))?(?:: [\w.]+)?)`", (ROOT / page).read_text()):
        path, _, name = code.partition(": ")
        number += 1
        found = [place for place in (ROOT / path, package / path) if place.exists()]
        if not found or (name and name.split(".")[-1] not in found[0].read_text()):
            missing.append(code)
    assert number > 5 and missing == []


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("text.md", RECALL_TASKS),
        ("long_context.md", RECALL_EVAL_TASKS),
        ("evaluation.md", SUITES),
        ("training.md", get_args(get_type_hints(KLSettings)["kl_direction"])),
        ("training.md", get_args(get_type_hints(AlignSettings)["loss"])),
    ],
    ids=["exercises", "recall", "suites", "divergences", "losses of layers"],
)
def test_pages_name_all_tasks_suites_and_losses(page, names):
    """Each name is code, or in the row of a table; those that were added last are forgotten here first."""
    text = (ROOT / "docs" / page).read_text()
    told = "\n".join([*re.findall(r"`[^`\n]+`", text), *re.findall(r"^\| `tasks` .*", text, flags=re.M)])
    assert len(names) > 1 and [name for name in names if not re.search(rf"\b{name}\b", told)] == []


def test_what_python_blocks_import_is_there():
    """Names out of this package; a function that a document alone shows is none that nothing uses."""
    blocks = [(page, b) for page in PAGES for b in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S)]
    imports = [(page.name, node) for page, b in blocks for node in ast.walk(ast.parse(b)) if isinstance(node, ast.ImportFrom)]
    names = [(page, node.module, alias.name) for page, node in imports for alias in node.names]
    ours = [found for found in names if found[1].startswith("megatron_hylo")]
    assert len(ours) > 2 and [found for found in ours if not hasattr(importlib.import_module(found[1]), found[2])] == []


def test_make_targets_are_real(parser):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    text = "\n".join(page.read_text() for page in PAGES)
    named = re.findall(r"(?:`|^)make ([a-z-]+)(?: ARGS=\"(.*?)\")?", text, flags=re.M)
    assert len(named) > 20 and {name for name, _ in named} - targets == set()
    quickstarts = [shlex.split(given) for name, given in named if name == "quickstart" and given]
    assert (
        quickstarts and [said for words in quickstarts if (said := refused(parser, "hylo", [], ["quickstart", *words]))] == []
    )


@pytest.mark.parametrize(
    "wrong",
    [
        "A=b hylo generate model --prompt \\\n  text   # comment",
        "hylo train --config RECIPE.yaml --learning_rate 1 ...",
        "python -m megatron_hylo.train.launch --standalone --nproc-per-node 2 -m megatron_hylo.cli trains ...",
        "HYLO_ROOTS=/shared bash slurm/stage1_ild.sh --train_tokens 1",
        "HYLO_ROOT=/shared sbatch slurm/stage1_ild.sh [--train_token N ...]",
        "sbatch --nodes=2 slurm/stage9.sh",
        "bash slurm/submit_chain.sh stage1_ild stage9",
        "OUTT=x bash examples/smollm2/run.sh",
    ],
)
def test_a_wrong_command_is_found(parser, wrong):
    (command,) = commands(wrong)
    assert refused(parser, *command)


@pytest.mark.parametrize(("linear", "gpu"), [("gdn", False), ("mamba2", True)])
def test_the_example_runs_commands_that_are_accepted(parser, tmp_path, linear, gpu):
    fakes = {"hylo": 'printf "%s\\0" "$@" >>"$RECORD"; printf "\\n" >>"$RECORD"; echo a'}
    fakes["nvidia-smi"] = 'echo "GPU 0: made"' if gpu else "exit 9"
    for name, body in fakes.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "RECORD": str(tmp_path / "record"), "LINEAR": linear}
    script = ROOT / "examples" / "smollm2" / "run.sh"
    done = subprocess.run(["bash", str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, "no GPU here" in done.stderr) == (0, not gpu), done.stderr
    ran = [line.split("\0")[:-1] for line in (tmp_path / "record").read_text().split("\n")[:-1]]
    verbs = "convert preprocess calibrate upcycle train train export evaluate evaluate generate report"
    assert " ".join(c[0] for c in ran if c[0] != "fetch") == verbs
    assert {shlex.join(c): said for c in ran if (said := refused(parser, "hylo", [], c))} == {}
    tokens = sum(int(c[c.index("--train_tokens") + 1]) for c in ran if c[0] == "train")
    assert tokens == (30_000_000 if gpu else 22_528)
