"""Images as PNG data URIs."""

import base64
import io

from PIL import Image
from torch import Tensor

GENERATED = 768
THUMBNAIL = 128
"""Longest sides, in pixels, that a page holds."""


def png_uri(image: Tensor, longest: int) -> str:
    """An image, float [3, H, W] in [0, 1] or uint8 [H, W, 3], as a data URI; scaled down if a side
    is longer than ``longest``."""
    if image.is_floating_point():
        image = (
            image.detach().cpu().nan_to_num().clamp(0, 1).mul(255).round().byte().permute(1, 2, 0)
        )
    picture = Image.fromarray(image.contiguous().numpy())
    picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def generated_uri(image: Tensor | None) -> str | None:
    """The generated image [3, H, W], or None where there is none."""
    return None if image is None else png_uri(image, GENERATED)


class Thumbnails:
    """Thumbnails uint8 [N, h, w, 3] as data URIs, equal ones once."""

    def __init__(self, images: Tensor | None) -> None:
        self._images = images
        self.uris: list[str] = []
        self._index_of_uri: dict[str, int] = {}
        self._index_of_sample: dict[int, int] = {}

    @property
    def missing(self) -> bool:
        """Whether the store has none."""
        return self._images is None

    def uri(self, sample: int) -> str | None:
        """The thumbnail of the sample at a position in the data set."""
        index = self.index(sample)
        return None if index is None else self.uris[index]

    def index(self, sample: int) -> int | None:
        """Where in ``uris`` the thumbnail of a sample is."""
        if self._images is None:
            return None
        if sample not in self._index_of_sample:
            uri = png_uri(self._images[sample], THUMBNAIL)
            if uri not in self._index_of_uri:
                self._index_of_uri[uri] = len(self.uris)
                self.uris.append(uri)
            self._index_of_sample[sample] = self._index_of_uri[uri]
        return self._index_of_sample[sample]
