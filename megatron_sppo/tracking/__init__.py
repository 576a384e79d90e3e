"""What trackers of experiments (TensorBoard, Weights & Biases, MLflow) are told of a run."""
