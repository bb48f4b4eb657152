"""The command line of bntools; it uses only the public API."""
