"""The rules of the verdict, in one table: what each reads, its limits with a reason, and its sentences.

`rule.py` explains the columns, and `verdict.py` applies the rules. `python -m lesiongen.evaluation.report` prints the table for
docs/report.md.
"""

from functools import partial

from lesiongen.evaluation.report import readings
from lesiongen.evaluation.report.rule import Limits, Rule

RULES = (
    Rule(
        "distance",
        "Distance to real images",
        "likeness",
        "KID of samples against real images, over the upper bound of the KID of real against real; main ruler",
        readings.distance,
        "The floor's upper bound is how far two sets of real images are from one another by chance. Twice that is of the same "
        "order; ten times that is an order of magnitude beyond. Both are choices.",
        "Samples are {value} times as far from real images as real images may be from one another by chance "
        "(95 % interval {low} to {high}).",
        {
            "good": "By this ruler they are about as close as real images are.",
            "fair": "They differ from real images.",
            "poor": "They differ clearly from real images.",
        },
        shows="number",
        limits=Limits("above", good=2, poor=10),
    ),
    Rule(
        "blame",
        "Cause of the distance",
        "likeness",
        "KID of reconstructions against real images, over the sum of it and the KID of samples against reconstructions",
        readings.blame,
        "No limits: one part is named as the larger if its whole interval is above the other's.",
        "Of the distance, about {value} comes from the tokenizer, which blurs images, and the rest from the prior, which "
        "invents them.",
        {"good": "{who}.", "fair": "{who}."},
    ),
    Rule(
        "rulers",
        "Agreement of the rulers",
        "likeness",
        "the marks of the rule “distance” by each ruler",
        lambda metrics: [],  # `verdict.py` compares the marks
        "A generator may have been tuned to one network. What two networks of different families disagree on is not certain.",
        "The rulers disagree on how close samples are to real images: {what}.",
        {"fair": "Trust neither alone, and look at the samples."},
    ),
    Rule(
        "variety",
        "Variety of the samples",
        "likeness",
        "recall of samples against real images, over that of real against real; main ruler",
        partial(readings.relative_to_floor, figure="recall"),
        "Below half, more kinds of real images lack a counterpart than have one. 0.8 leaves room for noise.",
        "Samples cover the variety of real images to {value} of what other real images do (95 % interval {low} to {high}).",
        {
            "good": "Hardly any kind of image is missing.",
            "fair": "Some kinds of images may be missing.",
            "poor": "Many kinds of images are missing.",
        },
        limits=Limits("below", good=0.8, poor=0.5),
    ),
    Rule(
        "coverage",
        "Real images with a sample close by",
        "likeness",
        "coverage of real images by samples, over that by real images; main ruler",
        partial(readings.relative_to_floor, figure="coverage"),
        "As for variety.",
        "The share of real images that have a sample close by is {value} of what real images reach "
        "(95 % interval {low} to {high}).",
        {
            "good": "Samples lie where real images lie.",
            "fair": "Samples lie partly beside real images.",
            "poor": "Most real images have no sample close by.",
        },
        limits=Limits("below", good=0.8, poor=0.5),
    ),
    Rule(
        "class",
        "Diagnosis visible in the samples",
        "likeness",
        "(balanced accuracy of the classifier on samples − chance) / (the same on real held-out images)",
        readings.class_recognised,
        "0.9 leaves room for the interval of 1,000 samples. Below 0.6, nearly as much is lost as kept; a choice.",
        "A classifier trained on real images recognises the requested diagnosis in {samples} of samples and {real} of "
        "real held-out images; guessing: {chance}. Above guessing, that is {value} of it (95 % interval {low} to {high}).",
        {
            "good": "Samples show their diagnosis as clearly as real images.",
            "fair": "Samples show their diagnosis less clearly than real images, or there are too few to be sure.",
            "poor": "Samples hardly show their diagnosis.",
        },
        limits=Limits("below", good=0.9, poor=0.6),
    ),
    Rule(
        "classes",
        "Every diagnosis visible",
        "likeness",
        "recall of each class on samples, over that on real held-out images of the class",
        readings.each_class_recognised,
        "One class that fails matters, even if the mean is good. Classes are small, so the limit is lower.",
        "By class:",
        {
            "good": "the samples of every class are recognised about as often as real images.",
            "fair": "it is not sure whether samples of {hits} are recognised as often as real images.",
            "poor": "samples of {hits} are recognised less than half as often as real images.",
        },
        several="worst",
        limits=Limits("below", good=0.8, poor=0.5),
    ),
    Rule(
        "diversity",
        "Diversity within a class",
        "likeness",
        "mean distance of two samples of a class in the main ruler's features, over that of real images",
        readings.diversity,
        "0.9 leaves room for the interval. Below 0.7, three tenths of the differences between images are gone; a choice.",
        "Within a class, the spread of the samples is {value} of that of real images (95 % interval {low} to {high}).",
        {
            "good": "They are as diverse as real images.",
            "fair": "They may be more alike than real images.",
            "poor": "They are much more alike than real images.",
        },
        needs="class",
        limits=Limits("below", good=0.9, poor=0.7),
    ),
    Rule(
        "gain",
        "Benefit for training",
        "use",
        "balanced accuracy on real test images: real images and samples, minus real images with augmentation, at each size",
        readings.gains,
        "An interval that includes 0 shows neither benefit nor harm. Half of the sizes must agree: one may miss 0 by chance.",
        "Samples added to real training images change the accuracy on real test images by {value} (95 % interval {low} to "
        "{high}; {what}).",
        {
            "good": "They help.",
            "fair": "Whether they help is not shown: the intervals include no change, or disagree.",
            "poor": "They harm.",
        },
        several="half",
        shows="points",
        limits=Limits("below", good=0, poor=0, passing=True),
    ),
    Rule(
        "alone",
        "Training on samples alone",
        "use",
        "(balanced accuracy after training on samples alone − chance) / (the same on all real images)",
        readings.synthetic_alone,
        "0.9 leaves room for the interval. Below a half, most of what real images teach is not in the samples.",
        "Trained on samples alone, a classifier reaches {alone} on real test images; trained on real images, {real}. Above "
        "guessing, that is {value} of what real images teach (95 % interval {low} to {high}).",
        {
            "good": "Samples teach about as much as real images.",
            "fair": "Samples teach less than real images.",
            "poor": "Samples cannot replace real images.",
        },
        limits=Limits("below", good=0.9, poor=0.5),
    ),
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
    Rule(
        "bigram",
        "Priors against a simple model",
        "model",
        "bits per token of each prior over those of a bigram, held-out codes",
        readings.against_bigram,
        "A prior above a bigram has learned nothing of an image's shape.",
        "The prior of {what} needs {value} of the bits of a model that only looks at the last code.",
        {"good": "It has learned more.", "fair": "It has learned little more.", "poor": "Train it longer."},
        limits=Limits("above", good=0.98, poor=1),
    ),
    Rule(
        "memorising",
        "Memorising priors",
        "model",
        "1 − bits per token on training codes / on held-out codes, each prior",
        readings.memorising,
        "Some gap is normal, because training codes were seen; a tenth is a choice. It warns; the rules of privacy judge.",
        "The prior of {what} needs {size} {direction} bits for training images than for held-out images.",
        {"good": "It does not memorise.", "fair": "It memorises."},
        limits=Limits("above", good=0.1),
    ),
    Rule(
        "flips",
        "Labels that the tokenizer changes",
        "model",
        "share of held-out images whose reconstruction the classifier labels differently",
        readings.flips,
        "One in ten and one in four images are choices. An image near the border of two diagnoses flips easily.",
        "The classifier gives the reconstruction another label than the image in {value} of held-out images (95 % interval "
        "{low} to {high}).",
        {
            "good": "The tokenizer keeps what the classifier looks at.",
            "fair": "The tokenizer loses some of it.",
            "poor": "The tokenizer loses what tells diagnoses apart.",
        },
        limits=Limits("above", good=0.1, poor=0.25),
    ),
    Rule(
        "drawings",
        "Drawings of the demo",
        "data",
        "whether an attribution is “lesiongen phantom”",
        readings.drawings,
        "Nothing measured on drawings holds for patients.",
        "The training images are drawings made for demonstration.",
        {"fair": "This report says nothing about real lesions."},
    ),
    Rule(
        "splits",
        "Lesions in two splits",
        "data",
        "number of lesions in two splits",
        readings.splits,
        "One such lesion makes every comparison with held-out images look better than it is.",
        "{value} lesions are in two splits.",
        {"good": "Held-out images are really unseen.", "poor": "Pack the data again."},
        shows="count",
        limits=Limits("above", good=0, poor=0),
    ),
    Rule(
        "licence",
        "Licence of the data",
        "data",
        "strictest licence among the training images",
        readings.licence,
        "An image without a stated licence may not be passed on.",
        "Strictest licence of the training images: {licence}.",
        {"good": "Keep to it when you share samples.", "fair": "Ask the owner of the images before you share samples."},
    ),
)
