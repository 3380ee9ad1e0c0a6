"""Audits of the priors: a planted leak is found, an honest prior passes, and both sides of the comparison are alike."""

from collections import Counter

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from hpc.data import manifest
from hpc.data.codestore import CodeStore, file_name, write_codes
from lesiongen.data.packed import Packed
from lesiongen.data.stream import ImageShards
from lesiongen.evaluation.codes import STRENGTHS, pair_counts
from lesiongen.evaluation.image_sets import RealImages
from lesiongen.evaluation.privacy.audit_rows import AuditRows, batches, choose_rows
from lesiongen.evaluation.privacy.extraction import extraction
from lesiongen.evaluation.privacy.membership import membership
from lesiongen.evaluation.privacy.separation import separation
from lesiongen.priors import make
from lesiongen.priors.gpt import GPTConfig
from lesiongen.priors.prior import Prior

CPU = torch.device("cpu")
GRIDS, ENTRIES, CLASSES = {"top": (4, 4), "bottom": (5, 5)}, 24, 3
GPT = GPTConfig(layers=2, width=64, heads=2, dropout=0.0, label_dropout=0.1)
MEMBERS = 102  # images of each side whose class is in both splits
DRAWS = 8  # stores on which an honest prior is audited


def images(labels: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Draws codes: at each position half of the images of a class have the class's code, the others any code."""
    rng, columns = np.random.default_rng(seed), {"label": labels.astype(np.int16)}
    for level, grid in GRIDS.items():
        usual = np.random.default_rng(5).integers(0, ENTRIES, (CLASSES + 1, *grid))[labels]
        any_code = rng.integers(0, ENTRIES, usual.shape)
        columns[f"codes.{level}"] = np.where(rng.random(usual.shape) < 0.5, usual, any_code).astype(np.uint8)
    return columns


def write_store(folder, splits: dict[str, list[list[dict[str, np.ndarray]]]]) -> CodeStore:
    """Writes a store. splits: for each split its draws, each a list of shards."""
    entries = []
    for split, draws in splits.items():
        for draw, shards in enumerate(draws):
            for shard, arrays in enumerate(shards):
                write_codes(folder, split, draw, shard, arrays)
                about = {"split": split, "draw": draw, "shard": shard, "set": 0, "count": len(arrays["label"])}
                entries.append(manifest.describe(folder / file_name(split, draw, shard), **about))
    levels = [{"name": name, "grid": list(grid), "K": ENTRIES} for name, grid in GRIDS.items()]
    names = {"label": [f"class {i}" for i in range(CLASSES + 1)]}
    manifest.write(folder, {"levels": levels, "shards": entries, "vocabularies": names})
    return CodeStore(folder)


def make_audit(folder, seed: int) -> tuple[CodeStore, dict, AuditRows]:
    """Returns a store, its groups and the audited rows: all images of the test split and of the first training shard.

    The second training shard holds a class without test images, so the bigram is fitted on it alone.
    """
    labels = np.arange(MEMBERS) % CLASSES
    draws = [[images(labels, seed + k), images(np.full(40, CLASSES), seed + k + 1)] for k in (0, 2)]
    store = write_store(folder, {"train": draws, "test": [[images(labels, seed + 4)]]})
    groups = {"train": [np.arange(MEMBERS), np.arange(200, 240)], "test": [np.arange(300, 300 + MEMBERS)]}
    rows = choose_rows(store, groups, seed=1)
    assert len(rows.members) == len(rows.non_members) == MEMBERS
    return store, groups, rows


@pytest.fixture(scope="module")
def audit(tmp_path_factory) -> tuple[CodeStore, dict, AuditRows]:
    return make_audit(tmp_path_factory.mktemp("codes"), 10)


def trained(level: str, columns: dict[str, np.ndarray], steps: int) -> Prior:
    """Trains the prior of a level on some images."""
    torch.manual_seed(0)
    upper = () if level == "top" else ((ENTRIES, GRIDS["top"]),)
    net = make(GPT, grid=GRIDS[level], entries=ENTRIES, facts={"label": CLASSES + 1}, upper=upper).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    tensors = {name: torch.from_numpy(column.astype(np.int64)) for name, column in columns.items()}
    for _ in range(steps):
        rows = torch.randint(0, len(columns["label"]), (50,))
        above = [tensors["codes.top"][rows]] if upper else []
        loss = net.token_losses(tensors[f"codes.{level}"][rows], tensors["label"][rows, None], above).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


@pytest.fixture(scope="module")
def memorised(audit) -> dict[str, Prior]:
    """Returns priors that have memorised the members."""
    members = audit[0].arrays("train", 0, 0)
    return {level: trained(level, members, 200) for level in GRIDS}


@pytest.fixture(scope="module")
def honest() -> dict[str, Prior]:
    """Returns priors that were trained on a third set of images."""
    others = images(np.arange(3000) % CLASSES, 9)
    return {level: trained(level, others, 150) for level in GRIDS}


def test_a_planted_leak_is_found(audit, memorised):
    store, groups, rows = audit
    found = membership(store, memorised, rows, groups, CPU)
    assert (found["members"], found["non_members"]) == (MEMBERS, MEMBERS)
    for score in ("likelihood", "reference"):
        for level in (*GRIDS, "all"):
            assert found["scores"][f"{score} {level}"]["auc"]["low"] > 0.9, (score, level)
            assert found["scores"][f"{score} {level}"]["tpr_at_1_fpr"]["low"] > 0.8, (score, level)
    assert set(found["scores"]) == {f"{s} {x}" for s in ("likelihood", "contrast", "reference") for x in (*GRIDS, "all")}

    completed = extraction(store, memorised["top"], rows, CPU)
    assert (completed["level"], completed["prompt"], completed["completed"]) == ("top", 8, 8)
    assert completed["exact"]["members"] > 90
    assert completed["exact"]["non_members"] == 0
    assert completed["gain"]["low"] > 0.4
    assert completed["auc"]["low"] > 0.9
    gain = completed["accuracy"]["members"]["value"] - completed["accuracy"]["non_members"]["value"]
    assert completed["gain"]["value"] == pytest.approx(gain)


def test_an_honest_prior_passes(honest, tmp_path):
    """Over several stores that the priors never saw, about 95 % of the intervals hold the value of no leak."""
    areas, gains = {}, []
    for k in range(DRAWS):
        store, groups, rows = make_audit(tmp_path / str(k), 100 + 10 * k)
        for name, figures in membership(store, honest, rows, groups, CPU)["scores"].items():
            areas.setdefault(name, []).append(figures["auc"])
            assert figures["tpr_at_1_fpr"]["value"] < 0.15, name
        completed = extraction(store, honest["top"], rows, CPU)
        gains.append(completed["gain"])
        assert completed["accuracy"]["non_members"]["value"] > 0.3, "the prior must have learned what the classes look like"
        assert max(completed["exact"].values()) <= 5
    for name, found in areas.items():
        assert np.mean([f["value"] for f in found]) == pytest.approx(0.5, abs=0.045), name  # 3 standard errors
        assert sum(f["low"] < 0.5 < f["high"] for f in found) >= DRAWS - 2, name
    assert np.mean([g["value"] for g in gains]) == pytest.approx(0, abs=0.03)
    assert sum(g["low"] < 0 < g["high"] for g in gains) >= DRAWS - 2


def test_a_leak_in_one_level_is_seen_in_that_level(audit, memorised, honest):
    store, groups, rows = audit
    scores = membership(store, {"top": honest["top"], "bottom": memorised["bottom"]}, rows, groups, CPU)["scores"]
    assert scores["likelihood bottom"]["auc"]["low"] > 0.9
    assert scores["likelihood all"]["auc"]["low"] > 0.9
    for name in ("likelihood top", "contrast top", "reference top"):
        assert scores[name]["auc"]["low"] < 0.5 < scores[name]["auc"]["high"], name


def test_extraction_of_a_finer_level_gets_the_codes_above(audit, memorised):
    store, _, rows = audit
    found = extraction(store, memorised["bottom"], rows, CPU, level="bottom")
    assert (found["level"], found["prompt"], found["completed"]) == ("bottom", 12, 13)
    assert found["exact"]["members"] > 90
    assert found["exact"]["non_members"] == 0


def test_scores_are_likelihoods_and_the_bigram_is_of_other_lesions(audit, honest, monkeypatch):
    """Each score is computed again by hand, from the rows of the store."""
    store, groups, rows = audit
    seen: dict[int, tuple] = {}

    def note(member, non_member, seed):
        seen[len(seen)] = np.concatenate([member, non_member])
        return {}

    monkeypatch.setattr("lesiongen.evaluation.privacy.membership.separation", note)
    names = list(membership(store, honest, rows, groups, CPU)["scores"])
    scores = dict(zip(names, seen.values(), strict=True))
    # The bigram of the top level by hand: the second training shard alone, in both draws.
    counts = sum(pair_counts(store.arrays("train", draw, 1)["codes.top"], ENTRIES) for draw in (0, 1))
    frequency = (counts.sum(0) + 0.5) / (counts.sum() + 0.5 * ENTRIES)
    tables = [np.log((counts + s * frequency) / (counts.sum(1, keepdims=True) + s)) for s in STRENGTHS]
    rows_of = [*(("train", r) for r in rows.members), *(("test", r) for r in rows.non_members)]
    bigram, likelihood, contrast = np.zeros((len(STRENGTHS), 2 * MEMBERS)), {}, {}
    for i, (split, (draw, shard, ordinal)) in enumerate(rows_of):
        arrays = store.arrays(split, draw, shard)
        top, bottom = (torch.from_numpy(arrays[f"codes.{level}"][ordinal].astype(np.int64))[None] for level in GRIDS)
        label = torch.tensor([[int(arrays["label"][ordinal])]])
        for level, codes, above in (("top", top, []), ("bottom", bottom, [top])):
            with_label, without = (-honest[level].token_losses(codes, x, above).sum().item() for x in (label, label * 0 - 1))
            likelihood.setdefault(level, []).append(with_label)
            contrast.setdefault(level, []).append(with_label - without)
        pairs = pair_counts(top.numpy(), ENTRIES)
        bigram[:, i] = [(pairs * table).sum() for table in tables]
    for level in GRIDS:
        np.testing.assert_allclose(scores[f"likelihood {level}"], likelihood[level], rtol=1e-4)
        np.testing.assert_allclose(scores[f"contrast {level}"], contrast[level], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(scores["likelihood all"], scores["likelihood top"] + scores["likelihood bottom"])
    best = bigram[bigram.sum(1).argmax()]
    np.testing.assert_allclose(scores["reference top"], np.array(likelihood["top"]) - best, rtol=1e-4, atol=1e-3)


def test_a_prior_without_facts_has_no_contrast(audit):
    store, groups, rows = audit
    net = make(GPT, grid=GRIDS["top"], entries=ENTRIES, facts={}).eval()
    scores = membership(store, {"top": net}, rows, groups, CPU)["scores"]
    assert set(scores) == {"likelihood top", "likelihood all", "reference top", "reference all"}
    assert next(batches(store, "top", net, rows, CPU))["facts"].shape == (64, 0)


def test_both_sides_are_alike(tmp_path):
    """Two photographs of a lesion count once, the classes are as frequent on both sides, and all rows are unaugmented."""
    rng = np.random.default_rng(0)
    train_labels = rng.choice(3, 600, p=[0.8, 0.15, 0.05])
    test_labels = rng.choice(4, 120, p=[0.4, 0.3, 0.2, 0.1])  # class 3 is not in the training split
    train, augmented = images(train_labels, 1), images(train_labels, 2)
    shards = [{name: column[part] for name, column in train.items()} for part in (slice(0, 350), slice(350, None))]
    augmented = [{name: column[part] for name, column in augmented.items()} for part in (slice(0, 350), slice(350, None))]
    store = write_store(tmp_path, {"train": [shards, augmented], "test": [[images(test_labels, 3)]]})
    groups = {"train": [np.arange(350) // 2, 1000 + np.arange(250) // 2], "test": [2000 + np.arange(120) // 3]}
    rows = choose_rows(store, groups, seed=3)

    assert 20 <= len(rows.members) == len(rows.non_members) <= 40
    for split, found in (("train", rows.members), ("test", rows.non_members)):
        assert (found[:, 0] == 0).all()
        lesions = [groups[split][shard][ordinal] for _, shard, ordinal in found]
        assert len(set(lesions)) == len(lesions)
        assert split == "test" or lesions == rows.groups.tolist()
    labels = [
        Counter(store.gather_rows(s, r, ["label"])["label"].tolist())
        for s, r in zip(("train", "test"), (rows.members, rows.non_members), strict=True)
    ]
    assert labels[0] == labels[1]
    assert labels[0].keys() == {0, 1, 2}
    assert set(rows.members[:, 1].tolist()) == {0, 1}, "members must come from all shards"
    assert not np.array_equal(rows.members, choose_rows(store, groups, seed=4).members)
    assert np.array_equal(rows.members, choose_rows(store, groups, seed=3).members)
    assert len(choose_rows(store, groups, number=25).members) <= 25


@pytest.mark.parametrize(("test", "reason"), [({}, "no test split"), ({"test": 19}, "Only 19 test lesions")])
def test_too_few_test_lesions_are_a_reason(tmp_path, test, reason):
    parts = {"train": 60} | test
    store = write_store(tmp_path, {split: [[images(np.arange(n) % CLASSES, 1)]] for split, n in parts.items()})
    groups = {split: [np.arange(n)] for split, n in parts.items()}
    rows = choose_rows(store, groups)
    net = make(GPT, grid=GRIDS["top"], entries=ENTRIES, facts={})
    for found in (membership(store, {"top": net}, rows, groups, CPU), extraction(store, net, rows, CPU)):
        assert list(found) == ["reason"]
        assert reason in found["reason"]


def test_separation_equals_the_definitions():
    rng = np.random.default_rng(0)
    member, other = rng.integers(0, 40, 150) + 5.0, rng.integers(0, 40, 250).astype(float)  # with many ties
    found = separation(member, other)
    assert found["auc"]["value"] == pytest.approx(roc_auc_score([1] * 150 + [0] * 250, [*member, *other]))
    rates = [(member >= t).mean() for t in range(46) if (other >= t).mean() <= 0.01]
    assert found["tpr_at_1_fpr"]["value"] == pytest.approx(max(rates))
    assert found["auc"]["low"] < found["auc"]["value"] < found["auc"]["high"]
    assert found["tpr_at_1_fpr"]["low"] < found["tpr_at_1_fpr"]["value"] < found["tpr_at_1_fpr"]["high"]
    assert separation(-member, -other)["auc"]["value"] == pytest.approx(1 - found["auc"]["value"])
    assert separation(member + 100, other)["tpr_at_1_fpr"] == {"value": 1, "low": 1, "high": 1}
    assert separation(member, other[:99])["tpr_at_1_fpr"]["value"] is None, "one false alarm of 99 is more than 1 %"


def test_intervals_hold_what_they_promise():
    """Of 200 pairs of sides from one distribution, about 95 % have an interval that contains 0.5."""
    rng = np.random.default_rng(1)
    figures = [separation(rng.normal(size=80), rng.normal(size=60), seed)["auc"] for seed in range(200)]
    assert 180 <= sum(f["low"] <= 0.5 <= f["high"] for f in figures) <= 198


def test_groups_are_those_of_the_catalogs(packed):
    """The same shards twice, as two sets: names of shards occur twice, and the code store numbers them one after another."""
    both = Packed([packed / "shards", packed / "shards"])
    groups, names = RealImages(both, both.splits).groups_by_shard(), {}
    for split in both.splits:
        data = ImageShards(both, split)
        reader = data.reader()
        assert [len(g) for g in groups[split]] == list(data.counts)
        for shard, count in enumerate(data.counts):
            for ordinal in range(count):
                _, facts = data.image(reader.read(shard, ordinal))
                names.setdefault(int(groups[split][shard][ordinal]), set()).add(facts["group"])
    assert all(len(found) == 1 for found in names.values())
    assert len(names) == len({row["group"] for row in both.catalog()})
