"""sample: priors + tokenizer → PNGs that say where they come from, metadata.csv and a contact sheet.

A fact that neither sample.labels nor sample.facts fixes is drawn for each sample, together with the others that are open,
from the training images of its label: samples then vary over sites, sexes and ages as the data do. "Not known" would be no
neutral choice: in training it is seen with the label gone too, or for images whose records are poor.
"""

import csv
import hashlib
import io
import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from hpc import dist
from hpc.config import plain
from hpc.data.order import sample_seed
from hpc.dist import Topology
from hpc.errors import UserError
from hpc.run.progress import bar
from hpc.run.rundir import atomic_write
from lesiongen.data import images
from lesiongen.data.facts import PriorFacts, refuse_unknown
from lesiongen.data.images import to_uint8
from lesiongen.evaluation.card import card
from lesiongen.experiment import Experiment, LevelSampling, SampleConfig
from lesiongen.ingest.licences import strictest, together
from lesiongen.priors.export import load_prior
from lesiongen.priors.level_sampler import LevelSampler
from lesiongen.priors.prior import Prior
from lesiongen.priors.sampling import Choice, guidance
from lesiongen.stages.base import Stage, digest_of, require
from lesiongen.tokenizers.export import load_tokenizer
from lesiongen.tokenizers.tokenizer import Tokenizer


def stage(config: Experiment) -> Stage:
    needs = ("tokenizer", *(f"prior-{level}" for level in config.levels))
    return Stage("samples", needs, {"sample": plain(config.sample, volatile=False)}, run)


def run(config: Experiment, topology: Topology, folder: Path) -> str:
    """Draws the samples. Returns the digest of the table and the images. Collective.

    Batches of a fixed size are divided among the ranks. Images that an earlier attempt wrote are kept.
    """
    own = config.sample
    net, about = load_tokenizer(require(config, "tokenizer"), topology.device)
    priors = {level: load_prior(require(config, f"prior-{level}"), topology.device) for level in config.levels}
    known = {level: PriorFacts(prior["facts"], prior["training_facts"]) for level, (_, prior) in priors.items()}
    wanted = draw_facts(own, list(known.values()))
    data = together(about["data"], *(prior["data"] for _, prior in priors.values()))
    provenance = _provenance(config, {level: prior["tokenizer"] for level, (_, prior) in priors.items()})
    provenance["licence_of_training_images"] = strictest(data["licences"])
    samplers = {level: _sampler(own, level, i, prior) for i, (level, (prior, _)) in enumerate(priors.items())}
    batches = range(0, own.number, own.batch)[topology.rank :: topology.world]
    with bar(own.number, "sample", initial=0, shown=topology.leader) as progress:
        for first in batches:
            members = range(first, min(first + own.batch, own.number))
            paths = [folder / "images" / file_name(i, wanted[i]["label"]) for i in members]
            if not all(p.exists() for p in paths):
                numbers = {level: [prior.numbers(wanted[i]) for i in members] for level, prior in known.items()}
                decoded = decode_samples(net, samplers, numbers, members)
                for i, path, image in zip(members, paths, decoded, strict=True):
                    atomic_write(path, png_with(image, provenance | wanted[i] | {"seed": str(own.seed), "index": str(i)}))
            progress.update(len(members) * (topology.world if topology.leader else 1))
    dist.barrier()
    return dist.run_on_leader(_finish, folder, own, wanted, provenance, card("samples", config.name, provenance, data, {}))


def _provenance(config: Experiment, trained_on: dict[str, str]) -> dict[str, str]:
    """What made the samples, by digest. trained_on: for each level, the tokenizer whose codes its prior was trained on.

    Raises UserError for a prior that was trained on the codes of another tokenizer.
    """
    provenance = {"software": "lesiongen", "synthetic": "true", "tokenizer": digest_of(config, "tokenizer")}
    for level, tokenizer in trained_on.items():
        provenance[f"prior-{level}"] = digest_of(config, f"prior-{level}")
        if tokenizer != provenance["tokenizer"]:
            raise UserError(
                f"prior-{level} was trained on codes of tokenizer {tokenizer}, this run's tokenizer is "
                f"{provenance['tokenizer']}. Train the prior on this tokenizer's codes, or set inputs.tokenizer."
            )
    return provenance


def _sampler(own: SampleConfig, level: str, index: int, prior: Prior) -> LevelSampler:
    """The sampler of one level, with the level's settings. index: among the levels, from the coarsest."""
    settings = own.at(level)
    choice = Choice(settings.temperature, settings.top_k, settings.top_p)
    strength = guidance(settings.guidance, settings.guidance_schedule, prior.length)
    return LevelSampler(prior, choice, strength, own.seed * 1009 + index, own.cuda_graphs)


def draw_facts(own: SampleConfig, priors: list[PriorFacts]) -> list[dict[str, str]]:
    """What each sample is to show, {"label": …, "sex": …}, "" for what is not known. Priors of finer levels may know more
    facts than the first: these are drawn given the ones that it has."""
    refuse_unknown(own.facts, priors)
    labels = assign_labels(own, next((prior.values["label"] for prior in priors if "label" in prior.values), []))
    ordered = sorted(priors, key=lambda prior: "label" not in prior.values)  # facts go with the label where one knows it
    wanted = []
    for i, label in enumerate(labels):
        rng = torch.Generator().manual_seed(sample_seed(own.seed * 1009 + 1008, i))  # no level's stream: those count from 0
        sample = {"label": label} | own.facts
        for prior in ordered:
            sample |= prior.complete(sample, float(torch.rand((), generator=rng)))
        wanted.append(sample)
    return wanted


def assign_labels(own: SampleConfig, classes: list[str]) -> list[str]:
    """The label of each sample: those asked for in turn, in blocks; every class where none is named."""
    for label in own.labels:
        if label not in classes:
            raise UserError(f"Unknown label '{label}'; this generator knows: {', '.join(classes)}.")
    wanted = list(own.labels) or classes or [""]
    return [wanted[i * len(wanted) // own.number] for i in range(own.number)]


def file_name(index: int, label: str) -> str:
    """Labels may hold what no file system takes; the number alone tells samples apart."""
    safe = re.sub(r"[^\w.-]+", "_", label)[:60]
    return f"{index:06d}-{safe or 'any'}.png"


@torch.no_grad()
def decode_samples(net: Tokenizer, samplers: dict[str, LevelSampler], facts: dict[str, list], members: range) -> torch.Tensor:
    """uint8 [B, C, H, W] for global sample indices: level by level, coarse to fine, then decoded. facts: of each level's
    prior, [B, F]."""
    codes: dict[str, torch.Tensor] = {}
    for level, sampler in samplers.items():
        codes[level] = sampler(facts[level], list(codes.values()), members)
    return to_uint8(net.decode_codes(codes)).cpu()


def png_with(image_CHW: torch.Tensor, about: dict[str, str]) -> bytes:
    info = PngInfo()
    for key, value in about.items():
        info.add_text(key, value or "")
    buffer = io.BytesIO()
    images.to_image(image_CHW).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def _finish(folder: Path, own: SampleConfig, wanted: list[dict], provenance: dict[str, str], readme: str) -> str:
    labels = [sample["label"] for sample in wanted]
    names = [file_name(i, label) for i, label in enumerate(labels)]
    settings = {f.name: getattr(own, f.name) for f in fields(LevelSampling)} | {"seed": own.seed}
    for level, other in own.levels.items():
        settings |= {f"{k}-{level}": v for k, v in plain(other).items() if v is not None}
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["file", *wanted[0], "index", *settings, *provenance])
    for i, (name, sample) in enumerate(zip(names, wanted, strict=True)):
        writer.writerow([f"images/{name}", *sample.values(), i, *settings.values(), *provenance.values()])
    # As many of each class as fit a sheet of 8 a row.
    shown = [n for label in dict.fromkeys(labels) for n in [m for m, x in zip(names, labels, strict=True) if x == label][:8]]
    tiles = [np.array(Image.open(folder / "images" / name)) for name in shown]
    stacked = torch.from_numpy(np.stack([t[None] if t.ndim == 2 else t.transpose(2, 0, 1) for t in tiles]))
    atomic_write(folder / "contact.png", images.png(images.grid(stacked, 8)))
    atomic_write(folder / "README.md", readme.encode())
    atomic_write(folder / "metadata.csv", table.getvalue().encode())
    sums = "".join(hashlib.sha256((folder / "images" / n).read_bytes()).hexdigest() for n in names)
    return hashlib.sha256((table.getvalue() + sums).encode()).hexdigest()[:16]
