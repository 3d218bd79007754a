"""Programs that prepare a data set: lists, subsets, a check of every video, smaller copies. Training needs none."""
