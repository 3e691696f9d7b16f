"""What drives a VM over its hosts: the coordinator and its operations. Knows nothing of Ray."""
