"""What `sterna bench` measures, and how: migrations of two processes of this host, with and without limits."""
