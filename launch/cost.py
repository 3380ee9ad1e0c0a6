"""What a run will cost, known before it is queued: memory in each phase, hours, and what to change if it does not fit.

Parameters are counted on models without storage (torch's meta device). Activations are measured on a step without storage, and
the memory of each phase is computed from them (hpc/train/memory.py). The scratch memory of convolution kernels, 10 to 30 % on a
CPU, and the memory that the allocator keeps are not included: a plan fits if it takes at most MARGIN of the memory.
launch/cost_table.py prints the result.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hpc.errors import UserError
from hpc.train.engine import EngineConfig
from hpc.train.flops import training_flops
from hpc.train.hardware import Machines
from hpc.train.loop import TrainConfig
from hpc.train.memory import ModelSize, device_bytes, host_bytes, peak_activations
from lesiongen import priors, tokenizers
from lesiongen.experiment import Experiment
from lesiongen.priors import objective as prior_objective
from lesiongen.tokenizers import objective as tokenizer_objective
from lesiongen.tokenizers import polish as polish_objective
from lesiongen.tokenizers.code_noise import CodeNoise
from lesiongen.tokenizers.losses import ReconstructionLoss
from lesiongen.tokenizers.polish_loss import PolishLoss

MARGIN = 0.85  # share of the memory that a plan may take
PROCESS_BYTES = {"cpu": 0.6e9, "gpu": 3e9}  # main memory of a rank without the model: Python, libraries, CUDA
WORKER_BYTES = 0.6e9  # main memory of a data worker
ASSUMED_VALUES = {"label": 7, "site": 12, "sex": 2, "age_band": 5}  # distinct values of each fact, before data are packed


@dataclass(frozen=True)
class Training:
    """One training of a run, as far as its cost depends on it.

    Attributes:
        name: Name of the stage.
        section: Key of its TrainConfig in the config.
        train: Its TrainConfig.
        build: Builds the model with its loss, on the default device.
        batch_of: Makes a blank batch of some samples, on the default device.
        checkpointed: Like `build`, with activation checkpointing.
        uses_checkpoint: Whether the config has activation checkpointing.
        tokens: Tokens of a sample; 0 for a tokenizer and its decoder.
        workers: Data workers of a rank.
        about: What the plan prints of the model.
    """

    name: str
    section: str
    train: TrainConfig
    build: Callable[[], nn.Module]
    batch_of: Callable[[int], dict]
    checkpointed: Callable[[], nn.Module]
    uses_checkpoint: bool
    tokens: int
    workers: int
    about: str

    @cached_property
    def parts(self) -> dict[str, int]:
        """Trainable parameters of each child of the net and of the loss that has any; and the elements of the net's buffers."""
        with torch.device("meta"):
            module = self.build()
        children = [part for whole in module.children() for part in whole.named_children()]
        parts = {name: sum(p.numel() for p in part.parameters() if p.requires_grad) for name, part in children}
        buffers = sum(b.numel() for b in module.net.buffers())
        return {name: number for name, number in parts.items() if number} | {"buffers": buffers}

    @cached_property
    def parameters(self) -> tuple[int, ...]:
        """Elements of each trainable parameter."""
        with torch.device("meta"):
            return tuple(p.numel() for p in self.build().parameters())

    @cached_property
    def flops(self) -> int:
        """Floating-point operations of training on one sample."""
        with FakeTensorMode(allow_non_fake_inputs=True):  # not the meta device, which has no autocast
            module, batch = self.build().eval(), self.batch_of(1)
            found = training_flops(lambda: module(batch)["loss"])
        module.zero_grad()  # models that are built later may share the loss, and so the weights of its critic
        return found

    def activations(self, micro_batch: int, training: bool = True, checkpoint: bool | None = None) -> int:
        """Returns the peak bytes of the activations of one micro-batch.

        Args:
            micro_batch: Samples of the micro-batch.
            training: Whether of a training step or of an evaluation.
            checkpoint: With or without activation checkpointing; None for what the config says.
        """
        build = self.build if checkpoint in (None, self.uses_checkpoint) else self.checkpointed
        bf16 = self.train.engine.precision == "bf16"
        return peak_activations(lambda: (build(), self.batch_of(micro_batch)), bf16, training)

    def micro_batch(self, ranks: int) -> int:
        """Returns the samples in one micro-batch of one rank. Raises UserError if the batch cannot be divided so."""
        try:
            return self.train.engine.micro_batch(self.train.batch, ranks)
        except ValueError as error:
            raise UserError(f"{self.section}: {error}") from None

    def size(self, ranks: int) -> ModelSize:
        """Returns what the training's memory depends on."""
        micro = self.micro_batch(ranks)
        return ModelSize(self.parameters, self.activations(micro), self.activations(micro, training=False))


def trainings(config: Experiment) -> Iterator[Training]:
    """Yields the trainings of a run: the tokenizer, its decoder, then the prior of each level from coarse to fine."""
    yield _tokenizer(config)
    if "polish" in config.trainings:
        yield _polish(config)
    grids, entries = config.tokenizer.model.grids(config.data.size), config.tokenizer.model.entries
    values = ASSUMED_VALUES | {"label": len(config.data.classes) or ASSUMED_VALUES["label"]}
    upper: tuple = ()
    for level in config.levels:
        grid = (grids[level], grids[level])
        facts = {fact: values[fact] for fact in config.prior(level).facts}
        yield _prior(config, level, {"grid": grid, "entries": entries, "facts": facts, "upper": upper})
        upper += ((entries, grid),)


def _tokenizer(config: Experiment) -> Training:
    tokenizer, side, channels = config.tokenizer, config.data.size, config.data.channels
    # The loss is made here, not on fake tensors: LPIPS reads its weights from a file.
    loss, grids = ReconstructionLoss(tokenizer.loss, 1.0), tokenizer.model.grids(side)

    def build_with(model: tokenizers.TokenizerModel) -> Callable[[], nn.Module]:
        def build() -> nn.Module:
            return tokenizer_objective.Objective(tokenizers.make(model, channels, tokenizer.train.batch), loss)

        return build

    def batch_of(number: int) -> dict:
        image = torch.zeros(number, channels, side, side, dtype=torch.uint8)
        return {"image": image, "slot": torch.arange(number), "position": torch.arange(number)}

    return Training(
        name="tokenizer",
        section="tokenizer.train",
        train=tokenizer.train,
        build=build_with(tokenizer.model),
        batch_of=batch_of,
        checkpointed=build_with(replace(tokenizer.model, checkpoint=True)),
        uses_checkpoint=tokenizer.model.checkpoint,
        tokens=0,
        workers=config.data.workers,
        about=f"{' + '.join(f'{grids[n]}² {n}' for n in reversed(tokenizer.model.names))}, K={tokenizer.model.entries}",
    )


def _polish(config: Experiment) -> Training:
    model, side, channels = config.tokenizer.model, config.data.size, config.data.channels
    classes = len(config.data.classes) or ASSUMED_VALUES["label"]
    loss = PolishLoss(config.polish.loss, classes, channels)

    def build_with(model: tokenizers.TokenizerModel) -> Callable[[], nn.Module]:
        def build() -> nn.Module:
            net = tokenizers.make(model, channels, 1)
            net.add_polish(config.polish.texture, [""] * classes)
            return polish_objective.Objective(net, loss, CodeNoise(net, config.polish.code_noise))

        return build

    def batch_of(number: int) -> dict:
        image = torch.zeros(number, channels, side, side, dtype=torch.uint8)
        zeros = torch.zeros(number, dtype=torch.int64)
        return {"image": image, "label": zeros, "position": zeros}

    return Training(
        name="polish",
        section="polish.train",
        train=config.polish.train,
        build=build_with(model),
        batch_of=batch_of,
        checkpointed=build_with(replace(model, checkpoint=True)),
        uses_checkpoint=model.checkpoint,
        tokens=0,
        workers=config.data.workers,
        about="the tokenizer's decoder once more",
    )


def _prior(config: Experiment, level: str, shape: dict) -> Training:
    prior = config.prior(level)

    def build_with(model: priors.PriorModel) -> Callable[[], nn.Module]:
        return lambda: prior_objective.Objective(priors.make(model, **shape))

    tokens = math.prod(shape["grid"])
    return Training(
        name=f"prior-{level}",
        section=f"priors.{level}.train",
        train=prior.train,
        build=build_with(prior.model),
        batch_of=lambda number: prior_objective.blank_batch(shape, number),
        checkpointed=build_with(replace(prior.model, checkpoint=True)),
        uses_checkpoint=prior.model.checkpoint,
        tokens=tokens,
        workers=0,
        about=f"{prior.model.kind}, {tokens} tokens per sample, K={shape['entries']}",
    )


@dataclass(frozen=True)
class Memory:
    """What one training takes on the machines.

    Attributes:
        device: Phase → bytes on one rank's device; on the CPU, in the main memory of one rank.
        host: Phase → bytes of main memory on one node, for all its ranks.
    """

    device: dict[str, float]
    host: dict[str, float]

    def fits(self, machines: Machines) -> bool:
        """Returns whether every phase fits, with MARGIN to spare."""
        on_device = not machines.gpu_bytes or max(self.device.values()) <= MARGIN * machines.gpu_bytes
        return on_device and max(self.host.values()) <= MARGIN * machines.host_bytes


def memory(training: Training, size: ModelSize, engine: EngineConfig, machines: Machines) -> Memory:
    """Computes the memory of a training.

    Args:
        training: The training.
        size: Its size; see Training.size().
        engine: The engine's config, which may differ from the training's own.
        machines: The machines.
    """
    on_cpu = not machines.gpu_bytes
    device = device_bytes(size, engine, machines.ranks, gloo=on_cpu and machines.ranks > 1)
    around = PROCESS_BYTES["cpu" if on_cpu else "gpu"] + training.workers * WORKER_BYTES
    of_rank = device if on_cpu else host_bytes(size, engine, machines.ranks)
    return Memory(device, {phase: machines.ranks_per_node * (around + bytes_) for phase, bytes_ in of_rank.items()})


def advice(training: Training, machines: Machines) -> str:
    """Returns the smallest change of the config that makes a training fit, as text."""
    micro, section = training.micro_batch(machines.ranks), training.section
    engine = training.train.engine
    stages = sorted({engine.zero, *range(engine.zero + 1, 4)}) if machines.ranks > 1 else [engine.zero]
    for checkpoint in sorted({training.uses_checkpoint, True}):
        size = ModelSize(training.parameters, training.activations(micro, checkpoint=checkpoint), 0)
        evaluation = training.activations(micro, training=False)
        for divisor in (d for d in (1, 2, 4, 8, 16, 32) if micro % d == 0):
            for zero in stages:
                # Activations are proportional to the micro-batch.
                smaller = replace(size, step_bytes=size.step_bytes // divisor, evaluation_bytes=evaluation // divisor)
                if memory(training, smaller, replace(engine, zero=zero), machines).fits(machines):
                    changes = [f"{section}.engine.zero={zero}"] * (zero != engine.zero)
                    changes += [f"{section}.engine.accumulation={engine.accumulation * divisor}"] * (divisor > 1)
                    model = section.removesuffix("train").replace("polish", "tokenizer") + "model.checkpoint=true"
                    changes += [model] * (checkpoint != training.uses_checkpoint)
                    return f"set {' '.join(changes)}"
    return "use a smaller model, or more or larger machines"


@dataclass(frozen=True)
class Length:
    """How long a training takes.

    Attributes:
        steps: Optimizer steps.
        flops: Floating-point operations of the whole training.
        hours: Hours at the stated utilisation; None if the peak speed is unknown.
        checkpoint_bytes: Size of one checkpoint.
        checkpoint_seconds: Time to write it.
    """

    steps: int
    flops: float
    hours: float | None
    checkpoint_bytes: float
    checkpoint_seconds: float


def length(training: Training, machines: Machines, utilisation: float, disk_bytes_per_s: float) -> Length:
    """Computes how long a training takes.

    Args:
        training: The training.
        machines: The machines.
        utilisation: Share of the peak speed that training reaches.
        disk_bytes_per_s: Speed at which one node writes.
    """
    train = training.train
    flops = float(train.samples) * training.flops
    peak = machines.peak_flops.get(train.engine.precision)
    hours = flops / (peak * utilisation * machines.ranks) / 3600 if peak else None
    size = checkpoint_bytes(training)
    writers = machines.nodes if train.engine.zero else 1
    return Length(math.ceil(train.samples / train.batch), flops, hours, size, size / writers / disk_bytes_per_s)


def checkpoint_bytes(training: Training) -> float:
    """Returns the size of one checkpoint of a training."""
    engine = training.train.engine
    # Weights and moments; ZeRO 1 to 3 also write the optimizer's fp32 copy, and under ZeRO 3 the weights are only in it.
    return 4.0 * sum(training.parameters) * ({0: 3, 1: 4, 2: 4, 3: 4}[engine.zero] + bool(engine.average))
