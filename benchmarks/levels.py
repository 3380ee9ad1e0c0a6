"""Which prior is to blame for the distance of samples from real images?

    python -m benchmarks.levels CONFIG [section.key=value …]

CONFIG is that of a finished run. The codes of real training images are kept down to a level, and the priors sample the finer
levels below them, with the settings of `sample`; so `sample.levels.bottom.temperature=0.9` shows what another temperature would
do. The first row keeps all levels: these are reconstructions. In the last row all levels are sampled. KID is × 1,000, by the
main ruler of the evaluation, against real held-out images and against their reconstructions.
"""

import argparse

import numpy as np
import torch

from hpc.data.codestore import CodeStore
from hpc.dist import Topology
from hpc.run.progress import progress_bar
from lesiongen import experiment
from lesiongen.evaluation.distances import kid, neighbour_scores
from lesiongen.evaluation.reconstructions import decode_batches
from lesiongen.evaluation.subject import Subject
from lesiongen.experiment import Experiment
from lesiongen.priors.export import load_prior
from lesiongen.stages.base import load_decoder, packed, packed_locations, require
from lesiongen.stages.sample import level_sampler

BATCH = 125  # images that are sampled at once


def subject_of(config: Experiment) -> Subject:
    """Returns the images and models of a finished run."""
    topology = Topology()
    net, _ = load_decoder(config, topology.device)
    store, samples = CodeStore(require(config, "codes")), require(config, "samples")
    shards, locations = packed(config), packed_locations(config)
    return Subject(config.evaluate, config.seed, topology, shards, locations, store, net, samples, config.directory)


def sampled_below(config: Experiment, subject: Subject, kept: int) -> dict[str, np.ndarray]:
    """Returns codes of the selected training images: real ones of the `kept` coarsest levels, sampled ones of the others."""
    chosen = subject.selection.train
    real = subject.reconstructions.codes(subject.train, chosen)
    codes = {level: torch.from_numpy(real[level]).to(subject.device) for level in config.levels[:kept]}
    for index, level in enumerate(config.levels[kept:], kept):
        prior, about = load_prior(require(config, f"prior-{level}"), subject.device)
        sampler = level_sampler(config.sample, level, index, prior, subject.device)
        columns = subject.facts("train", list(about["facts"]))
        facts = np.stack([column[chosen] for column in columns.values()], 1) if columns else np.zeros((len(chosen), 0), int)
        parts = []
        with progress_bar(len(chosen), f"sample {level}") as progress:
            for first in range(0, len(chosen), BATCH):
                members = range(first, min(first + BATCH, len(chosen)))
                part = slice(members.start, members.stop)
                parts.append(sampler(facts[part].tolist(), [grid[part] for grid in codes.values()], members))
                progress.update(len(members))
        codes[level] = torch.cat(parts)
    return {level: grid.cpu().numpy() for level, grid in codes.items()}


def main(arguments: list[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args(arguments)
    config = experiment.load(options.config, options.overrides)
    subject = subject_of(config)
    backbone, about = next(iter(subject.rulers.values()))
    held_out = subject.reconstructions.batches(subject.held_out, subject.selection.held_out)
    real = torch.from_numpy(subject.stored["held_out"].gather(subject.selection.held_out)).double()
    reconstructed = torch.from_numpy(backbone.over(held_out)).double()
    rows = []
    for kept in range(len(config.levels), -1, -1):
        painted = decode_batches(subject.net, sampled_below(config, subject, kept))
        features = torch.from_numpy(backbone.over(painted)).double()
        scores = {name: float(values.mean()) for name, values in neighbour_scores(features, real).items()}
        rows.append((", ".join(config.levels[:kept]) or "none", kid(features, real), kid(features, reconstructed), scores))
    print(f"{len(real)} images on each side; ruler: {about}")
    print(f"{'real codes of':20}{'KID, real':>10}{'KID, recon.':>12}" + "".join(f"{name:>11}" for name in rows[0][3]))
    for name, against_real, against_reconstructions, scores in rows:
        figures = "".join(f"{value:11.2f}" for value in scores.values())
        print(f"{name:20}{against_real:10.1f}{against_reconstructions:12.1f}{figures}")


if __name__ == "__main__":
    main()
