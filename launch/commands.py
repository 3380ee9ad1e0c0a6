"""One function per verb of the command line. Each gets the parsed options and returns the process's exit code.

COMMANDS at the end maps verbs to functions; launch/__main__.py defines their options. Modules that only one verb needs are
imported inside its function.
"""

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

from hpc import dist, errors
from hpc.config import apply_overrides, digest, expand_path
from hpc.errors import UserError
from hpc.run import mlflow_address, mlflow_sync
from launch import executors, pipeline, selection, status
from launch.before_queue import check_before_queue, refuse_queued
from launch.cluster import load_cluster
from launch.sampling import sample_into, submit_samples
from lesiongen import experiment
from lesiongen.experiment import Experiment
from lesiongen.stages import stages
from lesiongen.stages.base import changed_images, training_images


def run(options: argparse.Namespace) -> int:
    """Runs every unfinished stage on this machine."""
    config = experiment.load(options.config, options.overrides)
    fresh, todo = selection.fresh_and_todo(config, options)
    if not todo and (options.first or options.until):
        print("these stages are done")
    elif not todo:
        print(f"everything is done; see {config.directory / 'report' / 'report.html'}")
    if not todo or todo[0].name != "shards":
        tell_of_changed_images(config)
    selection.confirm_fresh(options, fresh)
    code = pipeline.run_stages(config, todo, fresh)
    if code == errors.DONE and todo and todo[-1].name == "report":
        print(pipeline.result_locations(config))
    return code


def tell_of_changed_images(config: Experiment) -> None:
    """Prints a warning of images that were added or changed since the run's shards were packed."""
    if news := changed_images(config):
        print(f"WARNING: {news}")


def run_only(config: Experiment, names: list[str], fresh: list[str]) -> int:
    """Runs the named stages on this machine, and no other stage. Stages that they need must be done.

    Args:
        config: The run's config.
        names: Names of the stages.
        fresh: Names of those to run again even if they are done.

    Returns:
        The exit code.

    Raises:
        UserError: A name is not a stage of this run.
    """
    if unknown := [name for name in names if name not in stages(config)]:
        raise UserError(
            f"This run has no stage {unknown[0]}. Its stages are {', '.join(stages(config))}; a stage that `inputs` names is "
            "not run."
        )
    todo = pipeline.stages_to_do(config, tuple(fresh), tuple(names))
    if not todo:
        print(f"{', '.join(names)}: done already")
        if "shards" in names:
            tell_of_changed_images(config)
    return pipeline.run_stages(config, todo, tuple(fresh))


def pack(options: argparse.Namespace) -> int:
    """Packs images into shards: those of a config's run, or a directory that belongs to no run."""
    if options.config and options.images and "=" in options.config:
        # No config was given, so argparse put the first override into `config`.
        options.config, options.overrides = None, [options.config, *options.overrides]
    if options.config and options.images:
        raise UserError("Give either a config, or --images with --out, not both.")
    if options.config:
        return _pack_run(options)
    if not (options.images and options.out):
        raise UserError(
            "Nothing to pack. Use lesiongen pack CONFIG, or lesiongen pack --images DIR --metadata CSV --out SHARDS."
        )
    return _pack_directory(options)


def _pack_run(options: argparse.Namespace) -> int:
    """Packs the shards of a config's run."""
    if options.out:
        raise UserError("--out goes with --images. To place a config's run elsewhere, set runs=DIR name=NAME.")
    values = {"metadata": options.metadata, "size": options.size, "near_duplicates": options.near_duplicates or None}
    overrides = [f"data.{key}={value}" for key, value in values.items() if value is not None]
    config = experiment.load(options.config, [*options.overrides, *overrides])
    if not options.append:
        return run_only(config, ["shards"], options.fresh)
    pipeline.append_to(config, config.directory / "shards")
    return errors.DONE


def _pack_directory(options: argparse.Namespace) -> int:
    """Packs --images into --out."""
    out = Path(options.out).absolute()
    data = pipeline.packed_settings(out) if options.append else {}
    data |= {"images": options.images, "metadata": options.metadata}
    data |= {"size": options.size} if options.size else {}
    data |= {"near_duplicates": True} if options.near_duplicates else {}
    # A config needs a name and a directory of runs: treat `out` as the shards directory of a run.
    base = {"name": out.parent.name or "shards", "runs": str(out.parent.parent), "data": data}
    config = experiment.make(apply_overrides(base, options.overrides))
    pipeline.pack_into(config, out, options.fresh, options.append)
    return errors.DONE


def download(options: argparse.Namespace) -> int:
    """Downloads a public data set."""
    from lesiongen.ingest import download as public_data

    public_data.download(options.name, Path(options.out))
    return errors.DONE


def preview(options: argparse.Namespace) -> int:
    """Writes a picture of originals beside augmented images, and prints its path."""
    from lesiongen.stages.preview import preview as write_preview

    print(write_preview(experiment.load(options.config, options.overrides), options.out and Path(options.out)))
    return errors.DONE


def train(options: argparse.Namespace) -> int:
    """Trains the tokenizer, polishes its decoder, or trains the prior of one level or of every level."""
    config = experiment.load(options.config, options.overrides)
    if options.what == "polish" and not (config.polish or config.inputs.polish):
        raise UserError("The config does not ask for a polished decoder. Set polish={}, or add a section `polish`.")
    if options.what in ("tokenizer", "polish"):
        return run_only(config, [options.what], options.fresh)
    if options.level and options.level not in config.levels:
        raise UserError(f"--level {options.level}: the tokenizer has no such level. Its levels are {', '.join(config.levels)}.")
    levels = [options.level] if options.level else config.levels
    return run_only(config, [f"prior-{level}" for level in levels], options.fresh)


def reconstruct(options: argparse.Namespace) -> int:
    """Reconstructs image files with the trained tokenizer, and prints the mean PSNR and SSIM."""
    from lesiongen.stages.reconstruct import reconstruct as write_reconstructions

    # argparse cannot tell images from overrides. An argument with "=" is an override unless a file has that name.
    overrides = [word for word in options.images if "=" in word and not Path(word).exists()]
    paths = [Path(expand_path(word)) for word in options.images if word not in overrides]
    if missing := [path for path in paths if not path.exists()]:
        raise UserError(f"{missing[0]} does not exist. Give image files or folders of images.")
    config = experiment.load(options.config, overrides)
    if config.local.device == "cpu":
        dist.hide_gpus()
    out = Path(options.out) if options.out else config.directory / "reconstructions"
    means = write_reconstructions(config, paths, out)
    print(f"{means['images']} images: PSNR {means['psnr']:.2f} dB, SSIM {means['ssim']:.3f}; see {out / 'pairs.png'}")
    return errors.DONE


def tune(options: argparse.Namespace) -> int:
    """Searches settings of sampling, and prints them as overrides of the config."""
    from lesiongen.stages.tune import tune as search

    if options.n < 20:
        raise UserError("-n must be at least 20; with fewer images the distance is mostly noise. The default is 500.")
    config = experiment.load(options.config, options.overrides)
    if config.local.device == "cpu":
        dist.hide_gpus()
    out = Path(options.out) if options.out else config.directory / "tuning"
    found = search(config, options.n, out)
    overrides = [f"sample.levels.{level}.{k}={v}" for level, s in found.items() for k, v in vars(s).items() if v is not None]
    print(f"\nBest settings (all trials: {out / 'trials.csv'}; a section for the config: {out / 'sampling.yaml'}):")
    print(" ".join(overrides))
    return errors.DONE


def encode(options: argparse.Namespace) -> int:
    """Encodes the shards with the tokenizer."""
    return run_only(experiment.load(options.config, options.overrides), ["codes"], options.fresh)


def evaluate(options: argparse.Namespace) -> int:
    """Computes the metrics and writes the report, and a copy of the report without real images if the user asks for one."""
    config = experiment.load(options.config, options.overrides)
    code = run_only(config, ["report"], options.fresh)
    if code == errors.DONE and options.share:
        shutil.copyfile(config.directory / "report" / "share.html", options.share)
        print(f"{options.share} shows no real image")
    return code


def sample(options: argparse.Namespace) -> int:
    """Samples images. Without options it runs the run's stage `samples`; with options it writes another directory."""
    if options.array is not None and (options.array < 1 or not options.cluster):
        raise UserError("--array TASKS divides the samples among at least 1 task of Slurm, and needs --cluster FILE.")
    cluster = load_cluster(options.cluster) if options.cluster else None
    config = experiment.load(options.config, options.overrides, cluster and cluster.has_gpus)
    changes = {"labels": options.label and tuple(options.label), "number": options.n, "seed": options.seed}
    changes = {key: value for key, value in changes.items() if value is not None}
    if not changes and not options.out and not options.cluster:
        code = run_only(config, ["samples"], options.fresh)
        return code or _export_samples(config.directory / "samples", options.format)
    try:
        settings = replace(config.sample, **changes)
    except ValueError as error:
        raise UserError(str(error)) from None
    # Other overrides of sample.* add a suffix to the directory's name, so that other settings get another directory.
    name = f"samples-{'-'.join(settings.labels) or 'all'}-{settings.number}-seed{settings.seed}"
    without_suffix = tuple(f"sample.{key}=" for key in ("labels", "number", "seed", "batch"))
    others = sorted(o for o in options.overrides if o.startswith("sample.") and not o.startswith(without_suffix))
    if others:
        name += f"-{digest(others)[:6]}"
    folder = Path(options.out) if options.out else config.directory / name
    config = replace(config, sample=settings)
    if cluster and options.format:
        raise UserError("--format follows the job: give the same command without --cluster when the job is done.")
    if cluster:
        submit_samples(config, folder, cluster, options.array or 0, bool(options.fresh))
        return errors.DONE
    sample_into(config, folder, bool(options.fresh))
    print(f"{settings.number} samples in {folder}; {folder / 'contact.png'} shows a selection")
    return _export_samples(folder, options.format)


def _export_samples(folder: Path, file_format: str | None) -> int:
    """Writes the samples in another format too, if the user asks for it."""
    if file_format:
        from lesiongen.data.sample_files import write_webdataset

        print(f"as WebDataset: {', '.join(map(str, write_webdataset(folder)))}")
    return errors.DONE


def publish(options: argparse.Namespace) -> int:
    """Writes a folder that holds a trained generator and nothing of the training images; registers it in MLflow if asked."""
    from lesiongen.stages.publish import publish as write_generator

    out, config = Path(options.out), experiment.load(options.config, options.overrides)
    write_generator(config, out, options.force)
    print(f"{out} holds the generator; {out / 'README.md'} says how to load it")
    if options.register:
        uri, note = mlflow_address.default_uri(config.directory), (out / "README.md").read_text(encoding="utf-8")
        try:
            version = mlflow_sync.register(config.directory, uri, out, options.register, note[:5000])
        except mlflow_sync.SyncError as error:
            raise UserError(f"{out} is written, but not registered. {error}") from error
        print(f"MLflow has it as version {version} of the model {options.register}")
    return errors.DONE


def submit(options: argparse.Namespace) -> int:
    """Submits every unfinished stage as a Slurm job."""
    cluster = load_cluster(options.cluster)
    config = experiment.load(options.config, options.overrides, cluster.has_gpus)

    # Check everything before anything is changed.
    if not options.dry:
        refuse_queued(config, list(stages(config)))
    awaited = executors.awaited_jobs(config)
    fresh, todo = selection.fresh_and_todo(config, options, awaited)
    check_before_queue(config, todo, cluster, options.dry)
    if not options.dry:
        selection.confirm_fresh(options, fresh)
        pipeline.clear_stages(config, fresh)
        pipeline.write_config(config)
    submitted = executors.Submission(config, cluster, options.dry).stages(todo, awaited, options.check)
    if not options.dry:
        for name, job in submitted.items():
            print(f"{name:<14} job {job}")
        for name, job in awaited.items():
            print(f"inputs.{name} is not finished: what needs it waits for job {job}")
        print(f"watch: lesiongen status {config.directory}" if submitted else "everything is done")
    return errors.DONE


def sweep(options: argparse.Namespace) -> int:
    """Runs every combination of some settings on this machine or as Slurm jobs, and compares them."""
    from launch.sweep import Sweep

    cluster = load_cluster(options.cluster) if options.cluster else None
    swept = Sweep.of(options.config, options.overrides, options.grid, options.until, cluster and cluster.has_gpus)
    if options.dry:
        print("\n".join(swept.described()))
        return errors.DONE
    code = swept.submit(cluster, options.parallel) if cluster else swept.run()
    print(swept.compare())
    return code


def plan(options: argparse.Namespace) -> int:
    """Prints whether a run fits the machines, its memory, and how long it takes."""
    from launch.cost_table import format_cost

    config = experiment.load(options.config, options.overrides)
    print(format_cost(config, options.images or training_images(config)))
    return errors.DONE


def show_status(options: argparse.Namespace) -> int:
    """Prints the state of a run's stages and jobs."""
    config = experiment.load(options.run)
    if options.watch:
        status.watch(config)
    else:
        print(status.format_status(config))
    return errors.DONE


def logs(options: argparse.Namespace) -> int:
    """Prints the last lines of a run's newest log files."""
    config = experiment.load(options.run)
    print(status.newest_logs(config, options.stage))
    if options.follow:
        status.follow_logs(config, options.stage)
    return errors.DONE


def cancel(options: argparse.Namespace) -> int:
    """Cancels a run's Slurm jobs."""
    cancelled = status.cancel(experiment.load(options.run))
    print(f"cancelled jobs {', '.join(cancelled)}" if cancelled else "no jobs to cancel")
    return errors.DONE


def clean(options: argparse.Namespace) -> int:
    """Lists or deletes what a run can do without."""
    from launch.clean import clean as clean_run

    print(clean_run(experiment.load(options.run), options.delete))
    return errors.DONE


def withdraw(options: argparse.Namespace) -> int:
    """Removes the images of a patient or lesion, and names what was made from them."""
    from launch.withdraw import withdraw as withdraw_images

    print(withdraw_images(experiment.load(options.run), options.ids, options.delete))
    return errors.DONE


def verify(options: argparse.Namespace) -> int:
    """Checks every checksum under a path and prints the problems. Returns 1 if there is any."""
    from launch.verify import verify_path

    checked, problems = verify_path(Path(options.path))
    for line in problems:
        print(line)
    print(f"{checked} files checked, {len(problems)} problems")
    return errors.FAILED if problems else errors.DONE


def ui(options: argparse.Namespace) -> int:
    """Serves MLflow's web page until Ctrl-C."""
    from launch.ui import serve

    serve(Path(options.runs), options.host, options.port)
    return errors.DONE


def demo(options: argparse.Namespace) -> int:
    """Runs the whole pipeline on drawn lesions or on the user's own images."""
    from launch.demo import run_demo

    return run_demo(options)


def rank(options: argparse.Namespace) -> int:
    """Runs a stage as one rank. launch/local.py starts this verb for each rank; users do not."""
    from hpc import dist
    from launch.rank import rank_main

    return rank_main(experiment.load(options.config), options.stage, dist.detect())


COMMANDS = {
    "demo": demo,
    "download": download,
    "pack": pack,
    "preview": preview,
    "train": train,
    "reconstruct": reconstruct,
    "encode": encode,
    "sample": sample,
    "tune": tune,
    "evaluate": evaluate,
    "publish": publish,
    "run": run,
    "submit": submit,
    "sweep": sweep,
    "plan": plan,
    "status": show_status,
    "logs": logs,
    "cancel": cancel,
    "clean": clean,
    "withdraw": withdraw,
    "verify": verify,
    "ui": ui,
    "rank": rank,
}
