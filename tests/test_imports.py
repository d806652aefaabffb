"""Who may import what: optional packages stay optional, and rooms import only the rooms below them."""

import ast
import graphlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tiny_dataset import random_tokenizer, walks, write_interactions

REPOSITORY = Path(__file__).resolve().parent.parent
OPTIONAL = ("polars", "wandb", "sentence_transformers", "transformers", "sklearn", "matplotlib", "tensorboard")
ROOMS = ("data", "ops", "modules", "training", "evaluation", "tasks", "reports", "serving", "benchmarks")
MAY_IMPORT = {
    "data": {"data"},
    "ops": {"ops"},
    "modules": {"modules", "ops"},
    "training": {"training", "ops"},
    "evaluation": {"evaluation", "modules", "ops"},
    "tasks": {"tasks", "data", "training", "reports", "evaluation", "modules", "ops"},
    "reports": {"reports", "evaluation", "modules", "ops"},
    "serving": {"serving", "modules", "ops"},
}
FOR_EVERYBODY = ("data.files", "data.schemas")

IMPORT_ALL = """
import importlib, json, pkgutil, sys
for name in {optional}:
    sys.modules[name] = None  # import raises ModuleNotFoundError, find_spec finds nothing: as if not installed
names = list({extra})
for room in {rooms}:
    names += [module.name for module in pkgutil.walk_packages([room], room + ".")]
failures = {{}}
for name in names:
    try:
        importlib.import_module(name)
    except ImportError as error:
        failures[name] = repr(error)
print(json.dumps([len(names), failures]))
"""


def test_core_rooms_import_without_optional_packages():
    """ops, modules, training and evaluation whole; of data what training and evaluation read with."""
    script = IMPORT_ALL.format(
        optional=OPTIONAL,
        extra=("data.schemas", "data.processed", "data.batching", "data.features"),
        rooms=("ops", "modules", "training", "evaluation"),
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    num_modules, failures = json.loads(result.stdout.splitlines()[-1])
    assert failures == {}
    assert num_modules > 30


def test_the_import_hook_blocks():
    """A test that cannot fail proves nothing: a module that needs polars must be reported."""
    script = IMPORT_ALL.format(optional=OPTIONAL, extra=("polars", "sklearn.decomposition"), rooms=())
    result = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert set(json.loads(result.stdout)[1]) == {"polars", "sklearn.decomposition"}


TRAIN = """
import sys
for name in ("polars", "wandb", "sentence_transformers", "transformers"):
    sys.modules[name] = None
from pathlib import Path
import train_decoder
from modules.model import RetrievalModelConfig
from tests.tiny_dataset import MODEL_SIZES, walks
from training.loop_config import LoopConfig
from training.run_folder import RunOptions
folder = Path({folder!r})
train_decoder.train(
    options=RunOptions(),
    save_dir_root=str(folder / "run"),
    dataset=walks(folder / "dataset", folder / "log.csv"),
    model=RetrievalModelConfig(languages={{"text": (1,)}}, num_user_buckets=0, **MODEL_SIZES),
    loop=LoopConfig(num_steps=4, learning_rate=1e-3, eval_every=2, checkpoint_every=4, log_every=1),
    tokenizer=str(folder / "tokenizer"),
    batch_size=8,
    max_history=5,
)
"""


@pytest.mark.slow
def test_a_model_trains_from_a_prepared_folder_without_optional_packages(tmp_path: Path):
    """And on the way: the test split is read once, at the end, and never logged during training (fault 2)."""
    write_interactions(tmp_path / "log.csv")
    random_tokenizer(walks(tmp_path / "dataset", tmp_path / "log.csv")).save_pretrained(tmp_path / "tokenizer")
    script = TRAIN.format(folder=str(tmp_path))
    result = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    names = {name for record in logged for name in record}
    assert "generative/valid/all/ndcg@10" in names
    assert not any("test" in name for name in names)
    assert "generative/test/all/ndcg@10" in json.loads((tmp_path / "run" / "metrics.json").read_text())


def source_files() -> dict[str, Path]:
    """Every module of the rooms and every script, by its dotted name."""
    paths = [path for room in ROOMS for path in sorted((REPOSITORY / room).rglob("*.py"))]
    paths += sorted(REPOSITORY.glob("*.py"))
    return {module_name(path): path for path in paths}


def module_name(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(tree: ast.AST, package: str, *, lazy: bool = True) -> Iterator[str]:
    """Dotted names that a module imports, `from a import b` as a.b; without `lazy`, those in functions do not count.

    Imports for type checking never count.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = parts[: len(parts) - node.level + 1] if node.level else []
            yield from (".".join([*base, *([node.module] if node.module else []), alias.name]) for alias in node.names)
        elif lazy or not isinstance(node, ast.FunctionDef):
            yield from imported_names(node, package, lazy=lazy)


def dependencies(name: str, path: Path, modules: dict[str, Path], *, lazy: bool) -> set[str]:
    """Modules of the repository that one module imports; `from a import f` with a function f depends on a."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for imported in imported_names(ast.parse(path.read_text(encoding="utf-8")), package, lazy=lazy):
        while imported and imported not in modules:
            imported = imported.rpartition(".")[0]
        found.add(imported)
    return found - {"", name}


def import_graph(*, lazy: bool) -> dict[str, set[str]]:
    modules = source_files()
    return {name: dependencies(name, path, modules, lazy=lazy) for name, path in modules.items()}


def test_rooms_import_only_rooms_below_them():
    wrong = [
        f"{name} imports {dependency}"
        for name, needed in import_graph(lazy=True).items()
        for dependency in sorted(needed)
        if (room := name.split(".")[0]) in MAY_IMPORT
        and dependency not in FOR_EVERYBODY
        and dependency.split(".")[0] not in MAY_IMPORT[room]
    ]
    assert wrong == []


def test_no_import_circles():
    """Registries may import their entries inside functions; at import time nothing goes round."""
    try:
        order = list(graphlib.TopologicalSorter(import_graph(lazy=False)).static_order())
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))
    assert order.index("data.schemas") < order.index("evaluation.evaluator")


def test_the_static_checks_see_what_they_should():
    """Known edges, so that a broken reader of imports cannot pass silently."""
    assert {"data.schemas", "evaluation.metrics", "evaluation.ranker"} <= import_graph(lazy=False)[
        "evaluation.evaluator"
    ]
    tree = ast.parse(
        "from . import x\nfrom ..y import z\n"
        "if TYPE_CHECKING:\n    import t\n"
        "class A:\n    def f(self):\n        from data import prepare\n        import ops.reference\n"
    )
    assert set(imported_names(tree, "a.b")) == {"data.prepare", "ops.reference", "a.b.x", "a.y.z"}
    assert set(imported_names(tree, "a.b", lazy=False)) == {"a.b.x", "a.y.z"}


def test_gin_is_used_by_scripts_and_training_alone():
    """gin stays on its leash: data, ops, modules, evaluation and reports know nothing of it."""
    users = [
        name
        for name, path in source_files().items()
        if name.split(".")[0] in MAY_IMPORT.keys() - {"training"}
        and "gin" in {part.split(".")[0] for part in imported_names(ast.parse(path.read_text(encoding="utf-8")), "")}
    ]
    assert users == []
