"""Files for other runtimes, made of a network and compared with it: ONNX, StableHLO, OpenVINO, a page for browsers."""
