"""The memory server of a sub host: ``python -m dcres.paging.server SETTINGS``."""
