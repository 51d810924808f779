"""Packaging: the wheel holds what the folders hold, under one top-level name."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
PACKAGE_DIR: dict[str, str] = SETUPTOOLS["package-dir"]
JUNK = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
PLANTED_WEIGHTS = ("eval/nano/weights/planted.safetensors", "eval/nano/weights/deeper/planted.json")


def packages_on_disk(root: Path, package_dir: dict[str, str]) -> dict[str, Path]:
    """Every folder with Python files below the mapped folders, by its import name."""
    found = {}
    for name, folder in package_dir.items():
        for file in (root / folder).rglob("*.py"):
            inner = file.parent.relative_to(root / folder).parts
            found[".".join((name, *inner))] = file.parent
    return found


def unmapped_packages(root: Path, package_dir: dict[str, str]) -> set[str]:
    """Folders of the root that are packages but have no import name of ours."""
    return {init.parent.name for init in root.glob("*/__init__.py")} - set(package_dir.values())


def environment(**changes: str | None) -> dict[str, str]:
    """This process's environment without the variables that move imports, changed as asked."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONSAFEPATH", "PYTHONPATH")}
    env.update({k: v for k, v in changes.items() if v is not None})
    return env


def origin_of(name: str, cwd: Path, env: dict[str, str]) -> str:
    """Where a fresh Python, started in ``cwd``, would import ``name`` from; empty if nowhere."""
    code = (
        "import importlib.util as u\n"
        f"spec = u.find_spec({name!r})\n"
        "print('' if spec is None else spec.origin or list(spec.submodule_search_locations)[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture(scope="module")
def source_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build reads, with planted weights: building leaves nothing in the repository."""
    tree = tmp_path_factory.mktemp("tree")
    for folder in PACKAGE_DIR.values():
        shutil.copytree(ROOT / folder, tree / folder, ignore=JUNK)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tree / file)
    for planted in PLANTED_WEIGHTS:
        (tree / planted).parent.mkdir(parents=True, exist_ok=True)
        (tree / planted).write_text("{}")
    return tree


@pytest.fixture(scope="module")
def wheel(source_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(out),
        str(source_tree),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=out)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = out.glob("*.whl")
    return zipfile.ZipFile(file)


def test_declared_packages_are_the_folders_on_disk() -> None:
    assert set(packages_on_disk(ROOT, PACKAGE_DIR)) == set(SETUPTOOLS["packages"])
    assert len(SETUPTOOLS["packages"]) == len(set(SETUPTOOLS["packages"]))


def test_every_package_folder_has_an_init() -> None:
    folders = packages_on_disk(ROOT, PACKAGE_DIR)
    assert [name for name, folder in folders.items() if not (folder / "__init__.py").is_file()] == []


def test_no_package_at_the_root_is_left_out() -> None:
    assert unmapped_packages(ROOT, PACKAGE_DIR) == set()


def test_import_name_is_the_folder_name_under_the_project() -> None:
    for name, folder in PACKAGE_DIR.items():
        assert name == ("vlm_budget" if folder == "vlm_budget" else f"vlm_budget.{folder}")


def test_the_code_and_the_package_name_one_version() -> None:
    import vlm_budget

    assert vlm_budget.__version__ == PYPROJECT["project"]["version"]


def test_the_walk_sees_a_new_package_and_a_stray_one(tmp_path: Path) -> None:
    for file in ("core/__init__.py", "core/new/module.py", "stray/__init__.py"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    found = packages_on_disk(tmp_path, {"lib": "core"})
    assert found == {"lib": tmp_path / "core", "lib.new": tmp_path / "core" / "new"}
    assert unmapped_packages(tmp_path, {"lib": "core"}) == {"stray"}


def test_wheel_has_one_top_level_name(wheel: zipfile.ZipFile) -> None:
    info = f"vlm_budget-{PYPROJECT['project']['version']}.dist-info"
    assert wheel.read(f"{info}/top_level.txt").decode().split() == ["vlm_budget"]
    assert {name.split("/")[0] for name in wheel.namelist()} == {"vlm_budget", info}


def test_wheel_carries_every_file_of_the_packages(wheel: zipfile.ZipFile, source_tree: Path) -> None:
    expected = {
        f"{name.replace('.', '/')}/{file.relative_to(source_tree / folder).as_posix()}"
        for name, folder in PACKAGE_DIR.items()
        for file in (source_tree / folder).rglob("*")
        if file.is_file()
    }
    assert {f"vlm_budget/{planted}" for planted in PLANTED_WEIGHTS} < expected
    assert "vlm_budget/py.typed" in expected
    assert expected - set(wheel.namelist()) == set()


def test_wheel_installs_the_command(wheel: zipfile.ZipFile) -> None:
    (entry_points,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert "vlm-budget = vlm_budget.cli:main" in wheel.read(entry_points).decode()


def test_root_holds_nothing_that_puts_it_on_the_path() -> None:
    assert not (ROOT / "conftest.py").exists()
    assert not (ROOT / "__init__.py").exists()
    assert "--import-mode=importlib" in PYPROJECT["tool"]["pytest"]["ini_options"]["addopts"]
    assert str(ROOT) not in sys.path


@pytest.mark.parametrize("folder", sorted(set(PACKAGE_DIR.values()) - {"vlm_budget"}))
def test_generic_name_is_importable_only_with_the_root_on_the_path(folder: str, tmp_path: Path) -> None:
    here = str(ROOT / folder)
    assert origin_of(folder, cwd=ROOT, env=environment()).startswith(here), "the probe itself sees nothing"
    assert not origin_of(folder, cwd=ROOT, env=environment(PYTHONSAFEPATH="1")).startswith(here)
    assert not origin_of(folder, cwd=tmp_path, env=environment()).startswith(here)


def test_kernels_imported_under_a_generic_name_say_so() -> None:
    command = [sys.executable, "-c", "import triton_kernels"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode != 0
    assert "ImportError" in done.stderr
    assert "import vlm_budget.triton_kernels" in done.stderr
