"""What dcres decides: pure values and state machines, no I/O and no clock."""
