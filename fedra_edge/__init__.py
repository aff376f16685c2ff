"""Client SDK for federated tuning on machines that cannot hold the model."""
