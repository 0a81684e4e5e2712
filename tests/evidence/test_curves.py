"""Curves of made-up runs, compared by hand."""

import random

import pytest

from . import curves, plot, report, sections
from .plan import COMMON


def run(name, seed, rate, spots, method="sara"):
    """A run whose losses on old styles and on what is learned are these by strength, from the base's 1 and 5."""
    losses = {
        strength: {"new": new, "shown": new / 2, **dict.fromkeys(curves.BASE_STYLES, old)}
        for strength, (old, new) in spots.items()
    }
    return {"name": name, "seed": seed, "rate": rate, "method": method, "losses": losses}


def straight(name, rate, old, new, seed=0):
    """A run whose losses go straight from the base's to these."""
    halfway = ((1 + old) / 2, (5 + new) / 2)
    return run(name, seed, rate, {"0.5": halfway, "1.0": (old, new)})


BASE = run("base", 0, 0, {"0": (1.0, 5.0)}, "none")
RUNS = [
    BASE,
    straight("ours", 1e-4, 1.2, 3.0),  # 2 learned for 0.2 forgotten
    straight("ours", 2e-4, 1.8, 1.0),  # 4 for 0.8, beaten below 3
    straight("LoRA r8", 1e-3, 1.4, 1.0),  # 4 for 0.4
]


def test_a_curve_is_the_best_of_all_rates_and_strengths():
    (ours,) = curves.curves_of(RUNS)["ours"].values()
    near = {"abs": 0.03}  # a step of the strength
    assert curves.learned_at(ours, 0.1)[1:] == (pytest.approx(4.0, **near), 1e-4)
    assert curves.learned_at(ours, 0.3)[1:] == (pytest.approx(3.0, **near), 1e-4)
    assert curves.learned_at(ours, 0.6)[1:] == (pytest.approx(2.0, **near), 2e-4)
    assert curves.learned_at(ours, 9.0)[1:] == (pytest.approx(1.0, **near), 2e-4)
    assert curves.learned_at(ours, 0.0)[1] == 5.0
    assert curves.forgotten_at(ours, 3.5) == pytest.approx(0.15, abs=0.003)
    assert curves.forgotten_at(ours, 0.5) is None
    (shown,) = curves.curves_of(RUNS, "shown")["ours"].values()
    assert curves.learned_at(shown, 0.1)[1] == pytest.approx(2.0, **near)


def test_between_measured_strengths_a_curve_bends_as_they_do():
    spots = {str(s): (1 + 0.2 * s**2, 5 - s**2 / 2) for s in (0.25, 0.5, 0.75, 1.0, 1.25)}
    (curve,) = curves.curves_of([BASE, run("ours", 0, 1e-4, spots)])["ours"].values()
    assert curves.learned_at(curve, 0.2 * 0.6**2 + 1e-9)[1] == pytest.approx(5 - 0.6**2 / 2)


def test_one_more_rate_never_makes_a_method_worse():
    chance = random.Random(0)
    runs = [BASE]
    before = None
    for rate in range(1, 6):
        old, new = 1 + chance.random(), 1 + 4 * chance.random()
        spots = {"0.5": (1 + (old - 1) * chance.random(), (5 + new) / 2), "1.0": (old, new)}
        runs.append(run("ours", 0, rate, spots))
        (curve,) = curves.curves_of(runs)["ours"].values()
        found = [curves.learned_at(curve, level / 50) for level in range(50)]
        assert before is None or all(b[1] <= a[1] for a, b in zip(before, found, strict=True))
        before = found


def test_a_method_is_compared_with_the_reference_at_equal_forgetting():
    found = curves.curves_of(RUNS)
    reference = found["LoRA r8"]
    levels = curves.levels_of(reference, (0.25, 0.5, 1.0))
    assert levels == pytest.approx([0.1, 0.2, 0.4], abs=0.003)
    # 4.0 beside 4.0; 3.0 beside 3.0; 3 - 2 * (0.4 - 0.4) / 0.4 = 3.0 beside 1.0
    expected = (0 + 0 + (1 - 3.0 / 1.0)) / 3
    assert curves.advantage(found["ours"], reference, levels) == {
        0: pytest.approx(expected, abs=0.05)
    }
    assert curves.advantage({1: found["ours"][0]}, reference, levels) == {}
    # three quarters of 4 are learned at 2.0, where ours has forgotten 0.6 and the reference 0.3
    assert curves.forgets(found["ours"], reference) == "+100%"
    assert curves.forgets(reference, found["ours"]) == "-50%"


def test_what_forgets_less_than_nothing_forgets_nothing():
    runs = [BASE, straight("LoRA r8", 1e-3, 0.9, 4.0), straight("LoRA r8", 2e-3, 1.4, 1.0)]
    reference = curves.curves_of(runs)["LoRA r8"]
    assert curves.learned_at(reference[0], 0.0)[1] == 4.0
    assert curves.loss_where_learned(reference[0], 0.5) == 3.0  # of 5 to 1
    assert curves.levels_of(reference, (0.25, 0.5)) == pytest.approx([0.0, 0.2], abs=0.003)
    assert curves.forgets(reference, reference) == "+0%"
    worse = curves.curves_of([BASE, straight("LoRA r8", 1e-3, 1.5, 6.0)])["LoRA r8"]
    assert curves.levels_of(worse, (0.5, 1.0)) == [0.0, 0.0]
    assert curves.forgets(worse, worse) == ""


def test_seeds_without_the_base_are_left_out():
    found = curves.curves_of([*RUNS, straight("ours", 1e-4, 1.2, 3.0, seed=1)])
    assert found["ours"].keys() == {0}


def test_what_is_never_learned_is_told():
    runs = [*RUNS, straight("less", 1e-4, 1.1, 2.5)]
    found = curves.curves_of(runs)
    assert curves.forgets(found["less"], found["LoRA r8"]) == "never learns it"


def test_the_interval_is_students():
    # spread 1 of three values: 2.920 / sqrt(3); tables of Student's distribution, 2 degrees, 90 %
    assert curves.half_width([1.0, 2.0, 3.0]) == pytest.approx(1.6859, abs=1e-4)


def test_losses_are_drawn_beside_the_references():
    found = plot.beside(curves.curves_of(RUNS), "LoRA r8")
    assert found["LoRA r8"] == [(share, 0.0) for share in curves.LEARNED]
    learned = dict(found["ours"])
    assert learned[curves.LEARNED[0]] == pytest.approx(0.0, abs=1.0)
    assert learned[curves.LEARNED[-1]] == pytest.approx(200.0, abs=8.0)


def test_the_table_tells_the_best_rate_and_what_is_shown():
    lines = report.methods_table(RUNS, "LoRA r8")
    assert "| +10% | +20% | +30% | +36% | +40% |" in lines[0]
    ours = lines[2].split(" | ")
    assert ours[-1] == "0.0001, the lowest tried |"  # where 0.3 is forgotten
    assert ours[-2] == "+100%"


def test_values_of_two_seeds_are_both_told():
    two = [
        *RUNS,
        {**BASE, "seed": 1},
        straight("ours", 1e-4, 1.4, 1.0, seed=1),
        straight("LoRA r8", 1e-3, 1.4, 1.0, seed=1),
    ]
    told = report.methods_table(two, "LoRA r8")[2].split(" | ")[7]
    assert told.endswith(", +0.0%)")


def test_the_report_leaves_what_was_written_by_hand(tmp_path):
    losses = {"new": 0.5, "shown": 0.4, "twemoji": 0.1, "noto": 0.1, "fluent": 0.1}
    common = {"base": "b", "style": "s", "pictures": 1, "steps": 1, "batch": 1, "seed": 0}
    runs = [{**common, "method": "none", "name": "base", "losses": {"0": losses}}]
    for name, new in (("LoRA r8", 0.3), ("SaRA", 0.2)):
        learned = {**losses, "new": new, "noto": 0.4}
        runs.append({**common, "method": "m", "name": name, "rate": 1e-3, "trained": 1e6, "losses": {"1.0": learned}})  # fmt: skip
    file = tmp_path / "evidence.md"
    report.write({"First": runs}, runs, tmp_path)
    text = file.read_text()
    assert "| SaRA | 1.00 M | 0.001 | 1 | 0.2000 | 0.4000 | +100% |" in text
    file.write_text(text.replace(report.TITLE, "# Mine\n\nBy hand.") + "\nBelow.\n")
    report.write({"Second": runs}, runs, tmp_path)
    text = file.read_text()
    assert text.startswith("# Mine\n\nBy hand.\n\n" + report.BEGIN)
    assert text.endswith(report.END + "\n\nBelow.\n")
    assert "## Second" in text
    assert "## First" not in text


def test_two_styles_in_one_model_are_told_by_method():
    def mix(first, second, old=0.1):
        looks = {"distance": 100 * first, "top-1": second}
        losses = {"s": first, "t": second, **dict.fromkeys(curves.BASE_STYLES, old)}
        return {"losses": losses, "likeness": {"s": looks, "t": looks}}

    common = {"base": "b", "style": "s", "other": "t", "pictures": 1, "steps": 2, "seed": 0}
    base = {**common, "method": "none", "name": "base", "rate": 0, "mixes": {"base": mix(0.9, 0.8)}}
    mixes = {
        "s alone": mix(0.1, 0.8), "t alone": mix(0.9, 0.2), "s at 0.6": mix(0.3, 0.8),
        "t at 0.6": mix(0.9, 0.4), "together": mix(0.5, 0.6, old=0.7),
    }  # fmt: skip
    ours = {**common, "method": "m", "name": "ours", "rate": 0.5, "mixes": mixes}
    lines = sections.merging_section("Both", [base, ours])
    assert lines[-2] == (
        "| ours | 0.5 | 1 | 0.1000 | 0.3000 | 0.5000 | 10 | 30 | 50 | 80% | 80% | 60% "
        "| 0.2000 | 0.4000 | 0.6000 | 90 | 90 | 50 | 20% | 40% | 60% | 0.7000 |"
    )
    assert lines[-3].startswith("| base |  | 1 | 0.9000 | 0.9000 | 0.9000 | 90 | 90 | 90 |")
    assert lines[-3].count("|") == lines[-4].count("|") == lines[-5].count("|")


def test_weights_at_zero_are_told_by_share():
    def zeroed(seed, loss):
        values = {"0.0": 0.1, "0.5": loss}
        found = {share: dict.fromkeys(curves.BASE_STYLES, v) for share, v in values.items()}
        return {"base": "b", "name": "random", "method": "zero", "seed": seed, "zeroed": found}

    lines = sections.zeroing_section("Zero", [zeroed(0, 0.4), zeroed(1, 0.6)])
    assert lines[-4:-1] == [
        "| base | weights | 0% | 50% |", "|---|---|---|---|", "| b | random | 0.1000 | 0.5000 |",
    ]  # fmt: skip


def test_costs_are_told_beside_what_is_forgotten_for_as_much():
    common = {**COMMON, "base": "b"}
    every = [{**common, **made} for made in RUNS]
    cost = {"peak_bytes": 2e6, "step_seconds": 0.5, "file_bytes": 3e6}
    runs = [
        {**common, "name": name, "method": "m", "trained": 1e6, "costing": True, "cost": cost}
        for name in ("LoRA r8", "ours")
    ]
    lines = sections.costing_section("Costs", runs, every)
    costs = "1.00 M | 2 MB | 0.50 s | 3.0 MB"
    assert lines[-3:] == [f"| LoRA r8 | {costs} | +0% |", f"| ours | {costs} | +100% |", ""]
    assert sections.costing_section("Costs", runs, [])[-2] == f"| ours | {costs} |  |"


def test_what_is_forgotten_of_a_subjects_relatives_is_told():
    losses = {"new": 0.5, "shown": 0.4, **dict.fromkeys(curves.BASE_STYLES, 0.1), "relatives": 0.2}
    facts = {"name": "ours", "rate": 0.5, "seed": 0, "trained": 1e6}
    runs = [
        {"method": "none", "seed": 0, "losses": {"0": losses}},
        {**facts, "method": "m", "losses": {"1.0": {**losses, "new": 0.3, "relatives": 0.25}}},
    ]
    assert report.settings_table(runs)[-1].endswith("| 0.3000 | 0.4000 | +0% | +25% |")
