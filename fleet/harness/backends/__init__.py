"""One file per inference engine; the file name is the option value."""
