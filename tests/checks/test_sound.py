"""The sound subjects conform: three seeds of the default profile, seven more of smoke; fifty in the long run.

docs/margins.md: 200 seeds of the default profile without its costly families.
"""

from __future__ import annotations

import functools

import pytest

from fixtures.subjects import SOUND, build
from lmconform import Report, check_model
from lmconform.subject import Subject

SEEDS, MORE = range(3), range(3, 10)  # ten in all: the seven more take about 50 s of one core
MANY = range(50)


def conforms(name: str, seed: int, **options: str) -> Report:
    """The report of one sound subject. Known deviations of transformers apply, as they do for users."""
    import torch

    subject = Subject(lambda: build(name, torch.initial_seed() % (1 << 31)), name=name)
    report = check_model(subject, seed=seed, **options)
    assert report.failed == []
    return report


@functools.cache
def verdicts(name: str, device: str, profile: str) -> dict[str, str]:
    report = conforms(name, 0, device=device, profile=profile)
    assert report.device == device
    return {result.id: result.status.value for result in report.results}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", SOUND)
def test_conforms(name: str, seed: int) -> None:
    report = conforms(name, seed)
    assert report.counts["passed"] > 30
    assert report.counts["blocked"] == 0


@pytest.mark.parametrize("seed", MORE)
@pytest.mark.parametrize("name", SOUND)
def test_conforms_in_smoke(name: str, seed: int) -> None:
    report = conforms(name, seed, profile="smoke")
    assert report.counts["passed"] > 20
    assert report.counts["blocked"] == 0


@pytest.mark.parametrize("name", SOUND)
def test_smoke_verdicts_are_the_cpus(name: str, device: str) -> None:
    assert verdicts(name, device, "smoke") == verdicts(name, "cpu", "smoke")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", SOUND)
def test_conforms_in_half_precision(name: str, dtype: str) -> None:
    report = conforms(name, 1, profile="default", dtype=dtype, deselect="training,collapse")
    assert report.counts["blocked"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", SOUND)
def test_default_verdicts_are_the_cpus(name: str, device: str) -> None:
    assert verdicts(name, device, "default") == verdicts(name, "cpu", "default")


@pytest.mark.slow
@pytest.mark.parametrize("name", SOUND)
def test_verdicts_do_not_change_over_seeds(name: str) -> None:
    verdicts = [{result.id: result.status for result in conforms(name, seed).results} for seed in MANY]
    assert all(verdict == verdicts[0] for verdict in verdicts)
