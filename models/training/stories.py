"""Plain-text files of stories: where one ends, and quotes that were decoded as the wrong code page."""

from __future__ import annotations

import re

PLAIN = {"“": '"', "‘": "'", "’": "'", "–": "-", "—": "-", "…": "...", "”": '"'}
# as Windows-1252 shows their UTF-8. The last byte of a closing quote is no character there: its remains come last.
MISREAD = {curly.encode().decode("cp1252", errors="ignore"): plain for curly, plain in PLAIN.items()}
BORDER = re.compile(r"(?<!\n)\n(?!\n)")


def mended(text: str) -> str:
    """Quotes, apostrophes and dashes that had been read as Windows-1252, in plain ASCII; all else as it was."""
    for wrong, right in MISREAD.items():
        text = text.replace(wrong, right)
    return text


def stories(text: str) -> list[str]:
    """The stories of a file in which a single line break parts stories and blank lines part their paragraphs.

    `<|endoftext|>`, where the file has it, parts them instead. White space within a story becomes single spaces and
    single line breaks between paragraphs.
    """
    text = re.sub(r"[ \t\r]+$", "", mended(text), flags=re.MULTILINE)
    parts = text.split("<|endoftext|>") if "<|endoftext|>" in text else BORDER.split(text)
    found = ("\n".join(" ".join(line.split()) for line in part.splitlines() if line.strip()) for part in parts)
    return [story for story in found if story]
