"""A folder of checkpoints: what is kept in it, for whom, and how it goes."""
