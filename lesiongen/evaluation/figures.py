"""Pictures of what a tokenizer does: pairs, maps of codes, its codebooks in two dimensions. PNG bytes, or uint8 [C, H, W]."""

import io

import torch

from lesiongen.data import images


def pairs(originals_BCHW: torch.Tensor, reconstructions_BCHW: torch.Tensor, columns: int = 8) -> torch.Tensor:
    """Originals above their reconstructions, uint8, `columns` a row."""
    rows = []
    for a, b in zip(originals_BCHW.split(columns), reconstructions_BCHW.split(columns), strict=True):
        blank = torch.full((columns - len(a), *a.shape[1:]), 255, dtype=torch.uint8)
        rows += [a, blank, b, blank]
    return images.grid(torch.cat(rows), columns)


def code_maps(codes_BHW: torch.Tensor, entries: int, size: int) -> torch.Tensor:
    """Grids of codes as grey pictures, uint8 [B, 1, size, size], one shade a code, as the reports show them."""
    shades = codes_BHW.float()[:, None] * (255 / max(1, entries - 1))
    return torch.nn.functional.interpolate(shades, size=(size, size), mode="nearest").round().to(torch.uint8)


def with_maps(originals: torch.Tensor, painted: torch.Tensor, maps: dict[str, torch.Tensor], entries: int) -> torch.Tensor:
    """A column an image: the original, its codes of each level from coarse to fine, the reconstruction."""
    size, channels = originals.shape[-1], originals.shape[1]
    grey = [code_maps(maps[name], entries, size).expand(-1, channels, -1, -1) for name in maps]
    return images.grid(torch.cat([originals, *grey, painted]), len(originals))


def plane(codebook_KD: torch.Tensor) -> torch.Tensor:
    """The codebook's two directions of largest spread, [K, 2]."""
    centred = codebook_KD.double() - codebook_KD.double().mean(0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    # A direction's sign is the solver's whim; pictures are to be the same again.
    directions = directions[:2] * directions[:2].sum(1, keepdim=True).sign()
    return centred @ directions.T


def codebooks(levels: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> bytes:
    """PNG of each level's codebook [K, D] in its two principal directions; the counts [K] give size and colour."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(levels), 4.6), layout="constrained")
    for axes, (name, (codebook, counts)) in zip(figure.subplots(1, len(levels), squeeze=False)[0], levels.items(), strict=True):
        points, share = plane(codebook), counts.double() / counts.sum().clamp(min=1)
        used = share > 0
        axes.scatter(*points[~used].T, marker="x", color="#d0413b", label=f"never used ({int((~used).sum())})", zorder=3)
        area = 8 + 300 * share[used] / share.max().clamp(min=1e-12)
        shown = axes.scatter(*points[used].T, s=area, c=share[used].log10(), cmap="viridis", alpha=0.8)
        figure.colorbar(shown, ax=axes, label="log10 share of use")
        axes.set_title(f"{name}: {int(used.sum())} of {len(counts)} codes used")
        axes.set_xticks([])
        axes.set_yticks([])
        if (~used).any():
            axes.legend(loc="best", fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
