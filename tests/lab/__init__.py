"""A fleet of real OpenSSH servers on one machine: see README.md."""
