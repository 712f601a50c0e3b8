"""The commands beside the server: the sandbox, the benchmark, the bundle, and those that ask a running server."""
