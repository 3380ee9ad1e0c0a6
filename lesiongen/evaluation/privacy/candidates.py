"""The folder private/ of the samples: what only the owner of the training images may see.

- codes/<attempt>-<first sample>.safetensors: codes and bits per token of each batch of samples. The evaluation compares them
  with the codes of the training images, and a sampling that was killed continues from them.
With a gate (gate.py) there are also
- candidates.csv: each attempt at each sample, its distances to the training views, the nearest images' ids, and the verdict;
- gate.json: the rules and the thresholds;
- rejected/: the images that the gate has rejected.

The sample stage writes the folder; the evaluate stage reads it.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from hpc.errors import UserError
from hpc.run.rundir import atomic_write
from lesiongen.data.tables import read_csv, write_csv
from lesiongen.priors.code_sampler import Codes

PRIVATE_FOLDER = "private"


class Candidates:
    """Reads and writes the private files of one directory of samples.

    Attributes:
        folder: The folder private/.
    """

    def __init__(self, samples: Path):
        """Names the files. `samples` is the directory of the samples."""
        self.folder = samples / PRIVATE_FOLDER

    # Codes

    def load(self, attempt: int, indices: Sequence[int]) -> Codes | None:
        """Returns the codes of a batch that was sampled before, None if there are none or they are other samples'."""
        path = self._codes_path(attempt, indices[0])
        codes = _read(path) if path.exists() else None
        return codes if codes is not None and codes.indices.tolist() == list(indices) else None

    def save(self, attempt: int, batch: Codes) -> None:
        """Writes the codes of a batch of candidates."""
        arrays = {"index": batch.indices} | {f"bits.{level}": bits for level, bits in batch.bits.items()}
        arrays |= {f"codes.{level}": codes for level, codes in batch.codes.items()}
        content = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
        atomic_write(self._codes_path(attempt, batch.indices[0]), content)

    def _codes_path(self, attempt: int, first: int) -> Path:
        return self.folder / "codes" / f"{attempt:03d}-{first:06d}.safetensors"

    def read(self, chosen: dict[int, int]) -> Codes:
        """Reads the codes of some candidates.

        Args:
            chosen: The attempt to read of each sample, by the sample's index.

        Returns:
            The codes, in the order of `chosen`.

        Raises:
            UserError: The folder does not hold them.
        """
        found: dict[int, Codes] = {}
        for attempt in sorted(set(chosen.values())):
            for path in sorted(self.folder.glob(f"codes/{attempt:03d}-*.safetensors")):
                batch = _read(path)
                for i, index in enumerate(batch.indices.tolist()):
                    if chosen.get(index) == attempt:
                        found[index] = Codes(
                            batch.indices[i : i + 1],
                            {level: codes[i : i + 1] for level, codes in batch.codes.items()},
                            {level: bits[i : i + 1] for level, bits in batch.bits.items()},
                        )
        if missing := [index for index in chosen if index not in found]:
            raise UserError(
                f"{self.folder} lacks the codes of sample {missing[0]}. The evaluation and the gate need them; sample again "
                "(--fresh samples)."
            )
        parts = [found[index] for index in chosen]
        return Codes(
            np.concatenate([part.indices for part in parts]),
            {level: np.concatenate([part.codes[level] for part in parts]) for level in parts[0].codes},
            {level: np.concatenate([part.bits[level] for part in parts]) for level in parts[0].bits},
        )

    def first_attempts(self) -> Codes:
        """Reads the codes of the first attempt at each sample: the generator's samples before any gate.

        Raises:
            UserError: The folder holds no codes.
        """
        paths = sorted(self.folder.glob("codes/000-*.safetensors"))
        return self.read({index: 0 for path in paths for index in _read(path).indices.tolist()} or {0: 0})

    def accepted(self, indices: Sequence[int]) -> Codes:
        """Reads the codes of the samples that were not left out.

        Args:
            indices: The samples' indices, as in metadata.csv.
        """
        attempts = {int(row["index"]): int(row["attempt"]) for row in self.rows() if not row["reason"]}
        return self.read({index: attempts.get(index, 0) for index in indices})

    def check(self) -> None:
        """Raises UserError if the codes of a sample are missing, as they are beside samples of older versions."""
        self.read({int(row["index"]): 0 for row in read_csv(self.folder.parent / "metadata.csv")})

    # The gate's verdicts

    def rows(self) -> list[dict[str, str]]:
        """Reads candidates.csv; [] without a gate. An empty `reason` means that the candidate was accepted."""
        path = self.folder / "candidates.csv"
        return read_csv(path) if path.exists() else []

    def verdicts(self) -> dict[int, dict[int, str]]:
        """Returns the reason of each candidate, "" for an accepted one: {attempt: {index: reason}}."""
        verdicts: dict[int, dict[int, str]] = {}
        for row in self.rows():
            verdicts.setdefault(int(row["attempt"]), {})[int(row["index"])] = row["reason"]
        return verdicts

    def add(self, attempt: int, columns: dict[str, list]) -> None:
        """Adds the candidates of an attempt to candidates.csv; replaces what it held of this attempt and later ones."""
        before = [row for row in self.rows() if int(row["attempt"]) < attempt]
        merged = [[row[name] for row in before] + columns[name] for name in columns]
        write_csv(self.folder / "candidates.csv", columns, zip(*merged, strict=True))

    def limits(self) -> dict | None:
        """Reads gate.json; None if there is none."""
        try:
            return json.loads((self.folder / "gate.json").read_text())
        except FileNotFoundError:
            return None

    def write_limits(self, limits: dict) -> None:
        """Writes gate.json."""
        atomic_write(self.folder / "gate.json", json.dumps(limits, indent=1).encode() + b"\n")


def _read(path: Path) -> Codes:
    """Reads a file of codes. Raises UserError if it is damaged."""
    try:
        arrays = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}). Sample again (--fresh samples).") from None
    of = {kind: {n.removeprefix(kind): a for n, a in arrays.items() if n.startswith(kind)} for kind in ("codes.", "bits.")}
    return Codes(arrays["index"], of["codes."], of["bits."])
