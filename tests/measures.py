"""How large the project is, beside its goal: `python tests/measures.py` prints it.

test_project.py holds each number to `most`: its goal, or, where that is not reached, what it has come to. Lower it with the code.
"""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
CORE = sorted((ROOT / "mkd_core").rglob("*.py"))


def lines(paths) -> int:
    return sum(len(path.read_text().splitlines()) for path in paths)


def largest(kind: str) -> tuple[int, str]:
    """The longest function in lines, or the class with the most public methods and properties, and where it is."""
    found = []
    for path in CORE:
        for node in ast.walk(ast.parse(path.read_text())):
            place = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if kind == "function" and isinstance(node, ast.FunctionDef):
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                found.append((node.end_lineno - first + 1, f"{place} {node.name}"))
            if kind == "class" and isinstance(node, ast.ClassDef):
                names = [n.name for n in node.body if isinstance(n, ast.FunctionDef)]
                found.append((sum(name[0] != "_" for name in names), f"{place} {node.name}"))
    return max(found)


def measures() -> dict[str, tuple[int, int, int, str]]:
    """What is measured -> (value, most, goal, where)."""
    longest = max((lines([path]), str(path.relative_to(ROOT))) for path in CORE)
    function, methods = largest("function"), largest("class")
    small = [path for path in CORE if "explorer" not in path.parts]
    return {
        "lines of mkd_core": (lines(CORE), 10384, 5000, ""),
        "lines without the explorer": (lines(small), 9658, 4400, ""),
        "lines of a file": (longest[0], 300, 300, longest[1]),
        "lines of a function": (function[0], 60, 60, function[1]),
        "public methods of a class": (methods[0], 6, 6, methods[1]),
        "lines of methods/mkd.py": (lines([ROOT / "mkd_core/methods/mkd.py"]), 80, 80, ""),
        "lines of parameters": (lines((ROOT / "parameters").rglob("*.yaml")), 1400, 1400, ""),
        "lines of tests": (lines((ROOT / "tests").glob("*.py")), 11782, 7500, ""),
        "lines of the README": (lines([ROOT / "README.md"]), 150, 150, ""),
    }


if __name__ == "__main__":
    for name, (value, most, goal, where) in measures().items():
        print(f"{name:28} {value:6,}, at most {most:6,}, goal {goal:6,}  {where}")
