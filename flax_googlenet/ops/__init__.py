"""What a layer computes: convolution, pooling and normalisation, and which platforms compute them in which way."""
