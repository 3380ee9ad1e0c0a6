"""How a model's weights are divided among the ranks under each ZeRO stage. No other file imports deepspeed.

Terms: the *model's weights* are what forward() computes with. The *master weights* are the fp32 weights that the optimizer
updates. Where they are kept (Rajbhandari et al. 2020, arXiv:1910.02054):

    stage   model's weights                          master weights
    0       whole on each rank                       the model's weights themselves
    1, 2    whole on each rank                       this rank's part, in flat tensors of their own
    3       this rank's part of each parameter       this rank's part, in flat tensors of their own

Under stage 3 a parameter's own tensor is empty outside forward and backward; DeepSpeed keeps its shape in `ds_shape`.
"""

import contextlib
import copy
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType

import torch
from torch import nn

from hpc import dist


def import_deepspeed() -> ModuleType:
    """Imports deepspeed without its INFO log and without compiling its extension for shared-memory communication.

    Only inference uses that extension, and compiling it takes 42 s. From then on torch.load() of this process, and of the
    processes that it starts, runs no code: DeepSpeed's checkpoints are pickles, and it would load whatever they hold.
    """
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils import logger
    from deepspeed.utils.tensor_fragment import fragment_address

    torch.serialization.add_safe_globals([LossScaler, ZeroStageEnum, fragment_address])  # all that its checkpoints hold
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logger.setLevel(logging.ERROR)
    return deepspeed


def convert_to_universal() -> None:
    """Runs DeepSpeed's converter of checkpoints on the arguments of the command line, as the main program of a process."""
    import_deepspeed()
    from deepspeed.checkpoint import ds_to_universal

    ds_to_universal.main(ds_to_universal.parse_arguments())


def shape_of(parameter: nn.Parameter) -> torch.Size:
    """Returns the shape of the whole parameter, also of one that stage 3 has divided."""
    return getattr(parameter, "ds_shape", parameter.shape)


def build_divided(build: Callable[[], nn.Module], settings: dict) -> nn.Module:
    """Builds a model for stage 3. Each parameter is divided among the ranks as soon as its layer is built. Collective.

    So no rank ever holds the whole model. The random numbers are the same as without division. A model whose constructor
    changes the weights of finished layers must do so through Module.apply(), which then gathers each layer's weights.

    Args:
        build: Builds the model.
        settings: DeepSpeed's config, with stage 3.

    Returns:
        The model. Buffers are whole on each rank and keep their dtype.
    """
    deepspeed = import_deepspeed()
    deepspeed.init_distributed(verbose=False)  # makes DeepSpeed know the ranks that have joined
    # Without tensor_overrides=[], zero.Init converts tensors that are created inside it to another dtype and device. A dtype
    # argument would be replaced by half precision, so none is given: the settings say fp32.
    with deepspeed.zero.Init(config_dict_or_path=settings, tensor_overrides=[]):
        return build()


@contextlib.contextmanager
def gathered(parameters: Iterable[nn.Parameter], changed: bool = False) -> Iterator[None]:
    """Makes parameters whole inside the block; does nothing if they are not divided. Collective.

    Args:
        parameters: The parameters.
        changed: Whether the block changes them. The changes of rank 0 are then copied to all ranks.
    """
    parameters = list(parameters)
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        yield
        return
    with import_deepspeed().zero.GatheredParameters(parameters, modifier_rank=0 if changed else None):
        yield


def without_hooks(module: nn.Module) -> nn.Module:
    """Returns a copy of a module's structure that shares its parameters and buffers.

    Call it before DeepSpeed adds its hooks to the module. The copy has no hooks, so it runs without collectives; its
    parameters must be whole.
    """
    shared = {id(tensor): tensor for tensor in [*module.parameters(), *module.buffers()]}
    return copy.deepcopy(module, memo=shared).eval()


class Weights:
    """The weights of a model inside an initialised DeepSpeed engine.

    Attributes:
        module: The model.
        stage: ZeRO stage, 0 to 3.
    """

    def __init__(self, module: nn.Module, optimizer: object, stage: int):
        """Describes where the weights are.

        Args:
            module: The model, as DeepSpeed's engine has it.
            optimizer: The engine's `optimizer`: DeepSpeed's wrapper under stages 1 to 3.
            stage: ZeRO stage, 0 to 3.
        """
        self.module, self.stage, self._optimizer = module, stage, optimizer

    def masters(self) -> list[torch.Tensor]:
        """Returns the tensors of this rank's master weights. The tensors are not copies."""
        if self.stage == 3:  # here the optimizer's parameter groups are empty between steps
            return self._optimizer.fp32_partitioned_groups_flat
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    @torch.no_grad()
    def update_model(self) -> None:
        """Copies the master weights into the model's weights, after a change of the master weights. Collective."""
        optimizer = self._optimizer
        if self.stage in (1, 2):
            optimizer.update_lp_params()
        elif self.stage == 3:
            # Small parameters stay whole between steps. Divide them first, and gather them again with their new values.
            kept_whole = optimizer.persistent_parameters
            if kept_whole:
                kept_whole[0].partition(kept_whole)
            for group in range(len(optimizer.fp32_partitioned_groups_flat)):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
            if kept_whole:
                kept_whole[0].all_gather(kept_whole)

    def end_forward(self) -> None:
        """Frees what a forward pass without a backward pass has left. Collective.

        Under stage 3 DeepSpeed requests the weights of the backward pass ahead of time, and they stay on their way.
        """
        if self.stage == 3:
            self._optimizer.checkpoint_event_prologue()  # waits for these weights, and divides all parameters
            self._optimizer.checkpoint_event_epilogue()  # gathers again the small parameters that always stay whole

    def fragments(self) -> Iterator[tuple[str, int, torch.Tensor]]:
        """Yields this rank's part of each parameter's master weights.

        Every element of every parameter is on one rank only; under stage 0 on every rank.

        Yields:
            The parameter's name, the index of the part's first element in the flattened parameter, and the part as a 1-d
            tensor that is not a copy.
        """
        for name, parameter in self.module.named_parameters():
            if self.stage == 0:
                # Under channels_last a parameter's memory is in another order than its elements, so it has no flat view.
                yield name, 0, parameter.detach()
            elif self.stage < 3:
                if (mapping := parameter._hp_mapping) is not None:  # None: no part of this parameter is on this rank
                    yield name, mapping.lp_fragment_address.start, mapping.get_hp_fragment().detach()
            else:
                part, _ = parameter._z3_optimizer._get_fp32_opt_state_partition(parameter, release_swap_buffers=False)
                start = part.numel() * dist.rank()
                size = min(part.numel(), shape_of(parameter).numel() - start)  # the last ranks' parts are padded
                if size > 0:
                    yield name, start, part.detach()[:size]

    def whole(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields parameters and buffers, whole, one after the other. Collective.

        Under stage 3 each parameter is gathered when its turn comes, and freed before the next.

        Args:
            names: Names as in the module's state dict, in the same order on all ranks.
        """
        self.end_forward()
        parameters = dict(self.module.named_parameters())
        for name in names:
            if name not in parameters:
                yield name, self.module.get_buffer(name)
                continue
            with gathered([parameters[name]]):
                yield name, parameters[name].detach()

    def shapes(self) -> dict[str, torch.Size]:
        """Returns the shape of each tensor of the module's state dict, by name."""
        parameters = dict(self.module.named_parameters())
        state = self.module.state_dict()
        return {name: shape_of(parameters[name]) if name in parameters else state[name].shape for name in state}
