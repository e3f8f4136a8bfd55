"""Causal language models as rerankers use them: prompts, windows, and the engines that read a prompt. No Ray."""
