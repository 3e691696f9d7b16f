"""The pager of a main host: ``python -m dcres.paging.pager SETTINGS``."""
