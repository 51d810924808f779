"""What may not stand in a file of this repository, and how long code may get."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 90
SUPPRESS_ALL = re.compile(r"(?:contextlib\.)?suppress\((?:Base)?Exception\)")

# Written in pieces, so that this file passes its own test.
TEXT_RULES = {
    "a path of one machine": re.compile(
        r"(?<![\w./~-])/(?:" + "|".join(("home", "Users", "root", "work", "opt", "mnt", "tmp")) + r")/\w"
    ),
    "a package registry's host": re.compile(
        r"(?i)https?://[^/\s]*(?:" + "|".join(("pypi", "artifactory", "nexus", "registry", "mirror")) + r")"
    ),
    "pip's index options": re.compile(r"--(?:extra-)?index-url|--" + "find-links|--trusted-" + "host"),
    "a folder beside the repository": re.compile(r"(?<![\w-])shared" + r"/"),
    "a merge conflict": re.compile(r"^(?:<{7}|>{7}) ", re.MULTILINE),
}


def repository_files() -> list[Path]:
    """Files that are, or are about to be, under version control."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = (ROOT / name for name in listed.split("\0") if name)
    return sorted(file for file in files if file.is_file())


def text_of(file: Path) -> str | None:
    """A file's text, or None where it is binary."""
    data = file.read_bytes()
    if b"\0" in data:
        return None
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def text_faults(text: str) -> Iterator[str]:
    """Rules of ``TEXT_RULES`` that a text breaks, with the line."""
    for rule, pattern in TEXT_RULES.items():
        for match in pattern.finditer(text):
            yield f"{text.count(chr(10), 0, match.start()) + 1}: {rule}: {match.group()!r}"


def is_swallowed(handler: ast.ExceptHandler) -> bool:
    """Whether an ``except`` catches everything and does nothing."""
    everything = handler.type is None or (
        isinstance(handler.type, ast.Name) and handler.type.id in ("Exception", "BaseException")
    )
    nothing = all(
        isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        for node in handler.body
    )
    return everything and nothing


def code_faults(source: str, long_functions: bool = False) -> Iterator[str]:
    """What a Python source does that the house does not do."""
    lines = source.count("\n")
    if lines > MAX_FILE_LINES:
        yield f"1: {lines} lines; split a file above {MAX_FILE_LINES}"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler) and is_swallowed(node):
            yield f"{node.lineno}: swallows every exception; catch what you expect, or let it rise"
        elif isinstance(node, ast.Call) and SUPPRESS_ALL.fullmatch(ast.unparse(node)):
            yield f"{node.lineno}: swallows every exception; suppress what you expect"
        elif isinstance(node, ast.Attribute) and node.attr == "make_block_ptr":
            yield f"{node.lineno}: make_block_ptr; address with base + tl.arange and masks"
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "importlib.reload":
            yield f"{node.lineno}: importlib.reload; undo must be exact without reloading"
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not long_functions:
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                yield f"{node.lineno}: {node.name} has {length} lines; split above {MAX_FUNCTION_LINES}"


def test_no_file_names_a_machine_a_registry_or_a_neighbour_folder() -> None:
    texts = {file.relative_to(ROOT): text for file in repository_files() if (text := text_of(file)) is not None}
    assert {Path("pyproject.toml"), Path("Makefile"), Path("tests/test_text_hygiene.py")} <= set(texts)
    assert [f"{file}:{fault}" for file, text in texts.items() for fault in text_faults(text)] == []


def test_code_keeps_the_house_rules() -> None:
    sources = [file.relative_to(ROOT) for file in repository_files() if file.suffix == ".py"]
    assert len(sources) > 10
    faults = [
        f"{file}:{fault}"
        for file in sources
        # A Triton kernel is one function and may be long.
        for fault in code_faults((ROOT / file).read_text(), long_functions=file.parts[0] == "triton_kernels")
    ]
    assert faults == []


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("see /" + "home/me/x", "a path of one machine"),
        ("x = '/" + "work/main'", "a path of one machine"),
        ("https://py" + "pi.example.org/simple", "a package registry's host"),
        ("pip install --index-" + "url x", "pip's index options"),
        ("as in shared" + "/notes.md", "a folder beside the repository"),
        ("<" * 7 + " HEAD", "a merge conflict"),
    ],
)
def test_a_planted_text_fault_is_found(text: str, rule: str) -> None:
    (found,) = text_faults("first line\n" + text)
    assert found.startswith(f"2: {rule}")


@pytest.mark.parametrize(
    "text", ["a/home/b", "~/.cache", "https://huggingface.co/x", "unshared" + "/x", "/usr/bin/env"]
)
def test_an_innocent_text_passes(text: str) -> None:
    assert list(text_faults(text)) == []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("try:\n    f()\nexcept Exception:\n    pass\n", "3: swallows"),
        ("try:\n    f()\nexcept:\n    ...\n", "3: swallows"),
        ("with contextlib.suppress(Exception):\n    f()\n", "1: swallows"),
        ("import importlib\nimportlib.reload(f)\n", "2: importlib.reload"),
        ("tl.make_block_ptr(x)\n", "1: make_block_ptr"),
        ("def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES, "1: f has 91 lines"),
        ("x = 1\n" * (MAX_FILE_LINES + 1), "1: 401 lines"),
    ],
)
def test_a_planted_code_fault_is_found(source: str, message: str) -> None:
    (found,) = code_faults(source)
    assert found.startswith(message)


@pytest.mark.parametrize(
    "source",
    [
        "try:\n    f()\nexcept KeyError:\n    pass\n",
        "try:\n    f()\nexcept Exception as error:\n    raise ValueError from error\n",
        "def f():\n" + "    x = 1\n" * (MAX_FUNCTION_LINES - 1),
        "x = 1\n" * MAX_FILE_LINES,
    ],
)
def test_an_innocent_source_passes(source: str) -> None:
    assert list(code_faults(source)) == []
