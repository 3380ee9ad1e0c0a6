"""A linear probe: logistic regression on frozen features, the default classifier of the utility test.

Shapes: N training images, M test images, D features, K classes.
"""

import warnings

import numpy as np

# Inverse strength of the regularisation, scikit-learn's C. It was chosen once, on HAM10000 at 64 px with features of
# EfficientNet-Lite0: of the values from 1e-4 to 1e-1, this one gave the best balanced accuracy at 500 images a class, and one
# at most 0.03 below the best at 10, 30 and 100. The value is fixed because one chosen on ten images a class would be noise.
STRENGTH = 1e-3
ITERATIONS = 100  # of the solver, at most; with STRENGTH it needs about 50 for 500 images a class


class Probe:
    """Fits logistic regressions and applies each to the same test images. The utility test makes one and calls it for each arm.

    Each call standardises the features by its own training images, so that a call knows nothing of the other arms. The features
    are not reduced: with 1,280 features and 3,500 images, a fit takes about a second on one core.
    """

    def __init__(self, test_MD: np.ndarray, classes: int):
        """Keeps the test images.

        Args:
            test_MD: Features of the test images.
            classes: Number of classes, K.
        """
        self.test_MD, self.classes = np.asarray(test_MD, np.float32), classes

    def __call__(self, features_ND: np.ndarray, labels_N: np.ndarray, seed: int) -> np.ndarray:
        """Fits a multinomial logistic regression whose classes have equal weight.

        Args:
            features_ND: Features of the training images.
            labels_N: Their classes, from 0 to K - 1; at least two classes occur.
            seed: Not used: the solver has no randomness.

        Returns:
            The probability of each class for each test image, [M, K]; 0 for a class without training images.
        """
        # Importing scikit-learn takes a second, and every process of every stage reads the config, which imports this file.
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        features_ND = np.asarray(features_ND, np.float32)
        mean, scale = features_ND.mean(0), features_ND.std(0)
        scale[scale < 1e-6] = 1.0  # a feature that never varies says nothing
        model = LogisticRegression(C=STRENGTH, class_weight="balanced", max_iter=ITERATIONS)
        with warnings.catch_warnings():
            # A fit that is stopped early is a slightly more regularised one, and no fault.
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit((features_ND - mean) / scale, labels_N)
        scores = np.zeros((len(self.test_MD), self.classes))
        scores[:, model.classes_] = model.predict_proba((self.test_MD - mean) / scale)
        return scores
