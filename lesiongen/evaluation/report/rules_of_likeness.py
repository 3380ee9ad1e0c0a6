"""Rules of the verdict: are the samples like real images, and does it help to train with them?"""

from functools import partial

from lesiongen.evaluation.report import readings
from lesiongen.evaluation.report.rule import Limits, Rule

LIKENESS = (
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
)
