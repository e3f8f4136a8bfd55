"""Networks: plain PyTorch modules that know nothing of Ray, files or FAISS."""
