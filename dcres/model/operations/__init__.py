"""What is done to a VM, each operation a pure machine: events in, instructions out.

The state is a frozen value. `begin` makes the first one; `step` takes an event and makes the next,
with the instructions to be carried out. An instruction says what is to be done where; the event
that answers it carries the result. No machine reads a clock, waits or calls anything, and none
raises: `dcres.actors.control.executor` carries the instructions out, for all of them alike.
"""
