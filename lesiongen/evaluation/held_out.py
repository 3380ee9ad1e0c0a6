"""Figures of a tokenizer on a held-out split, shared by training and by the report."""

import torch

from hpc import dist
from hpc.run.metrics_log import metric_name
from lesiongen.data import images
from lesiongen.data.images import to_float, to_uint8, to_unit
from lesiongen.data.similarity import psnr, ssim
from lesiongen.data.stream import ImageShards
from lesiongen.evaluation import figures
from lesiongen.evaluation.codes import usage_and_perplexity
from lesiongen.tokenizers.tokenizer import Tokenizer

PERTURBED_IMAGES = 256  # of each rank, for the figure of wrong codes
COLLAPSED = 0.02  # a level whose perplexity is below this share of its codes


@torch.no_grad()
def held_out_figures(net: Tokenizer, data: ImageShards, micro: int) -> tuple[dict[str, float], dict[str, bytes]]:
    """mse (on [-1, 1]), nmse, psnr, ssim; usage and perplexity of each level, in all and for each class, over a whole
    split; the PSNR that is lost when codes are wrong; pictures. Collective: each rank takes its share."""
    device, entries, classes = next(net.parameters()).device, net.entries, data.classes
    sums = torch.zeros(6, dtype=torch.float64)
    counts = torch.zeros(len(net.names), len(classes) + 1, entries, dtype=torch.float64)  # the unlabelled are last
    shown: list[torch.Tensor] = []
    for batch in data.held_out(micro):
        x = to_float(batch["image"].to(device))
        y, levels = net(x)
        each = [psnr(to_unit(y), to_unit(x)), ssim(to_unit(y), to_unit(x)), (y - x).square().flatten(1).mean(1)]
        sums[:4] += torch.tensor([float(v.double().sum()) for v in each] + [len(x)])
        for i, name in enumerate(net.names):
            codes = levels[name].codes.flatten(1).cpu()
            where = (batch["label"] % (len(classes) + 1))[:, None] * entries + codes
            counts[i] += torch.bincount(where.flatten(), minlength=counts[i].numel()).view_as(counts[i])
        if sums[5] < PERTURBED_IMAGES:
            broken = net.decode_codes({name: perturbed(q.codes, entries, batch["ordinal"]) for name, q in levels.items()})
            sums[4:] += torch.tensor([float((each[0] - psnr(to_unit(broken), to_unit(x))).double().sum()), len(x)])
        if not shown:
            codes = {name: q.codes[:8].cpu() for name, q in levels.items()}
            shown = [batch["image"][:8], to_uint8(y[:8]).cpu(), codes]
    packed = dist.all_reduce_sum(torch.cat([sums, counts.flatten()]).to(device)).cpu()
    total_psnr, total_ssim, total_mse, number, lost, broken = packed[:6].tolist()
    metrics = {"psnr": total_psnr / number, "ssim": total_ssim / number, "mse": total_mse / number}
    metrics["nmse"] = metrics["mse"] / 4 / data.packed.moments["data_variance"]
    metrics["psnr_lost_to_wrong_codes"] = lost / max(1, broken)
    counts = packed[6:].view_as(counts)
    for name, by_class in zip(net.names, counts, strict=True):
        metrics[f"usage/{name}"], metrics[f"perplexity/{name}"] = usage_and_perplexity(by_class.sum(0))
        metrics[f"collapsed/{name}"] = float(metrics[f"perplexity/{name}"] < max(COLLAPSED * entries, min(2, entries / 4)))
        for label, count in zip(classes, by_class, strict=False):
            if count.sum():
                found = usage_and_perplexity(count)
                own = f"{name}/{metric_name(label)}"
                metrics[f"usage/{own}"], metrics[f"perplexity/{own}"] = found
    if not shown:
        return metrics, {}
    books = {name: (net.codebook(name).cpu(), c.sum(0)) for name, c in reversed(list(zip(net.names, counts, strict=True)))}
    return metrics, {
        "reconstructions": images.png(figures.pairs(shown[0], shown[1], len(shown[0]))),
        "codes": images.png(figures.with_maps(*shown, entries)),
        "codebook": figures.codebooks(books),
    }


def perturbed(codes_BHW: torch.Tensor, entries: int, seed_B: torch.Tensor, share: float = 0.05) -> torch.Tensor:
    """Codes of which a share is replaced by any others, the same ones at each call."""
    rng = torch.Generator().manual_seed(int(seed_B[0]))
    other = torch.randint(entries, codes_BHW.shape, generator=rng)
    wrong = torch.rand(codes_BHW.shape, generator=rng) < share
    return torch.where(wrong.to(codes_BHW.device), other.to(codes_BHW.device), codes_BHW)
