"""Whether an encoder does worse than another on a run's held-out images.

They are compared image by image: what both get right or both get wrong says nothing of which
is better.

Source: McNemar, Psychometrika 12, 1947 (doi 10.1007/BF02295996).

Shapes: Q held-out images.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

STANDARD_ERRORS = 2
"""By which accuracies must differ: chance does so in about one of 40 pairs of equal encoders."""


def is_worse(hits_Q: NDArray[np.bool_], reference_Q: NDArray[np.bool_]) -> bool:
    """Say whether an encoder gets fewer images right than another, by more than chance explains.

    Of d images that one of them alone gets right, either has d / 2 by chance, and the difference
    a standard error of sqrt(d).
    """
    lost, gained = int((reference_Q & ~hits_Q).sum()), int((hits_Q & ~reference_Q).sum())
    return bool(lost - gained > STANDARD_ERRORS * (lost + gained) ** 0.5)
