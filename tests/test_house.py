"""The house: which room may import which, late imports and those under TYPE_CHECKING included; no part is too long."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import mdu_trainer

PACKAGE = Path(mdu_trainer.__file__).parent
ROOT = Path(__file__).resolve().parents[1]
MOST_LINES_OF_A_FILE, MOST_LINES_OF_A_FUNCTION = 400, 60
MOST_FILES_BESIDE_FOLDERS = 9
# From the ground up: a room imports from rooms of lower floors, and from its own
FLOORS = (
    "files terminal masking divergence objectives config".split(),
    ["models"],
    ["data"],
    ["inference"],
    ["trainer"],
    ["provenance", "evaluation"],
    ["token_roles"],
    ["attacks"],
    ["report"],
    ["hub"],
    ["callbacks"],
    ["commands"],
)
FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor} | {"testing": 2}
# The Trainer's own hooks, save and push, which call provenance and hub inside a method
HOOKS = {("trainer.mdu", "provenance"), ("trainer.mdu", "hub")}


def imports() -> dict[str, set[str]]:
    """Module -> modules of the package that it imports anywhere, without the package's own name."""
    names = {path: ".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py")}
    modules = {name.removesuffix(".__init__"): path for path, name in names.items()}
    found = {}
    for path, name in names.items():
        parts = ["mdu_trainer", *name.split(".")][:-1]
        wanted = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not (
                node.level or (node.module or "").startswith("mdu_trainer")
            ):
                continue
            base = [*parts[: len(parts) - node.level + 1]] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])]).removeprefix("mdu_trainer").lstrip(".")
            for alias in node.names:
                inner = f"{source}.{alias.name}".lstrip(".")
                wanted.add(inner if inner in modules else source)
        found[name.removesuffix(".__init__")] = wanted - {"", "__init__"}
    return found


IMPORTS = imports()


def room(module: str) -> str:
    """The room of a module. What `python -m` starts is a command, wherever it lies."""
    return "commands" if module.endswith("__main__") else module.partition(".")[0]


def packages(module: str) -> set[str]:
    """Top-level names of the other packages that a module imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path_of(module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def path_of(module: str) -> Path:
    path = PACKAGE.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def test_every_room_has_a_floor():
    assert {room(module) for module in IMPORTS} - {"__init__"} <= set(FLOOR)


def test_nothing_imports_upwards():
    upwards = [
        f"{module} imports {other}"
        for module, others in IMPORTS.items()
        for other in others
        if module != "__init__" and FLOOR[room(other)] > FLOOR[room(module)] and (module, room(other)) not in HOOKS
    ]
    assert not upwards


def test_no_circle():
    below = {m: {o for o in others if (m, room(o)) not in HOOKS} for m, others in IMPORTS.items() if m != "__init__"}
    circle = None
    try:
        TopologicalSorter(below).prepare()
    except CycleError as error:
        circle = " -> ".join(error.args[1])
    assert circle is None


def test_reports_and_records_import_no_torch():
    records = [module for module in IMPORTS if room(module) == "report" or module.endswith(".results")]
    assert {"report.model_card", "evaluation.results", "attacks.results", "token_roles.results"} <= set(records)
    assert not [module for module in (*records, "evaluation.registry") if "torch" in packages(module)]


def test_inference_knows_no_trainer():
    seen, waiting = set(), [module for module in IMPORTS if room(module) == "inference"]
    while waiting:
        module = waiting.pop()
        seen.add(module)
        waiting += IMPORTS[module] - seen
    assert "inference.generation" in seen and not [module for module in seen if room(module) == "trainer"]


def sources() -> dict[str, str]:
    """Name of a file of the package, the examples or the tests -> its content."""
    return {
        str(path.relative_to(folder.parent)): path.read_text(encoding="utf-8")
        for folder in (PACKAGE, ROOT / "examples", ROOT / "tests")
        for path in sorted(folder.rglob("*.py"))
    }


def test_files_are_short_and_few_lie_beside_the_folders():
    lengths = {name: len(text.splitlines()) for name, text in sources().items()}
    assert not {name: length for name, length in lengths.items() if length > MOST_LINES_OF_A_FILE}
    assert len([*PACKAGE.glob("*.py")]) <= MOST_FILES_BESIDE_FOLDERS


def test_functions_are_short():
    """From the line of `def` to the last one: the docstring counts, decorators do not."""
    lengths = {
        f"{name}: {node.name}": node.end_lineno - node.lineno + 1
        for name, text in sources().items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert len(lengths) > 500
    assert not {name: length for name, length in lengths.items() if length > MOST_LINES_OF_A_FUNCTION}
