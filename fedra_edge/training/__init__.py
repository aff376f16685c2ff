"""Training of a slice on this machine, one module per backend."""
