import dataclasses

import numpy as np
import pytest

from benchmarks.fashion_mnist import pooled_plainly, require_twin
from models.bundle import SHIPPED_BUNDLE, read_bundle
from models.errors import BundleError


def test_what_is_pooled_plainly_has_the_weights_of_the_bundle():
    """No run is asked for, so none of other weights can be taken for the bundle's."""
    bundle = read_bundle(SHIPPED_BUNDLE)
    untrained, trained = pooled_plainly(bundle)
    assert untrained.fingerprint == bundle.files["random.onnx"]
    assert trained.fingerprint == bundle.files["encoder.onnx"]
    noise_NHWC = np.random.default_rng(0).integers(0, 256, (4, 28, 28, 1), dtype=np.uint8)
    vectors = [encoder.encode(noise_NHWC) for encoder in (untrained, trained)]
    assert [one.shape for one in vectors] == [(4, 128)] * 2
    assert not np.allclose(*vectors, rtol=0.1)


def test_a_bundle_without_its_untrained_twin_is_refused():
    """Before anything is read."""
    bundle = read_bundle(SHIPPED_BUNDLE)
    alone = dataclasses.replace(bundle, files={"encoder.onnx": bundle.files["encoder.onnx"]})
    with pytest.raises(BundleError, match="expected a bundle with its untrained twin"):
        require_twin(alone)
