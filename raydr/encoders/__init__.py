"""Encoders: a checkpoint, a tokenizer and a backend behind the `Encoder` protocol. No Ray."""
