"""Planning: what a corpus, an index, a load and models need in nodes, memory, hours and money, before any is rented."""
