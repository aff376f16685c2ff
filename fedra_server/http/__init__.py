"""The HTTP face of the server: thin handlers over the store and the coordinator."""
