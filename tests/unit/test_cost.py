"""The predicted cost of a model is its real cost, and the tables in the documentation are correct."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import profile

from hpc.errors import UserError
from hpc.run.metrics_log import MetricsLog
from hpc.train import flops
from hpc.train.memory import peak_activations
from launch import cost
from launch.cost_table import format_cost
from launch.remaining import TrainingTime
from lesiongen import priors
from lesiongen.experiment import load as load_experiment
from lesiongen.experiment import make as experiment
from lesiongen.priors import objective
from lesiongen.priors.gated_pixelcnn import GatedPixelCNNConfig
from lesiongen.priors.gpt import GPTConfig
from lesiongen.priors.pixelcnn import PixelCNNConfig
from lesiongen.priors.pixelsnail import PixelSNAILConfig
from lesiongen.tokenizers import make as make_tokenizer
from lesiongen.tokenizers import objective as tokenizer_objective
from lesiongen.tokenizers.losses import ReconstructionLoss

PRIORS = {
    "gpt": GPTConfig(layers=2, heads=2, width=32),
    "gpt checkpointed": GPTConfig(layers=4, heads=2, width=32, checkpoint=True),
    "pixelcnn": PixelCNNConfig(layers=2, width=16),
    "gated_pixelcnn": GatedPixelCNNConfig(layers=2, width=16),
    "pixelsnail": PixelSNAILConfig(layers=1, width=16, residual_blocks=1, heads=2),
}


def shape(side: int, facts: int = 7, upper: bool = True) -> dict:
    above = ((512, (side // 2, side // 2)),) if upper else ()
    return {"grid": (side, side), "entries": 512, "facts": {"label": facts}, "upper": above}


def prior_activations(config, shape: dict, micro: int, bf16: bool = False, training: bool = True) -> int:
    module = lambda: objective.Objective(priors.make(config, **shape))  # noqa: E731
    return peak_activations(lambda: (module(), objective.blank_batch(shape, micro)), bf16, training)


def number_of_parameters(config, shape: dict) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in priors.make(config, **shape).parameters())


def measured(module, batch) -> int:
    """Returns the largest number of bytes that a real training step had allocated at any time, without the weights."""
    for parameter in module.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with profile(profile_memory=True, acc_events=True) as seen:
        module(batch)["loss"].backward()
    now = most = 0
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def saved(module, batch) -> int:
    """Returns the bytes that autograd keeps from the forward to the backward pass of a real step."""
    own, stored = {p.untyped_storage().data_ptr() for p in module.parameters()}, {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: stored.setdefault(t.untyped_storage().data_ptr(), t), id):
        module(batch)
    return sum(t.untyped_storage().nbytes() for address, t in stored.items() if address not in own)


@pytest.mark.parametrize(("name", "side"), [*((name, 32) for name in PRIORS), ("gpt", 64), ("gpt checkpointed", 64)])
def test_memory_is_what_a_real_step_takes(name, side):
    """Compares with real steps of 1,024 and 4,096 tokens."""
    torch.manual_seed(0)
    predicted = prior_activations(PRIORS[name], shape(side), micro=1)
    module = objective.Objective(priors.make(PRIORS[name], **shape(side))).train()
    batch = objective.blank_batch(shape(side), 1)
    assert predicted == pytest.approx(measured(module, batch), rel=0.05)
    if name == "gpt":
        # Memory also holds the logits and their gradient when the backward pass begins.
        logits = side**2 * 512 * 4
        assert predicted == pytest.approx(saved(module, batch) + 2 * logits, rel=0.15)


def test_an_evaluation_takes_less_than_a_step():
    config = GPTConfig(layers=4, heads=2, width=32)
    step = prior_activations(config, shape(32), micro=2)
    evaluation = prior_activations(config, shape(32), micro=2, training=False)
    assert 0 < evaluation < 0.5 * step


def test_checkpointing_and_bf16_take_less():
    full = prior_activations(GPTConfig(layers=4, heads=2, width=32), shape(32), micro=2)
    assert prior_activations(PRIORS["gpt checkpointed"], shape(32), micro=2) < 0.6 * full
    assert prior_activations(GPTConfig(layers=4, heads=2, width=32), shape(32), micro=2, bf16=True) < 0.8 * full


def test_memory_of_a_tokenizers_step():
    """The prediction leaves out the scratch memory of convolution kernels, so it may be too small by up to 20 %."""
    model = {"hidden": 64, "residual_hidden": 32, "dim": 8, "entries": 32}
    config = experiment({"name": "x", "data": {"images": "x", "size": 64}, "tokenizer": {"model": model}})
    net = make_tokenizer(config.tokenizer.model, 3, 32)
    module = tokenizer_objective.Objective(net, ReconstructionLoss(config.tokenizer.loss, 1.0)).train()
    batch = {"image": torch.zeros(8, 3, 64, 64, dtype=torch.uint8), "slot": torch.arange(8), "position": torch.arange(8)}
    predicted = next(cost.trainings(config)).activations(8)
    assert 0.8 < predicted / measured(module, batch) < 1.02


def test_the_critic_of_polish_counts():
    """It trains, and takes operations and memory. Models of one plan share it, so each count is made twice."""
    with_critic, without = (
        {training.name: training for training in cost.trainings(load_experiment("configs/ham10000-cpu.yaml", overrides))}
        for overrides in (["data.images=x"], ["data.images=x", "polish.loss.adversarial=0"])
    )
    for training in with_critic.values():
        assert sum(training.parameters) == sum(number for name, number in training.parts.items() if name != "buffers")
    polish = with_critic["polish"]
    assert (
        polish.parts.keys() == {"decoder", "texture", "label_vectors", "critic", "buffers"}
        and "critic" not in without["polish"].parts
    )
    assert polish.flops > 1.2 * without["polish"].flops and polish.activations(2) > without["polish"].activations(2)
    found = polish.flops, polish.activations(2)
    del polish.__dict__["flops"]
    assert (polish.flops, polish.activations(2)) == found


def test_a_storage_counts_once_and_until_it_is_freed():
    def step():
        layer = torch.nn.Linear(100, 100, bias=False)

        class Twice(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = layer

            def forward(self, x):
                y = self.layer(x).view(10, 10, 100).transpose(0, 1)
                return {"loss": y.sum()}

        return Twice(), torch.zeros(100, 100)

    # The product and the gradients have 40,000 bytes each. At most two of them exist at once.
    assert 40_000 < peak_activations(step) < 90_000


@pytest.mark.parametrize("name", ["gpt", "gpt checkpointed"])
def test_operations_of_a_gpt_follow_the_formula(name):
    """Per token: 6 operations for each weight of a matrix product, and 12 · layers · tokens · width for attention."""
    config, tokens = PRIORS[name], 1024
    net = priors.make(config, **shape(32, upper=False))
    weights = sum(p.numel() for n, p in net.named_parameters() if not n.startswith(("tokens", "facts")))
    expected = 6 * weights * tokens + 12 * config.layers * tokens * config.width * tokens
    assert objective.training_flops_per_sample(config, shape(32, upper=False)) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("name", ["pixelcnn", "gated_pixelcnn", "pixelsnail"])
def test_operations_of_convolutions_are_counted(name):
    found = [objective.training_flops_per_sample(PRIORS[name], shape(side)) for side in (8, 16)]
    weights = sum(p.numel() for p in priors.make(PRIORS[name], **shape(16)).parameters())
    assert found[0] > 6 * 64 * 0.3 * weights
    assert 3.5 < found[1] / found[0] < 17


def test_mfu_is_of_the_peak_of_all_devices(monkeypatch):
    task = SimpleNamespace(tokens_per_sample=64, flops_per_sample=10**12)
    cpu = flops.throughput(task, 5.0, 2, torch.device("cpu"))
    assert cpu == {"tokens_per_second": 320, "model_flops_per_second": 5e12}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    assert flops.throughput(task, 5.0, 2, torch.device("cuda"))["mfu"] == pytest.approx(5e12 / 2 / 312e12)
    names = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H200": 989e12, "NVIDIA L40S": 362e12}
    names |= {"NVIDIA L4": 121e12, "NVIDIA GH200 480GB": 989e12, "NVIDIA A10G": None, "Tesla T4": None, "NVIDIA H20": 148e12}
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert flops.peak_flops(torch.device("cuda")) == peak, name
    assert flops.throughput(SimpleNamespace(), 5.0, 2, torch.device("cuda")) == {}


def test_the_table_of_sizes_is_true():
    """docs/priors.md: layers, heads, width and parameters of the top and the bottom level."""
    text = (Path(__file__).parents[2] / "docs" / "priors.md").read_text()
    rows = re.findall(r"^\| (\d+) ([MB]) \|(.*)\|$", text, re.MULTILINE)
    assert len(rows) == 9
    for number, unit, rest in rows:
        layers, heads, width, top, bottom = (int(cell.replace(",", "")) for cell in rest.split("|")[:5])
        config = GPTConfig(layers=layers, heads=heads, width=width)
        assert number_of_parameters(config, shape(32, upper=False)) == top
        assert number_of_parameters(config, shape(64)) == bottom
        assert top == pytest.approx(int(number) * {"M": 1e6, "B": 1e9}[unit], rel=0.2)


def plan(machine: str, *overrides: str) -> str:
    """Returns what `lesiongen plan` prints for a GPT of 100 M parameters on a machine."""
    model = "{layers: 8, width: 1024, heads: 16}"
    given = [f"hardware={machine}", f"priors.top.model={model}", f"priors.bottom.model={model}", *overrides]
    return format_cost(load_experiment(str(Path(__file__).parents[2] / "configs" / "demo.yaml"), given), images=10_000)


def test_a_plan_says_that_it_fits_and_for_how_long():
    text = plan("{gpus: 4, gpu: H100, host_gb: 500}")
    assert "it fits" in text and "hours at 35% of the peak speed" in text and "4 H100 of 80 GB" in text
    row = next(line for line in text.splitlines() if line.startswith("  prior-top") and "GB," in line).split()
    assert row[1:4] == ["18,000", "1.8", "563"]
    flops, hours = float(row[4]), float(row[5])
    assert hours == pytest.approx(flops / (4 * 989e12 * 0.35) / 3600, abs=0.006)


@pytest.mark.parametrize(
    ("machine", "overrides", "advised"),
    [
        ("{gpus: 8, gpu_gb: 1.9, host_gb: 500}", (), ("priors.top.train.engine.zero=",)),
        ("{gpus: 1, gpu_gb: 3.0, host_gb: 500}", (), ("priors.top.train.engine.accumulation=",)),
        ("{gpus: 1, gpu_gb: 0.1, host_gb: 500}", (), ("use a smaller model",)),
        ("{gpus: 8, gpu: H100, host_gb: 20}", (), ("of main memory of a node", "use a smaller model")),
    ],
)
def test_a_plan_that_does_not_fit_says_what_to_change(machine, overrides, advised):
    text = plan(machine, *overrides)
    line = next(line for line in text.splitlines() if line.startswith("prior-top DOES NOT FIT"))
    assert all(part in line for part in advised), line
    if "set " in line:
        changes = line.split("set ")[1].split()
        assert "prior-top DOES NOT FIT" not in plan(machine, *overrides, *changes)


def test_an_unknown_gpu_needs_its_memory():
    with pytest.raises(UserError, match="nothing is known of the GPU 'X1'; set gpu_gb, or gpu to one of GH200"):
        plan("{gpus: 1, gpu: X1}")
    assert "of 30 GB" in plan("{gpus: 1, gpu: X1, gpu_gb: 30}")


def test_ranks_on_the_cpu_share_the_main_memory():
    text = plan("{host_gb: 100}", "local.ranks=2")
    assert "2 ranks on the CPU" in text and "it fits" in text
    assert "DOES NOT FIT" in plan("{host_gb: 4}", "local.ranks=2")


def test_the_time_that_is_left_follows_the_speeds_that_were_measured(tmp_path):
    """A training's own speed counts; before it has one, that of the others in operations per second."""
    config = load_experiment("configs/demo.yaml", [f"runs={tmp_path}", "data.images=x"])
    tokenizer, top, bottom = cost.trainings(config)
    time, later = TrainingTime(config), ["codes", "prior-top", "prior-bottom", "samples"]
    assert time.left(["shards", "tokenizer", *later]) is None

    log = MetricsLog(config.directory / "tokenizer")
    for step, speed in enumerate((1.0, 50.0, 50.0), 1):  # the first steps are slow
        log.log(step, 100 * step, {"images_per_second": speed})
    assert time.left(["tokenizer"]) == pytest.approx((tokenizer.train.samples - 300) / 50)
    of_priors = sum(training.train.samples * training.flops for training in (top, bottom))
    assert time.left(later) == pytest.approx(of_priors / (50 * tokenizer.flops))

    MetricsLog(config.directory / "prior-top").log(1, top.train.samples, {"images_per_second": 7.0})
    speed = (50 * tokenizer.flops + 7 * top.flops) / 2
    assert time.left(later) == pytest.approx(bottom.train.samples * bottom.flops / speed)
    assert time.left(["prior-top"]) == 0
    assert time.left(["shards", "samples"]) is None


def test_without_the_files_of_a_loss_no_time_is_said(tmp_path):
    config = load_experiment(
        "configs/demo.yaml", [f"runs={tmp_path}", "data.images=x", "tokenizer.loss={lpips: 0.1, lpips_weights: /nowhere}"]
    )
    MetricsLog(config.directory / "tokenizer").log(1, 100, {"images_per_second": 5.0})
    assert TrainingTime(config).left(["tokenizer"]) is None
