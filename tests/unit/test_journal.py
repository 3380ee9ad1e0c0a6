"""Journals, and what crashes and power failures leave in them."""

from hpc.run import journal, metrics_log
from hpc.run.metrics_log import MetricsLog, read_metrics
from launch import slurm

TORN = b'{"step": 9, "samples": 90, "train/lo'
NO_ENTRIES = [TORN, b"\0" * 40, b'"\xff\xfe"', b"12", b"[1]", b"null", b"{}", b""]
NO_METRICS = [b'{"step": 1}', b'{"samples": "x"}', b'{"samples": 1, "a": []}']


def test_a_damaged_line_of_a_journal_costs_no_other_line(tmp_path):
    """Every reader skips damaged lines, and an append begins a new line after one that has no end."""
    folder = tmp_path / "tokenizer"
    log, damaged = MetricsLog(folder), [*NO_ENTRIES, *NO_METRICS]
    for i, line in enumerate([*damaged, TORN, b"\0" * 9]):
        log.log(i, 10 * i, {"train/loss": 0.5})
        with open(folder / "metrics.jsonl", "ab") as file:
            file.write(line + (b"\n" if i < len(damaged) else b""))
    log.log(99, 990, {"train/loss": 0.25})
    expected = [10 * i for i in range(len(damaged) + 2)] + [990]
    assert [row["samples"] for row in read_metrics(folder)] == expected
    assert metrics_log.samples_seen(folder) == 990
    log.resume(500)
    assert [row["samples"] for row in read_metrics(folder)] == expected[:-1]


def test_entries_without_what_a_reader_needs(tmp_path):
    jobs = tmp_path / "jobs" / "tokenizer" / "submitted.jsonl"
    jobs.parent.mkdir(parents=True)
    for line in NO_ENTRIES:
        journal.append(jobs, {"job": "7"}, {"after": []})
        jobs.write_bytes(jobs.read_bytes() + line)
    assert slurm.last_job(tmp_path, "tokenizer") == "7"
    assert len(journal.read(jobs)) == 2 * len(NO_ENTRIES)
    journal.cut_back(jobs, lambda entry: entry["job"] == "7")
    assert journal.read(jobs) == [{"job": "7"}] * len(NO_ENTRIES)


def test_nothing_is_written_without_entries(tmp_path):
    journal.append(tmp_path / "a.jsonl")
    assert not (tmp_path / "a.jsonl").exists()
    assert journal.read(tmp_path / "a.jsonl") == []
