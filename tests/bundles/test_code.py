# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""What the model zoo asks of code, where no linter does: licence lines, relative imports, importing without effects."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

BUNDLES = ("voco2d_pretrain", "rsna_cnn_lstm")
PACKAGES = ("transforms", "networks", "workflow", *(f"bundles/{bundle}/scripts" for bundle in BUNDLES))
HEAD = "# Copyright (c) the 2D-VoCo bundles authors.\n# SPDX-License-Identifier: Apache-2.0\n"
# what a module may call while it is imported: constants, types and decorators
CALLS = {
    "logging.getLogger", "re.compile", "frozenset", "tuple", "range", "float", "ParamSpec", "TypeVar", "ListedColormap",
    "np.linspace", "np.log", "np.diag", "np.column_stack", "np.ones", "np.zeros",
    "dataclass", "field", "optional_import", "lru_cache", "wraps", "torch.no_grad", "torch.inference_mode",
}  # fmt: skip


def sources(root: Path, package: str) -> list[Path]:
    return sorted((root / package).rglob("*.py"))


def at_import(statement: ast.stmt) -> Iterator[ast.Call]:
    """Calls of a statement when its module is imported: decorators and defaults of functions, not their bodies."""
    pending: list[ast.AST] = [statement]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.Lambda):
            pending += [*getattr(node, "decorator_list", ()), node.args]
            continue
        if isinstance(node, ast.Call):
            yield node
        pending += ast.iter_child_nodes(node)


def faults(path: Path, package: str) -> list[str]:
    """What is wrong with one file of a package."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    found = [] if text.startswith(HEAD) else ["licence lines"]
    found += [] if ast.get_docstring(tree) else ["docstring"]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        else:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        foreign = {package, "scripts", "bundles", "tests", "demo", "tools"}
        found += [f"import of {name}" for name in names if name.split(".")[0] in foreign]
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.path", "sys.modules", "os.chdir"):
            found.append(ast.unparse(node))
    statements = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    others = [node for node in tree.body[1:] if not isinstance(node, statements)]
    found += [f"statement {ast.unparse(node)}" for node in others if not is_left_out(node)]
    calls = {ast.unparse(call.func) for node in tree.body if not is_left_out(node) for call in at_import(node)}
    own = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    return found + [f"call of {name}" for name in sorted(calls - CALLS - own)]


def is_left_out(node: ast.stmt) -> bool:
    """What an import passes over: imports for types alone, and what is done when the file is run as a program."""
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "__name__ == '__main__'")


@pytest.mark.parametrize("package", PACKAGES)
def test_modules_are_licensed_relative_and_without_effects(root: Path, package: str) -> None:
    files = sources(root, package)
    assert len(files) > 1
    wrong = {str(path): found for path in files if (found := faults(path, Path(package).name))}
    assert not wrong


def test_faults_finds_what_it_should(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text("import scripts.a\nfrom workflow.b import c\nimport sys\nsys.path.append('x')\nA = open('b')\n")
    assert faults(path, "workflow") == [
        "licence lines", "docstring", "import of scripts.a", "import of workflow.b", "sys.path",
        "statement sys.path.append('x')", "call of open", "call of sys.path.append",
    ]  # fmt: skip
    path.write_text(
        f'{HEAD}"""Text."""\nfrom .b import c\nclass D: ...\nB = D() if c else None\n'
        "def f():\n    return open('b')\n\nif __name__ == '__main__':\n    f()\n"
    )
    assert faults(path, "workflow") == []
    path.write_text(f'{HEAD}"""Text."""\n@register("x")\ndef f(a=read()):\n    return None\n')
    assert faults(path, "workflow") == ["call of read", "call of register"]
