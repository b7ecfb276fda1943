"""Writes the reference pages of docs/ from the registry: python docs/generate.py."""

from __future__ import annotations

import tomllib
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


def findings_page() -> str:
    """docs/findings.md: the faults and traps of docs/findings.toml, each with its reproduction."""
    findings = tomllib.loads((HERE / "findings.toml").read_text(encoding="utf-8"))["finding"]
    faults = sum(finding["kind"] == "fault" for finding in findings)

    def types(finding: dict[str, list[str]]) -> str:
        return ", ".join(f"`{name}`" for name in finding["types"])

    lines = [
        "# Findings",
        "",
        f"What lmconform brought to light in released libraries: {faults} faults and {len(findings) - faults} traps,",
        "most consequential first. A fault contradicts the model's own configuration, documentation or siblings. A",
        "trap is documented, or as the original authors wrote it, and surprises all the same.",
        "",
        "Every entry was read in the source of the library and is reproduced by the script below it: random weights,",
        "tiny, on a CPU, without lmconform. The page is generated from `docs/findings.toml` by",
        "`python docs/generate.py`; `tests/findings` runs every script against the installed version. Each script",
        "ends with an assert that holds while the fault exists, so the release that mends one is noticed. The scripts",
        "were run on transformers 5.17 and 5.23; a range that ends before 6 means that 5.23 still shows the fault.",
        "Those of other libraries ([Other libraries](other_libraries.md)) run where those are installed.",
        "",
        "| finding | types | kind | shown by |",
        "| --- | --- | --- | --- |",
    ]
    for finding in findings:
        check = (
            f"[{finding['check']}](checks.md#{finding['check'].replace('.', '')})" if finding["check"] else "no check"
        )
        lines.append(f"| [{finding['id']}](#{finding['id']}) | {types(finding)} | {finding['kind']} | {check} |")
    for finding in findings:
        shown = (
            f"`lmconform explain {finding['check']}`"
            if finding["check"]
            else "no check (the model cannot be built or called so, or the fault is outside what a check can reach)"
        )
        lines += [
            "",
            f"## {finding['id']}",
            "",
            f"**{finding['title']}**",
            "",
            f"- Kind: {finding['kind']}. Types: {types(finding)}. Seen in: `{finding['versions']}`.",
            f"- Where: `{finding['where']}`.",
            f"- Shown by: {shown}.",
            *(
                [f"- Public threads: {', '.join(f'<{link}>' for link in finding['links'])}."]
                if finding["links"]
                else []
            ),
            "",
            f"Cause: {finding['cause']}",
            "",
            f"Who is hit: {finding['consequence']}",
            "",
            f"Workaround: {finding['workaround']}",
            "",
            "```python",
            finding["reproduction"].strip(),
            "```",
        ]
    return "\n".join(lines) + "\n"


PAGES = {"checks.md": checks_page, "findings.md": findings_page}


if __name__ == "__main__":
    for name, page in PAGES.items():
        (HERE / name).write_text(page(), encoding="utf-8")
