"""What users call: sparsify, the compiled module, torch.compile's backend, save/load, explain."""
