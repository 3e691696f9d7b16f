"""Ray: the gateway, which alone imports it, the fleet of hosts, and local clusters."""
