"""Replays report 001 on the story model and writes docs/story.md, docs/replays/story.json and the plots.

    LMCONFORM_DATA=... python docs/replay_story.py                 # what is not in the JSON yet, then the page
    LMCONFORM_DATA=... python docs/replay_story.py rates phases    # these pieces only, then the page
    python docs/replay_story.py --page                             # the page from the JSON

Every piece is written when it is done: a run that was cut goes on with the next one. Remove a piece from the JSON to
measure it again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
from replay_story_page import page  # noqa: E402
from replay_story_pieces import PIECES  # noqa: E402
from replay_story_plots import draw  # noqa: E402

PAGE, FOLDER = HERE / "story.md", HERE / "replays"
FIGURES = FOLDER / "story.json"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pieces", nargs="*", help=f"which to measure, of {', '.join(PIECES)} (default: all)")
    parser.add_argument("--page", action="store_true", help="measure nothing")
    args = parser.parse_args(arguments)
    if unknown := set(args.pieces) - PIECES.keys():
        parser.error(f"there is no piece {', '.join(sorted(unknown))}; there are {', '.join(PIECES)}")
    torch.set_num_threads(1)
    figures = recorded()
    for name in [] if args.page else args.pieces or PIECES:
        if name in figures:
            continue
        started = time.process_time()
        measured = PIECES[name]()
        seconds = round(time.process_time() - started, 1)
        figures = recorded() | {name: measured | {"cpu_seconds": seconds}}
        FOLDER.mkdir(exist_ok=True)
        FIGURES.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {seconds} s", flush=True)
    if missing := [name for name in PIECES if name not in figures]:
        print(f"not measured yet: {', '.join(missing)}; the page is left as it is")
        return
    draw(figures, FOLDER)
    PAGE.write_text(page(figures), encoding="utf-8")
    print(PAGE)


def recorded() -> dict[str, Any]:
    """The pieces that the JSON holds, by name."""
    found: dict[str, Any] = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.is_file() else {}
    return found


if __name__ == "__main__":
    main()
