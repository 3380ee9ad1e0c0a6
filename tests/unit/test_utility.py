"""The utility test: does it see samples that help and samples that harm, and is the comparison fair?"""

import csv

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, recall_score

from lesiongen.data import images
from lesiongen.data.augment import centre
from lesiongen.data.efficientnet_lite import has_lite
from lesiongen.evaluation.backbone import FeaturesConfig, load_backbone
from lesiongen.evaluation.lesion_scores import TestLesions, average_precision, drawn_seeds, over_seeds
from lesiongen.evaluation.probe import Probe
from lesiongen.evaluation.training_sets import Pool, TrainingSets, classical_views, lesions_first
from lesiongen.evaluation.utility import UtilityConfig, utility

CLASSES = ["akiec", "bcc", "nv"]
DIM = 12
CENTRES = np.random.default_rng(7).normal(0, 0.7, (len(CLASSES), DIM))


def gaussian(per_class: int, seed: int, shuffled: bool = False, photographs: int = 1) -> Pool:
    """Returns a pool of features that are normally distributed around the centre of their class."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(CLASSES)), per_class)
    features = CENTRES[labels] + rng.normal(0, 1, (len(labels), DIM))
    given = rng.permutation(labels) if shuffled else labels
    return Pool(given, np.arange(len(labels)) // photographs, lambda indices: features[indices])


def nearly_same(pool: Pool):
    """Returns views of a pool's images that hardly differ from the images."""
    return lambda indices, numbers: pool.items(indices) + 0.01 * (1 + numbers[:, None])


def run(samples: Pool, sizes: tuple[int, ...] = (8,), real: Pool | None = None, test: Pool | None = None, **more) -> dict:
    """Runs the test on Gaussian features."""
    real = real or gaussian(60, 1)
    config = UtilityConfig(sizes=sizes, **more)
    return utility(real, nearly_same(real), samples, test or gaussian(150, 2), CLASSES, config, 0, progress=False)


def test_true_samples_help():
    found = run(gaussian(60, 3), sizes=(5, 60), seeds=10)
    assert found["gain"]["5"]["balanced_accuracy"]["low"] > 0 and found["gain"]["5"]["auprc"]["low"] > 0
    assert found["gain_over_real"]["5"]["balanced_accuracy"]["low"] > 0
    # With many real images, samples of the same distribution can add little.
    assert found["gain"]["60"]["auprc"]["value"] < found["gain"]["5"]["auprc"]["value"] / 2
    assert found["sizes"] == [5, 60] and found["chance"] == pytest.approx(1 / 3)
    assert found["test"] == {"images": 450, "lesions": 450, "classes": {c: {"images": 150, "lesions": 150} for c in CLASSES}}


def test_samples_with_wrong_labels_harm():
    found = run(gaussian(60, 3, shuffled=True), sizes=(30,))
    assert found["gain"]["30"]["balanced_accuracy"]["high"] < 0 and found["gain"]["30"]["auprc"]["high"] < 0
    assert found["arms"]["real"]["30"]["balanced_accuracy"]["low"] > 0.5
    # A classifier of wrong labels may be far below chance, or above, by luck. Over many of them it is at chance.
    each = [run(gaussian(60, 100 + s, shuffled=True), seeds=1)["arms"]["synthetic"]["all"] for s in range(20)]
    assert abs(np.mean([arm["balanced_accuracy"]["value"] for arm in each]) - 1 / 3) < 0.08


def test_samples_equal_to_the_views_gain_nothing():
    real = gaussian(10, 1)
    found = run(Pool(real.labels_N, real.groups_N, lambda i: real.items(i) + 0.01), sizes=(10,), real=real)
    gain = found["gain"]["10"]["balanced_accuracy"]
    assert gain["low"] <= 0 <= gain["high"] and gain["high"] - gain["low"] < 0.02  # paired: hardly any spread


class Recorder:
    """A classifier that records what it is trained on, and knows the answers."""

    def __init__(self):
        self.calls: list[tuple[np.ndarray, np.ndarray, int]] = []

    def __call__(self, test_items: np.ndarray, classes: int):
        """Stands for the class Probe."""
        self.test_items, self.classes = test_items, classes

        def fit(items: np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
            self.calls.append((items, labels, seed))
            return np.eye(classes)[np.zeros(len(test_items), int)]

        return fit


def named(label_counts: list[int], offset: int, photographs: int = 1) -> Pool:
    """Returns a pool whose items are numbers that identify its images."""
    labels = np.repeat(np.arange(len(label_counts)), label_counts)
    return Pool(labels, np.arange(len(labels)) // photographs, lambda indices: indices[:, None] + offset)


def recorded(dose: float = 1.0, sizes: tuple[int, ...] = (4, 12), samples: tuple[int, ...] = (40, 40, 6), seeds: int = 3):
    """Returns what the classifier got, by (arm, size, seed), and the result."""
    recorder, real = Recorder(), named([30, 10, 30], 0)
    config = UtilityConfig(sizes=sizes, dose=dose, seeds=seeds)

    def views(indices: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        assert (np.diff(indices) >= 0).all()  # the caller reads file by file
        return 10_000 + 1000 * numbers[:, None] + indices[:, None]

    args = real, views, named(list(samples), 100_000), named([5, 5, 5], 0), CLASSES, config, 0
    found = utility(*args, classifier=recorder, progress=False)
    keys = [
        (arm, size, s)
        for s in range(seeds)
        for arm, size in [("synthetic", 0), *((a, n) for n in found["sizes"] for a in ("real", "augmented", "mixed"))]
    ]
    return dict(zip(keys, recorder.calls, strict=True)), found


@pytest.mark.parametrize("dose", [0.5, 1.0, 3.0])
def test_augmented_and_mixed_add_the_same_number_to_the_same_images(dose):
    calls, found = recorded(dose)
    for size in (4, 12):
        expected_real = [min(size, n) for n in (30, 10, 30)]
        expected = [min(round(dose * n), available) for n, available in zip(expected_real, (40, 40, 6), strict=True)]
        for s in range(3):
            real, augmented, mixed = (calls[arm, size, s] for arm in ("real", "augmented", "mixed"))
            assert np.bincount(real[1]).tolist() == expected_real
            for items, labels, seed in (augmented, mixed):
                number = len(real[1])
                assert (items[:number] == real[0]).all() and seed == real[2]
                assert np.bincount(labels[number:]).tolist() == expected
            assert (mixed[0][number:] >= 100_000).all() and len(np.unique(mixed[0])) == len(mixed[0])
            # The views are other views of the real images of the arm, all different, with their labels.
            views = augmented[0][number:, 0] - 10_000
            labels_of = dict(zip(real[0][:, 0].tolist(), real[1].tolist(), strict=True))
            assert [labels_of[v % 1000] for v in views.tolist()] == augmented[1][number:].tolist()
            assert len(np.unique(views)) == len(views)
        assert found["arms"]["mixed"][str(size)]["images"] == sum(expected_real) + sum(expected)


def test_synthetic_alone_gets_all_samples_and_no_real_image():
    calls, _ = recorded()
    items, labels, _ = calls["synthetic", 0, 0]
    assert (items >= 100_000).all() and np.bincount(labels).tolist() == [40, 40, 6]


def test_seeds_draw_other_images_and_smaller_sets_are_part_of_larger_ones():
    calls, _ = recorded()
    drawn = [{arm: set(calls[arm, 4, s][0][:, 0].tolist()) for arm in ("real", "mixed")} for s in range(3)]
    assert len({frozenset(d["real"]) for d in drawn}) == 3
    assert len({frozenset(d["mixed"] - d["real"]) for d in drawn}) == 3
    assert drawn[0]["real"] < set(calls["real", 12, 0][0][:, 0].tolist())
    again, _ = recorded()
    assert all((calls[key][0] == again[key][0]).all() and calls[key][2] == again[key][2] for key in calls)


def test_sizes_that_change_nothing_are_left_out():
    _, found = recorded(sizes=(4, 30, 100, 500))
    assert found["sizes"] == [4, 30]  # no class has more than 30 images


def test_labels_of_kept_classes_are_numbered_anew():
    """A class that the test split, the samples or the training split lacks is not asked for, in any arm."""
    for lacking in range(3):
        counts = [[20, 20, 20] for _ in range(3)]
        counts[lacking][1] = 0
        real, samples, test = (named(c, offset) for c, offset in zip(counts, (0, 1000, 2000), strict=True))
        recorder = Recorder()
        views = lambda indices, numbers: indices[:, None]  # noqa: E731
        config = UtilityConfig(sizes=(5,), seeds=1)
        found = utility(real, views, samples, test, CLASSES, config, 0, classifier=recorder, progress=False)
        assert list(found["test"]["classes"]) == ["akiec", "nv"] and found["chance"] == 0.5
        assert all(np.unique(labels).tolist() == [0, 1] for _, labels, _ in recorder.calls)
        assert len(recorder.test_items) == 40
        assert found["arms"]["real"]["5"]["balanced_accuracy"]["value"] == 0.5  # the recorder always says akiec
        assert found["arms"]["real"]["5"]["classes"]["akiec"]["recall"]["value"] == 1.0


def test_one_class_is_a_reason():
    found = run(Pool(np.zeros(5, int), np.arange(5), lambda i: np.zeros((len(i), DIM))))
    assert list(found) == ["reason"]


def test_finetuning_needs_its_classifier():
    with pytest.raises(ValueError, match="needs a classifier"):
        run(gaussian(10, 3), method="finetune")


def test_result_depends_on_the_seed_alone():
    assert run(gaussian(20, 3), seeds=2) == run(gaussian(20, 3), seeds=2)


def test_other_photographs_of_a_lesion_come_last():
    groups = np.array([5, 5, 5, 5, 1, 2, 3, 3, 4])
    for seed in range(20):
        order = lesions_first(np.arange(9) + 100, groups, np.random.default_rng(seed)) - 100
        assert sorted(order.tolist()) == list(range(9))
        assert len(set(groups[order[:5]].tolist())) == 5
        assert set(groups[order[5:7]].tolist()) == {3, 5} and set(groups[order[7:]].tolist()) == {5}


def test_training_sets_take_one_photograph_of_a_lesion():
    real = named([40, 40], 0, photographs=4)
    sets = TrainingSets(real, lambda i, n: i[:, None], named([9, 9], 0), [0, 1], (10, 20), 1.0, 9, [0, 1])
    for s in range(2):
        items, _ = sets.get("real", 10, s)
        assert len(np.unique(items // 4)) == 20
        items, _ = sets.get("real", 20, s)
        assert np.bincount(items[:, 0] // 4).tolist() == [2] * 20


def test_scores_are_those_of_lesions():
    """Two photographs of a lesion are averaged; a lesion with many photographs counts once."""
    labels, groups = np.array([0, 0, 0, 1, 1]), np.array(["a", "a", "b", "c", "c"])
    scores = np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8], [0.6, 0.4], [0.1, 0.9]])
    lesions = TestLesions(labels, groups, 2, 0, rounds=50)
    assert lesions.average(scores) == pytest.approx(np.array([[0.65, 0.35], [0.2, 0.8], [0.35, 0.65]]))
    measured = lesions.measure(scores)
    assert measured["recall"][0].tolist() == [0.5, 1.0]
    assert (lesions.weights[:, lesions.labels_L == 0].sum(1) == 2).all()  # each resample keeps the lesions of a class
    other = TestLesions(np.repeat(labels, 3), np.repeat(groups, 3), 2, 0, rounds=50)
    assert other.measure(np.repeat(scores, 3, 0))["auprc"] == pytest.approx(measured["auprc"])


def test_scores_agree_with_scikit_learn():
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=80)
    scores = (rng.random((80, 3)) + 0.5 * np.eye(3)[labels]).round(1)  # many ties
    lesions = TestLesions(labels, np.arange(80), 3, 0, rounds=20)
    measured = lesions.measure(scores)
    for row in (0, 1, 20):
        weights = lesions.weights[row]
        for k in range(3):
            expected = average_precision_score(labels == k, scores[:, k], sample_weight=weights)
            assert measured["auprc"][row, k] == pytest.approx(expected)
        expected = recall_score(labels, scores.argmax(1), average=None, sample_weight=weights)
        assert measured["recall"][row] == pytest.approx(expected)
    assert average_precision(np.array([True, False]), np.array([0.1, 0.9]), np.ones((1, 2))) == pytest.approx(0.5)


def test_interval_covers_seeds_and_lesions():
    """The interval is about as wide as the true spread of the mean: from seeds alone, from lesions alone, and from both."""
    rng, seeds, rounds = np.random.default_rng(0), 20, 4000
    drawn = drawn_seeds(seeds, rounds, 0)
    by_seed = rng.normal(0, 1, (seeds, 1)) + np.zeros((1, rounds + 1))
    by_lesion = np.zeros((seeds, 1)) + rng.normal(0, 0.3, (1, rounds + 1))

    def width(values: np.ndarray) -> float:
        figure = over_seeds(values, drawn)
        return (figure["high"] - figure["low"]) / (2 * 1.96)

    expected = by_seed[:, 0].std(ddof=1) / np.sqrt(seeds)
    assert width(by_seed) == pytest.approx(expected, rel=0.08)
    assert width(by_lesion) == pytest.approx(0.3, rel=0.08)
    assert width(by_seed + by_lesion) == pytest.approx(np.hypot(expected, 0.3), rel=0.08)
    assert over_seeds(np.full((1, 5), np.nan), drawn_seeds(1, 4, 0)) == {"value": None, "low": None, "high": None}


def test_test_lesions_are_limited_whole():
    recorder, real = Recorder(), named([10, 10, 10], 0)
    config = UtilityConfig(sizes=(5,), seeds=1, most_tests=4)
    args = real, lambda i, n: i[:, None], real, named([60, 60, 6], 0, photographs=3), CLASSES, config, 0
    found = utility(*args, classifier=recorder, progress=False)
    assert found["test"]["classes"]["akiec"] == {"images": 12, "lesions": 4}
    assert found["test"]["classes"]["nv"] == {"images": 6, "lesions": 2}
    assert (np.bincount(recorder.test_items[:, 0] // 3)[np.unique(recorder.test_items // 3)] == 3).all()


def test_probe_standardises_and_balances():
    """Features of any scale, one that never varies, and 50 times as many images of one class."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], [500, 10])
    features = np.stack([1e4 * (labels + rng.normal(0, 0.2, 510)), 1e-3 * rng.normal(0, 1, 510), np.full(510, 7.0)], 1)
    scores = Probe(features, 2)(features, labels, 0)
    recalls = [(scores[labels == k].argmax(1) == k).mean() for k in (0, 1)]
    assert min(recalls) > 0.9 and scores.sum(1) == pytest.approx(1)


def test_views_differ_and_do_not_depend_on_the_batch():
    x = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    index, number = np.array([4, 9, 9]), np.array([0, 0, 1])
    batch = classical_views(x[[0, 1, 1]], index, number, 0)
    assert batch.shape == x.shape and batch.dtype == torch.uint8
    assert (classical_views(x[[1]], index[1:2], number[1:2], 0)[0] == batch[1]).all()
    assert (batch[1] != batch[2]).any() and (batch[0] != x[0]).any()
    assert (classical_views(x[[0]], index[:1], number[:1], 1)[0] != batch[0]).any()


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.skipif(not has_lite(0), reason="EfficientNet-Lite0 is not installed")
def test_real_images_help_and_wrong_labels_harm(real_images):
    """HAM10000 at 64 px, features of EfficientNet-Lite0 at 128 px; other real images stand in for samples."""
    torch.set_num_threads(1)
    with open(real_images / "ham10000" / "metadata.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    classes = sorted({row["dx"] for row in rows})
    labels, groups = np.array([classes.index(row["dx"]) for row in rows]), np.array([row["lesion_id"] for row in rows])
    chance = np.random.default_rng(0).random(len(groups))[np.unique(groups, return_inverse=True)[1]]  # one number a lesion
    backbone = load_backbone(FeaturesConfig(backbone="lite0"), None)

    def read(indices: np.ndarray) -> torch.Tensor:
        paths = [real_images / "ham10000" / "images" / f"{rows[i]['image_id']}.jpg" for i in indices]
        return torch.stack([centre(images.to_tensor(images.read(path, 3, 64)), 64) for path in paths])

    def features(indices: np.ndarray) -> np.ndarray:
        return np.concatenate([backbone(read(part)).numpy() for part in np.array_split(indices, len(indices) // 64 + 1)])

    def part_of(low: float, high: float, most: int) -> tuple[np.ndarray, Pool]:
        every = [np.flatnonzero((chance >= low) & (chance < high) & (labels == c))[:most] for c in range(len(classes))]
        rows_of = np.concatenate(every)
        computed = features(rows_of)
        return rows_of, Pool(labels[rows_of], groups[rows_of], lambda i: computed[i])

    train_rows, train = part_of(0.5, 1.0, 300)
    _, test = part_of(0.0, 0.2, 120)
    _, samples = part_of(0.2, 0.5, 60)

    def views(indices: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        parts = np.array_split(np.arange(len(indices)), len(indices) // 64 + 1)
        made = [classical_views(read(train_rows[indices[p]]), indices[p], numbers[p], 0) for p in parts if len(p)]
        return np.concatenate([backbone(batch).numpy() for batch in made])

    config = UtilityConfig(sizes=(10, 300), seeds=4)
    found = utility(train, views, samples, test, classes, config, 0, progress=False)
    by_size = {size: found["arms"]["real"][size]["balanced_accuracy"] for size in ("10", "300")}
    print({size: f"{v['value']:.3f} [{v['low']:.3f}, {v['high']:.3f}]" for size, v in by_size.items()})
    print({key: found[key]["10"] for key in ("gain", "gain_over_real")})
    assert by_size["300"]["low"] > by_size["10"]["high"] and by_size["300"]["value"] > 3 * found["chance"]
    assert found["gain_over_real"]["10"]["auprc"]["low"] > 0
    wrong_labels = np.random.default_rng(0).permutation(samples.labels_N)
    shuffled = Pool(wrong_labels, samples.groups_N, samples.items)
    wrong = utility(train, views, shuffled, test, classes, UtilityConfig(sizes=(10,), seeds=4, dose=3.0), 0, progress=False)
    print(wrong["gain"]["10"])
    assert wrong["gain"]["10"]["balanced_accuracy"]["high"] < 0
