"""CodeRows: random reads of a code store, from memory or from mapped files, return the requested rows in order."""

import numpy as np
import pytest
import torch

from hpc.data import manifest, rows
from hpc.data.codestore import CodeStore, code_dtype, file_name, write_codes
from hpc.data.rows import CodeRows

COUNTS = {0: 5, 3: 7, 4: 1}  # {shard: rows}; shard numbers may have gaps


@pytest.fixture(params=[200, 512, 40_000, 70_000])
def store(request, tmp_path) -> tuple[CodeStore, dict]:
    """Returns a store with three shards in two draws, with codes of 8, 16 or 32 bits, and the expected rows."""
    rng, entries, truth = np.random.default_rng(0), [], {}
    for draw in (0, 1):
        for shard, count in COUNTS.items():
            codes = rng.integers(0, request.param, (count, 2, 3))
            codes[0, 0, 0] = request.param - 1
            arrays = {"codes.top": codes.astype(code_dtype(request.param)), "sex": rng.integers(-1, 2, count).astype(np.int16)}
            write_codes(tmp_path, "train", draw, shard, arrays)
            path = tmp_path / file_name("train", draw, shard)
            entries.append(manifest.describe(path, split="train", draw=draw, shard=shard, count=count))
            truth |= {(draw, shard, i): (codes[i], arrays["sex"][i]) for i in range(count)}
    manifest.write(tmp_path, {"levels": [], "shards": entries})
    return CodeStore(tmp_path), truth


@pytest.mark.parametrize("resident", [True, False])
def test_rows_are_those_asked_for(store, resident):
    store, truth = store
    data = CodeRows(store, "train", ["codes.top", "sex"], torch.device("cpu"), resident)
    assert (data.size, data.draws, data.resident) == (13, 2, resident)
    row_keys = list(truth)
    chosen = [row_keys[i] for i in np.random.default_rng(1).integers(0, len(row_keys), 40)]
    found = data.gather_rows(chosen)
    assert found["codes.top"].dtype == found["sex"].dtype == torch.int64
    assert np.array_equal(found["codes.top"], np.stack([truth[p][0] for p in chosen]))
    assert found["sex"].tolist() == [truth[p][1] for p in chosen]
    assert [tuple(p) for p in data.all(1).tolist()] == [p for p in row_keys if p[0] == 1]


def test_a_store_lies_in_memory_only_where_it_fits(store, monkeypatch):
    store, _ = store
    cpu = torch.device("cpu")
    assert CodeRows(store, "train", ["codes.top"], cpu).resident
    size = CodeRows(store, "train", ["codes.top"], cpu).size_in_bytes()
    assert size == 26 * 6 * store.arrays("train", 0, 0)["codes.top"].itemsize
    monkeypatch.setattr(rows, "free_memory", lambda device: 2 * size - 1)
    assert not CodeRows(store, "train", ["codes.top"], cpu).resident


def test_memory_is_shared_by_the_ranks_of_a_machine(monkeypatch):
    for name in ("SLURM_NTASKS_PER_NODE", "SLURM_MEM_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    alone = rows.free_memory(torch.device("cpu"))
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "0")
    assert rows.free_memory(torch.device("cpu")) == pytest.approx(alone, rel=0.2)
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "100")
    assert rows.free_memory(torch.device("cpu")) == 100 * 2**20
    monkeypatch.delenv("SLURM_MEM_PER_NODE")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert rows.free_memory(torch.device("cpu")) < alone / 500
