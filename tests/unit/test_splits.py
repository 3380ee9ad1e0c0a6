"""No group is in two splits: with splits that come with the data, after appending, and after images are found to be alike."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc.errors import UserError
from lesiongen.ingest.catalog import Record
from lesiongen.ingest.splits import Groups, assign, small_class_warnings, split_of

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
    packed = {r.image: (r.own_group, r.group, name) for name, members in first.items() for r in members}
    later, rejected = assign(everything[already:], 0.3, 0.3, pairs, packed)
    now = {image: split for image, (_, _, split) in packed.items()} | split_by_image(later)
    refused = {entry["image"] for entry in rejected}
    assert now.keys() | refused == {r.image for r in everything}
    assert all(now[image] == split for image, (_, _, split) in packed.items())
    groups: dict[str, set[str]] = {}
    for split, members in later.items():
        for r in members:
            groups.setdefault(r.group, set()).add(split)
    for _, group, split in packed.values():
        groups.setdefault(group, set()).add(split)
    assert all(len(found) == 1 for found in groups.values())
    new = {r.image for r in everything[already:]} - refused
    for a, b in pairs:
        if {a, b} & new and {a, b} <= now.keys():
            assert now[a] == now[b]
    for n in range(0, 30, 2):  # images n and n + 1 show one lesion
        if {f"i{n}", f"i{n + 1}"} <= now.keys():
            assert now[f"i{n}"] == now[f"i{n + 1}"]


def test_the_group_is_the_lesion_else_the_patient_else_the_image():
    splits, _ = assign([Record("a", "", "L", "P"), Record("b", "", "", "P"), Record("c", "")], 0.1, 0.1)
    assert {r.image: r.group for members in splits.values() for r in members} == {"a": "L", "b": "P", "c": "c"}


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
