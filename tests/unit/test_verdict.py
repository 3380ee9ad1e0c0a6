"""The verdict: leaks are never shared, noise is never good, rulers that disagree are named, and the docs have the rules."""

from pathlib import Path

import pytest

from lesiongen.evaluation.intervals import share
from lesiongen.evaluation.report import verdict
from lesiongen.evaluation.report.rule import as_markdown
from lesiongen.evaluation.report.rules import RULES
from tests.evaluations import complete, fig


def marks(metrics: dict, rule: str) -> list[str]:
    return [f["mark"] for f in verdict(metrics)["findings"] if f["rule"] == rule]


def sentence(metrics: dict, rule: str) -> str:
    return " ".join(f["sentence"] for f in verdict(metrics)["findings"] if f["rule"] == rule)


def test_a_clean_run_may_be_used():
    found = verdict(complete())
    assert found["overall"] == "use"
    assert {f["mark"] for f in found["findings"] if f["topic"] == "privacy"} == {"good"}
    assert {f["rule"] for f in found["findings"]} == {rule.name for rule in RULES} - {"rulers", "drawings", "polish"}


def leak_by_copies(metrics):
    metrics["gate"] = None
    metrics["privacy"]["copies"]["kinds"]["features"]["rate"] = fig(0.04, 0.03, 0.055)


def leak_before_the_gate(metrics):
    metrics["gate"]["before"]["copies"]["pixels"] = fig(0.04, 0.03, 0.055)


def leak_of_one_sample(metrics):
    metrics["privacy"]["copies"]["kinds"]["codes top"]["least"] = 0.1


def leak_by_membership(metrics):
    metrics["privacy"]["membership"]["scores"]["contrast top"] = {
        "auc": fig(0.7, 0.65, 0.75),
        "tpr_at_1_fpr": fig(0.01, 0, 0.02),
    }


def leak_by_certain_members(metrics):
    metrics["privacy"]["membership"]["scores"]["contrast top"] = {
        "auc": fig(0.5, 0.48, 0.52),
        "tpr_at_1_fpr": fig(0.1, 0.06, 0.2),
    }


def leak_by_extraction(metrics):
    metrics["privacy"]["extraction"]["gain"] = fig(0.2, 0.15, 0.25)


def leak_by_exact_completions(metrics):
    metrics["privacy"]["extraction"]["exact"] = {"members": 30, "non_members": 1}


LEAKS = [
    leak_by_copies,
    leak_before_the_gate,
    leak_of_one_sample,
    leak_by_membership,
    leak_by_certain_members,
    leak_by_extraction,
    leak_by_exact_completions,
]


@pytest.mark.parametrize("plant", LEAKS, ids=lambda plant: plant.__name__)
def test_a_leak_is_not_shared(plant):
    metrics = complete()
    plant(metrics)
    found = verdict(metrics)
    assert found["overall"] == "do not share"
    assert [f["topic"] for f in found["findings"] if f["mark"] == "poor"] == ["privacy"]


def test_a_small_leak_is_named():
    metrics = complete()
    metrics["privacy"]["membership"]["scores"]["reference all"]["auc"] = fig(0.54, 0.51, 0.57)
    assert verdict(metrics)["overall"] == "caution"
    assert "reference all" in sentence(metrics, "membership")


def test_copies_are_compared_with_held_out_images_that_are_few_too():
    """24 of 1,008 samples against 9 of 875 held-out images (p = 0.03): more than chance, but few images either way."""
    metrics = complete()
    metrics["gate"] = None
    kind = metrics["privacy"]["copies"]["kinds"]["codes top"]
    kind["rate"], kind["held_out_rate"] = share(24, 1008), share(9, 875)
    assert verdict(metrics)["overall"] == "caution"
    assert "2.4 % of the samples count as copies, and 1.0 % of the unrelated" in sentence(metrics, "copies")
    kind["held_out_rate"] = share(1, 100)
    assert verdict(metrics)["overall"] == "caution"
    kind["rate"] = share(60, 1008)
    assert verdict(metrics)["overall"] == "caution"  # 100 held-out images do not tell 6 % from chance
    kind["held_out_rate"] = share(9, 875)
    assert verdict(metrics)["overall"] == "do not share"


@pytest.mark.parametrize(
    ("flips", "mark"), [((-0.03, -0.05, -0.01), "good"), ((0.02, 0.01, 0.04), "fair"), ((0.1, 0.07, 0.13), "poor")]
)
def test_a_polished_decoder_that_invents_diagnoses_is_named(flips, mark):
    metrics = complete()
    metrics["classifier"] |= {"flips_before_polish": fig(0.2, 0.18, 0.22), "flips_by_polish": fig(*flips)}
    metrics["tokenizer"] |= {"psnr": 33.2, "psnr_before_polish": 33.9}
    assert marks(metrics, "polish") == [mark]
    assert "PSNR by −0.7 dB" in sentence(metrics, "polish") and "20 %" in sentence(metrics, "polish")


def test_few_images_prove_nothing():
    metrics = complete()
    metrics["privacy"]["membership"]["scores"] = {"likelihood top": {"auc": fig(0.5, 0.3, 0.7), "tpr_at_1_fpr": fig(0, 0, 0.3)}}
    metrics["gate"] = None
    metrics["privacy"]["copies"]["kinds"]["pixels"]["rate"] = fig(0.0, 0.0, 0.04)
    assert verdict(metrics)["overall"] == "caution"
    assert marks(metrics, "membership") == marks(metrics, "accusations") == ["fair"]
    assert marks(metrics, "copies")[0] == "fair"


@pytest.mark.parametrize("key", ["copies", "membership", "extraction"])
def test_privacy_that_was_not_measured_is_not_praised(key):
    metrics = complete()
    metrics["privacy"][key] = {"reason": "the codes of held-out images have another draw"}
    found = verdict(metrics)
    assert found["overall"] == "caution"
    assert any(f["mark"] == "none" and "another draw" in f["sentence"] for f in found["findings"])


def test_nothing_measured_is_caution():
    found = verdict({})
    assert found["overall"] == "caution"
    assert {f["mark"] for f in found["findings"]} == {"none"}


def test_values_that_may_be_noise_are_not_good():
    metrics = complete()
    metrics["diversity"]["all"]["ratio"] = fig(1.1, 0.8, 1.4)
    pairs = metrics["likeness"]["rulers"]["imagenet"]["all"]
    pairs["both"]["recall"] = fig(0.9, 0.5, 1.0)
    pairs["both"]["kid"] = fig(0.3, -1.0, 4.0)
    metrics["classifier"]["balanced_accuracy"]["samples"] = fig(0.85, 0.6, 0.95)
    for gain in metrics["utility"]["gain"].values():
        gain["balanced_accuracy"] = fig(0.04, -0.01, 0.09)
    for rule in ("diversity", "variety", "distance", "class", "gain"):
        assert marks(metrics, rule) == ["fair"], rule


def test_a_value_without_an_interval_is_not_good():
    metrics = complete()
    metrics["diversity"]["all"]["ratio"] = fig(1.0, None, None)
    assert marks(metrics, "diversity") == ["fair"]


def test_gains_of_most_sizes_decide():
    metrics = complete()
    gains = metrics["utility"]["gain"]
    gains["10"]["balanced_accuracy"] = fig(0.0, -0.02, 0.02)
    assert marks(metrics, "gain") == ["good"]
    gains["30"]["balanced_accuracy"] = fig(0.0, -0.02, 0.02)
    assert marks(metrics, "gain") == ["fair"]
    for gain in gains.values():
        gain["balanced_accuracy"] = fig(-0.05, -0.08, -0.02)
    assert marks(metrics, "gain") == ["poor"]
    assert verdict(metrics)["overall"] == "caution"


def test_rulers_that_disagree_are_named():
    metrics = complete()
    metrics["likeness"]["rulers"]["lesions"]["all"]["both"]["kid"] = fig(40, 35, 45)
    assert marks(metrics, "distance") == ["good"]
    assert "poor by lesions" in sentence(metrics, "rulers") and "good by imagenet" in sentence(metrics, "rulers")


def test_the_larger_part_is_blamed_only_if_the_intervals_are_apart():
    metrics = complete()
    pairs = metrics["likeness"]["rulers"]["imagenet"]["all"]
    assert "Most of it is the tokenizer's" in sentence(metrics, "blame")
    pairs["prior"]["kid"] = fig(5, 4, 6)
    assert "Most of it is the prior's" in sentence(metrics, "blame")
    pairs["tokenizer"]["kid"] = fig(4, 3, 5)
    assert "cannot be told" in sentence(metrics, "blame")


def test_a_diagnosis_that_samples_do_not_show_is_named():
    metrics = complete()
    metrics["classifier"]["recall"]["mel"]["samples"] = fig(0.1, 0.05, 0.2)
    assert marks(metrics, "class") == ["good"] and marks(metrics, "classes") == ["poor"]
    assert "melanoma (mel)" in sentence(metrics, "classes") and "naevus" not in sentence(metrics, "classes")


def test_diversity_means_little_without_the_diagnosis():
    metrics = complete()
    metrics["classifier"]["balanced_accuracy"]["samples"] = fig(0.2, 0.18, 0.22)
    assert (marks(metrics, "class"), marks(metrics, "diversity")) == (["poor"], ["none"])


def test_a_blind_classifier_judges_nothing():
    metrics = complete()
    metrics["classifier"]["balanced_accuracy"]["real"] = fig(0.2, 0.18, 0.22)
    assert marks(metrics, "class") == ["none"]


def test_priors_and_tokenizer():
    metrics = complete()
    metrics["priors"]["top"] = {"bits_per_token": 6.0, "train_bits_per_token": 3.0, "bigram_bits": 5.0, "uniform_bits": 8.0}
    metrics["classifier"]["flips"] = fig(0.4, 0.35, 0.45)
    assert marks(metrics, "bigram") == ["poor", "good"]
    assert marks(metrics, "memorising") == ["fair", "good"]
    assert marks(metrics, "flips") == ["poor"]


def test_drawings_licences_and_splits():
    metrics = complete()
    metrics["data"] |= {"attributions": {"lesiongen phantom": 9}, "licences": {"": 2, "CC-0": 7}, "lesions_in_two_splits": 2}
    assert (marks(metrics, "drawings"), marks(metrics, "licence"), marks(metrics, "splits")) == (["fair"], ["fair"], ["poor"])
    metrics = complete()
    metrics["data"]["attributions"] = {"lesiongen phantom": 9}
    assert verdict(metrics)["overall"] == "caution"


def test_every_rule_has_a_reason_and_its_row_in_the_docs():
    assert all(rule.why for rule in RULES)
    docs = (Path(__file__).parents[2] / "docs" / "report.md").read_text()
    assert as_markdown(RULES) in docs, "run: python -m lesiongen.evaluation.report, and put the table into docs/report.md"
