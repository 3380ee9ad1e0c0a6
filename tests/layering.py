"""Who imports whom: layers, floors inside each layer, circles, and the libraries that one file alone may import.

    python -m tests.layering

prints the folders and floors, and what breaks a rule. docs/design.md explains the rules.
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# From the bottom up. A file may import what stands on the same floor or below; files at a package's top stand on the floor
# that bears their name.
FLOORS = {
    "hpc": [["__init__", "config", "dist", "errors", "watchdog"], ["run"], ["data"], ["train"]],
    "lesiongen": [
        ["data"],
        ["ingest"],
        ["tokenizers"],
        ["priors"],
        ["evaluation"],
        ["presets"],
        ["experiment"],
        ["stages"],
        ["generator"],
        ["__init__"],
    ],
    "launch": [
        ["__init__"],
        ["slurm", "endings", "requeue", "cost", "cluster", "snapshot", "verify", "ui"],
        ["cost_table", "before_queue", "remaining"],
        ["rank", "check"],
        ["job", "local"],
        ["executors"],
        ["pipeline"],
        ["status", "demo", "clean", "selection", "sampling", "sweep", "withdraw"],
        ["commands"],
        ["__main__"],
    ],
}
# Files of the folder import none of one another but these.
PEERS = {"lesiongen.stages": ("lesiongen.stages.base", "lesiongen.stages.prior_picture")}
IMPORTED_ONCE = {
    "deepspeed": "hpc/train/zero.py",
    "h5py": "lesiongen/data/hdf5.py",
    "mlflow": "hpc/run/mlflow_sync.py",
    "submitit": "launch/executors.py",
    "webdataset": "hpc/data/shards.py",
}


def sources(root: Path) -> dict[str, Path]:
    """Every module of the three packages: dotted name → file."""
    found = {}
    for package in FLOORS:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path, modules: dict[str, Path]) -> set[str]:
    """Dotted names that a file imports, inside functions too; those of modules where the name is a module's."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides which layer it reaches"
            whole = (f"{node.module}.{alias.name}" for alias in node.names)
            found |= {name if name in modules else node.module for name in whole}
    return found


def floor_of(module: str) -> int:
    """Index of a module's floor in its package. Raises ValueError for a folder or file that no floor names."""
    package, *rest = module.split(".")
    name = rest[0] if rest else "__init__"
    for index, names in enumerate(FLOORS[package]):
        if name in names:
            return index
    raise ValueError(f"{module} stands on no floor; add it to FLOORS in tests/layering.py")


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import one another in a circle (strongly connected components, Tarjan 1972)."""
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = lowest[module] = len(index)
        stack.append(module)
        for other in sorted(graph[module]):
            if other not in index:
                visit(other)
                lowest[module] = min(lowest[module], lowest[other])
            elif other in stack:
                lowest[module] = min(lowest[module], index[other])
        if lowest[module] == index[module]:
            group = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(group) > 1 or module in graph[module]:
                found.append(sorted(group))

    for module in sorted(graph):
        if module not in index:
            visit(module)
    return found


def problems(root: Path = ROOT) -> list[str]:
    """A line for each import that breaks a rule."""
    modules = sources(root)
    imports = {module: imported(path, modules) for module, path in modules.items()}
    layers = list(FLOORS)  # from the bottom up
    found = []
    for module, names in imports.items():
        for other in sorted(names & modules.keys()):
            mine, theirs = (layers.index(name.split(".")[0]) for name in (module, other))
            if theirs > mine:
                found.append(f"{module} imports {other}, a layer above")
            elif theirs == mine and floor_of(other) > floor_of(module):
                found.append(f"{module} imports {other}, a floor above")
            folder = module.rpartition(".")[0]
            if folder in PEERS and other.startswith(folder + ".") and other not in PEERS[folder]:
                found.append(f"{module} imports {other}; both import {' or '.join(PEERS[folder])} instead")
    for group in circles({module: names & modules.keys() for module, names in imports.items()}):
        found.append(f"circle: {', '.join(group)}")
    for library, home in IMPORTED_ONCE.items():
        files = {
            str(modules[m].relative_to(root)) for m, names in imports.items() if library in {n.split(".")[0] for n in names}
        }
        if files != {home}:
            found.append(f"{library} is imported in {', '.join(sorted(files)) or 'no file'}, not in {home} alone")
    return found


def report(root: Path = ROOT) -> str:
    """The floors with their files, from the top down, and what breaks a rule."""
    modules, lines = sources(root), []
    for package in reversed(FLOORS):
        lines.append(f"{package}/")
        for floor in reversed(range(len(FLOORS[package]))):
            here = [m.split(".")[1:] for m in modules if m.split(".")[0] == package and floor_of(m) == floor]
            folders = sorted({parts[0] for parts in here if len(parts) == 2})
            lines += [f"    {f}/".ljust(18) + ", ".join(parts[1] for parts in here if len(parts) == 2) for f in folders]
            if files := [parts[0] for parts in here if len(parts) == 1 and parts[0] not in folders]:
                lines.append(" " * 18 + ", ".join(files))
    return "\n".join([*lines, "", *(problems(root) or ["no circles, no import of a layer or floor above"])])


if __name__ == "__main__":
    print(report())
    sys.exit(bool(problems()))
