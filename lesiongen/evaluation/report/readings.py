"""Readings: the numbers of metrics.json that the verdict's rules judge, each with its interval and what a sentence says of it.

A reader takes all metrics and returns readings, or raises NotMeasured with the reason. `rules.py` says which rule reads what.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from lesiongen.evaluation.card import statement
from lesiongen.evaluation.intervals import Figure, difference, wilson
from lesiongen.evaluation.report.words import diagnosis, kind_name, percent

NOT_MEASURED = "the evaluation did not measure it"


class NotMeasured(Exception):
    """Something was not measured. The text is the reason, one plain sentence."""


@dataclass(frozen=True)
class Reading:
    """One judged number.

    Attributes:
        value, low, high: The number and its 95 % interval. `low` and `high` are None if no interval could be computed.
        what: What was read, such as a kind of copy or a class.
        facts: More fields for the rule's sentences.
        mark: The mark, where it does not follow from limits.
        alarm: A sentence about why the mark is "poor" whatever the limits say.
    """

    value: float
    low: float | None
    high: float | None
    what: str = ""
    facts: dict[str, str] = field(default_factory=dict)
    mark: str | None = None
    alarm: str = ""


def why_missing(part: Any) -> str | None:
    """Returns why a part of metrics.json was not measured, or None if it was."""
    if part is None or part == {}:
        return NOT_MEASURED
    return part.get("reason") or None if isinstance(part, dict) else None


def measured(metrics: dict, *keys: str) -> Any:
    """Returns metrics[key][key]….

    Raises:
        NotMeasured: A part on the way is missing or states a reason.
    """
    part: Any = metrics
    for key in keys:
        part = part.get(key)
        if reason := why_missing(part):
            raise NotMeasured(reason)
    return part


def read(figure: Figure | None, what: str = "", base: float = 1.0, shift: float = 0.0) -> Reading:
    """Reads a figure, as (value − shift) / base.

    Args:
        figure: The figure.
        what: Of what.
        base: What the figure is divided by, above 0.
        shift: What is taken off first.

    Raises:
        NotMeasured: The figure has no value.
    """
    if figure is None or figure.get("value") is None:
        raise NotMeasured(NOT_MEASURED)
    value, low, high = (
        (figure[key] - shift) / base if figure.get(key) is not None else None for key in ("value", "low", "high")
    )
    return Reading(value, low, high, what)


def main_ruler(likeness: dict) -> str:
    """Returns the ruler by which likeness is judged: the first one that was not learned on lesions alone."""
    return next((name for name in likeness["rulers"] if name != "lesions"), next(iter(likeness["rulers"]), ""))


def _pairs(metrics: dict, ruler: str | None = None) -> dict[str, dict]:
    likeness = measured(metrics, "likeness")
    measured(likeness, "rulers")
    return measured(likeness, "rulers", ruler or main_ruler(likeness), "all")


def distance_of(metrics: dict, ruler: str) -> Reading:
    """Reads the KID of samples by one ruler, in multiples of the upper bound of the floor."""
    pairs = _pairs(metrics, ruler)
    floor = read(measured(pairs, "floor", "kid"))
    scale = floor.high if floor.high is not None else floor.value
    # The KID of two sets of one distribution may be estimated as 0 or less. 0.1 is below what 50 draws of 200 can tell from 0.
    return read(measured(pairs, "both", "kid"), ruler, max(scale, 0.1))


def distance(metrics: dict) -> list[Reading]:
    """Reads the distance of samples to real images by the main ruler."""
    return [distance_of(metrics, main_ruler(measured(metrics, "likeness")))]


def blame(metrics: dict) -> list[Reading]:
    """Reads the tokenizer's part of the distance: its KID over the sum of its KID and the prior's."""
    pairs = _pairs(metrics)
    tokenizer, prior = (read(measured(pairs, pair, "kid")) for pair in ("tokenizer", "prior"))
    parts = [max(0.0, tokenizer.value), max(0.0, prior.value)]
    if not sum(parts):
        return [Reading(0.5, None, None, mark="good", facts={"who": "There is no distance to explain"})]
    who = "Which of the two has the larger part cannot be told: their intervals overlap"
    if _above(tokenizer, prior):
        who = "Most of it is the tokenizer's: a better tokenizer would help most"
    elif _above(prior, tokenizer):
        who = "Most of it is the prior's: a better or longer trained prior would help most"
    return [Reading(parts[0] / sum(parts), None, None, mark="fair", facts={"who": who})]


def _above(a: Reading, b: Reading) -> bool:
    return a.low is not None and b.high is not None and a.low > b.high


def relative_to_floor(metrics: dict, figure: str) -> list[Reading]:
    """Reads recall or coverage of the samples, as a share of what real images reach."""
    pairs = _pairs(metrics)
    floor = read(measured(pairs, "floor", figure))
    if floor.value <= 0:
        raise NotMeasured("Real images do not cover one another either, so there is no floor to compare with")
    return [read(measured(pairs, "both", figure), base=floor.value)]


def class_recognised(metrics: dict) -> list[Reading]:
    """Reads the classifier's accuracy above chance on samples, as a share of that on real held-out images."""
    classifier = measured(metrics, "classifier")
    accuracy, chance = measured(classifier, "balanced_accuracy"), classifier["chance"]
    real, samples = read(accuracy.get("real")), read(accuracy.get("samples"))
    if real.value < chance + 0.1:
        raise NotMeasured("The classifier hardly recognises real images either, so it cannot judge samples")
    facts = {"samples": percent(samples.value), "real": percent(real.value), "chance": percent(chance)}
    return [replace(read(accuracy["samples"], base=real.value - chance, shift=chance), facts=facts)]


def each_class_recognised(metrics: dict) -> list[Reading]:
    """Reads for each class the share of samples that are recognised, relative to real held-out images of the class."""
    readings = []
    for name, sources in measured(metrics, "classifier", "recall").items():
        real = sources.get("real")
        if real and real.get("value") and sources.get("samples"):
            readings.append(read(sources["samples"], diagnosis(name), base=real["value"]))
    if not readings:
        raise NotMeasured("No class has both samples and real images that the classifier recognises")
    return readings


def diversity(metrics: dict) -> list[Reading]:
    """Reads the spread of samples within a class, relative to real images."""
    return [read(measured(metrics, "diversity", "all").get("ratio"))]


def gains(metrics: dict) -> list[Reading]:
    """Reads, for each number of real images, what samples add to training: mixed minus augmented."""
    found = measured(metrics, "utility", "gain")
    return [read(gain.get("balanced_accuracy"), f"{size} images a class") for size, gain in found.items()]


def synthetic_alone(metrics: dict) -> list[Reading]:
    """Reads the accuracy above chance after training on samples alone, as a share of that after training on real images."""
    utility = measured(metrics, "utility")
    arms, chance = measured(utility, "arms"), utility["chance"]
    most = max(measured(arms, "real"), key=int)
    real = read(measured(arms, "real", most, "balanced_accuracy"))
    alone = read(measured(arms, "synthetic", "all", "balanced_accuracy"))
    if real.low is None or real.low <= chance:
        raise NotMeasured("Training on real images is hardly better than chance, so there is nothing to compare with")
    facts = {"alone": percent(alone.value), "real": percent(real.value)}
    shares = read(arms["synthetic"]["all"]["balanced_accuracy"], base=real.value - chance, shift=chance)
    return [replace(shares, facts=facts)]


def copies(metrics: dict) -> list[Reading]:
    """Reads for each kind how much higher the rate of copies is than that of held-out images, before the gate if there was one.

    Held-out images set the threshold, so about 1 % of them are below it. That threshold is itself an estimate from several
    hundred images: of unrelated images, 0.5 to 1.9 % may be below it where 9 of 875 are. The difference counts that, too.
    """
    before = ((metrics.get("gate") or {}).get("before") or {}).get("copies") or {}
    readings = []
    for kind, found in measured(metrics, "privacy", "copies", "kinds").items():
        samples, held_out = (before.get(kind) or found.get("rate")), found.get("held_out_rate")
        rates = [read(samples), read(held_out)]
        reading = read(difference(samples, held_out), kind_name(kind))
        least, held_out = found.get("least"), found.get("held_out_least")
        alarm = ""
        if least is not None and held_out and least < 0.5 * held_out:
            alarm = "The nearest sample is less than half as far from a training image as any held-out image is."
        rejected = " before the gate rejected any" if before.get(kind) else ""
        facts = {"before": rejected, "rate": percent(rates[0].value), "held_out": percent(rates[1].value)}
        readings.append(replace(reading, alarm=alarm, facts=facts))
    return readings


def membership(metrics: dict, figure: str) -> list[Reading]:
    """Reads "auc" or "tpr_at_1_fpr" of each score of the membership attack."""
    scores = measured(metrics, "privacy", "membership", "scores")
    return [read(found.get(figure), f"“{score}”") for score, found in scores.items()]


def extraction(metrics: dict) -> list[Reading]:
    """Reads how much better the prior completes training images than held-out images."""
    found = measured(metrics, "privacy", "extraction")
    exact, alarm = found.get("exact") or {}, ""
    members, others = exact.get("members", 0), exact.get("non_members", 0)
    if found.get("members") and found.get("non_members"):
        low, _ = wilson(members, found["members"])
        _, high = wilson(others, found["non_members"])
        if low > high:
            alarm = f"It completes {members} of {found['members']:,} training images exactly, and {others} of "
            alarm += f"{found['non_members']:,} images that it never saw."
    return [replace(read(found.get("gain")), alarm=alarm)]


def against_bigram(metrics: dict) -> list[Reading]:
    """Reads each prior's bits per token over those of a bigram, on held-out codes."""
    levels = measured(metrics, "priors").items()
    return [_exact(_bits(bits, "bits_per_token") / _bits(bits, "bigram_bits"), f"level {level}") for level, bits in levels]


def memorising(metrics: dict) -> list[Reading]:
    """Reads by which share each prior's bits per token are higher on held-out codes than on training codes."""
    levels = measured(metrics, "priors").items()
    gaps = {level: 1 - _bits(bits, "train_bits_per_token") / _bits(bits, "bits_per_token") for level, bits in levels}
    return [
        replace(_exact(gap, f"level {level}"), facts={"size": percent(abs(gap)), "direction": "fewer" if gap >= 0 else "more"})
        for level, gap in gaps.items()
    ]


def _bits(bits: dict, key: str) -> float:
    if not bits.get(key):
        raise NotMeasured(NOT_MEASURED)
    return bits[key]


def _exact(value: float, what: str) -> Reading:
    """Returns a reading over a whole split, which has no interval."""
    return Reading(value, value, value, what)


def flips(metrics: dict) -> list[Reading]:
    """Reads the share of held-out images whose reconstruction gets another label than the image itself."""
    return [read(measured(metrics, "classifier").get("flips"))]


def flips_by_polish(metrics: dict) -> list[Reading]:
    """Reads by how much polishing the decoder changes the share of flipped labels; nothing if it was not polished."""
    found = measured(metrics, "classifier")
    if "flips_by_polish" not in found:
        return []
    before = read(found["flips_before_polish"])
    gained = metrics["tokenizer"]["psnr"] - metrics["tokenizer"]["psnr_before_polish"]
    facts = {"before": percent(before.value), "gained": f"{gained:+.1f}".replace("-", "−")}
    return [replace(read(found["flips_by_polish"]), facts=facts)]


def drawings(metrics: dict) -> list[Reading]:
    """Returns a reading if the training images are the drawings of the demo."""
    names = (metrics.get("data") or {}).get("attributions") or {}
    return [Reading(1, 1, 1, mark="fair")] if "lesiongen phantom" in names else []


def splits(metrics: dict) -> list[Reading]:
    """Reads the number of lesions that are in two splits."""
    return [_exact(float(measured(metrics, "data").get("lesions_in_two_splits") or 0), "")]


def licence(metrics: dict) -> list[Reading]:
    """Reads the strictest licence among the training images."""
    data = measured(metrics, "data")
    licences = measured(data, "licences")
    stated = all(name for name in licences)
    return [Reading(1, 1, 1, mark="good" if stated else "fair", facts={"licence": statement(data)})]
