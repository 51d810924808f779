"""Imports point down the floors, and every foreign library stays on its floor.

The sources are parsed, never run: an import under ``TYPE_CHECKING``, inside a function or in a literal
``import_module("...")`` counts like any other. Registry strings do not count: through them lower floors reach
upper ones.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Errors are the ground that every floor stands on; they import nothing.
GROUND = "vlm_budget.errors"

# Rooms on the same floor are blind to each other.
FLOORS = {"triton_kernels": 0, "vlm_budget": 1, "pruners": 2, "video": 2, "eval": 3, "demos": 4}

CORE = {"torch", "transformers", "accelerate"}
DATA = {"numpy", "PIL", "safetensors"}
METHODS = {"torch", "timm", "open_clip"}
FRAMES = {"torch", "diffusers", "open_clip", "av", "numpy", "PIL"}
REPORTS = CORE | DATA | {"tokenizers", "typer", "rich", "matplotlib", "datasets", "yaml", "filelock", "av"}

# The longest prefix of a file's path decides.
FOREIGN = {
    "triton_kernels": {"torch", "triton"},
    "vlm_budget": CORE | {"rich", "PIL"},  # reports are rich tables, images.py and picture.py are Pillow
    "vlm_budget/cli": CORE | {"typer", "rich", "PIL"},
    "vlm_budget/ops/flash_blocks.py": CORE | {"flash_attn"},  # a back end that may be installed
    "vlm_budget/search": CORE | {"rich", "optuna", "scipy", "matplotlib"},  # the extra "search", imported where used
    "vlm_budget/serving": CORE | {"vllm"},
    "pruners": METHODS,
    "video": FRAMES,
    "video/dit": FRAMES | {"rich"},  # its reports are rich tables
    "eval": REPORTS,
    "eval/adapters": REPORTS | {"lmms_eval", "loguru", "tqdm", "vlmeval"},  # what the harnesses bring
    "eval/video_models.py": REPORTS | {"diffusers"},  # benchmarks of diffusers' transformers
    "eval/video_gen": REPORTS | {"diffusers"},  # its shipped model is one of diffusers' transformers
    "eval/views/scorer": REPORTS | {"open_clip"},  # its shipped model is open_clip's
    "eval/vit": REPORTS | {"timm"},  # its shipped model is timm's
    "demos": REPORTS | FRAMES | {"gradio"},
}


def module_name(file: Path) -> str:
    """Import name of a file given by its path below the root."""
    parts = file.with_suffix("").parts
    parts = parts if parts[0] == "vlm_budget" else ("vlm_budget", *parts)
    return ".".join(parts)


def room_of(module: str) -> str:
    """The top folder that holds an import name of ours."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in FLOORS else "vlm_budget"


def imported_names(tree: ast.AST, module: str) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of everything that a module imports.

    ``from a import b`` gives ``a.b``, since ``b`` may be a module.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".")[: -node.level]
                base = ".".join([*package, base]) if base else ".".join(package)
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def allowed_libraries(file: Path) -> set[str]:
    """Foreign libraries that the file's folder may import."""
    prefixes = [prefix for prefix in FOREIGN if file.is_relative_to(prefix)]
    return FOREIGN[max(prefixes, key=len)]


def violations_in(root: Path, file: Path) -> Iterator[str]:
    """What a file (by its path below ``root``) imports and may not."""
    # A package's own name stands for its __init__, so that `from . import x` resolves alike in both.
    module = module_name(file)
    own_room = room_of(module)
    for line, name in imported_names(ast.parse((root / file).read_text()), module):
        library = name.split(".")[0]
        if name == GROUND or name.startswith(f"{GROUND}."):
            continue
        if library == "vlm_budget":
            room = room_of(name)
            if room != own_room and FLOORS[room] >= FLOORS[own_room]:
                floors = f"floor {FLOORS[own_room]} may not see floor {FLOORS[room]}"
                yield f"{file}:{line}: {own_room} imports {room}: {floors}"
        elif library not in sys.stdlib_module_names and library not in allowed_libraries(file):
            yield f"{file}:{line}: {library} is not allowed in {file.parent}"


def sources(root: Path) -> list[Path]:
    """Python files of every room, by their paths below ``root``."""
    return sorted(file.relative_to(root) for room in FLOORS for file in (root / room).rglob("*.py"))


def violations(root: Path) -> list[str]:
    """Every forbidden import below ``root``."""
    return [found for file in sources(root) for found in violations_in(root, file)]


def plant(root: Path, file: str, source: str) -> None:
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_text(source)


def test_every_import_points_down_and_every_library_is_on_its_floor() -> None:
    assert violations(ROOT) == []


def test_every_room_is_read_and_none_is_missing() -> None:
    assert {file.parts[0] for file in sources(ROOT)} == set(FLOORS)
    assert {init.parent.name for init in ROOT.glob("*/__init__.py")} == set(FLOORS)


@pytest.mark.parametrize(
    ("file", "source", "message"),
    [
        ("vlm_budget/patch.py", "from vlm_budget.pruners.hired import HiRED", "imports pruners"),
        ("vlm_budget/patch.py", "from vlm_budget import pruners", "imports pruners"),
        ("vlm_budget/engine/layers.py", "from .. import video", "imports video"),
        ("vlm_budget/cli/__init__.py", "from ..eval.nano import load", "imports eval"),
        (
            "vlm_budget/patch.py",
            "def f():\n    import vlm_budget.eval",
            ":2: vlm_budget imports eval: floor 1",
        ),
        (
            "vlm_budget/patch.py",
            "import importlib\nimportlib.import_module('vlm_budget.pruners')",
            "imports pruners",
        ),
        ("triton_kernels/gather.py", "import vlm_budget.budget", "imports vlm_budget"),
        ("triton_kernels/gather.py", "from vlm_budget import ops", "imports vlm_budget"),
        ("triton_kernels/gather.py", "import transformers", "transformers is not allowed"),
        ("pruners/quota.py", "from vlm_budget.video.frames import scorer", "imports video"),
        ("video/dit/svg2.py", "import vlm_budget.pruners.dart", "imports pruners"),
        ("video/dit/svg2.py", "from ...eval import metrics", "imports eval"),
        ("pruners/hired.py", "import transformers", "transformers is not allowed"),
        ("vlm_budget/families/llava.py", "import triton.language as tl", "triton is not allowed"),
        ("vlm_budget/families/llava.py", "from vllm import LLM", "vllm is not allowed"),
        ("vlm_budget/patch.py", "from diffusers import DiffusionPipeline", "diffusers is not allowed"),
        ("eval/report.py", "import gradio", "gradio is not allowed"),
        ("eval/report.py", "from vlm_budget.demos import app", "imports demos"),
        ("eval/report.py", "import left_pad", "left_pad is not allowed"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, file: str, source: str, message: str) -> None:
    plant(tmp_path, file, source)
    (found,) = violations(tmp_path)
    assert found.startswith(f"{file}:")
    assert message in found


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("vlm_budget/registry.py", "TARGET = 'vlm_budget.pruners.hired:HiRED'\nimport importlib, torch"),
        ("vlm_budget/engine/layers.py", "from ..budget import Budget\nfrom . import cache"),
        ("vlm_budget/__init__.py", "from .patch import patch"),
        ("vlm_budget/serving/plugin.py", "import vllm"),
        ("vlm_budget/ops/gather.py", "from vlm_budget.triton_kernels import gather"),
        ("triton_kernels/gather.py", "import triton, torch\nfrom vlm_budget.errors import KernelInputError"),
        ("pruners/hired.py", "from vlm_budget.pruner import Pruner\nfrom .scores import topk\nimport timm"),
        ("video/frames/read.py", "import av\nfrom vlm_budget.budget import Budget"),
        ("demos/app.py", "import gradio\nfrom vlm_budget import eval, pruners, video"),
    ],
)
def test_what_the_design_allows_is_allowed(tmp_path: Path, file: str, source: str) -> None:
    plant(tmp_path, file, source)
    assert sources(tmp_path) == [Path(file)]
    assert violations(tmp_path) == []
