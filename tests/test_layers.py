"""A folder imports only lower ones, and imports of files form no circle; in-function imports count too."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAYERS = [
    ["autoencoder"],
    ["pipelines"],
    ["vidgen.common"],
    ["vidgen.data"],
    ["vidgen.losses"],
    ["vidgen.metrics"],
    ["vidgen.training", "vidgen.inference"],
    ["vidgen.app", "vidgen.demo"],
    ["vidgen.cli"],
    ["benchmarks"],
]
LAYER = {folder: number for number, folders in enumerate(LAYERS) for folder in folders}
FACES = ("vidgen", "vidgen.__main__")  # name what is below them for users; nothing imports them


def imports() -> dict[str, set[str]]:
    """Every module of the packages, with the modules of the packages that it imports anywhere in its code."""
    files = {path: path.relative_to(ROOT).with_suffix("") for top in FOLDERS for path in (ROOT / top).rglob("*.py")}
    modules = {".".join(name.parts).removesuffix(".__init__"): path for path, name in files.items()}
    found: dict[str, set[str]] = {module: set() for module in modules}
    for module, path in modules.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found[module] |= {alias.name for alias in node.names} & set(modules)
            elif isinstance(node, ast.ImportFrom):
                base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                source = ".".join([*base, *([node.module] if node.module else [])])
                for name in (f"{source}.{alias.name}" for alias in node.names):
                    found[module] |= {name if name in modules else source} & set(modules)
        found[module] -= {module}
    return found


FOLDERS = sorted({folder.split(".")[0] for folder in LAYER})


def folder(module: str) -> str:
    return next(name for name in LAYER if f"{module}.".startswith(f"{name}."))


def test_folders_import_only_lower_ones():
    upward = [
        f"{module} imports {other}"
        for module, others in imports().items()
        if module not in FACES
        for other in others
        if other in FACES or (folder(module) != folder(other) and LAYER[folder(module)] <= LAYER[folder(other)])
    ]
    assert not upward, "\n".join(upward)


def test_files_import_in_no_circle():
    TopologicalSorter(imports()).prepare()  # raises a CycleError that names the circle
