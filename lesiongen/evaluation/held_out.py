"""Metrics and pictures of a tokenizer on a held-out split.

The tokenizer and polish stages measure on the validation split, the evaluate stage on the test split. The images are divided
among the ranks, and all ranks get the same metrics.

Shapes: B images, C channels, H × W pixels or codes, K codes.
"""

from collections.abc import Callable

import torch

from hpc import dist, watchdog
from hpc.run.metrics_log import metric_name
from lesiongen.data import images
from lesiongen.data.images import to_float, to_uint8, to_unit
from lesiongen.data.similarity import psnr, ssim
from lesiongen.data.stream import ImageShards
from lesiongen.evaluation import figures
from lesiongen.evaluation.codes import usage_and_perplexity
from lesiongen.tokenizers.quantizer import Quantized
from lesiongen.tokenizers.tokenizer import Tokenizer

PERTURBED_IMAGES = 256  # images of each rank that are also decoded from partly wrong codes
COLLAPSED = 0.02  # a level has collapsed if its perplexity is below this share of its codes, or below 2
SHOWN = 8  # images in the pictures


@torch.no_grad()
def evaluate_tokenizer(
    net: Tokenizer,
    data: ImageShards,
    batch_size: int,
    loss: Callable[[torch.Tensor, dict[str, Quantized], torch.Tensor], torch.Tensor] | None = None,
) -> tuple[dict[str, float], dict[str, bytes]]:
    """Measures a tokenizer on a split. Collective.

    Args:
        net: The tokenizer, in evaluation mode.
        data: The split.
        batch_size: Images that are reconstructed at once.
        loss: A loss whose mean over the images is to be measured, too. Arguments: images [B, C, H, W] in [-1, 1], what the
            tokenizer makes of them, {level: Quantized}, and their label numbers for the decoder [B].

    Returns:
        The metrics: loss (if asked for), psnr (dB), ssim, mse (for pixels in [-1, 1]), nmse (mse over the variance of the
        training pixels), psnr_lost_to_wrong_codes (dB), and for each level collapsed/<level> (0 or 1), usage and perplexity:
        over all images (usage/<level>) and for each class (usage/<level>/<class>).
        The pictures, name → PNG. A rank without images returns no pictures.
    """
    device = next(net.parameters()).device
    numbers = net.label_numbers([*data.classes, ""])  # label -1 is the last
    totals = _Totals(len(net.names), len(data.classes), net.entries)
    shown: tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]] | None = None
    for batch in data.held_out(batch_size):
        x = to_float(batch["image"].to(device))
        label_B = numbers[batch["label"]].to(device)
        y, levels = net(x, label_B=label_B)
        psnr_B = totals.add_images(x, y)
        if loss is not None:
            totals.loss[0] += float(loss(x, levels, label_B)) * len(x)
            totals.loss[1] += len(x)
        watchdog.beat()
        totals.add_codes(batch["label"], [levels[name] for name in net.names])
        if totals.perturbed[1] < PERTURBED_IMAGES:
            wrong = {name: perturbed(q.codes, net.entries, batch["ordinal"]) for name, q in levels.items()}
            totals.add_perturbed(psnr_B - psnr(to_unit(net.decode_codes(wrong, label_B)), to_unit(x)))
        if shown is None:
            codes = {name: q.codes[:SHOWN].cpu() for name, q in levels.items()}
            shown = batch["image"][:SHOWN], to_uint8(y[:SHOWN]).cpu(), codes
    totals.reduce(device)
    metrics = totals.image_metrics(data.packed.moments["data_variance"]) | totals.code_metrics(net.names, data.classes)
    if shown is None:
        return metrics, {}
    counts = {name: by_class.sum(0) for name, by_class in zip(net.names, totals.counts, strict=True)}
    codebooks = {name: (net.codebook(name).cpu(), counts[name]) for name in reversed(net.names)}
    return metrics, {
        "reconstructions": images.encode_png(figures.pairs(shown[0], shown[1], len(shown[0]))),
        "codes": images.encode_png(figures.with_maps(*shown, net.entries)),
        "codebook": figures.codebooks(codebooks),
    }


class _Totals:
    """Sums over the images of this rank; after reduce(), over the images of all ranks.

    Attributes:
        quality: PSNR, SSIM, squared error and images, [4].
        loss: The sum of the loss, and the images it was measured on, [2].
        perturbed: PSNR lost to wrong codes, and the images it was measured on, [2].
        counts: How often each code occurs in images of each class, [levels, classes + 1, K]. The last row of each level counts
            unlabelled images.
    """

    def __init__(self, levels: int, classes: int, entries: int):
        self.quality = torch.zeros(4, dtype=torch.float64)
        self.loss = torch.zeros(2, dtype=torch.float64)
        self.perturbed = torch.zeros(2, dtype=torch.float64)
        self.counts = torch.zeros(levels, classes + 1, entries, dtype=torch.float64)

    def add_images(self, x_BCHW: torch.Tensor, y_BCHW: torch.Tensor) -> torch.Tensor:
        """Adds images x and their reconstructions y. Returns the PSNR of each image, [B]."""
        psnr_B, ssim_B = psnr(to_unit(y_BCHW), to_unit(x_BCHW)), ssim(to_unit(y_BCHW), to_unit(x_BCHW))
        mse_B = (y_BCHW - x_BCHW).square().flatten(1).mean(1)
        sums = [float(values.double().sum()) for values in (psnr_B, ssim_B, mse_B)]
        self.quality += torch.tensor([*sums, len(x_BCHW)])
        return psnr_B

    def add_codes(self, label_B: torch.Tensor, levels: list[Quantized]) -> None:
        """Adds the codes of each level. Label -1 stands for unlabelled images."""
        _, classes, entries = self.counts.shape
        for counts, quantized in zip(self.counts, levels, strict=True):
            cells = (label_B % classes)[:, None] * entries + quantized.codes.flatten(1).cpu()
            counts += torch.bincount(cells.flatten(), minlength=counts.numel()).view_as(counts)

    def add_perturbed(self, lost_B: torch.Tensor) -> None:
        """Adds the PSNR that images have lost to wrong codes."""
        self.perturbed += torch.tensor([float(lost_B.double().sum()), len(lost_B)])

    def reduce(self, device: torch.device) -> None:
        """Adds the sums of all ranks. Collective."""
        parts = [self.quality, self.loss, self.perturbed, self.counts.flatten()]
        reduced = dist.all_reduce_sum(torch.cat(parts).to(device)).cpu()
        self.quality, self.loss, self.perturbed, counts = reduced.split([part.numel() for part in parts])
        self.counts = counts.view_as(self.counts)

    def image_metrics(self, variance: float) -> dict[str, float]:
        """Returns the means over all images. `variance` is the variance of the training pixels in [0, 1]."""
        (psnr_sum, ssim_sum, mse_sum, number), (lost, perturbed_number) = self.quality.tolist(), self.perturbed.tolist()
        metrics = {"psnr": psnr_sum / number, "ssim": ssim_sum / number, "mse": mse_sum / number}
        metrics["nmse"] = metrics["mse"] / 4 / variance  # pixels in [-1, 1] have 4 times the squared error
        if self.loss[1]:
            metrics["loss"] = float(self.loss[0] / self.loss[1])
        metrics["psnr_lost_to_wrong_codes"] = lost / max(1, perturbed_number)
        return metrics

    def code_metrics(self, names: tuple[str, ...], classes: list[str]) -> dict[str, float]:
        """Returns usage and perplexity of each level, over all images and for each class, and whether it has collapsed."""
        metrics: dict[str, float] = {}
        for name, by_class in zip(names, self.counts, strict=True):
            entries = by_class.shape[1]
            metrics[f"usage/{name}"], metrics[f"perplexity/{name}"] = usage_and_perplexity(by_class.sum(0))
            metrics[f"collapsed/{name}"] = float(metrics[f"perplexity/{name}"] < max(COLLAPSED * entries, min(2, entries / 4)))
            for label, counts in zip(classes, by_class, strict=False):
                if counts.sum():
                    key = f"{name}/{metric_name(label)}"
                    metrics[f"usage/{key}"], metrics[f"perplexity/{key}"] = usage_and_perplexity(counts)
        return metrics


def perturbed(codes_BHW: torch.Tensor, entries: int, seed_B: torch.Tensor, share: float = 0.05) -> torch.Tensor:
    """Replaces a share of the codes by random codes.

    Args:
        codes_BHW: The codes.
        entries: Number of codes, K.
        seed_B: Ordinal of each image. The first ordinal is the seed, so that a batch gets the same errors at each evaluation.
        share: Share of the codes that are replaced.

    Returns:
        The codes with errors, [B, H, W].
    """
    rng = torch.Generator().manual_seed(int(seed_B[0]))
    other = torch.randint(entries, codes_BHW.shape, generator=rng)
    wrong = torch.rand(codes_BHW.shape, generator=rng) < share
    return torch.where(wrong.to(codes_BHW.device), other.to(codes_BHW.device), codes_BHW)
