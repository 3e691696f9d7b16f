"""Remote paging: the pager on the main host and the memory servers on the sub hosts."""
