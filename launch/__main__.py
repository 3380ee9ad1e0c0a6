"""The `lesiongen` command: parses the command line and calls the verb's function in launch/commands.py.

Nothing slow is imported at the top of this file, so that `lesiongen --help` answers at once: importing torch takes seconds.

To add a verb, add it to one of the `_add_…_verbs` functions below and to COMMANDS in launch/commands.py.
"""

import argparse
import difflib
import getpass
import json
import os
import sys
import textwrap
from importlib import metadata

from hpc import errors
from hpc.run.parent import exit_with_parent
from launch.endings import exit_code_of, exit_process, print_error, print_in_any_encoding

DESCRIPTION = (
    "Trains generators of skin-lesion images: pack → tokenizer → codes → (polish) → priors → samples → report. Run the "
    "same command again to resume. Exit codes: 0 done, 2 wrong usage or config, 75 stopped early and can be resumed, 76 a "
    "training step hung, 77 training diverged, 1 any other failure."
)
EXAMPLES = """examples:
  lesiongen demo                                               the whole pipeline in a few minutes, on drawn lesions
  lesiongen run configs/ham10000-cpu.yaml data.images=PHOTOS data.metadata=metadata.csv
  lesiongen status runs/ham10000-cpu                           how far it is
  lesiongen sample runs/ham10000-cpu --label mel -n 100        more images from a trained run
  lesiongen submit CONFIG --cluster my-cluster.yaml            the same run as jobs of Slurm
"""
CONFIG_HELP = "the run's config, a YAML file, or the run's directory"
OVERRIDE_FORMAT = "section.key=value"
RUN_HELP = "run directory or config file"
Verbs = argparse._SubParsersAction  # what add_subparsers() returns; argparse has no public name for this class


def make_parser() -> argparse.ArgumentParser:
    """Builds the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="lesiongen",
        description=textwrap.fill(DESCRIPTION, 96),
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"lesiongen {metadata.version('lesiongen')}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add_data_verbs(verbs)
    _add_stage_verbs(verbs)
    _add_pipeline_verbs(verbs)
    _add_inspection_verbs(verbs)
    _add_internal_verbs(verbs)
    return parser


def _add_data_verbs(verbs: Verbs) -> None:
    """Adds the verbs that need no trained model: demo, download, pack, preview."""
    demo = _add_verb(verbs, "demo", "run the whole pipeline on drawn lesions, or on your own images, in a few minutes")
    demo.add_argument("--out", type=_path, default="runs", help="directory of the run (default: runs)")
    demo.add_argument("--images", type=_path, help="folder of real images to use instead of drawn lesions")
    demo.add_argument("--metadata", type=_path, help="CSV that describes the images in --images")
    _add_overrides(demo)

    download = _add_verb(verbs, "download", "download a public data set and print its licence; an interrupted download resumes")
    download.add_argument("name", choices=["isic-2016", "isic-2018", "ham10000"])
    download.add_argument("--out", type=_path, required=True, metavar="DIR", help="directory of the data set")

    pack = _add_verb(verbs, "pack", "pack images and their CSV into WebDataset shards")
    pack.add_argument("config", type=_path, nargs="?", help=f"{CONFIG_HELP}; leave it out with --images and --out")
    _add_overrides(pack)
    _add_fresh(pack)
    pack.add_argument("--images", type=_path, help="folder of images, searched recursively")
    pack.add_argument(
        "--metadata", type=_path, help="CSV, or a folder of CSVs; without it, subfolders are labels and no images are grouped"
    )
    pack.add_argument("--out", type=_path, help="directory for the shards")
    pack.add_argument("--size", type=int, help="short side of the packed images in pixels (default: 256)")
    pack.add_argument("--append", action="store_true", help="add new images to finished shards; packed images stay in place")
    pack.add_argument(
        "--near-duplicates", action="store_true", help="find repeated photographs of a lesion; keep them in one split"
    )

    preview = _add_verb(verbs, "preview", "write one picture of original images beside augmented ones")
    _add_config(preview)
    preview.add_argument("--out", type=_path, metavar="PNG", help="file to write (default: preview.png in the run directory)")


def _add_stage_verbs(verbs: Verbs) -> None:
    """Adds the verbs that run one stage, or one model: train, reconstruct, encode, sample, tune, evaluate."""
    train = _add_verb(verbs, "train", "train the tokenizer, its decoder once more, or the priors")
    train.add_argument("what", choices=["tokenizer", "polish", "prior"])
    _add_config(train)
    _add_init_from(train)
    train.add_argument("--level", help="train the prior of this level only (default: every level)")
    _add_fresh(train)

    reconstruct = _add_verb(verbs, "reconstruct", "encode and decode images: pairs, code maps, PSNR and SSIM of each image")
    reconstruct.add_argument("config", type=_path, help=CONFIG_HELP)
    reconstruct.add_argument("images", nargs="+", metavar="IMAGE", help=f"image files or folders; also {OVERRIDE_FORMAT}")
    reconstruct.add_argument(
        "--out", type=_path, metavar="DIR", help="directory to write (default: reconstructions in the run directory)"
    )

    encode = _add_verb(verbs, "encode", "encode the shards with the tokenizer into a code store")
    _add_config(encode)
    _add_fresh(encode)

    sample = _add_verb(verbs, "sample", "sample new images from the priors")
    _add_config(sample)
    _add_fresh(sample)
    sample.add_argument("--label", action="append", help="class to sample; repeat for more classes (default: every class)")
    sample.add_argument("-n", type=int, help="total number of samples")
    sample.add_argument("--seed", type=int, help="seed of the random numbers")
    sample.add_argument(
        "--out", type=_path, help="directory to write (default: a directory in the run, named after the options)"
    )
    sample.add_argument("--format", choices=["webdataset"], help="write the samples as WebDataset shards too")
    sample.add_argument("--cluster", type=_path, help="cluster file: sample in a Slurm job instead of on this machine")
    sample.add_argument(
        "--array", type=int, metavar="TASKS", help="with --cluster: divide the samples among the tasks of an array"
    )

    tune = _add_verb(verbs, "tune", "search the guidance and temperature at which samples are closest to real images")
    tune.add_argument("what", choices=["sampling"])
    _add_config(tune)
    tune.add_argument("-n", type=int, default=500, help="images on each side (default: 500)")
    tune.add_argument("--out", type=_path, metavar="DIR", help="directory to write (default: tuning in the run directory)")

    evaluate = _add_verb(verbs, "evaluate", "compute the metrics and write the report")
    _add_config(evaluate)
    evaluate.add_argument("--share", metavar="FILE", type=_path, help="write a copy of the report without real images to FILE")
    _add_fresh(evaluate)

    publish = _add_verb(verbs, "publish", "write a folder with the trained generator, and nothing of the training images")
    _add_config(publish)
    publish.add_argument("--out", type=_path, metavar="DIR", required=True, help="the new folder")
    publish.add_argument("--force", action="store_true", help="publish without a report, or against its advice")
    publish.add_argument("--register", metavar="NAME", help="register the folder as a version of this model in MLflow")


def _add_pipeline_verbs(verbs: Verbs) -> None:
    """Adds the verbs that act on all stages of a config: run, submit, sweep, plan."""
    run = _add_verb(verbs, "run", "run every unfinished stage on this machine")
    _add_config(run)
    _add_init_from(run)
    _add_selection(run)

    submit = _add_verb(verbs, "submit", "submit every unfinished stage as a Slurm job")
    _add_config(submit)
    _add_init_from(submit)
    _add_selection(submit)
    submit.add_argument("--cluster", type=_path, required=True, help="cluster file, such as configs/cluster/example.yaml")
    submit.add_argument("--dry", action="store_true", help="print the batch scripts and submit nothing")
    submit.add_argument("--check", action="store_true", help="check the nodes by a small job first; the stages wait for it")

    sweep = _add_verb(verbs, "sweep", "run every combination of some settings, with the stages before them shared, and compare")
    _add_config(sweep)
    sweep.add_argument(
        "--grid", action="append", required=True, metavar="KEY=V1,V2,…", help="values of a key of the config; repeat for more"
    )
    sweep.add_argument("--until", metavar="STAGE", help="end each run with this stage (default: the report)")
    sweep.add_argument("--cluster", type=_path, help="cluster file: run as Slurm jobs instead of on this machine")
    sweep.add_argument("--parallel", type=int, default=4, help="runs whose jobs may be active at once (default: 4)")
    sweep.add_argument("--dry", action="store_true", help="print the runs of the sweep and start nothing")

    plan = _add_verb(verbs, "plan", "print whether a run fits the machines, its memory in each phase and its hours")
    _add_config(plan)
    plan.add_argument("--images", type=int, help="number of training images, for epochs (default: those of packed shards)")


def _add_inspection_verbs(verbs: Verbs) -> None:
    """Adds the verbs that inspect or stop what exists already: status, cancel, logs, verify, ui."""
    status = _add_verb(verbs, "status", "print the state of the run's stages and jobs")
    status.add_argument("run", type=_path, help=RUN_HELP)
    status.add_argument("--watch", action="store_true", help="print it again every few seconds, until every stage is done")

    cancel = _add_verb(verbs, "cancel", "cancel the run's Slurm jobs")
    cancel.add_argument("run", type=_path, help=RUN_HELP)

    logs = _add_verb(verbs, "logs", "print the last lines of the run's newest log files")
    logs.add_argument("run", type=_path, help=RUN_HELP)
    logs.add_argument("-f", "--follow", action="store_true", help="go on printing what is added, until Ctrl-C")
    logs.add_argument("--stage", help="stage whose logs to print (default: the stage that wrote last)")

    clean = _add_verb(verbs, "clean", "list what a run can do without: checkpoints of finished trainings, caches")
    clean.add_argument("run", type=_path, help=RUN_HELP)
    clean.add_argument("--delete", action="store_true", help="delete it")

    withdraw = _add_verb(verbs, "withdraw", "remove the images of a patient or lesion, and name what was made from them")
    withdraw.add_argument("run", type=_path, help=RUN_HELP)
    withdraw.add_argument("ids", nargs="+", metavar="ID", help="id of an image, a lesion or a patient, as in catalog.csv")
    withdraw.add_argument("--delete", action="store_true", help="do it; without, only list what it means")

    verify = _add_verb(verbs, "verify", "check every file against its checksum")
    verify.add_argument("path", type=_path, help="run, shards, code store, checkpoint or export")

    ui = _add_verb(verbs, "ui", "serve MLflow's web page with the runs of this machine")
    ui.add_argument("--runs", type=_path, default="runs", help="directory of runs (default: runs)")
    ui.add_argument("--port", type=int, default=5000, help="port of the web page (default: 5000)")
    ui.add_argument("--host", default="127.0.0.1", help="address to listen on; other than the default, it asks for a password")


def _add_internal_verbs(verbs: Verbs) -> None:
    """Adds the verb that launch/local.py starts for each rank. It has no help text, so `lesiongen --help` omits it."""
    rank = verbs.add_parser("rank")
    rank.add_argument("config")
    rank.add_argument("stage")
    rank.add_argument("parent", type=int, help="id of the process with which this one ends")


def _path(text: str) -> str:
    """Converts an argument that is a path: replaces ~ and environment variables."""
    from hpc.config import expand_path

    try:
        return expand_path(text)
    except errors.UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _add_verb(verbs: Verbs, name: str, text: str) -> argparse.ArgumentParser:
    return verbs.add_parser(name, help=text, description=text)


def _add_config(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("config", type=_path, help=CONFIG_HELP)
    verb.add_argument(
        "--preset", help="fill in what the config leaves open: cpu, small, base, large, or auto by machine and number of images"
    )
    _add_overrides(verb)


def _add_init_from(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--init-from", type=_path, metavar="RUN", help="begin trainings with the weights of this run or published generator"
    )


def _add_overrides(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("overrides", nargs="*", metavar=OVERRIDE_FORMAT, help="override any key of the config")


def _add_fresh(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--fresh", action="append", default=[], metavar="STAGE", help="delete this stage's result and run it again"
    )


def _add_selection(verb: argparse.ArgumentParser) -> None:
    """Adds the options that select stages of a whole run."""
    _add_fresh(verb)
    verb.add_argument("--yes", action="store_true", help="let --fresh also delete what was made from the stage, without asking")
    verb.add_argument("--from", dest="first", metavar="STAGE", help="begin with this stage; those before it must be done")
    verb.add_argument("--until", metavar="STAGE", help="end with this stage")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parses a command line. Exits with code 2 if it is wrong, as argparse does.

    Args:
        arguments: The words after `lesiongen`. None for those of this process.
    """
    parser = make_parser()
    words = sys.argv[1:] if arguments is None else arguments
    if words and not words[0].startswith("-"):
        _refuse_unknown_verb(parser, words[0])
    options, rest = parser.parse_known_args(arguments)
    # argparse leaves over the overrides that follow an option, as in "CONFIG --fresh codes a.b=c". Accept them here.
    if unknown := [word for word in rest if word.startswith("-") or "=" not in word or not hasattr(options, "overrides")]:
        parser.error(f"unrecognized: {' '.join(unknown)}")
    if rest:
        options.overrides += rest
    if getattr(options, "init_from", None):
        options.overrides.append(f"inputs.init_from={json.dumps(options.init_from)}")
    if getattr(options, "preset", None):
        options.overrides.insert(0, f"preset={options.preset}")
    return options


def _refuse_unknown_verb(parser: argparse.ArgumentParser, word: str) -> None:
    """Ends the process with code 2 if a word is no verb, and names the nearest verb. argparse would list them all."""
    [verbs] = (action.choices for action in parser._actions if isinstance(action, Verbs))
    if word not in verbs:
        near = difflib.get_close_matches(word, verbs, 1)
        parser.error(f"there is no verb '{word}'; " + (f"did you mean '{near[0]}'?" if near else "see lesiongen --help"))


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit code. Errors are printed, not raised.

    Args:
        arguments: The words after `lesiongen`. None for those of this process.
    """
    print_in_any_encoding()
    options = parse_arguments(arguments)
    name_the_user()
    if options.verb == "rank":  # before the imports, which take seconds
        exit_with_parent(options.parent)
    from launch import commands

    try:
        return commands.COMMANDS[options.verb](options) or 0
    except (Exception, KeyboardInterrupt) as error:
        print_error(error)
        return exit_code_of(error)


def name_the_user() -> None:
    """Sets USER for a user id without an entry in the system's list of users, as in containers. torch asks for the name."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = f"uid{os.getuid()}"


def command() -> None:
    """Runs the command line of this process and ends the process. The installed script `lesiongen` calls this function."""
    exit_process(main())


if __name__ == "__main__":
    command()
