"""Drover's control plane. Importing this package, or its pure core, never imports Ray, gRPC or kazoo."""
