"""Reading and writing checkpoints: tensors on disk <-> QTensors. Nothing here builds a model."""
