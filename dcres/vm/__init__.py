"""One QEMU process: how it is started, steered over QMP, judged and filled with a guest."""
