"""No command, option or example in README and docs/ is stale."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GENERATED = ("checks.md", "findings.md", "kills.md", "reports.md")  # their code is run where it is made
PAGES = [
    ROOT / "README.md", ROOT / "CONTRIBUTING.md",
    *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.name not in GENERATED),
]  # fmt: skip
RUN = ("plugging_in.md", "writing_checks.md")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAMED = re.compile(r"# (\w+\.py)\n")


def blocks(page: Path, language: str) -> list[str]:
    return [code for kind, code in BLOCK.findall(page.read_text(encoding="utf-8")) if kind == language]


def commands(page: Path) -> list[list[str]]:
    """The words of every command in its blocks, fenced or indented, and of those within `backticks` in its text."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"^ {4}((?:lmconform|pytest|python) .*)$", text, re.MULTILINE)
    lines += re.findall(r"`((?:lmconform|pytest|python) [^`]+)`", text.replace("\n", " "))
    words = [shlex.split(part, comments=True) for line in lines for part in re.split(r"&&|;", line)]
    return [command for command in words if command]


def unknown_options(command: list[str]) -> list[str]:
    """The options of a command that its program does not know."""
    match command:
        case ["lmconform", name, *rest] if name.islower():
            text = lmconform_help(name)
        case ["pytest", *rest] | ["python", "-m", "pytest", *rest]:
            text = pytest_help()
        case ["python", "-m", "models", name, *rest]:
            text = models_help(name, rest)
        case ["python", script, *rest] if script.endswith(".py"):
            text = (ROOT / script).read_text(encoding="utf-8")
        case _:
            return []
    given = [word.partition("=")[0] for word in rest if word.startswith("--")]
    return [word for word in given if not re.search(rf"{re.escape(word)}\b", text)]


def lmconform_help(name: str) -> str:
    from lmconform.cli import build_parser

    return str(build_parser([name])._subparsers._group_actions[0].choices[name].format_help())


def pytest_help() -> str:
    return _help("pytest", (sys.executable, "-m", "pytest", "--help"))


def models_help(name: str, rest: list[str]) -> str:
    if name in (handed := {"diagnose": "check", "sweep": "sweep"}):  # their options are lmconform's
        return lmconform_help(handed[name])
    system = [rest[0]] if name in ("train", "compare") and rest else []
    text = _help(f"models {name} {system}", (sys.executable, "-m", "models", name, *system, "--help"))
    if name == "compare" and "those of `train" in " ".join(text.split()):
        text += models_help("train", rest)
    return text


_helps: dict[str, str] = {}


def _help(key: str, command: tuple[str, ...]) -> str:
    if key not in _helps:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
        _helps[key] = done.stdout
    return _helps[key]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_option_exists(page: Path) -> None:
    stale = {shlex.join(command): wrong for command in commands(page) if (wrong := unknown_options(command))}
    assert not stale


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert not [link for link in links if link and not (page.parent / link).exists()]


def _runs_here(words: list[str]) -> bool:
    """A check of something that the page holds, narrowed to seconds."""
    return words[:1] == ["check"] and any(":" in word for word in words) and bool({"--select", "smoke"} & {*words})


@pytest.mark.parametrize("name", RUN)
def test_examples_run(name: str, tmp_path: Path) -> None:
    """Blocks that begin with a file's name are that file; the others, and the narrow checks, are run beside them."""
    page = ROOT / "docs" / name
    loose = []
    for code in blocks(page, "python"):
        if found := NAMED.match(code):
            (tmp_path / found[1]).write_text(code, encoding="utf-8")
        else:
            loose.append(code)
    narrow = [words for _, *words in commands(page) if _runs_here(words)]
    assert narrow
    checks = "\n".join(
        f"assert main({[*words, '--no-isolate', '--quiet']!r}) == 0, {shlex.join(words)!r}" for words in narrow
    )
    (tmp_path / "everything.py").write_text(
        "\n".join([*loose, "from lmconform.cli import main", checks]), encoding="utf-8"
    )
    done = subprocess.run(
        [sys.executable, "everything.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
