"""How large files and functions are, and whether public functions say what they take and do.

    python -m tests.sizes

prints the largest files and functions, the median function, and each public function without annotations or docstring.
Lines are lines of code: no blank lines, no comments, no docstrings.
"""

import ast
import io
import sys
import tokenize
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tests.layering import FLOORS, ROOT

FILE, FUNCTION, MEDIAN = 300, 60, 10  # lines of code at most
SKIPPED = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


@dataclass(frozen=True)
class Function:
    """A function or method. missing: what a public one lacks, such as "a docstring"."""

    where: str
    lines: int
    missing: tuple[str, ...]


def code_lines(text: str) -> set[int]:
    """Numbers of the lines that hold code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in SKIPPED:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False) is not None:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def functions(path: Path) -> list[Function]:
    """Every function of a file, those inside functions included; a function's lines include those of inner ones."""
    text = path.read_text()
    lines, found = code_lines(text), []

    def visit(node: ast.AST, name: str, public: bool, in_class: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                visit(child, f"{name}{child.name}.", public and not child.name.startswith("_"), True)
            elif isinstance(child, ast.FunctionDef):
                span = range(child.lineno, child.end_lineno + 1)
                # Special methods, such as __len__, do what Python says; __init__ is described by its class or by itself.
                open_ = public and not child.name.startswith("_")
                missing = tuple(_missing(child, in_class)) if open_ else ()
                found.append(Function(f"{path}:{child.lineno} {name}{child.name}", len(lines & set(span)), missing))
                visit(child, f"{name}{child.name}.", False, False)
            else:
                visit(child, name, public, in_class)

    visit(ast.parse(text), "", True, False)
    return found


def _missing(node: ast.FunctionDef, in_class: bool) -> list[str]:
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    if in_class and not any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list):
        arguments = arguments[1:]
    missing = [f"an annotation of {a.arg}" for a in arguments if a.annotation is None]
    missing += ["an annotation of what it returns"] * (node.returns is None)
    # A method that implements a documented one of its base class need not repeat its docstring: see `inherited`.
    return missing + ["a docstring"] * (ast.get_docstring(node) is None)


def inherited(root: Path) -> set[str]:
    """Names of documented methods of any class: an override need not repeat the docstring."""
    names = set()
    for package in FLOORS:
        for path in (root / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef):
                    methods = [m for m in node.body if isinstance(m, ast.FunctionDef)]
                    names |= {m.name for m in methods if ast.get_docstring(m) is not None}
    return names | {"forward"}  # what torch calls; the class says what it computes


def measure(root: Path = ROOT) -> tuple[dict[Path, int], list[Function], list[str]]:
    """Lines of each file; every function; a line for each limit that is passed or thing that is missing."""
    paths = [p.relative_to(root) for package in FLOORS for p in sorted((root / package).rglob("*.py"))]
    files = {p: len(code_lines((root / p).read_text())) for p in paths}
    found = [f for p in paths for f in functions(root / p)]
    documented = inherited(root)
    problems = [f"{p} has {n} lines of code, more than {FILE}" for p, n in files.items() if n > FILE]
    for function in found:
        if function.lines > FUNCTION:
            problems.append(f"{function.where} has {function.lines} lines of code, more than {FUNCTION}")
        method = "." in function.where.rpartition(" ")[2] and function.where.rpartition(".")[2] in documented
        for what in function.missing:
            if not (what == "a docstring" and method):
                problems.append(f"{function.where} lacks {what}")
    if (middle := median(f.lines for f in found)) > MEDIAN:
        problems.append(f"the median function has {middle} lines of code, more than {MEDIAN}")
    return files, found, problems


if __name__ == "__main__":
    files, found, problems = measure()
    print(f"{sum(files.values()):,} lines of code in {len(files)} files, {len(found)} functions")
    for path, lines in sorted(files.items(), key=lambda item: -item[1])[:5]:
        print(f"{lines:>5}  {path}")
    print(f"median function {median(f.lines for f in found)} lines; the largest:")
    for function in sorted(found, key=lambda f: -f.lines)[:8]:
        print(f"{function.lines:>5}  {function.where.replace(str(ROOT) + '/', '')}")
    print(
        "\n".join(p.replace(str(ROOT) + "/", "") for p in problems)
        or "nothing too large, every public function annotated and documented"
    )
    sys.exit(bool(problems))
