"""Settings of the evaluate stage."""

from dataclasses import dataclass, field

from lesiongen.evaluation.backbone import FeaturesConfig
from lesiongen.evaluation.utility import UtilityConfig


@dataclass(frozen=True)
class EvaluateConfig:
    """The evaluate stage, and the evaluations during tokenizer training."""

    features: FeaturesConfig = field(default_factory=FeaturesConfig)  # the network whose features compare images
    classifier_samples: int = 60_000  # training length, in images, of the small classifier, which learns from lesions alone
    fine_tuning_samples: int = 40_000  # training length, in images, of the classifier that starts from ImageNet weights
    utility: UtilityConfig = field(default_factory=UtilityConfig)  # does training with the samples help?
    audited: int = 1_000  # images on each side of the tests whether the priors reveal training images
    batch: int = 64  # images that a rank reconstructs at once

    def __post_init__(self):
        if min(self.classifier_samples, self.fine_tuning_samples, self.audited, self.batch) < 1:
            raise ValueError("classifier_samples, fine_tuning_samples, audited and batch must be at least 1")
