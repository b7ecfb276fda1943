"""`python -m lmconform.zoo`: the command without the others."""

from __future__ import annotations

import argparse
import sys

from lmconform.zoo.command import add_arguments, main

parser = argparse.ArgumentParser(prog="lmconform zoo")
add_arguments(parser)
sys.exit(main(parser.parse_args()))
