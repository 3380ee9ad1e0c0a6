"""Weights in safetensors files: the bytes of one file, several files, what a failed write leaves, loading layer by layer."""

import errno
import json
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save
from torch import nn

from hpc.config import from_plain
from hpc.train import weight_files
from hpc.train.layer_streaming import stream_layers
from lesiongen.experiment import PriorConfig
from lesiongen.priors import PRIORS, make
from lesiongen.priors.sampling import TokenChooser, uniform_numbers

TENSORS = {
    "b.weight": torch.randn(3, 4),
    "a": torch.randn(5),
    "ü/scalar": torch.randn(()),
    "empty": torch.zeros(0, 3),
    "mask": torch.tensor([True, False]),
    "transposed": torch.randn(4, 6).T,
}


def write(folder, tensors=TENSORS, max_bytes=10**9):
    weight_files.write(folder, {k: v.shape for k, v in tensors.items()}, sorted(tensors.items()), max_bytes)


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_one_file_has_the_bytes_that_the_library_writes(tmp_path):
    write(tmp_path)
    assert names(tmp_path) == {"model.safetensors"}
    content = save({name: tensor.float().contiguous() for name, tensor in TENSORS.items()})
    assert (tmp_path / "model.safetensors").read_bytes() == content


@pytest.mark.parametrize("max_bytes", [1, 48, 60, 100])
def test_several_files_hold_the_same_tensors(tmp_path, max_bytes):
    write(tmp_path, max_bytes=max_bytes)
    found = dict(weight_files.read(tmp_path))
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in TENSORS.items())
    assert len(found) == len(TENSORS)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(TENSORS)
    assert {path.name for path in weight_files.files(tmp_path)} | {"model.safetensors.index.json"} == names(tmp_path)
    largest = max(path.stat().st_size for path in weight_files.files(tmp_path))
    assert largest < 400 + max(max_bytes, max(4 * t.numel() for t in TENSORS.values()))


def test_new_weights_replace_all_files_of_old_ones(tmp_path):
    write(tmp_path, max_bytes=48)
    several = weight_files.sha256(tmp_path)
    write(tmp_path)
    assert names(tmp_path) == {"model.safetensors"}
    write(tmp_path, max_bytes=48)
    assert "model.safetensors" not in names(tmp_path) and weight_files.sha256(tmp_path) == several


@pytest.mark.parametrize("max_bytes", [48, 10**9])
def test_a_full_disk_leaves_the_old_weights(tmp_path, monkeypatch, max_bytes):
    write(tmp_path, max_bytes=max_bytes)
    before, drawn = weight_files.sha256(tmp_path), []

    def full(self, name, tensor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(weight_files._Writer, "add", full)
    tensors = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    with pytest.raises(OSError, match="No space"):
        weight_files.write(
            tmp_path,
            {k: v.shape for k, v in tensors.items()},
            (drawn.append(item) or item for item in sorted(tensors.items())),
            max_bytes,
        )
    assert len(drawn) == len(tensors), "other ranks would wait in the gather of the next tensor"
    assert weight_files.sha256(tmp_path) == before and not list(tmp_path.glob(".*"))


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no weights: neither model.safetensors nor model"):
        weight_files.files(tmp_path)


def small(kind: str) -> nn.Module:
    more = {"heads": 2} if kind in ("gpt", "pixelsnail") else {}
    config = from_plain(PriorConfig, {"model": {"kind": kind, "layers": 2, "width": 16} | more}).model
    return make(config, grid=(3, 3), entries=8, facts={"label": 3}, upper=((8, (2, 2)),)).eval()


@pytest.mark.parametrize("kind", PRIORS)
def test_a_streamed_prior_samples_the_same(tmp_path, kind):
    """With no budget, a part of it, and all of it. The weights of at most one layer are copied at any time."""
    torch.manual_seed(0)
    net = small(kind)
    write(tmp_path, net.state_dict(), max_bytes=2_000)
    facts, upper = torch.tensor([[0], [2]]), [torch.randint(8, (2, 2, 2))]
    numbers = uniform_numbers(0, range(2), (3, 3))
    expected = net.sample(facts, upper, numbers, TokenChooser(), lambda t: 2.0)
    size = sum(4 * p.numel() for p in net.parameters())
    for budget in (0, size // 2, size):
        loaded = weight_files.load_into(lambda: small(kind), tmp_path).eval()
        kept = {name: p.data_ptr() for name, p in loaded.named_parameters()}
        streamed, copied = stream_layers(loaded, torch.device("cpu"), budget), []

        def watch(layer, *_, streamed=streamed, kept=kept, copied=copied):
            own = {id(p) for p in layer.parameters(recurse=False)}
            moved = [(name, id(p) in own) for name, p in streamed.named_parameters() if p.data_ptr() != kept[name]]
            copied.append(moved)

        for layer in streamed.modules():
            layer.register_forward_pre_hook(watch)
        assert torch.equal(streamed.sample(facts, upper, numbers, TokenChooser(), lambda t: 2.0), expected)
        assert all(own for moved in copied for _, own in moved)
        assert bool([m for m in copied if m]) == (budget < size)
        assert all(p.data_ptr() == kept[name] for name, p in streamed.named_parameters())


def test_loading_keeps_buffers_that_are_not_saved(tmp_path):
    net = nn.Sequential(OrderedDict(a=nn.Linear(2, 2), b=nn.BatchNorm1d(2)))
    net.register_buffer("constant", torch.arange(3.0), persistent=False)
    write(tmp_path, {name: value.float() for name, value in net.state_dict().items()})

    def build():
        made = nn.Sequential(OrderedDict(a=nn.Linear(2, 2), b=nn.BatchNorm1d(2)))
        made.register_buffer("constant", torch.arange(3.0), persistent=False)
        return made

    loaded = weight_files.load_into(build, tmp_path)
    assert torch.equal(loaded.constant, net.constant) and torch.equal(loaded.a.weight, net.a.weight)
