"""The verdict at the top of the report: marks and sentences about fidelity, diversity, copies and the priors of a run.

All numbers come from metrics.json. Marks are "good", "fair" and "poor", or "none" where no judgement is possible.
"""

Finding = tuple[str, str]  # mark, sentence


def verdict(metrics: dict) -> list[Finding]:
    """Judges a run by its metrics.

    Args:
        metrics: The content of metrics.json.

    Returns:
        (mark, sentence) of each finding: fidelity, diversity, copies, and the priors that have a problem.
    """
    findings = []
    if "lesiongen phantom" in metrics["data"]["attributions"]:
        sentence = "The training images are drawings made for demonstration. This report says nothing about real lesions."
        findings.append(("none", sentence))
    mark = fidelity_mark(metrics["fidelity"])
    findings.append(_fidelity_finding(metrics["fidelity"], mark))
    findings += _diversity_findings(metrics["diversity"], mark)
    findings.append(_copy_finding(metrics["copies"]))
    return findings + _prior_findings(metrics["priors"])


def fidelity_mark(fidelity: dict) -> str:
    """Marks fidelity by the ratio of the classifier's accuracy above chance on samples to that on real held-out images."""
    if fidelity["ratio"] is None or fidelity["real"] < fidelity["chance"] + 0.1:
        return "none"
    share = (fidelity["samples"] - fidelity["chance"]) / (fidelity["real"] - fidelity["chance"])
    return "good" if share >= 0.9 else "fair" if share >= 0.6 else "poor"


def _fidelity_finding(fidelity: dict, mark: str) -> Finding:
    if fidelity["ratio"] is None:
        return "none", f"The report cannot say whether samples show their class: {fidelity['reason']}."
    conclusions = {
        "good": "Samples show their class as clearly as real images.",
        "fair": "Samples show their class less clearly than real images.",
        "poor": "Samples hardly show their class.",
        "none": "The samples are not judged, because the classifier hardly recognises real images either.",
    }
    return mark, (
        "A classifier that was trained on real images recognises the requested class in "
        f"{fidelity['samples']:.0%} of the samples. It recognises the class in {fidelity['real']:.0%} of real held-out images, "
        f"and in {fidelity['chance']:.0%} by chance. {conclusions[mark]}"
    )


def _diversity_findings(diversity: dict, mark_of_fidelity: str) -> list[Finding]:
    ratio = diversity["ratio"]
    if ratio is None:
        return []
    if mark_of_fidelity not in ("good", "fair"):
        return [("none", "The diversity of the samples is not judged: it means little unless samples show their class.")]
    mark, conclusion = (
        ("good", "as diverse as real images")
        if ratio >= 0.9
        else ("fair", "somewhat less diverse than real images")
        if ratio >= 0.7
        else ("poor", "much more alike than real images")
    )
    return [(mark, f"Within a class, samples are {conclusion}: their spread is {ratio:.0%} of that of real images.")]


def _copy_finding(copies: dict) -> Finding:
    counted = (
        f"{copies['copies']} of {copies['number']:,} samples count as copies of training images. The 95 % interval of the rate "
        f"is {copies['low']:.1%} to {copies['high']:.1%}; the rate of unrelated real images is 1 %."
    )
    if copies["least_distance"] < 0.5 * copies["held_out"]["least_distance"]:
        return "poor", (
            f"{counted} The nearest sample is less than half as far from a training image as any held-out image: look at the "
            "pairs below."
        )
    if copies["low"] > 0.01:
        return "poor", f"{counted} This is more than chance: look at the pairs below before you share samples."
    if copies["high"] <= 0.02:
        return "good", f"{counted} This is no more than chance."
    return "fair", f"{counted} There are too few samples to be sure: draw 1,000 or more."


def _prior_findings(priors: dict[str, dict]) -> list[Finding]:
    findings = []
    for level, bits in priors.items():
        gap = bits["bits_per_token"] - bits["train_bits_per_token"]
        if bits["bits_per_token"] >= bits["bigram_bits"]:
            findings.append(("poor", f"The prior of level {level} is no better than a bigram: train it longer."))
        elif gap > 0.1 * bits["bits_per_token"]:
            sentence = f"The prior of level {level} needs {gap:.2f} bits per token more for held-out images than for its "
            findings.append(("fair", f"{sentence}training images. The model memorises."))
    return findings
