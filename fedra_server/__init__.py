"""The server at headquarters: plans rounds, admits adapter deltas, merges them per layer."""

from importlib.metadata import version

__version__ = version("fedra")
