"""The pure core: decisions only, no I/O, no clock, no randomness. Shared by the coordinator, the API and the agents."""
