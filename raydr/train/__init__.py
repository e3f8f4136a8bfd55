"""Training on Ray Train with DeepSpeed, written once for every method.

`config` the settings; `objective` what a method writes (a loss over embeddings, or over a model and a batch);
`sampling` which examples make a batch; `batches` examples to tensors, on Ray Data; `grad_cache` and `distributed` exact
gradients over many texts and many workers; `engine` the one door to DeepSpeed; `loop` what a worker does; `trainer`
what the driver does.
"""
