"""CUDA graphs for sampling. A batch launches thousands of small kernels, and launching them takes longer than running them.

On a CPU the tests replace the recording of a graph by a stand-in; those marked gpu record one.
"""

from collections.abc import Callable

import torch


class GraphedFunction:
    """Calls a function of tensors through a CUDA graph. LevelSampler wraps the sampling of a batch in it.

    The first call runs the function as it is, the second records a graph, and this and later calls replay the graph. A call
    whose inputs have other shapes than the first call's runs the function as it is. The function must launch the same kernels
    for all inputs of the same shapes.

    Memory: the graph keeps the memory of one call, and about 1 kB per kernel.
    """

    def __init__(self, function: Callable[..., torch.Tensor]):
        self.function = function
        self.inputs: list[torch.Tensor] | None = None  # the graph always reads its inputs from these tensors
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Returns the function's result for these inputs, in memory of its own."""
        if self.inputs is None:  # libraries initialise themselves during the first call, which cannot be recorded
            self.inputs = [x.clone() for x in inputs]
            return self.function(*inputs)
        if [x.shape for x in inputs] != [x.shape for x in self.inputs]:  # the last batch may be smaller
            return self.function(*inputs)
        for graph_input, x in zip(self.inputs, inputs, strict=True):
            graph_input.copy_(x)
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.result = self.function(*self.inputs)
        self.graph.replay()
        return self.result.clone()
