"""Rules of the verdict: do the samples or the priors reveal training images?"""

from functools import partial

from lesiongen.evaluation.report import readings
from lesiongen.evaluation.report.rule import Limits, Rule

PRIVACY = (
    Rule(
        "copies",
        "Copies of training images",
        "privacy",
        "rate of copies of each kind, before the gate, minus that of held-out images",
        readings.copies,
        "0 is chance. An interval wholly above 0 shows that samples are nearer to training images than chance; one more copy "
        "in 100 samples is a choice. 2 points allow for the interval of 1,000 samples and 1,000 held-out images. A sample "
        "that is less than half as far as any held-out image is poor whatever the rate.",
        "Measured in {what}, {rate} of the samples count as copies{before}, and {held_out} of the unrelated real images: a "
        "difference of {value} (95 % interval {low} to {high}).",
        {
            "good": "This is no more than chance.",
            "fair": "Either there are too few images to be sure, or a few samples are nearer to training images than chance: "
            "look at the nearest pairs.",
            "poor": "Samples copy training images: look at the nearest pairs.",
        },
        limits=Limits("above", good=0.02, poor=0.01, floor=0),
        shows="points",
    ),
    Rule(
        "membership",
        "Who was in the training data",
        "privacy",
        "AUC of every score that tells training images from images the model never saw",
        partial(readings.membership, figure="auc"),
        "0.5 is guessing. An interval wholly above 0.5 shows a leak, if a small one; of many scores one may do so by chance. "
        "Above 0.6, three of five pairs are ranked right; a choice.",
        "From the prior's likelihoods, an attacker ranks a training image above an unseen one in {value} of the cases "
        "(95 % interval {low} to {high}; guessing: 50 %; score {what}).",
        {
            "good": "This is no better than guessing.",
            "fair": "A small leak cannot be ruled out.",
            "poor": "The prior gives away who was in its training data.",
        },
        several="worst",
        limits=Limits("above", good=0.6, poor=0.6, floor=0.5),
    ),
    Rule(
        "accusations",
        "Certain cases of membership",
        "privacy",
        "true positives at 1 % false positives, of every score",
        partial(readings.membership, figure="tpr_at_1_fpr"),
        "1 % is guessing. The mean over all images (AUC) hides a few that are given away with certainty. 5 % is five times "
        "guessing.",
        "If 1 % of unseen images are wrongly accused, {value} of the training images are found (95 % interval {low} to {high}; "
        "score {what}).",
        {
            "good": "This is no better than guessing.",
            "fair": "Some training images may be given away.",
            "poor": "Some training images are given away.",
        },
        several="worst",
        limits=Limits("above", good=0.05, poor=0.05, floor=0.01),
    ),
    Rule(
        "extraction",
        "Training images drawn out of the prior",
        "privacy",
        "share of codes completed right from a prompt: training images minus unseen images; exact completions",
        readings.extraction,
        "0 is no difference. 5 points are a visible part of an image. Many exact completions are poor whatever the mean.",
        "Given the first codes of an image, the share of the rest that the prior completes right differs by {value} "
        "between training images and unseen ones (95 % interval {low} to {high}).",
        {
            "good": "It does not reproduce training images.",
            "fair": "It reproduces training images a little better, or there are too few to be sure.",
            "poor": "It reproduces training images.",
        },
        limits=Limits("above", good=0.05, poor=0.05, floor=0),
        shows="points",
    ),
)
