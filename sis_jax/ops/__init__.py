"""Array operations without files or networks: convolution, resizing, clustering, metrics."""
