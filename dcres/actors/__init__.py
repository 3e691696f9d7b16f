"""What connects hosts: plain Python classes, and the one module that puts them on Ray."""
