"""The verb `plan`: prints what a run will cost (launch/cost.py) as tables."""

from dataclasses import replace

from hpc.train.hardware import Machines, machines
from hpc.train.memory import PHASES, device_bytes
from launch.cost import MARGIN, Length, Memory, Training, advice, length, memory, trainings
from lesiongen.experiment import Experiment

GIB = 2**30


def format_cost(config: Experiment, images: int | None = None) -> str:
    """Returns the plan of a run as text.

    Args:
        config: The run's config; `config.hardware` says for which machines.
        images: Number of training images, for the epochs; None if unknown.
    """
    where = machines(config.hardware, config.local.ranks)
    found = []
    for training in trainings(config):
        size = training.size(where.ranks)
        took = memory(training, size, training.train.engine, where)
        hardware = config.hardware
        found.append((training, size, took, length(training, where, hardware.utilisation, hardware.disk_gb_per_s * 1e9)))
    known = f"{images:,} training images" if images else "number of training images unknown: --images N gives epochs"
    assumed = "" if config.data.classes else "; 7 classes assumed"
    lines = [f"{config.name}: {config.data.size} px on {where.name}; {known}{assumed}", ""]
    lines += _verdict([(training, took) for training, _, took, _ in found], where)
    lines += _memory_table([(training, took) for training, _, took, _ in found], where)
    lines += _length_table([(training, took) for training, _, _, took in found], config, images)
    for training, size, _, _ in found:
        lines += _details(training, size, where)
    lines.append(_code_store(config))
    return "\n".join(lines)


def _verdict(found: list[tuple[Training, Memory]], where: Machines) -> list[str]:
    """Returns the first lines: whether the run fits, and what to change if not."""
    lines = []
    for training, took in found:
        if not took.fits(where):
            phase, most = max(took.device.items(), key=lambda item: item[1])
            host_phase, host = max(took.host.items(), key=lambda item: item[1])
            if where.gpu_bytes and most > MARGIN * where.gpu_bytes:
                need = f"{most / GIB:.1f} of {where.gpu_bytes / GIB:.1f} GiB of GPU memory ({phase})"
            else:
                need = f"{host / GIB:.1f} of {where.host_bytes / GIB:.1f} GiB of main memory of a node ({host_phase})"
            lines.append(f"{training.name} DOES NOT FIT: it takes {need}; {advice(training, where)}")
    return [*(lines or [f"it fits: every phase takes at most {MARGIN:.0%} of the memory"]), ""]


def _memory_table(found: list[tuple[Training, Memory]], where: Machines) -> list[str]:
    title = "GiB on one GPU" if where.gpu_bytes else "GiB of one rank"
    lines = [f"{title:26}" + "".join(f"{phase:>12}" for phase in PHASES)]
    for training, took in found:
        lines.append(f"  {training.name:24}" + "".join(f"{took.device[phase] / GIB:12.2f}" for phase in PHASES))
    phases = [*PHASES, "resume"] if where.gpu_bytes else PHASES
    lines += ["", f"{'GiB of main memory, a node':26}" + "".join(f"{phase:>12}" for phase in phases)]
    for training, took in found:
        lines.append(f"  {training.name:24}" + "".join(f"{took.host[phase] / GIB:12.1f}" for phase in phases))
    return [*lines, ""]


def _length_table(found: list[tuple[Training, Length]], config: Experiment, images: int | None) -> list[str]:
    head = f"{'length':26}{'samples':>14}{'epochs':>8}{'steps':>10}{'operations':>12}{'hours':>8}"
    lines = [head + f"{'checkpoint':>16}{'every':>10}"]
    total: float | None = 0.0
    for training, took in found:
        samples = training.train.samples
        epochs = f"{samples / images:.1f}" if images else "–"
        hours = "–" if took.hours is None else f"{took.hours:.2f}"
        total = None if took.hours is None or total is None else total + took.hours
        checkpoint = f"{took.checkpoint_bytes / 1e9:.2f} GB, {took.checkpoint_seconds:.1f} s"
        every = "–" if took.hours is None else f"{60 * took.hours * training.train.save_every / samples:.0f} min"
        row = f"  {training.name:24}{samples:14,}{epochs:>8}{took.steps:10,}{took.flops:12.2g}{hours:>8}"
        lines.append(row + f"{checkpoint:>16}{every:>10}")
    if total is not None:
        lines.append(f"  all trainings: {total:.1f} hours at {config.hardware.utilisation:.0%} of the peak speed")
    return [*lines, ""]


def _details(training: Training, size: object, where: Machines) -> list[str]:
    """Returns the parameters, the batch, and the peak of a step under each ZeRO stage, the training's own marked."""
    train, micro = training.train, training.micro_batch(where.ranks)
    numbers = ", ".join(f"{name} {number:,}" for name, number in training.parts.items())
    tokens = f", {train.batch * training.tokens:,} tokens" if training.tokens else ""
    lines = [f"{training.name}: {training.about}", f"  parameters  {numbers}; trainable {sum(training.parameters):,}"]
    lines.append(f"  per step    {train.batch} images{tokens}; {micro} per rank and micro-batch × {train.engine.accumulation}")
    cells = []
    for zero in range(4):
        peak = device_bytes(size, replace(train.engine, zero=zero, offload=False), where.ranks, not where.gpu_bytes)["step"]
        cells.append(f"{'→ ' if zero == train.engine.zero else ''}ZeRO {zero} {peak / GIB:.2f}")
    return [*lines, f"  step, GiB   {', '.join(cells)}", ""]


def _code_store(config: Experiment) -> str:
    grids, code_bytes = config.tokenizer.model.grids(config.data.size), 1 if config.tokenizer.model.entries <= 256 else 2
    image_bytes = sum(side**2 for side in grids.values()) * code_bytes * config.encode.draws
    return f"code store  {image_bytes:,} bytes per training image ({config.encode.draws} draws)"
