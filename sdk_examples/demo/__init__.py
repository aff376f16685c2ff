"""The whole product at work on one machine: a server, six sites, real processes, real data."""
