"""What the plugin adds to another project's pytest: python tests/benchmarks/plugin_start_up.py [ROUNDS]

An empty project and one test, with the plugin and with `-p no:lmconform`, in turns, two runs of each a round; processor
time of the child processes. Other plugins stay out.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from lmconform.bench import compare
from lmconform.bench.clocks import Ticking

CHILDREN = Ticking(
    "processor time of children",
    lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]),  # user and system
)


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "test_one.py").write_text("def test_one(): pass\n")
        environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}

        def pytest(*more: str) -> None:
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *more]
            subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, check=True)

        found = compare(lambda: pytest("-p", "lmconform.pytest_plugin"), pytest, rounds=rounds, clock=CHILDREN)
    print(
        f"{2 * rounds} paired runs: {1000 * found.median:.0f} ms with the plugin, {1000 * found.peer_median:.0f} ms "
        f"without; ratio {found}"
    )


if __name__ == "__main__":
    main()
