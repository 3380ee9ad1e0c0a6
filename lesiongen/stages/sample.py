"""sample: priors + tokenizer (with its polished decoder, if there is one) → synthetic images.

The stage writes an image for each sample (sample_files.py), a metadata.csv with the facts, seed and models of each, a README.md
and a contact sheet. torchvision's ImageFolder reads images/, Hugging Face's imagefolder the whole folder. Images do not depend
on the number of ranks. The folder private/ holds the samples' codes, and with a gate (sample.gate) what it has rejected; see
lesiongen/evaluation/privacy/candidates.py.

The user may leave facts open, such as site, sex or age. The stage then draws all open facts of a sample from one training image
of the sample's label, so that samples vary as the data do. Do not pass "unknown" for facts the user left open. In training,
"unknown" mostly marks poor records, so it would bias the samples.
"""

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch

from hpc import dist
from hpc.config import to_plain
from hpc.data.codestore import CodeStore
from hpc.data.order import sample_seed
from hpc.dist import Topology
from hpc.errors import UserError
from hpc.run.progress import progress_bar
from hpc.run.rundir import atomic_write
from lesiongen.data.croissant import croissant
from lesiongen.data.facts import PriorFacts, refuse_unknown
from lesiongen.data.sample_files import contact_sheet, image_paths, png_with
from lesiongen.data.tables import csv_text
from lesiongen.evaluation.backbone import check_backbone
from lesiongen.evaluation.card import card
from lesiongen.evaluation.privacy.candidates import Candidates
from lesiongen.evaluation.privacy.gate import Gate, add_attempt, gate_backbone, prepare
from lesiongen.evaluation.privacy.views import training_views
from lesiongen.evaluation.reconstructions import decode, decode_batches
from lesiongen.experiment import Experiment, LevelSampling, SampleConfig
from lesiongen.ingest.licences import merge_counts, strictest
from lesiongen.priors.code_sampler import Codes, CodeSampler
from lesiongen.stages.base import (
    Stage,
    check_codes,
    decoder_stage,
    digest_of,
    load_decoder,
    load_priors,
    model_stages,
    packed,
    require,
)

NO_CODES = (
    "sample.gate compares samples with the codes and shards of the training images, which are not here. A published generator "
    "cannot gate without its training codes. Set sample.gate=null, or make them with `lesiongen run`."
)


def stage(config: Experiment) -> Stage:
    """Returns the stage that samples images."""
    needs = model_stages(config)
    hints = {name: NO_CODES for name in ("codes", "shards")} if config.sample.gate else {}
    return Stage(
        "samples",
        (*needs, *hints),
        {"sample": to_plain(config.sample, volatile=False)},
        run,
        make_part=make_part,
        hints=hints,
        check=_check,
        describe=lambda config: f"{config.sample.number:,} · guidance {config.sample.guidance:g}",
    )


def _check(config: Experiment) -> None:
    """Raises UserError if the gate's network cannot be used."""
    if config.sample.gate and config.sample.gate.features:
        check_backbone(config.sample.gate.backbone)


def run(config: Experiment, topology: Topology, folder: Path) -> str:
    """Samples the images and returns the digest of the table and the images. Collective.

    Batches of a fixed size are divided among the ranks. A batch whose codes an earlier run wrote is not sampled again.
    """
    work = _Sampling(config, topology, folder)
    kept = work.with_gate() if config.sample.gate else work.without_gate()
    dist.barrier()
    gate = {"gate": "samples that copied a training image or were unlikely were replaced"} if config.sample.gate else {}
    readme = card("samples", config.name, work.provenance | gate, work.data, {})
    return dist.run_on_leader(_finish, folder, config, {i: work.facts[i] for i in kept}, work.paths, work.provenance, readme)


def make_part(config: Experiment, topology: Topology, folder: Path) -> None:
    """Makes the codes of this rank's samples; without a gate their images too. run() reuses the files.

    The ranks do not wait for one another, so they may run at different times.
    """
    _Sampling(config, topology, folder).make_part()


class _Sampling:
    """The samples of one run of the stage: makes their codes, judges them and writes the images. Every rank has one.

    Attributes:
        facts: What each sample shows.
        paths: Where the image of each sample lies.
        provenance: What the samples' metadata say of their origin.
        data: What the models' exports say of the training images.
    """

    def __init__(self, config: Experiment, topology: Topology, folder: Path):
        self.config, self.topology, self.folder, self.candidates = config, topology, folder, Candidates(folder)
        # Load the models.
        sampling = config.sample
        self.net, tokenizer_facts = load_decoder(config, topology.device)
        priors = load_priors(config, topology.device)
        self.code_sampler = CodeSampler.of(priors, {level: sampling.at(level) for level in priors}, topology.device)
        # Decide what each sample shows, and what its metadata says.
        self.facts = draw_facts(sampling, list(self.code_sampler.facts.values()))
        _warn_of_unknown_labels(tokenizer_facts, self.facts, topology)
        self.paths = image_paths([fact["label"] for fact in self.facts])
        self.data = merge_counts(tokenizer_facts["data"], *(about["data"] for _, about in priors.values()))
        self.provenance = _provenance(config) | {"licence_of_training_images": strictest(self.data["licences"])}

    def make_part(self) -> None:
        """Makes the codes of this rank's samples, and their images if no gate judges them first."""
        batches = self._batches(list(range(self.config.sample.number))).values()
        with progress_bar(sum(map(len, batches)), "sample") as progress:
            for batch in batches:
                codes = self._codes(batch, 0)
                if not self.config.sample.gate:
                    self._write_images(codes, 0, {})
                progress.update(len(batch))

    def without_gate(self) -> list[int]:
        """Samples and keeps all samples. Returns their indices. Collective."""
        indices = list(range(self.config.sample.number))
        with self._progress(indices, "sample") as progress:
            for batch in self._batches(indices).values():
                self._write_images(self._codes(batch, 0), 0, {})
                progress(batch)
        return indices

    def with_gate(self) -> list[int]:
        """Samples, and draws the samples that the gate rejects again. Returns the indices of the samples kept. Collective."""
        gate, shards = self._gate(), packed(self.config)
        judged = dist.run_on_leader(self.candidates.verdicts)
        pending, kept = list(range(self.config.sample.number)), []
        for attempt in range(self.config.sample.gate.attempts):
            sampled = {}
            with self._progress(pending, f"replace, attempt {attempt}" if attempt else "sample") as progress:
                for number, batch in self._batches(pending).items():
                    sampled[number] = self._codes(batch, attempt)
                    progress(batch)
            reasons = judged.get(attempt, {})
            if list(reasons) != pending:
                described = {
                    n: (
                        codes,
                        gate.views.describe(decode_batches(self.net, codes.codes, None), codes.codes),
                    )
                    for n, codes in sampled.items()
                }
                verdicts = gate.judge(described, [fact["label"] for fact in self.facts], self.topology)
                dist.run_on_leader(add_attempt, self.candidates, attempt, verdicts, shards)
                reasons = verdicts.reasons
            for codes in sampled.values():
                self._write_images(codes, attempt, reasons)
            kept += [i for i in pending if not reasons[i]]
            pending = [i for i in pending if reasons[i]]
            if not pending:
                break
        if pending and self.topology.leader:
            print(
                f"WARNING: {len(pending)} of {self.config.sample.number} samples are left out: the gate has rejected each of "
                f"their {self.config.sample.gate.attempts} candidates"
            )
        return sorted(kept)

    def _gate(self) -> Gate:
        """Prepares the gate. Collective. Raises UserError for codes that do not belong to the models."""
        config, sampling = self.config, self.config.sample
        store = CodeStore(require(config, "codes"))
        dist.run_on_leader(check_codes, config, store)
        backbone = gate_backbone(sampling.gate)
        if backbone is not None:
            backbone.to(self.topology.device)
        views = training_views(
            config.directory, store, self.net, digest_of(config, decoder_stage(config)), backbone, self.topology
        )
        return prepare(sampling.gate, views, self.code_sampler, self.candidates, config.seed, sampling.batch, self.topology)

    def _batches(self, indices: list[int]) -> dict[int, list[int]]:
        """Divides samples into batches. Returns this rank's batches by their number."""
        size = self.config.sample.batch
        batches = [indices[first : first + size] for first in range(0, len(indices), size)]
        mine = range(len(batches))[self.topology.rank :: self.topology.world_size]
        return {number: batches[number] for number in mine}

    def _codes(self, indices: list[int], attempt: int) -> Codes:
        """Returns the codes of a batch: those that an earlier run wrote, or new ones."""
        codes = self.candidates.load(attempt, indices)
        if codes is None:
            codes = self.code_sampler.sample([self.facts[i] for i in indices], indices, attempt)
            self.candidates.save(attempt, codes)
        return codes

    def _decode(self, codes: Codes) -> torch.Tensor:
        """Decodes a batch of samples, uint8 [B, C, H, W]."""
        labels = [self.facts[i]["label"] for i in codes.indices.tolist()]
        return decode(self.net, codes.codes, labels, len(labels))

    def _write_images(self, batch: Codes, attempt: int, reasons: dict[int, str]) -> None:
        """Writes the images of a batch that are not there yet; those that have a reason among the rejected ones."""
        paths = {}
        for i in batch.indices.tolist():
            name = self.paths[i].removeprefix("images/").replace("/", "-")
            rejected = self.candidates.folder / "rejected" / f"{attempt:03d}-{name}"
            paths[i] = rejected if reasons.get(i) else self.folder / self.paths[i]
        if all(path.exists() for path in paths.values()):
            return
        for (i, path), image in zip(paths.items(), self._decode(batch), strict=True):
            if not path.exists():
                text = self.provenance | self.facts[i] | {"seed": str(self.config.sample.seed), "index": str(i)}
                atomic_write(path, png_with(image, text))

    @contextlib.contextmanager
    def _progress(self, indices: list[int], what: str) -> Iterator[Callable[[list[int]], None]]:
        """Shows a bar on rank 0. Yields a function to call after each batch.

        All ranks are about equally fast, so rank 0 counts each of its batches once per rank.
        """
        with progress_bar(len(indices), what, shown=self.topology.leader) as progress:
            yield lambda batch: progress.update(len(batch) * (self.topology.world_size if self.topology.leader else 1))


def _provenance(config: Experiment) -> dict[str, str]:
    """Returns what every sample's PNG and metadata row say of its origin: the software and the digests of the models."""
    made_by = {("decoder" if name == "polish" else name): digest_of(config, name) for name in model_stages(config)}
    return {"software": "lesiongen", "synthetic": "true"} | made_by


def _warn_of_unknown_labels(tokenizer_facts: dict, facts: list[dict[str, str]], topology: Topology) -> None:
    """Says which labels of the samples a polished decoder does not know, as one of another run may not."""
    asked = {fact["label"] for fact in facts} - {""}
    unknown = sorted(asked - set(tokenizer_facts.get("classes", asked)))
    if unknown and topology.leader:
        print(
            f"WARNING: the decoder was polished without the label {', '.join(unknown)}; it decodes these samples without label"
        )


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


def _finish(
    folder: Path,
    config: Experiment,
    facts: dict[int, dict[str, str]],
    paths: list[str],
    provenance: dict[str, str],
    readme: str,
) -> str:
    """Writes contact.png, README.md, croissant.json and metadata.csv. Returns the digest of the tables and the images.

    Args:
        folder: Directory of the samples.
        config: The run's config.
        facts: The facts of each sample that is kept, by its index.
        paths: Where the image of each sample lies, by its index, kept or not.
        provenance: What the metadata say of the samples' origin.
        readme: Content of README.md.

    Raises:
        UserError: The gate has rejected all samples.
    """
    if not facts:
        raise UserError(
            "The gate has rejected every candidate of every sample; see private/candidates.csv of the samples. Loosen "
            "sample.gate, or train the priors again so that they memorise less."
        )
    paths = [paths[i] for i in facts]
    candidates = Candidates(folder)
    bits = candidates.accepted(list(facts)).bits
    bits = {f"bits_per_token-{level}": bits[level] for level in config.levels}
    table = _table(paths, config.sample, facts, provenance, bits)
    atomic_write(folder / "contact.png", contact_sheet(folder, paths, [s["label"] for s in facts.values()]))
    atomic_write(folder / "README.md", readme.encode())
    about = croissant(f"{config.name} samples", provenance["licence_of_training_images"], time.strftime("%Y-%m-%d"), table)
    atomic_write(folder / "croissant.json", about)
    atomic_write(folder / "metadata.csv", table.encode())
    sums = "".join(hashlib.sha256((folder / path).read_bytes()).hexdigest() for path in paths)
    private = "".join(f"{row['index']} {row['attempt']} {row['reason']}\n" for row in candidates.rows())
    return hashlib.sha256((table + sums + private).encode()).hexdigest()[:16]


def _table(
    paths: list[str],
    sampling: SampleConfig,
    facts: dict[int, dict[str, str]],
    provenance: dict[str, str],
    bits: dict[str, np.ndarray],
) -> str:
    """Returns metadata.csv: a row for each sample, with its facts, its bits per token, the settings and the models.

    The path is there twice: readers of this project's tables look for "file", Hugging Face's imagefolder for "file_name".
    """
    settings = {f.name: getattr(sampling, f.name) for f in fields(LevelSampling)} | {"seed": sampling.seed}
    for level, level_sampling in sampling.levels.items():
        settings |= {f"{k}-{level}": v for k, v in to_plain(level_sampling).items() if v is not None}
    rows = []
    for row, (path, (i, sample)) in enumerate(zip(paths, facts.items(), strict=True)):
        of_sample = [f"{values[row]:.4f}" for values in bits.values()]
        rows.append([path, path, *sample.values(), i, *of_sample, *settings.values(), *provenance.values()])
    return csv_text(["file", "file_name", *next(iter(facts.values())), "index", *bits, *settings, *provenance], rows)
