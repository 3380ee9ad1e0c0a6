"""What MLflow shows of a run and of its stages: names, parameters, tags, data sets, figures, status and notes.

All of it is read from the run directory: config.yaml, and each stage's stage.json, metrics.jsonl and alarms.jsonl. This file
needs no MLflow; mlflow_sync.py sends what it returns.
"""

import itertools
import json
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from hpc.run.metrics_log import METRICS_FILE, read_alarms, read_held_out
from hpc.run.rundir import STAGE_KINDS, is_locked

SECTIONS = {"shards": "data", "codes": "encode", "samples": "sample", "report": "evaluate"}  # of stages with another name
QUIET_S = 600.0  # a stage that began on another machine was killed if its files are older, and no process has locked it
NOTE_FILE, NOTE_TAG = "note.md", "mlflow.note.content"
Dataset = tuple[str, str, str, str]  # name, digest, directory, and what the stage has to do with it


def is_stage(name: str) -> bool:
    """Returns whether a directory of a run has the name of a stage."""
    kind, _, level = name.partition("-")
    return kind in STAGE_KINDS and bool(level) == (kind == "prior")


def run_name(stage: str, record: dict) -> str:
    """Returns the name of a stage's MLflow run, such as "prior-top · gpt 4×192 · 2.0 M"."""
    return " · ".join(filter(None, (stage, record.get("title"))))


def parameters(stage: str, record: dict, config: dict) -> dict:
    """Returns a stage's parameters: values outside of sections, what stage.json says it was made from, its section.

    The section of each prior is called "prior", so that MLflow compares priors of all levels.
    """
    kind, _, level = stage.partition("-")
    section = config.get(f"{kind}s", {}).get(level) if level else config.get(SECTIONS.get(stage, stage))
    found = {k: v for k, v in config.items() if v is not None and not isinstance(v, dict)}
    found |= dict(flatten(record.get("identity", {}))) | dict(flatten({SECTIONS.get(kind, kind): section or {}}))
    return found | dict(flatten({"input": record.get("inputs", {})}))


def tags(stage_dir: Path, record: dict) -> dict[str, str]:
    """Returns a stage's tags: who made it with which code on which machine, why it ended, and its alarms."""
    made = record.get("environment", {})
    found = {
        "mlflow.user": made.get("user"),
        "mlflow.source.name": short_command(made.get("command", [])),
        "command": " ".join(made.get("command", ())),
        "mlflow.source.type": "JOB" if made.get("job") else "LOCAL",
        "mlflow.source.git.commit": made.get("versions", {}).get("commit"),
        "host": made.get("host"),
        "cluster.job": made.get("job"),
        "ended": record.get("ended", {}).get("reason"),
        NOTE_TAG: note_of(stage_dir),
        **alarms(stage_dir),
    }
    return {key: str(value)[:5000] for key, value in found.items() if value}


def short_command(command: list[str]) -> str:
    """Returns the first words of a command line, such as "lesiongen run ham10000-cpu.yaml", without overrides and options."""
    words = itertools.takewhile(lambda word: "=" not in word and not word.startswith("-"), command[1:])
    return " ".join(["lesiongen", *(Path(word).name for word in words)])


def alarms(stage_dir: Path) -> dict[str, str]:
    """Returns a tag for each kind of alarm of a stage, with the text of the newest."""
    return {f"alarm.{entry['kind']}": entry["text"] for entry in read_alarms(stage_dir)}


def datasets(stage_dir: Path, record: dict, config: dict) -> list[Dataset]:
    """Returns the artefacts that a stage was made from, and the one that it has made, as data sets with their digests.

    MLflow shows all runs of a data set, so a user can follow shards → tokenizer → codes → priors → samples → report.
    """
    others = config.get("inputs") or {}
    found = []
    for name, digest in record.get("inputs", {}).items():
        other = others.get(name)
        place = other if isinstance(other, str) else " ".join(other or ()) or str(stage_dir.with_name(name))
        found += [(name, digest, place, "made from")] if digest else []
    if record.get("done") and record.get("digest"):
        found.append((stage_dir.name, record["digest"], str(stage_dir), "made here"))
    return found


def status(stage_dir: Path, record: dict) -> str:
    """Returns MLflow's word for the state of a stage.

    A stage is RUNNING while a process has locked its directory. Locks may not reach other machines; there, new files show it.
    """
    if record.get("done"):
        return "FINISHED"
    if is_locked(stage_dir):
        return "RUNNING"
    if ended := record.get("ended"):
        return "KILLED" if ended["how"] == "stopped" else "FAILED"
    if record.get("environment", {}).get("host") == socket.gethostname():
        return "KILLED"
    times = [path.stat().st_mtime for name in (METRICS_FILE, "stage.json") if (path := stage_dir / name).exists()]
    return "RUNNING" if time.time() - max(times, default=0.0) < QUIET_S else "KILLED"


def run_status(statuses: dict[str, str], finished: bool) -> str:
    """Returns MLflow's word for the state of a whole run; SCHEDULED if its next stage has not begun.

    Args:
        statuses: The status of each stage that has begun.
        finished: Whether the run's last stage is done.
    """
    for word in ("RUNNING", "FAILED", "KILLED"):
        if word in statuses.values():
            return word
    return "FINISHED" if finished else "SCHEDULED"


def figures(stage_dir: Path) -> tuple[int, dict[str, float]]:
    """Returns the samples and values of a stage's newest held-out metrics, named as the run shows them: "tokenizer/psnr".

    Metrics of single classes, such as "perplexity/top/mel", are left out.
    """
    samples, found = read_held_out(stage_dir)
    return samples, {f"{stage_dir.name}/{name}": value for name, value in found.items() if name.count("/") < 2}


def note(stage_dirs: list[Path], records: dict[str, dict], statuses: dict[str, str]) -> str:
    """Returns the note on a whole run as Markdown: the notes of its stages, the last first, then a table of its stages.

    Args:
        stage_dirs: The stages' directories.
        records: The content of each stage's stage.json.
        statuses: The status of each stage.
    """
    notes = [text for path in reversed(stage_dirs) if (text := note_of(path))]
    lines = ["| stage | | state | held out |", "| --- | --- | --- | --- |"]
    for path in stage_dirs:
        _, found = read_held_out(path)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in list(found.items())[:4])
        lines.append(f"| {path.name} | {records[path.name].get('title', '')} | {statuses[path.name].lower()} | {shown} |")
    return "\n\n".join([*notes, "\n".join(lines)])[:8000]


def note_of(stage_dir: Path) -> str:
    """Returns the note that a stage has written about its result, Markdown; "" without one."""
    path = stage_dir / NOTE_FILE
    return path.read_text(encoding="utf-8")[:5000] if path.exists() else ""


def flatten(value: object, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields dotted keys and values of nested data as short strings that MLflow accepts as parameters."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from flatten(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        yield re.sub(r"[^\w\-. /:]", "_", prefix)[:250], text[:500]
