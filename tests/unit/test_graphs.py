"""GraphedFunction with a stand-in for CUDA graphs, which records the operators of a call on the CPU and replays them."""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lesiongen.priors.cuda_graphs import GraphedFunction
from lesiongen.priors.sampling import TokenChooser, uniform_numbers
from tests.unit.test_priors import PRIORS, prior

WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select"}  # need values of tensors


class Graph(TorchDispatchMode):
    """Replaces torch.cuda.CUDAGraph. Inside its context it records operators; replay() runs them again on the same tensors.

    Like CUDA, it refuses operators that wait for the device to return a value.
    """

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.name().split(".")[0] not in WAITS, f"{func} waits for the device"
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if storage_address(old) != storage_address(new):
                    old.copy_(new)

    @torch.no_grad()
    def forget(self):
        """Overwrites the results of the recording with NaN: on a GPU, recording computes nothing."""
        for _, args, kwargs, out in self.calls:
            given = set(map(storage_address, tree_leaves((args, kwargs))))
            for x in tree_leaves(out):
                if storage_address(x) not in given and x.is_floating_point():
                    x.fill_(torch.nan)


def storage_address(x) -> int | None:
    return x.untyped_storage().data_ptr() if isinstance(x, torch.Tensor) else None


@pytest.fixture
def graphs(monkeypatch):
    """Replaces CUDA graphs by Graph. Returns the list of the graphs that the test records."""
    made = []

    @contextlib.contextmanager
    def graph(new_graph):
        made.append(new_graph)
        with new_graph:
            yield
        new_graph.forget()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    return made


@pytest.mark.parametrize("name", PRIORS)
def test_batches_are_those_of_the_plain_call(name, graphs):
    net = prior(name, upper=True).eval()
    choice_and_guidance = TokenChooser(temperature=0.9, top_k=8, top_p=0.9), lambda t: 1.5

    def work(facts, numbers, upper):
        return net.sample(facts, [upper], numbers, *choice_and_guidance)

    recorded = GraphedFunction(work)
    for size, first in ((3, 0), (3, 3), (3, 6), (2, 9), (3, 11)):  # the fourth batch is smaller, as the last one may be
        torch.manual_seed(first)
        facts, upper = torch.randint(-1, 2, (size, 2)), torch.randint(7, (size, 2, 2))
        given = facts, uniform_numbers(0, range(first, first + size), net.grid), upper
        assert torch.equal(recorded(*given), work(*given))
    assert len(graphs) == 1


def test_a_result_is_the_callers_own(graphs):
    recorded = GraphedFunction(lambda x: x * 2)
    results = [recorded(torch.full((2,), float(i))) for i in range(4)]
    assert [r.tolist() for r in results] == [[0, 0], [2, 2], [4, 4], [6, 6]]


@pytest.mark.gpu
@pytest.mark.parametrize("name", PRIORS)
def test_on_a_gpu(name):
    net = prior(name).eval().cuda()
    recorded = GraphedFunction(lambda facts, numbers: net.sample(facts, [], numbers, TokenChooser()))
    for first in (0, 3, 6):
        facts = torch.tensor([[0, 1], [4, -1], [-1, 0]]).cuda()
        numbers = uniform_numbers(0, range(first, first + 3), net.grid).cuda()
        assert torch.equal(recorded(facts, numbers), recorded.function(facts, numbers))
