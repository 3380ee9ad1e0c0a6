"""What each verb does."""

import argparse
from dataclasses import replace
from pathlib import Path

from hpc import errors
from hpc.config import digest, override
from hpc.errors import UserError
from launch import executors, pipeline, status
from lesiongen import experiment
from lesiongen.experiment import Experiment
from lesiongen.stages import stages


def run(options: argparse.Namespace) -> int:
    config = experiment.load(options.config, options.overrides)
    todo = pipeline.to_do(config, tuple(options.fresh))
    if not todo:
        print(f"everything is done; see {config.directory / 'report' / 'report.html'}")
    code = pipeline.run_stages(config, todo, tuple(options.fresh))
    if code == errors.DONE and todo:
        print(pipeline.where_to_look(config))
    return code


def run_only(config: Experiment, names: list[str], fresh: list[str]) -> int:
    """Only the named stages; what lies upstream must be there."""
    if missing := [n for n in names if n not in stages(config)]:
        raise UserError(f"{missing[0]} is not made by this run; it makes: {', '.join(stages(config))}.")
    todo = pipeline.to_do(config, tuple(fresh), tuple(names))
    if not todo:
        print(f"{', '.join(names)}: done already")
    return pipeline.run_stages(config, todo, tuple(fresh))


def pack(options: argparse.Namespace) -> int:
    if options.config and options.images and "=" in options.config:  # without a config the first override lands there
        options.config, options.overrides = None, [options.config, *options.overrides]
    if options.config and options.images:
        raise UserError("Give either a config or --images with --out, not both.")
    if options.config:
        if options.out:
            raise UserError("--out goes with --images; a config's shards lie in its run (runs=DIR name=NAME).")
        given = {"metadata": options.metadata, "size": options.size, "near_duplicates": options.near_duplicates or None}
        overrides = [f"data.{key}={value}" for key, value in given.items() if value is not None]
        config = experiment.load(options.config, [*options.overrides, *overrides])
        if not options.append:
            return run_only(config, ["shards"], options.fresh)
        pipeline.append_to(config, config.directory / "shards")
        return errors.DONE
    if not (options.images and options.out):
        raise UserError("Say what to pack: lesiongen pack CONFIG, or --images DIR --metadata CSV --out SHARDS.")
    out = Path(options.out).absolute()
    data = pipeline.packed_settings(out) if options.append else {}
    data |= {"images": options.images, "metadata": options.metadata}
    data |= {"size": options.size} if options.size else {}
    data |= {"near_duplicates": True} if options.near_duplicates else {}
    own = {"name": out.parent.name or "shards", "runs": str(out.parent.parent), "data": data}
    config = experiment.make(override(own, options.overrides))
    pipeline.pack_into(config, out, options.fresh, options.append)
    return errors.DONE


def download(options: argparse.Namespace) -> int:
    from lesiongen.ingest.download import download as fetch

    fetch(options.name, Path(options.out))
    return errors.DONE


def preview(options: argparse.Namespace) -> int:
    from lesiongen.stages.preview import preview as show

    print(show(experiment.load(options.config, options.overrides), options.out and Path(options.out)))
    return errors.DONE


def train(options: argparse.Namespace) -> int:
    config = experiment.load(options.config, options.overrides)
    if options.what == "tokenizer":
        return run_only(config, ["tokenizer"], options.fresh)
    if options.level and options.level not in config.levels:
        raise UserError(f"--level {options.level}: this tokenizer has the levels {', '.join(config.levels)}.")
    levels = [options.level] if options.level else config.levels
    return run_only(config, [f"prior-{level}" for level in levels], options.fresh)


def reconstruct(options: argparse.Namespace) -> int:
    from lesiongen.stages.reconstruct import reconstruct as through

    overrides = [given for given in options.images if "=" in given and not Path(given).exists()]
    paths = [Path(given) for given in options.images if given not in overrides]
    if missing := [path for path in paths if not path.exists()]:
        raise UserError(f"{missing[0]} does not exist; give image files or folders of them.")
    config = experiment.load(options.config, overrides)
    out = Path(options.out) if options.out else config.directory / "reconstructions"
    means = through(config, paths, out)
    print(f"{means['images']} images: PSNR {means['psnr']:.2f} dB, SSIM {means['ssim']:.3f}; see {out / 'pairs.png'}")
    return errors.DONE


def encode(options: argparse.Namespace) -> int:
    return run_only(experiment.load(options.config, options.overrides), ["codes"], options.fresh)


def evaluate(options: argparse.Namespace) -> int:
    return run_only(experiment.load(options.config, options.overrides), ["report"], options.fresh)


def sample(options: argparse.Namespace) -> int:
    """The run's own samples; with options, others beside them in a directory of their own."""
    config = experiment.load(options.config, options.overrides)
    given = {"labels": options.label and tuple(options.label), "number": options.n, "seed": options.seed}
    given = {k: v for k, v in given.items() if v is not None}
    if not given and not options.out:
        return run_only(config, ["samples"], options.fresh)
    try:
        own = replace(config.sample, **given)
    except ValueError as error:
        raise UserError(str(error)) from None
    name = f"samples-{'-'.join(own.labels) or 'all'}-{own.number}-seed{own.seed}"
    named = tuple(f"sample.{key}=" for key in ("labels", "number", "seed", "batch"))
    other = sorted(o for o in options.overrides if o.startswith("sample.") and not o.startswith(named))
    if other:  # other settings, another directory
        name += f"-{digest(other)[:6]}"
    folder = Path(options.out) if options.out else config.directory / name
    pipeline.sample_into(replace(config, sample=own), folder, bool(options.fresh))
    print(f"{own.number} samples in {folder}; {folder / 'contact.png'} shows some")
    return errors.DONE


def submit(options: argparse.Namespace) -> int:
    config = experiment.load(options.config, options.overrides)
    cluster = executors.load_cluster(options.cluster)
    busy = {n: j for n in stages(config) if (j := status.last_job(config.directory, n)) and status.may_be_running(j["job"])}
    if busy and not options.dry:
        jobs = ", ".join(f"{name} (job {job['job']})" for name, job in busy.items())
        raise UserError(f"Jobs of this run are still in the queue: {jobs}. Wait for them or `lesiongen cancel` the run.")
    todo = pipeline.to_do(config, tuple(options.fresh))
    executors.check_before_queue(config, todo, cluster, options.dry)
    if not options.dry:
        pipeline.clear(config, tuple(options.fresh))
        pipeline.write_config(config)
    sent = executors.EXECUTORS["slurm"](config, todo, cluster, options.dry)
    if not options.dry:
        for name, job in sent.items():
            print(f"{name:<14} job {job}")
        print(f"watch: lesiongen status {config.directory}" if sent else "everything is done")
    return errors.DONE


def show_cost(options: argparse.Namespace) -> int:
    from launch.cost import report

    print(report(experiment.load(options.config, options.overrides)))
    return errors.DONE


def show_status(options: argparse.Namespace) -> int:
    print(status.show(status.load_run(options.run)))
    return errors.DONE


def logs(options: argparse.Namespace) -> int:
    print(status.logs(status.load_run(options.run), options.stage))
    return errors.DONE


def cancel(options: argparse.Namespace) -> int:
    ended = status.cancel(status.load_run(options.run))
    print(f"cancelled jobs {', '.join(ended)}" if ended else "no jobs to cancel")
    return errors.DONE


def verify(options: argparse.Namespace) -> int:
    from launch.verify import walk

    checked, problems = walk(Path(options.path))
    for line in problems:
        print(line)
    print(f"{checked} files checked, {len(problems)} problems")
    return errors.FAILED if problems else errors.DONE


def ui(options: argparse.Namespace) -> int:
    from launch.ui import serve

    serve(Path(options.runs), port=options.port)
    return errors.DONE


def demo(options: argparse.Namespace) -> int:
    from launch.demo import demo as show

    return show(options)


def rank(options: argparse.Namespace) -> int:
    from hpc import dist
    from hpc.train import health
    from launch.rank import rank_main

    health.exit_with_parent()
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
    "evaluate": evaluate,
    "run": run,
    "submit": submit,
    "plan": show_cost,
    "status": show_status,
    "logs": logs,
    "cancel": cancel,
    "verify": verify,
    "ui": ui,
    "rank": rank,
}
