"""What a layer computes: pooling and convolution."""
