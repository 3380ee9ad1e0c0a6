"""What is known of an image and may steer its codes: label, site, sex, age band.

Of each there is a vocabulary; a number is a place in it, -1 stands for unknown."""

from collections.abc import Sequence

import numpy as np

from hpc.data.codestore import CodeStore
from hpc.errors import UserError

AGE_BANDS = ("0-19", "20-39", "40-59", "60-79", "80+")  # years
FACTS = ("label", "site", "sex", "age_band")  # columns of the code store


def vocabularies(store: CodeStore, names: Sequence[str]) -> dict[str, list[str]]:
    """Values of each fact asked for. Raises UserError for one that no image of the store has; labels may be none at all."""
    known = {name: store.manifest["vocabularies"].get(name, []) for name in FACTS}
    for name in names:
        if name != "label" and not known[name]:
            there = ", ".join(n for n, values in known.items() if values) or "none"
            raise UserError(
                f"No image behind {store.folder} has a '{name}', so a prior cannot learn from it; facts here: {there}."
            )
    return {name: known[name] for name in names}


def count_combinations(store: CodeStore, names: Sequence[str]) -> list[str]:
    """Each combination of facts among the training images and how many have it, as text: "label site … count"."""
    if not names:
        return []
    columns = store.all("train", 0, list(names))
    rows, counts = np.unique(np.stack([columns[n] for n in names], 1), axis=0, return_counts=True)
    return [" ".join(map(str, [*row, count])) for row, count in zip(rows.tolist(), counts.tolist(), strict=True)]


def columns_of(facts: dict, vocabularies: dict[str, list[str]]) -> dict[str, int]:
    """int16 columns of one image; -1 for unknown."""
    age = facts.get("age")
    named = {
        "label": facts.get("dx"),
        "age_band": None if age is None else AGE_BANDS[min(int(age) // 20, 4)],
        **{c: facts.get(c) for c in ("site", "sex", "licence")},
    }
    return {c: vocabularies[c].index(v) if v in vocabularies[c] else -1 for c, v in named.items()}


class PriorFacts:
    """The facts of one exported prior: their values, and how they occur together in its training images."""

    def __init__(self, values: dict[str, list[str]], count_combinations: list[str]):
        self.values = values
        table = np.array([line.split() for line in count_combinations], dtype=np.int64).reshape(-1, len(values) + 1)
        self.rows, self.counts = table[:, :-1], table[:, -1]
        self.kept: dict[tuple[int, ...], tuple[np.ndarray, np.ndarray]] = {}

    def numbers(self, known: dict[str, str]) -> list[int]:
        """The facts as the prior takes them; -1 for what is not known."""
        return [v.index(known[n]) if known.get(n) else -1 for n, v in self.values.items()]

    def complete(self, known: dict[str, str], uniform: float) -> dict[str, str]:
        """What is missing in `known`, drawn together from the training images that have the rest in common. Where none has,
        those of the label decide, else all."""
        if all(name in known for name in self.values) or not len(self.rows):
            return {}
        rows, cumulative = self._like(known)
        row = rows[min(int(cumulative.searchsorted(uniform * cumulative[-1], side="right")), len(rows) - 1)]
        found = zip(self.values.items(), row.tolist(), strict=True)
        return {name: values[i] if i >= 0 else "" for (name, values), i in found if name not in known}

    def _like(self, known: dict[str, str]) -> tuple[np.ndarray, np.ndarray]:
        numbers = self.numbers(known)
        given = [n in known for n in self.values]
        key = tuple(i if there else -2 for i, there in zip(numbers, given, strict=True))
        if key not in self.kept:
            label = [there and name == "label" for name, there in zip(self.values, given, strict=True)]
            for wanted in (given, label, [False] * len(given)):
                like = (self.rows[:, wanted] == np.array(numbers)[wanted]).all(1)
                if like.any():
                    break
            self.kept[key] = self.rows[like], self.counts[like].cumsum()
        return self.kept[key]


def refuse_unknown(given: dict[str, str], priors: Sequence[PriorFacts]) -> None:
    """Raises UserError for a fact or value that no prior of the generator knows."""
    known = {name: values for prior in priors for name, values in prior.values.items() if name != "label"}
    for name, value in given.items():
        if name not in known:
            there = ", ".join(known) or "none but the label"
            raise UserError(
                f"sample.facts: this generator's priors were not trained with '{name}'; they know {there}. "
                "priors.<level>.facts says what a prior learns from."
            )
        if value and value not in known[name]:
            raise UserError(f"sample.facts: no '{value}' among the values of {name}: {', '.join(known[name])}.")
