"""Registers models: the only part of the server that needs torch, so import it where needed."""
