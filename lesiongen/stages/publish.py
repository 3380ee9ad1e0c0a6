"""publish: a finished run → one folder that holds a generator and nothing of the training images, to share.

This is a command, not a stage of a run. The folder has the form of a run's directory, so every command that needs only the
models takes it, and so does lesiongen.load():

    README.md      model card: how to load it, the report's verdict, training data and licences
    config.yaml    the settings of the models and of sampling
    tokenizer/, polish/, prior-<level>/    export/ (weights in safetensors) and stage.json (digest)
    samples.png    the contact sheet of the samples
    report.html    the report without real images

Checkpoints, logs, codes, and pictures of training images stay behind.
"""

import contextlib
import json
import shlex
import shutil
import time
from pathlib import Path

import yaml

from hpc.config import read_yaml, to_plain
from hpc.errors import UserError
from hpc.run import journal
from hpc.run.rundir import atomic_write, read_stage_record
from lesiongen.evaluation.card import card
from lesiongen.evaluation.report.verdict import in_lines
from lesiongen.experiment import Experiment
from lesiongen.ingest.licences import canonical_name, merge_counts, strictest
from lesiongen.stages.base import artefact, digest_of, model_stages, require

PUBLISHED = "published.jsonl"  # file in the run: a line for each folder that was published
PLACEHOLDER = "IMAGES"  # data.images of a published config: its training images are elsewhere


def publish(config: Experiment, out: Path, force: bool) -> None:
    """Writes the folder.

    Args:
        config: The run's config.
        out: The folder, which must not exist or be empty.
        force: Publish also what has no report, or a report that advises against it.

    Raises:
        UserError: A model is not finished, the report does not allow it, or the folder holds something.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already. Give --out a new folder.")
    names = model_stages(config)
    folders = {name: require(config, name) for name in names}
    report = _report(config, force)
    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    for name, folder in folders.items():
        shutil.copytree(folder / "export", unfinished / name / "export", ignore=shutil.ignore_patterns(".*"))
        record = {key: read_stage_record(folder)[key] for key in ("digest", "done", "target")}
        record |= {"identity": {}, "inputs": {}, "published": time.strftime("%Y-%m-%d")}  # settings may name paths
        atomic_write(unfinished / name / "stage.json", json.dumps(record, indent=1).encode())
    for name, source in {"samples.png": "samples/contact.png", "report.html": "report/share.html"}.items():
        if report and (config.directory / source).exists():
            shutil.copyfile(config.directory / source, unfinished / name)
    atomic_write(unfinished / "config.yaml", yaml.safe_dump(_shared_config(config), sort_keys=False).encode())
    about = [read_yaml(folder / "export" / "config.yaml") for folder in folders.values()]
    atomic_write(unfinished / "README.md", _readme(config, about, report).encode())
    if out.exists():
        out.rmdir()
    unfinished.rename(out)
    # A withdrawal of training images must find what was published (launch/withdraw.py). The run may be somebody else's.
    with contextlib.suppress(OSError):
        journal.append(config.directory / PUBLISHED, {"folder": str(out.absolute()), "time": time.time()})


def _report(config: Experiment, force: bool) -> dict:
    """Returns the metrics of the run's report; {} without a report. Raises UserError if they do not allow to publish."""
    record = read_stage_record(config.directory / "report")
    current = {name: digest_of(config, name) for name in model_stages(config)}
    if not record or not record["done"] or any(record["inputs"].get(name) != digest for name, digest in current.items()):
        if force:
            return {}
        raise UserError(
            f"{config.directory} has no finished report of these models, so nothing is known about what they reveal of the "
            "training images. Run `lesiongen evaluate`, or publish without a report: --force."
        )
    metrics = json.loads((config.directory / "report" / "metrics.json").read_text())
    if metrics["verdict"]["overall"] == "do not share" and not force:
        raise UserError(f"The report advises against it. {in_lines(metrics['verdict'])}\nTo publish all the same: --force.")
    return metrics


def _shared_config(config: Experiment) -> dict:
    """Returns the part of the config that the models and sampling need. It holds no path of this machine."""
    plain = to_plain(config)
    shared = {
        "name": config.name,
        "data": {"images": PLACEHOLDER} | {key: plain["data"][key] for key in ("size", "channels", "preprocess")},
        "tokenizer": {"model": plain["tokenizer"]["model"]},
        "priors": {level: {key: to_plain(config.prior(level))[key] for key in ("model", "facts")} for level in config.levels},
        "sample": plain["sample"] | {"gate": None},
    }
    return shared | ({"polish": {}} if "polish" in model_stages(config) else {})


def _readme(config: Experiment, about: list[dict], report: dict) -> str:
    """Returns the model card, with the front matter that the Hugging Face Hub reads.

    Args:
        config: The run's config.
        about: The content of each export's config.yaml.
        report: The metrics of the report; {} without one.
    """
    data = merge_counts(*(export["data"] for export in about))
    licence = canonical_name(strictest(data["licences"]))
    named = {"license": "cc0-1.0"} if licence == "CC-0" else {"license": "other", "license_name": licence}
    front = {
        "library_name": "lesiongen",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["dermatology", "skin-lesions", "synthetic-images", "vq-vae", "autoregressive"],
        **named,
    }
    prior = config.prior(config.levels[0])
    facts = {name: read_stage_record(artefact(config, name))["digest"] for name in model_stages(config)}
    labels = next((export["facts"]["label"] for export in about if export.get("facts", {}).get("label")), [])
    facts |= {"image size": f"{about[0]['size']} px", "labels": ", ".join(labels) or "none"}
    facts |= {"prior": f"{prior.model.kind}, conditioned on {', '.join(prior.facts) or 'nothing'}"}
    lines = ["---", yaml.safe_dump(front, sort_keys=False).strip(), "---", "", card("generator", config.name, facts, data, {})]
    call, option = (f"{labels[0]!r}, ", f"--label {shlex.quote(labels[0])} ") if labels else ("", "")
    lines += [
        "## Load",
        "",
        "```python",
        "import lesiongen",
        "",
        'generator = lesiongen.load(".")  # this folder',
        f"samples = generator.sample({call}n=4, seed=0)",
        'samples.pictures()[0].save("sample.png")',
        "```",
        "",
        f"Or `lesiongen sample . {option}-n 100 --out samples`, with a table of what each shows.",
        "",
        "## What the report says",
        "",
    ]
    if report:
        lines += [
            f"{in_lines(report['verdict']).replace('  - ', '- ')}",
            "",
            "All figures: `report.html`. Samples: `samples.png`.",
        ]
    else:
        lines += ["There is no report: nothing is known about what these models reveal of the training images."]
    return "\n".join([*lines, ""])
