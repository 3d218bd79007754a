"""Video lists, decoding, clip augmentation, loaders, and the embedded moving-shapes data set."""
