"""What runs on each host of a VM: the agent that Ray starts there, and its parts."""
