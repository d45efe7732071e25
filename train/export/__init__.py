"""From a run to a bundle: readout, ONNX graphs, precisions, provenance."""
