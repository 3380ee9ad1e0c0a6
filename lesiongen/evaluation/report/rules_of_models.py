"""Rules of the verdict: are the models and the data sound?"""

from lesiongen.evaluation.report import readings
from lesiongen.evaluation.report.rule import Limits, Rule

MODELS = (
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
        "polish",
        "Structure that polishing may invent",
        "model",
        "share of held-out images whose reconstruction the classifier labels differently, after minus before polishing",
        readings.flips_by_polish,
        "A decoder that makes sharper images may show what was not there. Then labels flip more often than before. 5 points "
        "are a choice.",
        "Polishing the decoder changes PSNR by {gained} dB. Before it, {before} of the reconstructions got another label than "
        "their image; polishing changes this by {value} (95 % interval {low} to {high}), if the decoder is not told the label.",
        {
            "good": "It does not make the classifier see other diagnoses.",
            "fair": "It may make the classifier see other diagnoses a little more often.",
            "poor": "It shows structures that look like other diagnoses.",
        },
        limits=Limits("above", good=0.05, poor=0.05, floor=0),
        shows="points",
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
