"""The version, read by the build and by the laboratory."""

__version__ = "0.1.0"
