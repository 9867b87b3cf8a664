"""The verbs, one file each; options in, one library call, exit code out."""
