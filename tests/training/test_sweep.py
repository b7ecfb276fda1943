"""The learning-rate sweep: its arithmetic is torch's, its members do not feel each other, its command says it all."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fixtures.subjects import build
from lmconform import Subject
from lmconform.options import OptionError
from lmconform.recipe import Recipe
from lmconform.specimen import Specimen
from lmconform.sweep.batches import Batch, next_token
from lmconform.sweep.corpus import rule_corpus, sentence, text_corpus
from lmconform.sweep.members import Member, Training, _Rows, train
from lmconform.sweep.rates import GivenRate, Outcome, given_rate, outcome, parse_rates, spaced

ROOT = Path(__file__).resolve().parents[2]
STEPS = 12


def opened(name: str) -> Specimen:
    return Subject(lambda: build(name, torch.initial_seed() % (1 << 31)), name=name).open()


def both(name: str, members: list[Member], **options: Any) -> tuple[Training, Training]:
    """One sentence learnt vectorised, and one at a time."""
    specimen = opened(name)
    batch = next_token(sentence(specimen, 0))
    together = train(specimen, members, lambda step, seed: batch, STEPS, **options)
    return together, train(specimen, members, lambda step, seed: batch, STEPS, sequential=True, **options)


# -- arithmetic --------------------------------------------------------------------------------------------------------


def test_rows_are_stepped_as_adamw_steps_them() -> None:
    generator = torch.Generator().manual_seed(0)
    rates = (1e-4, 1e-2, 0.3)
    start = torch.randn(3, 50, generator=generator)
    gradients = torch.randn(20, 3, 50, generator=generator)
    rows = _Rows(start.clone(), rates)
    singles = [torch.nn.Parameter(row.clone()) for row in start]
    optimizers = [torch.optim.AdamW([row], lr=rate) for row, rate in zip(singles, rates, strict=True)]
    for step, gradient in enumerate(gradients):
        if step == 10:  # the second member is given up; the others' moments go on
            rows.keep([0, 2])
        kept = [0, 1, 2] if step < 10 else [0, 2]
        rows.gradient.copy_(gradient[kept])
        rows.step([True] * len(kept))
        for index in kept:
            singles[index].grad = gradient[index].clone()
            optimizers[index].step()
    expected = torch.stack([singles[0].detach(), singles[2].detach()])
    torch.testing.assert_close(rows.flat, expected, rtol=1e-6, atol=1e-7)


def test_a_row_that_is_not_live_keeps_its_weights() -> None:
    rows = _Rows(torch.ones(2, 4), (0.1, 0.1))
    rows.gradient.fill_(1.0)
    rows.step([True, False])
    assert bool((rows.flat[0] < 1).all())
    assert torch.equal(rows.flat[1], torch.ones(4))


@pytest.mark.parametrize("name", ["plain", "gpt2", "llama", "gemma2", "mamba"])
def test_vectorised_losses_are_the_sequential_ones(name: str) -> None:
    members = [Member(rate, seed) for rate in (1e-5, 1e-3, 3e-3) for seed in (0, 1)]
    together, apart = both(name, members)
    assert (together.mode, apart.mode, apart.reason) == ("vectorised", "sequential", "asked for")
    torch.testing.assert_close(torch.tensor(together.losses), torch.tensor(apart.losses), rtol=0, atol=1e-4)


def longer(name: str, rates: tuple[float, ...], dtype: str, turned: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses [rates, 100] of one seed on the rule's text, vectorised and one at a time; `turned`: the latter with the
    rows of every batch in another order, instead of the former."""
    specimen = Subject(lambda: build(name, torch.initial_seed() % (1 << 31)), name=name).open(dtype=dtype)
    batches = rule_corpus(specimen).batches(specimen, 2, 16)

    def other(step: int, seed: int) -> Batch:
        batch = batches(step, seed)
        return Batch(batch.ids.flip(0), batch.targets.flip(0))

    members = [Member(rate, 0) for rate in rates]
    first = train(specimen, members, other if turned else batches, 100, sequential=turned, keep=False)
    assert first.mode == ("sequential" if turned else "vectorised")
    second = train(specimen, members, batches, 100, sequential=True, keep=False)
    return torch.tensor(first.losses), torch.tensor(second.losses)


def test_a_hundred_steps_in_float64_are_the_same() -> None:
    together, apart = longer("plain", (1e-4, 1e-3, 8e-3), "float64")
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-8)


def test_a_hundred_steps_of_llama_are_the_same_to_the_fourth_digit() -> None:
    together, apart = longer("llama", (1e-5, 1e-4, 1e-3), "float32")
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-4)


def test_beyond_that_rounding_grows_as_that_of_a_batch_with_its_rows_turned() -> None:
    rates = (3.5e-3, 8e-3)
    together, apart = longer("llama", rates, "float32")
    turned, _ = longer("llama", rates, "float32", turned=True)
    drift, of_rounding = (together - apart).abs(), (turned - apart).abs()
    assert bool((drift[:, :30] < 1e-4).all())
    assert bool((drift.amax(1) < 30 * of_rounding.amax(1)).all()), (drift.amax(1), of_rounding.amax(1))


def test_chunks_change_nothing() -> None:
    specimen = opened("plain")
    batch = next_token(sentence(specimen, 0))
    members = [Member(rate, 0) for rate in (1e-4, 1e-3, 1e-2)]
    whole = train(specimen, members, lambda step, seed: batch, STEPS)
    split = train(specimen, members, lambda step, seed: batch, STEPS, memory=2 * whole.member_bytes)
    assert (whole.chunk, split.chunk) == (3, 2)
    torch.testing.assert_close(torch.tensor(whole.losses), torch.tensor(split.losses), rtol=0, atol=1e-5)


def test_seeds_draw_their_own_batches_and_weights() -> None:
    specimen = opened("plain")
    batches = rule_corpus(specimen).batches(specimen, 2, 8)
    made = train(specimen, [Member(1e-3, 0), Member(1e-3, 1), Member(1e-3, 0)], batches, 3)
    assert made.mode == "vectorised"
    torch.testing.assert_close(torch.tensor(made.losses[0]), torch.tensor(made.losses[2]))
    assert made.losses[0][0] != made.losses[1][0]


def test_a_diverging_member_is_stopped_and_the_others_go_on() -> None:
    together, apart = both("llama", [Member(1e-3, 0), Member(1e6, 0), Member(3e-3, 0)])
    for made in (together, apart):
        assert made.diverged == [False, True, False]
        assert [len(losses) for losses in made.losses][::2] == [STEPS, STEPS]
        assert len(made.losses[1]) < STEPS
    torch.testing.assert_close(torch.tensor(together.losses[2]), torch.tensor(apart.losses[2]), rtol=0, atol=1e-4)


def test_trained_weights_give_the_last_loss() -> None:
    specimen = opened("llama")
    batch = next_token(sentence(specimen, 0))
    made = train(specimen, [Member(3e-3, 0), Member(1e-2, 0)], lambda step, seed: batch, 100, done_below=0.01)
    trained = made.trained(1)
    assert torch.equal(trained.logits(batch.ids)[:, 1:-1].argmax(-1), batch.targets[:, 1:-1])
    assert len(made.losses[1]) < 100


def test_fallback_says_why() -> None:
    together, _ = both("bloom", [Member(1e-3, 0), Member(1e-2, 0)])
    assert together.mode == "sequential"
    assert "autograd.Function" in together.reason


def test_a_model_that_differs_when_stacked_is_trained_one_at_a_time() -> None:
    class Counting(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = build("plain", 0)
            self.register_buffer("drawn", torch.rand(1))

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.inner(input_ids).logits + self.drawn

    specimen = Subject(Counting, name="counting").open()
    batch = next_token(sentence(specimen, 0))
    made = train(specimen, [Member(1e-3, 0), Member(1e-2, 0)], lambda step, seed: batch, 2)
    assert made.reason == "drawn is no trained parameter and differs from copy to copy"


# -- what it says ------------------------------------------------------------------------------------------------------


def swept(finals: list[float], target: float = 1.0) -> Outcome:
    rates = spaced(1e-5, 1e-1, len(finals))
    made = Training(
        [Member(rate, 0) for rate in rates],
        [[4.0] * 5 + [final] * 5 for final in finals],
        [not math.isfinite(final) for final in finals],
        "vectorised",
    )
    return outcome(made, 10, target)


def test_good_range_is_the_block_around_the_best() -> None:
    found = swept([0.1, 3.9, 2.0, 0.2, 0.1, 0.2, 3.0, math.inf, math.inf])
    assert found.good_range == pytest.approx((10**-3.5, 10**-2.5)) or found.good_range == pytest.approx((1e-5, 1e-5))
    assert found.rows[-1].state == "diverged"


def test_recommended_keeps_clear_of_the_edge() -> None:
    found = swept([4.0, 4.0, 3.0, 0.3, 0.1, 0.09, math.inf, math.inf, math.inf])
    assert found.good_range == pytest.approx((10**-3.5, 10**-2.5))
    assert found.recommended == pytest.approx(1e-3)


def test_nothing_learns() -> None:
    found = swept([4.0, 3.9, 3.8])
    assert found.good_range is None
    assert found.recommended is None


@pytest.mark.parametrize(
    ("rate", "steps", "place"),
    [
        (1e-3, 10, "good"),
        (1e-5, 10, "too small"),
        (1e-5, 1000, "good"),
        (0.5, 1000, "too large"),
        (4e-3, 10, "good"),
        (7e-3, 10, "too large"),
        (2.5e-4, 10, "good"),
        (1.5e-4, 10, "too small"),
    ],
)
def test_place_of_a_rate(rate: float, steps: int, place: str) -> None:
    found = swept([4.0, 4.0, 3.0, 0.3, 0.1, 0.09, math.inf, math.inf, math.inf])
    assert found.place(rate, steps) == place


def test_given_rate_follows_the_scheduler() -> None:
    def adam(model: torch.nn.Module) -> Any:
        return torch.optim.Adam(model.parameters(), lr=1.0)

    def noam(optimizer: Any, total: int) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1e-3 * min(1.0, step / 10))

    module = torch.nn.Linear(2, 2)
    given = given_rate(Recipe(make_optimizer=adam, make_scheduler=noam, total_steps=50), module)
    assert isinstance(given, GivenRate)
    assert given.rate == pytest.approx(1e-3)
    assert given.steps == 50
    sgd = Recipe(make_optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1))
    assert given_rate(sgd, module) == "the recipe's optimizer is SGD, and the sweep is of AdamW"
    assert given_rate(None, module) == "no recipe was given"


@pytest.mark.parametrize("text", ["", "fast", "1e-5:1e-1", "1e-1:1e-5:3", "0:1:3", "1e-5:1e-1:1", "-1", "1e-5:inf:3"])
def test_bad_rates_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match="as in 1e-5:1e-1:12"):
        parse_rates(text)


def test_rates() -> None:
    assert parse_rates("1e-4:1e-2:3") == pytest.approx([1e-4, 1e-3, 1e-2])
    assert parse_rates("3e-4,1e-4") == [1e-4, 3e-4]


def test_text_without_a_tokenizer_is_read_by_characters() -> None:
    specimen = opened("plain")
    corpus = text_corpus(specimen, "abracadabra " * 20, "a.txt")
    assert "characters" in corpus.name
    assert len(set(corpus.ids.tolist())) == 6
    batch = corpus.batches(specimen, 2, 8)(0, 0)
    assert isinstance(batch, Batch)
    assert torch.equal(batch.ids[:, 1:], batch.targets[:, :-1])


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def sweep(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "lmconform", "sweep", *arguments],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip

    return run


PLAIN = f"{ROOT}/fixtures/subjects/plain.py:plain"


def test_command_shows_and_writes(sweep: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the cat sat on the mat and the dog sat on the log. " * 30)
    ran = sweep(
        PLAIN, "--rates", "1e-4:1e-1:4", "--seeds", "2", "--steps", "60", "--text", "text.txt",
        "--json", "out.json", "--png", "out.png",
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "4 rates x 2 seeds x 60 steps of AdamW on text.txt" in ran.stdout
    assert "vectorised, 8 members in 1 go" in ran.stdout
    assert "good range: " in ran.stdout
    assert "● median loss at the end" in ran.stdout
    data = json.loads((tmp_path / "out.json").read_text())
    assert {"rows", "good_range", "recommended", "mode", "reason"} <= set(data)
    assert [len(row["runs"]) for row in data["rows"]] == [2] * 4
    assert data["good_range"][0] <= data["recommended"] <= data["good_range"][1]
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_command_places_the_users_rate(sweep: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom lmconform import Subject\nfrom lmconform.recipe import Recipe\n"
        "from fixtures.subjects.plain import plain\n"
        "subject = Subject(plain, recipe=Recipe(learning_rate=1e-8, total_steps=200))\n"
    )
    ran = sweep("mine.py:subject", "--rates", "1e-3,1e-2", "--seeds", "1", "--sequential", "--json", "out.json")
    assert ran.returncode == 1, ran.stderr
    assert "sequential (asked for)" in ran.stdout
    assert "your own rate: 1e-08: too small, for a run of 200 steps" in ran.stdout
    data = json.loads((tmp_path / "out.json").read_text())
    assert data["given"] == {"rate": 1e-08, "steps": 200, "place": "too small"}
    assert (data["mode"], data["reason"]) == ("sequential", "asked for")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((PLAIN, "--rates", "fast"), "--rates 'fast' is not understood"),
        ((PLAIN, "--text", "none.txt"), "--text none.txt: there is no such file"),
        ((PLAIN, "--seeds", "0"), "--seeds 0: at least 1"),
        ((PLAIN, "--json", "no/such/out.json"), "is no folder that can be written to"),
        (("transformers:lama",), "did you mean 'llama'"),
    ],
)
def test_command_refuses_in_one_line(sweep: Callable[..., Any], arguments: tuple[str, ...], says: str) -> None:
    ran = sweep(*arguments)
    assert ran.returncode == 2
    assert says in ran.stderr
    assert "Traceback" not in ran.stderr
