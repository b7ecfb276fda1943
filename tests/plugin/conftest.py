"""Two models that a project under test may hold."""

from __future__ import annotations

import pytest

SUBJECTS = """
from torch import nn

class Sound(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(31, 16)
        self.head = nn.Linear(16, 31)
    def forward(self, idx):
        return self.head(self.embedding(idx))

class Broken(Sound):
    def forward(self, idx):
        return super().forward(idx) / 0 if idx.shape[1] > 30 else super().forward(idx)

def fails():
    raise RuntimeError("no weights here")
"""


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    """A project with own_models.py (Sound, Broken, fails) and a test of its own."""
    pytester.makepyfile(own_models=SUBJECTS, test_other="def test_other(): pass")
    pytester.syspathinsert()
    return pytester
