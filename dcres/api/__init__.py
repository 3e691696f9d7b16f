"""What people call from Python: clusters, VMs and checkpoints; `dcres` re-exports the names."""
