"""What only a GPU can show. Run with LESIONGEN_TEST_GPU=1; `python -m benchmarks.gpu` does."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from hpc.train.layer_streaming import stream_layers
from lesiongen.priors import make
from lesiongen.priors.gpt import GPTConfig
from lesiongen.priors.objective import Objective, blank_batch
from lesiongen.priors.sampling import TokenChooser, uniform_numbers
from lesiongen.tokenizers import make as make_tokenizer
from lesiongen.tokenizers.losses import LossConfig, ReconstructionLoss
from lesiongen.tokenizers.objective import Objective as TokenizerObjective
from lesiongen.tokenizers.vqvae2 import VQVAE2Config
from tests.dist import sharding_cases

pytestmark = pytest.mark.gpu
SHAPE = {"grid": (16, 16), "entries": 64, "facts": {"label": 7}, "upper": ((64, (8, 8)),)}


def small_gpt() -> torch.nn.Module:
    torch.manual_seed(0)
    return make(GPTConfig(layers=2, width=128, heads=2, dropout=0.0), **SHAPE)


def test_attention_takes_the_flash_kernel_in_bf16():
    """Inside sdpa_kernel, attention raises if the kernel cannot run: training gives no mask, so the causal path is taken."""
    net = Objective(small_gpt().cuda())
    with torch.device("cuda"):
        batch = blank_batch(SHAPE, 2)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), torch.autocast("cuda", torch.bfloat16):
        net(batch)["loss"].backward()


@pytest.mark.parametrize("quantizer", ["ema", "cosine", "gradient", "fsq"])
def test_a_step_of_ours_does_not_wait_for_the_device(quantizer):
    """Forward, backward and the codebook's update; torch raises at the first operation that makes the host wait."""
    config = VQVAE2Config(
        hidden=32,
        residual_hidden=16,
        dim=16,
        entries=64,
        quantizer=quantizer,
        fsq_levels=(4, 4, 4) if quantizer == "fsq" else (8, 8, 8),
    )
    module = TokenizerObjective(make_tokenizer(config, 3, 4), ReconstructionLoss(LossConfig(ssim=0.1), 0.05)).cuda()
    image = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8, device="cuda")
    batch = {"image": image, "slot": torch.arange(4, device="cuda"), "position": torch.arange(4, device="cuda")}
    for mode in ("default", "error"):  # the first step allocates and chooses kernels
        torch.cuda.set_sync_debug_mode(mode)
        try:
            out = module(batch)
            out["loss"].backward()
            module.net.update(out["statistics"])
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_held_out_loss_is_that_of_the_export(pools, zero, precision):
    found = pools(1).run(sharding_cases.trained, "gpt", {"zero": zero, "average": 1.0, "precision": precision})[0]
    assert torch.allclose(torch.tensor(found["bits"]), torch.tensor(found["exported"]), atol=1e-2)
    assert found["losses"][-1] < 10


def test_a_streamed_prior_samples_the_same():
    net = small_gpt().eval()
    facts, upper = torch.zeros(2, 1, dtype=torch.long).cuda(), [torch.zeros(2, 8, 8, dtype=torch.long).cuda()]
    numbers = uniform_numbers(0, range(2), net.grid).cuda()
    streamed = stream_layers(small_gpt().eval(), torch.device("cuda"), 0).sample(facts, upper, numbers, TokenChooser())
    assert torch.equal(streamed, net.cuda().sample(facts, upper, numbers, TokenChooser()))
