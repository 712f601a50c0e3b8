"""The commands beside the server: sandbox, benchmark, bundle, and those that call a running server."""
