"""Facts: their vocabularies, the facts that are drawn for samples, and guidance that rises over the tokens."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from hpc.config import from_plain
from hpc.errors import UserError
from lesiongen.data.facts import PriorFacts, count_combinations, vocabularies
from lesiongen.experiment import PriorConfig, SampleConfig
from lesiongen.priors.sampling import guidance
from lesiongen.stages.sample import draw_facts

STORE = SimpleNamespace(  # stands for a CodeStore
    folder="codes",
    manifest={"vocabularies": {"label": ["mel", "nv"], "sex": ["female", "male"], "site": [], "age_band": ["0-19", "80+"]}},
    all=lambda split, draw, names: {n: COLUMNS[n] for n in names},
)
# Four images of mel, three of them of women above 80, and four of nv, one of them with unknown sex.
COLUMNS = {
    "label": np.array([0, 0, 0, 0, 1, 1, 1, 1], dtype=np.int16),
    "sex": np.array([0, 0, 0, 1, 1, 1, 1, -1], dtype=np.int16),
    "age_band": np.array([1, 1, 1, 0, 0, 0, 0, 0], dtype=np.int16),
}


def prior(*names: str) -> PriorFacts:
    """Returns the facts of a prior that was trained on STORE and is conditioned on these facts."""
    return PriorFacts(vocabularies(STORE, names), count_combinations(STORE, names))


def test_a_fact_that_no_image_has_is_refused_by_name():
    assert vocabularies(STORE, ["label", "sex"]) == {"label": ["mel", "nv"], "sex": ["female", "male"]}
    with pytest.raises(UserError, match=r"code store codes has a 'site'.*Available facts: label, sex, age_band"):
        vocabularies(STORE, ["site"])
    without = SimpleNamespace(folder="codes", manifest={"vocabularies": {"label": []}})
    assert vocabularies(without, ["label"]) == {"label": []}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"facts": ["dx"]}, "unknown fact 'dx'; choose among label, site, sex, age_band"),
        ({"facts": ["sex", "sex"]}, "name a fact twice"),
    ],
)
def test_a_priors_facts_are_checked(given, message):
    with pytest.raises(UserError, match=message):
        from_plain(PriorConfig, given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"facts": {"label": "mel"}}, "sample.labels"),
        ({"levels": {"top": {"temperature": 0}}}, "temperature above 0"),
        ({"levels": {"top": {"number": 3}}}, "Unknown key 'levels.top.number'"),
        ({"guidance_schedule": "rising"}, "choose one of constant, linear, cosine"),
    ],
)
def test_a_samplers_settings_are_checked(given, message):
    with pytest.raises(UserError, match=message):
        from_plain(SampleConfig, given)


def test_a_level_may_have_settings_of_its_own():
    own = from_plain(SampleConfig, {"temperature": 0.9, "guidance": 2, "levels": {"top": {"temperature": 0.5, "top_k": 10}}})
    top, bottom = own.at("top"), own.at("bottom")
    assert (top.temperature, top.top_k, top.guidance) == (0.5, 10, 2.0)
    assert (bottom.temperature, bottom.top_k) == (0.9, 0)


def test_open_facts_are_drawn_together_from_images_of_the_label():
    wanted = draw_facts(SampleConfig(labels=("mel",), number=2000), [prior("label", "sex", "age_band")])
    counts = Counter((w["label"], w["sex"], w["age_band"]) for w in wanted)
    assert set(counts) == {("mel", "female", "80+"), ("mel", "male", "0-19")}
    assert counts["mel", "female", "80+"] / 2000 == pytest.approx(0.75, abs=0.04)
    assert {w["sex"] for w in draw_facts(SampleConfig(labels=("nv",), number=200), [prior("label", "sex")])} == {"male", ""}
    # The facts of a sample do not depend on the number of samples.
    assert draw_facts(SampleConfig(labels=("mel",), number=50), [prior("label", "sex", "age_band")]) == wanted[:50]


def test_given_facts_hold_and_the_others_follow_them():
    wanted = draw_facts(SampleConfig(labels=("mel",), facts={"sex": "male"}, number=20), [prior("label", "sex", "age_band")])
    assert {(w["sex"], w["age_band"]) for w in wanted} == {("male", "0-19")}
    # No image shows nv of a woman, so the open facts are drawn from all images of nv.
    wanted = draw_facts(SampleConfig(labels=("nv",), facts={"sex": "female"}, number=20), [prior("label", "sex", "age_band")])
    assert {(w["sex"], w["age_band"]) for w in wanted} == {("female", "0-19")}
    wanted = draw_facts(SampleConfig(labels=("mel",), facts={"sex": ""}, number=5), [prior("label", "sex")])
    assert {w["sex"] for w in wanted} == {""}


def test_levels_may_know_other_facts():
    """Facts that only the finer level uses are drawn to fit the facts that were drawn for the coarser level."""
    top, bottom = prior("label", "sex"), prior("age_band", "sex")
    wanted = draw_facts(SampleConfig(labels=("mel",), number=300), [top, bottom])
    assert {(w["sex"], w["age_band"]) for w in wanted} == {("female", "80+"), ("male", "0-19")}
    assert top.numbers(wanted[0] | {"sex": "male"}) == [0, 1]
    assert bottom.numbers({"label": "mel", "sex": "male", "age_band": ""}) == [-1, 1]


def test_facts_go_with_the_label_though_the_first_level_does_not_know_it():
    wanted = draw_facts(SampleConfig(labels=("nv",), number=200), [prior("sex"), prior("label", "sex")])
    assert {w["sex"] for w in wanted} == {"male", ""}, "no image shows nv of a woman"


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"site": "back"}, "not trained with 'site'. Facts that they know: sex"),
        ({"sex": "f"}, "'f' is not a known value of sex; choose among female, male"),
    ],
)
def test_unknown_facts_of_samples_are_named(facts, message):
    with pytest.raises(UserError, match=message):
        draw_facts(SampleConfig(facts=facts), [prior("label", "sex")])


def test_without_labels_or_facts_there_is_nothing_to_plan():
    unlabelled = PriorFacts({"label": []}, ["-1 8"])
    assert draw_facts(SampleConfig(number=2), [unlabelled]) == [{"label": ""}] * 2
    assert unlabelled.numbers({"label": ""}) == [-1]
    assert draw_facts(SampleConfig(number=1), [PriorFacts({}, [])]) == [{"label": ""}]
    with pytest.raises(UserError, match="Unknown label 'mel'"):
        draw_facts(SampleConfig(number=1, labels=("mel",)), [PriorFacts({}, [])])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_guidance_rises_from_none_to_all(schedule):
    strengths = [guidance(3.0, schedule, 64)(t) for t in range(64)]
    assert strengths[0] == 1
    assert strengths[-1] == pytest.approx(3)
    assert strengths == sorted(strengths)
    assert sum(strengths) / 64 == pytest.approx(2)
    assert {guidance(1.0, schedule, 64)(t) for t in range(64)} == {1.0}
    assert guidance(2.5, "constant", 64)(0) == guidance(2.5, "constant", 64)(63) == 2.5


def test_a_class_without_training_images_is_left_out_and_refused(capsys):
    """The class may come from held-out images alone."""
    values = {"label": ["mel", "mastocytosis", "nv"]}
    trained = PriorFacts(values, ["0 4", "2 3"])
    assert {w["label"] for w in draw_facts(SampleConfig(number=30), [trained])} == {"mel", "nv"}
    assert "no training image has the label mastocytosis; no samples are made of it" in capsys.readouterr().out
    with pytest.raises(UserError, match="No training image has the label 'mastocytosis'"):
        draw_facts(SampleConfig(number=30, labels=("mastocytosis",)), [trained])
