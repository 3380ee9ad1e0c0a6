"""No group is in two splits: with splits that come with the data, after appending, and after images are found to be alike."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc.errors import UserError
from lesiongen.ingest.catalog import Record
from lesiongen.ingest.splits import Groups, PackedImage, assign, share_lines, small_class_warnings, split_of

names = st.sampled_from([f"i{n}" for n in range(30)])


def records(number, **more):
    return [Record(f"i{n}", "", lesion=f"L{n // 2}", **more) for n in range(number)]


def split_by_image(splits):
    return {r.image: name for name, members in splits.items() for r in members}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(names, names), max_size=25), st.integers(0, 30))
def test_appending_moves_nothing_and_never_leaks(pairs, already):
    """Some images are packed. The others are appended with pairs of images that show one lesion and may join any groups."""
    everything = records(30)
    first, _ = assign(everything[:already], 0.3, 0.3, pairs[::2])
    packed = {r.image: PackedImage(r.own_group, r.group, name) for name, members in first.items() for r in members}
    later, rejected = assign(everything[already:], 0.3, 0.3, pairs, packed)
    now = {name: image.split for name, image in packed.items()} | split_by_image(later)
    refused = {entry["image"] for entry in rejected}
    assert now.keys() | refused == {r.image for r in everything}
    assert all(now[name] == image.split for name, image in packed.items())
    groups: dict[str, set[str]] = {}
    for split, members in later.items():
        for r in members:
            groups.setdefault(r.group, set()).add(split)
    for image in packed.values():
        groups.setdefault(image.group, set()).add(image.split)
    assert all(len(found) == 1 for found in groups.values())
    new = {r.image for r in everything[already:]} - refused
    for a, b in pairs:
        if {a, b} & new and {a, b} <= now.keys():
            assert now[a] == now[b]
    for n in range(0, 30, 2):  # images n and n + 1 show one lesion
        if {f"i{n}", f"i{n + 1}"} <= now.keys():
            assert now[f"i{n}"] == now[f"i{n + 1}"]


def groups_of(splits) -> dict[str, str]:
    return {r.image: r.group for members in splits.values() for r in members}


def test_lesions_of_a_patient_are_one_group():
    given_ = [
        Record("a", "", "L", "P"),
        Record("b", "", "", "P"),
        Record("c", ""),
        Record("d", "", "M", "P"),
        Record("e", "", "M"),
    ]
    splits, _ = assign(given_, 0.1, 0.1)
    assert groups_of(splits) == {"a": "L", "b": "L", "c": "c", "d": "L", "e": "L"}
    splits, _ = assign(given_, 0.1, 0.1, by_patient=False)
    assert groups_of(splits) == {"a": "L", "b": "P", "c": "c", "d": "M", "e": "M"}


def test_lesion_7_is_not_patient_7():
    splits, _ = assign([Record("a", "", "7", "1"), Record("b", "", "8", "7"), Record("c", "", "", "7")], 0.1, 0.1)
    found = groups_of(splits)
    assert found["a"] != found["b"] == found["c"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 6)), min_size=1, max_size=40), st.integers(0, 40))
def test_no_patient_and_no_lesion_is_in_two_splits_also_after_appending(ids, already):
    """A lesion may be listed under two patients; then both are one group."""
    everything = [
        Record(f"i{n}", "", lesion and f"L{lesion}", patient and f"{patient}") for n, (lesion, patient) in enumerate(ids)
    ]
    everything = [Record(r.image, "", r.lesion or "", r.patient or "") for r in everything]
    first, refused = assign(everything[:already], 0.3, 0.3)
    assert not refused
    packed = {
        r.image: PackedImage(r.own_group, r.group, name, patient=r.patient_group)
        for name, members in first.items()
        for r in members
    }
    later, rejected = assign(everything[already:], 0.3, 0.3, packed=packed)
    where = {r.image: name for splits in (first, later) for name, members in splits.items() for r in members}
    assert where.keys() | {entry["image"] for entry in rejected} == {r.image for r in everything}
    for field in ("lesion", "patient"):
        seen: dict[str, set[str]] = {}
        for record in everything:
            if getattr(record, field) and record.image in where:
                seen.setdefault(getattr(record, field), set()).add(where[record.image])
        assert all(len(found) == 1 for found in seen.values()), (field, seen)


def test_splits_that_divide_a_patient_are_refused_unless_lesions_are_asked_for():
    given_ = [
        Record("a", "", "L", "P", split="train"),
        Record("b", "", "M", "P", split="test"),
        Record("c", "", "N", split="val"),
    ]
    with pytest.raises(UserError, match=r"other lesions of their patient: patient P .*data\.group_by=lesion"):
        assign(given_, 0.1, 0.1)
    splits, _ = assign(given_, 0.1, 0.1, by_patient=False)
    assert split_by_image(splits) == {"a": "train", "b": "test", "c": "val"}


def test_splits_that_come_with_the_data():
    given_ = [Record(f"i{n}", "", split=("train", "val", "test")[n % 3]) for n in range(30)]
    splits, _ = assign(given_, 0.3, 0.3)
    assert split_by_image(splits) == {r.image: r.split for r in given_}
    # If the data have no val split, val images are taken from the training images, never from the test images.
    without = [Record(f"i{n}", "", split=("train", "test")[n % 3 == 2]) for n in range(60)]
    splits, _ = assign(without, 0.3, 0.3)
    found = split_by_image(splits)
    assert all(found[r.image] == "test" for r in without if r.split == "test")
    assert {found[r.image] for r in without if r.split == "train"} == {"train", "val"}


def test_a_leak_in_what_comes_with_the_data():
    with pytest.raises(UserError, match=r"'L' \(a in train, b in test\)"):
        assign([Record("a", "", "L", split="train"), Record("b", "", "L", split="test")], 0.1, 0.1)


def test_a_pair_across_given_splits_costs_the_training_image():
    both = [Record("a", "", split="test"), Record("b", "", split="train"), Record("c", "", split="val")]
    splits, rejected = assign(both, 0.1, 0.1, [("a", "b")])
    assert rejected == [{"image": "b", "reason": "shows the lesion of a, which is in test"}]
    assert split_by_image(splits) == {"a": "test", "c": "val"}


def test_joined_groups_take_the_smaller_id():
    groups = Groups({"c": "test"})
    assert groups.join("b", "a") and groups.join("c", "b")
    assert {groups.find(g) for g in "abc"} == {"a"}
    assert groups.fixed_split("b") == "test"
    groups.fixed_splits["z"] = "train"
    assert not groups.join("z", "a")


def test_shares_of_the_splits():
    found = [split_of(f"lesion {n}", 0.1, 0.2) for n in range(20_000)]
    assert abs(found.count("val") / 20_000 - 0.1) < 0.01
    assert abs(found.count("test") / 20_000 - 0.2) < 0.01


def test_few_groups_are_warned_of():
    rows = [("val", "a", "g1"), ("val", "a", "g1")] + [("test", "a", f"g{n}") for n in range(5)]
    assert small_class_warnings(rows, ["a"]) == ["class 'a' has only 1 groups (lesions, patients) in val"]


numbers = st.sampled_from(["", "1", "2", "3"])
kinds = st.sampled_from(["table", "PAD-UFES-20", "Derm7pt"])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(numbers, numbers, kinds), min_size=1, max_size=30))
def test_a_number_is_an_id_of_its_kind_and_data_set_only(ids):
    """Images are in one group exactly if a chain of equal lesions or patients of one data set joins them."""
    given_ = [Record(f"i{n}", "", lesion, patient, source=source) for n, (lesion, patient, source) in enumerate(ids)]
    splits, rejected = assign(given_, 0.3, 0.3)
    assert not rejected
    parts = [{r.image} for r in given_]
    for a in given_:
        for b in given_:
            same = a.source == b.source and ((a.lesion and a.lesion == b.lesion) or (a.patient and a.patient == b.patient))
            if same:
                one, two = (next(p for p in parts if r.image in p) for r in (a, b))
                if one is not two:
                    parts.remove(two)
                    one |= two
    found: dict[str, set[str]] = {}
    for image, group in groups_of(splits).items():
        found.setdefault(group, set()).add(image)
    assert sorted(map(sorted, found.values())) == sorted(map(sorted, parts))


def test_groups_that_were_packed_under_a_former_name():
    """Sets that were packed before bare numbers carried their data set: new photographs join the packed groups."""
    for split in ("train", "val", "test"):
        packed = {"a": PackedImage("7", "7", split)}
        packed["b"] = PackedImage("patient 9", "patient 9", split, patient="patient 9")
        new = [Record("c", "", "7", "", source="PAD-UFES-20"), Record("d", "", "", "9", source="PAD-UFES-20")]
        splits, rejected = assign(new, 0.3, 0.3, packed=packed)
        assert split_by_image(splits) == {"c": split, "d": split} and not rejected


def test_shares_are_stated_and_a_large_group_is_warned_of():
    images = {"train": 70, "val": 10, "test": 20}
    (line,) = share_lines(images, ("L", 5), 0.1, 0.1)
    assert line.startswith("share of the images, wanted / got: train 80.0% / 70.0%, val 10.0% / 10.0%, test 10.0% / 20.0%")
    assert len(share_lines(images, ("L", 5), 0.2, 0.0)) == 1, "a split that nobody wants makes no group too large"
    _, warning = share_lines(images, ("L", 6), 0.1, 0.1)
    assert "the largest group 'L' holds 6 of 100 images, more than half of the wanted share of val (10)" in warning
