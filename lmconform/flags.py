"""The options of a run in argparse's words: one list for `lmconform check` and `pytest --lm`.

Types and defaults stand in `lmconform.options.Options`. Every start of pytest imports this module, so it holds nothing
but literals.
"""

from __future__ import annotations

from typing import Any

PROFILES = ("smoke", "default", "thorough")  # each runs what those before it run, and more

FLAGS: dict[str, dict[str, Any]] = {
    "profile": {"help": "how much is run", "choices": PROFILES},
    "select": {"help": "only these checks: ids, families or globs", "metavar": "ID", "action": "append"},
    "deselect": {"help": "not these checks: ids, families or globs", "metavar": "ID", "action": "append"},
    "device": {
        "help": "where the subject runs: cpu, cuda, cuda:1, mps, or pretended: sim, sim:2",
        "metavar": "DEVICE",
    },
    "dtype": {"help": "convert the subject: float32, float64, bfloat16, float16", "metavar": "DTYPE"},
    "reference": {"help": "a sound model of the same weights to compare with", "metavar": "SPEC"},
    "as_loaded": {"help": "check the weights as they are, not excited ones", "action": "store_true"},
    "expected": {"help": "expected failures, a TOML file", "metavar": "FILE"},
    "known": {
        "help": "apply the known deviations of transformers that ship with lmconform",
        "action": "store_true",
    },
    "seed": {"help": "of weights and tokens", "metavar": "N", "type": int},
    "time_budget": {"help": "start no further check after so many seconds", "metavar": "SECONDS", "type": float},
    "strict": {"help": "warnings are findings too", "action": "store_true"},
    "isolate": {"help": "run the subject in a child process", "action": "store_true"},
    "json": {"help": "write the report as JSON", "metavar": "FILE"},
    "html": {"help": "write the report as one HTML page", "metavar": "FILE"},
    "import": {"help": "import this module first", "metavar": "MODULE", "action": "append"},
    "trust_remote_code": {"help": "let a checkpoint bring its own code", "action": "store_true"},
    "case": {
        "help": "only this case of the selected check, as a reproduction names it",
        "metavar": "CASE",
    },
    "timeout": {
        "help": "seconds after which building, or one check, counts as hanging",
        "metavar": "SECONDS",
        "type": float,
    },
}
