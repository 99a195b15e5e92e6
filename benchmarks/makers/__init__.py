"""Scripts that make what a peer loads, each in a Python that has its tool; they import nothing of this project."""
