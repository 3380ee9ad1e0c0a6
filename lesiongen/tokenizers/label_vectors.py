"""Label vectors: what a polished decoder knows of an image besides its codes.

Codes do not say all of a diagnosis. A decoder of codes alone draws what images with such codes look like, and most of these
show a common class, so samples of a rare class get the texture of a common one. The priors know the label of each sample.
Label vectors pass it on to the decoder: one vector for each label is added to every cell of the decoder's input. Another one
stands for images whose label is not known; in training a tenth of the labels are left out to teach it.
"""

from collections.abc import Sequence

import torch
from torch import nn

# The vectors are the weights times this number, so that they learn faster than other weights. Without it they were a thirtieth
# as long as codebook vectors after 2,000 steps, and had hardly any effect on the images.
SCALE = 32.0


class LabelVectors(nn.Module):
    """A vector for each label, and one for no label. They are 0 before they are trained.

    Attributes:
        classes: The labels; their order is that of the label numbers.
    """

    def __init__(self, classes: Sequence[str], size: int):
        """Makes the vectors.

        Args:
            classes: The labels.
            size: Length of the vectors: channels of the decoder's input.
        """
        super().__init__()
        self.classes = tuple(classes)
        self.table = nn.Embedding(len(classes) + 1, size)
        nn.init.zeros_(self.table.weight)

    def numbers(self, labels: Sequence[str]) -> torch.Tensor:
        """Returns the label numbers, int64 [N]; -1 for a label that is not among the classes."""
        number_of = {name: number for number, name in enumerate(self.classes)}
        return torch.tensor([number_of.get(label, -1) for label in labels], dtype=torch.int64)

    def forward(self, label_B: torch.Tensor) -> torch.Tensor:
        """Returns the vectors of label numbers, [B, D, 1, 1]. -1 stands for no label."""
        return SCALE * self.table(torch.where(label_B < 0, len(self.classes), label_B))[:, :, None, None]
