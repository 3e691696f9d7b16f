"""What carries pages between a pager and its servers."""
