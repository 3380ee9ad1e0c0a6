"""sample: priors + tokenizer → synthetic images.

The stage writes PNGs whose text chunks hold facts, seed and models, a metadata.csv with the same values, a README.md and a
contact sheet. The images do not depend on the number of ranks.

The user may leave facts open, such as site, sex or age. The stage then draws all open facts of a sample from one training image
of the sample's label, so that samples vary as the data do. Do not pass "unknown" for facts the user left open. In training,
"unknown" mostly marks poor records, so it would bias the samples.
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
from hpc.config import to_plain
from hpc.data.order import sample_seed
from hpc.dist import Topology
from hpc.errors import UserError
from hpc.run.progress import progress_bar
from hpc.run.rundir import atomic_write
from lesiongen.data import images
from lesiongen.data.facts import PriorFacts, refuse_unknown
from lesiongen.data.images import to_uint8
from lesiongen.evaluation.card import card
from lesiongen.experiment import Experiment, LevelSampling, SampleConfig
from lesiongen.ingest.licences import merge_counts, strictest
from lesiongen.priors.export import load_prior
from lesiongen.priors.level_sampler import LevelSampler
from lesiongen.priors.prior import Prior
from lesiongen.priors.sampling import TokenChooser, guidance
from lesiongen.stages.base import Stage, digest_of, require
from lesiongen.tokenizers.export import load_tokenizer
from lesiongen.tokenizers.tokenizer import Tokenizer

PER_CLASS = 8  # samples of each class in the contact sheet, and images in each of its rows


def stage(config: Experiment) -> Stage:
    """Returns the stage that samples images."""
    needs = ("tokenizer", *(f"prior-{level}" for level in config.levels))
    return Stage("samples", needs, {"sample": to_plain(config.sample, volatile=False)}, run)


def run(config: Experiment, topology: Topology, folder: Path) -> str:
    """Samples the images and returns the digest of the table and the images. Collective.

    Batches of a fixed size are divided among the ranks. A batch whose images an earlier run wrote is skipped.
    """
    sampling = config.sample
    # Load the models.
    net, tokenizer_facts = load_tokenizer(require(config, "tokenizer"), topology.device)
    priors = {level: load_prior(require(config, f"prior-{level}"), topology.device) for level in config.levels}
    samplers = {
        level: _sampler(sampling, level, i, prior, topology.device) for i, (level, (prior, _)) in enumerate(priors.items())
    }

    # Decide what each sample shows, and what its metadata says.
    prior_facts = {level: PriorFacts(about["facts"], about["training_facts"]) for level, (_, about) in priors.items()}
    facts = draw_facts(sampling, list(prior_facts.values()))
    provenance = _provenance(config, {level: about["tokenizer"] for level, (_, about) in priors.items()})
    data = merge_counts(tokenizer_facts["data"], *(about["data"] for _, about in priors.values()))
    provenance["licence_of_training_images"] = strictest(data["licences"])

    # Sample this rank's batches.
    batches = range(0, sampling.number, sampling.batch)[topology.rank :: topology.world_size]
    with progress_bar(sampling.number, "sample", initial=0, shown=topology.leader) as progress:
        for first in batches:
            members = range(first, min(first + sampling.batch, sampling.number))
            paths = [folder / "images" / file_name(i, facts[i]["label"]) for i in members]
            if not all(path.exists() for path in paths):
                numbers = {level: [known.numbers(facts[i]) for i in members] for level, known in prior_facts.items()}
                decoded = decode_samples(net, samplers, numbers, members)
                for i, path, image in zip(members, paths, decoded, strict=True):
                    text = provenance | facts[i] | {"seed": str(sampling.seed), "index": str(i)}
                    atomic_write(path, png_with(image, text))
            # Only rank 0 shows a bar. All ranks are about equally fast, so rank 0 counts each of its batches once per rank.
            progress.update(len(members) * (topology.world_size if topology.leader else 1))
    dist.barrier()
    readme = card("samples", config.name, provenance, data, {})
    return dist.run_on_leader(_finish, folder, sampling, facts, provenance, readme)


def _provenance(config: Experiment, trained_on: dict[str, str]) -> dict[str, str]:
    """Returns what every sample's PNG and metadata row say of its origin: the software and the digests of the models.

    Args:
        config: The run's config.
        trained_on: For each level, the digest of the tokenizer whose codes its prior was trained on.

    Raises:
        UserError: A prior was trained on the codes of another tokenizer.
    """
    provenance = {"software": "lesiongen", "synthetic": "true", "tokenizer": digest_of(config, "tokenizer")}
    for level, tokenizer in trained_on.items():
        provenance[f"prior-{level}"] = digest_of(config, f"prior-{level}")
        if tokenizer != provenance["tokenizer"]:
            raise UserError(
                f"prior-{level} was trained on codes of tokenizer {tokenizer}, but this run's tokenizer is "
                f"{provenance['tokenizer']}. Train the prior on this tokenizer's codes, or set inputs.tokenizer."
            )
    return provenance


def _sampler(sampling: SampleConfig, level: str, index: int, prior: Prior, device: torch.device) -> LevelSampler:
    """Returns the sampler of one level, with the level's settings. `index` counts the levels from the coarsest."""
    level_sampling = sampling.at(level)
    choice = TokenChooser(level_sampling.temperature, level_sampling.top_k, level_sampling.top_p)
    strength = guidance(level_sampling.guidance, level_sampling.guidance_schedule, prior.length)
    return LevelSampler(prior, choice, strength, sampling.seed * 1009 + index, device, sampling.cuda_graphs)


def draw_facts(sampling: SampleConfig, priors: list[PriorFacts]) -> list[dict[str, str]]:
    """Decides the label and the facts that each sample shows.

    The priors draw one after the other; each draws those of its own facts that are still open. Priors that are conditioned on
    the label draw first, so that facts are drawn from images of that label.

    Args:
        sampling: The settings; `labels` and `facts` fix facts for all samples.
        priors: The PriorFacts of each level, coarse to fine. Levels may be conditioned on different facts.

    Returns:
        For each sample {"label": …, "sex": …, …}; "" means unknown.

    Raises:
        UserError: No prior was trained with a label, a fact or a value in the settings.
    """
    refuse_unknown(sampling.facts, priors)
    labelled = next((prior for prior in priors if "label" in prior.values), None)
    labels = assign_labels(sampling, labelled)
    ordered = sorted(priors, key=lambda prior: "label" not in prior.values)
    samples = []
    for i, label in enumerate(labels):
        # The samplers of the levels use the seeds seed * 1009 + 0, 1, …; 1008 is beyond the number of levels.
        rng = torch.Generator().manual_seed(sample_seed(sampling.seed * 1009 + 1008, i))
        sample = {"label": label} | sampling.facts
        for prior in ordered:
            sample |= prior.complete(sample, float(torch.rand((), generator=rng)))
        samples.append(sample)
    return samples


def assign_labels(sampling: SampleConfig, prior: PriorFacts | None) -> list[str]:
    """Divides the samples among the labels in blocks of equal size.

    Uses `sampling.labels`; if it is empty, all labels that a training image has.

    Args:
        sampling: The settings.
        prior: The facts of a prior that was trained with labels, or None.

    Returns:
        The label of each sample; "" if the priors were trained without labels.

    Raises:
        UserError: The priors do not know one of the labels, or no training image has it.
    """
    classes, trained = (prior.values["label"], prior.trained_labels()) if prior else ([], [])
    for label in sampling.labels:
        if label not in classes:
            raise UserError(f"Unknown label '{label}'; this generator knows: {', '.join(classes)}.")
        if label not in trained:
            raise UserError(f"No training image has the label '{label}', so samples of it would show anything. Ask for others.")
    if untrained := [label for label in classes if label not in trained and not sampling.labels]:
        print(f"WARNING: no training image has the label {', '.join(untrained)}; no samples are made of it")
    labels = list(sampling.labels) or trained or [""]
    return [labels[i * len(labels) // sampling.number] for i in range(sampling.number)]


def file_name(index: int, label: str) -> str:
    """Returns the file name of a sample.

    Characters of the label that a file system may refuse are replaced. Even if two labels then look alike, the index keeps the
    names different.
    """
    safe = re.sub(r"[^\w.-]+", "_", label)[:60]
    return f"{index:06d}-{safe or 'any'}.png"


@torch.no_grad()
def decode_samples(net: Tokenizer, samplers: dict[str, LevelSampler], facts: dict[str, list], members: range) -> torch.Tensor:
    """Samples the codes of one batch, level by level from coarse to fine, and decodes them.

    Args:
        net: The tokenizer.
        samplers: The sampler of each level, coarse to fine.
        facts: For each level, the facts as PriorFacts.numbers() of its prior gives them, [B, F].
        members: Global indices of the samples.

    Returns:
        Images, uint8 [B, C, H, W], on the CPU.
    """
    codes: dict[str, torch.Tensor] = {}
    for level, sampler in samplers.items():
        codes[level] = sampler(facts[level], list(codes.values()), members)
    return to_uint8(net.decode_codes(codes)).cpu()


def png_with(image_CHW: torch.Tensor, text: dict[str, str]) -> bytes:
    """Encodes a uint8 image as PNG, with `text` in its text chunks."""
    info = PngInfo()
    for key, value in text.items():
        info.add_text(key, value or "")
    buffer = io.BytesIO()
    images.to_image(image_CHW).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def _finish(folder: Path, sampling: SampleConfig, facts: list[dict[str, str]], provenance: dict[str, str], readme: str) -> str:
    """Writes contact.png, README.md and metadata.csv. Returns the digest of the table and the images."""
    names = [file_name(i, sample["label"]) for i, sample in enumerate(facts)]
    table = _table(names, sampling, facts, provenance)
    atomic_write(folder / "contact.png", _contact_sheet(folder, names, [sample["label"] for sample in facts]))
    atomic_write(folder / "README.md", readme.encode())
    atomic_write(folder / "metadata.csv", table.encode())
    sums = "".join(hashlib.sha256((folder / "images" / name).read_bytes()).hexdigest() for name in names)
    return hashlib.sha256((table + sums).encode()).hexdigest()[:16]


def _table(names: list[str], sampling: SampleConfig, facts: list[dict[str, str]], provenance: dict[str, str]) -> str:
    """Returns metadata.csv: a row for each sample, with its facts, the settings and the models."""
    settings = {f.name: getattr(sampling, f.name) for f in fields(LevelSampling)} | {"seed": sampling.seed}
    for level, level_sampling in sampling.levels.items():
        settings |= {f"{k}-{level}": v for k, v in to_plain(level_sampling).items() if v is not None}
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["file", *facts[0], "index", *settings, *provenance])
    for i, (name, sample) in enumerate(zip(names, facts, strict=True)):
        writer.writerow([f"images/{name}", *sample.values(), i, *settings.values(), *provenance.values()])
    return table.getvalue()


def _contact_sheet(folder: Path, names: list[str], labels: list[str]) -> bytes:
    """Returns a PNG of the first samples of each class, in rows of PER_CLASS."""
    shown = []
    for label in dict.fromkeys(labels):
        shown += [name for name, other in zip(names, labels, strict=True) if other == label][:PER_CLASS]
    tiles = [np.array(Image.open(folder / "images" / name)) for name in shown]
    stacked = torch.from_numpy(np.stack([tile[None] if tile.ndim == 2 else tile.transpose(2, 0, 1) for tile in tiles]))
    return images.encode_png(images.tile_images(stacked, PER_CLASS))
