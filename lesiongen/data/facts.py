"""Facts of an image that can condition a prior: label, site, sex and age band.

The vocabulary of a fact is the list of its values. The code store and the priors hold a fact as an index into its vocabulary,
or -1 if the fact is unknown for the image. Packing writes the vocabularies into the manifest of the shards, the encode stage
copies them into the code store, and each prior's export holds the vocabularies of the facts that the prior uses.
"""

from collections.abc import Sequence

import numpy as np

from hpc.data.codestore import CodeStore
from hpc.errors import UserError

AGE_BANDS = ("0-19", "20-39", "40-59", "60-79", "80+")  # years
FACTS = ("label", "site", "sex", "age_band")  # columns of the code store


def vocabularies(store: CodeStore, names: Sequence[str]) -> dict[str, list[str]]:
    """Returns the vocabulary of each named fact. The vocabulary of "label" may be empty.

    Raises:
        UserError: The vocabulary of another fact is empty, so a prior cannot be conditioned on that fact.
    """
    known = {name: store.manifest["vocabularies"].get(name, []) for name in FACTS}
    for name in names:
        if name != "label" and not known[name]:
            available = ", ".join(n for n, values in known.items() if values) or "none"
            raise UserError(
                f"No image in the code store {store.folder} has a '{name}', so a prior cannot learn from it. Available facts: "
                f"{available}."
            )
    return {name: known[name] for name in names}


def count_combinations(store: CodeStore, names: Sequence[str]) -> list[str]:
    """Counts how often each combination of facts occurs among the training images.

    Args:
        store: The code store.
        names: The facts.

    Returns:
        A line for each combination, such as "0 1 73": the index of each fact's value, in the order of `names`, then the
        number of images. An empty list if `names` is empty.
    """
    if not names:
        return []
    columns = store.all("train", 0, list(names))
    rows, counts = np.unique(np.stack([columns[n] for n in names], 1), axis=0, return_counts=True)
    return [" ".join(map(str, [*row, count])) for row, count in zip(rows.tolist(), counts.tolist(), strict=True)]


def fact_indices(facts: dict, vocabularies: dict[str, list[str]]) -> dict[str, int]:
    """Converts the facts of one image to the columns of the code store.

    Args:
        facts: The image's facts as its shard holds them; "dx" is the label, "age" is in years.
        vocabularies: The vocabulary of each column.

    Returns:
        For each column, the index of the image's value, or -1 if the value is unknown. All indices fit into int16.
    """
    age = facts.get("age")
    values = {
        "label": facts.get("dx"),
        "age_band": None if age is None else AGE_BANDS[min(int(age) // 20, 4)],
        **{c: facts.get(c) for c in ("site", "sex", "licence")},
    }
    return {c: vocabularies[c].index(v) if v in vocabularies[c] else -1 for c, v in values.items()}


class PriorFacts:
    """The facts that one exported prior is conditioned on, and how often each combination occurs in training.

    The sample stage creates a PriorFacts for each level's prior and draws the facts that the user left open with it.

    Attributes:
        values: The vocabulary of each fact, in the order in which the prior expects the facts.
        rows: Every combination of facts in the training images, as indices, [N, facts].
        counts: Number of training images with each combination, [N].
    """

    def __init__(self, values: dict[str, list[str]], combinations: list[str]):
        """Parses the lists in the prior's export.

        Args:
            values: The vocabulary of each fact, from `vocabularies`.
            combinations: Lines from `count_combinations`.
        """
        self.values = values
        table = np.array([line.split() for line in combinations], dtype=np.int64).reshape(-1, len(values) + 1)
        self.rows, self.counts = table[:, :-1], table[:, -1]
        self._matches: dict[tuple[int, ...], tuple[np.ndarray, np.ndarray]] = {}

    def trained_labels(self) -> list[str]:
        """Returns the labels that at least one training image has. The prior must be conditioned on the label."""
        seen = set(self.rows[:, list(self.values).index("label")].tolist())
        return [label for i, label in enumerate(self.values["label"]) if i in seen]

    def numbers(self, facts: dict[str, str]) -> list[int]:
        """Returns the index of each fact's value, in the prior's order of facts; -1 for a fact that is missing or ""."""
        return [values.index(facts[name]) if facts.get(name) else -1 for name, values in self.values.items()]

    def complete(self, facts: dict[str, str], uniform: float) -> dict[str, str]:
        """Draws the missing facts: draws one training image at random and copies its facts.

        The image is drawn among the training images that have all facts in `facts`. If there are none, it is drawn among
        those with the same label, and if there are none either, among all.

        Args:
            facts: The facts that are fixed; "" fixes a fact as unknown.
            uniform: Random number in [0, 1) that selects the image.

        Returns:
            The drawn facts only; "" for a fact that is unknown for the drawn image.
        """
        if all(name in facts for name in self.values) or not len(self.rows):
            return {}
        rows, cumulative = self._matching(facts)
        row = rows[min(int(cumulative.searchsorted(uniform * cumulative[-1], side="right")), len(rows) - 1)]
        drawn = zip(self.values.items(), row.tolist(), strict=True)
        return {name: values[i] if i >= 0 else "" for (name, values), i in drawn if name not in facts}

    def _matching(self, facts: dict[str, str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the combinations that complete() draws from, and the cumulative sum of their counts. Caches the result."""
        numbers = self.numbers(facts)
        is_fixed = [name in facts for name in self.values]
        key = tuple(i if fixed else -2 for i, fixed in zip(numbers, is_fixed, strict=True))
        if key not in self._matches:
            only_label = [fixed and name == "label" for name, fixed in zip(self.values, is_fixed, strict=True)]
            # Compare all fixed facts, then the label alone, then no fact, which matches every row.
            for columns in (is_fixed, only_label, [False] * len(is_fixed)):
                matching = (self.rows[:, columns] == np.array(numbers)[columns]).all(1)
                if matching.any():
                    break
            self._matches[key] = self.rows[matching], self.counts[matching].cumsum()
        return self._matches[key]


def refuse_unknown(facts: dict[str, str], priors: Sequence[PriorFacts]) -> None:
    """Checks the facts that the user asks for in sample.facts.

    Args:
        facts: The facts asked for; "" for unknown.
        priors: The PriorFacts of every level.

    Raises:
        UserError: No prior is conditioned on one of the facts, or its value is not in the fact's vocabulary.
    """
    known = {name: values for prior in priors for name, values in prior.values.items() if name != "label"}
    for name, value in facts.items():
        if name not in known:
            available = ", ".join(known) or "none but the label"
            raise UserError(
                f"sample.facts: this generator's priors were not trained with '{name}'. Facts that they know: {available}. "
                "To train a prior with another fact, add it to priors.<level>.facts."
            )
        if value and value not in known[name]:
            raise UserError(f"sample.facts: '{value}' is not a known value of {name}; choose among {', '.join(known[name])}.")
