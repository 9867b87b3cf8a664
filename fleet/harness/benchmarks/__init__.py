"""One file per benchmark family: dataset, pre- and post-processing, accuracy."""
