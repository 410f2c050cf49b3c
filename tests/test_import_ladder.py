"""The import rule: every module of dit_jax imports only from rungs below its own, or from its own folder."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
LADDER = (  # lowest first; folders and modules on one rung do not import each other
    {"files", "terminal"},
    {"config", "types"},
    {"nn"},
    {"models", "perceptual", "diffusion", "data", "parallel", "metrics", "pretrained", "checkpoint"},
    {"training", "evaluation", "planning"},
    {"cli"},
    {"__init__", "__main__"},  # what `import dit_jax` and `python -m dit_jax` run
)
OUTSIDE = {"configs", "launch", "tests"}


def rung(part: str) -> int:
    """Returns the rung of a folder or module of the package, such as "nn" or "config"."""
    for height, parts in enumerate(LADDER):
        if part in parts:
            return height
    raise AssertionError(f"dit_jax.{part} is on no rung of the ladder; give it one here and in the design")


def imported_modules(source: str, package: str) -> list[tuple[int, str]]:
    """Returns (line, dotted name) of all that a module imports, inside functions too; `package` is where it lives."""
    imports = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imports += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = parents[: len(parents) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            imports += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return imports


def violations(module: str, source: str) -> list[str]:
    """Returns what a module, such as "dit_jax/nn/mlp.py", imports against the rule."""
    _, *folders, file = module.split("/")
    own = folders[0] if folders else file.removesuffix(".py")
    found = []
    for line, name in imported_modules(source, ".".join(["dit_jax", *folders])):
        top, *rest = name.split(".")
        if top in OUTSIDE:
            found.append(f"{module}:{line} imports {name}")
        elif top == "dit_jax":
            known = set().union(*LADDER)
            theirs = rest[0] if rest and (rest[0] in known or len(rest) > 1) else "__init__"
            if theirs != own and rung(theirs) >= rung(own):
                found.append(f"{module}:{line} imports {name}")
    return found


def test_imports_only_descend():
    found = []
    for path in sorted((ROOT / "dit_jax").rglob("*.py")):
        found += violations(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dit_jax/nn/mlp.py", "import dit_jax.models.dit"),
        ("dit_jax/nn/mlp.py", "from dit_jax import models"),
        ("dit_jax/nn/mlp.py", "from ..models import dit"),
        ("dit_jax/models/dit.py", "from dit_jax.diffusion.process import q_sample"),  # the same rung
        ("dit_jax/models/dit.py", "def f():\n    from dit_jax.training import loop"),  # inside a function
        ("dit_jax/config.py", "from . import types"),
        ("dit_jax/checkpoint.py", "import dit_jax.parallel.mesh"),
        ("dit_jax/evaluation/report.py", "from dit_jax.training.reporting import Reporter"),
        ("dit_jax/cli/train.py", "from dit_jax import load"),  # the package itself is above everything
        ("dit_jax/cli/train.py", "import configs.fashion_mnist_dit"),
        ("dit_jax/__main__.py", "from tests import test_import_ladder"),
    ],
)
def test_a_planted_violation_is_found(module, source):
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dit_jax/nn/mlp.py", "from dit_jax import config, types\nfrom dit_jax.nn.attention import Attention"),
        ("dit_jax/models/dit.py", "from ..nn import mlp\nfrom . import dit_sizes\nimport jax"),
        ("dit_jax/cli/train.py", "from dit_jax.cli.main import main\nimport dit_jax.training.loop"),
        ("dit_jax/__init__.py", "from dit_jax.evaluation import generate"),
    ],
)
def test_what_descends_is_allowed(module, source):
    assert violations(module, source) == []


def test_a_module_without_a_rung_is_an_error():
    with pytest.raises(AssertionError, match=r"dit_jax\.utils is on no rung"):
        violations("dit_jax/utils/misc.py", "import dit_jax.config")
