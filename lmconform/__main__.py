"""`python -m lmconform` is the command `lmconform`."""

from lmconform.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
