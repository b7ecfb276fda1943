"""Timing a model against a peer: in turns, in one process, as a ratio with its interval.

Seconds depend on the machine and on what else it does; the ratio to a peer that was timed in the same breath hardly
does. `compare` is the helper, `paired` the pytest fixture, `lmconform bench SPEC --against SPEC` the command.
"""

from lmconform.bench.pairing import Comparison, Task, compare

__all__ = ["Comparison", "Task", "compare"]
