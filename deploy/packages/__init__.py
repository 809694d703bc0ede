"""What Drover is installed from: `make deb`, `make wheel`."""
