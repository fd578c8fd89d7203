"""Pictures that stand in for those of data sets that are not here."""

import numpy as np

SIZE = 24


def picture(male: bool, smiling: bool, glasses: bool, noise: int) -> np.ndarray:
    """A ground in red or blue, a white bar below, a black bar above, and a little noise."""
    image = np.full((SIZE, SIZE, 3), (40, 60, 200) if male else (200, 60, 40), dtype=np.int64)
    if smiling:
        image[-8:] = 255
    if glasses:
        image[:8] = 0
    rng = np.random.default_rng(noise)
    return np.clip(image + rng.integers(-20, 21, image.shape), 0, 255).astype(np.uint8)
