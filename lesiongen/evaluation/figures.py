"""Pictures of a tokenizer: pairs of originals and reconstructions, maps of codes, and codebooks in two dimensions.

The functions return uint8 pictures [C, H, W] or PNG bytes. The tokenizer's evaluation and the reconstruct command write them.

Shapes: B images, C channels, H × W pixels or codes, K codes, D dimensions of a code's vector.
"""

import io

import torch

from lesiongen.data import images


def pairs(originals_BCHW: torch.Tensor, reconstructions_BCHW: torch.Tensor, columns: int = 8) -> torch.Tensor:
    """Draws rows of originals, each above the row of their reconstructions.

    Args:
        originals_BCHW: Originals, uint8.
        reconstructions_BCHW: Reconstructions, uint8.
        columns: Images in a row.

    Returns:
        The picture, uint8 [C, H', W'].
    """
    rows = []
    for a, b in zip(originals_BCHW.split(columns), reconstructions_BCHW.split(columns), strict=True):
        blank = torch.full((columns - len(a), *a.shape[1:]), 255, dtype=torch.uint8)
        rows += [a, blank, b, blank]
    return images.tile_images(torch.cat(rows), columns)


def code_maps(codes_BHW: torch.Tensor, entries: int, size: int) -> torch.Tensor:
    """Draws grids of codes as grey pictures, with one shade for each code, as the reports show them.

    Args:
        codes_BHW: The codes.
        entries: Number of codes, K.
        size: Side of a picture, in pixels.

    Returns:
        The pictures, uint8 [B, 1, size, size].
    """
    shades = codes_BHW.float()[:, None] * (255 / max(1, entries - 1))
    return torch.nn.functional.interpolate(shades, size=(size, size), mode="nearest").round().to(torch.uint8)


def with_maps(
    originals_BCHW: torch.Tensor, reconstructions_BCHW: torch.Tensor, maps: dict[str, torch.Tensor], entries: int
) -> torch.Tensor:
    """Draws a column for each image: the original, its codes of each level, and the reconstruction.

    Args:
        originals_BCHW: Originals, uint8.
        reconstructions_BCHW: Reconstructions, uint8.
        maps: The codes [B, h, w] of each level, coarse to fine.
        entries: Number of codes, K.

    Returns:
        The picture, uint8 [C, H', W'].
    """
    size, channels = originals_BCHW.shape[-1], originals_BCHW.shape[1]
    grey = [code_maps(codes, entries, size).expand(-1, channels, -1, -1) for codes in maps.values()]
    return images.tile_images(torch.cat([originals_BCHW, *grey, reconstructions_BCHW]), len(originals_BCHW))


def plane(codebook_KD: torch.Tensor) -> torch.Tensor:
    """Projects a codebook onto its two principal directions, [K, 2]."""
    centred = codebook_KD.double() - codebook_KD.double().mean(0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    # The sign of a principal direction is arbitrary. Fix it, so that the same codebook always gives the same picture.
    directions = directions[:2] * directions[:2].sum(1, keepdim=True).sign()
    return centred @ directions.T


def codebooks(levels: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> bytes:
    """Draws the codebook of each level in its two principal directions. Size and colour of a point show how often it is used.

    Args:
        levels: Codebook [K, D] and counts [K] of each level.

    Returns:
        PNG bytes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(levels), 4.6), layout="constrained")
    panels = figure.subplots(1, len(levels), squeeze=False)[0]
    for axes, (name, (codebook, counts)) in zip(panels, levels.items(), strict=True):
        points, share = plane(codebook), counts.double() / counts.sum().clamp(min=1)
        used = share > 0
        axes.scatter(*points[~used].T, marker="x", color="#d0413b", label=f"never used ({int((~used).sum())})", zorder=3)
        area = 8 + 300 * share[used] / share.max().clamp(min=1e-12)
        scatter = axes.scatter(*points[used].T, s=area, c=share[used].log10(), cmap="viridis", alpha=0.8)
        figure.colorbar(scatter, ax=axes, label="log10 share of use")
        axes.set_title(f"{name}: {int(used.sum())} of {len(counts)} codes used")
        axes.set_xticks([])
        axes.set_yticks([])
        if (~used).any():
            axes.legend(loc="best", fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
