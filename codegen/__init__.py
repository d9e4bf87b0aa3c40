"""Ways to run packed weights: the kernel table and the backends."""
