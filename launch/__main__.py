"""The `lesiongen` command. Nothing slow is imported here: --help must answer at once, torch takes seconds."""

import argparse
import os

from launch.endings import code_of, end, explain

CONFIG_HELP = "YAML file"


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="lesiongen",
        description="Trains generators of skin-lesion images: pack → tokenizer → codes → priors → samples → report. The "
        "same command run again resumes. Exit codes: 0 done, 2 usage or config, 75 stopped early and resumable, 76 hang, "
        "77 diverged, 1 anything else.",
    )
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, text: str, config: bool = False, fresh: bool = True) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text)
        if config:
            sub.add_argument("config", help=CONFIG_HELP)
            sub.add_argument("overrides", nargs="*", metavar="section.key=value", help="override any key of the config")
        if config and fresh:
            sub.add_argument("--fresh", action="append", default=[], metavar="STAGE", help="make this stage anew")
        return sub

    demo = verb("demo", "the whole pipeline on drawn lesions, or on yours, in a few minutes")
    demo.add_argument("--out", default="runs", help="where the run goes (default: runs)")
    demo.add_argument("--images", help="folder of real images in place of the drawn ones")
    demo.add_argument("--metadata", help="their CSV")
    demo.add_argument("overrides", nargs="*", metavar="section.key=value")
    download = verb("download", "a public data set, resumable, with its licence")
    download.add_argument("name", choices=["isic-2016", "isic-2018", "ham10000"])
    download.add_argument("--out", required=True, metavar="DIR")
    pack = verbs.add_parser("pack", help="images + CSV → WebDataset shards", description="images + CSV → WebDataset shards")
    pack.add_argument("config", nargs="?", help=CONFIG_HELP)
    pack.add_argument("overrides", nargs="*", metavar="section.key=value")
    pack.add_argument("--fresh", action="append", default=[], metavar="STAGE", help="make this stage anew")
    pack.add_argument("--images", help="folder, searched recursively")
    pack.add_argument("--metadata", help="CSV, or a folder of them; none = labelled by folder, every image its own group")
    pack.add_argument("--out", help="directory for the shards")
    pack.add_argument("--size", type=int, help="short side in pixels (default: 256)")
    pack.add_argument("--append", action="store_true", help="add images that are new to packed ones; none of those moves")
    pack.add_argument("--near-duplicates", action="store_true", help="find lesions taken again, and keep them in one split")
    preview = verb("preview", "originals beside augmented ones, one picture", config=True, fresh=False)
    preview.add_argument("--out", metavar="PNG", help="where to (default: preview.png in the run)")
    train = verbs.add_parser("train", help="train a tokenizer or a prior", description="train a tokenizer or a prior")
    train.add_argument("what", choices=["tokenizer", "prior"])
    train.add_argument("config", help=CONFIG_HELP)
    train.add_argument("overrides", nargs="*", metavar="section.key=value")
    train.add_argument("--level", help="of the prior; all of them by default")
    train.add_argument("--fresh", action="append", default=[], metavar="STAGE", help="make this stage anew")
    reconstruct = verb("reconstruct", "images through the tokenizer: pairs, maps of codes, PSNR and SSIM of each")
    reconstruct.add_argument("config", help=CONFIG_HELP)
    reconstruct.add_argument("images", nargs="+", metavar="IMAGE", help="image files or folders; section.key=value among them")
    reconstruct.add_argument("--out", metavar="DIR", help="where to (default: reconstructions in the run)")
    verb("encode", "shards + tokenizer → code store", config=True)
    sample = verb("sample", "priors → new images", config=True)
    sample.add_argument("--label", action="append", help="class to draw; again for more (default: every class)")
    sample.add_argument("-n", type=int, help="how many in all")
    sample.add_argument("--seed", type=int)
    sample.add_argument("--out", help="where to (default: a directory in the run, named after the options)")
    verb("evaluate", "figures and report", config=True)
    verb("run", "every stage that is not done, on this machine", config=True)
    submit = verb("submit", "every stage that is not done, as Slurm jobs", config=True)
    submit.add_argument("--cluster", required=True, help="cluster file, configs/cluster/X.yaml")
    submit.add_argument("--dry", action="store_true", help="print the batch scripts only")
    verb("plan", "parameters, memory per GPU and tokens, from arithmetic", config=True)
    for name, text in (("status", "stages, jobs and progress"), ("cancel", "cancel the run's Slurm jobs")):
        verb(name, text).add_argument("run", help="run directory or config")
    logs = verb("logs", "the ends of the newest logs")
    logs.add_argument("run", help="run directory or config")
    logs.add_argument("--stage")
    verb("verify", "full checksum walk").add_argument("path", help="run, shards, code store, checkpoint or export")
    ui = verb("ui", "MLflow's page on what this machine holds")
    ui.add_argument("--runs", default="runs", help="directory of runs (default: runs)")
    ui.add_argument("--port", type=int, default=5000)
    rank = verbs.add_parser("rank")  # what executors start; not for people
    rank.add_argument("config")
    rank.add_argument("stage")
    return top


def main(arguments: list[str] | None = None) -> int:
    """What a command line asks for: the exit code."""
    options, rest = parser().parse_known_args(arguments)
    # argparse gives up on overrides that follow an option: "CONFIG --fresh codes a.b=c" is what people write.
    if stray := [r for r in rest if r.startswith("-") or "=" not in r or not hasattr(options, "overrides")]:
        parser().error(f"unrecognized: {' '.join(stray)}")
    if rest:
        options.overrides += rest
    # Threads that spin while they wait make each other 30 times slower where ranks, workers or others share the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from launch import commands

    try:
        return commands.COMMANDS[options.verb](options) or 0
    except (Exception, KeyboardInterrupt) as error:
        explain(error)
        return code_of(error)


def command() -> None:
    """Entry point of the process."""
    end(main())


if __name__ == "__main__":
    command()
