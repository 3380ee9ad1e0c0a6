"""Finds the nearest training view of each image, by pixels, by features and by codes.

- "pixels": root mean square difference of the thumbnails at 32 × 32 px, for pixels in [0, 1], the smallest over the 8
  symmetries of the square.
- "features": Euclidean distance of the backbone's features.
- "codes <level>": share of the level's codes that differ (Hamming distance).

The search reads one file of views after the other. Matrix products find the nearest view of a file. Its distance is then
computed again exactly, because the products round too coarsely to tell a copy from an image that is only similar. Of equal
distances the view that comes first counts. So the result is the same for any number of ranks.

Shapes: N queries, S views, C channels, D features, T codes of a level.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from hpc import dist
from hpc.dist import Topology
from hpc.run.progress import progress_bar
from lesiongen.data.augment import dihedral
from lesiongen.evaluation.privacy.views import SIDE, Described, TrainingViews

QUERIES, VIEWS = 1024, 512  # queries and views that are compared at once
TOKENS = 255  # codes whose matches one byte can count
SLACK = 1000.0  # more than the rounding errors of the products, as a sum of squared grey levels


@dataclass
class Nearest:
    """The nearest training view of each query by one kind of distance.

    Attributes:
        distance: Distance to the view, float64 [N]; infinite if no view was searched.
        row: (draw, shard, ordinal) of the view in the code store's training split, int64 [N, 3].
        form: For pixels, the symmetry (see augment.dihedral) that brings the view nearest to the query; otherwise 0. int64 [N].
        unseen: Distance to the nearest image that the priors have not seen, float64 [N]; None if it was not asked for.
    """

    distance: np.ndarray
    row: np.ndarray
    form: np.ndarray
    unseen: np.ndarray | None = None

    @property
    def closeness(self) -> np.ndarray:
        """Distance to the nearest training view, relative to that to the nearest unseen image, [N].

        An image that equals both (a common grid of codes) has 1.
        """
        unseen = np.ones_like(self.distance) if self.unseen is None else self.unseen
        both = (unseen == 0) & (self.distance == 0)
        return np.where(both, 1.0, self.distance / np.maximum(unseen, 1e-12))

    @classmethod
    def empty(cls, number: int) -> "Nearest":
        """Returns the state before any view is searched."""
        return cls(np.full(number, np.inf), np.full((number, 3), -1, np.int64), np.zeros(number, np.int64))

    def update(self, queries: np.ndarray, distance: np.ndarray, row: np.ndarray, form: np.ndarray | int = 0) -> None:
        """Replaces the views of those queries that have come nearer.

        Args:
            queries: Indices of the queries, [n].
            distance: Their new distances, [n].
            row: Rows of the new views, [n, 3].
            form: Symmetries of the new views, [n].
        """
        nearer = distance < self.distance[queries]
        chosen = queries[nearer]
        self.distance[chosen], self.row[chosen] = distance[nearer], row[nearer]
        self.form[chosen] = np.broadcast_to(form, nearer.shape)[nearer]

    def select(self, members: slice | np.ndarray) -> "Nearest":
        """Returns the results of some of the queries."""
        unseen = None if self.unseen is None else self.unseen[members]
        return Nearest(self.distance[members], self.row[members], self.form[members], unseen)


def nearest_views(
    views: TrainingViews, queries: Described, topology: Topology | None = None, unseen: Described | None = None
) -> dict[str, Nearest]:
    """Finds the nearest training view of each query, by each kind of distance.

    Args:
        views: The training views.
        queries: The images to compare with them; with several ranks, the same on every rank.
        topology: None: this process searches all files. Otherwise the files are divided among the ranks, and the function is
            collective.
        unseen: Images that the priors have not seen, to compare the queries with too.

    Returns:
        {kind: the nearest views}, the same on every rank.
    """
    topology = topology or Topology()
    found = {kind: Nearest.empty(len(queries)) for kind in views.kinds}
    files = range(len(views.files))[topology.rank :: topology.world_size]
    device = views.backbone.device if views.backbone else topology.device
    pixels = _PixelQueries(queries.pixels, device)
    total = sum(views.store.entry("train", *views.files[i])["count"] for i in files)
    with progress_bar(total, "nearest views", shown=topology.leader) as progress:
        for i in files:
            _search(found, queries, pixels, views.part(i), views.files[i], device, progress)
    found = found if topology.world_size == 1 else _combined(dist.gather(found))
    if unseen is not None:
        others = {kind: Nearest.empty(len(queries)) for kind in views.kinds}
        _search(others, queries, pixels, unseen, (0, 0), device, None)
        for kind, other in others.items():
            found[kind].unseen = other.distance
    return found


def _search(
    found: dict[str, Nearest],
    queries: Described,
    pixels: "_PixelQueries",
    images: Described,
    file: tuple[int, int],
    device: torch.device,
    progress: tqdm | None,
) -> None:
    """Compares the queries with the images of one file by all kinds of distance, and updates `found`."""
    _search_codes(found, queries, images, file)
    if "features" in found:
        _search_features(found["features"], queries.features, images.features, file, device)
    pixels.search(found["pixels"], images.pixels, file, progress)


def _combined(parts: list[dict[str, Nearest]]) -> dict[str, Nearest]:
    """Returns the nearest views among those that the ranks have found; of equal distances the first row."""
    combined = {}
    for kind in parts[0]:
        distance, row, form = (np.stack([getattr(part[kind], name) for part in parts]) for name in ("distance", "row", "form"))
        order = np.lexsort((row[..., 2], row[..., 1], row[..., 0], distance), axis=0)[0]
        column = np.arange(distance.shape[1])
        combined[kind] = Nearest(distance[order, column], row[order, column], form[order, column])
    return combined


def _rows(file: tuple[int, int], ordinals: np.ndarray) -> np.ndarray:
    """Returns (draw, shard, ordinal) of the views of one file, [n, 3]."""
    return np.stack([np.full_like(ordinals, file[0]), np.full_like(ordinals, file[1]), ordinals], 1)


def _blocks(number: int, size: int) -> Iterator[slice]:
    return (slice(first, min(first + size, number)) for first in range(0, number, size))


class _PixelQueries:
    """Thumbnails of the queries, prepared for the search by pixels.

    A flip changes only the sign of an image's odd parts. So an image is split into four parts, even or odd in each direction.
    The products of the parts of two images, added with four patterns of signs, are the products of one image with the four
    flipped forms of the other. One set of products thus serves four symmetries. The other four symmetries are those of the
    transposed image.
    """

    def __init__(self, pixels_NCHW: np.ndarray, device: torch.device):
        self.pixels, self.device = pixels_NCHW, device
        self.parts = [(rows, _parities(self._centred(pixels_NCHW[rows]))) for rows in _blocks(len(pixels_NCHW), QUERIES)]
        self.norms = np.concatenate([parts.square().sum((0, 2)).cpu().numpy() for _, parts in self.parts] or [np.empty(0)])

    def _centred(self, pixels_NCHW: np.ndarray) -> torch.Tensor:
        # Whole grey levels around 0: their parts have at most 10 bits, so TF32 products, which a GPU uses, do not round them.
        return torch.from_numpy(pixels_NCHW).to(self.device).float() - 128

    def search(self, found: Nearest, pixels_SCHW: np.ndarray, file: tuple[int, int], progress: tqdm | None) -> None:
        """Compares the queries with the thumbnails of one file, and updates `found`."""
        for block in _blocks(len(pixels_SCHW), VIEWS):
            views = self._centred(pixels_SCHW[block])
            forms = [_parities(views), _parities(views.transpose(-2, -1))]
            norms = forms[0].square().sum((0, 2))
            for rows, query in self.parts:
                least, view = (norms - 2 * self._products(query, forms)).min(1)
                squared = least.cpu().numpy() + self.norms[rows]
                best = (found.distance[rows] * 255) ** 2 * pixels_SCHW[0].size
                maybe = np.flatnonzero(squared < best + SLACK)
                if len(maybe):
                    ordinals = view.cpu().numpy()[maybe] + block.start
                    distance, form = _exact(self.pixels[rows][maybe], pixels_SCHW[ordinals])
                    found.update(maybe + rows.start, distance, _rows(file, ordinals), form)
            if progress is not None:
                progress.update(len(views))

    def _products(self, query_4Nd: torch.Tensor, forms: list[torch.Tensor]) -> torch.Tensor:
        """Returns the largest product of each query with the 8 symmetries of each view, [N, S]."""
        largest = []
        for view_4Sd in forms:
            even, left, top, both = torch.bmm(query_4Nd, view_4Sd.transpose(1, 2))
            # The largest of even ± left ± top ± both with the four patterns of signs in _parities.
            largest += [even + left + (top + both).abs_(), even - left + (top - both).abs_()]
        return torch.stack(largest).amax(0)


def _parities(x_NCHW: torch.Tensor) -> torch.Tensor:
    """Splits images into parts that are even or odd from left to right and from top to bottom, [4, N, C·H·W / 4]."""
    half = SIDE // 2
    corners = [x_NCHW.flip(dims)[..., :half, :half].flatten(1) for dims in ([], [-1], [-2], [-2, -1])]
    plain, left, top, both = corners
    signs = ((1, 1, 1), (-1, 1, -1), (1, -1, -1), (-1, -1, 1))
    return torch.stack([plain + a * left + b * top + c * both for a, b, c in signs]) / 2


def _exact(queries_nCHW: np.ndarray, views_nCHW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the distance of each query to its view, over the 8 symmetries, and the symmetry with the least distance."""
    query, view = (torch.from_numpy(x).int() for x in (queries_nCHW, views_nCHW))
    squares = torch.stack([(query - dihedral(view, form)).square().flatten(1).sum(1) for form in range(8)])
    form = squares.argmin(0)
    least = squares.gather(0, form[None])[0].double() / queries_nCHW[0].size
    return (least.sqrt() / 255).numpy(), form.numpy()


def _search_features(
    found: Nearest, queries_ND: np.ndarray, views_SD: np.ndarray, file: tuple[int, int], device: torch.device
) -> None:
    """Compares features of the queries with those of one file, and updates `found`."""
    for block in _blocks(len(views_SD), VIEWS * 8):
        views = torch.from_numpy(views_SD[block]).to(device).float()
        for rows in _blocks(len(queries_ND), QUERIES):
            query = torch.from_numpy(queries_ND[rows]).to(device).float()
            norms = query.square().sum(1)
            least, view = torch.addmm(views.square().sum(1), query, views.T, alpha=-2).min(1)
            # The error of the product grows with the norms.
            slack = (1e-5 * norms).cpu().numpy()
            maybe = np.flatnonzero((least + norms).cpu().numpy() < found.distance[rows] ** 2 + slack)
            ordinals = view.cpu().numpy()[maybe] + block.start
            gap = queries_ND[rows][maybe].astype(np.float64) - views_SD[ordinals].astype(np.float64)
            found.update(maybe + rows.start, np.sqrt(np.square(gap).sum(1)), _rows(file, ordinals))


def _search_codes(found: dict[str, Nearest], queries: Described, views: Described, file: tuple[int, int]) -> None:
    """Compares codes of the queries with those of one file, level by level, and updates `found`."""
    for level, codes in views.codes.items():
        views_TS = np.ascontiguousarray(codes.reshape(len(codes), -1).T)
        codes_NT = queries.codes[level].reshape(len(queries), -1).astype(codes.dtype, copy=False)
        for rows in _blocks(len(queries), 128):
            matches = _matches(np.ascontiguousarray(codes_NT[rows].T)[..., None], views_TS)
            ordinals = matches.argmax(1)  # the first of equal ones
            distance = 1 - matches[np.arange(len(ordinals)), ordinals] / len(views_TS)
            found[f"codes {level}"].update(np.arange(rows.start, rows.stop), distance, _rows(file, ordinals))


def _matches(queries_TN1: np.ndarray, views_TS: np.ndarray) -> np.ndarray:
    """Counts the equal codes of each query and view, [N, S]."""
    shape = queries_TN1.shape[1], views_TS.shape[1]
    total, equal = np.zeros(shape, np.int32), np.empty(shape, bool)
    for part in _blocks(len(views_TS), TOKENS):
        count = np.zeros(shape, np.uint8)
        for query_N1, view_S in zip(queries_TN1[part], views_TS[part], strict=True):
            np.equal(query_N1, view_S, out=equal)
            np.add(count, equal.view(np.uint8), out=count)
        total += count
    return total
