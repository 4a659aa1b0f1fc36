"""Images to compare with, to measure or to score: of a data set, of a folder, of an array in a file."""
