"""The one place for ioctl, ptrace, ctypes and other calls that Python has no name for."""
