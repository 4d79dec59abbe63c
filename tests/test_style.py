"""What the code looks like: widths and lengths, one direction of imports, public names of libraries only."""
import ast
import re
import subprocess

from conftest import ROOT

SCRIPTS = ["train_diffusion", "extract_features", "self_label", "train_guided", "sample_ode", "probe"]       # the chain
METHOD = [f"{name}.py" for name in SCRIPTS] + [f"configs/{name}.py" for name in ("run", "data", "shapes")]
FILES = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True).stdout.split()
FILES = [name for name in FILES if (ROOT / name).exists()] or METHOD
PRIVATE = re.compile(r"\b(?:torch|torchvision|np|numpy|dist)(?:\.\w+)*\._(?!_)\w+|\._is_\w+")


def tree(name):
    return ast.parse((ROOT / name).read_text())


def functions():
    """(file, name, number of lines) of every function."""
    return [(name, node.name, node.end_lineno - node.lineno + 1) for name in FILES for node in ast.walk(tree(name))
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def test_lines_are_at_most_120_wide():
    lines = [(name, number, len(line)) for name in FILES
             for number, line in enumerate((ROOT / name).read_text().splitlines(), 1)]
    assert [line for line in lines if line[2] > 120] == []


def test_functions_are_at_most_80_lines():
    assert [f for f in functions() if f[2] > 80] == []


def test_main_is_below_60_lines():
    assert [f for f in functions() if f[1] == "main" and f[2] >= 60] == []


def test_no_private_names_of_libraries():
    """Comments do not count; the one setting of compiled DDP has no public name."""
    found = [(name, hit) for name in METHOD for hit in PRIVATE.findall(ast.unparse(tree(name)))]
    assert found == [("train_diffusion.py", "torch._dynamo")]


def imported(name):
    """First words of the modules that a file imports, anywhere in it."""
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0] if node.module else ""


def test_imports_go_one_way():
    """configs/ knows no script; a script knows those before it in the chain."""
    for name in METHOD:
        known = SCRIPTS[:SCRIPTS.index(name[:-3])] if name[:-3] in SCRIPTS else []
        assert set(imported(name)) & set(SCRIPTS) <= set(known), name
        assert not {"tests", "conftest", "results"} & set(imported(name)), name


def test_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 250 and max(map(len, lines)) <= 140


def test_the_method_does_not_grow():
    """Say it more simply, or take something out."""
    assert sum(len((ROOT / name).read_text().splitlines()) for name in METHOD) <= 7300
