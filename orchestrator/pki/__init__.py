"""Who is who: names of hosts and roles, the certificates that prove them, and the authority that signs those."""
