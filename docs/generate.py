"""Writes the reference pages of docs/ from the registry: python docs/generate.py."""

from __future__ import annotations

from pathlib import Path

from lmconform.registry import CAPABILITIES, Check, all_checks

HERE = Path(__file__).parent


def checks_page() -> str:
    """docs/checks.md: every check, what it holds, how it is measured."""
    checks = all_checks().values()
    families: dict[str, list[Check]] = {}
    for check in checks:
        families.setdefault(check.family, []).append(check)
    lines = [
        "# Checks",
        "",
        "Generated from the registry by `python docs/generate.py`. `lmconform explain ID` prints one entry.",
        f"{len(checks)} checks in {len(families)} families. A check of the smoke profile runs in every profile, one of",
        "the default profile in default and thorough.",
        "",
        "| id | holds when | needs | profile | severity |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| [{check.id}](#{check.id.replace('.', '')}) | {check.holds} | {', '.join(check.needs)} "
            f"| {check.profile} | {check.severity} |"
            for check in checks
        ),
        "",
        "What `needs` names is probed, not declared:",
        "",
        *(f"- `{name}`: {meaning}" for name, meaning in CAPABILITIES.items()),
    ]
    for family, members in families.items():
        lines += ["", f"## {family}"]
        for check in members:
            lines += ["", f"### {check.id}", "", f"Holds when {check.holds}.", "", check.doc]
            if check.grid:
                lines += ["", "Cases: " + "; ".join(f"`{case}`" for case in check.grid) + "."]
            if check.requires:
                lines += ["", "Blocked by a red " + ", ".join(f"`{id}`" for id in check.requires) + "."]
    return "\n".join(lines) + "\n"


PAGES = {"checks.md": checks_page}


if __name__ == "__main__":
    for name, page in PAGES.items():
        (HERE / name).write_text(page(), encoding="utf-8")
