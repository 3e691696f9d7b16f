"""What the files of a checkpoint say, and how they are read back and checked."""
