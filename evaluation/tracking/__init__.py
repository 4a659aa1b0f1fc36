"""Where the results of an evaluation are announced: TensorBoard, Weights & Biases."""
