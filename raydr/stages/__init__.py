"""The verbs over tables: embed and search, in this process or on Ray."""
