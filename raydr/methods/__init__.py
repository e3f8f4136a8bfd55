"""One file per paper; none imports another. `raydr.methods.base` is what they share."""
