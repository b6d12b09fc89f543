"""Images: finding files, and turning a file or an array into the input of the network."""
