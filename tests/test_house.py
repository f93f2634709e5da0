"""The rules of the house, checked on the source itself, and the checks checked on planted faults.

Sizes are limits on what one reader has to hold in mind. The import rules keep the parts apart:
one module knows LMDB, one package knows vLLM, and the store runs without torch.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("prefixstore", "connector", "blend", "interop", "benchmarks")
MAX_FILE_LINES = 320
MAX_FUNCTION_LINES = 75
VLLM_USERS = (
    "connector/",
    "benchmarks/engine_child.py",
    "benchmarks/engine_nursery.py",
    "benchmarks/corruption_vllm.py",
    "benchmarks/rows.py",
    "tests/",
)
# Each can run code that somebody else put into the bytes.
UNSAFE_MODULES = {
    "_pickle", "cloudpickle", "code", "dill", "joblib", "jsonpickle", "marshal", "pickle", "shelve",
}  # fmt: skip
UNSAFE_CALLS = {"compile", "eval", "exec", "os.popen", "os.system"}
# Of whatever has them: they unpickle, or make any object that the text names.
UNSAFE_METHODS = {
    "full_load", "full_load_all", "read_pickle", "recv_pyobj", "send_pyobj", "unsafe_load",
    "unsafe_load_all",
}  # fmt: skip
SHIPPED = ["prefixstore", "connector", "blend", "interop"]
LOOP_COMMENTS = ("# thread loop:", "# request loop:")

Check = Callable[[str, str], Iterator[str]]


def python_files(*folders: str) -> list[str]:
    return sorted(
        path.relative_to(ROOT).as_posix()
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
    )


def imports_of(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, top-level package) of every import in ``tree``, also through import_module()."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func
            called = called.id if isinstance(called, ast.Name) else called
            if called in ("import_module", "__import__"):
                names = [str(node.args[0].value)]
        yield from ((node.lineno, name.partition(".")[0]) for name in names)  # type: ignore[attr-defined]


def run_at_import(statements: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The simple statements that run when the module is imported."""
    for node in statements:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from run_at_import(node.orelse)
            continue
        blocks = [getattr(node, name, []) for name in ("body", "orelse", "finalbody")]
        blocks += [handler.body for handler in getattr(node, "handlers", [])]
        if any(blocks):
            for block in blocks:
                yield from run_at_import(block)
        else:
            yield node


def check_sizes(name: str, source: str) -> Iterator[str]:
    lines = source.count("\n")
    if lines > MAX_FILE_LINES:
        yield f"{name}: {lines} lines; at most {MAX_FILE_LINES}"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                yield f"{name}:{node.lineno}: {node.name} has {length} lines"


_OF_LMDB = tuple(f"prefixstore/index{part}.py" for part in ("", "_errors", "_files"))


def check_lmdb(name: str, source: str) -> Iterator[str]:
    for line, module in imports_of(ast.parse(source)):
        if module == "lmdb" and name not in _OF_LMDB:
            yield f"{name}:{line}: only {', '.join(_OF_LMDB)} import lmdb"


def check_vllm(name: str, source: str) -> Iterator[str]:
    for line, module in imports_of(ast.parse(source)):
        if module == "vllm" and not name.startswith(VLLM_USERS):
            yield f"{name}:{line}: only connector/ imports vllm"


def check_torch(name: str, source: str) -> Iterator[str]:
    for statement in run_at_import(ast.parse(source).body):
        for line, module in imports_of(statement):
            if module == "torch" and name.startswith("prefixstore/"):
                yield f"{name}:{line}: prefixstore/ imports torch inside functions only"


def check_unsafe(name: str, source: str) -> Iterator[str]:
    tree = ast.parse(source)
    for line, module in imports_of(tree):
        if module in UNSAFE_MODULES:
            yield f"{name}:{line}: imports {module}"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called, given = ast.unparse(node.func), {word.arg: word.value for word in node.keywords}
        method = called.rpartition(".")[2]
        if called.removeprefix("builtins.") in UNSAFE_CALLS or method in UNSAFE_METHODS:
            yield f"{name}:{node.lineno}: calls {called}"
        if called in ("torch.load", "yaml.load", "yaml.load_all"):
            yield f"{name}:{node.lineno}: calls {called}"
        if "allow_pickle" in given:
            yield f"{name}:{node.lineno}: passes allow_pickle"
        if "shell" in given and ast.unparse(given["shell"]) != "False":
            yield f"{name}:{node.lineno}: passes shell"


def check_unsafe_shipped(name: str, source: str) -> Iterator[str]:
    """What the tests may use among their own processes: pipes and queues that pickle; names of
    unsafe functions taken from their modules."""
    tree = ast.parse(source)
    for line, module in imports_of(tree):
        if module in ("multiprocessing", "yaml"):
            yield f"{name}:{line}: imports {module}"
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in ("torch", "builtins", "os"):
            taken = {alias.name for alias in node.names} & {
                "load",
                "eval",
                "exec",
                "system",
                "popen",
            }
            if taken:
                yield f"{name}:{node.lineno}: takes {sorted(taken)} from {node.module}"


def check_broad_except(name: str, source: str) -> Iterator[str]:
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ExceptHandler):
            continue
        kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        broad = any(
            kind is None or ast.unparse(kind).rpartition(".")[2] in ("Exception", "BaseException")
            for kind in kinds
        )
        if broad and not any(comment in lines[node.lineno - 1] for comment in LOOP_COMMENTS):
            yield f"{name}:{node.lineno}: broad except without {' or '.join(LOOP_COMMENTS)}"


SIZED = [*PACKAGES]
EVERYWHERE = [*PACKAGES, "tests"]
RULES: list[tuple[Check, list[str]]] = [
    (check_sizes, SIZED),
    (check_lmdb, SIZED),
    (check_vllm, EVERYWHERE),
    (check_torch, ["prefixstore"]),
    (check_unsafe, EVERYWHERE),
    (check_unsafe_shipped, SHIPPED),
    (check_broad_except, EVERYWHERE),
]


@pytest.mark.parametrize(("check", "folders"), RULES, ids=[rule[0].__name__ for rule in RULES])
def test_house_rule_holds(check: Check, folders: list[str]) -> None:
    names = python_files(*folders)
    assert names, "the checks found no source to check"
    faults = [fault for name in names for fault in check(name, (ROOT / name).read_text())]
    assert not faults, "\n" + "\n".join(faults)


FAULTS: list[tuple[Check, str, str]] = [
    (check_sizes, "prefixstore/a.py", "x = 1\n" * (MAX_FILE_LINES + 1)),
    (check_sizes, "prefixstore/a.py", "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES),
    (check_lmdb, "prefixstore/store.py", "def f():\n    from lmdb import open\n"),
    (check_vllm, "prefixstore/store.py", "import vllm.config\n"),
    (check_vllm, "benchmarks/a.py", "import importlib\nimportlib.import_module('vllm.envs')\n"),
    (check_torch, "prefixstore/a.py", "try:\n    import torch\nexcept ImportError:\n    pass\n"),
    (check_torch, "prefixstore/a.py", "class A:\n    from torch import Tensor\n"),
    (check_unsafe, "tests/a.py", "from pickle import loads\n"),
    (check_unsafe, "connector/a.py", "x = eval('1')\n"),
    (check_unsafe, "connector/a.py", "import numpy as np\nnp.load('a', allow_pickle=True)\n"),
    (
        check_unsafe,
        "prefixstore/a.py",
        "def f():\n    import importlib\n    importlib.import_module('pickle')\n",
    ),
    (check_unsafe, "prefixstore/a.py", "import builtins\nbuiltins.exec('1')\n"),
    (check_unsafe, "blend/a.py", "import torch\ntorch.load('a', weights_only=False)\n"),
    (check_unsafe, "interop/a.py", "x = socket.recv_pyobj()\n"),
    (check_unsafe, "interop/a.py", "import yaml\nyaml.load(text, Loader=yaml.Loader)\n"),
    (check_unsafe, "prefixstore/a.py", "import subprocess\nsubprocess.run(x, shell=True)\n"),
    (check_unsafe, "prefixstore/a.py", "import subprocess\nsubprocess.run(x, shell=y)\n"),
    (check_unsafe_shipped, "prefixstore/a.py", "from multiprocessing import Queue\n"),
    (check_unsafe_shipped, "blend/a.py", "from torch import load\n"),
    (check_broad_except, "connector/a.py", "try:\n    f()\nexcept Exception:\n    pass\n"),
    (
        check_broad_except,
        "connector/a.py",
        "try:\n    f()\nexcept (OSError, Exception):\n    g()\n",
    ),
    (check_broad_except, "connector/a.py", "try:\n    f()\nexcept:\n    pass\n"),
]


@pytest.mark.parametrize(("check", "name", "source"), FAULTS)
def test_planted_fault_is_found(check: Check, name: str, source: str) -> None:
    assert len(list(check(name, source))) == 1


ALLOWED: list[tuple[Check, str, str]] = [
    (check_sizes, "prefixstore/a.py", "def f():\n" + "    x = 1\n" * (MAX_FUNCTION_LINES - 1)),
    (check_lmdb, "prefixstore/index.py", "import lmdb\n"),
    (check_vllm, "connector/compat.py", "import vllm\n"),
    (check_torch, "prefixstore/a.py", "def f():\n    import torch\n"),
    (check_torch, "prefixstore/a.py", "if TYPE_CHECKING:\n    import torch\n"),
    (check_unsafe, "connector/a.py", "model.eval()\n"),
    (check_unsafe, "connector/a.py", "import re\nre.compile('a')\nkernel.compile(1)\n"),
    (
        check_unsafe,
        "tests/a.py",
        "import subprocess, yaml\nrun(x, shell=False)\nyaml.safe_load(x)\n",
    ),
    (check_unsafe_shipped, "blend/a.py", "from torch import Tensor\n"),
    (
        check_broad_except,
        "connector/a.py",
        "try:\n    f()\nexcept Exception:  # thread loop: why\n    pass\n",
    ),
]


@pytest.mark.parametrize(("check", "name", "source"), ALLOWED)
def test_what_is_allowed_is_no_fault(check: Check, name: str, source: str) -> None:
    assert list(check(name, source)) == []


def test_help_imports_no_heavy_package() -> None:
    """``prefixstore --help`` answers before numpy or torch could have been imported."""
    if not (ROOT / "prefixstore" / "cli.py").exists():
        pytest.skip("there is no prefixstore/cli.py yet")
    code = (
        "import sys\n"
        "sys.argv = ['prefixstore', '--help']\n"
        "from prefixstore.cli import main\n"
        "try:\n    status = main()\n"
        "except SystemExit as end:\n    status = end.code\n"
        "heavy = sorted({'numpy', 'torch', 'vllm'} & set(sys.modules))\n"
        "print('status', status or 0, 'heavy', heavy)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert "usage: prefixstore" in done.stdout.lower()
    assert done.stdout.splitlines()[-1] == "status 0 heavy []"
