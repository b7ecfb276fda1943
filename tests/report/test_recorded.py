"""What checks hand over to be drawn: the figures they decided by, at the places where the fault is."""

from __future__ import annotations

import math
from typing import Any

import pytest

import lmconform
from fixtures.faults.cache import keys_for_values
from fixtures.recipes import warmed
from fixtures.subjects.faulty import sees_one_token_ahead
from fixtures.subjects.plain import plain
from lmconform.charts import Curves, Map, curves, from_dict, table, to_dict
from lmconform.report.drawing import NOT_IN_XML, Artist, _cells, described


def charts_of(subject: Any, *checks: str, **options: Any) -> dict[tuple[str, str], Any]:
    report = lmconform.check_model(subject, select=list(checks), **options)
    assert {result.id for result in report.results} >= set(checks)
    return {(result.id, chart.title): chart for result in report.results for chart in result.charts}


def test_the_leak_map_is_empty_above_the_diagonal_of_a_sound_model_and_shows_a_leak_where_it_is() -> None:
    where = "causality.gradient", "Which token each position feels"
    sound, leaking = (charts_of(build, where[0])[where] for build in (plain, sees_one_token_ahead))
    for chart in (sound, leaking):
        assert all(chart.values[t][s] > 0 for t in range(len(chart.values)) for s in range(t + 1))
    ahead = {s - t for t, row in enumerate(leaking.values) for s, value in enumerate(row) if s > t and value > 0}
    assert min(ahead) == 1
    assert not any(value for t, row in enumerate(sound.values) for value in row[t + 1 :])
    assert "none of" in described(sound)
    assert "allowed, the largest" in described(leaking)


def test_errors_by_position_stay_under_the_bound_where_a_check_holds_and_cross_it_where_it_does_not() -> None:
    def wrong_values() -> Any:
        model = plain()
        keys_for_values(model)  # the first cached token's values are overwritten
        return model

    title = "Error by position"
    checks = "cache.chunks", "padding.left", "padding.right"
    sound, faulty = charts_of(plain, *checks), charts_of(wrong_values, *checks)
    for check in checks:
        chart = sound[check, title]
        assert chart.bound > 0
        assert 0 < max(chart.lines["largest difference"]) <= chart.bound
    (errors,) = faulty["cache.chunks", title].lines.values()
    assert errors[0] <= faulty["cache.chunks", title].bound < max(errors[1:])
    assert errors[0] < 1e-3 * max(errors)


def test_changes_of_the_future_make_a_map_of_both_positions() -> None:
    chart = charts_of(sees_one_token_ahead, "causality.no_future_leak")["causality.no_future_leak", "Error by position"]
    assert isinstance(chart, Map)
    over = [(t, seen) for t, row in enumerate(chart.values) for seen, value in enumerate(row) if value > chart.bound]
    assert (0, 0) in over
    assert all(seen <= t for t, seen in over)


def test_layers_rates_steps_and_shares_are_recorded() -> None:
    found = charts_of(
        lmconform.Subject(plain, recipe=warmed()), "scale.residual", "scale.attention", "gradients.magnitude",
        "training.schedule", "training.memorize", "training.lr_sweep", "collapse.tokens",
    )  # fmt: skip
    blocks = len(plain().blocks)
    assert [
        len(found[check, title].x)
        for check, title in (
            ("scale.residual", "Hidden-state RMS by layer"),
            ("scale.attention", "Attention entropy by layer"),
            ("gradients.magnitude", "Gradient norm by block"),
        )
    ] == [blocks + 1, blocks, blocks]
    schedule = found["training.schedule", "Learning rate by step"]
    assert schedule.lines["closed form"] == pytest.approx(schedule.lines["the optimizer's rate"], rel=1e-3)
    rates = found["training.lr_sweep", "Loss by learning rate"]
    assert rates.x[0] == pytest.approx(1e-5)
    assert rates.span[1] <= rates.marks["recommended"] <= rates.span[2]
    losses = found["training.memorize", "Loss while one sentence is learnt"].lines["loss"]
    assert losses[-1] < 0.1 < losses[0]
    shares = found["collapse.tokens", "Token shares over training"].lines
    assert all(0 <= value <= 1 for line in shares.values() for value in line)
    assert set(shares) >= {"most likely token", "most frequent one in the text"}


def test_beside_a_reference_sizes_and_entropies_are_those_of_both() -> None:
    found = charts_of(plain, "parity.scale", reference=plain)
    for title in ("Hidden-state RMS by layer", "Attention entropy by layer"):
        lines = found["parity.scale", title].lines
        assert lines["the model"] == lines["the reference"]
        assert all(value > 0 for value in lines["the model"])


# -- the charts themselves ---------------------------------------------------------------------------------------------

ODD: dict[str, Curves | Map] = {
    "all_zero": curves("zero", "x", "y", {"a": [0.0, 0.0]}, log="y", bound=1e-5),
    "all_zero_no_bound": curves("zero", "x", "y", {"a": [0.0, 0.0]}, log="xy", x=[1, 2]),
    "not_finite": curves("nan", "x", "y", {"a": [math.nan, math.inf, 1.0]}, log="y"),
    "nothing_finite": curves("nan", "x", "y", {"a": [math.nan, math.inf]}, bound=0.0),
    "no_bound_to_draw": curves("zero allowed", "x", "y", {"a": [0.0, 1e-8]}, log="y", bound=0.0),
    "one_point": curves("one", "x", "y", {"a": [1.0]}),
    "long": curves("long", "x", "y", {"a": list(range(10_000))}),
    "negative": curves("down", "x", "y", {"a": [-1.0, 2.0], "b": [0.0, -3.0]}),
    "empty_map": table("empty", "x", "y", [[0.0, 0.0], [0.0, 0.0]], future=True),
    "infinite_map": table("inf", "x", "y", [[0.0, math.inf], [math.nan, 1e-30]], bound=1.0),
    "infinite_bound": curves(
        "inf",
        "x",
        "y",
        {"a": [1.0, 2.0]},
        log="y",
        bound=math.inf,
        marks={"never": math.nan},
        span=("all", 0.0, math.inf),
    ),
    "formula": curves("$\\frac$", "$\\frac$", "$x_{", {"$\\alpha": [1.0, 2.0], "$": [1.0, 1.0]}, marks={"$\\q$": 1.0}),
    "control": curves("a\x00b", "c\x1bd", "e\x08", {"f\ud800\ufffe": [1.0, 2.0], "g": [1.0, 1.0]}),
    "markup": curves("<b>&", "<x>", "$y_1$ & \"'", {"<a>$x": [1.0, 2.0]}, bound=1.0, case="</svg><script>"),
}


@pytest.mark.parametrize("name", ODD)
def test_every_chart_can_be_drawn_described_and_kept(name: str) -> None:
    import json
    from xml.etree import ElementTree

    from lmconform.results import jsonable

    chart = ODD[name]
    svg = ElementTree.fromstring(Artist().svg(chart).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))
    assert svg.get("aria-label") == NOT_IN_XML.sub("", described(chart))
    kept = from_dict(json.loads(json.dumps(jsonable(to_dict(chart)))))
    assert repr(kept) == repr(chart)  # nan differs from itself


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: curves("t", "x", "y", {"a": [1.0, 2.0], "b": [1.0]}), "'t': \\['b'\\] with a value for each of 2 x"),
        (
            lambda: curves("t", "x", "y", {"a": range(1000), "b": range(999)}),
            "'t': \\['b'\\] with a value for each of 1000 x",
        ),
        (
            lambda: curves("t", "x", "y", {"a": range(1000)}, x=range(999)),
            "'t': \\['a'\\] with a value for each of 999 x",
        ),
        (lambda: curves("t", "x", "y", {"a": []}), "'t': no line with a value for each of 0 x"),
        (lambda: table("t", "x", "y", [[1.0], [1.0, 2.0]]), "'t': rows of \\[1, 2\\] values make no table"),
        (lambda: table("t", "x", "y", []), "'t': rows of \\[\\] values make no table"),
    ],
    ids=["other_length", "other_length_thinned", "other_length_of_x", "no_value", "ragged", "no_row"],
)
def test_figures_that_cannot_be_drawn_are_refused_when_they_are_handed_over(make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.parametrize("value", [5.0, -5.0, math.inf, math.nan], ids=str)
@pytest.mark.parametrize("place", [0, 1, 500, 777, 998])
def test_what_stands_out_at_one_place_of_a_long_line_is_kept_at_that_place(place: int, value: float) -> None:
    line = [math.sin(position) for position in range(999)]
    line[place] = value
    chart = curves("t", "x", "y", {"other": [0.5] * 999, "it": line})
    assert len(chart.x) <= 200
    shown = chart.lines["it"][chart.x.index(place)]
    assert shown == value or (math.isnan(shown) and math.isnan(value))


def test_long_lines_are_thinned_out_and_numbers_rounded() -> None:
    chart = ODD["long"]
    assert isinstance(chart, Curves)
    assert 150 < len(chart.x) <= 200
    assert chart.x == chart.lines["a"]
    assert (chart.x[0], chart.x[-1]) == (0.0, 9999.0)
    assert curves("t", "x", "y", {"a": [1 / 3]}).lines["a"] == (0.3333,)


def test_a_place_that_is_not_a_number_is_drawn_as_strongly_as_any() -> None:
    """Felt where it may be, at fault where it must not; the finite ones keep their own scale beside it."""
    values = [[1e-3, math.nan, 1e-6], [math.inf, 1.0, 0.0], [-math.inf, 0.0, 1e-2]]
    cells = _cells(table("t", "x", "y", values, future=True))
    assert cells[0, 1, 3] == cells[1, 0, 3] == cells[2, 0, 3] == cells[1, 1, 3] == 1.0
    assert 0.35 == cells[0, 2, 3] < cells[0, 0, 3] < cells[2, 2, 3] < 1.0
    assert cells[1, 2, 3] == cells[2, 1, 3] == 0.0
    assert (cells[0, 1, :3] == cells[0, 2, :3]).all()
    assert (cells[0, 1, :3] != cells[1, 0, :3]).any()


def test_names_are_shown_as_they_are() -> None:
    drawn = Artist().svg(ODD["formula"])
    assert ">$\\frac$<" in drawn
    assert "ab, e over cd" in Artist().svg(ODD["control"])
